"""The LightningModule of all experiments: a network, its loss and its optimizer."""

import lightning.pytorch as pl
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from networks import Network, build
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy


class ImageClassifier(pl.LightningModule):
    """A classifier of images, trained by cross-entropy.

    Args:
        network: Name of the network.
        num_classes: Number of classes.
        optimizer: Returns the optimizer for parameters.
        lr_scheduler: Returns the learning-rate scheduler for an optimizer; it steps after every epoch.

    """

    def __init__(
        self,
        network: Network,
        num_classes: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.network = build(network, num_classes)
        self.val_accuracy, self.test_accuracy = (MulticlassAccuracy(num_classes, average="micro") for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.val_accuracy(self(images), labels)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}
