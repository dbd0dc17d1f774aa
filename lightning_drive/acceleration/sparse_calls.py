"""Compute with pruned weights in sparse forms, while parameters, modules and gradients look as ever."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_drive.acceleration import operations
from lightning_drive.acceleration.layouts import Layout
from lightning_drive.acceleration.operations import Operation
from lightning_drive.acceleration.pattern import Pattern
from lightning_drive.acceleration.weight_calls import Call, WeightCalls
from lightning_drive.core import function_modes

_MOST_PATTERNS = 8
"""Patterns that are kept for each weight: one for each size of images that a convolution meets."""


class _Numbers:
    """The numbers of a tensor as they are now, to be recognised in other tensors with the same memory."""

    def __init__(self, tensor: Tensor) -> None:
        storage: Any = tensor.untyped_storage()
        self._storage = StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # keeps its address from being reused
        self._version = tensor._version

    def are_those_of(self, tensor: Tensor) -> bool:
        """Whether a tensor has these numbers, and nobody has written to them since."""
        return tensor._version == self._version and tensor.untyped_storage()._cdata == self._storage.cdata


class SparseWeight:
    """A parameter with zeros that stay, and the form in which to compute with it."""

    def __init__(self, parameter: Tensor, places: Tensor, operation: Operation, form: str) -> None:
        self.parameter = parameter
        self.operation = operation
        self._form = form
        self._places = places  # of the kept weights, flattened
        self._stride = parameter.stride()
        self._in_memory = _in_memory(places, parameter)
        self._patterns: dict[Any, tuple[Layout, Pattern]] = {}
        self._last_gradient: _Numbers | None = None

    def fits(self, call: Call) -> bool:
        """Whether a call can be computed in this form."""
        if call.obstacle or call.operation != self.operation or call.weight.stride() != self._stride:
            return False
        sizes = call.input.shape[call.input.ndim - len(self.operation.stride) :]
        settings = zip(sizes, self.operation.shape[2:], self.operation.dilation, self.operation.padding, strict=True)
        return all(size + sum(padding) > dilation * (kernel - 1) for size, kernel, dilation, padding in settings)

    def kept(self, weight: Tensor) -> Tensor:
        """Return the values of the kept weights."""
        return _flat(weight).index_select(0, self._in_memory)

    def gradient(self, weight: Tensor, of_kept: Tensor) -> Tensor:
        """Return the gradient of the weight, with zeros where it is pruned."""
        gradient = self._scattered(weight, of_kept)
        self._last_gradient = _Numbers(gradient)
        return gradient

    @property
    def has_masked_gradient(self) -> bool:
        """Whether the gradient of the parameter is the one that :meth:`gradient` returned last, and nothing else."""
        gradient = self.parameter.grad
        return gradient is not None and self._last_gradient is not None and self._last_gradient.are_those_of(gradient)

    def mask(self, weight: Tensor) -> Tensor:
        """Return ones for the kept weights, and zeros."""
        return self._scattered(weight, weight.new_ones(len(self._places)))

    def _scattered(self, weight: Tensor, kept: Tensor) -> Tensor:
        dense = torch.zeros_like(weight)
        _flat(dense).index_copy_(0, self._in_memory, kept)
        return dense

    def pattern(self, images: Tensor) -> tuple[Layout, Pattern]:
        """Return layout and pattern for a batch."""
        kind = self.operation.kind(images)
        if kind not in self._patterns:
            if len(self._patterns) == _MOST_PATTERNS:
                del self._patterns[next(iter(self._patterns))]
            layout = self.operation.layout(self._form, images)
            self._patterns[kind] = layout, self.operation.pattern(layout, self._places)
        return self._patterns[kind]


class SparseCalls(WeightCalls):
    """A mode under which all calls of torch with some weights are computed in sparse forms, where they fit.

    Nothing is attached to parameters or modules. The gradient of a weight is a dense tensor with zeros where it is
    pruned. Whatever a form is not made for, torch computes as ever.
    """

    def __init__(self, weights: Iterable[SparseWeight]) -> None:
        super().__init__({id(weight.parameter): weight for weight in weights})

    @property
    def masked_gradients(self) -> set[Tensor]:
        """The parameters whose gradients are zero already where they are pruned."""
        return {weight.parameter for weight in self._weights.values() if weight.has_masked_gradient}

    def compute(self, known: SparseWeight, call: Call) -> Tensor:
        """Return the result of a call with one of the weights."""
        return product(known, call) if known.fits(call) else call.dense(call.input, call.weight, call.bias)


def product(weight: SparseWeight, call: Call) -> Tensor:
    """Return the result of a call that a sparse form fits, with its gradients."""
    result: Tensor = _Product.apply(call.input, call.weight, call.bias, weight, call)
    return result


class _Product(torch.autograd.Function):
    """A linear layer or convolution with a sparse weight."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, sparse: SparseWeight, call: Call
    ) -> Tensor:
        operation, kept = sparse.operation, sparse.kept(weight)
        images = operation.batch(input)
        layout, pattern = sparse.pattern(images)
        ctx.sparse, ctx.function, ctx.settings = sparse, call.function, call.settings
        ctx.set_materialize_grads(False)
        tables: list[Tensor] = []
        entries = pattern.values(kept)
        result = operations.output(operation, layout, pattern, entries, bias, images, tables.append)
        ctx.save_for_backward(input, weight, kept, *tables)
        return operation.unbatch(result, input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None, None
        input, weight, kept, *tables = ctx.saved_tensors
        sparse: SparseWeight = ctx.sparse
        if torch.is_grad_enabled():  # the gradients will be differentiated
            call = Call(ctx.function, input, weight, None, ctx.settings)
            of_input, of_weight = _differentiable(sparse, call, gradient, ctx.needs_input_grad)
            of_bias = _sum_to_bias(sparse.operation, gradient) if ctx.needs_input_grad[2] else None
            return of_input, of_weight, of_bias, None, None
        with function_modes.set_aside():
            operation = sparse.operation
            images = operation.batch(input)
            layout, pattern = sparse.pattern(images)
            of_images, of_kept = operations.gradients(
                layout,
                pattern,
                pattern.values(kept),
                images,
                operation.batch(gradient),
                ctx.needs_input_grad[0],
                *tables,
            )
            of_input = None if of_images is None else operation.unbatch(of_images, input)
            of_weight = sparse.gradient(weight, of_kept) if ctx.needs_input_grad[1] else None
            of_bias = _sum_to_bias(operation, gradient) if ctx.needs_input_grad[2] else None
        return of_input, of_weight, of_bias, None, None


def _sum_to_bias(operation: Operation, gradient: Tensor) -> Tensor:
    channels = gradient.ndim - 1 - len(operation.stride)
    others = [dim for dim in range(gradient.ndim) if dim != channels]
    return gradient.sum(others) if others else gradient


def _differentiable(
    sparse: SparseWeight, call: Call, gradient: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of input and weight as dense operations of torch, which have gradients themselves."""
    with torch.enable_grad():
        own = [tensor.view_as(tensor) for tensor in (call.input, call.weight)]
        result = call.dense(own[0], own[1] * sparse.mask(call.weight), None)
        wanted = [tensor for tensor, is_needed in zip(own, needs, strict=False) if is_needed]
        gradients = iter(torch.autograd.grad(result, wanted, gradient, create_graph=True) if wanted else ())
    return next(gradients) if needs[0] else None, next(gradients) if needs[1] else None


def _flat(weight: Tensor) -> Tensor:
    """Return a view of all numbers of a tensor, in the order in which they lie in memory."""
    return weight.detach().as_strided((weight.numel(),), (1,))


def _in_memory(places: Tensor, weight: Tensor) -> Tensor:
    """Return where entries of a flattened tensor lie in its memory."""
    if weight.is_contiguous():
        return places
    in_memory, rest = torch.zeros_like(places), places
    for size, stride in zip(reversed(weight.shape), reversed(weight.stride()), strict=True):
        in_memory += rest % size * stride
        rest = rest // size
    return in_memory
