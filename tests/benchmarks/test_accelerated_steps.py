"""A training step with masks and `accelerate=True` against a dense one, and against one with masks alone."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from benchmarks import images, measure, networks, pruned
from benchmarks.page import Figure
from benchmarks.pruned import MLP, RESNET, SPARSITIES, TRANSFORMER, VGG
from benchmarks.trainers import Module, seconds_per_step

from lightning_drive import DRIVEPruningCallback

ROUNDS = 10
DENSE, MASKED = "a dense step", "a step with masks alone"
CASES = {
    MLP: (128, 40, 5, SPARSITIES),
    TRANSFORMER: (16, 6, 2, SPARSITIES),
    VGG: (64, 4, 1, SPARSITIES),
    RESNET: (32, 4, 2, SPARSITIES),
    "ResNet-50": (16, 4, 1, (0.98,)),
    "ViT-small": (16, 4, 1, (0.98,)),
}
"""Batch size, steps in a row, repeats and sparsities of each network."""
GOALS = {
    (MLP, 0.98): 2.5,
    (MLP, 0.993): 3.0,
    (TRANSFORMER, 0.98): 2.5,
    (TRANSFORMER, 0.993): 3.0,
    **{(RESNET, sparsity): 0.97 for sparsity in SPARSITIES},
}
"""How many times as fast as dense, by network and sparsity."""


@cache
def measured(name: str, folder: Path) -> dict[str, list[float]]:
    """Time a step at every sparsity, and its peers, in turn."""
    batch_size, steps, repeats, sparsities = CASES[name]
    trained = pruned.trained(name, folder).state_dict()

    def step(*callbacks: pl.Callback) -> Callable[[], float]:
        def measured() -> float:
            module = Module(name, batch_size, steps)
            module.network.load_state_dict(trained)
            module.batches = images.load().batches(batch_size, networks.pixels_of(name), count=4, seed=2)
            return seconds_per_step(module, copy.deepcopy(callbacks))

        return measured

    with measure.threads(1):
        others = {str(sparsity): step(drive(sparsity, accelerate=True)) for sparsity in sparsities}
        dense_seconds, columns = measure.in_turn(step(), {MASKED: step(drive(0.98)), **others}, repeats)
    return {DENSE: dense_seconds, **columns}


def drive(sparsity: float, **settings: Any) -> pl.Callback:
    return DRIVEPruningCallback(sparsity=sparsity, warmup_epochs=1, rounds=ROUNDS, bn_batches=0, **settings)


@pytest.mark.parametrize(
    ("name", "sparsity"), [(name, sparsity) for name, (*_, sparsities) in CASES.items() for sparsity in sparsities]
)
def test_accelerated_step(
    figure: Callable[..., Figure], pytestconfig: pytest.Config, name: str, sparsity: float
) -> None:
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("pruned")

    def take() -> tuple[list[float], dict[str, list[float]]]:
        columns = measured(name, folder)
        return columns[str(sparsity)], {peer: columns[peer] for peer in (DENSE, MASKED)}

    speed = GOALS.get((name, sparsity))
    figure(
        "accelerated steps",
        f"{name}, batches of {CASES[name][0]}",
        "s",
        take,
        goal=speed and 1 / speed,
        note=f"Trained briefly on {images.load().name}, pruned by DRIVE in {ROUNDS} rounds, SGD with momentum, in a"
        " `Trainer`, 1 thread, seed 0. What masks alone cost does not depend on the sparsity: it was measured at 98 %.",
        column=f"{100 * sparsity:g} %",
    )
