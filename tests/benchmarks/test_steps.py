"""A training step with masks against a dense one, and against one under Lightning's `ModelPruning`."""

from collections.abc import Callable
from functools import cache

import pytest
from benchmarks import trainers
from benchmarks.measure import in_turn
from benchmarks.page import Figure
from benchmarks.trainers import Module, seconds_per_step

MLP = "MLP 3072-300-100-10"
CASES = [(MLP, 64, 300, 7), ("ResNet-18", 16, 12, 5), ("ResNet-18", 128, 4, 3), ("Transformer", 16, 12, 5)]
DENSE, MODEL_PRUNING = "a dense step", "a step under `ModelPruning`"

Taken = tuple[list[float], dict[str, list[float]]]


@cache
def measured(name: str, batch_size: int, steps: int, repeats: int) -> Taken:
    def dense() -> float:
        return seconds_per_step(Module(name, batch_size, steps), [])

    def ours() -> float:
        return seconds_per_step(Module(name, batch_size, steps), [trainers.ours()])

    def model_pruning() -> float:
        module = Module(name, batch_size, steps)
        return seconds_per_step(module, [trainers.model_pruning(module)])

    return in_turn(ours, {DENSE: dense, MODEL_PRUNING: model_pruning}, repeats)


@pytest.mark.parametrize(("name", "batch_size", "steps", "repeats"), CASES)
def test_step(figure: Callable[..., Figure], name: str, batch_size: int, steps: int, repeats: int) -> None:
    figure(
        "steps",
        f"{name}, batches of {batch_size}",
        "s",
        lambda: measured(name, batch_size, steps, repeats),
        goal=1.02 if name == "ResNet-18" else None,
        note="SGD with momentum, 98 % sparse",
    )


def test_overhead(figure: Callable[..., Figure]) -> None:
    """What a step of the MLP takes longer than a dense one, of what it takes longer under `ModelPruning`."""

    def take() -> Taken:
        ours, peers = measured(*CASES[0])
        longer = [own - dense for own, dense in zip(ours, peers[DENSE], strict=True)]
        theirs = [other - dense for other, dense in zip(peers[MODEL_PRUNING], peers[DENSE], strict=True)]
        return longer, {"what `ModelPruning` adds": theirs}

    figure("steps", f"{MLP}, batches of 64: what masks add", "s", take, goal=0.5)
