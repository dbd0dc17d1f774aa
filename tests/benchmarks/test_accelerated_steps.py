"""A training step with masks and `accelerate=True` against a dense one, and against one with masks alone."""

from collections.abc import Callable
from functools import cache

import pytest
from benchmarks import measure, trainers
from benchmarks.page import Figure
from benchmarks.pruned import MLP, RESNET, SPARSITIES, TRANSFORMER, VGG
from benchmarks.trainers import Module, seconds_per_step

DENSE, MASKED = "a dense step", "a step with masks alone"
CASES = {
    MLP: (128, 40, 5, SPARSITIES),
    TRANSFORMER: (16, 8, 3, SPARSITIES),
    VGG: (128, 4, 2, SPARSITIES),
    RESNET: (32, 6, 3, SPARSITIES),
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
def measured(name: str) -> dict[str, list[float]]:
    """Time a step at every sparsity, and its peers, in turn."""
    batch_size, steps, repeats, sparsities = CASES[name]

    def accelerated(sparsity: float) -> Callable[[], float]:
        return lambda: seconds_per_step(Module(name, batch_size, steps), [trainers.ours(sparsity, accelerate=True)])

    def masked() -> float:
        return seconds_per_step(Module(name, batch_size, steps), [trainers.ours()])

    def dense() -> float:
        return seconds_per_step(Module(name, batch_size, steps), [])

    with measure.threads(1):
        others = {str(sparsity): accelerated(sparsity) for sparsity in sparsities}
        dense_seconds, columns = measure.in_turn(dense, {MASKED: masked, **others}, repeats)
    return {DENSE: dense_seconds, **columns}


@pytest.mark.parametrize(
    ("name", "sparsity"), [(name, sparsity) for name, (*_, sparsities) in CASES.items() for sparsity in sparsities]
)
def test_accelerated_step(figure: Callable[..., Figure], name: str, sparsity: float) -> None:
    def take() -> tuple[list[float], dict[str, list[float]]]:
        columns = measured(name)
        return columns[str(sparsity)], {peer: columns[peer] for peer in (DENSE, MASKED)}

    speed = GOALS.get((name, sparsity))
    figure(
        "accelerated steps",
        f"{name}, batches of {CASES[name][0]}",
        "s",
        take,
        goal=speed and 1 / speed,
        note="Pruned by SNIP, trained by SGD with momentum on noise, in a `Trainer`, 1 thread, seed 0. What masks alone"
        " cost does not depend on the sparsity: it was measured at 98 %.",
        column=f"{100 * sparsity:g} %",
    )
