"""A training run that can be killed at any moment and started again: ``python killable.py FOLDER ...``.

Every start goes on from the folder's last checkpoint, if there is one. At the end each rank writes what it is left
with to ``final-RANK.pt``; with ``--kill PHASE N``, SIGKILL comes first, at the N-th event in a phase (see `Phases`).
"""

import argparse
import functools
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import resumable
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_drive import IMPPruningCallback
from lightning_drive.callbacks.hooks import PruningCallback
from lightning_drive.warmup import WarmupPruningCallback

# What goes on inside a phase is what these call; within the commit, scoring is a phase of its own.
PHASES = {
    "step": [(pl.LightningModule, "optimizer_step")],
    "scoring": [(PruningCallback, "_search")],
    "commit": [(WarmupPruningCallback, "_prune"), (IMPPruningCallback, "_prune")],
    "saving": [(pl.Trainer, "save_checkpoint")],
}


class Phases:
    """Counts the events of Python's profiler, calls and returns of functions, in each phase of a run.

    At one of them it may send SIGKILL to the process group: to all ranks.
    """

    def __init__(self, phase: str | None = None, event: int = 0, rank: int = 0) -> None:
        self.phase, self.event, self.rank = phase, event, rank
        self.counts: Counter[str] = Counter()

    def watch(self) -> None:
        for phase, methods in PHASES.items():
            for owner, name in methods:
                setattr(owner, name, self._watched(getattr(owner, name), phase))

    def _watched(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            outer = sys.getprofile()
            sys.setprofile(functools.partial(self._count, phase))
            try:
                return method(*args, **kwargs)
            finally:
                sys.setprofile(outer)

        return watched

    def _count(self, phase: str, *_: Any) -> None:
        self.counts[phase] += 1
        if (phase, self.counts[phase]) == (self.phase, self.event) and self.rank == rank():
            os.killpg(0, signal.SIGKILL)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class WriteTheEnd(pl.Callback):
    """Writes down, on every rank, what a run is left with."""

    def __init__(self, folder: Path, pruning: PruningCallback, phases: Phases) -> None:
        self.folder, self.pruning, self.phases = folder, pruning, phases
        self.begun = time.monotonic()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        end = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "state": fits.state_of(pl_module),
            "optimizer": [value for state in trainer.optimizers[0].state.values() for value in state.values()],
            "masks": self.pruning.masks.state_dict(),
            "counts": dict(self.phases.counts),
            "seconds": time.monotonic() - self.begun,
        }
        torch.save(end, self.folder / f"final-{rank()}.pt")


def main(arguments: list[str]) -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--method", default="drive", choices=["drive", "imp"])
    parser.add_argument("--every", default="epoch", choices=["epoch", "step"], help="when checkpoints are saved")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--kill", nargs=2, metavar=("PHASE", "N"), help=f"at event N in one of {', '.join(PHASES)}")
    parser.add_argument("--kill-rank", type=int, default=0, help="whose events are counted")
    options = parser.parse_args(arguments)
    folder: Path = options.folder

    torch.set_num_threads(1)
    tempfile.tempdir = str(folder)  # checkpoints are written there, then moved
    phase, event = options.kill or (None, 0)
    phases = Phases(phase, int(event), options.kill_rank)
    phases.watch()
    # Resumed twice within an epoch, Lightning itself may take steps of it again: more than OneCycleLR has.
    module = resumable.Scheduled("sgd", "onecycle" if options.every == "epoch" else "step")
    pruning = resumable.pruning_for(options.method, rewind_epoch=0)
    if any(folder.glob("last*.ckpt")):
        resumable.forget(module)
    checkpoints = ModelCheckpoint(
        folder,
        filename="{epoch}-{step}",
        save_last=True,
        save_top_k=-1,
        every_n_epochs=1 if options.every == "epoch" else None,
        every_n_train_steps=1 if options.every == "step" else None,
    )
    trainer = fits.trainer(
        folder,
        pruning,
        checkpoints,
        WriteTheEnd(folder, pruning, phases),
        max_epochs=resumable.EPOCHS if options.method == "drive" else resumable.IMP_EPOCHS,
        devices=options.devices,
        strategy=options.strategy,
    )
    trainer.fit(module, fits.loader(), ckpt_path="last")


if __name__ == "__main__":
    main(sys.argv[1:])
