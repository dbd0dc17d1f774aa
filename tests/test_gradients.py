"""Gradients are those of the loss in full precision without Dropout, and afterwards nobody can tell they were taken."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_drive import gradients

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


# --- loss_gradients


@pytest.mark.parametrize("count", [1, 3])
def test_loss_gradients(count: int) -> None:
    """The sum over batches, as autograd takes it of the summed loss."""
    module = models.randomised(models.MLP(4, 6, 3)).double()
    batches = models.make_batches(4, count=count, dtype=torch.float64)
    total = torch.stack([models.loss_fn(module, batch) for batch in batches]).sum()
    expected = torch.autograd.grad(total, list(prunable(module).values()))
    found = gradients.loss_gradients(module, prunable(module), models.loss_fn, batches)
    assert list(found) == ["0.weight", "2.weight"]
    for gradient, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_loss_gradients__by_hand() -> None:
    """Inputs 1, ..., 1 and the loss 3 * output: every gradient is 3, on two batches 6."""
    module = models.InnerProduct(4)
    batches = [torch.ones(1, 4), torch.ones(1, 4)]
    found = gradients.loss_gradients(module, prunable(module), lambda module, batch: 3 * module(batch).sum(), batches)
    assert found["layer.weight"].tolist() == [[6.0, 6.0, 6.0, 6.0]]


@pytest.mark.parametrize("hookless", [False, True])
def test_loss_gradients__owned(hookless: bool) -> None:
    """The caller may write into any gradient, also where autograd hands out one tensor for two parameters."""
    module = nn.ParameterDict({name: nn.Parameter(torch.zeros(2, 3)) for name in ("first", "second", "third")})
    found = gradients.loss_gradients(
        module,
        dict(module.named_parameters()),
        lambda module, batch: ((module["first"] + module["second"]) * batch).sum() + module["third"].sum(),
        [torch.full((2, 3), 2.0)],
        hookless=hookless,
    )
    for gradient in found.values():
        gradient.add_(1)
    assert {name: gradient.unique().tolist() for name, gradient in found.items()} == {
        "first": [3.0],
        "second": [3.0],
        "third": [2.0],
    }


def test_loss_gradients__zero_where_unused() -> None:
    module = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 3)})
    found = gradients.loss_gradients(
        module, prunable(module), lambda module, batch: module["used"](batch).sum(), [torch.ones(1, 2)]
    )
    assert found["unused.weight"].tolist() == [[0.0, 0.0]] * 3
    assert found["used.weight"].tolist() == [[1.0, 1.0]]


def test_loss_gradients__sparse_becomes_dense() -> None:
    found = []
    for sparse in (False, True):
        module = nn.EmbeddingBag(6, 3, mode="sum", sparse=sparse)
        with torch.no_grad():
            module.weight.copy_(torch.arange(18.0).view(6, 3))
        batch = torch.tensor([[0, 2], [2, 5]])
        found.append(gradients.loss_gradients(module, prunable(module), lambda m, b: m(b).square().sum(), [batch]))
    assert not found[1]["weight"].is_sparse
    assert found[1]["weight"].equal(found[0]["weight"])


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        pytest.param(lambda m, b: m(b), r"must be a scalar tensor, got a tensor of shape \(2, 1\)", id="not_scalar"),
        pytest.param(lambda m, b: 0.5, "must be a scalar tensor, got 0.5", id="number"),
        pytest.param(lambda m, b: None, "must be a scalar tensor, got None", id="none"),
        pytest.param(lambda m, b: m(b).sum().detach(), "The loss has no gradient", id="detached"),
        pytest.param(lambda m, b: m(b).sum() / 0, "must be finite, got inf", id="inf"),
        pytest.param(lambda m, b: m(b).sum() * float("nan"), "must be finite, got nan", id="nan"),
        pytest.param(lambda m, b: m.offset.sum(), "does not depend on any prunable parameter", id="unrelated"),
    ],
)
def test_loss_gradients__loss_error(loss_fn: Callable[..., Any], message: str) -> None:
    module = models.InnerProduct(4)
    module.offset = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=message):
        gradients.loss_gradients(module, prunable(module), loss_fn, [torch.ones(2, 4)])


def test_loss_gradients__no_batches_error() -> None:
    module = models.InnerProduct(4)
    with pytest.raises(ValueError, match="nothing to score on: `batches` is empty"):
        gradients.loss_gradients(module, prunable(module), models.loss_fn, [])


# --- undisturbed: what it is like inside


@pytest.mark.parametrize("build", DROPOUTS.values(), ids=DROPOUTS)
@MODES
def test_undisturbed__without_dropout(build: Callable[[float], nn.Module], mode: str) -> None:
    """Half of everything dropped gives the gradients of nothing dropped."""
    found = []
    for p in (0.0, 0.5):
        module = models.randomised(build(p)).train()
        with gradients.undisturbed(module, mode):
            found.append(gradients.loss_gradients(module, prunable(module), squared, models.make_batches(8)))
    assert all(found[0][name].equal(found[1][name]) for name in found[0])


@pytest.mark.parametrize("name", [name for name in DROPOUTS if "function" not in name])
def test_undisturbed__dropout_is_on_outside(name: str) -> None:
    """Or the test above would show nothing: these modules do drop in training, before and after."""
    module = models.randomised(DROPOUTS[name](0.5)).train()
    (batch, *_) = models.make_batches(8)
    assert not squared(module, batch).equal(squared(module, batch))
    with gradients.undisturbed(module):
        assert squared(module, batch).equal(squared(module, batch))
    assert not squared(module, batch).equal(squared(module, batch))


@MODES
def test_undisturbed__batch_norm(mode: str) -> None:
    """Batch statistics are those of the batch -1, 1 (mean 0, variance 1); running ones are mean 3, variance 4."""
    module = nn.BatchNorm1d(1, eps=1e-12)
    module.running_mean.fill_(3.0)
    module.running_var.fill_(4.0)
    with gradients.undisturbed(module, mode):
        found = module(torch.tensor([[-1.0], [1.0]])).flatten().tolist()
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
    with gradients.undisturbed(module, mode):
        assert (module.norm.training, module.frozen_norm.training) == (norm, frozen)
        assert not module.dropout.training


def test_undisturbed__clean_inside() -> None:
    module = restless()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), gradients.undisturbed(module):
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert all(parameter.grad is None for parameter in module.parameters())
        assert module.first(torch.ones(1, 4)).dtype == torch.float32


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
    with gradients.undisturbed(module):
        assert {parameter.dtype for parameter in module.parameters()} == {expected}
        assert module.norm.running_var.dtype == expected
        assert module.count.dtype == torch.int64
        assert module.first.weight.equal(weight.to(expected))
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
        with gradients.undisturbed(module, mode):
            for batch in models.make_batches(4, dtype=torch.promote_types(dtype, torch.float32)):
                models.loss_fn(module, batch).backward()
            assert module.count > 0
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
    widen, calls = Tensor.float, iter(range(100))

    def float_(self: Tensor) -> Tensor:
        if next(calls) == 1:
            raise MemoryError
        return widen(self)

    monkeypatch.setattr(Tensor, "float", float_)
    with pytest.raises(MemoryError), gradients.undisturbed(module):
        pass
    monkeypatch.undo()
    assert models.changes(module, before) == []


def test_undisturbed__weight_moved_elsewhere() -> None:
    """A parameter that is given other memory inside gets its own back, with what was in it."""
    module = restless()
    before = models.fingerprint(module)
    with gradients.undisturbed(module):
        module.first.weight.data = torch.ones(6, 4)
    assert models.changes(module, before) == []


def test_undisturbed__expanded_buffer() -> None:
    """A buffer may be a view that repeats one number; it cannot be written to, and need not be."""
    module = models.MLP(4, 5, 3)
    module.register_buffer("bias_table", torch.zeros(1, 1).expand(3, 3))
    before = models.fingerprint(module)
    with gradients.undisturbed(module):
        pass
    assert models.changes(module, before) == []


def test_undisturbed__buffer_made_inside() -> None:
    """A cache that the first forward pass registers is gone again."""
    module = models.MLP(4, 5, 3)
    with gradients.undisturbed(module):
        module.register_buffer("cache", torch.ones(2))
    assert dict(module.named_buffers()) == {}


def test_preserved_rng() -> None:
    def draw(error: type[BaseException] | None = None) -> tuple[float, float, float]:
        numbers = torch.rand(()).item(), float(np.random.rand()), random.random()
        if error:
            raise error
        return numbers

    with gradients.preserved_rng():
        inside = draw()
    with pytest.raises(KeyboardInterrupt), gradients.preserved_rng():
        draw(KeyboardInterrupt)
    assert draw() == inside


# --- endless


def test_endless__reads_a_loader_anew() -> None:
    """Every pass over a shuffling loader has its own order; only an iterator is repeated."""
    loader = DataLoader(list(range(20)), batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(0))
    found = list(islice(gradients.endless(loader), 40))
    assert sorted(found[:20]) == sorted(found[20:]) == list(range(20))
    assert found[:20] != found[20:]


def test_endless__takes_no_more_than_asked() -> None:
    taken = []

    def stream() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    assert list(islice(gradients.endless(stream()), 3)) == [0, 1, 2]
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("empty", [[], iter([]), (i for i in ())], ids=["list", "iterator", "generator"])
def test_endless__empty_error(empty: Any) -> None:
    with pytest.raises(ValueError, match="nothing to score on: `batches` is empty"):
        next(gradients.endless(empty))


# --- BatchNorm statistics


def trained_conv_net() -> models.ConvNet:
    module = models.randomised(models.ConvNet())
    for batch in models.make_batches(2, 6, 6, seed=1):
        models.loss_fn(module.train(), batch)
    return module


def test_batch_norm_statistics() -> None:
    """What `torch.optim.swa_utils.update_bn` writes, but written only when asked to."""
    module, batches = trained_conv_net(), models.make_batches(2, 6, 6, count=4)
    expected = copy.deepcopy(module)
    update_bn(batches, expected)
    before = models.fingerprint(module)
    with gradients.undisturbed(module):
        statistics = gradients.batch_norm_statistics(module, models.loss_fn, batches)
    assert models.changes(module, before) == []
    assert list(statistics) == [module.norm1, module.norm2]
    gradients.load_batch_norm_statistics(statistics)
    for (name, found), wanted in zip(module.named_buffers(), expected.buffers(), strict=True):
        assert found.equal(wanted), name
    assert set(models.changes(module, before)) >= {"buffer norm1.running_mean", "buffer norm2.running_var"}


def test_batch_norm_statistics__frozen_and_untrained() -> None:
    module = trained_conv_net()
    module.norm1.eval()
    assert list(gradients.batch_norm_statistics(module, models.loss_fn, models.make_batches(2, 6, 6))) == [module.norm2]
    assert gradients.batch_norm_statistics(models.ConvNet(), models.loss_fn, models.make_batches(2, 6, 6)) == {}


def test_batch_norm_statistics__no_batches() -> None:
    """Mean 0 and variance 1 of nothing would be worse than what is there."""
    assert gradients.batch_norm_statistics(trained_conv_net(), models.loss_fn, []) == {}


def test_batch_norm_statistics__error_leaves_no_trace() -> None:
    module = trained_conv_net()
    before, momentum = models.fingerprint(module), module.norm1.momentum

    def broken(module: nn.Module, batch: models.Batch) -> Tensor:
        models.loss_fn(module, batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), gradients.undisturbed(module):
        gradients.batch_norm_statistics(module, broken, models.make_batches(2, 6, 6))
    assert models.changes(module, before) == []
    assert module.norm1.momentum == momentum


def test_undisturbed__any_value() -> None:
    """Values that arithmetic would not bring back: -0.0, NaN, infinity, a denormal."""
    module = models.MLP(4, 5, 3)
    with torch.no_grad():
        module[0].weight[0] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45])
    before = models.fingerprint(module)

    def prune() -> None:
        with gradients.undisturbed(module):
            module[0].weight.data.zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune()
    assert models.changes(module, before) == []


class Checkpointed(nn.Module):
    """Runs its hidden layers twice: forward, and again in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.hidden, self.first(x), use_reentrant=self.use_reentrant)
        return self.last(F.relu(hidden))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_loss_gradients__hookless(use_reentrant: bool) -> None:
    """The same gradients, without a call to what waits for gradients; reentrant checkpointing is refused by torch."""
    module, batches = models.randomised(Checkpointed(use_reentrant)), models.make_batches(4)
    parameters = dict(module.named_parameters())
    expected = gradients.loss_gradients(module, parameters, models.loss_fn, batches)
    called: list[Tensor] = []
    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(called.append)
    if use_reentrant:
        with pytest.raises(RuntimeError, match=r"compatible with \.grad"):
            gradients.loss_gradients(module, parameters, models.loss_fn, batches, hookless=True)
        return
    found = gradients.loss_gradients(module, parameters, models.loss_fn, batches, hookless=True)
    assert not called
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert all(parameter.grad is None for parameter in parameters.values())
