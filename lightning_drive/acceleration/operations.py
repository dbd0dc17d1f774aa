"""Linear layers and convolutions with a sparse weight: which forms there are for them, outputs and gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_drive.acceleration.convolution_layouts import (
    Axis,
    Lines,
    Pixels,
    PixelTokens,
    Windows,
    is_channels_last,
)
from lightning_drive.acceleration.layouts import Layout, Tokens
from lightning_drive.acceleration.pattern import Pattern

Pair: TypeAlias = tuple[int, int]

_INPUTS_FIRST = {"transformers.pytorch_utils.Conv1D", "transformers.modeling_utils.Conv1D"}
"""Linear layers of other libraries whose weight has the inputs first."""

KINDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: F.linear,
    nn.Conv1d: torch.conv1d,
    nn.Conv2d: torch.conv2d,
}
"""The layers that have a sparse form, with subclasses that inherit ``forward``, and the functions that they call."""

_LINEAR = {"torch_geometric.nn.dense.linear.Linear", *_INPUTS_FIRST}
"""Linear layers of other libraries."""


TYPES = (torch.float32, torch.float64)
"""The precisions that sparse forms compute in."""


@dataclass(frozen=True)
class Operation:
    """A linear layer or a convolution, without its values.

    Args:
        shape: The shape of the weight: outputs and inputs, and the kernel of a convolution.
        stride: The stride of a convolution in each dimension; empty for a linear layer.
        padding: The zeros before and after each dimension.
        dilation: The dilation in each dimension.

    """

    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[Pair, ...] = ()
    dilation: tuple[int, ...] = ()

    @classmethod
    def of_layer(cls, layer: nn.Module) -> "Operation | None":
        """Return the operation of a layer, or nothing if it has no sparse form."""
        weight = layer._parameters.get("weight")
        if weight is None or weight.dtype not in TYPES:  # it may be computed, or complex
            return None
        shape = tuple(weight_of(layer).shape)
        if _qualified_name(layer) in _LINEAR:
            return cls.of_call(F.linear, shape)
        for kind, function in KINDS.items():
            if isinstance(layer, kind) and _computes_like(layer, kind):
                if kind is nn.Linear:
                    return cls.of_call(function, shape)
                given: Any = layer
                if given.padding_mode == "zeros":
                    return cls.of_call(function, shape, given.stride, given.padding, given.dilation, given.groups)
        return None

    @classmethod
    def of_call(
        cls,
        function: Callable[..., Tensor],
        shape: tuple[int, ...],
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> "Operation | None":
        """Return the operation of a call of ``F.linear`` or ``torch.conv2d``, or nothing if it has no sparse form."""
        kernel = shape[2:]
        if function is F.linear:
            return cls(shape) if len(shape) == 2 else None
        if groups != 1:
            return None
        dilations = _each(dilation, kernel)
        reach = tuple(spacing * (size - 1) for spacing, size in zip(dilations, kernel, strict=True))
        if padding == "same":
            paddings = tuple((total // 2, total - total // 2) for total in reach)
        else:
            paddings = tuple((size, size) for size in _each(0 if padding == "valid" else padding, kernel))
        return cls(shape, _each(stride, kernel), paddings, dilations)

    @property
    def num_outputs(self) -> int:
        """How many features or channels come out."""
        return self.shape[0]

    def check(self, input: Tensor) -> None:
        """Raise a ``ValueError`` if an input has another number of features or channels, or of dimensions."""
        channel_dim, dims = -1 - len(self.stride), len(self.shape)
        takes = (dims - 1, dims) if self.stride else range(1, input.ndim + 1)
        if input.ndim not in takes or input.shape[channel_dim] != self.shape[1]:
            raise ValueError(
                f"An input must have {self.shape[1]} features or channels in dimension {channel_dim}, got one of shape"
                f" {tuple(input.shape)}."
            )

    def batch(self, input: Tensor) -> Tensor:
        """Return an input or output as layouts expect it: that of a convolution as a batch of images."""
        if not self.stride:
            return input
        input = input if input.ndim == len(self.shape) else input[None]
        return input if len(self.stride) == 2 else input[:, :, None]

    def unbatch(self, output: Tensor, input: Tensor) -> Tensor:
        """Return an output in the form of the input: the way back from :meth:`batch`."""
        if not self.stride:
            return output
        output = output if len(self.stride) == 2 else output[:, :, 0]
        return output if input.ndim == len(self.shape) else output[0]

    def layouts(self, images: Tensor) -> dict[str, Layout]:
        """Return the layouts for inputs of this shape, with their names."""
        if not self.stride:
            return {"tokens": Tokens()}
        axes = self._axes(images.shape[2:])
        if all(axis.is_pointwise for axis in axes):
            if is_channels_last(images):
                return {"tokens": PixelTokens()}
            return {"pixels": Pixels(images.shape[2:].numel())}
        return {"lines": Lines(*axes), "windows": Windows(*axes)}

    def layout(self, name: str, images: Tensor) -> Layout:
        """Return the layout of this name for inputs of this shape; in another memory format it may be another one."""
        layouts = self.layouts(images)
        return layouts.get(name) or next(iter(layouts.values()))

    def kind(self, images: Tensor) -> tuple[object, ...]:
        """Return what a layout depends on: nothing for a linear layer, else sizes and memory format of the images."""
        return (images.shape[2:], is_channels_last(images)) if self.stride else ()

    def pattern(self, layout: Layout, places: Tensor) -> Pattern:
        """Return the pattern of the weights that are kept, at ``places`` of the flattened weight, for a layout."""
        shape = self.shape if len(self.stride) != 1 else (*self.shape[:2], 1, *self.shape[2:])
        return layout.pattern(places, torch.Size(shape))

    def _axes(self, sizes: torch.Size) -> tuple[Axis, Axis]:
        axes = [
            _axis(*settings)
            for settings in zip(
                sizes[-len(self.stride) :], self.shape[2:], self.stride, self.dilation, self.padding, strict=True
            )
        ]
        return (axes[0], axes[1]) if len(axes) == 2 else (_axis(1, 1, 1, 1, (0, 0)), axes[0])


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a layer, its outputs first."""
    weight: Any = layer.weight
    return weight.t() if _qualified_name(layer) in _INPUTS_FIRST else weight  # type: ignore[no-any-return]


def output(
    operation: Operation,
    layout: Layout,
    pattern: Pattern,
    entries: Tensor,
    bias: Tensor | None,
    images: Tensor,
    keep: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Return the outputs of an operation for a batch.

    Args:
        operation: The operation.
        layout: A layout for inputs of this shape.
        pattern: Its pattern.
        entries: The entries of the sparse matrix, :meth:`Pattern.values` of the kept weights.
        bias: One number for each output, or none.
        images: The batch, of the type of the entries.
        keep: Takes the table if a single one is all of the batch, for :func:`gradients`.

    """
    images = layout.arranged(images)
    result, table = layout.empty_output(images, operation.num_outputs), None
    if not images.numel():
        return result
    blocks = layout.blocks(images)
    for block, target in zip(blocks, layout.blocks(result), strict=True):
        table = layout.table(block, table)
        product = pattern.product(entries, table)
        if bias is not None:
            product.view(-1, len(bias), product.shape[1]).add_(bias[:, None])
        layout.write_(target, product)
    if keep is not None and table is not None and len(blocks) == 1:
        keep(table)
    return result


def gradients(
    layout: Layout,
    pattern: Pattern,
    entries: Tensor,
    images: Tensor,
    gradient: Tensor,
    needs_input: bool,
    kept_table: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of a batch, if needed, and of the kept weights, for a gradient of the outputs."""
    images, gradient = layout.arranged(images), layout.arranged(gradient)
    of_images = layout.new_gradient(images) if needs_input else None
    of_entries, table = torch.zeros_like(entries), None
    targets = layout.blocks(images if of_images is None else of_images)
    for block, of_outputs, target in zip(layout.blocks(images), layout.blocks(gradient), targets, strict=True):
        product = layout.product(of_outputs)
        table = layout.table(block, table) if kept_table is None else kept_table
        of_entries = pattern.add_outer_products(of_entries, product, table)
        if needs_input:
            layout.add_table_(target, pattern.transposed_product(entries, product))
    return of_images, pattern.gathered(of_entries)


def _each(setting: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Return one number for each dimension of a kernel; torch also takes a single one for all of them."""
    numbers = (setting,) if isinstance(setting, int) else tuple(setting)
    return numbers * len(kernel) if len(numbers) == 1 else numbers


def _axis(inputs: int, kernel: int, stride: int, dilation: int, padding: Pair) -> Axis:
    outputs = (inputs + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
    return Axis(inputs, kernel, stride, dilation, padding[0], outputs)


def _qualified_name(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _computes_like(layer: nn.Module, kind: type[nn.Module]) -> bool:
    methods = ("forward", "_conv_forward")
    return all(getattr(type(layer), method, None) is getattr(kind, method, None) for method in methods)
