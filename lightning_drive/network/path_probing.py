"""Paths through functions that no rule is known for: they lead wherever the result changes with the arguments."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_drive.network.path_marks import is_mark, without_shut


def probe(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Return the result of a function with marks wherever it changes as the marks among its arguments do."""
    leaves, form = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if is_mark(leaf)]
    results, result_form = tree_flatten(result)
    wanted = [i for i, leaf in enumerate(results) if is_mark(leaf)]
    constants = [_in_full(leaf) for leaf in leaves]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(constants)
        for i, value in zip(places, values, strict=True):
            filled[i] = value
        args, kwargs = tree_unflatten(filled, form)
        outputs = tree_leaves(func(*args, **kwargs))
        return tuple(outputs[i] for i in wanted)

    marks = [leaves[i].as_subclass(Tensor) for i in places]
    for i, mark in zip(wanted, _Probe.apply(call, [results[i].dtype for i in wanted], *marks), strict=True):
        results[i] = mark
    return tree_unflatten(results, result_form)


class _Probe(torch.autograd.Function):
    """Finds which entries of a function's result change with its arguments, and which arguments change them."""

    @staticmethod
    def forward(
        ctx: Any, call: Callable[..., tuple[Tensor, ...]], kinds: list[torch.dtype], *marks: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.kinds = [mark.dtype for mark in marks]
        ctx.save_for_backward(*(without_shut(mark) != 0 for mark in marks))  # marks may be written to
        both = zip(call(*_drawn(marks, 0)), call(*_drawn(marks, 1)), kinds, strict=True)
        return tuple((first != second).to(kind) for first, second, kind in both)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        marks = [place.to(kind) for place, kind in zip(ctx.saved_tensors, ctx.kinds, strict=True)]
        with torch.enable_grad():
            values = [value.requires_grad_() for value in _drawn(marks, 0)]
            outputs = ctx.call(*values)
        gradients = tuple(_drawn(gradients, 2))
        used = [i for i, output in enumerate(outputs) if output.requires_grad]
        changes = torch.autograd.grad(
            [outputs[i] for i in used],
            values,
            [gradients[i].to(outputs[i].dtype) for i in used],
            allow_unused=True,
            materialize_grads=True,
        )
        return None, None, *((change != 0).to(kind) for change, kind in zip(changes, ctx.kinds, strict=True))


def _in_full(value: Any) -> Any:
    """Return a constant of floating-point numbers in double precision."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return value.detach().to(torch.complex128 if value.is_complex() else torch.float64)
    return value


def _drawn(marks: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return a random positive number wherever a path arrives."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for mark in marks:
        kind, least = (torch.complex128, 0.5 + 0.5j) if mark.is_complex() else (torch.float64, 0.5)
        numbers = torch.rand(mark.shape, generator=generator, dtype=kind) + least
        drawn.append(numbers.to(mark.device).mul_(without_shut(mark) != 0))
    return drawn
