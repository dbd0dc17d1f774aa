"""Draw the pictures of the documentation: a small network on scikit-learn's digits, pruned in three ways.

A minute; it writes `docs/pictures/*.png`:

    python docs/site/pictures.py
"""

import logging
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_drive import DRIVEPruningCallback, GradualPruningCallback, IMPPruningCallback, PruningReport
from lightning_drive.callbacks.hooks import PruningCallback

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from digits import DigitClassifier, load_data  # noqa: E402


class Validated(DigitClassifier):
    """The example's network, with a validation accuracy for the pictures of IMP's cycles and of gradual cuts."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", F.cross_entropy(logits, labels))


def pruned(callback: PruningCallback, max_epochs: int) -> PruningReport:
    """Train and prune, and return the report to draw."""
    pl.seed_everything(0, verbose=False)
    train, test = load_data()
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Validated(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=450))
    assert callback.report is not None
    return callback.report


def main() -> None:
    """Draw all of them."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    folder = ROOT / "docs" / "pictures"
    report = pruned(DRIVEPruningCallback(sparsity=0.98, warmup_epochs=3), max_epochs=4)
    report.plot(folder / "density.png", "density")
    report.plot(folder / "rounds.png", "rounds")
    report.plot(folder / "scores.png", "scores")
    report = pruned(IMPPruningCallback(sparsity=0.98, cycles=10, epochs_per_cycle=5), max_epochs=51)
    report.plot(folder / "cycles.png", "cycles", metric="val_accuracy")
    report = pruned(GradualPruningCallback(sparsity=0.98), max_epochs=30)
    report.plot(folder / "cuts.png", "cuts", metric="val_accuracy")


if __name__ == "__main__":
    main()
