"""The paper's networks have the sizes, names, shapes and initial weights that they state, and can be pruned."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lightning_drive import SNIP, find_masks
from lightning_drive.network.prunable import prunable_parameters

PAPER = Path(__file__).parents[1] / "paper"
NETWORKS = ("alexnet", "vgg16", "resnet18", "convnet")


Build: TypeAlias = Callable[[str, int], nn.Module]


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(PAPER)
    return importlib.import_module("networks")


@pytest.fixture
def build(networks: ModuleType) -> Build:
    return networks.build


def count(parameters: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def test_build__knows_all(networks: ModuleType) -> None:
    """What a configuration may ask for is what can be built, and what is tested here."""
    assert tuple(networks.NETWORKS) == (*NETWORKS, "digitnet") == networks.Network.__args__


@pytest.mark.parametrize(
    ("network", "num_classes", "all_parameters", "prunable"),
    [
        ("alexnet", 10, 23_468_874, 23_459_520),
        ("vgg16", 10, 14_728_266, 14_715_584),
        ("vgg16", 100, 14_774_436, 14_761_664),
        ("vgg16", 200, 14_825_736, 14_812_864),
        ("resnet18", 10, 11_173_962, 11_164_352),
        ("resnet18", 100, 11_220_132, 11_210_432),
        ("resnet18", 200, 11_271_432, 11_261_632),
        ("resnet18", 1000, 11_681_832, 11_671_232),  # 1,728 of the stem instead of torchvision's 9,408
        ("convnet", 10, 391_466, 390_496),
        ("digitnet", 10, 24_058, 23_824),
    ],
)
def test_counts(build: Build, network: str, num_classes: int, all_parameters: int, prunable: int) -> None:
    with torch.device("meta"):
        module = build(network, num_classes)
    assert count(dict(module.named_parameters())) == all_parameters
    assert count(prunable_parameters(module)) == prunable


def test_counts__stated(networks: ModuleType) -> None:
    """The table in the file is right."""
    with torch.device("meta"):
        for name in NETWORKS:
            module = networks.build(name, 10)
            sizes = count(dict(module.named_parameters())), count(prunable_parameters(module))
            assert "| {} | {:,} | {:,} |".format(name, *sizes) in networks.__doc__


@pytest.mark.parametrize("network", NETWORKS)
def test_shapes(build: Build, network: str) -> None:
    """Images of 32x32 and of 64x64 pixels, in any number, give one number for each class."""
    module = build(network, 7).to("meta")
    for size in (32, 64):
        assert module(torch.empty(3, 3, size, size, device="meta")).shape == (3, 7)


@pytest.mark.parametrize(
    ("network", "first", "last"), [("alexnet", 16, 4), ("vgg16", 32, 2), ("resnet18", 32, 4), ("convnet", 16, 2)]
)
def test_shapes__resolution(build: Build, network: str, first: int, last: int) -> None:
    """Of 32x32 pixels, the first convolution and the last one have as many places as the docstrings say."""
    sizes = []
    module = build(network, 10).to("meta")
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _layer, _inputs, output: sizes.append(output.shape[-1]))
    module(torch.empty(1, 3, 32, 32, device="meta"))
    assert (sizes[0], sizes[-1]) == (first, last)


def test_names__resnet18(build: Build) -> None:
    with torch.device("meta"):
        ours, theirs = build("resnet18", 10).state_dict(), torchvision.models.resnet18(num_classes=10).state_dict()
    assert list(ours) == list(theirs)
    assert [name for name in ours if ours[name].shape != theirs[name].shape] == ["conv1.weight"]


def test_names__vgg16(build: Build) -> None:
    with torch.device("meta"):
        ours, theirs = build("vgg16", 10).state_dict(), torchvision.models.vgg16_bn().state_dict()
    convolutions = {name: value.shape for name, value in theirs.items() if name.startswith("features.")}
    classifier = {"classifier.weight": (10, 512), "classifier.bias": (10,)}
    assert {name: value.shape for name, value in ours.items()} == convolutions | classifier


def expected_spread(layer: nn.Conv2d | nn.Linear, rule: str) -> float:
    """Standard deviation of initial weights: by inputs, by outputs, or as given."""
    places = layer.weight[0, 0].numel()
    inputs, outputs = layer.weight.shape[1] * places, layer.weight.shape[0] * places
    return {"uniform": (3 * inputs) ** -0.5, "kaiming": (2 / outputs) ** 0.5, "normal": 0.01}[rule]


@pytest.mark.parametrize(
    ("network", "convolutions", "linear"),
    [
        ("alexnet", "uniform", "uniform"),
        ("vgg16", "kaiming", "normal"),
        ("resnet18", "kaiming", "uniform"),
        ("convnet", "uniform", "uniform"),
    ],
)
def test_initial_weights(build: Build, network: str, convolutions: str, linear: str) -> None:
    """Every layer's weights are drawn as the docstrings say."""
    torch.manual_seed(0)
    layers = [layer for layer in build(network, 10).modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in layers:
        rule = convolutions if isinstance(layer, nn.Conv2d) else linear
        weight, spread = layer.weight.detach().flatten()[:100_000], expected_spread(layer, rule)
        assert weight.std().item() == pytest.approx(spread, rel=4 / (2 * len(weight)) ** 0.5)
        beyond = (weight.abs() > 1.74 * spread).double().mean().item()  # none if uniform, 8.2 % if normal
        assert beyond == pytest.approx(0 if rule == "uniform" else 0.082, abs=0.02)
        if rule != "uniform" and layer.bias is not None:
            assert not layer.bias.any()
    assert len(layers) == {"alexnet": 8, "vgg16": 14, "resnet18": 21, "convnet": 5}[network]


def test_initial_weights__seed(build: Build) -> None:
    """They come from torch's global random state."""

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build("convnet", 10).parameters())

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize("network", NETWORKS)
def test_prune(build: Build, network: str) -> None:
    """One batch is enough to prune the network, and what is left of it still tells something."""
    torch.manual_seed(0)
    module = build(network, 10)
    batch = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    masks = find_masks(module, SNIP(), sparsity=0.9, batches=[batch], loss_fn=loss)
    masks.apply_(module)
    kept = sum(int(weight.count_nonzero()) for weight in prunable_parameters(module).values())
    assert kept == masks.num_kept == round(masks.num_prunable / 10)
    assert loss(module, batch).isfinite()


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(module(images), labels)
