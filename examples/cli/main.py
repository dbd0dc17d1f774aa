"""Choose a pruning method in a YAML file, with LightningCLI, on scikit-learn's handwritten digits.

    pip install -e '.[examples,cli]'
    python examples/cli/main.py fit --config examples/cli/base.yaml --config examples/cli/drive.yaml

`base.yaml` has the settings of training, and `drive.yaml`, `snip.yaml`, `synflow.yaml`, `imp.yaml` or `gradual.yaml`
those of pruning; without one of these the network stays dense. A later file overrides an earlier one (its list of
callbacks replaces the whole earlier list), and the command line overrides all files:

    ... --trainer.callbacks.sparsity=0.98                 another value for the callback named last
    ... --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val_loss        one more callback
    ... --print_config                                    all settings as YAML; nothing runs
    python examples/cli/main.py fit --trainer.callbacks.help=DRIVEPruningCallback      the settings of a callback

Checkpoints, metrics and the whole configuration are in `lightning_logs/version_0` (then `version_1`, ...). To test that
network, or to continue its training:

    python examples/cli/main.py test --config lightning_logs/version_0/config.yaml --ckpt_path CHECKPOINT
    python examples/cli/main.py fit --config lightning_logs/version_0/config.yaml --ckpt_path CHECKPOINT \
        --trainer.max_epochs 15

The settings are our own: the papers train other networks on other data, and for longer.
"""

import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_drive.cli import OneLineErrorsCLI


class DigitClassifier(pl.LightningModule):
    """A small convolutional network for images of 8x8 pixels.

    Args:
        width: Channels of the first convolution; the others have two and four times as many.
        lr: Initial learning rate, which falls to 0 as a cosine.

    """

    def __init__(self, width: int = 16, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)):
            layers += [nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, stride=stride, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))
        self.val_accuracy, self.test_accuracy = (MulticlassAccuracy(10, average="micro") for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Digits(pl.LightningDataModule):
    """The 1,797 images of scikit-learn: 1,077 to train on, 270 to validate and 450 to test on.

    Args:
        batch_size: Images in a training step.

    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        pixels, digits = load_digits(return_X_y=True)
        images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        labels = torch.tensor(digits)
        rest, test = train_test_split(range(len(labels)), test_size=450, stratify=labels, random_state=0)
        train, val = train_test_split(rest, test_size=270, stratify=labels[rest], random_state=0)
        self.train, self.val, self.test = (TensorDataset(images[part], labels[part]) for part in (train, val, test))

    def train_dataloader(self) -> DataLoader[list[Tensor]]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[list[Tensor]]:
        return DataLoader(self.val, batch_size=450)

    def test_dataloader(self) -> DataLoader[list[Tensor]]:
        return DataLoader(self.test, batch_size=450)


def main() -> LightningCLI:
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # Lightning 2.6 with torch 2.15
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the images are in memory
    torch.set_num_threads(1)  # more threads gain nothing here, and with one all machines add in the same order
    return OneLineErrorsCLI(DigitClassifier, Digits)  # LightningCLI with errors of one line


if __name__ == "__main__":
    main()
