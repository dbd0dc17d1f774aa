"""On networks as deep as those in the papers: one shot of SNIP cuts VGG-16 off, and SynFlow needs float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deep
import fits
import lightning.pytorch as pl
import models
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import densenet121, resnet50, resnet101

from lightning_drive import DRIVEPruningCallback, SNIPPruningCallback, SynFlow, SynFlowPruningCallback, find_masks
from lightning_drive.callbacks.hooks import PruningCallback

pytestmark = pytest.mark.slow


class VGG(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = deep.vgg16()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return models.loss_fn(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def prune(tmp_path: Path, callback: PruningCallback, epochs: int = 1) -> VGG:
    module = VGG()
    running = fits.trainer(tmp_path, callback, max_epochs=epochs, limit_train_batches=3)
    running.fit(module, DataLoader(deep.images(count=3, size=8), batch_size=None))
    assert running.global_step == 3 * epochs
    assert callback.masks.num_kept == round(14_715_584 * 0.007)
    assert callback.masks.hold_for(module)
    return module


def test_vgg16__one_shot_snip_collapses(tmp_path: Path) -> None:
    """No layer is empty, and yet nothing gets through: it is said loudly, with what helps, and training goes on."""
    callback = SNIPPruningCallback(sparsity=0.993)
    with pytest.warns(UserWarning, match=r"The network is cut off: no path from .* is left, so it cannot learn\. More"):
        prune(tmp_path, callback)
    assert callback.report is not None
    assert callback.report.effective_sparsity == 1.0


@pytest.mark.parametrize(
    ("callback", "epochs"),
    [
        (SNIPPruningCallback(sparsity=0.993, rounds=10), 1),
        (SynFlowPruningCallback(sparsity=0.993, rounds=12), 1),
        (DRIVEPruningCallback(sparsity=0.993, rounds=10, warmup_epochs=1, bn_batches=1), 2),
    ],
    ids=["iterative_snip", "synflow", "drive"],
)
def test_vgg16__many_rounds_do_not_collapse(tmp_path: Path, callback: PruningCallback, epochs: int) -> None:
    """At least 99 % of the kept weights lie on a path from input to output."""
    prune(tmp_path, callback, epochs)
    assert callback.report is not None
    assert callback.report.effective_sparsity is not None
    assert (1 - callback.report.effective_sparsity) / callback.report.density >= 0.99
    assert not callback.report.warnings


def flow_in_float32(network: nn.Module) -> Tensor:
    """R, computed as its definition says, in float32."""
    network.eval()
    with torch.no_grad():
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            if value.is_floating_point():
                value.abs_()
                if name.endswith(("bias", "running_mean")):
                    value.zero_()
        return network(torch.ones(1, 3, 32, 32)).sum()


@pytest.mark.parametrize(
    "make",
    [
        lambda: resnet50(num_classes=10),
        lambda: resnet101(num_classes=10),
        lambda: densenet121(num_classes=10),
        deep.resnet110,
    ],
    ids=["resnet50", "resnet101", "densenet121", "resnet110"],
)
@pytest.mark.filterwarnings("ignore:(In round|Layer collapse):UserWarning")  # with 1x1 maps, 3x3 taps see only padding
def test_synflow__beyond_float32(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = make()
    settings: dict[str, Any] = {"sparsity": 0.9, "example_input": torch.zeros(1, 3, 32, 32)}
    masks = find_masks(network, SynFlow(rounds=2), **settings)  # which raises where a score is not finite
    assert masks.num_kept == round(masks.num_prunable * 0.1)
    assert not flow_in_float32(network).isfinite()
