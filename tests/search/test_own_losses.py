"""Methods of one's own: batches, losses with a graph, and means over processes, by public names alone."""

import warnings
from collections.abc import Callable
from itertools import islice
from typing import Any

import models
import own_methods
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_drive import DRIVE, SNIP, Masks, find_masks
from lightning_drive.core.processes import ALONE, Ranks
from lightning_drive.network import prunable
from lightning_drive.search.scored_network import Network

BATCHES = models.make_batches(4, count=5, size=8, dtype=torch.float64)


class Own:
    """A method that scores by any function of the network."""

    mode = "train"
    reads = "loss"

    def __init__(self, score: Callable[[Any], dict[str, Tensor]], rounds: int = 1, **attributes: Any) -> None:
        self.score, self.rounds = score, rounds
        vars(self).update(attributes)


def mlp() -> nn.Module:
    return models.randomised(models.MLP(4, 6, 3)).double()


def gradients(network: Any, value: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, [*network.weights.values()], **options)


def squared(network: Any) -> dict[str, Tensor]:
    """The square of the loss's gradient on one batch."""
    [batch] = network.batches(1)
    return dict(zip(network.weights, (g.square() for g in gradients(network, network.loss(batch))), strict=True))


def found(
    module: nn.Module, method: Any, *, batches: Any = BATCHES, loss_fn: Any = models.loss_fn, **others: Any
) -> Masks:
    """Find masks, and see that nothing is left behind."""
    before = models.fingerprint(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        masks = find_masks(module, method, sparsity=0.6, batches=batches, loss_fn=loss_fn, **others)
    assert models.changes(module, before) == []
    assert all(parameter.grad is None for parameter in module.parameters())
    return masks


# --- against oracles


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("num_batches", [1, 3])
@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: models.MLP(4, 6, 3), (4,)),
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)), (4,)),
        (models.ConvNet, (2, 4, 4)),
    ],
    ids=["mlp", "tanh", "conv_net"],
)
def test_grasp_of_the_page(make: Any, shape: tuple[int, ...], mode: str, num_batches: int, scope: Any) -> None:
    """The second example of the documentation is GraSP: its masks are those of an explicit Hessian."""
    module = models.randomised(make()).double()
    batches = models.make_batches(*shape, count=4, size=8, dtype=torch.float64)
    names = [*prunable.prunable_parameters(module)]
    settings = {"sparsity": 0.6, "scope": scope}
    [expected] = reference.grasp(module, names, batches[:num_batches], models.loss_fn, mode=mode, **settings)
    method = own_methods.on_page("GraSP")(batches_per_round=num_batches, mode=mode)
    assert found(module, method, batches=batches, scope=scope) == Masks(expected)


def test_grasp_of_the_page__has_both_signs() -> None:
    """It keeps other weights than by size, in either direction."""
    module, grasp = mlp(), own_methods.on_page("GraSP")()
    with Network.of(
        module, ["0.weight", "2.weight"], "train", batches=BATCHES, loss_fn=models.loss_fn, example_input=None
    ) as network:
        scores = torch.cat([score.flatten() for score in grasp.score(network).values()])
    assert (scores > 0).any()
    assert (scores < 0).any()


def test_fisher_of_the_page() -> None:
    """Its scores are the mean, over the samples of a batch, of squares of theta times the gradient of one sample."""
    module = mlp()
    images, labels = BATCHES[0]
    expected = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters() if "weight" in name}
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(module(image), label)
        for name in expected:
            parameter = module.get_parameter(name)
            [gradient] = torch.autograd.grad(loss, [parameter], retain_graph=True)
            expected[name] += (parameter.detach() * gradient).square()
    alive = {name: torch.ones_like(score, dtype=torch.bool) for name, score in expected.items()}
    masks = found(module, own_methods.on_page("Fisher")())
    assert masks == Masks(reference.keep_highest(expected, masks.num_kept, alive))


def test_snip_from_losses() -> None:
    """A method that is written by losses with a graph finds the masks of SNIP, on the same batches in every round."""

    def score(network: Any) -> dict[str, Tensor]:
        weights = network.weights
        parts = [gradients(network, network.loss(batch)) for batch in network.batches(2)]
        return {
            name: (weight * sum(part)).abs()
            for (name, weight), part in zip(weights.items(), zip(*parts, strict=True), strict=True)
        }

    expected = found(mlp(), SNIP(rounds=4, batches_per_round=2))
    assert found(mlp(), Own(score, rounds=4)) == expected


def by_backward(network: Any) -> dict[str, Tensor]:
    """The size of the loss's gradient on one batch, from ``.grad``."""
    [batch] = network.batches(1)
    network.loss(batch).backward()
    return {name: weight.grad.abs() for name, weight in network.weights.items()}


def by_loss_gradients(network: Any) -> dict[str, Tensor]:
    return {name: gradient.abs() for name, gradient in network.loss_gradients(1).items()}


def test_backward() -> None:
    """``backward()`` and ``.grad`` work as well, and nothing is carried over to the next round."""
    assert found(mlp(), Own(by_backward, rounds=3)) == found(mlp(), Own(by_loss_gradients, rounds=3))


def test_backward__is_not_added_to_loss_gradients() -> None:
    def score(network: Any) -> dict[str, Tensor]:
        by_backward(network)
        return by_loss_gradients(network)

    assert found(mlp(), Own(score)) == found(mlp(), Own(by_loss_gradients), batches=BATCHES[1:])


# --- batches


def labels(batches: Any) -> list[int]:
    return [int(batch[1][0] + 10 * batch[1].sum()) for batch in batches]


def test_batches__in_order_and_cycled() -> None:
    """Rounds go on where the last one ended; all ways to read batches read the same ones."""
    seen: list[Any] = []

    def score(network: Any) -> dict[str, Tensor]:
        seen.extend(network.batches(2))
        seen.append(next(network.batches()))
        seen.extend(islice(network.batches(), 1))
        network.loss_gradients(1)
        return {name: weight.abs() for name, weight in network.weights.items()}

    found(mlp(), Own(score, rounds=3))
    places = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]  # the fifth is read by `loss_gradients` each time
    assert labels(seen) == [labels(BATCHES)[place] for place in places]


@pytest.mark.parametrize("number", [0, -1, 1.5, "2"])
def test_batches__count_error(number: Any) -> None:
    with pytest.raises(ValueError, match="`number` must be a whole number of at least 1, got"):
        found(mlp(), Own(lambda network: [*network.batches(number)]))


@pytest.mark.parametrize("how", [lambda network: [*network.batches(1)], squared], ids=["batches", "loss"])
def test_batches__none_error(how: Any) -> None:
    with pytest.raises(ValueError, match="scores by a loss on batches, so it needs `batches`, got None"):
        found(mlp(), Own(how), batches=None)
    with pytest.raises(ValueError, match="nothing to score on: `batches` is empty"):
        found(mlp(), Own(how), batches=[])


# --- losses


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (None, "it needs `loss_fn`, got None"),
        (lambda module, batch: None, "got None, .* cannot skip a batch: leave such batches out"),
        (
            lambda module, batch: models.loss_fn(module, batch).detach(),
            "has no gradient .* cannot skip a batch: leave such batches out",
        ),
        (lambda module, batch: module[0].bias.sum(), r"not depend on any prunable parameter \(0.weight, 2.weight\)"),
        (lambda module, batch: module(batch[0]), r"must be a scalar tensor, got a tensor of shape \(8, 3\)"),
        (lambda module, batch: models.loss_fn(module, batch) * torch.nan, "loss must be finite, got nan"),
    ],
    ids=["missing", "none", "detached", "of_a_bias", "vector", "nan"],
)
def test_loss__error(loss_fn: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(mlp(), Own(squared), loss_fn=loss_fn)


def test_loss__in_full_precision() -> None:
    """A network in half precision is scored in float32, on batches in it."""
    kinds: set[torch.dtype] = set()

    def score(network: Any) -> dict[str, Tensor]:
        scores = squared(network)
        kinds.update(score.dtype for score in scores.values())
        return scores

    halves = [(images.half(), classes) for images, classes in BATCHES]
    found(mlp().half(), Own(score), batches=halves)
    assert kinds == {torch.float32}


class WithMore(nn.Module):
    """Has a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.unused = mlp(), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_loss__unreached_parameters() -> None:
    """What the loss does not depend on is left out, as with the methods of the package."""

    def score(network: Any) -> dict[str, Tensor]:
        [batch] = network.batches(1)
        parts = gradients(network, network.loss(batch), materialize_grads=True)
        return dict(zip(network.weights, (part.abs() for part in parts), strict=True))

    module = WithMore()
    with pytest.warns(UserWarning, match=r"'unused.weight' had no gradient in any round"):
        masks = find_masks(module, Own(score), sparsity=0.5, batches=BATCHES, loss_fn=models.loss_fn)
    assert [*masks] == ["net.0.weight", "net.2.weight"]


class Checkpointed(nn.Module):
    """Drops out by a function, in a part that is computed again for the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.last, self.use_reentrant = nn.Linear(4, 6), nn.Linear(6, 3), use_reentrant
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Any = checkpoint(
            lambda x: F.dropout(self.first(x).tanh()), x.requires_grad_(), use_reentrant=self.use_reentrant
        )
        return self.last(hidden)


def with_zeros(network: Any) -> dict[str, Tensor]:
    [batch] = network.batches(1)
    parts = gradients(network, network.loss(batch), materialize_grads=True)
    return dict(zip(network.weights, (part.abs() for part in parts), strict=True))


@pytest.mark.parametrize(
    ("use_reentrant", "score"),
    [(True, by_backward), (False, by_backward), (False, with_zeros)],
    ids=["reentrant", "backward", "grad"],
)
def test_loss__of_a_checkpoint(use_reentrant: bool, score: Any) -> None:
    """Dropout is off in both passes, and what a reentrant checkpoint hides from the graph is not left out."""
    torch.manual_seed(0)
    module = Checkpointed(use_reentrant)
    batches = [(images.clone(), classes) for images, classes in BATCHES]
    masks = found(module, Own(by_loss_gradients), batches=batches)
    assert [*masks] == ["first.weight", "last.weight"]
    assert found(module, Own(score), batches=batches) == masks
    expected = found(module, Own(by_loss_gradients), batches=batches, include=["first.weight"])
    assert found(module, Own(score), batches=batches, include=["first.weight"]) == expected


@pytest.mark.parametrize("reads", ["weights", "shape"])
@pytest.mark.parametrize("score", [squared, lambda network: network.loss_gradients(1)], ids=["loss", "loss_gradients"])
def test_reads__is_not_what_it_reads(reads: str, score: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"`Own.reads` is '{reads}', but its `score` has read the loss. Set `reads = 'loss'`"
    ):
        found(mlp(), Own(score, reads=reads))


def test_reads__may_be_missing() -> None:
    method = Own(squared)
    method_without: Any = type(
        "Undeclared", (), {"rounds": 1, "mode": "train", "score": lambda _, network: squared(network)}
    )
    assert found(mlp(), method_without()) == found(mlp(), method)


# --- means


class OfTwo(Ranks):
    """Stands for the first of two ranks, the other of which has only zeros."""

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor])

    def mean_(self, tensors: Any) -> None:
        for tensor in tensors:
            tensor.div_(2)


def network_of(ranks: Ranks) -> Network:
    module = mlp()
    return Network(module, prunable.prunable_parameters(module), ranks=ranks)


def test_mean__of_one_process() -> None:
    """Nothing is averaged, and no graph left."""
    tensor = torch.ones(3, dtype=torch.float64, requires_grad=True)
    means = network_of(ALONE).mean(value for value in (2 * tensor, torch.ones(3, dtype=torch.bfloat16)))
    assert [mean.tolist() for mean in means] == [[2, 2, 2], [1, 1, 1]]
    assert [mean.dtype for mean in means] == [torch.float64, torch.float32]
    assert not any(mean.requires_grad for mean in means)


def test_mean__of_two_processes() -> None:
    """What is given stays as it is, also where it shares memory or has another order in it."""
    given = [torch.ones(2, 3).t(), torch.ones(1).expand(4), torch.ones(2, requires_grad=True)]
    means = network_of(OfTwo(size=2)).mean(given)
    assert [mean.tolist() for mean in means] == [[[0.5, 0.5]] * 3, [0.5] * 4, [0.5] * 2]
    assert all(mean.is_contiguous() for mean in means)
    assert all((tensor == 1).all() for tensor in given)


def test_mean__error() -> None:
    with pytest.raises(TypeError, match=r"`network.mean` takes tensors, got 'weight' among them"):
        network_of(ALONE).mean({"weight": torch.ones(1)})


def test_methods_of_the_package_are_not_averaged_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients are averaged already; scores are only where a loss was read."""
    monkeypatch.setattr(Network, "mean", pytest.fail)
    assert found(mlp(), DRIVE(rounds=2)).num_kept == 17
