"""Build the report of a pruning, show it, and log its numbers."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_drive.core.arguments import Control
from lightning_drive.network import prunable
from lightning_drive.report.parts import CycleReport
from lightning_drive.report.pruning_report import PruningReport
from lightning_drive.search.diagnosis import Diagnosis
from lightning_drive.trainer import loggers, other_callbacks, terminal
from lightning_drive.trainer.search_in_fit import Outcome


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
    """Build the report of a search that began at ``start``, in a phase of training that began at ``phase_start``.

    Both are times of ``time.monotonic()``; ``None``: not known. ``cycle`` is the number of IMP's cycles so far, with
    this one, and ``before`` the report of the previous cycle; both are ``None`` for other methods.
    """
    masks, history, costs = outcome.found.masks, outcome.found.history, outcome.diagnosis.costs
    phases = outcome.phases
    if phase_start is not None:
        phases = {"warmup" if cycle is None else "training": start - phase_start, **phases}
    cycles = () if before is None else before.cycles
    if cycle is not None:
        cycles = (*cycles, CycleReport(cycle, masks.num_kept, phases, other_callbacks.last_metrics(trainer)))
    return PruningReport.of(
        masks,
        outcome.diagnosis.active,
        method=method,
        seconds=time.monotonic() - start,
        epoch=trainer.current_epoch,
        step=trainer.global_step,
        warnings=[*outcome.warnings, *_not_measured(outcome.diagnosis)],
        control=control,
        cycle=cycle,
        itemsizes=costs.itemsizes,
        multiply_adds=costs.multiply_adds,
        phases=phases,
        rounds=history.rounds if before is None else before.rounds + history.rounds,
        scores=history.scores,
        cycles=cycles,
        other_multiply_adds=costs.others,
        num_parameters=prunable.count_all(trainer.lightning_module),
    )


def with_commit(report: PruningReport, seconds: float) -> PruningReport:
    """Return the report with the seconds that putting the masks into effect took."""
    phases = {**report.phases, "commit": seconds}
    cycles = report.cycles and (*report.cycles[:-1], replace(report.cycles[-1], phases=phases))
    return replace(report, phases=phases, cycles=cycles)


def announce(
    trainer: pl.Trainer,
    report: PruningReport,
    warnings: Iterable[str],
    metrics: Mapping[str, float],
    text: str | None = None,
) -> None:
    """Warn, show the report or ``text`` in its place, and log the numbers of the report and other metrics."""
    for warning in warnings:
        rank_zero_warn(warning)
    terminal.show(trainer, report if text is None else text)
    numbers = {
        "pruning/sparsity": report.sparsity,
        "pruning/density": report.density,
        "pruning/effective_sparsity": report.effective_sparsity,
        "pruning/seconds": report.seconds,
        **metrics,
    }
    loggers.log_metrics(trainer, {name: value for name, value in numbers.items() if value is not None})


def metrics(report: PruningReport | None) -> dict[str, float]:
    """Return the metrics of every epoch, which monitors and names of checkpoints can use."""
    if report is None:
        return {}
    fractions = {"pruning/sparsity": report.sparsity, "pruning/overall_sparsity": report.overall_sparsity}
    return {name: value for name, value in fractions.items() if value is not None}


def _not_measured(diagnosis: Diagnosis) -> Iterator[str]:
    """Yield a sentence for every number that the report lacks, with the reason."""
    if diagnosis.active is None and not diagnosis.path_error:
        yield (
            "Effective sparsity and multiply-adds were not measured: paths are not followed through sharded parameters."
        )
    if diagnosis.path_error:
        yield f"Effective sparsity was not measured: paths could not be followed from {diagnosis.path_error}"
    if diagnosis.costs.error:
        yield f"Multiply-adds were not measured: {diagnosis.costs.error}"
    yield from diagnosis.costs.warnings
