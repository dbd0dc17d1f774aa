"""Follow parameters through the operations of a forward pass: what they cost, and whether pruned zeros get lost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_drive.network import flop_formulas

_CHOOSING = {torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather}
_ADDING = {torch.ops.aten.add, torch.ops.aten.add_, torch.ops.aten.sub, torch.ops.aten.sub_}
_MOVING = ("cat", "stack", "copy", "scatter", "index_put", "where", "norm", "pad", "roll", "embedding")
"""Parts of the names of operations that take a parameter and activations without multiplying them as matrices."""


@dataclass
class _Origin:
    """What a tensor was computed from, if from parameters, buffers and constants alone."""

    names: dict[str, bool] = field(default_factory=dict)
    """Parameter name to whether the entries of the tensor go with those of the parameter, one by one or repeated."""
    dense_again: set[str] = field(default_factory=set)
    """Names of masked parameters whose zeros are no longer there."""
    keep: Tensor | None = None
    """The tensor, or its memory would be used for others."""


class ParameterTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows parameters through the operations that take them, and what is computed from them alone.

    Args:
        counter: Counts the operations; it is on, outside of this mode.
        parameters: All parameters by name.
        buffers: All buffers by name.
        masks: Parameter name to boolean mask, which its weights follow already.

    """

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
        self._places: dict[int, list[tuple[int, int, str]]] = {}  # memory to the start and the end of parameters in it
        for name, parameter in parameters.items():
            if parameter.layout == torch.strided:
                start = parameter.data_ptr()
                self._places.setdefault(_memory(parameter), []).append((start, start + parameter.nbytes, name))
        self._origins = {_memory(buffer): _Origin() for buffer in buffers.values()}
        self.flops = dict.fromkeys(parameters, 0)
        """Parameter name to the operations of the products that it is multiplied in."""
        self.used: dict[str, None] = {}
        """Parameters that any operation takes; the values of this and the next ones mean nothing."""
        self.in_products: dict[str, None] = {}
        """Parameters that are multiplied with as matrices or kernels."""
        self.dense_again: dict[str, None] = {}
        """Masked parameters from which weights are computed that are not 0 where the masks prune."""
        self.uncounted: dict[str, None] = {}
        """Parameters that an operation without a formula multiplies with."""
        self.uncounted_calls: dict[str, None] = {}
        """Operations without a formula that multiply activations."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        flops = self._counter.get_total_flops() - before
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        origins = [self._origin(tensor) for tensor in given]
        self._note_use(func, given, origins, flops)
        if func.overloadpacket in _CHOOSING and given[0].ndim > 2:  # one matrix of several, as mixtures of experts do
            given, origins = given[:1], origins[:1]
        if None not in origins:
            self._note_origin(func, result, given, origins, is_product=flops > 0)
        elif func._schema.is_mutable:  # activations were written into a constant
            for output in tree_leaves(result):
                self._origins.pop(_memory(output) if isinstance(output, Tensor) else -1, None)
        return result

    def _origin(self, tensor: Tensor) -> _Origin | None:
        """Return what a tensor comes from: a parameter whose memory it is in, or what was noted of its memory."""
        memory = _memory(tensor)
        if memory in self._places:
            return _Origin(dict.fromkeys(self._names_at(tensor), True))
        return self._origins.get(memory)

    def _names_at(self, tensor: Tensor) -> list[str]:
        """Name the parameters in whose memory a tensor begins; sparse ones have none."""
        places = self._places.get(_memory(tensor))
        if not places:
            return []
        place = tensor.data_ptr()
        return [name for start, end, name in places if start <= place < end]

    def _note_use(self, func: Any, given: list[Tensor], origins: list[_Origin | None], flops: int) -> None:
        """Note which parameters an operation takes, and whether it multiplies with them."""
        taken = {name: None for origin in origins if origin is not None for name in origin.names}
        self.used.update(taken)
        if flops:
            self._note_product(func, given, taken, flops)
            self._note_dense_again(origins)
        elif taken and _mixes(func, given, origins):
            names = [name for name in taken if self._parameters[name].ndim > 1]
            self.uncounted.update(dict.fromkeys(names))
            self.in_products.update(dict.fromkeys(names))
            self._note_dense_again(origins)
        elif not taken and flop_formulas.multiplies_without_formula(func, given):
            self.uncounted_calls[func._schema.name] = None

    def _note_product(self, func: Any, given: list[Tensor], taken: dict[str, None], flops: int) -> None:
        """Add what an operation costs to the largest parameter that it is given, or to the matrices of one kernel."""
        known = [name for name in taken if self._parameters[name].ndim > 1]
        self.in_products.update(dict.fromkeys(known))
        direct = [name for tensor in given for name in self._names_at(tensor)]
        matrices = [name for name in dict.fromkeys(direct) if self._parameters[name].ndim > 1] or known
        if func.overloadpacket in flop_formulas.RECURRENT:
            total = sum(self._parameters[name].numel() for name in matrices)
            for name in matrices:
                self.flops[name] += flops * self._parameters[name].numel() // total
        elif owners := matrices or list(taken):
            self.flops[max(owners, key=lambda name: self._parameters[name].nbytes)] += flops

    def _note_dense_again(self, origins: list[_Origin | None]) -> None:
        for origin in origins:
            self.dense_again.update(dict.fromkeys(sorted(origin.dense_again) if origin else ()))

    def _note_origin(
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
        """Return whether a term is 0 throughout, but is trained, as the product of low-rank factors is."""
        return any(
            known is not None
            and not tensor.any()
            and any(self._parameters[name].requires_grad for name in known.names)
            and self._num_pruned.keys().isdisjoint(known.names)
            for tensor, known in zip(given, origins, strict=True)
        )

    def _dense_again(self, output: Tensor, origin: _Origin) -> set[str]:
        """Return names of the masked parameters whose zeros are no longer there in what was computed from them."""
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


def _mixes(func: Any, given: list[Tensor], origins: list[_Origin | None]) -> bool:
    """Return whether an operation without a formula multiplies a parameter with activations, as far as can be told."""
    moves = func.is_view or torch.Tag.pointwise in func.tags or any(part in func._schema.name for part in _MOVING)
    activations = [
        tensor
        for tensor, origin in zip(given, origins, strict=True)
        if origin is None and tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel()
    ]
    return not moves and bool(activations)
