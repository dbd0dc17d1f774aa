"""Check that the patterns of a sparsity divide the prunable parameters of a module."""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import TypeVar

from torch import nn

from lightning_drive.core.goal import REST, Goal
from lightning_drive.core.messages import listed
from lightning_drive.network import name_patterns, prunable, prunable_layers

Module = TypeVar("Module", bound=nn.Module)


def check(
    goal: Goal,
    module: Module,
    selected: Collection[str],
    select: Callable[[Module], Mapping[str, nn.Parameter]],
) -> None:
    """Raise a ``ValueError`` if a pattern is for no prunable parameter, or none is for a selected one.

    ``select`` returns the prunable parameters of the module. What is frozen now is not selected, but may have a
    pattern, since it may be unfrozen before it is pruned.
    """
    if not isinstance(goal.sparsity, Mapping):
        return
    candidates = [*selected]
    with prunable.unfrozen(module), suppress(ValueError):  # from what need not be prunable as long as it is frozen
        candidates = [*select(module)]
    names = [name for name, _ in module.named_parameters()]
    patterns = [pattern for pattern in goal.sparsity if pattern != REST]
    name_patterns.check_matches("sparsity", patterns, names, prunable_layers.default_names(module))
    for place, pattern in enumerate(patterns):
        matched = name_patterns.matching([pattern], candidates)
        if not matched:
            others = [name for name in names if name in name_patterns.matching([pattern], names)]
            raise ValueError(
                f"`sparsity` pattern {pattern!r} matches only parameters that are not pruned ({listed(others)})."
                f" Prunable are: {listed(candidates, most=30)}."
            )
        if matched <= name_patterns.matching(patterns[:place], candidates):
            before = [earlier for earlier in patterns[:place] if name_patterns.matching([earlier], matched)]
            raise ValueError(
                f"`sparsity` pattern {pattern!r} is never used, since the first pattern that matches decides, and all"
                f" that it matches is matched by {listed(map(repr, before))} before it. Put it before that."
            )
    goal.groups(selected)  # raises if a parameter has no pattern
