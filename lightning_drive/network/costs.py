"""What a network computes with its weights in one forward pass: multiply-adds, and products with or without zeros."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_drive.core import shards
from lightning_drive.core.messages import listed, shown_error
from lightning_drive.network import forward_calls
from lightning_drive.network.forward_calls import Passage
from lightning_drive.network.without_dropout import in_mode


@dataclass(frozen=True)
class Costs:
    """The costs of a dense network, and what it computes with."""

    itemsizes: Mapping[str, int]
    """Parameter name to the bytes of one of its weights."""
    multiply_adds: Mapping[str, int | None]
    """Parameter name to the multiply-adds that its weights do for one sample; ``None`` where that is not known."""
    others: int | None
    """The multiply-adds in which no such parameter takes part; ``None`` if they are not known."""
    error: str | None = None
    """Why nothing could be counted; ``None`` if it could, or if it was not to be."""
    warnings: tuple[str, ...] = ()
    """What could not be counted, by name."""
    in_products: tuple[str, ...] = ()
    """All parameters, prunable or not, that are multiplied with as matrices or kernels, as they are or after others
    were added to them, say."""
    dense_again: tuple[str, ...] = ()
    """Masked parameters from which the network computes weights that are not 0 where the masks prune."""


def measure(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], given: Any, masks: Mapping[str, Tensor] | None = None
) -> Costs:
    """Measure one forward pass of a replica: the pass leaves traces.

    Multiply-adds are counted by torch's flop counter, for which one of them is two operations. It counts products of
    matrices, convolutions and attention, but not, for example, norms and activations. What an operation costs belongs
    to the parameter that it is given, in whatever layer or function that happens.

    Args:
        module: The network.
        parameters: Prunable parameters by name; those that are sharded over ranks are not counted.
        given: What the module takes, or a :class:`~lightning_drive.network.forward_calls.Passage` through it;
            ``None``: unknown.
        masks: Parameter name to boolean mask, which its weights follow already.

    """
    itemsizes = {name: parameter.dtype.itemsize for name, parameter in parameters.items()}
    unknown: dict[str, int | None] = dict.fromkeys(parameters)
    if given is None or any(map(shards.is_sharded, parameters.values())):
        return Costs(itemsizes, unknown, None)
    way = Passage.of(given)
    counter = FlopCounterMode(display=False, custom_mapping=_RECURRENT | _GROUPED | _BY_VECTOR)
    try:
        look = _Look(counter, dict(module.named_parameters()), dict(module.named_buffers()), masks or {})
        with (
            in_mode(module, "eval"),
            sdpa_kernel(SDPBackend.MATH),  # the counter has formulas for its parts, but not for all that is fused
            counter,
            look,
        ):
            way.run(module, forward_calls.as_input_of(module))
    except Exception as error:  # the module's own `forward`, called in a way it may not be made for
        return Costs(itemsizes, unknown, None, shown_error(error))
    size = 2 * (way.batch_size or 1)
    found = {name: None if name in look.uncounted else look.flops[name] // size for name in parameters}
    others = (counter.get_total_flops() - sum(look.flops[name] for name in parameters)) // size
    unused = [name for name in parameters if name not in look.used]
    return Costs(
        itemsizes,
        found,
        None if look.uncounted or look.uncounted_calls else others,
        warnings=tuple(_remarks(unused, list(look.uncounted), list(look.uncounted_calls), way.batch_size)),
        in_products=tuple(look.in_products),
        dense_again=tuple(look.dense_again),
    )


def _remarks(unused: list[str], uncounted: list[str], calls: list[str], batch_size: int | None) -> Iterator[str]:
    if unused:
        yield f"`forward` did not use {listed(map(repr, unused))} in eval mode, so it counts as no multiply-adds."
    if uncounted:
        yield (
            f"The multiply-adds of {listed(map(repr, uncounted))} are not known: torch's flop counter has no formula"
            " for the operation that `forward` uses it in."
        )
    if calls:
        yield (
            f"The multiply-adds of {listed(f'`{name}`' for name in calls)} are not known, so those of the whole network"
            " are not, either: torch's flop counter has no formula for what `forward` calls."
        )
    if batch_size is None:
        yield "Multiply-adds are those of a whole batch, since it is not known how many samples it has."


def _recurrent_flops(inputs: Any, *given: Any, **_: Any) -> int:
    """Count as for a product of every step with every matrix: an oneDNN or cuDNN kernel does all of them in one."""
    shapes = given[0] if isinstance(given[0], list) else given[:4]  # oneDNN: weights and biases, then states
    matrices = [shape for shape in shapes if isinstance(shape, tuple) and len(shape) == 2]
    return int(2 * prod(inputs[:-1]) * sum(map(prod, matrices)))


def _grouped_flops(first: Any, second: Any, *_: Any, **__: Any) -> int:
    """Count as for a product of every row with the matrix of its group, as mixtures of experts compute them."""
    is_split = len(first) == 2 or len(second) == 3
    return int(2 * prod(first if is_split else first[1:]) * second[-1])


_RECURRENT = {
    getattr(torch.ops.aten, name): _recurrent_flops
    for name in ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")
    if hasattr(torch.ops.aten, name)
}
_GROUPED = {getattr(torch.ops.aten, name): _grouped_flops for name in ("_grouped_mm",) if hasattr(torch.ops.aten, name)}


def _vector_flops(*shapes: Any, **_: Any) -> int:
    """Count a product with a vector: two operations for each number of the matrix, or of the other vector."""
    return 2 * max(prod(shape) for shape in shapes if isinstance(shape, tuple))


_BY_VECTOR = {getattr(torch.ops.aten, name): _vector_flops for name in ("mv", "addmv", "addmv_", "dot", "vdot")}
_CHOOSING = {torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather}
_ADDING = {torch.ops.aten.add, torch.ops.aten.add_, torch.ops.aten.sub, torch.ops.aten.sub_}
_MOVING = ("cat", "stack", "copy", "scatter", "index_put", "where", "norm", "pad", "roll", "embedding")
"""Parts of the names of operations that take a parameter and activations without multiplying them as matrices."""


_COSTLY = ("fft_", "linalg", "cdist", "pdist", "trilinear", "sparse_mm", "sparse_addmm", "cholesky", "matrix_exp")
"""Parts of the names of operations of torch that multiply, and for which there is no formula."""


@dataclass
class _Origin:
    """What a tensor was computed from, if from parameters, buffers and constants alone."""

    names: dict[str, bool] = field(default_factory=dict)
    """Parameter name to whether the entries of the tensor go with those of the parameter, one by one or repeated."""
    dense_again: set[str] = field(default_factory=set)
    keep: Tensor | None = None
    """The tensor, or its memory would be used for others."""


class _Look(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows parameters through the operations that take them, and what is computed from them alone."""

    def __init__(
        self,
        counter: FlopCounterMode,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = counter
        self._parameters = parameters
        self._num_pruned = {name: mask.numel() - int(mask.count_nonzero()) for name, mask in masks.items()}
        self._places: dict[int, list[tuple[int, int, str]]] = {}
        for name, each in parameters.items():
            if each.layout == torch.strided:
                start = each.data_ptr()
                self._places.setdefault(_memory(each), []).append((start, start + each.nbytes, name))
        self._origins = {_memory(each): _Origin() for each in buffers.values()}
        self.flops = dict.fromkeys(parameters, 0)
        self.used: dict[str, None] = {}
        self.in_products: dict[str, None] = {}
        self.dense_again: dict[str, None] = {}
        self.uncounted: dict[str, None] = {}
        self.uncounted_calls: dict[str, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        flops = self._counter.get_total_flops() - before
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        origins = [self._origin(tensor) for tensor in given]
        taken = {name: None for origin in origins if origin is not None for name in origin.names}
        self.used.update(taken)
        if flops:
            self._note_product(func, given, taken, flops)
            self._see(origins)
        elif taken and _mixes(func, given, origins):
            names = [name for name in taken if self._parameters[name].ndim > 1]
            self.uncounted.update(dict.fromkeys(names))
            self.in_products.update(dict.fromkeys(names))
            self._see(origins)
        elif not taken and _is_costly(func, given):
            self.uncounted_calls[func._schema.name] = None
        if func.overloadpacket in _CHOOSING and given[0].ndim > 2:  # one matrix of several, as mixtures of experts do
            given, origins = given[:1], origins[:1]
        if None not in origins:
            self._derive(func, result, given, origins, is_product=flops > 0)
        elif func._schema.is_mutable:  # activations were written into a constant
            for output in tree_leaves(result):
                self._origins.pop(_memory(output) if isinstance(output, Tensor) else -1, None)
        return result

    def _origin(self, tensor: Tensor) -> _Origin | None:
        """Return what a tensor comes from: a parameter whose memory it is in, or what was noted of its memory."""
        memory = _memory(tensor)
        if memory in self._places:
            place = tensor.data_ptr()
            return _Origin({name: True for start, end, name in self._places[memory] if start <= place < end})
        return self._origins.get(memory)

    def _note_product(self, func: Any, given: list[Tensor], taken: dict[str, None], flops: int) -> None:
        """Add what an operation costs to the largest parameter that it is given, or to the matrices of one kernel."""
        known = [name for name in taken if self._parameters[name].ndim > 1]
        self.in_products.update(dict.fromkeys(known))
        direct = [name for tensor in given for name in self._direct(tensor)]
        matrices = [name for name in dict.fromkeys(direct) if self._parameters[name].ndim > 1] or known
        if func.overloadpacket in _RECURRENT:
            total = sum(self._parameters[name].numel() for name in matrices)
            for name in matrices:
                self.flops[name] += flops * self._parameters[name].numel() // total
        elif owners := matrices or list(taken):
            self.flops[max(owners, key=lambda name: self._parameters[name].nbytes)] += flops

    def _direct(self, tensor: Tensor) -> list[str]:
        memory = _memory(tensor)
        if memory not in self._places:  # sparse ones have no place
            return []
        place = tensor.data_ptr()
        return [name for start, end, name in self._places[memory] if start <= place < end]

    def _see(self, origins: list[_Origin | None]) -> None:
        for origin in origins:
            self.dense_again.update(dict.fromkeys(sorted(origin.dense_again) if origin else ()))

    def _derive(
        self, func: Any, result: Any, given: list[Tensor], origins: list[_Origin | None], *, is_product: bool
    ) -> None:
        """Note what is computed from parameters and constants alone, and whether zeros were lost."""
        for output in tree_leaves(result):
            if not isinstance(output, Tensor) or _memory(output) in self._places:
                continue
            if _memory(output) in self._origins and not func._schema.is_mutable:  # a view
                continue
            origin = _Origin(keep=output)
            for tensor, known in zip(given, origins, strict=True):
                for name, goes_along in (known.names if known else {}).items():
                    fits = goes_along and not is_product and output.numel() >= tensor.numel()
                    origin.names[name] = origin.names.get(name, False) or fits
            if output.is_floating_point() or output.is_complex():
                origin.dense_again = self._dense_again(output, origin)
                if func.overloadpacket in _ADDING and self._adds_what_grows(given, origins):
                    origin.dense_again |= {
                        name for name, along in origin.names.items() if along and name in self._num_pruned
                    }
            self._origins[_memory(output)] = origin

    def _adds_what_grows(self, given: list[Tensor], origins: list[_Origin | None]) -> bool:
        """Whether something is added that is 0 throughout, but is trained, as the product of low-rank factors is."""
        return any(
            known is not None
            and not tensor.any()
            and any(self._parameters[name].requires_grad for name in known.names)
            and self._num_pruned.keys().isdisjoint(known.names)
            for tensor, known in zip(given, origins, strict=True)
        )

    def _dense_again(self, output: Tensor, origin: _Origin) -> set[str]:
        """Name the masked parameters whose zeros are no longer there in what was computed from them."""
        masked = [name for name, along in origin.names.items() if along and self._num_pruned.get(name)]
        if not masked:
            return set()
        num_zeros = output.numel() - int(output.count_nonzero())
        sizes = {name: self._parameters[name].numel() for name in masked}
        if sum(sizes.values()) == output.numel():  # side by side, or one alone
            return set() if num_zeros >= sum(self._num_pruned[name] for name in masked) else set(masked)
        return {
            name
            for name in masked
            if output.numel() % sizes[name] == 0
            and num_zeros < self._num_pruned[name] * (output.numel() // sizes[name])
        }


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _is_costly(func: Any, given: list[Tensor]) -> bool:
    """Whether an operation without a formula multiplies activations, as far as can be told."""
    kind, name = func._schema.name.split("::")
    if kind == "aten":
        return any(each in name for each in _COSTLY) and not any(each in name for each in ("norm", "check"))
    numbers = [tensor for tensor in given if tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel()]
    return kind not in ("prims", "torchvision") and len(numbers) > 1


def _mixes(func: Any, given: list[Tensor], origins: list[_Origin | None]) -> bool:
    """Whether an operation without a formula multiplies a parameter with activations, as far as can be told."""
    moves = func.is_view or torch.Tag.pointwise in func.tags or any(each in func._schema.name for each in _MOVING)
    activations = [
        tensor
        for tensor, origin in zip(given, origins, strict=True)
        if origin is None and tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel()
    ]
    return not moves and bool(activations)
