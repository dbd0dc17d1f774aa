"""A training run in a process of its own, for tests that interrupt it: ``python resumable.py FOLDER ...``.

Saves a checkpoint at every moment of every epoch at which one can be saved, and the final state.
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import torch

EPOCHS, WARMUP = 4, 2


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


def run(
    folder: Path, optimizer: str, *, ckpt_path: Path | None = None, save: bool = False, kill: int | None = None
) -> Any:
    """Train from the start or from a checkpoint, and give what is left at the end."""
    torch.set_num_threads(1)
    module, callback = fits.ConvModule(optimizer), fits.drive(warmup_epochs=WARMUP)
    counter = CountPruning(callback)
    callbacks: list[pl.Callback] = [callback, counter]
    if save:
        callbacks.append(SaveEverywhere(folder))
    if kill is not None:
        callbacks += [KillItself(kill)]
    fits.trainer(folder, *callbacks, max_epochs=EPOCHS).fit(module, fits.loader(), ckpt_path=ckpt_path)
    return {
        "state": fits.state_of(module),
        "digest": callback.masks.digest(),
        "changes": counter.changes,
        "pruned_in_epoch": callback.report.epoch if callback.report else None,
        "optimizer": [value for state in module.optimizers().state.values() for value in state.values()],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--resume", type=Path, nargs="*")
    parser.add_argument("--kill", type=int)
    arguments = parser.parse_args()
    if arguments.resume is None:
        result = run(arguments.folder, arguments.optimizer, save=True, kill=arguments.kill)
        torch.save(result, arguments.folder / "final.pt")
    else:
        resumed = {path.stem: run(arguments.folder, arguments.optimizer, ckpt_path=path) for path in arguments.resume}
        torch.save(resumed, arguments.folder / "resumed.pt")
