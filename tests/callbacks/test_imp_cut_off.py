"""IMP ends with an error, before anything is committed, where a cut leaves no path from input to output."""

from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_drive import IMPPruningCallback


class Chain(pl.LightningModule):
    """A chain of layers whose middle one a cut empties first: its weights are by far the smallest."""

    def __init__(self, kind: str = "linear") -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = {
            "linear": lambda: nn.Linear(8, 8),
            "conv": lambda: nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 8, 1), nn.Flatten()),
            "grouped": lambda: nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 8, 1, groups=4), nn.Flatten()),
        }[kind]()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), middle, nn.ReLU(), nn.Linear(8, 4))
        with torch.no_grad():
            for parameter in middle.parameters():
                parameter.mul_(1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-9)


@pytest.mark.parametrize(
    ("kind", "cycles", "control"),
    [
        ("linear", 1, "none"),
        ("linear", 3, "reinit"),
        ("conv", 3, "none"),
        ("conv", 1, "reinit"),
        ("grouped", 3, "none"),
    ],
)
def test_cut_off(tmp_path: Path, kind: str, cycles: int, control: Any) -> None:
    """An error in the cycle that does it, its last one or not, and nothing is committed."""
    module = Chain(kind)
    callback = IMPPruningCallback(sparsity=0.8, cycles=cycles, epochs_per_cycle=1, control=control)
    message = rf"After cycle 1 of {cycles}, at a sparsity of .* is cut off: .* no weight is left in 'net\.3\..*"
    with pytest.raises(MisconfigurationException, match=f"{message}Lower `sparsity`, raise `cycles`"):
        fits.trainer(tmp_path, callback, max_epochs=4).fit(module, fits.loader())
    assert not callback.pruned
    assert all(bool((parameter != 0).all()) for name, parameter in module.named_parameters() if "weight" in name)


def test_cut_off__in_a_later_cycle(tmp_path: Path) -> None:
    """What earlier cycles kept stays as they left it."""
    module = Chain()
    callback = IMPPruningCallback(sparsity=0.9, cycles=5, epochs_per_cycle=1)
    with torch.no_grad():
        module.net[3].weight.mul_(1e6)
    with pytest.raises(MisconfigurationException, match=r"After cycle [2345] of 5, .* is cut off"):
        fits.trainer(tmp_path, callback, max_epochs=7).fit(module, fits.loader())
    assert callback.pruned
    assert callback.masks.hold_for(module)


@pytest.mark.filterwarnings("ignore:Layer collapse", "ignore:The network is cut off")
def test_cut_off__quick_check(tmp_path: Path) -> None:
    """Which prunes an untrained network at once: no sign of what its cycles would do."""
    callback = IMPPruningCallback(sparsity=0.8, cycles=3, epochs_per_cycle=1)
    fits.trainer(tmp_path, callback, fast_dev_run=True).fit(Chain(), fits.loader())
    assert callback.pruned


class Unfollowed(Chain):
    """Its `forward` cannot go on with signals in place of numbers."""

    def forward(self, x: Tensor) -> Tensor:
        if x.max() == x.min():
            raise RuntimeError("an image of one colour")
        return self.net(x)


@pytest.mark.filterwarnings("ignore:Layer collapse", "ignore:Effective sparsity")
def test_cut_off__not_where_paths_are_unknown(tmp_path: Path) -> None:
    callback = IMPPruningCallback(sparsity=0.8, cycles=2, epochs_per_cycle=1)
    fits.trainer(tmp_path, callback, max_epochs=3).fit(Unfollowed(), fits.loader())
    assert callback.cycle == 2
