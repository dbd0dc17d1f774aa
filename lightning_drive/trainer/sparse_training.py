"""Train in sparse forms: choose them at the first batch after pruning, and compute in them batch by batch."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_drive.acceleration import measuring
from lightning_drive.acceleration.measuring import Choice, Pruned
from lightning_drive.acceleration.sparse_calls import SparseCalls
from lightning_drive.acceleration.weight_calls import obstacle_of
from lightning_drive.core import containers, function_modes, shards
from lightning_drive.core.messages import shown_error
from lightning_drive.network import gradients
from lightning_drive.network.gradients import LossFunction
from lightning_drive.network.masks import Masks
from lightning_drive.report.acceleration_report import AccelerationReport, LayerForm
from lightning_drive.trainer import ranks, sandbox, search_in_fit, terminal
from lightning_drive.trainer.saved_state import Pruning

_RUNS = 3
"""How often every process runs a whole step each way, where there are several."""


class SparseTraining:
    """The sparse forms of one ``fit``, which are on while a batch is trained on."""

    def __init__(self) -> None:
        self._masks: Masks | None = None  # those that the forms were chosen for
        self._calls: SparseCalls | None = None
        self._is_on = False

    def begin_batch(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        pruning: Pruning,
        batch: Any,
        loss_fn: LossFunction | None,
    ) -> Pruning:
        """Compute in sparse forms from here on; choose them first if that was not done for these masks.

        Return the pruning, with the choice in its report. A batch without a loss leaves the choice to the next one.
        """
        self.end_batch()
        if pruning.masks is not self._masks:
            self._calls = None
            choice = _choice(trainer, pl_module, pruning.masks, batch, loss_fn)
            if choice is not None:
                self._masks = pruning.masks
                self._calls = choice.sparse_calls(_pruned(pl_module, self._masks, choice.report.sparse_names))
                report = pruning.report and replace(pruning.report, acceleration=choice.report)
                pruning = pruning._replace(report=report)
        if self._calls is not None:
            self._calls.__enter__()
            self._is_on = True
        return pruning

    @property
    def masked_gradients(self) -> Collection[Tensor]:
        """The parameters whose gradients are zero already where they are pruned."""
        return () if self._calls is None else self._calls.masked_gradients

    def end_batch(self) -> None:
        """Compute as torch does; a second call changes nothing."""
        if self._calls is not None and self._is_on:
            self._calls.__exit__(None, None, None)
        self._is_on = False

    def end(self) -> None:
        """Release the parameters."""
        self.end_batch()
        self._masks = self._calls = None


def _choice(
    trainer: pl.Trainer, pl_module: pl.LightningModule, masks: Masks, batch: Any, loss_fn: LossFunction | None
) -> Choice | None:
    """Return the first rank's choice, and show it; ``None`` if its batch had no loss."""
    obstacles = dict(_obstacles(trainer, pl_module, masks))
    names = [name for name, mask in masks.items() if name not in obstacles and not mask.all()]
    processes, failed = ranks.ranks_of(trainer), ""
    measured: Choice | None = Choice(AccelerationReport("training step", (), torch.get_num_threads()), {})
    if names:
        try:
            runs = _RUNS if processes.size > 1 else None
            measured = _measured(trainer, pl_module, masks, names, batch, loss_fn, runs)
        except Exception as error:
            failed = shown_error(error)
            obstacles |= dict.fromkeys(names, "the training step could not be measured")
    measured, failed = processes.broadcast((measured, failed))
    if measured is None:
        return None
    known = {layer.name: layer for layer in measured.report.layers}
    layers = tuple(
        known.get(name) or LayerForm(name, 1 - int(mask.sum()) / mask.numel(), reason=obstacles[name])
        for name, mask in masks.items()
        if not mask.all()
    )
    choice = measured._replace(report=replace(measured.report, layers=layers))
    with terminal.above_bar(trainer):
        if failed:
            rank_zero_warn(f"Training goes on with dense layers, since a training step could not be measured: {failed}")
        terminal.show(trainer, choice.report.headline)
        for note in choice.report.notes:
            terminal.show(trainer, note)
    return choice


def _measured(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    masks: Masks,
    names: list[str],
    batch: Any,
    loss_fn: LossFunction | None,
    runs: int | None,
) -> Choice | None:
    """Measure training steps of a replica on a copy of a batch."""
    own_batch = containers.mapped(lambda tensor: tensor.detach().clone(), batch)
    with sandbox.sandbox(trainer, pl_module) as replica:
        loss_function = search_in_fit.loss_function(replica, loss_fn, pl_module)

        def step() -> bool:
            nn.Module.zero_grad(replica.module)
            loss = _scalar(loss_function(replica.module, gradients.batch_in_float32(own_batch)))
            if loss is not None:
                function_modes.backward(loss)
            return loss is not None

        return measuring.measure(_pruned(replica.module, masks, names), step, runs)


def _scalar(output: Any) -> Tensor | None:
    """Return a loss, or the sum of what ``forward`` returned in its place; ``None`` if nothing has a gradient."""
    parts = [tensor for tensor in containers.leaves(output) if tensor.requires_grad]
    if not parts:
        return None
    return torch.stack([part.sum() for part in parts]).sum()


def _pruned(module: pl.LightningModule, masks: Masks, names: list[str]) -> list[Pruned]:
    parameters = masks.parameters_of(module)
    return [Pruned(name, parameters[name], masks[name].flatten().nonzero()[:, 0]) for name in names]


def _obstacles(trainer: pl.Trainer, pl_module: pl.LightningModule, masks: Masks) -> Iterator[tuple[str, str]]:
    """Yield the parameters that cannot be computed with in sparse forms in this ``fit``, with the reason."""
    compiled = _compiled(pl_module)
    with trainer.precision_plugin.forward_context():
        is_mixed = torch.is_autocast_enabled("cpu")
    for name, parameter in masks.parameters_of(pl_module).items():
        if shards.is_sharded(parameter):
            yield name, "it is sharded over ranks"
        elif obstacle := obstacle_of(parameter):
            yield name, obstacle
        elif is_mixed:
            yield name, "mixed precision (autocast) computes with it in another type"
        elif id(parameter) in compiled:
            yield name, "`torch.compile` compiles it"


def _compiled(pl_module: pl.LightningModule) -> set[int]:
    """Return the ids of the parameters of all modules that ``torch.compile`` compiled."""
    return {
        id(parameter) for module in pl_module.modules() if _is_compiled(module) for parameter in module.parameters()
    }


def _is_compiled(module: nn.Module) -> bool:
    own = vars(module)
    return (
        own.get("_compiled_call_impl") is not None
        or "_orig_mod" in own.get("_modules", {})
        or any(hasattr(value, "_torchdynamo_orig_callable") for value in own.values())
    )
