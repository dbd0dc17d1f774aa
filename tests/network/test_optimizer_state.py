"""Optimizers forget pruned weights, also those that others wrap, and only where their state is known."""

import copy
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_drive import Masks
from lightning_drive.network import optimizer_state
from lightning_drive.network.masked_parameters import MaskedParameters


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def mlp_masks(seed: int = 0) -> Masks:
    return Masks({"0.weight": random_mask(5, 4, seed=seed), "2.weight": random_mask(3, 5, seed=seed + 1)})


class Wrapper(Optimizer):
    """An optimizer around another one, as SAM and Lookahead are, with a state of its own."""

    def __init__(self, base: Optimizer) -> None:
        self.base_optimizer = base
        super().__init__(base.param_groups, {})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"slow": torch.ones_like(parameter), "step": torch.ones(()), "note": "x"}

    def step(self, closure: Any = None) -> None:
        self.base_optimizer.step(closure)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("wrappers", [0, 1, 2])
def test_zero_optimizer_state_(make: Any, wrappers: int) -> None:
    """Every state in its parameter's shape forgets pruned weights, and only these."""
    module, masks = models.randomised(models.MLP(4, 5, 3)), mlp_masks()
    inner = make(module.parameters())
    models.loss_fn(module, models.make_batches(4)[0]).backward()
    inner.step()
    optimizer: Optimizer = inner
    for _ in range(wrappers):
        optimizer = Wrapper(optimizer)
    before = copy.deepcopy(inner.state_dict()["state"])
    MaskedParameters(module, masks).zero_optimizer_state_(optimizer)

    checked = 0
    for i, (name, parameter) in enumerate(module.named_parameters()):
        for key, value in inner.state[parameter].items():
            mask = masks.get(name, torch.tensor(True)) if value.shape == parameter.shape else torch.tensor(True)
            assert value.equal(torch.where(mask, before[i][key], 0))
            checked += name in masks and value.shape == parameter.shape
        if wrappers:
            assert optimizer.state[parameter]["slow"].equal(masks.get(name, torch.ones_like(parameter)).float())
            assert optimizer.state[parameter]["step"].eq(1)
    assert checked >= len(masks)


def test_zero_optimizer_state__optimizers_that_know_each_other() -> None:
    """A wrapper and what it wraps may refer to each other; each is visited once."""
    module = models.MLP(4, 5, 3)
    inner, outer = (torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for _ in range(2))
    inner.outer, outer.inner = outer, inner  # type: ignore[attr-defined]
    weight = module[0].weight
    inner.state[weight]["momentum_buffer"] = torch.ones_like(weight)
    masks = Masks({"0.weight": torch.zeros_like(weight, dtype=torch.bool)})
    MaskedParameters(module, masks).zero_optimizer_state_(outer)
    assert not inner.state[weight]["momentum_buffer"].any()


def test_with_wrapped__lookalikes() -> None:
    """What wraps need not be an optimizer itself, at any depth, and schedulers that know one are none."""
    inner = torch.optim.SGD(models.MLP(4, 5, 3).parameters(), lr=0.1)
    lookalike = SimpleNamespace(param_groups=inner.param_groups, layers={"fast": [inner]}, state={})
    outer = Wrapper(torch.optim.SGD(models.MLP(2, 2).parameters(), lr=0.1))
    outer.others = (lookalike, torch.optim.lr_scheduler.StepLR(inner, 1))  # type: ignore[attr-defined]
    found = optimizer_state.with_wrapped(outer)
    assert [id(each) for each in found] == [id(each) for each in (outer, outer.base_optimizer, lookalike, inner)]


def test_zero_optimizer_state___lbfgs() -> None:
    """A history in which a pruned weight moved is dropped; one without stays, bit for bit the same objects."""
    module, masks = models.randomised(models.MLP(4, 5, 3)), mlp_masks()
    live, batch = MaskedParameters(module, masks), models.make_batches(4)[0]
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = models.loss_fn(module, batch)
        loss.backward()
        live.zero_gradients_()
        return loss

    optimizer.step(closure)  # every weight is in use, but those that are masked do not move
    state = optimizer.state[module[0].weight]
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    live.zero_optimizer_state_(optimizer)
    assert optimizer.state[module[0].weight] is state
    assert state.keys() == before.keys()
    assert all(value is before[key] or torch.equal(value, before[key]) for key, value in state.items())

    position = 20 + 5 + int((~masks["2.weight"]).flatten().nonzero()[0])  # behind the first weight and bias
    state["old_dirs"][0][position] = 1e-20
    live.zero_optimizer_state_(optimizer)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("make", "keeps"),
    [
        *((kind, True) for kind in (torch.optim.SGD, torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adamax)),
        *((kind, True) for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)),
        (torch.optim.RMSprop, True),
        (lambda parameters: torch.optim.SGD(parameters, momentum=0.9, nesterov=True, weight_decay=0.1), True),
        (lambda parameters: torch.optim.AdamW(parameters, amsgrad=True, maximize=True, weight_decay=0.1), True),
        (lambda parameters: torch.optim.RMSprop(parameters, momentum=0.9, centered=True, weight_decay=0.1), True),
        (lambda parameters: torch.optim.Adam(parameters, eps=0.0), False),
        (torch.optim.ASGD, False),
        (torch.optim.LBFGS, False),
        (type("Own", (torch.optim.SGD,), {}), False),
    ],
)
def test_keeps_zeros(make: Any, keeps: bool) -> None:
    """What is said to leave weights at zero does so, to the sign."""
    parameter = torch.nn.Parameter(torch.randn(8) * torch.tensor([0.0, 1.0]).repeat(4))
    parameter.data[parameter == 0] = 0.0
    optimizer = make([parameter])
    assert optimizer_state.keeps_zeros(optimizer) == keeps
    for _ in range(3 if keeps else 0):
        parameter.grad = torch.randn(8) * torch.tensor([0.0, 1.0]).repeat(4)
        parameter.grad[::2] = 0.0
        optimizer.step()
        assert torch.equal(parameter[::2].view(torch.int32), torch.zeros(4, dtype=torch.int32))
        assert parameter[1::2].all()
