"""What a pruning brings: masks found in the middle of a ``fit`` that is left as it was, and the report of them."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_drive.core import shards
from lightning_drive.core.arguments import Mode, Schedule, Scope
from lightning_drive.core.masks import Masks
from lightning_drive.core.processes import Ranks
from lightning_drive.network import batch_norm, gradients, prunable
from lightning_drive.network.gradients import LossFunction
from lightning_drive.search import loop
from lightning_drive.search.loop import Found
from lightning_drive.search.methods import Method
from lightning_drive.trainer import sandbox as sandbox_module
from lightning_drive.trainer import terminal, training_step
from lightning_drive.trainer.batches import TrainingBatches
from lightning_drive.trainer.ranks import random_numbers, ranks_of
from lightning_drive.trainer.sandbox import Sandbox


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
        sparsity: As for :func:`lightning_drive.search.loop.search`.
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
    ranks = ranks_of(trainer)
    shards.reshard_(pl_module)  # validation, a forward pass without a backward pass, leaves parameters whole
    training_step.free_gradients(trainer, pl_module)
    live = select(pl_module)
    prunable.check_numbers(live)

    def loss_in(sandbox: Sandbox) -> LossFunction | None:
        return loss and gradients.on_replica_only(loss(sandbox), pl_module)

    def once(names: Collection[str], masks: Mapping[str, Tensor] | None) -> Found:
        def on_round(*_: Any) -> None:
            times[1] = time.monotonic()
            advance()

        with (
            terminal.progress(trainer, f"Pruning by {type(method).__name__}", num_rounds) as advance,
            _scored(trainer, pl_module, method.mode) as (sandbox, batches),
        ):
            return loop.search(
                sandbox.module,
                method,
                sparsity=sparsity,
                parameters=prunable.parameters_by_name(sandbox.module, names),
                batches=batches,
                loss_fn=loss_in(sandbox),
                masks=masks,
                schedule=schedule,
                scope=scope,
                example_input=sandbox.module.example_input_array,
                others=others,
                on_round=on_round,
                only_round=only_round,
                shuffle=random_numbers(trainer) if shuffle else None,
                ranks=ranks,
            )

    found = loop.of_reached(once, method, list(live), masks)
    times.append(time.monotonic())
    statistics = {}
    if loss is not None and bn_batches:
        with _scored(trainer, pl_module) as (sandbox, batches), ranks.together():
            found.masks.apply_(sandbox.module)
            loss_fn = loss_in(sandbox)
            assert loss_fn is not None
            statistics = batch_norm.batch_norm_statistics(sandbox.module, loss_fn, islice(batches, bn_batches))
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
        sandbox_module.sandbox(trainer, pl_module, mode) as sandbox,
        TrainingBatches(sandbox.trainer, sandbox.module).opened() as batches,
    ):
        yield sandbox, batches
