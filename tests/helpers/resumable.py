"""A training run in a process of its own, for tests that interrupt it: ``python resumable.py FOLDER ...``.

Saves a checkpoint at every moment of every epoch at which one can be saved, and the final state.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import torch
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from lightning_drive import IMPPruningCallback

EPOCHS, WARMUP = 4, 2
CYCLES, EPOCHS_PER_CYCLE, IMP_EPOCHS = 2, 2, 5  # a ticket of another length than a cycle


class Scheduled(fits.ConvModule):
    """With a learning-rate schedule, of which OneCycleLR reads its length from the Trainer."""

    def __init__(self, optimizer: str, scheduler: str | None) -> None:
        super().__init__(optimizer)
        self.scheduler = scheduler

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.scheduler == "onecycle":
            scheduler = OneCycleLR(optimizer, self.lr, self.trainer.estimated_stepping_batches)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        if self.scheduler == "step":
            return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, step_size=1, gamma=0.5)}
        return optimizer


class SaveEverywhere(pl.Callback):
    """Saves in the middle of each epoch, after its last batch, after validation and at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save(self, trainer: pl.Trainer, moment: str) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-{moment}.ckpt")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != 1:
            self._save(trainer, {0: "middle", 2: "last_batch"}[batch_idx])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._save(trainer, "epoch_end")


class KillItself(pl.Callback):
    """Sends SIGKILL to its own process in the middle of an epoch: nothing can be saved or cleaned up."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)


class CountPruning(pl.Callback):
    """Counts how often the masks change."""

    def __init__(self, pruning: Any) -> None:
        self.pruning, self.changes, self.last = pruning, 0, None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        digest = self.pruning.masks.digest() if self.pruning.pruned else None
        self.changes += digest != self.last
        self.last = digest


class Rates(pl.Callback):
    """Writes down the learning rate of every step."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]


def pruning_for(method: str, rewind_epoch: int) -> Any:
    if method == "drive":
        return fits.drive(warmup_epochs=WARMUP)
    return IMPPruningCallback(sparsity=0.8, cycles=CYCLES, epochs_per_cycle=EPOCHS_PER_CYCLE, rewind_epoch=rewind_epoch)


def forget(module: torch.nn.Module) -> None:
    """Start from other weights than the first process did: all that matters must come from the checkpoint."""
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)


def run(
    folder: Path,
    optimizer: str,
    *,
    method: str = "drive",
    scheduler: str | None = None,
    rewind_epoch: int = 0,
    ckpt_path: Path | None = None,
    save: bool = False,
    kill: int | None = None,
) -> Any:
    """Train from the start or from a checkpoint, and give what is left at the end."""
    torch.set_num_threads(1)
    module, callback = Scheduled(optimizer, scheduler), pruning_for(method, rewind_epoch)
    if ckpt_path is not None:
        forget(module)
    counter, rates = CountPruning(callback), Rates()
    callbacks: list[pl.Callback] = [callback, counter, rates]
    if save:
        callbacks.append(SaveEverywhere(folder))
    if kill is not None:
        callbacks += [KillItself(kill)]
    max_epochs = EPOCHS if method == "drive" else IMP_EPOCHS
    fits.trainer(folder, *callbacks, max_epochs=max_epochs).fit(module, fits.loader(), ckpt_path=ckpt_path)
    return {
        "state": fits.state_of(module),
        "digest": callback.masks.digest(),
        "changes": counter.changes,
        "pruned_in_epoch": callback.report.epoch if callback.report else None,
        "optimizer": [value for state in module.optimizers().state.values() for value in state.values()],
        "rates": rates.rates,
    }


def main(arguments: list[str]) -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--method", default="drive", choices=["drive", "imp"])
    parser.add_argument("--scheduler", choices=["onecycle", "step"])
    parser.add_argument("--rewind-epoch", type=int, default=0)
    parser.add_argument("--resume", type=Path, nargs="*")
    parser.add_argument("--kill", type=int)
    settings = vars(parser.parse_args(arguments))
    folder, resume, kill = settings["folder"], settings.pop("resume"), settings.pop("kill")
    if resume is None:
        torch.save(run(**settings, save=True, kill=kill), folder / "final.pt")
    else:
        torch.save({path.stem: run(**settings, ckpt_path=path) for path in resume}, folder / "resumed.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
