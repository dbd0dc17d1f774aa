"""Gradual pruning: a cut against the training step after it."""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
from benchmarks import trainers
from benchmarks.page import Figure
from benchmarks.trainers import Module
from typing_extensions import override

from lightning_drive import GradualPruningCallback

CUTS, EPOCHS = 4, 4
WINDOW = {"sparsity": trainers.SPARSITY, "start_epoch": 1, "end_epoch": EPOCHS - 1, "cuts_per_epoch": CUTS}
CASES = [("MLP 3072-300-100-10", 64, 200), ("ResNet-18", 16, 12), ("Transformer", 16, 12)]
"""Network, batch size, and steps in an epoch."""
CRITERIA = ("magnitude", "drive")

Taken = tuple[list[float], dict[str, list[float]]]


class TimedCuts(GradualPruningCallback):
    """Notes how long every cut takes, and before which step it was."""

    def __init__(self, criterion: Any) -> None:
        super().__init__(**WINDOW, criterion=criterion)  # type: ignore[arg-type]
        self.seconds: dict[int, float] = {}

    @override
    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        begin = time.perf_counter()
        super()._prune(trainer, pl_module)
        self.seconds[trainer.global_step] = time.perf_counter() - begin


class TimedSteps(pl.Callback):
    """Notes how long every step takes, from where a cut before it ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self._begin = time.perf_counter()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


@pytest.mark.parametrize(("name", "batch_size", "steps"), CASES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_cut(figure: Callable[..., Figure], name: str, batch_size: int, steps: int, criterion: str) -> None:
    def take() -> Taken:
        cuts, times = TimedCuts(criterion), TimedSteps()
        trainers.trainer(cuts, times, max_epochs=EPOCHS).fit(Module(name, batch_size, steps))
        assert len(cuts.seconds) == cuts.cut == (EPOCHS - 2) * CUTS
        return [*cuts.seconds.values()], {"the step after it": [times.seconds[step] for step in cuts.seconds]}

    figure("gradual", f"a cut by {criterion}, {name}, batches of {batch_size}", "s", take, goal=1.2)
