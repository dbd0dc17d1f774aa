"""The time of epochs, which survives that a run is killed, with the state of random numbers at their ends."""

import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_drive import PruningReport


class Stopwatch(pl.Callback):
    """Measures epochs; it is the first callback to see them begin, and sees them end before checkpoints do.

    It also stores what checkpoints lack for resuming to the bit: the state of torch's generators, which shuffle and
    augment images.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0
        self._random: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if "cpu" in self._random:
            torch.set_rng_state(self._random["cpu"])
            if getattr(trainer.fit_loop, "is_resuming", False):  # Lightning 2.6 has already made this epoch's iterator,
                torch.empty((), dtype=torch.int64).random_()  # which draws a number
        if "cuda" in self._random:
            torch.cuda.set_rng_state(self._random["cuda"])
        self._random = {}
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    def state_dict(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        return {"seconds": list(self.seconds), "random": random}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self._random = list(state_dict["seconds"]), state_dict["random"]

    def phases(self, report: PruningReport | None) -> dict[str, float]:
        """Divide the measured seconds into those before the masks, of the search for them, and after them."""
        if report is None:
            return {"warmup": 0.0, "pruning": 0.0, "training": sum(self.seconds)}
        before, after = sum(self.seconds[: report.epoch]), sum(self.seconds[report.epoch :]) - report.seconds
        if report.cycle is not None:
            return {"warmup": 0.0, "pruning": before + report.seconds, "training": after}
        if report.cuts:  # all but the last one are within the epochs before it
            return {"warmup": before - report.seconds, "pruning": report.seconds, "training": after + report.seconds}
        return {"warmup": before, "pruning": report.seconds, "training": after}
