"""Build the report of a pruning."""

import time
from collections.abc import Iterator
from dataclasses import replace

import lightning.pytorch as pl

from lightning_drive.core.arguments import Control
from lightning_drive.network import prunable
from lightning_drive.network.costs import Costs
from lightning_drive.report.parts import CycleReport
from lightning_drive.report.pruning_report import PruningReport
from lightning_drive.search.loop import Found
from lightning_drive.trainer import other_callbacks
from lightning_drive.trainer.search import Outcome


def report(
    trainer: pl.Trainer,
    outcome: Outcome,
    method: str,
    *,
    start: float,
    phase_start: float | None,
    control: Control,
    cycle: int | None,
    before: PruningReport | None,
) -> PruningReport:
    """Say what a search brought, where in training and in which time.

    Args:
        trainer: The Trainer.
        outcome: What it brought.
        method: The method's settings.
        start: When it began, by ``time.monotonic()``.
        phase_start: When training, or the cycle of it that ends here, began; ``None`` if that is not known.
        control: What is changed for comparison.
        cycle: How many cycles lie behind, with this one; ``None`` where there are no cycles.
        before: The report of the cycle before; ``None`` without one.

    """
    found, measured, phases = outcome.found, outcome.found.costs, outcome.phases
    if phase_start is not None:
        phases = {"warmup" if cycle is None else "training": start - phase_start, **phases}
    cycles = () if before is None else before.cycles
    if cycle is not None:
        cycles = (*cycles, CycleReport(cycle, found.masks.num_kept, phases, other_callbacks.last_metrics(trainer)))
    return PruningReport.of(
        found.masks,
        found.active,
        method=method,
        seconds=time.monotonic() - start,
        epoch=trainer.current_epoch,
        step=trainer.global_step,
        warnings=[*found.warnings, *_not_measured(found, measured)],
        control=control,
        cycle=cycle,
        itemsizes=measured.itemsizes,
        multiply_adds=measured.multiply_adds,
        phases=phases,
        rounds=found.rounds if before is None else before.rounds + found.rounds,
        scores=found.scores,
        cycles=cycles,
        other_multiply_adds=measured.others,
        num_parameters=prunable.count_all(trainer.lightning_module),
    )


def with_commit(report: PruningReport, seconds: float) -> PruningReport:
    """Add to a report how long it took to put down all that follows from the masks.

    Args:
        report: The report.
        seconds: How long.

    """
    phases = {**report.phases, "commit": seconds}
    cycles = report.cycles and (*report.cycles[:-1], replace(report.cycles[-1], phases=phases))
    return replace(report, phases=phases, cycles=cycles)


def _not_measured(found: Found, measured: Costs) -> Iterator[str]:
    """Say what the report does not have, and why."""
    if found.active is None and not found.path_error:
        yield (
            "Effective sparsity and multiply-adds were not measured: paths are not followed through sharded parameters."
        )
    if found.path_error:
        yield f"Effective sparsity was not measured: paths could not be followed from {found.path_error}"
    if measured.error:
        yield f"Multiply-adds were not measured: {measured.error}"
    yield from measured.warnings
