"""The goal of a pruning: a sparsity, reached on a schedule, with weights ranked in a scope."""

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_drive.core import schedules
from lightning_drive.core.arguments import Schedule, Scope, check_choice


@dataclass(frozen=True)
class Goal:
    """How many weights to keep after each round.

    Args:
        sparsity: Fraction of the prunable weights to remove, in ``[0, 1)``.
        schedule: ``"exponential"`` removes the same fraction of the survivors in every round, ``"linear"`` the same
            number of weights, ``"cubic"`` many in the first rounds and few in the last.
        scope: ``"global"``: one ranking for all parameters. ``"layerwise"``: every parameter keeps the same fraction.

    Raises:
        TypeError: If ``sparsity`` is not a number.
        ValueError: If it is out of range, or a choice is not one.

    Examples:
        >>> goal = Goal(0.99)
        >>> round(goal.density(1, 2), 3), goal.kept([100, 900], 2)
        (0.1, (100, 10))

    """

    sparsity: float
    schedule: Schedule = "exponential"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", schedules.check_sparsity(self.sparsity))
        object.__setattr__(self, "schedule", check_choice("schedule", self.schedule, Schedule))
        object.__setattr__(self, "scope", check_choice("scope", self.scope, Scope))

    def density(self, round_index: int, num_rounds: int, start: float = 0.0) -> float:
        """Return the fraction of all prunable weights to keep after a round, from 1, of a search that began sparse."""
        return schedules.SCHEDULES[self.schedule](round_index, num_rounds, self.sparsity, start)

    def kept(self, sizes: Iterable[int], num_rounds: int) -> tuple[int, ...]:
        """Return how many weights of parameters of these sizes are left after each round."""
        sizes = list(sizes)
        groups = [sum(sizes)] if self.scope == "global" else sizes
        densities = [self.density(index, num_rounds) for index in range(1, num_rounds + 1)]
        return tuple(sum(schedules.num_kept(size, density) for size in groups) for density in densities)
