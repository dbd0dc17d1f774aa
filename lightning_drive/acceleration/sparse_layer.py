"""SparseLayer, a linear layer or convolution for inference that holds and computes with nonzero weights only."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_drive.acceleration import operations
from lightning_drive.acceleration.layouts import Layout
from lightning_drive.acceleration.operations import Operation
from lightning_drive.acceleration.pattern import Pattern


class _Prepared(NamedTuple):
    """What a layer computes with on inputs of one kind."""

    kind: tuple[object, ...]
    layout: Layout
    pattern: Pattern
    entries: Tensor


class SparseLayer(nn.Module):
    """A linear layer or a convolution for inference, of which only the nonzero weights are there.

    It takes the inputs that the dense layer takes, of any size, and returns the same outputs up to rounding. It has no
    parameters, and no gradient runs through it.

    Args:
        layer: The dense layer, whose public attributes are taken over.
        operation: Its operation.
        form: The name of a layout, see :meth:`Operation.layouts`.

    """

    places: Tensor
    kept: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Module, operation: Operation, form: str) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(layer).items() if not name.startswith("_")})
        self.__dict__.pop("forward", None)
        self.operation, self.form = operation, form
        flat = operations.weight_of(layer).detach().flatten()
        bias = layer._parameters.get("bias")
        places = flat.nonzero()[:, 0]
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("kept", flat[places], persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)
        self._prepared: _Prepared | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the outputs of the dense layer."""
        if input.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "An accelerated module is for inference, but this input needs gradients. Run it under"
                " `torch.inference_mode()` or `torch.no_grad()`, or take the module that it was made from."
            )
        if input.dtype != self.kept.dtype and torch.is_autocast_enabled(input.device.type):
            input = input.to(self.kept.dtype)
        self.operation.check(input)
        images = self.operation.batch(input)
        prepared = self._prepare(images)
        output = operations.output(
            self.operation, prepared.layout, prepared.pattern, prepared.entries, self.bias, images
        )
        return self.operation.unbatch(output, input)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew: for code that reads it."""
        flat = self.kept.new_zeros(torch.Size(self.operation.shape).numel())
        return flat.index_copy_(0, self.places, self.kept).view(self.operation.shape)

    def extra_repr(self) -> str:
        """Return shape, sparsity and form."""
        sparsity = 1 - len(self.kept) / torch.Size(self.operation.shape).numel()
        return f"{self.operation.shape}, sparsity={sparsity:.2%}, form={self.form!r}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the first call makes again."""
        return {**super().__getstate__(), "_prepared": None}  # type: ignore[no-untyped-call]

    def _prepare(self, images: Tensor) -> _Prepared:
        """Return what the layer computes with on such inputs, and keep it for the next ones."""
        kind = (*self.operation.kind(images), self.kept.dtype, self.kept.device)
        prepared = self._prepared  # read once: another thread may replace it
        if prepared is None or prepared.kind != kind:
            layout = self.operation.layout(self.form, images)
            pattern = self.operation.pattern(layout, self.places)
            self._prepared = prepared = _Prepared(kind, layout, pattern, pattern.values(self.kept))
        return prepared
