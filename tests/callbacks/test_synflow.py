"""SynFlow through a Trainer: scores in float64 of any precision, by what training calls the network with."""

from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import models
import pytest
import torch
from fits import ConvModule
from torch import Tensor, nn

from lightning_drive import (
    SNIPPruningCallback,
    SynFlow,
    SynFlowPruningCallback,
    find_masks,
)


def test_synflow__defaults(tmp_path: Path) -> None:
    callback = SynFlowPruningCallback(sparsity=0.9)
    fits.fit(tmp_path, ConvModule(), callback)
    expected = find_masks(ConvModule(), SynFlow(rounds=100), sparsity=0.9, batches=fits.loader())
    assert callback.masks == expected
    assert callback.report is not None
    assert (callback.report.epoch, callback.report.method) == (0, "SynFlow(rounds=100)")


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_synflow__precision(tmp_path: Path, precision: Any) -> None:
    """Scores are float64 whatever the Trainer computes in, so the masks are the same."""
    masks = []
    for given in ("32-true", precision):
        callback = SynFlowPruningCallback(sparsity=0.9, rounds=20)
        fits.fit(tmp_path, ConvModule(), callback, max_epochs=1, precision=given)
        masks.append(callback.masks)
    assert masks[0] == masks[1]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_synflow__half_precision(tmp_path: Path, precision: Any) -> None:
    """Weights are rounded then, and scored as they are."""
    callback = SynFlowPruningCallback(sparsity=0.9, rounds=20)
    fits.fit(tmp_path, ConvModule(), callback, max_epochs=1, precision=precision)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
    images = next(iter(fits.loader()))[0]
    assert callback.masks == find_masks(
        ConvModule().to(dtype), SynFlow(rounds=20), sparsity=0.9, example_input=images.to(dtype)
    )


class Backwards(ConvModule):
    """Takes labels before images, in training batches."""

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return batch[::-1] if self.trainer.training else batch

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        return super().training_step((batch[1], batch[0]), batch_idx)


def test_synflow__example_input_array(tmp_path: Path) -> None:
    """It goes before the batch, whose first tensor need not be the input."""
    module = Backwards()
    module.example_input_array = torch.zeros(2, 1, 8, 8)
    callback = SynFlowPruningCallback(sparsity=0.9, rounds=10, warmup_epochs=1)
    fits.fit(tmp_path, module, callback)
    assert callback.masks.num_kept == 100
    recorded = SynFlowPruningCallback(sparsity=0.9, rounds=10, warmup_epochs=1)
    fits.fit(tmp_path, Backwards(), recorded)  # by what training calls the network with
    assert recorded.masks == callback.masks


def test_synflow__batch_norm_after_warmup(tmp_path: Path) -> None:
    """With and without automatic optimization, the same statistics are measured on the pruned network."""
    measured = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 0:
                measured.append(pl_module.norm.running_mean.clone())

    for module in (ConvModule(), fits.Manual()):
        fits.fit(tmp_path, module, SynFlowPruningCallback(sparsity=0.5, rounds=3, warmup_epochs=1), Look())
    assert torch.equal(*measured)


class Residual(pl.LightningModule):
    """A stem, two residual blocks and a classifier, with a choice of what starts at zero."""

    def __init__(self, zero: str) -> None:
        super().__init__()
        self.network = models.randomised(models.ResidualNet(fits.NUM_CLASSES))
        weights = {
            "residual": [self.network.block1.norm2.weight, self.network.block2.norm2.weight],
            "head": [self.network.fc.weight],
        }[zero]
        for weight in weights:
            nn.init.zeros_(weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.expand(-1, 2, -1, -1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return fits.loss_fn(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_synflow__zero_head_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The synaptic flow R is 0: no signal reaches .* zero-initialised"):
        fits.fit(tmp_path, Residual("head"), SynFlowPruningCallback(sparsity=0.9, rounds=2), max_epochs=1)


@pytest.mark.filterwarnings("ignore:Layer collapse:UserWarning")
@pytest.mark.parametrize("make", [SNIPPruningCallback, SynFlowPruningCallback])
def test_zero_residual_gammas_warn(tmp_path: Path, make: Any) -> None:
    """87 % of the weights have a score of exactly 0 then, and position alone would decide between them."""
    callback = make(sparsity=0.5, rounds=2)
    with (
        pytest.warns(UserWarning, match="had a score above zero, fewer than the .* to keep: the cut fell inside"),
        pytest.warns(
            UserWarning, match=r"The scale of 'network.block1.norm2.weight', .* is 0 .* `zero_init_last=False`"
        ),
    ):
        fits.fit(tmp_path, Residual("residual"), callback, max_epochs=1, limit_train_batches=1)
    assert len(callback.report.warnings) > 1
    assert callback.masks.density == pytest.approx(0.5, abs=1e-3)


class Saturating(ConvModule):
    """Has one more activation, or several, before its last layer."""

    def __init__(self, activation: nn.Module, times: int) -> None:
        super().__init__()
        self.dropout = nn.Sequential(*[activation] * times)


@pytest.mark.filterwarnings("ignore:(Layer collapse|The network is cut off|In round):UserWarning")
@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU6(), "hardtanh"),
        (nn.Tanh(), "tanh"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.LayerNorm(128), "layer_norm"),
        (nn.Softmax(1), "softmax"),
    ],
    ids=["ReLU6", "Tanh", "Sigmoid", "LayerNorm", "Softmax"],
)
def test_synflow__undefined_layers(tmp_path: Path, activation: nn.Module, name: str) -> None:
    """One is a warning with its name, many are an error before anything is trained."""
    callback = SynFlowPruningCallback(sparsity=0.5, rounds=2)
    with pytest.warns(UserWarning, match=rf"SynFlow is not defined for 'dropout.0' \({name}\): saturating"):
        fits.fit(tmp_path, Saturating(activation, 1), callback, max_epochs=1)
    module = Saturating(activation, 3)
    with pytest.raises(ValueError, match=r"That is too much of this network; use another method, such as DRIVE"):
        fits.fit(tmp_path, module, SynFlowPruningCallback(sparsity=0.5, rounds=2), max_epochs=1)
    assert len(module.calls) == 1  # to see what training calls


def test_synflow__saturated_output_error(tmp_path: Path) -> None:
    """Where nothing is left to rank by, the error names the layer that is to blame."""

    class Module(ConvModule):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tanh(super().forward(images))

    with pytest.raises(
        ValueError, match=r"does not depend on any weight. SynFlow is not defined for .forward. \(tanh\)"
    ):
        fits.fit(tmp_path, Module(), SynFlowPruningCallback(sparsity=0.5, rounds=2))
