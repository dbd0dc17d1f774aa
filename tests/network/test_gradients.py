"""Gradients are those of the loss in full precision without Dropout, and afterwards nobody can tell they were taken."""

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_drive import DRIVE, SNIP, find_masks
from lightning_drive.core import function_modes
from lightning_drive.network import batch_norm, gradients
from lightning_drive.search.methods import Method

MODES = pytest.mark.parametrize("mode", ["train", "eval"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def prunable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.dim() > 1}


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


def test_loss_gradients__owned() -> None:
    """The caller may write into any gradient, also where autograd hands out one tensor for two parameters."""
    module = nn.ParameterDict({name: nn.Parameter(torch.zeros(2, 3)) for name in ("first", "second", "third")})
    found = gradients.loss_gradients(
        module,
        dict(module.named_parameters()),
        lambda module, batch: ((module["first"] + module["second"]) * batch).sum() + module["third"].sum(),
        [torch.full((2, 3), 2.0)],
    )
    for gradient in found.values():
        gradient.add_(1)
    assert {name: gradient.unique().tolist() for name, gradient in found.items()} == {
        "first": [3.0],
        "second": [3.0],
        "third": [2.0],
    }


def test_loss_gradients__none_where_unused() -> None:
    module = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 3)})
    found = gradients.loss_gradients(
        module, prunable(module), lambda module, batch: module["used"](batch).sum(), [torch.ones(1, 2)]
    )
    assert {name: gradient.tolist() for name, gradient in found.items()} == {"used.weight": [[1.0, 1.0]]}


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
    statistics = batch_norm.batch_norm_statistics(copy.deepcopy(module), models.loss_fn, batches)
    assert list(statistics) == ["norm1", "norm2"]
    batch_norm.load_batch_norm_statistics(module, statistics)
    for (name, found), wanted in zip(module.named_buffers(), expected.buffers(), strict=True):
        assert found.equal(wanted), name
    assert set(models.changes(module, before)) >= {"buffer norm1.running_mean", "buffer norm2.running_var"}


def test_batch_norm_statistics__frozen_and_untrained() -> None:
    module = trained_conv_net()
    module.norm1.eval()
    assert list(batch_norm.batch_norm_statistics(module, models.loss_fn, models.make_batches(2, 6, 6))) == ["norm2"]
    assert batch_norm.batch_norm_statistics(models.ConvNet(), models.loss_fn, models.make_batches(2, 6, 6)) == {}


def test_batch_norm_statistics__no_batches() -> None:
    """Mean 0 and variance 1 of nothing would be worse than what is there."""
    assert batch_norm.batch_norm_statistics(trained_conv_net(), models.loss_fn, []) == {}


def test_batch_norm_statistics__momentum_returns_after_an_error() -> None:
    module = trained_conv_net()
    momentum = module.norm1.momentum

    def broken(module: nn.Module, batch: models.Batch) -> Tensor:
        models.loss_fn(module, batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch_norm.batch_norm_statistics(module, broken, models.make_batches(2, 6, 6))
    assert module.norm1.momentum == momentum


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
def test_loss_gradients__activation_checkpointing(use_reentrant: bool) -> None:
    module, plain, batches = models.randomised(Checkpointed(use_reentrant)), Checkpointed(False), models.make_batches(4)
    plain.load_state_dict(module.state_dict())
    expected = torch.autograd.grad(models.loss_fn(plain, batches[0]), list(plain.parameters()))
    found = gradients.loss_gradients(module, dict(module.named_parameters()), models.loss_fn, batches[:1])
    for gradient, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
    assert all(parameter.grad is None for parameter in module.parameters())


# --- on_replica_only


def test_on_replica_only() -> None:
    """A loss that is computed with the network itself, which is not what is scored, is refused by name."""
    net = models.MLP(4, 5, 3)
    replica, (batch, *_) = copy.deepcopy(net), models.make_batches(4)
    outside = nn.Linear(4, 3)  # of nobody that is scored
    for loss_fn in (
        lambda _, batch: models.loss_fn(net, batch),
        lambda module, batch: models.loss_fn(module, batch) + 0.1 * net[2].weight.square().sum(),
        lambda module, batch: models.loss_fn(module, batch) * net[0].bias.sum().exp(),
    ):
        with pytest.raises(ValueError, match=r"but '[02]\.(weight|bias)'.* of the network itself took part"):
            gradients.on_replica_only(loss_fn, net)(replica, batch)
    checked = gradients.on_replica_only(
        lambda module, batch: models.loss_fn(module, batch) + outside(batch[0]).sum(), net
    )
    assert checked(replica, batch).isfinite()
    assert gradients.on_replica_only(models.loss_fn, net)(net, batch).isfinite()  # scored itself


# --- what checkpoints compute again


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
def test_checkpoint__no_dropout(hidden: Callable[[Tensor, bool], Tensor], reentrant: bool, method: Method) -> None:
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


def test_backward__subclass() -> None:
    """A loss that has ways of its own keeps them."""

    class Noted(Tensor):
        def backward(self, *args: Any, **kwargs: Any) -> None:
            calls.append(1)

    calls: list[int] = []
    function_modes.backward(torch.ones(()).as_subclass(Noted))
    assert calls == [1]
