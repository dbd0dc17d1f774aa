"""Train a network that gets faster when it is pruned, and make a faster copy of it for inference.

    python examples/accelerate.py

A network of three linear layers learns to read scikit-learn's handwritten digits, enlarged to 32x32 pixels. It is
trained densely, and then by DRIVE with `accelerate=True`: from epoch 3 on it has 2 % of its weights, and its steps
compute with these only. `accelerate` then makes a copy for inference, of which the table of layers is printed, for
single images and for batches of 64. It runs on a CPU in about half a minute.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_drive import DRIVEPruningCallback, accelerate


class DigitClassifier(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Flatten(), nn.Linear(1024, width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Load the digits, 1,347 to train on and 450 to test on, with 4x4 pixels for each of theirs."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    images = F.interpolate(images, scale_factor=4, mode="bilinear")
    labels = torch.tensor(digits)
    train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def train(width: int, data: TensorDataset, epochs: int, callbacks: list[pl.Callback]) -> tuple[DigitClassifier, float]:
    """Train a network from the same initial weights, and return it with the seconds that this took."""
    pl.seed_everything(0, verbose=False)
    model = DigitClassifier(width)
    loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, loader)
    return model.eval(), time.perf_counter() - start


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    with torch.inference_mode():
        return float((model(images).argmax(1) == labels).float().mean())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train and predict faster with a pruned network.")
    parser.add_argument("--width", type=int, default=1024, help="neurons of the hidden layers (default: 1024)")
    parser.add_argument("--epochs", type=int, default=30, help="epochs in all, 3 of them dense (default: 30)")
    parser.add_argument("--sparsity", type=float, default=0.98, help="fraction to remove (default: 0.98)")
    options = parser.parse_args(argv)

    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # so that the figures do not depend on how many cores are free
    train_data, test_data = load_data()

    dense, dense_seconds = train(options.width, train_data, options.epochs, [])
    callback = DRIVEPruningCallback(sparsity=options.sparsity, warmup_epochs=3, rounds=20, accelerate=True)
    sparse, seconds = train(options.width, train_data, options.epochs, [callback])
    for name, model, took in (("dense", dense, dense_seconds), ("sparse", sparse, seconds)):
        print(f"{name}: trained in {took:.1f} s, {accuracy(model, test_data):.1%} of the test images are recognised")
    assert callback.report is not None
    print(f"\n{callback.report.acceleration}")

    for batch_size in (1, 64):
        fast = accelerate(sparse, test_data.tensors[0][:batch_size])
        print(f"\nBatches of {batch_size}: {fast.report}")
    print(f"\nThe accelerated network recognises {accuracy(fast, test_data):.1%} of the test images.")


if __name__ == "__main__":
    main()
