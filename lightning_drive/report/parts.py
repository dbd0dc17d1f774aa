"""The records that a report consists of: one for each prunable parameter, cycle of IMP, and cut of gradual pruning."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_drive.network.masks import Masks


@dataclass(frozen=True)
class LayerReport:
    """One prunable parameter after pruning.

    Args:
        name: The parameter's name, as in ``module.named_parameters()``.
        shape: Its shape.
        num_weights: How many weights it has, pruned or not.
        num_kept: How many of them are kept.
        num_active: How many of the kept ones lie on an input-output path; ``None`` if that is not known.
        itemsize: The bytes of one weight; ``None`` if that is not known.
        multiply_adds: How many multiply-adds its weights do for one sample in a dense network; ``None`` if that could
            not be counted. One multiply-add is two floating-point operations.

    """

    name: str
    shape: tuple[int, ...]
    num_weights: int
    num_kept: int
    num_active: int | None
    itemsize: int | None = None
    multiply_adds: int | None = None

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept, in ``[0, 1]``."""
        return self.num_kept / self.num_weights

    @property
    def nonzero_multiply_adds(self) -> int | None:
        """How many of the multiply-adds are by weights that are kept: the others multiply by zero."""
        return None if self.multiply_adds is None else self.multiply_adds * self.num_kept // self.num_weights

    @property
    def dense_bytes(self) -> int | None:
        """The memory of all weights."""
        return None if self.itemsize is None else self.num_weights * self.itemsize

    @property
    def nonzero_bytes(self) -> int | None:
        """The memory of the kept weights, and of a mask with one bit per weight."""
        return None if self.itemsize is None else self.num_kept * self.itemsize + (self.num_weights + 7) // 8


@dataclass(frozen=True)
class CycleReport:
    """One cycle of iterative magnitude pruning, up to its cut.

    Args:
        cycle: Which one, from 1.
        num_kept: How many weights are left after it.
        phases: Seconds by phase, as in :class:`PruningReport`.
        metrics: What was logged last before the cut, with the weights that were left by the cycle before; what
            ModelCheckpoint or EarlyStopping monitor comes first.

    """

    cycle: int
    num_kept: int
    phases: Mapping[str, float]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class CutReport:
    """One cut of gradual pruning.

    Args:
        cut: Which one, from 1.
        epoch: When it was, in epochs of training: 2.5 is in the middle of epoch 2, counted from 0.
        step: ``trainer.global_step`` at that moment.
        num_kept: How many weights are left after it.
        metrics: At the start of an epoch what was logged last, with the weights that were left by the cut before; what
            ModelCheckpoint or EarlyStopping monitor comes first. Empty within an epoch.

    """

    cut: int
    epoch: float
    step: int
    num_kept: int
    metrics: Mapping[str, float]


def layers_of(
    masks: Masks, active: Masks | None, itemsizes: Mapping[str, int], multiply_adds: Mapping[str, int | None]
) -> tuple[LayerReport, ...]:
    """Count what masks keep of each parameter; ``active`` is the part on paths, the other two have numbers by name."""
    return tuple(
        LayerReport(
            name,
            tuple(mask.shape),
            num_weights=mask.numel(),
            num_kept=int(mask.count_nonzero()),
            num_active=None if active is None else int(active[name].count_nonzero()),
            itemsize=itemsizes.get(name),
            multiply_adds=multiply_adds.get(name),
        )
        for name, mask in masks.items()
    )


def total(numbers: Iterable[int | None]) -> int | None:
    """Return the sum of the numbers of all layers; ``None`` if one of them is not known."""
    known = list(numbers)
    return None if None in known else sum(number for number in known if number is not None)
