"""Dropout is off in layers and in functions, in both modes and where a checkpoint computes something again."""

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_drive import DRIVE, SNIP, find_masks
from lightning_drive.network import gradients
from lightning_drive.network.path_rules import PathRules
from lightning_drive.network.synflow_breakers import FlowWatch
from lightning_drive.network.undisturbed import undisturbed
from lightning_drive.network.without_dropout import NoDropout
from lightning_drive.search.methods import Method

MODES = pytest.mark.parametrize("mode", ["train", "eval"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def prunable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.dim() > 1}


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


@pytest.mark.parametrize("build", DROPOUTS.values(), ids=DROPOUTS)
@MODES
def test_without_dropout(build: Callable[[float], nn.Module], mode: str) -> None:
    """Half of everything dropped gives the gradients of nothing dropped."""
    found = []
    for p in (0.0, 0.5):
        module = models.randomised(build(p)).train()
        with undisturbed(module, mode) as (scored, _):
            found.append(gradients.loss_gradients(scored, prunable(scored), squared, models.make_batches(8)))
    assert all(found[0][name].equal(found[1][name]) for name in found[0])


@pytest.mark.parametrize("name", [name for name in DROPOUTS if "function" not in name])
def test_without_dropout__is_on_outside(name: str) -> None:
    """Or the test above would show nothing: these modules do drop in training, before and after."""
    module = models.randomised(DROPOUTS[name](0.5)).train()
    (batch, *_) = models.make_batches(8)
    assert not squared(module, batch).equal(squared(module, batch))
    with undisturbed(module) as (scored, _):
        assert squared(scored, batch).equal(squared(scored, batch))
    assert not squared(module, batch).equal(squared(module, batch))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_in_mode__recurrent_layers_can_be_differentiated(kind: Any) -> None:
    """Their gradients are computed by cuDNN only with the flag of training, which changes nothing without dropout."""
    module = nn.Sequential(kind(4, 4, num_layers=2, dropout=0.5), nn.BatchNorm1d(4)).eval()
    with undisturbed(module, "eval") as (scored, _):
        assert [layer.training for layer in scored] == [True, False]
    assert not any(layer.training for layer in module)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_in_mode__recurrent_layers_on_a_gpu(kind: Any) -> None:
    layer = kind(4, 4)
    module = Functional(lambda x: layer(x)[0], layer).cuda().eval()
    batch = torch.randn(3, 5, 4, device="cuda")
    with undisturbed(module, "eval") as (scored, _):
        found = gradients.loss_gradients(scored, prunable(scored), lambda net, x: net(x).square().mean(), [batch])
    assert all(gradient.any() for gradient in found.values())


@pytest.mark.parametrize(
    ("training", "mode", "norm", "frozen"),
    [
        pytest.param(True, "train", True, False, id="training_keeps_frozen_parts"),
        pytest.param(False, "train", True, True, id="eval_to_train"),
        pytest.param(True, "eval", False, False, id="train_to_eval"),
        pytest.param(False, "eval", False, False, id="eval_stays"),
    ],
)
def test_in_mode(training: bool, mode: str, norm: bool, frozen: bool) -> None:
    module = models.Restless().train(training)
    module.frozen_norm.eval()
    with undisturbed(module, mode) as (scored, _):
        assert (scored.norm.training, scored.frozen_norm.training) == (norm, frozen)
        assert not scored.dropout.training


class Recomputed(nn.Module):
    """A layer in which dropout is called as a function, run by ``run``."""

    def __init__(self, hidden: Callable[[Tensor, bool], Tensor], run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.hidden, self.run = hidden, run

    def block(self, x: Tensor) -> Tensor:
        return self.hidden(self.second(x).relu(), self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self.block, self.first(x).relu()))


def attended(x: Tensor, training: bool) -> Tensor:
    parts = x.view(4, 4, 16)
    return F.scaled_dot_product_attention(parts, parts, parts, dropout_p=0.5 * training).reshape(16, 16)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(lambda x, training: F.dropout(x, 0.5, training), id="F.dropout"),
        pytest.param(lambda x, training: torch.dropout(x, 0.5, training).tanh(), id="torch.dropout"),
        pytest.param(attended, id="attention"),
    ],
)
@pytest.mark.parametrize("method", [DRIVE(rounds=3), SNIP()], ids=["DRIVE", "SNIP"])
def test_without_dropout__checkpoint(hidden: Callable[[Tensor, bool], Tensor], reentrant: bool, method: Method) -> None:
    """Dropout is off also where a checkpoint computes something again: masks are those of the plain network."""

    def masks(run: Callable[..., Tensor]) -> str:
        torch.manual_seed(0)
        net = Recomputed(hidden, run)
        batch = torch.randn(16, 8), torch.randint(4, (16,))
        found = find_masks(
            net, method, sparsity=0.5, batches=[batch], loss_fn=lambda m, b: F.cross_entropy(m(b[0]), b[1])
        )
        return found.digest()

    plain = masks(lambda function, x: function(x))
    assert masks(lambda function, x: checkpoint(function, x, use_reentrant=reentrant)) == plain


@pytest.mark.parametrize(
    "kind", [NoDropout, PathRules, lambda: FlowWatch(nn.Identity())], ids=["dropout", "paths", "watch"]
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
        torch.tanh(torch.ones(1))
        assert getattr(mode, "breakers", []) == []
    finally:
        torch._C._pop_torch_function_stack()
