"""What a pruning brings: masks found in the middle of a ``fit`` that is left as it was, and the report of them."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_drive import companions, display, finding, forms, gradients, prunable, scoring, shards
from lightning_drive.batches import TrainingBatches
from lightning_drive.costs import Costs
from lightning_drive.finding import Found, Scope
from lightning_drive.gradients import LossFunction
from lightning_drive.masking import Masks
from lightning_drive.messages import listed
from lightning_drive.methods import Method
from lightning_drive.ranks import Ranks
from lightning_drive.report import Control, CycleReport, PruningReport
from lightning_drive.schedules import Schedule
from lightning_drive.scoring import Sandbox
from lightning_drive.undisturbed import Mode


@dataclass(frozen=True)
class Outcome:
    """What a search brings back, before any of it is put down."""

    found: Found
    statistics: dict[str, dict[str, Tensor]]
    """Name of a BatchNorm layer to the statistics that go with the masks."""
    phases: dict[str, float]
    """Seconds by phase."""


def search(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    method: Method,
    select: Callable[[pl.LightningModule], Mapping[str, nn.Parameter]],
    *,
    sparsity: float,
    masks: Masks,
    schedule: Schedule,
    scope: Scope,
    loss: Callable[[Sandbox], LossFunction] | None = None,
    only_round: int | None = None,
    shuffle: bool = False,
    bn_batches: int = 0,
    others: Sequence[str] = (),
) -> Outcome:
    """Find masks and the BatchNorm statistics that go with them; the module and the Trainer stay as they are.

    Args:
        trainer: A Trainer in the middle of ``fit``.
        pl_module: Its module.
        method: The method.
        select: Gives the prunable parameters of the module, by name.
        sparsity: As for :func:`lightning_drive.finding.search`.
        masks: As there; empty for a dense network.
        schedule: As there.
        scope: As there.
        loss: Returns the ``loss_fn`` of a sandbox, as there; without it, BatchNorm's statistics are not estimated.
        only_round: As there.
        shuffle: Whether to give the masks in a random order within each parameter.
        bn_batches: Training batches to estimate BatchNorm's statistics from; 0: leave them.
        others: As there.

    """
    times = [time.monotonic()] * 2  # when the search began, and when its last round was over

    num_rounds = method.rounds if only_round is None else 1
    ranks = scoring.ranks_of(trainer)
    shards.reshard_(pl_module)  # validation, a forward pass without a backward pass, leaves parameters whole
    scoring.free_gradients(trainer, pl_module)
    live = select(pl_module)
    prunable.check_numbers(live)

    def loss_in(sandbox: Sandbox) -> LossFunction | None:
        return loss and gradients.on_replica_only(loss(sandbox), pl_module)

    def once(names: Collection[str], masks: Mapping[str, Tensor] | None) -> Found:
        def on_round(*_: Any) -> None:
            times[1] = time.monotonic()
            advance()

        with (
            display.progress(trainer, f"Pruning by {type(method).__name__}", num_rounds) as advance,
            _scored(trainer, pl_module, method.mode) as (sandbox, batches),
        ):
            return finding.search(
                sandbox.module,
                method,
                sparsity=sparsity,
                parameters=finding.parameters_by_name(sandbox.module, names),
                batches=batches,
                loss_fn=loss_in(sandbox),
                masks=masks,
                schedule=schedule,
                scope=scope,
                example_input=sandbox.module.example_input_array,
                others=others,
                on_round=on_round,
                only_round=only_round,
                shuffle=scoring.random_numbers(trainer) if shuffle else None,
                ranks=ranks,
            )

    found = finding.of_reached(once, method, list(live), masks)
    times.append(time.monotonic())
    statistics = {}
    if loss is not None and bn_batches:
        with _scored(trainer, pl_module) as (sandbox, batches), ranks.together():
            found.masks.apply_(sandbox.module)
            loss_fn = loss_in(sandbox)
            assert loss_fn is not None
            statistics = gradients.batch_norm_statistics(sandbox.module, loss_fn, islice(batches, bn_batches))
        statistics = _of_all_ranks(statistics, pl_module, ranks)
        ranks.mean_(value for layer in statistics.values() for value in layer.values() if value.is_floating_point())
    times.append(time.monotonic())
    spans = [after - before for before, after in pairwise(times)]
    return Outcome(found, statistics, dict(zip(("rounds", "measuring", "batch_norm"), spans, strict=True)))


def _of_all_ranks(
    statistics: dict[str, dict[str, Tensor]], pl_module: pl.LightningModule, ranks: Ranks
) -> dict[str, dict[str, Tensor]]:
    """Keep the statistics of layers that batches of every rank reached."""
    names = [name for name, _ in pl_module.named_modules()]
    counts = ranks.sum(torch.tensor([int(name in statistics) for name in names])).tolist()
    return {name: statistics[name] for name, count in zip(names, counts, strict=True) if count == ranks.size}


@contextmanager
def _scored(
    trainer: pl.Trainer, pl_module: pl.LightningModule, mode: Mode = "train"
) -> Iterator[tuple[Sandbox, TrainingBatches]]:
    """Score a replica of the module, on training batches from their beginning."""
    with (
        scoring.sandbox(trainer, pl_module, mode) as sandbox,
        TrainingBatches(sandbox.trainer, sandbox.module).opened() as batches,
    ):
        yield sandbox, batches


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
        cycles = (*cycles, CycleReport(cycle, found.masks.num_kept, phases, companions.last_metrics(trainer)))
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


def warn_of_differences(masks: Masks, report: PruningReport, sparsity: float, control: Control) -> None:
    """Say so if a network was pruned in another way than it would be now: it stays as it is.

    Args:
        masks: Its masks.
        report: The report of it.
        sparsity: What is asked for now.
        control: What is asked for now.

    """
    asked = masks.num_prunable * (1 - sparsity)
    if abs(masks.num_kept - asked) > len(masks):  # rounding may take one weight per parameter
        rank_zero_warn(
            f"The checkpoint was pruned to a sparsity of {masks.sparsity:.4f} and stays so: `sparsity={sparsity}` has"
            " no effect. To prune to another one, start from a dense checkpoint."
        )
    if report.control != control:
        rank_zero_warn(
            f"The checkpoint was pruned with control={report.control!r} and stays so: `control={control!r}` has no"
            " effect. Start from a dense checkpoint."
        )


def warn_of_other_settings(
    masks: Masks,
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    selects: Iterable[Callable[[pl.LightningModule], Mapping[str, nn.Parameter]]],
    pl_module: pl.LightningModule,
) -> None:
    """Warn if restored masks were chosen in another way than they would be now: they stay.

    Args:
        masks: The masks.
        then: The settings that they were chosen with, as far as the checkpoint has them.
        now: The settings of the callback.
        selects: Each gives prunable parameters of the module, by name, that the masks may be for.
        pl_module: The module.

    """
    for name in ("schedule", "scope"):
        if name in then and then[name] != now[name]:
            rank_zero_warn(
                f"The checkpoint was pruned with {name}={forms.shown(then[name])} and stays so:"
                f" `{name}={now[name]!r}` has no effect. Start from a dense checkpoint."
            )
    patterns = [name for name in ("include", "exclude") if name not in then or then[name] != now[name]]
    if patterns and not any(is_selection(masks, select, pl_module) for select in selects):
        asked = " and ".join(f"`{name}={now[name]!r}`" for name in patterns)
        rank_zero_warn(
            f"The checkpoint was pruned in {listed(masks)} and stays so: {asked} would select other parameters, and"
            " has no effect. Start from a dense checkpoint."
        )


def is_selection(
    masks: Masks,
    select: Callable[[pl.LightningModule], Mapping[str, nn.Parameter]],
    pl_module: pl.LightningModule,
) -> bool:
    """Whether masks are for the parameters that are selected now, or would be if none were frozen.

    Args:
        masks: The masks.
        select: Gives the prunable parameters of the module, by name.
        pl_module: The module.

    """
    for context in (nullcontext(), prunable.unfrozen(pl_module)):
        with context, suppress(ValueError):  # of a pattern that matches nothing
            if set(select(pl_module)) == set(masks):
                return True
    return False


def check_belong_together(masks: Masks, report: PruningReport | None) -> None:
    """Raise if masks are not those that a report is of.

    Args:
        masks: Masks out of a checkpoint.
        report: The report beside them.

    Raises:
        ValueError: If they differ, or one of them is missing.

    """
    layers = [] if report is None else [(layer.name, layer.shape, layer.num_kept) for layer in report.layers]
    of_masks = [(name, tuple(mask.shape), int(mask.count_nonzero())) for name, mask in masks.items()]
    if layers != of_masks or (report is not None and report.digest != masks.digest()):
        raise ValueError(
            "The masks in the checkpoint are damaged, or are not those of the report beside them: names, shapes, counts"
            f" or digest differ. {forms.REMEDY}"
        )


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
