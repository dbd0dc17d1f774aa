"""A sparsity that is that of a small part of the weights is said, unless the user has chosen that part."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_drive import SNIP, DRIVEPruningCallback, IMPPruningCallback, SNIPPruningCallback, find_masks

SHARE = re.compile(r"Only [\d.]+% of the weights in matrices are prunable")


class Mostly(pl.LightningModule):
    """Most weights are in a matrix that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix, self.head = nn.Parameter(torch.randn(64, 64) / 8), nn.Linear(64, fits.NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(images.flatten(1) @ self.matrix))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Chosen(SNIPPruningCallback):
    def prunable_parameters(self, pl_module: Any) -> dict[str, nn.Parameter]:
        return {"head.weight": pl_module.head.weight}


def said(run: Callable[[], object]) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return any(SHARE.match(str(warning.message)) for warning in caught)


@pytest.mark.parametrize(("include", "expected"), [(None, True), (["head.*"], False), (["*"], False)])
def test_share__find_masks(include: list[str] | None, expected: bool) -> None:
    batch = next(iter(fits.loader()))
    module = Mostly()
    assert expected == said(
        lambda: find_masks(
            module,
            SNIP(),
            sparsity=0.5,
            batches=[batch],
            loss_fn=lambda module, batch: module.training_step(batch, 0),
            include=include,
        )
    )


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        pytest.param(lambda: SNIPPruningCallback(sparsity=0.5), True, id="snip"),
        pytest.param(lambda: DRIVEPruningCallback(sparsity=0.5, warmup_epochs=1, rounds=2), True, id="drive"),
        pytest.param(lambda: IMPPruningCallback(sparsity=0.5, cycles=1, epochs_per_cycle=1), True, id="imp"),
        pytest.param(lambda: SNIPPruningCallback(sparsity=0.5, include=["head.*"]), False, id="include"),
        pytest.param(
            lambda: IMPPruningCallback(sparsity=0.5, cycles=1, epochs_per_cycle=1, include=["head.*"]),
            False,
            id="imp_include",
        ),
        pytest.param(lambda: SNIPPruningCallback(sparsity=0.5, exclude=["matrix"]), False, id="exclude"),
        pytest.param(lambda: Chosen(sparsity=0.5), False, id="override"),
    ],
)
def test_share__callbacks(callback: Callable[[], Any], expected: bool, tmp_path: Path) -> None:
    trainer = fits.trainer(tmp_path, callback(), max_epochs=2)
    assert expected == said(lambda: trainer.fit(Mostly(), fits.loader()))
