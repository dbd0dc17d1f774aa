"""Gradients are those of the loss summed over the batches, owned by the caller, and no parameter keeps one."""

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_drive.core import function_modes
from lightning_drive.network import gradients

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


def test_backward__subclass() -> None:
    """A loss that has ways of its own keeps them."""

    class Noted(Tensor):
        def backward(self, *args: Any, **kwargs: Any) -> None:
            calls.append(1)

    calls: list[int] = []
    function_modes.backward(torch.ones(()).as_subclass(Noted))
    assert calls == [1]
