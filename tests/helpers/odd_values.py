"""Every change of one value in nested dictionaries and lists to something odd."""

from collections.abc import Iterator
from typing import Any

import torch

MISSING = object()


ODD: list[Any] = [
    *(MISSING, None, [], {}, (), "", "x", -1, 0, 10**30, 10**5000, float("nan"), float("inf"), True, (1,), [None]),
    *({"a": 1}, {("a", 1): 2}, {1: {}}, b"x", torch.ones(2), torch.ones(1).expand(10**12), [[]], ["x"], [10**12]),
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested dictionaries and lists; of a list the first and the last."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*path, key))
    elif isinstance(value, (list, tuple)) and value:
        for index in {0, len(value) - 1}:
            yield from paths(value[index], (*path, index))


def changed(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    """A copy of dictionaries and lists with another value in one place."""
    head, *rest = path
    new = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        new[head] = changed(value[head], tuple(rest), odd)
    elif odd is MISSING:
        del new[head]
    else:
        new[head] = odd
    return new


def renamed(value: Any, path: tuple[Any, ...]) -> Any:
    """A copy with a tuple in place of a name."""
    *rest, name = path
    owner = value
    for key in rest:
        owner = owner[key]
    if not isinstance(owner, dict):
        return changed(value, path, (1, 2))
    new = {("a", 1) if key == name else key: each for key, each in owner.items()}
    return changed(value, tuple(rest), new) if rest else new


def mutations(value: Any, *, deepest: int = 100, every: int = 1) -> Iterator[Any]:
    """Yield the value with something odd in each place, of at most so many keys; at each in turn every n-th oddity."""
    for number, path in enumerate(path for path in paths(value) if len(path) <= deepest):
        yield renamed(value, path)
        for odd in ODD[number % every :: every]:
            yield changed(value, path, odd)
