"""The goal of a pruning: a sparsity, reached on a schedule, with weights ranked in a scope."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from lightning_drive.core import quotas, schedules
from lightning_drive.core.arguments import NamedSchedule, Schedule, Scope, Sparsity, check_choice
from lightning_drive.core.messages import listed, shown
from lightning_drive.core.quotas import Quota, Shapes

REST = "*"
"""The pattern for all parameters that no other one matches."""


class Group(NamedTuple):
    """Parameters that share a sparsity."""

    name: str
    """The pattern that matches them; empty if these are all parameters."""
    parameters: tuple[str, ...]
    sparsity: float


@dataclass(frozen=True)
class Goal:
    """How many weights to keep after each round.

    Parameters are divided into groups by the patterns of ``sparsity``, and the ``scope`` applies within each group.

    Args:
        sparsity: Fraction of the prunable weights to remove, in ``[0, 1)``; or a mapping from glob patterns over
            parameter names to such fractions. The first pattern that matches a parameter decides; ``"*"`` is for the
            rest, wherever it stands.
        schedule: ``"exponential"`` removes the same fraction of the survivors in every round, ``"linear"`` the same
            number of weights, ``"cubic"`` many in the first rounds and few in the last; or a function, see
            :func:`lightning_drive.core.schedules.density`.
        scope: ``"global"``: one ranking for all parameters. ``"layerwise"``: every parameter keeps the same fraction.
            ``"erk"``: every parameter keeps its own, see :func:`lightning_drive.core.quotas.erdos_renyi_kernel`.

    Raises:
        TypeError: If ``sparsity`` is not a number, and no mapping from strings to numbers.
        ValueError: If a fraction is out of range, or a choice is not one.

    Examples:
        >>> goal, shapes = Goal(0.99), {"first": (10, 10), "last": (30, 30)}
        >>> goal.kept(shapes, num_rounds=2)
        (100, 10)
        >>> Goal({"last": 0.5, "*": 0.9}).kept(shapes, num_rounds=1)
        (460,)

    """

    sparsity: Sparsity
    schedule: Schedule = "exponential"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", _checked(self.sparsity))
        if not callable(self.schedule):
            schedule = check_choice("schedule", self.schedule, NamedSchedule, ", or a function")
            object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "scope", check_choice("scope", self.scope, Scope))

    def check_schedule(self, num_rounds: int) -> None:
        """Raise a ``ValueError`` if the schedule is a function that is no schedule for this number of rounds."""
        if not isinstance(self.schedule, str):
            schedules.fractions_reached(self.schedule, num_rounds)

    def groups(self, names: Iterable[str]) -> list[Group]:
        """Divide parameters into groups; patterns without a parameter have none.

        Raise a ``ValueError`` if no pattern matches a parameter.
        """
        if not isinstance(self.sparsity, Mapping):
            return [Group("", tuple(names), self.sparsity)]
        left, groups = [*names], []
        for pattern, sparsity in self.sparsity.items():
            matched = [name for name in left if fnmatchcase(name, pattern)]
            left = [name for name in left if not fnmatchcase(name, pattern)]
            if matched:
                groups.append(Group(pattern, tuple(matched), sparsity))
        if left:
            raise ValueError(
                f"`sparsity` has no pattern that matches {listed(map(repr, left))}. Add {REST!r} for the rest, such as"
                f" {{..., {REST!r}: 0}} to leave it dense, or leave these out with `exclude`."
            )
        return [groups[0]._replace(name="")] if len(groups) == 1 else groups

    def quotas(
        self,
        shapes: Shapes,
        round_index: int,
        num_rounds: int,
        *,
        alive: Mapping[str, int] | None = None,
        start: Mapping[str, int] | None = None,
    ) -> list[Quota]:
        """Return how many weights are kept after a round, from 1; parameters that are in no quota keep none.

        ``alive`` has how many weights of every parameter are left before the round, and ``start`` how many were left
        when the search began; by default all.
        """
        sizes, found = quotas.num_weights(shapes), list[Quota]()
        for group in self.groups(shapes):
            own = {name: shapes[name] for name in group.parameters}
            removed = _removed(group, sizes, start) if start else 0.0
            begun = min(removed, group.sparsity)  # rounding may have taken one weight more
            density = schedules.density(self.schedule, round_index, num_rounds, group.sparsity, begun)
            found.extend(quotas.RULES[self.scope](group.name, own, density, alive or sizes))
        return [quota for quota in found if quota.num_kept]

    def kept(self, shapes: Shapes, num_rounds: int) -> tuple[int, ...]:
        """Return how many weights of parameters of these shapes are left after each round."""
        rounds = (self.quotas(shapes, index, num_rounds) for index in range(1, num_rounds + 1))
        return tuple(sum(quota.num_kept for quota in quotas) for quotas in rounds)

    def overall_sparsity(self, shapes: Shapes) -> float:
        """Return the fraction that is removed of all parameters together."""
        if not isinstance(self.sparsity, Mapping):
            return self.sparsity
        return 1 - self.kept(shapes, 1)[0] / sum(quotas.num_weights(shapes).values())

    def check_start(self, shapes: Shapes, alive: Mapping[str, int]) -> None:
        """Raise a ``ValueError`` if masks to start from already remove more than is asked for."""
        sizes, asked = quotas.num_weights(shapes), self.quotas(shapes, 1, 1)
        for group in self.groups(shapes):
            own = {*group.parameters}
            if sum(alive[name] for name in own) < sum(quota.num_kept for quota in asked if quota.parameters[0] in own):
                where = f" in {group.name!r}" if group.name else ""
                raise ValueError(
                    f"`masks` already have sparsity {_removed(group, sizes, alive):g}{where}, more than the `sparsity`"
                    f" of {group.sparsity:g} asked for, and a pruned weight never returns."
                )

    def settings(self, num_rounds: int) -> dict[str, Any]:
        """Return the goal in plain types, to be saved and compared.

        A mapping is saved as its pairs, since their order counts, and a function as what it reaches after each round.
        """
        sparsity, schedule = self.sparsity, self.schedule
        return {
            "sparsity": [[*pair] for pair in sparsity.items()] if isinstance(sparsity, Mapping) else sparsity,
            "schedule": schedule if isinstance(schedule, str) else schedules.fractions_reached(schedule, num_rounds),
            "scope": self.scope,
        }


def _checked(sparsity: object) -> Sparsity:
    """Return a fraction, or a mapping to fractions with the rest at its end; raise if it is neither."""
    if not isinstance(sparsity, Mapping):
        return schedules.check_sparsity(sparsity, otherwise=", or a mapping from glob patterns to such numbers")
    if not sparsity:
        raise ValueError("`sparsity` must be a number or map at least one glob pattern to one, got an empty mapping.")
    for pattern in sparsity:
        if not isinstance(pattern, str):
            raise TypeError(
                "`sparsity` must be a number or a mapping from glob patterns over parameter names, such as"
                f" {{'encoder.*': 0.9, '*': 0.5}}, got a mapping with {shown(pattern)} among its patterns."
            )
    in_order = sorted(sparsity, key=lambda pattern: pattern == REST)  # stable
    return {str(each): schedules.check_sparsity(sparsity[each], f"sparsity[{str(each)!r}]") for each in in_order}


def _removed(group: Group, sizes: Mapping[str, int], alive: Mapping[str, int]) -> float:
    """Return the fraction of a group's weights that is not alive."""
    size, left = (sum(numbers[name] for name in group.parameters) for numbers in (sizes, alive))
    return (size - left) / size
