"""Scoring runs on a replica, and afterwards nobody can tell that it ran."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_drive.network import gradients
from lightning_drive.network.path_rules import Paths
from lightning_drive.network.random_state import preserved_rng
from lightning_drive.network.synflow_limits import Watch
from lightning_drive.network.undisturbed import undisturbed
from lightning_drive.network.without_dropout import NoDropout

MODES = pytest.mark.parametrize("mode", ["train", "eval"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def prunable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.dim() > 1}


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


class Functional(nn.Module):
    """Any function of two tokens of four numbers, as a classifier with one weight in front."""

    def __init__(self, function: Callable[[Tensor], Tensor], *children: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.function = function
        self.layers = nn.ModuleList(children)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x).view(len(x), 2, 4)).flatten(1)


def module_of(layer: nn.Module) -> nn.Module:
    return Functional(layer, layer)


def encoder_layer(p: float) -> nn.Module:
    return module_of(nn.TransformerEncoderLayer(4, 2, 8, dropout=p, batch_first=True))


def attention(p: float) -> nn.Module:
    layer = nn.MultiheadAttention(4, 2, dropout=p, batch_first=True)
    return Functional(lambda x: layer(x, x, x)[0], layer)


def lstm(p: float) -> nn.Module:
    layer = nn.LSTM(4, 4, num_layers=2, dropout=p, batch_first=True)
    return Functional(lambda x: layer(x)[0], layer)


def gru(p: float) -> nn.Module:
    layer = nn.GRU(4, 4, num_layers=2, dropout=p, batch_first=True)
    return Functional(lambda x: layer(x)[0], layer)


DROPOUTS: dict[str, Callable[[float], nn.Module]] = {
    "Dropout": lambda p: module_of(nn.Dropout(p)),
    "Dropout1d": lambda p: module_of(nn.Dropout1d(p)),
    "AlphaDropout": lambda p: module_of(nn.AlphaDropout(p)),
    "FeatureAlphaDropout": lambda p: module_of(nn.FeatureAlphaDropout(p)),
    "F.dropout": lambda p: Functional(lambda x: F.dropout(x, p)),
    "F.dropout_keywords": lambda p: Functional(lambda x: F.dropout(input=x, p=p, training=True)),
    "F.dropout_in_place": lambda p: Functional(lambda x: F.dropout(1 * x, p, True, True)),
    "F.dropout2d": lambda p: Functional(lambda x: F.dropout2d(x[..., None], p)),
    "F.alpha_dropout": lambda p: Functional(lambda x: F.alpha_dropout(x, p, training=True)),
    "torch.dropout": lambda p: Functional(lambda x: torch.dropout(x, p, True)),
    "torch.dropout_": lambda p: Functional(lambda x: torch.dropout_(1 * x, p, True)),
    "attention_function": lambda p: Functional(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=p)),
    "attention_function_positional": lambda p: Functional(lambda x: F.scaled_dot_product_attention(x, x, x, None, p)),
    "MultiheadAttention": attention,
    "TransformerEncoderLayer": encoder_layer,
    "LSTM": lstm,
    "GRU": gru,
}


def squared(module: nn.Module, batch: models.Batch) -> Tensor:
    return module(batch[0]).square().mean()


# --- undisturbed: what it is like inside


@pytest.mark.parametrize("build", DROPOUTS.values(), ids=DROPOUTS)
@MODES
def test_undisturbed__without_dropout(build: Callable[[float], nn.Module], mode: str) -> None:
    """Half of everything dropped gives the gradients of nothing dropped."""
    found = []
    for p in (0.0, 0.5):
        module = models.randomised(build(p)).train()
        with undisturbed(module, mode) as (scored, _):
            found.append(gradients.loss_gradients(scored, prunable(scored), squared, models.make_batches(8)))
    assert all(found[0][name].equal(found[1][name]) for name in found[0])


@pytest.mark.parametrize("name", [name for name in DROPOUTS if "function" not in name])
def test_undisturbed__dropout_is_on_outside(name: str) -> None:
    """Or the test above would show nothing: these modules do drop in training, before and after."""
    module = models.randomised(DROPOUTS[name](0.5)).train()
    (batch, *_) = models.make_batches(8)
    assert not squared(module, batch).equal(squared(module, batch))
    with undisturbed(module) as (scored, _):
        assert squared(scored, batch).equal(squared(scored, batch))
    assert not squared(module, batch).equal(squared(module, batch))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_undisturbed__recurrent_layers_can_be_differentiated(kind: Any) -> None:
    """Their gradients are computed by cuDNN only with the flag of training, which changes nothing without dropout."""
    module = nn.Sequential(kind(4, 4, num_layers=2, dropout=0.5), nn.BatchNorm1d(4)).eval()
    with undisturbed(module, "eval") as (scored, _):
        assert [layer.training for layer in scored] == [True, False]
    assert not any(layer.training for layer in module)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_undisturbed__recurrent_layers_on_a_gpu(kind: Any) -> None:
    layer = kind(4, 4)
    module = Functional(lambda x: layer(x)[0], layer).cuda().eval()
    batch = torch.randn(3, 5, 4, device="cuda")
    with undisturbed(module, "eval") as (scored, _):
        found = gradients.loss_gradients(scored, prunable(scored), lambda net, x: net(x).square().mean(), [batch])
    assert all(gradient.any() for gradient in found.values())


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


@pytest.mark.parametrize(
    ("training", "mode", "norm", "frozen"),
    [
        pytest.param(True, "train", True, False, id="training_keeps_frozen_parts"),
        pytest.param(False, "train", True, True, id="eval_to_train"),
        pytest.param(True, "eval", False, False, id="train_to_eval"),
        pytest.param(False, "eval", False, False, id="eval_stays"),
    ],
)
def test_undisturbed__modes(training: bool, mode: str, norm: bool, frozen: bool) -> None:
    module = models.Restless().train(training)
    module.frozen_norm.eval()
    with undisturbed(module, mode) as (scored, _):
        assert (scored.norm.training, scored.frozen_norm.training) == (norm, frozen)
        assert not scored.dropout.training


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


def test_preserved_rng() -> None:
    def draw(error: type[BaseException] | None = None) -> tuple[float, float, float]:
        numbers = torch.rand(()).item(), float(np.random.rand()), random.random()
        if error:
            raise error
        return numbers

    with preserved_rng():
        inside = draw()
    with pytest.raises(KeyboardInterrupt), preserved_rng():
        draw(KeyboardInterrupt)
    assert draw() == inside


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


@pytest.mark.parametrize(
    "kind", [NoDropout, Paths, lambda: Watch({"dropout"}, nn.Identity())], ids=["dropout", "paths", "watch"]
)
def test_function_mode__interrupted(kind: Callable[[], Any]) -> None:
    """An interrupt while torch has a mode off its stack is not hidden, and the mode that comes back does nothing."""
    depth = torch._C._len_torch_function_stack()
    off = torch.overrides._pop_mode_temporarily()  # what torch does around every function

    def interrupt() -> None:
        off.__enter__()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), kind() as mode:
        interrupt()
    off.__exit__(None, None, None)  # at the end of the traceback
    try:
        assert torch._C._len_torch_function_stack() == depth + 1
        assert (F.dropout(torch.ones(1000), 0.5) == 0).any()
        assert getattr(mode, "seen", []) == []
    finally:
        torch._C._pop_torch_function_stack()
