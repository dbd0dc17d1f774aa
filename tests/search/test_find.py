"""`find_masks` gives the masks of the papers' algorithms, to the exact count, and leaves no trace."""

import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import FrozenInstanceError, dataclass, field, replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import models
import pytest
import reference
import torch
import torch.nn.functional as F
from searches import search
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_drive import DRIVE, SNIP, Magnitude, Masks, Random, SynFlow, find_masks
from lightning_drive.network import paths, prunable
from lightning_drive.search import methods
from lightning_drive.search.scored_network import Network

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: models.MLP(6, 12, 8, 3), (6,)),
    "conv_net": (models.ConvNet, (2, 6, 6)),
    "residual_net": (models.ResidualNet, (2, 4, 4)),
}
METHODS = [DRIVE(rounds=3), SNIP(), SynFlow(rounds=3), Magnitude(rounds=2), Random(rounds=2)]
EACH_METHOD = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
History = list[dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Fixed:
    """A method from outside the package: the same scores in every round."""

    scores: dict[str, Tensor]
    rounds: int = 1
    mode: str = "eval"

    def score(self, network: Network) -> dict[str, Tensor]:
        return {name: self.scores[name].clone() for name in network.weights}


def build(network: str, seed: int = 0) -> tuple[nn.Module, list[models.Batch], tuple[int, ...]]:
    make, shape = NETWORKS[network]
    module = models.randomised(make(), seed).double()
    return module, models.make_batches(*shape, count=7, size=16, seed=seed, dtype=torch.float64), shape


def quietly(module: nn.Module, method: Any, **settings: Any) -> History:
    """The masks after every round. Tiny networks lose layers and hit zeros: that has tests of its own."""
    history: History = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        masks = find_masks(module, method, on_round=lambda _, masks: history.append(dict(masks)), **settings)
    assert masks == Masks(history[-1])
    return history


def assert_equal(found: Sequence[dict[str, Tensor]], expected: Sequence[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected)
    for index, (one, two) in enumerate(zip(found, expected, strict=True), 1):
        assert list(one) == list(two)
        for name in one:
            assert one[name].equal(two[name]), f"{name} in round {index}"


def counts(history: History) -> list[int]:
    return [sum(int(mask.sum()) for mask in masks.values()) for masks in history]


def caught(*args: Any, **settings: Any) -> list[str]:
    """The texts of the warnings, each of which must point at this file."""
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        find_masks(*args, **settings)
    assert all(record.filename == __file__ for record in records)
    return [str(record.message) for record in records]


# --- the papers' algorithms


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize(
    ("schedule", "rounds", "batches_per_round"),
    [
        ("exponential", 1, 1),
        ("exponential", 1, 2),
        ("exponential", 5, 1),
        ("exponential", 5, 2),
        ("exponential", 20, 1),
        ("linear", 5, 1),
        ("linear", 5, 2),
    ],
)
def test_find_masks__drive_is_algorithm_1(
    network: str, mode: str, scope: str, schedule: str, rounds: int, batches_per_round: int
) -> None:
    module, batches, _ = build(network)
    names = list(prunable.prunable_parameters(module))
    settings = {"sparsity": 0.85, "scope": scope, "schedule": schedule}
    expected = reference.drive(
        module,
        names,
        batches,
        models.loss_fn,
        mode=mode,
        rounds=rounds,
        batches_per_round=batches_per_round,
        **settings,
    )
    method = DRIVE(rounds=rounds, batches_per_round=batches_per_round, mode=mode)
    assert_equal(quietly(module, method, batches=batches, loss_fn=models.loss_fn, **settings), expected)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("rounds", [1, 10])
def test_find_masks__snip_is_its_paper(network: str, rounds: int) -> None:
    module, batches, _ = build(network, seed=1)
    names = list(prunable.prunable_parameters(module))
    expected = reference.drive(module, names, batches, models.loss_fn, snip=True, sparsity=0.8, rounds=rounds)
    found = quietly(module, SNIP(rounds=rounds), sparsity=0.8, batches=batches, loss_fn=models.loss_fn)
    assert_equal(found, expected)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("batches_per_round", [1, 3])
def test_find_masks__drive_ranks_as_snip(network: str, batches_per_round: int) -> None:
    module, batches, _ = build(network, seed=2)
    settings = {"sparsity": 0.9, "batches": batches, "loss_fn": models.loss_fn}
    drive, snip = (method(rounds=8, batches_per_round=batches_per_round) for method in (DRIVE, SNIP))
    assert_equal(quietly(module, drive, **settings), quietly(module, snip, **settings))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("rounds", [1, 12])
def test_find_masks__synflow_is_its_paper(network: str, scope: str, rounds: int) -> None:
    module, batches, shape = build(network, seed=3)
    names = list(prunable.prunable_parameters(module))
    expected = reference.synflow(module, names, shape, sparsity=0.9, rounds=rounds, scope=scope)
    for source in ({"example_input": torch.zeros(1, *shape)}, {"batches": batches}):
        assert_equal(quietly(module, SynFlow(rounds=rounds), sparsity=0.9, scope=scope, **source), expected)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_find_masks__magnitude(network: str, scope: str) -> None:
    module, *_ = build(network, seed=4)
    names = list(prunable.prunable_parameters(module))
    expected = reference.magnitude(module, names, sparsity=0.7, rounds=3, scope=scope)
    assert_equal(quietly(module, Magnitude(rounds=3), sparsity=0.7, scope=scope), expected)


def test_find_masks__magnitude_by_hand() -> None:
    masks = find_masks(models.InnerProduct(10), Magnitude(), sparsity=0.7)
    assert masks["layer.weight"].int().tolist() == [[0, 0, 0, 0, 0, 0, 0, 1, 1, 1]]


def test_find_masks__random_seed() -> None:
    module = models.MLP(6, 12, 3)
    masks = [find_masks(module, Random(seed=seed), sparsity=0.5) for seed in (0, 0, 1)]
    assert masks[0] == masks[1]
    assert masks[0] != masks[2]


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_find_masks__random_like(scope: str) -> None:
    """Random masks with the layer densities of others: as many weights in each parameter, elsewhere."""
    module, batches, _ = build("conv_net")
    settings: dict[str, Any] = {"sparsity": 0.7, "scope": scope}
    masks = find_masks(module, SNIP(), batches=batches, loss_fn=models.loss_fn, **settings)
    drawn = [find_masks(module, Random(seed=seed, like=masks), **settings) for seed in range(3)]
    for each in drawn:
        assert {name: int(mask.sum()) for name, mask in each.items()} == {
            name: int(mask.sum()) for name, mask in masks.items()
        }
    assert len({each.digest() for each in (masks, *drawn)}) == 4
    assert find_masks(module, Random(seed=0, like=masks), **settings) == drawn[0]
    assert drawn[0] == masks.shuffled(after_scores(masks, seed=0))


def after_scores(masks: Masks, seed: int) -> torch.Generator:
    """The generator as `Random` has it once a score is drawn for every weight."""
    generator = torch.Generator().manual_seed(seed)
    for mask in masks.values():
        torch.rand(mask.shape, generator=generator)
    return generator


def test_find_masks__random_like_error() -> None:
    module = models.MLP(4, 5, 3)
    other = Masks({"0.weight": torch.ones(5, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"`like` must cover exactly the prunable parameters, but 2.weight is in only"):
        find_masks(module, Random(like=other), sparsity=0.5)
    other = Masks({"0.weight": torch.ones(5, 4, dtype=torch.bool), "2.weight": torch.ones(5, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"mask of '2.weight' has shape \(5, 3\)"):
        find_masks(module, Random(like=other), sparsity=0.5)


def test_find_masks__float32_scores() -> None:
    """A float32 module gives the masks of its float64 copy wherever rounding cannot matter: here, everywhere."""
    module, batches, _ = build("mlp")
    expected = quietly(module, DRIVE(rounds=5), sparsity=0.8, batches=batches, loss_fn=models.loss_fn)
    single = [(inputs.float(), labels) for inputs, labels in batches]
    found = quietly(module.float(), DRIVE(rounds=5), sparsity=0.8, batches=single, loss_fn=models.loss_fn)
    assert_equal(found, expected)


# --- counts, nesting, ties


@EACH_METHOD
@pytest.mark.parametrize("seed", range(20))
def test_find_masks__exact_counts_and_nesting(seed: int, method: Any) -> None:
    """After round n exactly round(P * density_n) weights are left, and all of them were left before."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, 9) for _ in range(rng.randint(2, 5))]
    module = models.randomised(models.MLP(*sizes), seed)
    rounds, sparsity = rng.randint(1, 12), rng.choice([0.0, 0.1, 0.5, 0.9, 0.98, rng.random()])
    schedule, scope = rng.choice(["exponential", "linear"]), rng.choice(["global", "layerwise"])
    history = as_far_as_it_goes(
        module,
        replace(method, rounds=rounds),
        sparsity=sparsity,
        schedule=schedule,
        scope=scope,
        batches=models.make_batches(sizes[0], classes=sizes[-1], size=20, seed=seed),
        loss_fn=models.loss_fn,
    )
    names = [name for name, parameter in module.named_parameters() if parameter.ndim > 1]
    previous = reference.ones_like_weights(module, names)
    for n, masks in enumerate(history, 1):
        groups = [list(masks)] if scope == "global" else [[name] for name in masks]
        for group in groups:
            total = sum(masks[name].numel() for name in group)
            expected = reference.num_kept_after(n, rounds, total, sparsity, schedule)
            assert sum(int(masks[name].sum()) for name in group) == expected
        assert all((masks[name] <= previous[name]).all() for name in masks)
        previous = masks


def as_far_as_it_goes(module: nn.Module, method: Any, **settings: Any) -> History:
    """The masks after every round, until nothing is left to rank by: a network of a few weights soon dies."""
    history: History = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            find_masks(module, method, on_round=lambda _, masks: history.append(dict(masks)), **settings)
    except ValueError as error:
        assert isinstance(method, (DRIVE, SNIP, SynFlow))
        assert str(error).startswith(("Every score is zero", "The synaptic flow R is 0"))  # noqa: PT017
    else:
        assert len(history) == method.rounds
    return history


def test_find_masks__counts_do_not_drift() -> None:
    """100 rounds of rounding end at the count of one."""
    module = models.MLP(40, 50)
    history = quietly(module, Random(rounds=100), sparsity=0.993)
    assert counts(history)[-1] == 14
    assert counts(history)[49] == round(2000 * 0.007**0.5)


@EACH_METHOD
@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_find_masks__sparsity_0_keeps_all(method: Any, scope: str) -> None:
    module, batches, _ = build("conv_net")
    masks = find_masks(module, method, sparsity=0, scope=scope, batches=batches, loss_fn=models.loss_fn)
    assert masks.sparsity == 0
    assert masks.num_kept == masks.num_prunable == 72 + 180 + 15


@EACH_METHOD
def test_find_masks__last_survivor(method: Any) -> None:
    module, batches, _ = build("mlp")
    method = replace(method, rounds=1)
    settings = {"sparsity": 0.999999, "batches": batches, "loss_fn": models.loss_fn}
    assert counts(quietly(module, method, **settings)) == [1]
    layerwise = quietly(module, method, scope="layerwise", **settings)[-1]
    assert [int(mask.sum()) for mask in layerwise.values()] == [1, 1, 1]


def test_find_masks__synflow_beyond_its_last_path_error() -> None:
    """One weight is no path through three layers: after it there is no flow to score by."""
    module, batches, _ = build("mlp")
    with pytest.raises(ValueError, match="synaptic flow R is 0: no signal"):
        find_masks(module, SynFlow(rounds=5), sparsity=0.999999, batches=batches)


@pytest.mark.parametrize("rounds", [1, 4])
def test_find_masks__all_tied(rounds: int) -> None:
    """Equal scores: the earlier parameter wins, then the lower index, in every round."""
    module = models.MLP(3, 2, 2, bias=False)
    ones = {"0.weight": torch.ones(2, 3), "2.weight": torch.ones(2, 2)}
    masks = quietly(module, Fixed(ones, rounds), sparsity=0.6)[-1]
    assert {name: mask.int().tolist() for name, mask in masks.items()} == {
        "0.weight": [[1, 1, 1], [1, 0, 0]],
        "2.weight": [[0, 0], [0, 0]],
    }


def test_find_masks__many_tied() -> None:
    module = models.MLP(3, 2, 2, bias=False)
    tied = {"0.weight": torch.tensor([[1.0, 2.0, 1.0], [2.0, 1.0, 2.0]]), "2.weight": torch.tensor([[2.0, 1], [1, 2]])}
    masks = find_masks(module, Fixed(tied), sparsity=0.3)
    assert {name: mask.int().tolist() for name, mask in masks.items()} == {
        "0.weight": [[1, 1, 1], [1, 0, 1]],
        "2.weight": [[1, 0], [0, 1]],
    }


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_find_masks__positive_scale(factor: float) -> None:
    """Neither the loss's scale nor that of the scores has a say."""
    module, batches, _ = build("residual_net")
    settings = {"sparsity": 0.9, "batches": batches}
    plain = quietly(module, DRIVE(rounds=5), loss_fn=models.loss_fn, **settings)
    scaled = quietly(module, DRIVE(rounds=5), loss_fn=lambda m, b: factor * models.loss_fn(m, b), **settings)
    assert_equal(scaled, plain)


# --- what a round sees


def test_find_masks__weights_stand_still() -> None:
    """Every round sees the module's own weights, pruned ones as +0.0."""
    module = models.randomised(models.MLP(6, 12, 3))
    weights = {name: value.detach().clone() for name, value in prunable.prunable_parameters(module).items()}
    seen: History = []

    def spy(module: nn.Module, batch: models.Batch) -> Tensor:
        seen.append({name: module.get_parameter(name).detach().clone() for name in weights})
        return models.loss_fn(module, batch)

    history = quietly(module, DRIVE(rounds=6), sparsity=0.9, batches=models.make_batches(6), loss_fn=spy)
    masks = [reference.ones_like_weights(module, list(weights)), *history]
    for now, mask in zip(seen, masks, strict=False):
        assert all(now[name].equal(weights[name].masked_fill(~mask[name], 0.0)) for name in weights)
        assert not any((now[name].signbit() & ~mask[name]).any() for name in weights)


@pytest.mark.parametrize("batches_per_round", [1, 2])
@pytest.mark.parametrize("source", ["list", "loader", "generator"])
def test_find_masks__batches_in_order(source: str, batches_per_round: int) -> None:
    """One per round (or k), in order, and from the start again when they run out."""
    module, batches = models.MLP(6, 12, 3), models.make_batches(6, count=3)
    given = {"list": batches, "loader": DataLoader(batches, batch_size=None), "generator": (b for b in batches)}[source]
    seen: list[int] = []

    def spy(module: nn.Module, batch: models.Batch) -> Tensor:
        seen.append(next(i for i, known in enumerate(batches) if known[0].equal(batch[0])))
        return models.loss_fn(module, batch)

    method = DRIVE(rounds=4, batches_per_round=batches_per_round)
    find_masks(module, method, sparsity=0.5, batches=given, loss_fn=spy)
    assert seen == [i % 3 for i in range(4 * batches_per_round)]


def test_find_masks__takes_no_more_batches_than_needed() -> None:
    taken = []

    def stream() -> Iterator[models.Batch]:
        for batch in models.make_batches(6, count=20):
            taken.append(batch)
            yield batch

    module = models.MLP(6, 12, 3)
    find_masks(module, DRIVE(rounds=3, batches_per_round=2), sparsity=0.5, batches=stream(), loss_fn=models.loss_fn)
    assert len(taken) == 6


def test_find_masks__gradients_are_summed_before_the_product() -> None:
    """Two half batches and a summed loss are the full batch: summed scores would not be."""

    def summed(module: nn.Module, batch: models.Batch) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")

    module, batches, _ = build("mlp")
    halves = [(inputs[half], labels[half]) for inputs, labels in batches for half in (slice(0, 8), slice(8, 16))]
    settings = {"sparsity": 0.9, "loss_fn": summed}
    whole = quietly(module, DRIVE(rounds=7), batches=batches, **settings)
    assert_equal(quietly(module, DRIVE(rounds=7, batches_per_round=2), batches=halves, **settings), whole)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_find_masks__dropout_is_off(dropout: float) -> None:
    """In Dropout layers, in attention, and called as a function."""

    class Net(models.Attention):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(F.dropout(x, dropout, self.training)), dropout)

    module = models.randomised(Net(dropout=dropout))
    reference_module = models.randomised(models.Attention())
    settings = {"sparsity": 0.6, "batches": models.make_batches(16), "loss_fn": models.loss_fn}
    assert_equal(quietly(module, DRIVE(rounds=3), **settings), quietly(reference_module, DRIVE(rounds=3), **settings))


@EACH_METHOD
def test_find_masks__autocast_is_off(method: Any) -> None:
    module = models.randomised(models.ConvNet())
    settings = {"sparsity": 0.6, "batches": models.make_batches(2, 6, 6), "loss_fn": models.loss_fn}
    expected = quietly(module, method, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quietly(module, method, **settings)
        assert torch.is_autocast_enabled("cpu")
    assert_equal(found, expected)


@EACH_METHOD
def test_find_masks__under_no_grad(method: Any) -> None:
    module = models.randomised(models.ConvNet())
    settings = {"sparsity": 0.6, "batches": models.make_batches(2, 6, 6), "loss_fn": models.loss_fn}
    expected = quietly(module, method, **settings)
    with torch.no_grad():
        found = quietly(module, method, **settings)
        assert not torch.is_grad_enabled()
    assert_equal(found, expected)


def test_find_masks__frozen_norm_stays_frozen() -> None:
    """A submodule in eval mode inside a training one keeps its running statistics."""
    seen = []

    def spy(module: nn.Module, batch: models.Batch) -> Tensor:
        seen.append((module.norm1.training, module.norm2.training, module.dropout.training))
        return models.loss_fn(module, batch)

    module = models.ConvNet().train()
    module.norm1.eval()
    batches = models.make_batches(2, 6, 6)
    find_masks(module, SNIP(), sparsity=0.5, batches=batches, loss_fn=spy)
    find_masks(module, SNIP(mode="eval"), sparsity=0.5, batches=batches, loss_fn=spy)
    assert seen == [(False, True, False), (False, False, False)]


# --- nothing is left behind


def restless(dtype: torch.dtype) -> nn.Module:
    module = models.randomised(models.Restless()).to(dtype)
    module.frozen_norm.eval()
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    module.last.weight.grad = None
    with torch.no_grad():
        module.first.weight[0, 0] = -0.0
    return module


@EACH_METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_find_masks__leaves_no_trace(method: Any, dtype: torch.dtype, training: bool) -> None:
    module = restless(dtype)
    module.dropout.train(training)
    samples = [(inputs[0], labels[0]) for inputs, labels in models.make_batches(4, count=12)]
    full = torch.promote_types(dtype, torch.float32)
    loader = DataLoader([(x.to(full), y) for x, y in samples], batch_size=4, shuffle=True)
    before = models.fingerprint(module)
    quietly(module, method, sparsity=0.5, batches=loader, loss_fn=models.loss_fn)
    assert models.changes(module, before) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EACH_METHOD
def test_find_masks__leaves_no_trace_of_an_interrupt(
    method: Any, dtype: torch.dtype, error: type[BaseException]
) -> None:
    """From the loss in the middle of the rounds, or from `on_round`."""
    module = restless(dtype)
    calls = iter(range(100))

    def broken(module: nn.Module, batch: models.Batch) -> Tensor:
        loss = models.loss_fn(module, batch)
        if next(calls) == min(1, method.rounds - 1):
            loss.backward()
            raise error
        return loss

    def stop(*_: Any) -> None:
        raise error

    before = models.fingerprint(module)
    settings = {"sparsity": 0.5, "batches": models.make_batches(4), "loss_fn": broken}
    with pytest.raises(error):
        find_masks(module, method, on_round=stop if "mode='" not in repr(method) else None, **settings)
    assert models.changes(module, before) == []


class WithTarget(models.MLP):
    """A forward pass that updates frozen weights of its own, as averaged teachers and codebooks do."""

    def __init__(self) -> None:
        super().__init__(4, 5, 3)
        self.target = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        with torch.no_grad():
            self.target.lerp_(outputs.mean(0).to(self.target.dtype), 0.5)
        return outputs


def test_find_masks__leaves_no_trace_on_weights_that_are_not_prunable() -> None:
    module = models.randomised(WithTarget())
    before = models.fingerprint(module)
    quietly(module, DRIVE(rounds=3), sparsity=0.5, batches=models.make_batches(4), loss_fn=models.loss_fn)
    assert models.changes(module, before) == []


def test_find_masks__optimizer_in_backward() -> None:
    """Hooks that step an optimizer as soon as a gradient is there must not train while scores are taken."""
    module = models.randomised(models.MLP(4, 5, 3))
    settings = {"sparsity": 0.5, "batches": models.make_batches(4), "loss_fn": models.loss_fn}
    expected = quietly(module, DRIVE(rounds=3), **settings)

    def step(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(0.1 * parameter.grad)
        parameter.grad = None

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    before = models.fingerprint(module)
    assert_equal(quietly(module, DRIVE(rounds=3), **settings), expected)
    assert models.changes(module, before) == []
    models.loss_fn(module, models.make_batches(4)[0]).backward()
    assert set(models.changes(module, before)) == {f"parameter {name}" for name, _ in module.named_parameters()}


@pytest.mark.parametrize("method", [DRIVE(rounds=2), SNIP()], ids=["DRIVE", "SNIP"])
def test_find_masks__half_precision_batches(method: Any) -> None:
    """A bfloat16 module is trained with bfloat16 batches: scoring in float32 must take them too."""
    module = models.randomised(models.MLP(4, 8, 3)).bfloat16()
    batches = models.make_batches(4, dtype=torch.bfloat16)
    expected = quietly(
        models.randomised(models.MLP(4, 8, 3)).bfloat16().float(),
        method,
        sparsity=0.5,
        batches=[(inputs.float(), labels) for inputs, labels in batches],
        loss_fn=models.loss_fn,
    )
    found = quietly(module, method, sparsity=0.5, batches=batches, loss_fn=models.loss_fn)
    assert_equal(found, expected)


# --- going on from masks


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_find_masks__continues(schedule: str) -> None:
    """From half to 90 %: the counts go on from there and nothing returns."""
    module = models.MLP(10, 10, 10, bias=False)
    start = find_masks(module, Random(seed=1), sparsity=0.5)
    history = quietly(module, Random(rounds=2, seed=2), sparsity=0.9, masks=start, schedule=schedule)
    assert counts(history) == [round(200 * (0.5 * 0.2**0.5)) if schedule == "exponential" else 60, 20]
    for masks in history:
        assert all((masks[name] <= start[name]).all() for name in masks)


@pytest.mark.parametrize("seed", range(3))
def test_find_masks__continues_as_one_run(seed: int) -> None:
    """Five rounds to the square root of the density and five more are ten rounds, where the batches go on too."""
    module, batches, _ = build("mlp", seed)
    settings = {"loss_fn": models.loss_fn}
    target = 1 - 0.5**2
    whole = quietly(module, DRIVE(rounds=6), sparsity=target, batches=batches[:6], **settings)
    first = quietly(module, DRIVE(rounds=3), sparsity=0.5, batches=batches[:3], **settings)
    assert_equal(first, whole[:3])
    rest = quietly(module, DRIVE(rounds=3), sparsity=target, batches=batches[3:6], masks=Masks(first[-1]), **settings)
    assert_equal(rest, whole[3:])


@pytest.mark.parametrize("num_weights", [5, 7, 10, 1003])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_find_masks__continues_at_the_same_sparsity(num_weights: int, sparsity: float) -> None:
    """Rounding may leave a little less than asked for (5 weights, half: 2); asking again changes nothing."""
    module = models.InnerProduct(num_weights)
    masks = find_masks(module, Magnitude(), sparsity=sparsity)
    assert find_masks(module, Magnitude(rounds=3), sparsity=sparsity, masks=masks) == masks


def test_find_masks__continues_layerwise_beside_an_empty_layer() -> None:
    """A layer that an earlier, global cut emptied stays empty; the others are cut."""
    module = models.MLP(4, 5, 3, bias=False)
    start = Masks({"0.weight": torch.zeros(5, 4, dtype=torch.bool), "2.weight": torch.ones(3, 5, dtype=torch.bool)})
    masks = quietly(module, Magnitude(), sparsity=0.8, masks=start, scope="layerwise")[-1]
    assert [int(mask.sum()) for mask in masks.values()] == [0, 3]


def test_find_masks__empty_masks_are_no_masks() -> None:
    module = models.InnerProduct(10)
    assert find_masks(module, Magnitude(), sparsity=0.5, masks=Masks()) == find_masks(module, Magnitude(), sparsity=0.5)


def mlp_masks(first: Any = (5, 4), **more: Any) -> dict[str, Tensor]:
    masks = {"0.weight": torch.ones(first, dtype=torch.bool), "2.weight": torch.ones(3, 5, dtype=torch.bool)}
    return masks | more


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        pytest.param(mlp_masks(fc=torch.tensor([True])), ValueError, "but fc is in only one of the two", id="too_many"),
        pytest.param({"0.weight": mlp_masks()["0.weight"]}, ValueError, "but 2.weight is in only one", id="too_few"),
        pytest.param(mlp_masks((4, 5)), ValueError, r"mask of '0.weight' has shape \(4, 5\)", id="shape"),
        pytest.param(
            mlp_masks() | {"2.weight": torch.ones(3, 5)}, TypeError, "mask of '2.weight' must be a bool", id="dtype"
        ),
        pytest.param(
            {name: torch.zeros_like(mask) for name, mask in mlp_masks().items()},
            ValueError,
            "already have sparsity 1, more than the `sparsity` of 0.5",
            id="all_pruned",
        ),
    ],
)
def test_find_masks__masks_error(masks: dict[str, Tensor], error: type[Exception], message: str) -> None:
    module = models.MLP(4, 5, 3)
    before = models.fingerprint(module)
    with pytest.raises(error, match=message):
        find_masks(module, Magnitude(), sparsity=0.5, masks=masks)
    assert models.changes(module, before) == []


def test_find_masks__already_sparser_error() -> None:
    module = models.InnerProduct(10)
    masks = find_masks(module, Magnitude(), sparsity=0.8)
    with pytest.raises(ValueError, match=r"already have sparsity 0.8, more than the `sparsity` of 0.5 asked for"):
        find_masks(module, Magnitude(), sparsity=0.5, masks=masks)


# --- which weights


def test_find_masks__include_and_exclude() -> None:
    module = models.MLP(4, 5, 3, 2)
    assert list(find_masks(module, Magnitude(), sparsity=0.5, exclude=["4.*"])) == ["0.weight", "2.weight"]
    masks = find_masks(module, Magnitude(), sparsity=0.5, include=["2.*", "4.*"])
    assert (list(masks), masks.num_prunable) == (["2.weight", "4.weight"], 15 + 6)


@EACH_METHOD
@pytest.mark.parametrize(
    ("module", "shape"), [(models.Tied(), (4,)), (models.Attention(), (16,))], ids=["tied", "attention"]
)
def test_find_masks__other_networks(method: Any, module: nn.Module, shape: tuple[int, ...]) -> None:
    module, data = models.randomised(module), {"batches": models.make_batches(*shape), "loss_fn": models.loss_fn}
    if isinstance(method, SynFlow) and isinstance(module, models.Attention):
        with pytest.raises(ValueError, match=r"not defined for 'attention' \(multi_head_attention_forward\)"):
            quietly(module, method, sparsity=0.5, **data)
        return
    masks = quietly(module, method, sparsity=0.5, **data)[-1]
    assert list(masks) == list(prunable.prunable_parameters(module))
    assert counts([masks]) == [sum(mask.numel() for mask in masks.values()) // 2]


def test_find_masks__tied_weight_counts_both_uses() -> None:
    """Where one weight is used twice, both gradients are summed, as in the explicit algorithm."""
    module = models.randomised(models.Tied()).double()
    batches = models.make_batches(4, dtype=torch.float64)
    names = ["first.weight", "head.weight"]
    expected = reference.drive(module, names, batches, models.loss_fn, sparsity=0.6, rounds=4)
    assert_equal(quietly(module, DRIVE(rounds=4), sparsity=0.6, batches=batches, loss_fn=models.loss_fn), expected)


# --- warnings


def test_find_masks__cut_inside_zeros_warns() -> None:
    scores = {"layer.weight": torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]])}
    (text,) = caught(models.InnerProduct(5), Fixed(scores), sparsity=0.4)
    assert text.startswith("In round 1 only 2 weights had a score above zero, fewer than the 3 to keep")
    (text,) = caught(models.InnerProduct(5), Fixed(scores), sparsity=0.4, scope="layerwise")
    assert text.startswith("In round 1 only 2 weights in 'layer.weight' had a score above zero")


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.8], ids=["nothing_cut", "cut_at_the_zeros", "cut_above"])
def test_find_masks__zeros_need_no_warning(sparsity: float) -> None:
    scores = {"layer.weight": torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]])}
    assert caught(models.InnerProduct(5), Fixed(scores), sparsity=sparsity) == []


@dataclass(frozen=True)
class FixedByBatch(Fixed):
    """Its zeros are those of a batch, as with DRIVE and SNIP: with the next one, they might have been others."""

    batches_per_round: int = 1


@dataclass(frozen=True)
class Growing:
    """With every batch, more weights have a score: one that an earlier cut took by position may be worth something."""

    rounds: int = 5
    mode: str = "eval"
    batches_per_round: int = 1
    calls: Iterator[int] = field(default_factory=lambda: count(1))

    def score(self, network: Network) -> dict[str, Tensor]:
        scores = torch.zeros(1, 20)
        scores[0, : next(self.calls)] = 1.0
        return {"layer.weight": scores}


def test_find_masks__cuts_inside_zeros_warn_once() -> None:
    """20 weights go to 14, 11, 8, 6 and 4; 1, 2, 3, 4 and 5 of them have a score: four cuts fell inside zeros."""
    (text,) = caught(models.InnerProduct(20), Growing(), sparsity=0.8)
    assert text.startswith("In round 1 only 1 weights")
    assert text.endswith("or a longer warm-up give fewer zeros. This happened 4 times.")


def test_find_masks__zeros_of_every_batch_need_no_warning() -> None:
    """As of the taps of a kernel that only see padding: they go first, in whichever round."""
    scores = {"layer.weight": torch.tensor([[0.0] * 15 + [1.0, 2.0, 3.0, 4.0, 5.0]])}
    assert caught(models.InnerProduct(20), FixedByBatch(scores, rounds=5), sparsity=0.8) == []
    (text,) = caught(models.InnerProduct(20), FixedByBatch(scores, rounds=5), sparsity=0.7)
    assert text.startswith("In round 5 only 5 weights had a score above zero, fewer than the 6 to keep")


@pytest.mark.parametrize(
    ("lacking", "named"), [(["score"], "'score'"), (["mode", "score"], "'mode' and no 'score'")], ids=["one", "two"]
)
def test_find_masks__half_a_method_error(lacking: list[str], named: str) -> None:
    half = SimpleNamespace(**{name: 1 for name in ("rounds", "mode", "score") if name not in lacking})
    with pytest.raises(TypeError, match=f"must be an instance of a method.*, which has no {named}\\."):
        find_masks(models.InnerProduct(5), half, sparsity=0.5)


def test_find_masks__zeros_that_stay_go_first() -> None:
    """Where no batch is read, a zero is a zero in every round: only the last cut tells whether too few had a score."""
    scores = {"layer.weight": torch.tensor([[0.0] * 18 + [1.0, 2.0]])}
    assert caught(models.InnerProduct(20), Fixed(scores, rounds=5), sparsity=0.9) == []
    (text,) = caught(models.InnerProduct(20), Fixed(scores, rounds=5), sparsity=0.8)
    assert text.startswith("In round 5 only 2 weights had a score above zero, fewer than the 4 to keep")
    assert text.endswith("Layers that start at zero, and kernel taps that only ever see padding, have such scores.")


@pytest.mark.parametrize(
    ("method", "scope", "helps"),
    [
        (SNIP(), "global", "More rounds, a lower `sparsity` or `scope='layerwise'` commonly help"),
        (SynFlow(rounds=1), "layerwise", "More rounds or a lower `sparsity` commonly help"),
        (Magnitude(), "global", "A lower `sparsity` or `scope='layerwise'` commonly help"),
        (Random(), "layerwise", "A lower `sparsity` commonly helps"),
    ],
)
def test_find_masks__collapse_remedies(method: Any, scope: Any, helps: str) -> None:
    """They are what is not set yet, and can help: masks by fixed scores are those of one round."""
    torch.manual_seed(0)
    module, batches = models.MLP(8, 8, 8, 8, 8), [torch.randn(4, 8)]
    settings = {"batches": batches, "loss_fn": lambda module, x: module(x).square().mean()}
    texts = caught(module, method, sparsity=0.985, scope=scope, **settings)
    assert (
        f"The network is cut off: no path from its input to its output is left, so it cannot learn. {helps}." in texts
    )


def test_find_masks__layer_collapse_warns() -> None:
    module = models.MLP(4, 5, 3, bias=False)
    scores = {"0.weight": torch.ones(5, 4), "2.weight": torch.full((3, 5), 2.0)}
    (text,) = caught(module, Fixed(scores), sparsity=0.7)
    assert text.startswith("Layer collapse: no weight is left in '0.weight'.")


@pytest.mark.parametrize("given", ["example_input", "batches"])
def test_find_masks__path_collapse_warns(given: str) -> None:
    """No layer is empty, yet what reaches neuron 0 leaves by neuron 1 only."""
    module = models.MLP(2, 2, 2, bias=False)
    scores = {"0.weight": torch.tensor([[9.0, 8], [1, 1]]), "2.weight": torch.tensor([[1.0, 9], [1, 8]])}
    inputs = {"example_input": torch.zeros(1, 2)} if given == "example_input" else {"batches": models.make_batches(2)}
    (text,) = caught(module, Fixed(scores), sparsity=0.5, **inputs)
    assert text.startswith("The network is cut off: no path from its input to its output is left")


def test_find_masks__nothing_to_warn_of() -> None:
    module, batches, _ = build("residual_net")
    assert caught(module, DRIVE(rounds=10), sparsity=0.6, batches=batches, loss_fn=models.loss_fn) == []
    assert caught(module, SynFlow(rounds=10), sparsity=0.6, batches=batches) == []


def test_find_masks__unknown_paths_warn() -> None:
    (text,) = caught(models.MLP(4, 5, 3), Magnitude(), sparsity=0.1, example_input=torch.zeros(1, 7))
    assert text.startswith("Input-output paths could not be followed from the example input: RuntimeError")
    assert caught(models.MLP(4, 5, 3), Magnitude(), sparsity=0.1) == []


class Branch(nn.Module):
    """x + b(relu(a(x))) with a zero-initialised b, then a classifier: most weights have no flow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 3)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x + self.b(F.relu(self.a(x))))


def test_find_masks__part_without_flow_warns() -> None:
    texts = caught(Branch(), SynFlow(rounds=1), sparsity=0.5, example_input=torch.zeros(1, 4))
    assert texts[0].startswith("In round 1 only 12 weights had a score above zero, fewer than the 30 to keep")


class SilentBranch(nn.Module):
    """x + norm(a(x)) with a norm whose scale is 0, then a classifier: nothing comes through ``a``, of small weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3)
        nn.init.zeros_(self.norm.weight)
        nn.init.constant_(self.a.weight, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x + self.norm(self.a(x)))


def test_find_masks__silent_norm() -> None:
    """It is named where it did harm to scores by gradients, and nowhere else."""
    data = {"batches": models.make_batches(4), "loss_fn": models.loss_fn}
    for sparsity, harm in (
        (0.3, "In round 1 only 12 weights"),
        (0.7, "Layer collapse: no weight is left in 'a.weight'"),
    ):
        first, second = caught(SilentBranch(), SNIP(), sparsity=sparsity, **data)
        assert first.startswith(harm)
        assert second.startswith("The scale of 'norm.weight' is 0 throughout")
    assert caught(SilentBranch(), SNIP(), sparsity=0.0, **data) == []
    (text,) = caught(SilentBranch(), Magnitude(), sparsity=0.7)
    assert text.startswith("Layer collapse: no weight is left in 'a.weight'")


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.ReLU6(), r"'1' (hardtanh)"),
        (nn.Tanh(), "'1' (tanh)"),
        (nn.Sigmoid(), "'1' (sigmoid)"),
        (nn.LayerNorm(6), "'1' (layer_norm)"),
    ],
    ids=str,
)
def test_find_masks__few_layers_without_flow_warn(layer: nn.Module, named: str) -> None:
    module = nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    text = caught(module, SynFlow(rounds=3), sparsity=0.3, example_input=torch.zeros(1, 4))[0]
    assert text.startswith(f"SynFlow is not defined for {named}: saturating activations")


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (lambda: [nn.ReLU6(), nn.Linear(6, 6), nn.ReLU6()], r"'1' \(hardtanh\), '3' \(hardtanh\)"),
        (lambda: [nn.Tanh(), nn.Linear(6, 6), nn.Sigmoid()], r"'1' \(tanh\), '3' \(sigmoid\)"),
        (lambda: [nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6)], r"'1' \(layer_norm\), '3' \(layer_norm\)"),
        (lambda: [nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)], r"'1.self_attn' \(multi_head_attention"),
    ],
    ids=["relu6", "tanh_and_sigmoid", "layer_norm", "transformer"],
)
def test_find_masks__many_layers_without_flow_error(layers: Callable[[], list[nn.Module]], named: str) -> None:
    module = nn.Sequential(nn.Linear(4, 6), *layers(), nn.Linear(6, 3))
    before = models.fingerprint(module)
    with pytest.raises(ValueError, match=f"SynFlow is not defined for {named}.*too much of this network"):
        find_masks(module, SynFlow(), sparsity=0.3, example_input=torch.zeros(1, 5, 4))
    assert models.changes(module, before) == []


class Rms(nn.Module):
    """A normalisation that is written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Last(nn.Module):
    """The outputs of a recurrent layer."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (Last(nn.LSTM(4, 6, num_layers=2, bidirectional=True)), "'layer' (lstm)"),
        (nn.Sequential(nn.Linear(4, 4), Last(nn.GRU(4, 6)), nn.Linear(6, 3)), "'1.layer' (gru)"),
        (nn.Sequential(nn.Linear(4, 4), Last(nn.RNN(4, 6)), nn.Linear(6, 3)), "'1.layer' (rnn_tanh)"),
        (nn.Sequential(nn.Linear(4, 4), Rms(), nn.Linear(4, 4), Rms(), nn.Linear(4, 3)), "'1' (Rms), '3' (Rms)"),
    ],
    ids=["lstm", "gru", "rnn", "written_out"],
)
def test_find_masks__much_without_flow_error(module: nn.Module, named: str) -> None:
    """What counts is how many weights are in such layers, and how many layers there are for each parameter."""
    with pytest.raises(ValueError, match=f"SynFlow is not defined for {re.escape(named)}.*too much of this network"):
        find_masks(module, SynFlow(), sparsity=0.3, example_input=torch.zeros(1, 5, 4), include=["*weight*"])


@pytest.mark.parametrize(
    ("layer", "named"), [(Rms(), "'2' (Rms)"), (Last(nn.GRU(16, 2)), "'2.layer' (gru)")], ids=["written_out", "gru"]
)
def test_find_masks__little_without_flow_warns(layer: nn.Module, named: str) -> None:
    width = 2 if isinstance(layer, Last) else 16
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 0.01)  # gates that are not shut by large weights
    net = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 16), layer, nn.Linear(width, 16), nn.Linear(16, 3))
    texts = caught(net, SynFlow(rounds=2), sparsity=0.3, example_input=torch.zeros(1, 5, 4), include=["*weight*"])
    assert texts[0].startswith(f"SynFlow is not defined for {named}: saturating activations")


# --- errors


def zero_initialised() -> nn.Module:
    module = models.MLP(4, 5, 3)
    nn.init.zeros_(module[2].weight)
    return module


def square_roots(module: nn.Module, batch: models.Batch) -> Tensor:
    """Finite, but its gradient at the weight 0 is not."""
    return module.layer.weight.sqrt().sum()


BATCHES = models.make_batches(4)
GOOD: dict[str, Any] = {"sparsity": 0.5, "batches": BATCHES, "loss_fn": models.loss_fn}


@pytest.mark.parametrize(
    ("module", "method", "settings", "error", "message"),
    [
        pytest.param(models.MLP(4, 3), SNIP(), {"sparsity": 90}, ValueError, "got 90. For 90 % pass 0.9", id="percent"),
        pytest.param(models.MLP(4, 3), SNIP(), {"sparsity": 1.0}, ValueError, r"\[0, 1\), got 1.0", id="sparsity_1"),
        pytest.param(models.MLP(4, 3), SNIP(), {"sparsity": -0.1}, ValueError, "got -0.1", id="sparsity_negative"),
        pytest.param(models.MLP(4, 3), SNIP(), {"sparsity": float("nan")}, ValueError, "got nan", id="sparsity_nan"),
        pytest.param(models.MLP(4, 3), SNIP(), {"sparsity": "0.9"}, TypeError, "got '0.9'", id="sparsity_text"),
        pytest.param(
            models.MLP(4, 3),
            SNIP(),
            {"schedule": "square"},
            ValueError,
            "`schedule` must be one of 'exponential', 'linear', 'cubic', or a function, got 'square'",
            id="schedule",
        ),
        pytest.param(
            models.MLP(4, 3),
            SNIP(),
            {"scope": "local"},
            ValueError,
            "`scope` must be one of 'global', 'layerwise', 'erk', got 'local'",
            id="scope",
        ),
        pytest.param(
            models.MLP(4, 3), DRIVE, {}, TypeError, r"must be an instance .* `DRIVE\(rounds=100\)`", id="class"
        ),
        pytest.param(models.MLP(4, 3), "drive", {}, TypeError, "must be an instance .* got 'drive'", id="method_text"),
        pytest.param(nn.BatchNorm1d(4), SNIP(), {}, ValueError, "no trainable parameter to prune", id="not_prunable"),
        pytest.param(
            models.MLP(4, 3).requires_grad_(False), SNIP(), {}, ValueError, "`requires_grad` is False", id="frozen"
        ),
        pytest.param(
            models.MLP(4, 3), SNIP(), {"include": ["fc.*"]}, ValueError, r"pattern 'fc.\*' matches no", id="unmatched"
        ),
        pytest.param(models.MLP(4, 3), SNIP(), {"batches": []}, ValueError, "`batches` is empty", id="no_batch"),
        pytest.param(models.MLP(4, 3), SNIP(), {"batches": iter(())}, ValueError, "`batches` is empty", id="exhausted"),
        pytest.param(
            models.MLP(4, 3), SNIP(), {"batches": None}, ValueError, "needs `batches`, got None", id="batches"
        ),
        pytest.param(
            models.MLP(4, 3), DRIVE(), {"loss_fn": None}, ValueError, "needs `loss_fn`, got None", id="loss_fn"
        ),
        pytest.param(
            models.MLP(4, 3),
            DRIVE(),
            {"loss_fn": lambda m, b: m(b[0]).sum() * float("nan")},
            ValueError,
            "loss must be finite, got nan",
            id="loss_nan",
        ),
        pytest.param(
            models.MLP(4, 3),
            DRIVE(),
            {"loss_fn": lambda m, b: m(b[0])},
            ValueError,
            r"loss must be a scalar tensor, got a tensor of shape \(6, 3\)",
            id="loss_not_scalar",
        ),
        pytest.param(
            models.InnerProduct(4),
            DRIVE(),
            {"loss_fn": square_roots},
            ValueError,
            r"The scores of 'layer.weight' contain nan or inf \(1 of 4\)",
            id="score_not_finite",
        ),
        pytest.param(
            models.MLP(4, 3),
            SNIP(),
            {"loss_fn": lambda m, b: 0 * m(b[0]).sum()},
            ValueError,
            "Every score is zero",
            id="all_zero",
        ),
        pytest.param(
            models.MLP(4, 3),
            SNIP(),
            {"loss_fn": lambda m, b: m[0].bias.sum()},
            ValueError,
            r"does not depend on any prunable parameter \(0.weight\)",
            id="unrelated_loss",
        ),
        pytest.param(
            models.MLP(4, 3),
            SynFlow(),
            {"batches": None, "example_input": {"x": torch.ones(1, 4)}},
            ValueError,
            r"could not run the network on the example input: TypeError: .*'x'. Set `example_input` to what `forward`",
            id="wrong_example",
        ),
        pytest.param(
            models.MLP(4, 3),
            SynFlow(),
            {"batches": [torch.ones(2, 5)]},
            ValueError,
            r"could not run the network on the first tensor of a batch: .*\. Pass `example_input`: what `forward`",
            id="wrong_batch",
        ),
        pytest.param(zero_initialised(), SynFlow(), {}, ValueError, "synaptic flow R is 0: no signal", id="no_flow"),
        pytest.param(
            models.MLP(4, 3),
            SynFlow(),
            {"batches": None},
            ValueError,
            "input of the network is not known",
            id="no_shape",
        ),
        pytest.param(
            models.MLP(4, 3),
            SynFlow(),
            {"batches": ["text"]},
            ValueError,
            "input of the network is not",
            id="no_tensor",
        ),
    ],
)
def test_find_masks__error(
    module: nn.Module, method: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = models.fingerprint(module)
    with pytest.raises(error, match=message):
        find_masks(module, method, **(GOOD | settings))
    assert models.changes(module, before) == []


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None], ids=repr)
@pytest.mark.parametrize(
    ("method", "setting"),
    [
        (DRIVE, "rounds"),
        (DRIVE, "batches_per_round"),
        (SNIP, "rounds"),
        (SNIP, "batches_per_round"),
        (SynFlow, "rounds"),
        (Magnitude, "rounds"),
        (Random, "rounds"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_methods__count_error(method: Any, setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{setting}` must be a whole number of at least 1, got"):
        method(**{setting: value})


@pytest.mark.parametrize("method", [DRIVE, SNIP])
def test_methods__mode_error(method: Any) -> None:
    with pytest.raises(ValueError, match="`mode` must be one of 'train', 'eval', got 'test'"):
        method(mode="test")


# --- methods as values


def test_methods__defaults() -> None:
    assert repr(DRIVE()) == "DRIVE(rounds=100, batches_per_round=1, mode='train')"
    assert repr(SNIP()) == "SNIP(rounds=1, batches_per_round=1, mode='train')"
    assert (repr(SynFlow()), repr(Magnitude())) == ("SynFlow(rounds=100)", "Magnitude(rounds=1)")
    assert repr(Random()) == "Random(rounds=1, seed=0)"


@EACH_METHOD
def test_methods__frozen(method: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        method.rounds = 7
    assert replace(method, rounds=7).rounds == 7


@pytest.mark.parametrize(("most", "expected"), [(2, 2), (3, 3), (50, 3)])
def test_with_fewer_rounds(most: int, expected: int) -> None:
    assert methods.with_fewer_rounds(DRIVE(rounds=3, mode="eval"), most) == DRIVE(rounds=expected, mode="eval")


# --- search


def test_search__active() -> None:
    module = models.MLP(3, 2, 2, bias=False)
    scores = {"0.weight": torch.tensor([[9.0, 9, 9], [9, 0.1, 0.1]]), "2.weight": torch.tensor([[5.0, 0.1], [5, 0.1]])}
    parameters = prunable.prunable_parameters(module)
    found = search(module, Fixed(scores), sparsity=0.4, parameters=parameters, example_input=torch.zeros(1, 3))
    assert found.path_error is None
    assert {name: mask.int().tolist() for name, mask in found.masks.items()} == {
        "0.weight": [[1, 1, 1], [1, 0, 0]],
        "2.weight": [[1, 0], [1, 0]],
    }
    assert {name: mask.int().tolist() for name, mask in found.active.items()} == {
        "0.weight": [[1, 1, 1], [0, 0, 0]],
        "2.weight": [[1, 0], [1, 0]],
    }


def test_search__paths_of_a_module_with_another_forward() -> None:
    """No path can be followed, but masks there are."""
    module = models.MLP(3, 2, 2)
    module.forward = lambda left, right: left
    parameters = prunable.prunable_parameters(module)
    found = search(module, Magnitude(), sparsity=0.5, parameters=parameters, batches=models.make_batches(3))
    assert found.masks.sparsity == 0.5
    assert found.active is None
    assert found.path_error.startswith("the first tensor of a batch: TypeError: ")
    assert found.warnings == []


@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_search__one_round_at_a_time(schedule: str, scope: str) -> None:
    """The rounds of a method one by one, from the masks before, are the rounds in one go: IMP trains in between."""
    module, batches, _ = build("conv_net")
    settings: dict[str, Any] = {
        "sparsity": 0.9,
        "schedule": schedule,
        "scope": scope,
        "parameters": prunable.prunable_parameters(module),
        "batches": batches[:1],
        "loss_fn": models.loss_fn,
    }
    history: History = []
    search(module, DRIVE(rounds=5), on_round=lambda _, masks: history.append(dict(masks)), **settings)
    masks = None
    for index, expected in enumerate(history, 1):
        masks = search(module, DRIVE(rounds=5), only_round=index, masks=masks, **settings).masks
        assert masks == Masks(expected)


def test_search__shuffle() -> None:
    """The masks are shuffled after the last round, and paths are followed in what comes out."""
    module, batches, _ = build("mlp")
    settings: dict[str, Any] = {
        "sparsity": 0.9,
        "parameters": prunable.prunable_parameters(module),
        "batches": batches,
        "loss_fn": models.loss_fn,
    }
    plain = search(module, SNIP(), **settings)
    generator = torch.Generator().manual_seed(1)
    shuffled = search(module, SNIP(), shuffle=lambda masks: masks.shuffled(generator), **settings)
    assert shuffled.masks == plain.masks.shuffled(torch.Generator().manual_seed(1))
    assert shuffled.active == Masks(paths.active_masks(module, shuffled.masks, batches[0][0]))
