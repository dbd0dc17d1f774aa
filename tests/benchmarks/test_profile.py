"""Where the time of a round goes."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks import networks
from benchmarks.measure import rounds_and_passes
from benchmarks.page import Figure

from lightning_drive import DRIVE, SynFlow
from lightning_drive.core import radix_select, sample_select, selection, zeroing
from lightning_drive.network import gradients, synflow
from lightning_drive.search.methods import Method

PARTS = (
    ("the pass", gradients, "loss_gradients"),
    ("the pass", synflow.SynapticFlow, "gradients"),
    ("the method", DRIVE, "score"),
    ("the method", SynFlow, "score"),
    ("ranking: the threshold", sample_select, "cut"),
    ("ranking: the threshold", radix_select, "cut"),
    ("ranking: the masks", selection, "_masks"),
    ("setting weights to 0", zeroing, "zero_"),
)


CASES = {
    "DRIVE, ResNet-18, batches of 16": (DRIVE(rounds=20), "ResNet-18", 16),
    "SynFlow, VGG-16-BN, one image": (SynFlow(rounds=20), "VGG-16-BN", 1),
}


@pytest.fixture(scope="module")
def spent() -> dict[str, dict[str, float]]:
    """For every case, the seconds of every part of a mean round, and of the round."""
    return {case: parts_of(*settings) for case, settings in CASES.items()}


def parts_of(method: Method, name: str, batch_size: int) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    with pytest.MonkeyPatch.context() as patch:
        for part, owner, function in PARTS:
            patch.setattr(owner, function, timed(getattr(owner, function), part, found))
        rounds, _, _ = rounds_and_passes(
            networks.NETWORKS[name]().train(),
            method,
            lambda: None,
            batches=networks.batches(batch_size),
            loss_fn=networks.loss,
            example_input=torch.ones(1, 3, 32, 32),
        )
    found["scores"] = found.pop("the method") - found["the pass"]
    found["all else"] = sum(rounds) - sum(found.values())
    return {**{part: seconds / len(rounds) for part, seconds in found.items()}, "a round": sum(rounds) / len(rounds)}


def timed(function: Callable[..., Any], part: str, found: dict[str, float]) -> Callable[..., Any]:
    def timed_function(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            found[part] += time.perf_counter() - begin

    return timed_function


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "part", [*dict.fromkeys(part for part, _, _ in PARTS if part != "the method"), "scores", "all else"]
)
def test_part(figure: Callable[..., Figure], spent: dict[str, dict[str, float]], case: str, part: str) -> None:
    parts = spent[case]
    figure("profile", f"{case}: {part}", "s", lambda: ([parts[part]], {"a round": [parts["a round"]]}))
