"""Each pruned weight is measured once, at its first call; a form is taken only if the whole is faster with it, too."""

from collections.abc import Callable
from typing import Any

import pytest
import sparse_layers
import torch
from chosen_forms import IN_TRAINING, prefer
from torch import Tensor, nn

from lightning_drive.acceleration import choice, measuring, timing
from lightning_drive.acceleration.measuring import Pruned
from lightning_drive.report.acceleration_report import DENSE


class Network(nn.Module):
    """Layers that are called, twice, never, under `no_grad`, in groups, in mixed precision, and as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.twice, self.once, self.mixed = nn.Linear(16, 16), nn.Linear(16, 3), nn.Linear(3, 3)
        self.never, self.matrix, self.teacher = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.grouped(self.conv(images)).flatten(1)
        out = self.once(self.twice(self.twice(hidden)))
        with torch.no_grad():
            target = self.teacher(out)
        with torch.autocast("cpu", torch.bfloat16):
            out = self.mixed(out).float()
        return out @ self.matrix.weight - target


def pruned(module: nn.Module) -> list[Pruned]:
    """Prune two thirds of every weight."""
    result = []
    for name, parameter in module.named_parameters():
        if name.endswith("weight"):
            places = torch.arange(0, parameter.numel(), 3)
            sparse_layers.prune_(parameter, places)
            result.append(Pruned(name, parameter, places))
    return result


def steps_of(module: nn.Module) -> Callable[[], bool]:
    images = torch.randn(2, 1, 4, 4)

    def step() -> bool:
        module.zero_grad()
        module(images).square().sum().backward()
        return True

    return step


def test_measure__reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, *IN_TRAINING)
    module = Network()
    result = measuring.measure(pruned(module), steps_of(module))
    assert result is not None
    reasons = {layer.name.removesuffix(".weight"): layer.reason for layer in result.report.layers}
    assert reasons == {
        "conv": "",
        "grouped": "there is no sparse form for its settings (groups, say)",
        "twice": "",
        "once": "",
        "mixed": "mixed precision (autocast) computes with it in another type",
        "never": measuring.UNSEEN,
        "matrix": measuring.UNSEEN,
        "teacher": "",
    }
    forms = {layer.name.removesuffix(".weight"): layer.form for layer in result.report.layers if layer.is_sparse}
    assert forms == {"conv": "windows", "twice": "tokens", "once": "tokens", "teacher": "tokens"}
    assert result.operations.keys() == {f"{name}.weight" for name in forms}
    assert result.report.work == "training step"
    assert result.report.threads == 1


def test_measure__first_call_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward are timed together, in all forms, without gradients being left behind."""
    timed: dict[str, list[str]] = {}
    grown: list[Any] = []

    def fastest(name: str, sparsity: float, dense: Any, forms: Any) -> Any:
        timed.setdefault(name, []).extend(forms)
        grown.append([dense(), *(form() for form in forms.values())])
        return choice.LayerForm(name, sparsity)

    monkeypatch.setattr(choice, "fastest", fastest)
    module = Network()
    step = steps_of(module)
    step()
    with_gradient = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    measuring.measure(pruned(module), step)
    assert timed == {
        "conv.weight": ["lines", "windows"],
        "twice.weight": ["tokens"],
        "once.weight": ["tokens"],
        "teacher.weight": ["tokens"],
    }
    assert [len(dense) for dense, *_ in grown] == [2, 3, 3, 3]  # images need none
    assert {name for name, parameter in module.named_parameters() if parameter.grad is not None} == with_gradient


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, "tokens"), (0.99, DENSE), (2.0, DENSE)])
def test_measure__whole_step_decides(monkeypatch: pytest.MonkeyPatch, seconds: float, expected: str) -> None:
    times = {DENSE: 1.0, "tokens": 0.5, "sparse": seconds}
    monkeypatch.setattr(timing, "least_seconds", lambda works, runs=None: {name: times[name] for name in works})
    module = nn.Linear(16, 3)
    images = torch.randn(4, 16)

    def step() -> bool:
        module(images).sum().backward()
        return True

    result = measuring.measure(pruned(module), step)
    assert result is not None
    [layer] = result.report.layers
    assert layer.form == expected
    assert result.report.dense_seconds == 1.0
    assert result.report.seconds == (0.5 if expected != DENSE else 1.0)
    assert (result.sparse_calls(pruned(module)) is None) == (expected == DENSE)


def test_measure__all_dense_needs_no_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "least_seconds", lambda works, runs=None: dict.fromkeys(works, 1.0))
    module = nn.Linear(16, 3)
    calls: list[int] = []

    def step() -> bool:
        module(torch.ones(2, 16)).sum().backward()
        calls.append(1)
        return True

    result = measuring.measure(pruned(module), step)
    assert result is not None
    assert result.report.num_sparse == 0
    assert result.report.seconds is None
    assert len(calls) == 1


def test_measure__few_zeros() -> None:
    module = nn.Linear(16, 3)
    result = measuring.measure([Pruned("weight", module.weight, torch.arange(25))], steps_of_linear(module))
    assert result is not None
    assert [layer.reason for layer in result.report.layers] == ["less than 50% of it is zero"]


def steps_of_linear(module: nn.Module) -> Callable[[], bool]:
    def step() -> bool:
        module(torch.ones(2, 16)).sum().backward()
        return True

    return step


def test_measure__no_loss() -> None:
    assert measuring.measure(pruned(nn.Linear(2, 2)), lambda: False) is None


def test_least_seconds__so_many_runs_of_each() -> None:
    counts = {"a": 0, "b": 0}

    def counting(name: str) -> Callable[[], None]:
        def run() -> None:
            counts[name] += 1
            sum(range(10_000 if name == "b" else 0))

        return run

    seconds = timing.least_seconds({name: counting(name) for name in counts}, 4)
    assert counts == {"a": 5, "b": 5}
    assert all(0 <= value < float("inf") for value in seconds.values())
