"""Paths through functions that choose entries: by their values, by masks and conditions, or by indices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_drive.network.path_arithmetic import nothing_but_shut, total
from lightning_drive.network.path_marks import Gate, is_mark, is_undecided, without_shut, zeros_and_ones

SELECTING = {
    **dict.fromkeys(("amax", "amin", "max", "min", "argmax", "argmin", "median", "nanmedian"), (1, None)),
    **dict.fromkeys(("sort", "argsort", "mode"), (1, -1)),
    **dict.fromkeys(("topk", "kthvalue"), (2, -1)),
}
"""Functions that choose entries by their values to the position and the default of their argument ``dim``."""


def selected(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return marks of all that may be chosen, as values are not known, and indices that choose one after another."""
    if len(args) > 1 and isinstance(args[1], Tensor):  # `max` and `min` of two tensors
        return total(*args)
    mark = without_shut(args[0] if args else kwargs["input"])
    place, default = SELECTING[name]
    dim = kwargs.get("dim", args[place] if len(args) > place else default)
    result = func(*args, **kwargs)
    parts = [result] if isinstance(result, Tensor) else list(result)
    for i, part in enumerate(parts):
        if not part.is_floating_point():
            parts[i] = _taking_turns(part, mark, dim)
            continue
        joined = mark.sum() if dim is None else mark.sum(dim, keepdim=True)
        joined = joined if dim is None or part.ndim == mark.ndim else joined.squeeze(dim)
        parts[i] = zeros_and_ones(joined).expand_as(part).contiguous()  # it may be written to
        if isinstance(args[0] if args else None, Gate):
            parts[i] = parts[i].as_subclass(Gate)
    return parts[0] if isinstance(result, Tensor) else type(result)(parts)


def _taking_turns(indices: Tensor, mark: Tensor, dim: int | None) -> Tensor:
    """Return indices 0, 1, 2 and so on, from the start again after the last: with many, each entry is chosen."""
    size = mark.numel() if dim is None else mark.shape[dim]
    is_reduced = dim is None or indices.ndim < mark.ndim
    moved = indices if is_reduced else indices.movedim(dim, -1)  # type: ignore[arg-type]
    places = torch.arange(indices.numel(), device=indices.device).reshape(moved.shape) % max(size, 1)
    return places if is_reduced else places.movedim(-1, dim)  # type: ignore[arg-type]


def _masked_fill(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    if is_undecided(mask):
        return input
    return input.masked_fill(mask, value if is_mark(value) else nothing_but_shut(value))


def _masked_fill_(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    return input.copy_(_masked_fill(input.clone(), mask, value))


def _where(condition: Tensor, input: Any = None, other: Any = None) -> Any:
    if input is None:
        return torch.where(condition)
    if condition.dtype != torch.bool:  # `input.where(condition, other)`
        condition, input = input, condition
    input, other = (value if is_mark(value) else nothing_but_shut(value) for value in (input, other))
    if is_undecided(condition):
        return torch.where(condition, input, 0.0) * 0 + without_shut(input) + without_shut(other)
    return torch.where(condition, input, other)


def _gather(input: Tensor, dim: int, index: Tensor, **kwargs: Any) -> Tensor:
    if is_undecided(index):
        return zeros_and_ones(without_shut(input).sum(dim, keepdim=True)).expand_as(index).contiguous()
    return input.gather(dim, index)


def _take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    return torch.take_along_dim(input, indices, dim) if dim is None else _gather(input, dim, indices)


def _scatter_sum(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a rule that sums what a function scatters, in whatever way the function reduces it."""

    def scatter(input: Tensor, dim: int, index: Tensor, src: Any, reduce: str, **kwargs: Any) -> Any:
        return func(input, dim, index, src, "sum", include_self=kwargs.get("include_self", True))

    return scatter


RULES: dict[str, Callable[..., Any]] = {
    "masked_fill": _masked_fill,
    "masked_fill_": _masked_fill_,
    "where": _where,
    "gather": _gather,
    "take_along_dim": _take_along_dim,
    "scatter_reduce": _scatter_sum(torch.scatter_reduce),
    "scatter_reduce_": _scatter_sum(Tensor.scatter_reduce_),
}
"""Functions of torch to what takes their place."""
