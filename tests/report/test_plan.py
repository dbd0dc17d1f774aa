"""A plan states what the callback then does."""

import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import fits
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_drive import (
    DRIVEPruningCallback,
    IMPPruningCallback,
    Random,
    SNIPPruningCallback,
    SynFlowPruningCallback,
)
from lightning_drive.callbacks.hooks import PruningCallback
from lightning_drive.callbacks.warmup_base import WarmupPruningCallback
from lightning_drive.report.plan import PruningPlan, plan


def small_plan(**changes: Any) -> PruningPlan:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    module[1].weight.requires_grad_(False)
    settings: dict[str, Any] = {
        "method": "Magnitude()",
        "kept": [8],
        "passes": 0,
        "pass_over": "",
        "first_epoch": 1,
        "last_epoch": 1,
    }
    return plan(module, {"0.weight"}, **{**settings, **changes})


@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **common: DRIVEPruningCallback(rounds=4, batches_per_round=2, warmup_epochs=1, **common),
        lambda **common: SynFlowPruningCallback(rounds=3, warmup_epochs=1, **common),
        lambda **common: IMPPruningCallback(cycles=3, epochs_per_cycle=1, **common),
    ],
    ids=["drive", "synflow", "imp"],
)
def test_plan__is_kept(make: Any, schedule: str, scope: str, tmp_path: Path) -> None:
    """Counts per round, what is pruned and what stays dense, when, and how many passes: as it then happens."""
    module = fits.ConvModule()
    module.norm.weight.requires_grad_(False)
    callback: PruningCallback = make(sparsity=0.9, schedule=schedule, scope=scope, exclude=["features.0.*"])
    plan = callback.plan(module, max_epochs=4)
    fits.trainer(tmp_path, callback, max_epochs=4).fit(module, fits.loader())
    report = callback.report
    assert report is not None
    assert [one.name for one in plan.parameters if not one.stays_dense] == [layer.name for layer in report.layers]
    removed = accumulate(sum(pruning_round.removed) for pruning_round in report.rounds)
    assert list(plan.kept) == [report.num_weights - number for number in removed]
    assert plan.last_epoch == report.epoch
    assert plan.method == report.method
    reasons = {one.name: one.stays_dense for one in plan.parameters}
    assert reasons["features.0.weight"] == reasons["features.0.bias"] == "excluded"
    assert reasons["norm.weight"] == "frozen"
    assert reasons["norm.bias"] == "a bias or norm"


def test_plan__passes(tmp_path: Path) -> None:
    """As many forward and backward passes as the method then takes, and what that is of a run."""
    calls = 0

    def loss_fn(module: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return module(batch[0]).square().mean()

    settings: dict[str, Any] = {"rounds": 4, "batches_per_round": 3, "warmup_epochs": 0, "bn_batches": 0}
    callback = DRIVEPruningCallback(sparsity=0.5, loss_fn=loss_fn, **settings)
    plan = callback.plan(fits.ConvModule(), max_epochs=10, steps_per_epoch=30)
    fits.trainer(tmp_path, callback, max_epochs=1, limit_val_batches=0).fit(fits.ConvModule(), fits.loader())
    assert plan.passes == calls == 12
    assert plan.share == 12 / 300
    assert "12 forward and backward passes over a training batch, in addition to 300 training steps" in str(plan)


@pytest.mark.parametrize(
    ("callback", "line"),
    [
        (DRIVEPruningCallback(sparsity=0.75, rounds=2), "when: at the start of epoch 5, in 2 rounds"),
        (SNIPPruningCallback(sparsity=0.75), "when: at the start of epoch 0, in 1 round"),
        (
            IMPPruningCallback(sparsity=0.75, cycles=3, epochs_per_cycle=4),
            "when: from the start of epoch 4 to that of epoch 12, in 3 cycles",
        ),
    ],
)
def test_plan__text(callback: PruningCallback, line: str) -> None:
    plan = callback.plan(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), max_epochs=20)
    assert isinstance(plan, PruningPlan)
    assert plan.kept[-1] == 4
    assert line in str(plan).splitlines()
    if isinstance(callback, IMPPruningCallback):
        assert str(plan).endswith("costs: 12 of 20 epochs of training before the last cut")


def test_plan__text_of_rounds_and_parameters() -> None:
    """Worked out by hand: 1,000 weights and a tenth of those left in each of three rounds."""
    plan = DRIVEPruningCallback(sparsity=0.999, rounds=3).plan(nn.Linear(50, 20))
    _, share, _, kept, *table, costs = str(plan).splitlines()
    assert share == "of all 1,020 weights 98.04% are prunable, an overall sparsity of 97.94%"
    assert kept == "weights left after round 1: 100; 2: 10; 3: 1"
    assert table == [
        "parameter  shape  weights              pruned",
        "weight     20x50    1,000                 yes",
        "bias       20          20  no: a bias or norm",
        "prunable            1,000                   -",
    ]
    assert costs == "costs: 3 forward and backward passes over a training batch"


def test_plan__text_joins_biases_and_norms() -> None:
    """They are many and never pruned: one row has them all, in the order of the others."""
    module = nn.Sequential(nn.Linear(50, 20), nn.BatchNorm1d(20), nn.Embedding(3, 4))
    *_, row, embedding, small, _, _ = str(DRIVEPruningCallback(sparsity=0.9).plan(module)).splitlines()
    assert row.split() == ["0.weight", "20x50", "1,000", "yes"]
    assert embedding.split() == ["2.weight", "3x4", "12", "no:", "not", "selected"]
    assert small.split() == ["3", "biases", "and", "norms", "60", "no"]


@pytest.mark.parametrize("argument", ["max_epochs", "steps_per_epoch"])
def test_plan__error(argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must be a whole number of at least 1, got 0"):
        DRIVEPruningCallback(sparsity=0.5).plan(nn.Linear(2, 2), **{argument: 0})


def warmup(**settings: Any) -> WarmupPruningCallback:
    return WarmupPruningCallback(Random(seed=1), sparsity=0.5, **settings)


RUNS: dict[str, tuple[Callable[..., PruningCallback], dict[str, Any], int]] = {
    "DRIVE": (fits.drive, {"warmup_epochs": 2}, 3),
    "SNIP": (SNIPPruningCallback, {"sparsity": 0.5, "warmup_epochs": 1}, 2),
    "SynFlow_in_steps": (SynFlowPruningCallback, {"sparsity": 0.5, "warmup_steps": 3, "rounds": 2}, 2),
    "of_ones_own_in_steps": (warmup, {"warmup_steps": 5}, 2),
    "of_ones_own": (warmup, {"warmup_epochs": 1}, 2),
    "IMP": (fits.CALLBACKS["IMP"], {"cycles": 1, "epochs_per_cycle": 2}, 3),
    "gradual": (fits.gradual, {"start_epoch": 0, "end_epoch": 2}, 3),
    "gradual_without_an_end": (fits.gradual, {"start_epoch": None, "end_epoch": None}, 2),
    "gradual_from_late_on": (fits.gradual, {"start_epoch": 2, "end_epoch": None}, 4),
}
"""Callbacks, their settings, and the least number of epochs, of three steps, in which they reach their sparsity."""


@pytest.mark.parametrize("name", RUNS)
def test_plan__of_a_run_that_is_too_short(name: str, tmp_path: Path) -> None:
    """What ``fit`` refuses a plan refuses, in the same words; one epoch more, and both do it."""
    make, settings, least = RUNS[name]
    callback, module = make(**settings), fits.ConvModule()
    with pytest.raises(ValueError, match=r".") as refused:
        callback.plan(module, max_epochs=least - 1, steps_per_epoch=3)
    with pytest.raises(MisconfigurationException, match=re.escape(str(refused.value))):
        fits.fit(tmp_path, module, make(**settings), max_epochs=least - 1)
    assert callback.plan(module, max_epochs=least, steps_per_epoch=3).kept
    pruned = make(**settings)
    fits.fit(tmp_path, module, pruned, max_epochs=least)
    assert abs(pruned.masks.sparsity - pruned.sparsity) < 1e-3


@pytest.mark.parametrize("callback", [fits.drive(warmup_steps=3, warmup_epochs=5), fits.drive(warmup_epochs=9)])
def test_plan__of_a_run_of_unknown_length(callback: PruningCallback) -> None:
    """Steps without the number of epochs, or epochs without that of steps, say nothing."""
    known = {"steps_per_epoch": 1} if callback.warmup_steps is None else {"max_epochs": 1}  # type: ignore[attr-defined]
    assert callback.plan(nn.Linear(4, 4), **known).kept


class OfIterators(fits.ConvModule):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        raise AssertionError


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize("make", [fits.drive, lambda **own: fits.gradual(criterion="drive", **own)])
@pytest.mark.parametrize("kind", [fits.Manual, OfIterators])
def test_plan__without_a_loss_to_score_by(kind: Any, make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Pass `loss_fn`, a function|so that callbacks do not see it") as refused:
        make().plan(kind(), max_epochs=9)
    with pytest.raises(MisconfigurationException, match=re.escape(str(refused.value))):
        fits.fit(tmp_path, kind(), make(), max_epochs=9)
    assert fits.drive(loss_fn=fits.loss_fn).plan(kind(), max_epochs=9).kept


def test_plan__after_another_run(tmp_path: Path) -> None:
    """Gradual pruning has another window in a run of another length."""
    callback = fits.gradual(start_epoch=None, end_epoch=None, cuts_per_epoch=1)
    fits.fit(tmp_path, fits.ConvModule(), callback, max_epochs=6)
    assert callback.plan(fits.ConvModule(), max_epochs=6).last_epoch == 4
    assert callback.plan(fits.ConvModule(), max_epochs=3).last_epoch == 2


def test_plan__of_a_method_that_reads_no_loss() -> None:
    """It takes no forward and backward passes, and the plan names none."""
    assert str(small_plan(max_epochs=4, steps_per_epoch=5)).splitlines()[-1] == "costs: next to nothing"


@pytest.mark.parametrize(
    ("changes", "epochs", "when"),
    [
        ({}, (1, 1), "at the start of epoch 1 (counted from 0)"),
        ({"last_epoch": 3}, (1, 3), "at the start of epoch 3 (counted from 0)"),
        ({"first_step": 11}, (None, None), "before step 11"),
        ({"first_step": 11, "steps_per_epoch": 5}, (2, 2), "before step 11"),
    ],
)
def test_plan__when(changes: dict[str, Any], epochs: tuple[int | None, int | None], when: str) -> None:
    """Steps are put into an epoch where the length of one is known."""
    changed = small_plan(**changes)
    assert (changed.first_epoch, changed.last_epoch) == epochs
    assert changed.when == when


def test_plan__reasons() -> None:
    """Every parameter that stays dense has a reason; excluded goes over frozen, and frozen over a bias."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Embedding(3, 4), nn.Linear(2, 2))
    module[1].requires_grad_(False)
    settings: dict[str, Any] = {"method": "", "kept": [4], "passes": 0, "pass_over": ""}
    planned = plan(
        module, {"0.weight"}, **settings, first_epoch=0, last_epoch=0, exclude=["1.w*"], untrained=["3.weight"]
    )
    assert {one.name: one.stays_dense for one in planned.parameters} == {
        "0.weight": "",
        "0.bias": "a bias or norm",
        "1.weight": "excluded",
        "1.bias": "frozen",
        "2.weight": "not selected",
        "3.weight": "in no optimizer",
        "3.bias": "a bias or norm",
    }
