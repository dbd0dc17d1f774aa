"""Build the report of a pruning, show it, and log its numbers."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_drive.core.arguments import Control
from lightning_drive.network import prunable
from lightning_drive.report.parts import CutReport, CycleReport
from lightning_drive.report.pruning_report import PruningReport
from lightning_drive.search.diagnosis import Diagnosis
from lightning_drive.search.loop import Found
from lightning_drive.trainer import loggers, other_callbacks, step_counts, terminal
from lightning_drive.trainer.search_in_fit import Outcome


def report(
    trainer: pl.Trainer,
    outcome: Outcome,
    method: str,
    *,
    start: float,
    phase_start: float | None,
    control: Control,
    cycle: int | None = None,
    before: PruningReport | None = None,
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


def of_cut(
    trainer: pl.Trainer, found: Found, method: str, *, start: float, phase_start: float | None, control: Control
) -> PruningReport:
    """Build the report of a cut that is not the last one, without what takes a forward pass to find out."""
    seconds = time.monotonic() - start
    return PruningReport.of(
        found.masks,
        None,
        method=method,
        seconds=seconds,
        epoch=trainer.current_epoch,
        step=trainer.global_step,
        warnings=found.warnings,
        control=control,
        phases={**({} if phase_start is None else {"warmup": start - phase_start}), "rounds": seconds},
        rounds=found.history.rounds,
        num_parameters=prunable.count_all(trainer.lightning_module),
    )


def after_cuts(report: PruningReport, before: PruningReport | None, cut: int, trainer: pl.Trainer) -> PruningReport:
    """Return the report of a cut together with those of the cuts before it, the last of which reported ``before``."""
    batch = step_counts.batch_index(trainer)
    epoch = trainer.current_epoch + (batch / trainer.num_training_batches if batch else 0.0)
    metrics = {} if batch else other_callbacks.last_metrics(trainer)
    entry = CutReport(cut, epoch, report.step, report.num_kept, metrics)
    if before is None:
        return replace(report, cuts=(entry,))
    own = {name: seconds for name, seconds in report.phases.items() if name != "warmup"}
    return replace(
        report,
        seconds=before.seconds + report.seconds,
        phases={**before.phases, **{name: before.phases.get(name, 0.0) + own[name] for name in own}},
        warnings=tuple(dict.fromkeys((*before.warnings, *report.warnings))),
        rounds=before.rounds + report.rounds,
        cuts=(*before.cuts, entry),
    )


def with_commit(report: PruningReport, seconds: float) -> PruningReport:
    """Return the report with the seconds that putting the masks into effect took, of all cuts together."""
    phases = {**report.phases, "commit": report.phases.get("commit", 0.0) + seconds}
    cycles = report.cycles and (*report.cycles[:-1], replace(report.cycles[-1], phases=phases))
    return replace(report, phases=phases, cycles=cycles)


def announce(
    trainer: pl.Trainer,
    report: PruningReport,
    outcome: Outcome,
    metrics: Mapping[str, float],
    announced: set[str],
    text: str | None = None,
) -> None:
    """Warn, show the report or ``text`` in its place, and log the numbers of the report and other metrics.

    The report is shown without the warnings, each of which is printed once; ``announced`` are those of earlier cuts.
    """
    _warn(outcome.warnings, announced)
    shown = replace(report, warnings=tuple(_not_measured(outcome.diagnosis)))
    terminal.show(trainer, shown if text is None else text)
    numbers = {
        "pruning/sparsity": report.sparsity,
        "pruning/density": report.density,
        "pruning/effective_sparsity": report.effective_sparsity,
        "pruning/seconds": report.seconds,
        **metrics,
    }
    loggers.log_metrics(trainer, {name: value for name, value in numbers.items() if value is not None})


def announce_cut(
    trainer: pl.Trainer, warnings: Sequence[str], metrics: Mapping[str, float], announced: set[str]
) -> None:
    """Warn above the progress bar, and log the numbers of a cut that is not the last one."""
    if not announced.issuperset(warnings):
        with terminal.above_bar(trainer):
            _warn(warnings, announced)
    loggers.log_metrics(trainer, metrics)


def _warn(warnings: Sequence[str], announced: set[str]) -> None:
    """Warn of what was not ``announced`` yet: Python may print one text several times where others change filters."""
    for warning in dict.fromkeys(warnings):
        if warning not in announced:
            announced.add(warning)
            rank_zero_warn(warning)


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
