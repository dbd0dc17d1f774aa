"""Search for masks in the middle of a ``fit``, and leave the ``fit`` as it was."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_drive.core import containers, shards
from lightning_drive.core.arguments import Control, Mode
from lightning_drive.core.goal import Goal
from lightning_drive.core.processes import Ranks
from lightning_drive.network import batch_norm, gradients, prunable, prunable_checks
from lightning_drive.network.gradients import LossFunction
from lightning_drive.network.masks import Masks
from lightning_drive.search import loop, methods
from lightning_drive.search.diagnosis import Diagnosis, diagnose_given
from lightning_drive.search.find import search_reached
from lightning_drive.search.loop import Found, History
from lightning_drive.search.methods import Method
from lightning_drive.search.scored_network import Network
from lightning_drive.trainer import ranks as processes
from lightning_drive.trainer import sandbox, step_counts, terminal, training_step
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
    batches: Sequence[Any] | None = None,
    shuffle: Callable[[Masks], Masks] | None = None,
) -> Outcome:
    """Search for masks of the named parameters, on the next ``batches``, or on training batches from the first on.

    ``masks`` are the masks to start from, empty for a dense network; ``loss_fn`` replaces ``training_step``.
    For the rest see :func:`lightning_drive.search.find.search_reached`.
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
            _network(trainer, pl_module, method, names, batches, loss_fn) as network,
        ):
            bars.append(advance)
            yield network

    def on_round(*_: Any) -> None:
        nonlocal last_round
        last_round = time.monotonic()
        bars[-1]()

    found, diagnosis = search_reached(
        opened,
        method,
        goal,
        names,
        masks=masks,
        others=others,
        on_round=on_round,
        only_round=only_round,
        shuffle=shuffle,
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
        own = network.starting_masks(masks)
        network.mask_(own)
        found = Found(network.whole(own), History(), network.warnings)
        diagnosis = diagnose_given(network, found.masks, remedy)
    return Outcome(found, diagnosis, {"measuring": time.monotonic() - begin})


def cut_once(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    method: Method,
    goal: Goal,
    names: Sequence[str],
    *,
    masks: Masks,
    only_round: int,
    batches: Sequence[Any] | None = None,
    loss_fn: LossFunction | None = None,
    shuffle: Callable[[Masks], Masks] | None = None,
) -> Found:
    """Do one round of a method, which takes no longer than a training step: without a diagnosis of its outcome.

    A method that reads the weights alone reads those of the module itself. For the arguments see :func:`search`.
    """
    if methods.reads(method) == "weights":
        shards.reshard_(pl_module)
        parameters = prunable.parameters_by_name(pl_module, names)
        network = Network(pl_module, parameters, ranks=processes.ranks_of(trainer))
        found = loop.cut_once(network, method, goal, only_round, masks)
    else:
        with _network(trainer, pl_module, method, names, batches, loss_fn) as network:
            found = loop.cut_once(network, method, goal, only_round, masks)
    return found if shuffle is None else replace(found, masks=shuffle(found.masks))


def shuffle(trainer: pl.Trainer, control: Control, among: Masks | None = None) -> Callable[[Masks], Masks] | None:
    """Return the shuffle of masks, within those ``among`` which they were found, for the control that shuffles."""
    if control != "shuffle":
        return None
    generator = processes.random_numbers(trainer)
    return lambda masks: masks.shuffled(generator, among)


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


def loss_function(
    scored: Sandbox, loss_fn: LossFunction | None, pl_module: pl.LightningModule, first: int = 0
) -> LossFunction:
    """Return the loss function for the replica: the user's, or one made of ``training_step`` from a batch on."""
    own = training_step.loss_of(scored, first) if loss_fn is None else scored.replica_of(loss_fn)
    return gradients.on_replica_only(own, pl_module)


def _of_all_ranks(
    statistics: dict[str, dict[str, Tensor]], pl_module: pl.LightningModule, ranks: Ranks
) -> dict[str, dict[str, Tensor]]:
    """Return the statistics of the layers that were reached on every rank."""
    names = [name for name, _ in pl_module.named_modules()]
    counts = ranks.sum(torch.tensor([int(name in statistics) for name in names])).tolist()
    return {name: statistics[name] for name, count in zip(names, counts, strict=True) if count == ranks.size}


@contextmanager
def _network(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    method: Method,
    names: Sequence[str],
    batches: Sequence[Any] | None,
    loss_fn: LossFunction | None,
) -> Iterator[Network]:
    """Open a replica of the module for a search, on copies of ``batches``, or on training batches from the first on."""
    with _scored(trainer, pl_module, method.mode, batches) as (scored, own):
        parameters = prunable.parameters_by_name(scored.module, names)
        first = 0 if batches is None else step_counts.batch_index(trainer)
        loss = loss_function(scored, loss_fn, pl_module, first)
        example = scored.module.example_input_array
        yield Network(scored.module, parameters, own, loss, example, processes.ranks_of(trainer))


@contextmanager
def _scored(
    trainer: pl.Trainer, pl_module: pl.LightningModule, mode: Mode = "train", batches: Sequence[Any] | None = None
) -> Iterator[tuple[Sandbox, Iterable[Any]]]:
    """Open a replica of the module, and copies of ``batches``, or training batches from the first on."""
    with sandbox.sandbox(trainer, pl_module, mode) as scored:
        if batches is not None:
            yield scored, [containers.mapped(lambda tensor: tensor.detach().clone(), batch) for batch in batches]
            return
        with TrainingBatches(scored.trainer, scored.module).opened() as own:
            yield scored, own
