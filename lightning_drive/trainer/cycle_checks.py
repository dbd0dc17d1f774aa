"""Raise if the cycles of IMP cannot all be the same training, or cannot end with the training of the ticket."""

import math
from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn

from lightning_drive.core import saved_values
from lightning_drive.core.arguments import Scope
from lightning_drive.core.messages import listed
from lightning_drive.network.masks import collapsed_layers
from lightning_drive.trainer import other_callbacks, restored_masks, step_counts
from lightning_drive.trainer.checks import SettingsError
from lightning_drive.trainer.cycle_schedules import Cycles
from lightning_drive.trainer.saved_state import SavedState
from lightning_drive.trainer.search_in_fit import Outcome


def check_settings(saved: SavedState, now: Mapping[str, object]) -> None:
    """Raise if cycles are left and settings differ; older checkpoints do not have all settings."""
    then, report = saved.settings, saved.pruning.report
    cycle = 0 if report is None else report.cycle or 0
    cycles = saved_values.check(int, then.get("cycles"), "the number of cycles in the checkpoint's settings")
    before, after = restored_masks.other_settings(then, now)
    if cycle < cycles and before:
        raise ValueError(
            f"The checkpoint is from cycle {cycle} of an IMP run with {before}, but this IMPPruningCallback has"
            f" {after}: its cycles would not continue that run. Resume with the settings of the checkpoint."
        )


def check_epochs(pruning: pl.Callback, cycles: Cycles, max_epochs: int) -> None:
    """Raise if training ends with the last cut or before it."""
    if 0 <= max_epochs <= cycles.last_cut:
        raise SettingsError(
            f"{type(pruning).__name__}({cycles}) prunes for the last time at the start of epoch {cycles.last_cut}"
            f" (counted from 0) and then trains the ticket, but training ends after max_epochs={max_epochs} epochs. Set"
            f" `max_epochs` to {cycles.last_cut} plus the epochs for the ticket, or lower `cycles` or"
            " `epochs_per_cycle`."
        )


def check_training(pruning: pl.Callback, trainer: pl.Trainer, pl_module: pl.LightningModule, cycles: Cycles) -> None:
    """Raise, once data are loaded, if steps end before the last cut, or if another callback makes cycles differ."""
    steps = cycles.last_cut * step_counts.steps_per_epoch(trainer)
    is_known = pl_module.automatic_optimization  # else a batch may have any number of steps
    if is_known and 0 <= trainer.max_steps <= steps < math.inf:
        raise MisconfigurationException(
            f"{type(pruning).__name__}({cycles}) prunes for the last time after {steps:g} steps and then trains the"
            f" ticket, but training ends after max_steps={trainer.max_steps}. Raise `max_steps`, or lower `cycles` or"
            " `epochs_per_cycle`."
        )
    for callback in other_callbacks.callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler) and len(callback.scheduling) > 1:
            raise MisconfigurationException(
                f"{type(pruning).__name__} repeats the same training in every cycle, but"
                f" GradientAccumulationScheduler(scheduling={callback.scheduling}) changes it at epochs counted over"
                " the whole run. Accumulate the same number of batches throughout, with"
                " `Trainer(accumulate_grad_batches=...)`."
            )


def check_swa(pruning: pl.Callback, trainer: pl.Trainer, cycles: Cycles) -> None:
    """Raise if SWA replaces learning rates that a rewind returns to; warn if it averages within cycles."""
    callbacks, last_cut = other_callbacks.callbacks_of(trainer), cycles.last_cut
    for swa in callbacks:
        if not isinstance(swa, StochasticWeightAveraging):
            continue
        is_before = callbacks.index(swa) < callbacks.index(pruning)
        if swa.swa_start <= cycles.rewind_epoch or (swa.swa_start <= last_cut and is_before):
            raise MisconfigurationException(
                f"StochasticWeightAveraging replaces the learning-rate schedule in epoch {swa.swa_start}, before"
                f" {type(pruning).__name__} can return to it. Set `swa_epoch_start` to {last_cut + 1} or more, which"
                f" averages the ticket's training, and put {type(pruning).__name__} before it in `callbacks`."
            )
        if swa.swa_start < last_cut:
            rank_zero_warn(
                f"StochasticWeightAveraging starts in epoch {swa.swa_start}, before IMP's last cut at epoch {last_cut}:"
                " its learning rate ends with the cycle, and its average begins again with every cycle. To average the"
                f" ticket's training, set `swa_epoch_start` to {last_cut + 1} or more."
            )


def check_paths(outcome: Outcome, cycle: int, cycles: Cycles, scope: Scope) -> None:
    """Raise if a cut leaves no path to train."""
    masks, active = outcome.found.masks, outcome.diagnosis.active
    if active is not None and not active.num_kept:
        empty = collapsed_layers(masks)
        where = f", and no weight is left in {listed(map(repr, empty))}" if empty else ""
        remedy = "" if scope != "global" else " set `scope='layerwise'`,"
        raise MisconfigurationException(
            f"After cycle {cycle} of {cycles.number}, at a sparsity of {masks.sparsity:.2%}, the network is cut off: no"
            f" path from its input to its output is left{where}. Further epochs would change nothing. Lower"
            f" `sparsity`, raise `cycles`,{remedy} or leave small layers out with `exclude`."
        )
