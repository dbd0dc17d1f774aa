"""Optimizers that keep matrices for each weight: nothing of theirs is masked, for zeros in them mean nothing."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from optimizers import OnMatrices
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_drive import SNIPPruningCallback
from lightning_drive.network.masked_parameters import MaskedParameters
from lightning_drive.network.masks import Masks


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=1e-6) ** exponent) @ vectors.T


class Shampoo(OnMatrices):
    """Two Gram matrices and a momentum."""

    def direction(self, gradient: Tensor, state: Any, parameter: Tensor) -> Tensor:
        left = state.setdefault("left", torch.eye(len(gradient))).add_(gradient @ gradient.T)
        right = state.setdefault("right", torch.eye(gradient.shape[1])).add_(gradient.T @ gradient)
        momentum = state.setdefault("momentum", torch.zeros_like(gradient)).mul_(0.9).add_(gradient)
        return power(left, -0.25) @ momentum @ power(right, -0.25)


class Soap(OnMatrices):
    """Adam in rotated coordinates: the names are Adam's, but the second moments are not those of weights."""

    def direction(self, gradient: Tensor, state: Any, parameter: Tensor) -> Tensor:
        bases = self.bases(gradient, state, parameter)
        first = state.setdefault("exp_avg", torch.zeros_like(gradient)).lerp_(gradient, 0.1)
        rotated = bases[0].T @ gradient @ bases[1]
        second = state.setdefault("exp_avg_sq", torch.zeros_like(gradient)).lerp_(rotated**2, 0.05)
        return bases[0] @ (bases[0].T @ first @ bases[1] / (second.sqrt() + 1e-3)) @ bases[1].T

    def bases(self, gradient: Tensor, state: Any, parameter: Tensor) -> list[Tensor]:
        grams = state.setdefault("grams", [torch.eye(size) * 1e-3 for size in gradient.shape])
        grams[0].add_(gradient @ gradient.T)
        grams[1].add_(gradient.T @ gradient)
        state["bases"] = [torch.linalg.eigh(gram)[1] for gram in grams]
        return state["bases"]


class Kron(OnMatrices):
    """Triangular factors in nested lists, and codes: booleans and integers in the weight's shape."""

    def direction(self, gradient: Tensor, state: Any, parameter: Tensor) -> Tensor:
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(gradient)).mul_(0.9).add_(gradient)
        state["seen"] = (gradient != 0) | state.get("seen", torch.zeros_like(gradient, dtype=torch.bool))
        state["counts"] = state.get("counts", torch.zeros_like(gradient, dtype=torch.int64)) + 1
        factors = state.setdefault("Q", [[torch.eye(size)] for size in gradient.shape])
        for [factor], gram in zip(factors, (gradient @ gradient.T, gradient.T @ gradient), strict=True):
            factor.copy_(torch.linalg.cholesky(factor @ factor.T + gram))
        return torch.cholesky_solve(torch.cholesky_solve(momentum, factors[0][0]).T, factors[1][0]).T


class SoapInAttribute(Soap):
    """The same with bases in a dictionary of its own, beside the state."""

    def bases(self, gradient: Tensor, state: Any, parameter: Tensor) -> list[Tensor]:
        own = vars(self).setdefault("own", {}).setdefault(id(parameter), {})
        return super().bases(gradient, own, parameter)


class SoapInGroup(Soap):
    """The same with bases in the parameter group."""

    def bases(self, gradient: Tensor, state: Any, parameter: Tensor) -> list[Tensor]:
        own = self.param_groups[0].setdefault("own", {}).setdefault(id(parameter), {})
        return super().bases(gradient, own, parameter)


class SoapInObject(Soap):
    """The same with bases in an object, as GaLore's projectors are."""

    def bases(self, gradient: Tensor, state: Any, parameter: Tensor) -> list[Tensor]:
        own = state.setdefault("projector", SimpleNamespace(state={})).state
        return super().bases(gradient, own, parameter)


MATRIX_OPTIMIZERS = [Shampoo, Soap, Kron, SoapInAttribute, SoapInGroup, SoapInObject]

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "square": lambda: nn.Linear(6, 6),
    "not_square": lambda: nn.Linear(6, 4),
    "convolution": lambda: nn.Conv1d(6, 6, 6, padding=3),
}


def leaves(optimizer: Any) -> list[Tensor]:
    everything = list(optimizer.state.values())
    values = [value for state in everything for value in state.values()]
    everything += [value.state for value in values if isinstance(value, SimpleNamespace)]
    everything += [vars(optimizer).get("own"), optimizer.param_groups[0].get("own")]
    return [tensor for tensor in tree_leaves([dict(state or {}) for state in everything]) if isinstance(tensor, Tensor)]


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("kind", MATRIX_OPTIMIZERS)
def test_zero_optimizer_state___matrices(kind: Any, layer: Callable[[], nn.Module]) -> None:
    """Not one bit of it moves, wherever the matrices are."""
    torch.manual_seed(0)
    module = layer()
    optimizer = kind(module.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(5, 6, 6)).square().sum().backward()
        optimizer.step()
    before = deepcopy(leaves(optimizer))
    assert len(before) >= 3 * 2
    live = MaskedParameters(module, Masks({"weight": torch.rand_like(module.weight) > 0.7}))  # type: ignore[arg-type]
    live.zero_optimizer_state_(optimizer)
    assert all(torch.equal(*pair) for pair in zip(leaves(optimizer), before, strict=True))


class Coded(Tensor):
    """Stands for numbers that are packed, as those of 8-bit optimizers are."""


FULL = torch.ones(3, 3)
STATES: dict[str, tuple[dict[str, Any], bool]] = {
    "moments": ({"step": torch.tensor(3.0), "exp_avg": FULL, "exp_avg_sq": FULL}, True),
    "momentum": ({"momentum_buffer": FULL, "beta": 0.9, "name": "x", "extra": None, "warm": True}, True),
    "schedule_free": ({"z": FULL, "exp_avg_sq": FULL, "count": torch.ones(1)}, True),
    "slow": ({"slow_buffer": FULL}, True),
    "unknown": ({"preconditioner": FULL}, False),
    "unknown_beside": ({"momentum": FULL, "left": FULL}, False),
    "matrix_beside": ({"exp_avg": FULL, "exp_avg_sq": FULL, "Q": torch.eye(7)}, False),
    "vector_beside": ({"exp_avg": FULL, "row": torch.ones(3)}, False),
    "in_a_list": ({"momentum": [FULL, FULL]}, False),
    "in_nested_lists": ({"exp_avg": FULL, "Q": [[FULL], [torch.eye(3)]]}, False),
    "in_a_dictionary": ({"exp_avg": FULL, "more": {"Q": FULL}}, False),
    "in_an_object": ({"exp_avg": FULL, "projector": SimpleNamespace(basis=FULL)}, False),
    "boolean": ({"momentum": FULL.bool()}, False),
    "boolean_beside": ({"momentum": FULL, "seen": FULL.bool()}, False),
    "integer": ({"exp_avg": FULL.to(torch.int8)}, False),
    "packed": ({"exp_avg": FULL.as_subclass(Coded)}, False),
    "a_sum_of_another_optimizer": ({"sum": FULL}, False),
}


@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (3, 3, 3)], ids=str)
@pytest.mark.parametrize(("state", "is_masked"), STATES.values(), ids=STATES)
def test_zero_optimizer_state___which(state: dict[str, Any], is_masked: bool, shape: tuple[int, ...]) -> None:
    """All of it is known to be element-wise and is masked, or none is."""

    def reshaped(value: Any) -> Any:
        return value.new_ones(shape) if isinstance(value, Tensor) and value.shape == (3, 3) else value

    module = nn.ParameterDict({"weight": torch.zeros(shape)})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.state[module["weight"]] = torch.utils._pytree.tree_map(reshaped, state)
    mask = torch.rand(shape) > 0.5
    MaskedParameters(module, Masks({"weight": mask})).zero_optimizer_state_(optimizer)
    now = tree_leaves(optimizer.state[module["weight"]])
    seen = [value for value in now if isinstance(value, Tensor) and value.shape == shape]
    assert all(value.as_subclass(Tensor).bool().equal(mask if is_masked else torch.ones_like(mask)) for value in seen)


class Net(pl.LightningModule):
    """A convolution, a square layer and one that is not."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.losses = kind, []  # type: ignore[var-annotated]
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 16)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Optimizer:
        optimizer: Optimizer = self.kind(self.parameters())
        return optimizer


class Held(pl.Callback):
    """Sees that the masks hold after every batch."""

    def __init__(self, pruning: SNIPPruningCallback) -> None:
        self.pruning, self.seen = pruning, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.pruning.pruned:
            assert self.pruning.masks.hold_for(pl_module)
            self.seen += 1


@pytest.mark.parametrize("kind", MATRIX_OPTIMIZERS)
def test_fit(tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains on after pruning as if nothing had been done to the optimizer: finite, sparse, and it learns."""

    def fit() -> Net:
        module, pruning = Net(kind), SNIPPruningCallback(sparsity=0.7, warmup_epochs=1)
        held = Held(pruning)
        fits.trainer(tmp_path, pruning, held, max_epochs=6).fit(module, fits.loader())
        assert held.seen == 5 * 3
        return module

    module = fit()
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    assert sum(module.losses[-3:]) < sum(module.losses[3:6])
    monkeypatch.setattr(MaskedParameters, "zero_optimizer_state_", lambda *_: None)
    assert fit().losses == module.losses
