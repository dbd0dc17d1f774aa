"""Data go through a network as training sends them, whatever training calls."""

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_drive import DRIVE, SNIP, Magnitude, SynFlow, find_masks
from lightning_drive.core.masks import Masks
from lightning_drive.network import forward_passes, paths
from lightning_drive.network.forward_passes import ForwardPass
from lightning_drive.network.prunable import parameters_by_name, prunable_parameters
from lightning_drive.network.undisturbed import undisturbed
from lightning_drive.search.loop import search

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


def found_by(
    module: nn.Module, method: Any, loss_fn: Any, batches: Any = (X,), sparsity: float = 0.5, **settings: Any
) -> Any:
    names = prunable_parameters(module)
    with undisturbed(module, method.mode) as scored:
        parameters = parameters_by_name(scored.module, names)
        return search(
            scored.module,
            method,
            sparsity=sparsity,
            parameters=parameters,
            batches=[*batches],
            loss_fn=loss_fn,
            **settings,
        )


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
    found = found_by(module, method, loss_fn, masks=masks, sparsity=masks.sparsity)
    assert found.path_error is None
    assert found.masks == masks
    rows = found.active["encoder.weight"].any(1).tolist()
    assert rows == [False, False, True] * (len(rows) // 3)
    assert not found.active["decoder.weight"][:, :2].any()  # the noise of a sample is no input, either
    assert found.active["decoder.weight"][:, 2].all()


@pytest.mark.parametrize(("kind", "loss_fn"), CASES)
def test_multiply_adds_follow_training(kind: type[nn.Module], loss_fn: Any) -> None:
    """Those of one sample."""
    found = found_by(kind(), SNIP(), loss_fn)
    sizes = {name: mask.numel() for name, mask in found.masks.items()}
    if kind is Graph:  # whose samples cannot be told apart
        assert found.costs.multiply_adds == {name: 6 * size for name, size in sizes.items()}
        assert "whole batch" in found.costs.warnings[-1]
    else:
        assert found.costs.multiply_adds == {name: size for name, size in sizes.items() if name in sizes}
        assert found.costs.warnings == ()


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


def test_recording_adds_no_call() -> None:
    """Who counts calls of the loss counts those of scoring, whatever paths and multiply-adds are found from."""
    calls = []

    def counted(module: Any, batch: Any) -> Tensor:
        calls.append(module.training)
        return twice(module, batch)

    found = found_by(Coder(), DRIVE(rounds=4), counted)
    assert found.path_error is None
    assert calls == [True] * 4


def test_twice_the_same_network_is_called_once() -> None:
    """Its paths and multiply-adds are those of one input."""
    found = found_by(Coder(), SNIP(), twice)
    assert found.costs.multiply_adds["encoder.weight"] == 12


def test_unused_is_not_inactive() -> None:
    """Where no loss is known, nothing is known of what ``forward`` does not use."""
    torch.manual_seed(0)
    module = Coder()
    masks = Masks({name: torch.rand_like(value) > 0.5 for name, value in module.named_parameters()})
    active = paths.active_masks(module, masks, X)
    assert active["decoder.weight"].equal(masks["decoder.weight"])


@pytest.mark.parametrize("container", [dict, UserDict])
def test_batch_by_name(container: Any) -> None:
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
    with undisturbed(module) as scored:
        parameters = parameters_by_name(scored.module, prunable_parameters(module))
        found = search(scored.module, SNIP(), sparsity=0.5, parameters=parameters, batches=[batch], loss_fn=loss_fn)
    assert found.path_error is None
    assert found.active.num_kept <= found.masks.num_kept


class BoxDetector(nn.Module):
    """Checks its boxes; returns losses in train mode, and what it finds, which says little of how, in eval mode."""

    def __init__(self, dead_end: str) -> None:
        super().__init__()
        self.body, self.head, self.dead_end = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 5, bias=False), dead_end

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Any:
        if any((target["boxes"][:, 2:] <= target["boxes"][:, :2]).any() for target in targets):
            raise AssertionError("All bounding boxes should have positive height and width.")
        found = self.head(torch.stack([self.body(image).mean((1, 2)) for image in images]))
        if self.training:
            goal = torch.stack([target["boxes"].mean(0) for target in targets])
            return {"classes": found[:, 4].square().mean(), "boxes": (found[:, :4] - goal).abs().mean()}
        if self.dead_end == "constants":
            return torch.zeros(len(found), 4)
        if self.dead_end == "no_boxes":
            return found[found[:, 0] < -1]
        raise RuntimeError("no boxes")


def of_boxes(module: Any, batch: Any) -> Tensor:
    return sum(module(*batch).values())  # type: ignore[no-any-return]


BOXES = torch.tensor([[1.0, 2.0, 5.0, 6.0], [0.0, 0.0, 3.0, 4.0]])
BOXED = [torch.randn(3, 8, 8), torch.randn(3, 6, 9)], [{"boxes": BOXES[:1]}, {"boxes": BOXES}]


@pytest.mark.parametrize("dead_end", ["constants", "no_boxes", "error"])
def test_detectors_are_followed_in_train_mode(dead_end: str) -> None:
    module = BoxDetector(dead_end)
    names = prunable_parameters(module)
    masks = Masks({name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in names.items()})
    masks["body.weight"][1] = False
    masks["head.weight"][:, 2] = False
    found = found_by(module, SNIP(), of_boxes, [BOXED], masks=masks, sparsity=masks.sparsity)
    assert found.path_error is None
    assert found.warnings == []
    assert found.active["body.weight"].any(3).any(2).any(1).tolist() == [True, False, False, True]
    assert found.active["head.weight"].any(0).tolist() == [True, False, False, True]


def test_nothing_arrives_even_without_masks() -> None:
    """That no path is found is said as such; it is no fault of the masks."""

    class Chooses(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1, keepdim=True) * torch.ones(3)

    found = found_by(Chooses(4, 3), Magnitude(), None)
    assert found.active is None
    assert "Nothing that is sent into the network arrives at what it returns." in found.path_error
    assert found.warnings == []


@pytest.mark.parametrize(
    "branch", [nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))], ids=["layer", "layers"]
)
def test_what_is_not_reached_even_without_masks_counts_as_active(branch: nn.Module) -> None:
    class Constant(nn.Module):
        """Has a branch that sees zeros, as the first self-attention of DETR's decoder does."""

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.branch = nn.Linear(4, 3), branch

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.branch(torch.zeros_like(x))  # type: ignore[no-any-return]

    found = found_by(Constant(), Magnitude(), None)
    assert found.path_error is None
    assert all(found.active[name].equal(mask) for name, mask in found.masks.items() if "branch" in name)
    (text,) = found.warnings
    assert text.startswith("No path through 'branch.")


@pytest.mark.parametrize(
    ("parts", "size"),
    [
        pytest.param([torch.zeros(5, 3), torch.zeros(5)], 5, id="tensors"),
        pytest.param([[torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)]], 2, id="images"),
        pytest.param([*BOXED], 2, id="images_and_boxes"),
        pytest.param([torch.zeros(2, 3, 8, 8), BOXED[1]], 2, id="batch_and_boxes"),
        pytest.param([[torch.zeros(4, 7), torch.zeros(6, 7), torch.zeros(5, 7)]], 3, id="sequences"),
        pytest.param([[torch.zeros(4, 7), torch.zeros(4, 9)]], 4, id="two_inputs"),
        pytest.param([{"x": torch.zeros(4, 7)}, {"y": torch.zeros(4)}], 4, id="mappings"),
        pytest.param([torch.zeros(4, 7), torch.zeros(2, 9)], None, id="graph"),
        pytest.param([[torch.zeros(4, 7), torch.zeros(4)], torch.zeros(3)], None, id="differ"),
    ],
)
def test_number_of_samples(parts: list[Any], size: int | None) -> None:
    found = ForwardPass.of(tuple(parts), whole=True)
    assert found.num_samples == size
    assert ForwardPass.of(tuple(parts)).num_samples == (size and 1)


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


def test_errors_of_forward_come_out() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ForwardPass.of(torch.randn(2, 5)).run(nn.Sequential(nn.Linear(4, 3)), lambda tensor: tensor)
    with pytest.raises(ValueError, match="at least one floating-point tensor, got str"):
        ForwardPass.of(X).run(Says(), lambda tensor: tensor)


class Says(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor) -> Any:
        return "done"
