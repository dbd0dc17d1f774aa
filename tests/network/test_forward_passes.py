"""A forward pass goes through the network as training does, and what it returns is what the network computes."""

import warnings
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import models
import pytest
import searches
import torch
import torch.nn.functional as F
from followed import Between, dense_masks
from searches import Searched
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_drive import SNIP, Magnitude, SynFlow, find_masks
from lightning_drive.network import forward_passes, paths, prunable, synflow
from lightning_drive.network.forward_passes import ForwardPass
from lightning_drive.network.masks import Masks
from lightning_drive.network.prunable import prunable_parameters

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Coder(nn.Module):
    """An autoencoder whose ``forward`` is the encoder alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)  # type: ignore[no-any-return]


class Variational(Coder):
    """Between the two parts stands a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 6, bias=False)


class Graphs(SimpleNamespace):
    def to(self, device: Any) -> "Graphs":
        return self


class Graph(nn.Module):
    """Takes a batch of graphs as one object."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, graphs: Graphs) -> Tensor:
        hidden = self.encoder(graphs.x)
        source, target = graphs.edges
        hidden = torch.zeros_like(hidden).index_add(0, target, hidden[source])
        return self.decoder(hidden)  # type: ignore[no-any-return]


class Two(nn.Module):
    """Takes two inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor, *, gate: Tensor) -> Tensor:
        return self.decoder(self.encoder(x) * gate[:, :3])  # type: ignore[no-any-return]


class Taught(Coder):
    """Has a teacher that runs without gradients, and a metric and a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.criterion = nn.Linear(4, 4).requires_grad_(False), nn.MSELoss()


def by_parts(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module.decoder(module.encoder(batch)), batch)


def by_methods(module: Any, batch: Any) -> Tensor:
    """Calls ``forward`` and no hook."""
    return F.mse_loss(module.decoder(module.forward(batch).relu()), batch)


def sampled(module: Any, batch: Any) -> Tensor:
    mean, scale = module.encoder(batch).chunk(2, 1)
    return F.mse_loss(module.decoder(mean + torch.randn_like(mean) * scale.exp()), batch)


def on_graphs(module: Any, batch: Any) -> Tensor:
    return module(Graphs(x=batch, edges=torch.tensor([[0, 1, 2], [1, 2, 0]]))).square().mean()  # type: ignore[no-any-return]


def by_name(module: Any, batch: Any) -> Tensor:
    return module(x=batch, gate=batch).square().mean()  # type: ignore[no-any-return]


def taught(module: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        goal = module.teacher(batch)
    return module.criterion(module.decoder(module.encoder(batch)), goal)  # type: ignore[no-any-return]


def twice(module: Any, batch: Any) -> Tensor:
    """A siamese network."""
    return F.mse_loss(module(batch), module(batch.flip(0)))


CASES = [
    pytest.param(Coder, by_parts, id="parts"),
    pytest.param(Coder, by_methods, id="methods"),
    pytest.param(Variational, sampled, id="sample_in_between"),
    pytest.param(Graph, on_graphs, id="batch_object"),
    pytest.param(Two, by_name, id="keywords"),
    pytest.param(Taught, taught, id="teacher"),
]


def search(module: nn.Module, method: Any, loss_fn: Any, **masks: Any) -> tuple[Masks, Searched]:
    """Find masks of half of the weights, or of as many as others leave, and what they mean."""
    sparsity = masks["masks"].sparsity if masks else 0.5
    parameters = prunable_parameters(module)
    result = searches.search(
        module, method, parameters=parameters, sparsity=sparsity, batches=[X], loss_fn=loss_fn, **masks
    )
    return result.masks, result


@pytest.mark.parametrize("method", [SNIP(), Magnitude()], ids=["snip", "magnitude"])
@pytest.mark.parametrize(("kind", "loss_fn"), CASES)
def test_paths_follow_training(kind: type[nn.Module], loss_fn: Any, method: Any) -> None:
    """What nothing is left in front of, or behind, is inactive, in parts that ``forward`` never reaches, too."""
    torch.manual_seed(0)
    module = kind()
    with torch.no_grad():  # unit 0 gets nothing; what unit 1 gives goes nowhere
        module.encoder.weight[0::3] = 0
        module.encoder.weight[1::3] = 1
        module.encoder.weight[2::3] = 2
        module.decoder.weight[:] = torch.tensor([5.0, 0.0, 3.0])
    masks = Masks({name: parameter != 0 for name, parameter in prunable_parameters(module).items()})
    kept, diagnosis = search(module, method, loss_fn, masks=masks)
    active = diagnosis.active
    assert diagnosis.path_error is None
    assert active is not None
    assert kept == masks
    rows = active["encoder.weight"].any(1).tolist()
    assert rows == [False, False, True] * (len(rows) // 3)
    assert not active["decoder.weight"][:, :2].any()  # the noise of a sample is no input, either
    assert active["decoder.weight"][:, 2].all()


@pytest.mark.parametrize(("kind", "loss_fn"), CASES)
def test_multiply_adds_follow_training(kind: type[nn.Module], loss_fn: Any) -> None:
    """Those of one sample."""
    masks, diagnosis = search(kind(), SNIP(), loss_fn)
    costs = diagnosis.costs
    sizes = {name: mask.numel() for name, mask in masks.items()}
    if kind is Graph:  # whose samples cannot be told apart
        assert costs.multiply_adds == {name: 6 * size for name, size in sizes.items()}
        assert "whole batch" in costs.warnings[-1]
    else:
        assert costs.multiply_adds == sizes
        assert costs.warnings == ()


@pytest.mark.parametrize("loss_fn", [by_parts, by_methods])
def test_synflow_follows_training(loss_fn: Any) -> None:
    """It scores the decoder as the same layers in a row, with or without an example for ``forward``."""
    torch.manual_seed(0)
    module = Coder()
    row = nn.Sequential(module.encoder, module.decoder)
    expected = find_masks(row, SynFlow(rounds=3), sparsity=0.5, example_input=X)
    for example_input in (None, X):
        masks = find_masks(
            module, SynFlow(rounds=3), sparsity=0.5, batches=[X], loss_fn=loss_fn, example_input=example_input
        )
        assert [mask.tolist() for mask in masks.values()] == [mask.tolist() for mask in expected.values()]


def test_twice_the_same_network_is_called_once() -> None:
    """Its paths and multiply-adds are those of one input."""
    _, diagnosis = search(Coder(), SNIP(), twice)
    assert diagnosis.costs.multiply_adds["encoder.weight"] == 12


def test_unused_is_not_inactive() -> None:
    """Where no loss is known, nothing is known of what ``forward`` does not use."""
    torch.manual_seed(0)
    module = Coder()
    masks = Masks({name: torch.rand_like(value) > 0.5 for name, value in module.named_parameters()})
    active = paths.active_masks(module, masks, X)
    assert active["decoder.weight"].equal(masks["decoder.weight"])


@pytest.mark.parametrize("container", [dict, UserDict])
def test_entries_of_a_batch_go_by_name(container: Any) -> None:
    """A mapping goes to ``forward`` by name where that has such arguments; labels and the like are left out."""
    batch = container(gate=X, x=X, labels=torch.zeros(6))
    masks = find_masks(Two(), SynFlow(rounds=2), sparsity=0.5, batches=[batch])
    again = find_masks(Two(), SynFlow(rounds=2), sparsity=0.5, example_input={"gate": X, "x": X})
    assert masks.num_kept == again.num_kept == 9


@pytest.mark.parametrize("batch", [(X, torch.zeros(6)), {"image": X, "label": torch.zeros(6)}, [X]], ids=str)
def test_first_tensor_is_the_input(batch: Any) -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    chosen = forward_passes.first_that_runs(module, ForwardPass.guessed(module, batch))
    assert chosen is not None
    (output,) = chosen.run(module, forward_passes.as_input_of(module))
    assert output.shape == (1, 3)


def test_whole_batch_is_the_input() -> None:
    """Where ``forward`` takes the batch itself."""

    class Unpacks(nn.Sequential):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch["x"])  # type: ignore[no-any-return]

    module = Unpacks(nn.Linear(4, 3))
    chosen = forward_passes.first_that_runs(module, ForwardPass.guessed(module, {"y": torch.zeros(2), "x": X}))
    assert chosen is not None
    assert chosen.run(module, forward_passes.as_input_of(module))[0].shape == (6, 3)


def test_more_than_a_sample_where_one_is_too_few() -> None:
    """A network that compares its samples is given all of them."""

    class Contrast(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) < 2:
                raise ValueError("nothing to compare with")
            return super().forward(x)

    module = Contrast(4, 3)
    masks = find_masks(module, SynFlow(rounds=2), sparsity=0.5, example_input=X)
    assert masks.num_kept == 6


def test_lists_of_images() -> None:
    """Images of several sizes, as detectors take them."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            features = torch.stack([self.body(image).mean((1, 2)) for image in images])
            return {"scores": self.head(features)}

    def loss_fn(module: Any, batch: Any) -> Tensor:
        images, targets = batch
        labels = torch.stack([target["label"] for target in targets])
        return F.cross_entropy(module(images, targets)["scores"], labels)

    batch = [torch.randn(3, 8, 8), torch.randn(3, 6, 9)], [{"label": torch.tensor(0)}, {"label": torch.tensor(1)}]
    module = Detector()
    parameters = prunable_parameters(module)
    result = searches.search(module, SNIP(), parameters=parameters, sparsity=0.5, batches=[batch], loss_fn=loss_fn)
    assert result.path_error is None
    assert result.active is not None
    assert result.active.num_kept <= result.masks.num_kept


def test_losses_of_forward_are_no_output() -> None:
    """A network that is given its labels returns a loss beside its output; the output is what counts."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.fc(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    (output,) = ForwardPass.of({"x": X, "labels": torch.zeros(6, dtype=torch.long)}).run(Model(), lambda tensor: tensor)
    assert output.shape == (1, 3)


class Says(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor) -> Any:
        return "done"


def test_errors_of_forward_come_out() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ForwardPass.of(torch.randn(2, 5)).run(nn.Sequential(nn.Linear(4, 3)), lambda tensor: tensor)
    with pytest.raises(ValueError, match="at least one floating-point tensor, got str"):
        ForwardPass.of(X).run(Says(), lambda tensor: tensor)


class Checkpointed(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.body, self.head, self.settings = models.MLP(4, 6, 5), nn.Linear(5, 3), settings

    def forward(self, x: Tensor) -> Tensor:
        if not self.settings:
            return self.head(self.body(x))  # type: ignore[no-any-return]
        return self.head(checkpoint(self.body, x.requires_grad_(), **self.settings))  # type: ignore[no-any-return]


def by_checkpointed_parts(module: Any, batch: Tensor) -> Tensor:
    """Runs nothing that has a submodule around the checkpointed part."""
    return module.head(checkpoint(module.body, batch, use_reentrant=False)).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", [SNIP(), SynFlow(rounds=3)], ids=["snip", "synflow"])
@pytest.mark.parametrize(
    "loss_fn", [lambda module, x: module(x).square().mean(), by_checkpointed_parts], ids=["forward", "parts"]
)
def test_checkpointed_parts_are_followed(loss_fn: Any, method: Any) -> None:
    """They are followed as if they were not."""
    results = []
    for settings in ({}, {"use_reentrant": False}):
        torch.manual_seed(0)
        module = Checkpointed(**settings)
        x = torch.randn(2, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            masks = find_masks(module, method, sparsity=0.6, batches=[x], loss_fn=loss_fn)
        results.append((masks, paths.active_masks(module, masks, x)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][0])


def test_checkpointed_parts_without_gradients_raise() -> None:
    module, x = Checkpointed(use_reentrant=True), torch.randn(2, 4)
    masks = Masks({"head.weight": torch.ones(3, 5, dtype=torch.bool)})
    with pytest.raises(ValueError, match="Set `use_reentrant=False`"):
        paths.active_masks(module, masks, x)
    with pytest.raises(ValueError, match="Set `use_reentrant=False`"):
        synflow.SynapticFlow(module, prunable.prunable_parameters(module)).gradients(x.double())


def _padded(x: Tensor) -> Tensor:
    whole = torch.zeros(x.shape, dtype=torch.get_default_dtype())
    whole[:, :5] = x[:, 1:]
    return whole


CONVERSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "written into a new tensor": _padded,
    "multiplied with a new matrix": lambda x: x @ torch.ones(6, 6, dtype=torch.get_default_dtype()),
    "converted": lambda x: x.to(torch.get_default_dtype()),
    "in bfloat16": lambda x: x.bfloat16(),
    "in float32": lambda x: x.float(),
}


@pytest.mark.parametrize("between", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constants_and_conversions_have_one_precision(between: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """What `forward` makes or converts has the precision of what is sent through, whatever that is."""
    module = Between(between, dtype)
    masks = dense_masks(module)
    torch.set_default_dtype(dtype)
    try:
        active = paths.active_masks(module, masks, torch.zeros(1, 4))
        gradients, total = synflow.SynapticFlow(module, dict(module.named_parameters())).gradients(torch.zeros(1, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    num_unused = 4 if between is _padded else 0
    assert sum(int(mask.logical_not().sum()) for mask in active.values()) == num_unused + 3 * bool(num_unused)
    assert total > 0
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float64}
