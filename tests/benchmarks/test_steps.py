"""A training step with masks against a dense one, and against one under Lightning's `ModelPruning`."""

from collections.abc import Callable

import pytest
from benchmarks import trainers
from benchmarks.measure import in_turn
from benchmarks.page import Figure
from benchmarks.trainers import Module, seconds_per_step

CASES = [
    ("MLP 3072-300-100-10", 64, 300, 7),
    ("ResNet-18", 16, 12, 5),
    ("ResNet-18", 128, 4, 3),
    ("Transformer", 16, 12, 5),
]


@pytest.mark.parametrize(("name", "batch_size", "steps", "repeats"), CASES)
def test_step(figure: Callable[..., Figure], name: str, batch_size: int, steps: int, repeats: int) -> None:
    def dense() -> float:
        return seconds_per_step(Module(name, batch_size, steps), [])

    def ours() -> float:
        return seconds_per_step(Module(name, batch_size, steps), [trainers.ours()])

    def model_pruning() -> float:
        module = Module(name, batch_size, steps)
        return seconds_per_step(module, [trainers.model_pruning(module)])

    figure(
        "steps",
        f"{name}, batches of {batch_size}",
        "s",
        lambda: in_turn(ours, {"a dense step": dense, "a step under `ModelPruning`": model_pruning}, repeats),
        goal=1.02 if name == "ResNet-18" else None,
        note="SGD with momentum, 98 % sparse",
    )
