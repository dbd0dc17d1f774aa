"""Any object with rounds, a mode and a score is a method, and what it reads is asked in one way."""

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import fits
import lightning.pytorch as pl
import own_methods
import pytest
import torch
import torch.nn.functional as F
from fits import ConvModule, loader, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_drive import DRIVE, SNIP, Magnitude, PruningReport, Random, SynFlow, find_masks
from lightning_drive.search import methods
from lightning_drive.warmup import WarmupPruningCallback


class Plain:
    """A method that is no dataclass, and says nothing but what a method must."""

    rounds = 3
    mode = "eval"

    def score(self, network: Any) -> dict[str, Tensor]:
        return {name: weight.abs() for name, weight in network.weights.items()}


class Declared(Plain):
    reads: ClassVar[str] = "weights"
    batches_per_round = 1


class ByLoss(Plain):
    batches_per_round = 2

    def score(self, network: Any) -> dict[str, Tensor]:
        return {name: value.abs() for name, value in network.loss_gradients(self.batches_per_round).items()}


class Manual(ConvModule):
    """Optimizes manually: calling its training step to score would step the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


DATA_FREE = [Magnitude(), Random(seed=1), Plain(), Declared()]


@pytest.mark.parametrize(
    ("method", "reads", "passes"),
    [
        (DRIVE(rounds=5, batches_per_round=2), "loss", 10),
        (SNIP(), "loss", 1),
        (SynFlow(rounds=7), "shape", 7),
        (Magnitude(rounds=4), "weights", 0),
        (Random(), "weights", 0),
        (Plain(), "weights", 0),
        (Declared(), "weights", 0),
        (ByLoss(), "loss", 6),
    ],
)
def test_reads(method: Any, reads: str, passes: int) -> None:
    assert (methods.reads(method), methods.num_passes(method)) == (reads, passes)


def test_reads__unknown() -> None:
    method = Declared()
    method.reads = "data"  # type: ignore[misc]
    with pytest.raises(ValueError, match="`reads` must be"):
        WarmupPruningCallback(method, sparsity=0.5)
    with pytest.raises(ValueError, match="`reads` must be"):
        find_masks(ConvModule(), method, sparsity=0.5)


@pytest.mark.parametrize("method", DATA_FREE, ids=lambda method: type(method).__name__)
def test_data_free__under_manual_optimization(method: Any, tmp_path: Path) -> None:
    """A method that reads no loss needs no `loss_fn`, and its plan has no passes."""
    callback = WarmupPruningCallback(method, sparsity=0.8, warmup_epochs=1)
    trainer(tmp_path, callback, max_epochs=2).fit(Manual(), loader())
    assert callback.masks.num_kept == fits.NUM_KEPT
    assert str(callback.plan(ConvModule())).splitlines()[-1] == "costs: next to nothing"


def test_loss__under_manual_optimization(tmp_path: Path) -> None:
    callback = WarmupPruningCallback(ByLoss(), sparsity=0.8, warmup_epochs=1)
    with pytest.raises(MisconfigurationException, match="Pass `loss_fn`"):
        trainer(tmp_path, callback, max_epochs=2).fit(Manual(), loader())
    assert "costs: 6 forward and backward passes over a training batch" in str(callback.plan(ConvModule()))


class Undeclared(ByLoss):
    """Reads the loss itself, and says nothing of it."""

    batches_per_round: Any = property()  # as if it had none

    def score(self, network: Any) -> dict[str, Tensor]:
        [batch] = network.batches(1)
        weights = network.weights
        gradients = torch.autograd.grad(network.loss(batch), [*weights.values()])
        return {name: gradient.abs() for name, gradient in zip(weights, gradients, strict=True)}


@pytest.mark.parametrize(
    "method", [Plain(), ByLoss(), Undeclared(), Magnitude(rounds=9)], ids=lambda method: type(method).__name__
)
def test_quick_check(method: Any, tmp_path: Path) -> None:
    """A method without settings does all of its rounds in a `fast_dev_run`, a dataclass at most two."""
    callback = WarmupPruningCallback(method, sparsity=0.8, warmup_epochs=1)
    trainer(tmp_path, callback, fast_dev_run=True).fit(ConvModule(), loader())
    assert callback.masks.num_kept == fits.NUM_KEPT
    assert callback.report is not None
    assert len(callback.report.rounds) == (2 if isinstance(method, Magnitude) else 3)


def test_same_masks_as_without_a_trainer(tmp_path: Path) -> None:
    module = ConvModule()
    expected = find_masks(module, Plain(), sparsity=0.8)
    callback = WarmupPruningCallback(Plain(), sparsity=0.8, bn_batches=0)
    pl.seed_everything(0, verbose=False)
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert callback.masks == expected
    assert callback.masks.hold_for(module)


class BySign(Plain):
    """Keeps the weights that are highest, negative or not."""

    rounds = 1

    def score(self, network: Any) -> dict[str, Tensor]:
        return dict(network.weights)


@pytest.mark.parametrize(
    "method",
    [BySign(), own_methods.on_page("GraSP")(), own_methods.on_page("Fisher")()],
    ids=lambda method: type(method).__name__,
)
def test_scores_of_both_signs__in_a_fit(method: Any, tmp_path: Path) -> None:
    """Masks are those of `find_masks`; the report has the threshold and a picture, in its file, too."""
    module = ConvModule()
    data = {"batches": fits.loader(), "loss_fn": lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])}
    expected = find_masks(module, method, sparsity=0.8, **data)
    callback = WarmupPruningCallback(method, sparsity=0.8, bn_batches=0)
    fit = trainer(tmp_path, callback, max_epochs=1)
    fit.fit(module, fits.loader())
    assert callback.masks == expected
    fit.save_checkpoint(tmp_path / "last.ckpt")
    report = PruningReport.from_checkpoint(tmp_path / "last.ckpt")
    assert report == callback.report
    assert report.method == (str(method) if is_dataclass(method) else type(method).__name__)
    assert report.scores is not None
    assert sum(report.scores.kept) + report.scores.kept_below == fits.NUM_KEPT
    assert (report.scores.width is None) == (type(method).__name__ == "Fisher")
    assert ("width" in report.to_dict()["scores"]) == (type(method).__name__ != "Fisher")
    report.plot(tmp_path / "scores.png", kind="scores")


def test_wrong_scores__in_a_fit(tmp_path: Path) -> None:
    """Nothing is pruned, and the error names the parameter."""

    class Forgetful(Plain):
        def score(self, network: Any) -> dict[str, Tensor]:
            return {name: score for name, score in super().score(network).items() if "head" not in name}

    module, callback = ConvModule(), WarmupPruningCallback(Forgetful(), sparsity=0.8)
    with pytest.raises(ValueError, match=r"`Forgetful.score` must return scores for exactly .* left out 'head.weight'"):
        trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert not callback.pruned
    assert all(parameter.all() for name, parameter in module.named_parameters() if name == "head.weight")
