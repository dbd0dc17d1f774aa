"""Runs that are stopped by real signals in the middle of pruning, and then resumed: ``python stopped.py FOLDER``.

Every signal is sent to this process by itself, from where the run is at that moment.
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import resumable
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from lightning_drive import DRIVEPruningCallback, IMPPruningCallback
from lightning_drive.callbacks.hooks import PruningCallback

LAST_CUT, EPOCHS, ROUNDS = 2, 4, 5
METHODS = ("drive", "imp")
SIGNALS = {"int": signal.SIGINT, "term": signal.SIGTERM}
MOMENTS = ("before", "rounds", "statistics", "commit", "step")
HAS_SAVE_ON_EXCEPTION = hasattr(ModelCheckpoint(), "save_on_exception")

Stop = Callable[[], None]


class Bomb:
    """Sends a signal to its own process when it is reached for the n-th time."""

    def __init__(self, number: int, countdown: int) -> None:
        self.number, self.countdown = number, countdown

    def __call__(self) -> None:
        self.countdown -= 1
        if self.countdown == 0:
            os.kill(os.getpid(), self.number)


class StoppingSGD(torch.optim.SGD):
    """Stops while the masks are being put on optimizers, or in a step after its weights have moved."""

    in_commit: Stop | None = None
    in_step: Stop | None = None

    def register_step_post_hook(self, hook: Any) -> Any:
        if self.in_commit is not None:
            self.in_commit()
        return super().register_step_post_hook(hook)

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self.in_step is not None:
            with torch.no_grad():  # as optimizers do that do not keep zeros
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.add_(1e-3)
            self.in_step()
        return loss


class Module(fits.ConvModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return StoppingSGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def pruning_for(method: str, stop: Stop | None) -> PruningCallback:
    def loss_fn(module: nn.Module, batch: list[Tensor]) -> Tensor:
        if stop is not None:
            stop()
        return F.cross_entropy(module(batch[0]), batch[1])

    class StoppingIMP(IMPPruningCallback):
        def _search(self, *args: Any, **kwargs: Any) -> Any:
            if stop is not None:
                stop()
            return super()._search(*args, **kwargs)

    if method == "imp":
        return StoppingIMP(sparsity=0.8, cycles=LAST_CUT, epochs_per_cycle=1)
    return DRIVEPruningCallback(sparsity=0.8, warmup_epochs=LAST_CUT, rounds=ROUNDS, loss_fn=loss_fn)


def is_possible(method: str, moment: str) -> bool:
    return method != "imp" or moment != "statistics"


def countdown(method: str, moment: str) -> int:
    if method == "imp":
        return {"rounds": LAST_CUT}.get(moment, 1)  # once in each cut
    return {"rounds": 3, "statistics": ROUNDS + 2}.get(moment, 1)


class ArmInEpoch(pl.Callback):
    """Arms the optimizer at the last cut, or in the epoch before or after it."""

    def __init__(self, moment: str, stop: Stop) -> None:
        self.moment, self.stop = moment, stop

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        assert isinstance(optimizer, StoppingSGD)
        if (self.moment, trainer.current_epoch) in (("before", LAST_CUT - 1), ("step", LAST_CUT)):
            optimizer.in_step = self.stop
        optimizer.in_commit = self.stop if (self.moment, trainer.current_epoch) == ("commit", LAST_CUT) else None


def run(folder: Path, method: str, ckpt_path: Path | None = None, moment: str = "", number: int = 0) -> dict[str, Any]:
    """Train, with or without a signal, from the start or a checkpoint; return what is left."""
    folder.mkdir(exist_ok=True)
    stop = Bomb(number, countdown(method, moment)) if moment else None
    module, callback = Module(), pruning_for(method, stop if moment in ("rounds", "statistics") else None)
    if ckpt_path is not None:
        resumable.forget(module)
    counter = resumable.CountPruning(callback)
    callbacks: list[pl.Callback] = [callback, counter]
    if stop is not None:
        callbacks = [ArmInEpoch(moment, stop), *callbacks, OnExceptionCheckpoint(folder)]
        if HAS_SAVE_ON_EXCEPTION:
            callbacks.append(ModelCheckpoint(folder, filename="saved", save_on_exception=True, every_n_epochs=99))
    trainer = fits.trainer(folder, *callbacks, max_epochs=EPOCHS, enable_checkpointing=stop is not None)
    stopped = None
    try:
        trainer.fit(module, fits.loader(), ckpt_path=ckpt_path)
    except SystemExit as exit_:  # Lightning's answer to both signals
        stopped = type(exit_).__name__
    masks = callback.masks
    return {
        "state": fits.state_of(module),
        "masks": masks.state_dict(),
        "holds": masks.hold_for(module),
        "kept": masks.num_kept,
        "changes": counter.changes,
        "epoch": callback.report.epoch if callback.report else None,
        "stopped": stopped,
        "is_over": stop is None or stop.countdown <= 0,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)  # Lightning's advice on resuming: the point of it
    results: dict[str, Any] = {}
    for method in METHODS:
        results[method] = run(folder / method, method)
        for name, number in SIGNALS.items():
            for moment in MOMENTS:
                if not is_possible(method, moment):
                    continue
                where = folder / f"{method}-{name}-{moment}"
                stopped = run(where, method, moment=moment, number=number)
                saved = sorted(where.glob("*.ckpt"))
                results[where.name] = {
                    "stopped": stopped,
                    "saved": [str(path) for path in saved],
                    "resumed": [run(where, method, ckpt_path=path) for path in saved],
                }
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
