"""Search for masks in the middle of a ``fit``, and leave the ``fit`` as it was."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_drive.core import shards
from lightning_drive.core.arguments import Mode
from lightning_drive.core.goal import Goal
from lightning_drive.core.processes import Ranks
from lightning_drive.network import batch_norm, gradients, prunable, prunable_checks
from lightning_drive.network.gradients import LossFunction
from lightning_drive.network.masks import Masks
from lightning_drive.search.diagnosis import Diagnosis, diagnose_given
from lightning_drive.search.find import search_reached
from lightning_drive.search.loop import Found, History
from lightning_drive.search.methods import Method
from lightning_drive.search.scored_network import Network
from lightning_drive.trainer import ranks as processes
from lightning_drive.trainer import sandbox, terminal, training_step
from lightning_drive.trainer.batches import TrainingBatches
from lightning_drive.trainer.sandbox import Sandbox


@dataclass(frozen=True)
class Outcome:
    """The outcome of a search, before any of it takes effect."""

    found: Found
    diagnosis: Diagnosis
    phases: dict[str, float]
    """Seconds by phase."""

    @property
    def warnings(self) -> list[str]:
        """The warnings of the search and of its diagnosis."""
        return [*self.found.warnings, *self.diagnosis.warnings]


def search(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    method: Method,
    goal: Goal,
    names: Sequence[str],
    *,
    masks: Masks,
    loss_fn: LossFunction | None = None,
    others: Sequence[str] = (),
    only_round: int | None = None,
    shuffle: bool = False,
) -> Outcome:
    """Search for masks of the named parameters, on training batches from the first on.

    ``masks`` are the masks to start from, empty for a dense network; ``loss_fn`` replaces ``training_step``;
    ``shuffle`` shuffles the masks. For the rest see :func:`lightning_drive.search.find.search_reached`.
    """
    begin = last_round = time.monotonic()
    shards.reshard_(pl_module)  # validation, a forward pass without a backward pass, leaves parameters whole
    training_step.free_gradients(trainer, pl_module)
    prunable_checks.check_numbers(prunable.parameters_by_name(pl_module, names))
    title, num_rounds = f"Pruning by {type(method).__name__}", method.rounds if only_round is None else 1

    bars: list[Callable[[], None]] = []  # a search without some parameters has its own

    @contextmanager
    def opened(names: Sequence[str]) -> Iterator[Network]:
        with (
            terminal.progress(trainer, title, num_rounds) as advance,
            _scored(trainer, pl_module, method.mode) as (scored, batches),
        ):
            bars.append(advance)
            parameters = prunable.parameters_by_name(scored.module, names)
            loss = loss_function(scored, loss_fn, pl_module)
            example = scored.module.example_input_array
            yield Network(scored.module, parameters, batches, loss, example, processes.ranks_of(trainer))

    def on_round(*_: Any) -> None:
        nonlocal last_round
        last_round = time.monotonic()
        bars[-1]()

    generator = processes.random_numbers(trainer) if shuffle else None
    found, diagnosis = search_reached(
        opened,
        method,
        goal,
        names,
        masks=masks,
        others=others,
        on_round=on_round,
        only_round=only_round,
        shuffle=generator,
    )
    phases = {"rounds": last_round - begin, "measuring": time.monotonic() - last_round, "batch_norm": 0.0}
    return Outcome(found, diagnosis, phases)


def given(trainer: pl.Trainer, pl_module: pl.LightningModule, masks: Masks, remedy: str) -> Outcome:
    """Return given masks, of which all ranks get those of the first, and what they mean; nothing is searched for.

    ``remedy`` is what helps where a layer has no weight left.
    """
    begin = time.monotonic()
    shards.reshard_(pl_module)
    with _scored(trainer, pl_module, "eval") as (scored, batches):
        parameters = prunable.parameters_by_name(scored.module, masks)
        loss, example = loss_function(scored, None, pl_module), scored.module.example_input_array
        network = Network(scored.module, parameters, batches, loss, example, processes.ranks_of(trainer))
        own = network.starting_masks(masks, masks.sparsity)
        network.mask_(own)
        found = Found(network.whole(own), History(), network.warnings)
        diagnosis = diagnose_given(network, found.masks, remedy)
    return Outcome(found, diagnosis, {"measuring": time.monotonic() - begin})


def batch_norm_statistics(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    masks: Masks,
    num_batches: int,
    loss_fn: LossFunction | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Estimate BatchNorm's statistics under masks on training batches: layer name to statistics by buffer name."""
    if not num_batches:
        return {}
    ranks = processes.ranks_of(trainer)
    with _scored(trainer, pl_module) as (scored, batches), ranks.together():
        masks.apply_(scored.module)
        loss = loss_function(scored, loss_fn, pl_module)
        own = batch_norm.batch_norm_statistics(scored.module, loss, islice(batches, num_batches))
    statistics = _of_all_ranks(own, pl_module, ranks)
    values = (value for layer in statistics.values() for value in layer.values())
    ranks.mean_(value for value in values if value.is_floating_point())
    return statistics


def loss_function(scored: Sandbox, loss_fn: LossFunction | None, pl_module: pl.LightningModule) -> LossFunction:
    """Return the loss function for the replica: the user's, or one made of ``training_step``."""
    own = training_step.loss_of(scored) if loss_fn is None else scored.replica_of(loss_fn)
    return gradients.on_replica_only(own, pl_module)


def _of_all_ranks(
    statistics: dict[str, dict[str, Tensor]], pl_module: pl.LightningModule, ranks: Ranks
) -> dict[str, dict[str, Tensor]]:
    """Return the statistics of the layers that were reached on every rank."""
    names = [name for name, _ in pl_module.named_modules()]
    counts = ranks.sum(torch.tensor([int(name in statistics) for name in names])).tolist()
    return {name: statistics[name] for name, count in zip(names, counts, strict=True) if count == ranks.size}


@contextmanager
def _scored(
    trainer: pl.Trainer, pl_module: pl.LightningModule, mode: Mode = "train"
) -> Iterator[tuple[Sandbox, TrainingBatches]]:
    """Open a replica of the module, and training batches from the first on."""
    with (
        sandbox.sandbox(trainer, pl_module, mode) as scored,
        TrainingBatches(scored.trainer, scored.module).opened() as batches,
    ):
        yield scored, batches
