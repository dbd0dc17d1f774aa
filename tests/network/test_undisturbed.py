"""Scoring runs on a replica, and afterwards nobody can tell that it ran."""

from contextlib import nullcontext
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from lightning_drive.network.undisturbed import undisturbed

MODES = pytest.mark.parametrize("mode", ["train", "eval"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def restless(dtype: torch.dtype = torch.float32) -> models.Restless:
    """A restless module in the middle of training, with a frozen part, gradients, a zero with a sign and a NaN."""
    module = models.randomised(models.Restless()).to(dtype)
    module.frozen_norm.eval()
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    module.last.bias.grad = None
    with torch.no_grad():
        module.first.weight[0, 0] = -0.0
        module.register_parameter("unused", nn.Parameter(torch.full((2,), float("nan"), dtype=dtype)))
    return module


# --- undisturbed: what it is like inside


@MODES
def test_undisturbed__batch_norm(mode: str) -> None:
    """Batch statistics are those of the batch -1, 1 (mean 0, variance 1); running ones are mean 3, variance 4."""
    module = nn.BatchNorm1d(1, eps=1e-12)
    module.running_mean.fill_(3.0)
    module.running_var.fill_(4.0)
    with undisturbed(module, mode) as (scored, _):
        found = scored(torch.tensor([[-1.0], [1.0]])).flatten().tolist()
    assert found == pytest.approx([-1.0, 1.0] if mode == "train" else [-2.0, -1.0])
    assert (module.running_mean.item(), module.running_var.item()) == (3.0, 4.0)


def test_undisturbed__clean_inside() -> None:
    module = restless()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with undisturbed(module) as (scored, _):
            assert torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert all(parameter.grad is None for parameter in scored.parameters())
            assert scored.first(torch.ones(1, 4)).dtype == torch.float32
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_undisturbed__precision(dtype: torch.dtype, expected: torch.dtype) -> None:
    module = restless(dtype)
    weight = module.first.weight.detach().clone()
    with undisturbed(module) as (scored, _):
        assert {parameter.dtype for parameter in scored.parameters()} == {expected}
        assert scored.norm.running_var.dtype == expected
        assert scored.count.dtype == torch.int64
        assert scored.first.weight.equal(weight.to(expected))
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}


# --- undisturbed: what is left afterwards


@MODES
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt], ids=["no_error", "error", "interrupt"])
def test_undisturbed__leaves_no_trace(
    mode: str, training: bool, dtype: torch.dtype, error: type[BaseException] | None
) -> None:
    module = restless(dtype)
    module.dropout.train(training)
    before = models.fingerprint(module)

    def score() -> None:
        with undisturbed(module, mode) as (scored, _):
            for batch in models.make_batches(4, dtype=torch.promote_types(dtype, torch.float32)):
                models.loss_fn(scored, batch).backward()
            assert scored.count > 0
            if error:
                raise error

    with pytest.raises(error) if error else nullcontext():
        score()
    assert models.changes(module, before) == []


def test_fingerprint__can_fail() -> None:
    """One ordinary training pass changes nearly everything that the tests here compare."""
    module = restless()
    before = models.fingerprint(module)
    models.loss_fn(module, models.make_batches(4)[0]).backward()
    changed = set(models.changes(module, before))
    assert {"gradient first.weight", "gradient last.bias", "buffer norm.running_mean", "buffer .mean"} <= changed
    assert {"buffer .count", "buffer .absent", "torch", "numpy", "python"} <= changed
    assert not any(key.startswith(("parameter", "training")) for key in changed)


def test_undisturbed__no_trace_of_an_interrupted_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out while the second tensor is being widened."""
    module = restless(torch.bfloat16)
    before = models.fingerprint(module)
    widen, calls = Tensor.to, iter(range(100))

    def to(self: Tensor, *args: Any) -> Tensor:
        if next(calls) == 1:
            raise MemoryError
        return widen(self, *args)

    monkeypatch.setattr(Tensor, "to", to)
    with pytest.raises(MemoryError), undisturbed(module):
        pass
    monkeypatch.undo()
    assert models.changes(module, before) == []


def test_undisturbed__weight_moved_elsewhere() -> None:
    """A parameter that is given other memory inside gets its own back, with what was in it."""
    module = restless()
    before = models.fingerprint(module)
    with undisturbed(module) as (scored, _):
        scored.first.weight.data = torch.ones(6, 4)
    assert models.changes(module, before) == []


def test_undisturbed__expanded_buffer() -> None:
    """A buffer may be a view that repeats one number; it cannot be written to, and need not be."""
    module = models.MLP(4, 5, 3)
    module.register_buffer("bias_table", torch.zeros(1, 1).expand(3, 3))
    before = models.fingerprint(module)
    with undisturbed(module):
        pass
    assert models.changes(module, before) == []


def test_undisturbed__buffer_made_inside() -> None:
    """A cache that the first forward pass registers is gone again."""
    module = models.MLP(4, 5, 3)
    with undisturbed(module) as (scored, _):
        scored.register_buffer("cache", torch.ones(2))
    assert dict(module.named_buffers()) == {}


def test_undisturbed__any_value() -> None:
    """Values that arithmetic would not bring back: -0.0, NaN, infinity, a denormal."""
    module = models.MLP(4, 5, 3)
    with torch.no_grad():
        module[0].weight[0] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45])
    before = models.fingerprint(module)

    def prune() -> None:
        with undisturbed(module) as (scored, _):
            scored[0].weight.data.zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune()
    assert models.changes(module, before) == []


def test_undisturbed__error_of_ours() -> None:
    """Whatever writes into the module meanwhile is noticed, also where the parameter itself was replaced."""

    def write() -> None:
        net[0].weight.data[0, 0] += 1

    def replace() -> None:
        net[0].weight = nn.Parameter(net[0].weight.detach().clone())

    def rebind() -> None:
        net[2].bias.data = net[2].bias.data + 1

    for disturb, name in ((write, "0.weight"), (replace, "0.weight"), (rebind, "2.bias")):
        net = models.MLP(4, 5, 3)
        with pytest.raises(RuntimeError, match=f"must leave the module as it was, but '{name}'"), undisturbed(net):
            disturb()
