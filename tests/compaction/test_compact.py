"""A compacted module gives what the masked one gives, without what cannot matter, and the masked one is left alone."""

import copy
import re
import sys
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import fits
import pytest
import torch
import torch.nn.functional as F
from models import MLP, Attention, ConvNet, ResidualNet, changes, fingerprint, randomised
from torch import Tensor, nn

from lightning_drive import compact, load_sparse, save_sparse
from lightning_drive.compaction import compact as compact_module
from lightning_drive.compaction import removal
from lightning_drive.core import containers
from lightning_drive.network import synflow

IMAGES = (2, 8, 8)


def numbers(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(module: nn.Module, density: float, seed: int = 0) -> nn.Module:
    """Draw all weights, and zero whole rows and columns of layers and single weights, so that much is cut off."""
    module = randomised(module, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                for dimension in (0, 1):
                    kept = torch.rand(weight.shape[dimension], generator=generator) < 0.7
                    weight.movedim(dimension, -1).mul_(kept | (weight.shape[dimension] < 4))
                weight.mul_(torch.rand(weight.shape, generator=generator) < density)
    return module


def difference(first: nn.Module, second: nn.Module, *inputs: Any) -> float:
    """Give the largest difference of outputs in eval mode, as a part of the largest output."""
    with torch.no_grad():
        expected, found = (copy.deepcopy(module).eval()(*inputs) for module in (first, second))
    assert expected.shape == found.shape
    assert expected.dtype == found.dtype
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-3))


def assert_same(given: nn.Module, small: nn.Module, shape: tuple[int, ...], tolerance: float = 1e-5) -> None:
    """Outputs agree for batches of other sizes, with numbers of other sizes."""
    for size, scale in ((1, 1.0), (5, 10.0), (3, 0.0)):
        assert difference(given, small, scale * numbers(size, *shape)) < tolerance


def sizes(module: nn.Module) -> list[tuple[int, int]]:
    """Outputs and inputs of each layer, as its weights have them."""
    return [tuple(weight.shape[:2]) for weight in module.parameters() if weight.ndim > 1]  # type: ignore[misc]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_paths(weights: list[Tensor]) -> list[int]:
    """How many neurons of each hidden layer lie on a path from input to output, by products of boolean matrices."""
    links = [(weight != 0).double() for weight in weights]
    forwards = [torch.ones(links[0].shape[1], dtype=torch.float64)]
    backwards = [torch.ones(links[-1].shape[0], dtype=torch.float64)]
    for link in links:
        forwards.append((link @ forwards[-1] > 0).double())
    for link in reversed(links):
        backwards.insert(0, (link.T @ backwards[0] > 0).double())
    return [int((one * two > 0).sum()) for one, two in zip(forwards[1:-1], backwards[1:-1], strict=True)]


class Dense(nn.Module):
    """Two blocks that are concatenated to what they were given, then BatchNorm, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
                nn.Conv2d(8, 5, 3, padding=1, bias=False),
            )
            for width in (6, 11)
        )
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.cat([x, block(x)], 1)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class Excited(nn.Module):
    """Channels are scaled by what a small network makes of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Linear(12, 6), nn.Linear(6, 12)
        self.last = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.conv(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1).flatten(1)))))
        x = x * gate.view(*gate.shape, 1, 1)
        return self.head((x + self.last(x)).amax((-1, -2)))


class FeedForward(nn.Module):
    """The part of a transformer without attention, on tokens: what is between its layers can go."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.inner, self.outer = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(len(x), 8, 16)
        return tokens + self.outer(F.gelu(self.inner(self.norm(tokens))))


def mobile() -> nn.Sequential:
    """Depthwise convolutions, PReLU, pooling and flattening."""
    return nn.Sequential(
        *(nn.Conv2d(2, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU6(inplace=True)),
        *(nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False), nn.BatchNorm2d(10), nn.Hardswish()),
        *(nn.Conv2d(10, 9, 1), nn.BatchNorm2d(9, affine=False), nn.PReLU(9), nn.AvgPool2d(2)),
        *(nn.Dropout(0.5), nn.Flatten(), nn.Linear(9 * 16, 10), nn.Tanh(), nn.Linear(10, 3)),
    )


def mixed() -> nn.Sequential:
    """Convolutions with all kinds of borders, and activations that are not 0 at 0."""
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(8, 9, 3, padding=2), nn.Softplus()),
        *(nn.Conv2d(9, 8, 3, padding=1, padding_mode="circular"), nn.ELU(), nn.Conv2d(8, 9, 3, padding="same")),
        *(nn.GELU(), nn.ConvTranspose2d(9, 8, 2, stride=2, padding=1), nn.Sigmoid(), nn.Conv2d(8, 6, 1, stride=2)),
        *(nn.LeakyReLU(), nn.Flatten(), nn.LazyLinear(3)),
    )


def lines() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv1d(2, 9, 3, padding=1), nn.BatchNorm1d(9), nn.ReLU(), nn.Conv1d(9, 8, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(8 * 6, 3),
    )


def built(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> nn.Module:
    module = make()
    with torch.no_grad():
        module(torch.ones(2, *shape))  # lazy layers get their shapes
    return module


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: MLP(6, 12, 12, 3), (6,)),
    "conv": (ConvNet, IMAGES),
    "residual": (ResidualNet, IMAGES),
    "dense": (Dense, IMAGES),
    "excited": (Excited, IMAGES),
    "mobile": (mobile, IMAGES),
    "mixed": (mixed, IMAGES),
    "lines": (lines, (2, 8)),
    "feed_forward": (FeedForward, IMAGES),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_compact__same_outputs(kind: str, seed: int) -> None:
    make, shape = KINDS[kind]
    given = sparse(built(make, shape), density=0.5, seed=seed)
    small = compact(given, numbers(2, *shape, seed=seed))
    assert_same(given, small, shape)
    assert type(small) is type(given)
    assert [name for name, _ in small.named_modules()] == [name for name, _ in given.named_modules()]
    if kind not in ("conv", "residual"):  # they are so narrow that there may be nothing to remove
        assert count(small) < count(given)
    assert sizes(compact(small, numbers(2, *shape))) == sizes(small)  # nothing more can go


@pytest.mark.parametrize("seed", range(4))
def test_compact__leaves_what_is_on_paths(seed: int) -> None:
    """In a plain network exactly the neurons on paths are left, however long a chain of consequences is."""
    given = randomised(MLP(6, 20, 20, 20, 20, 3), seed)
    with torch.no_grad():
        for weight in (weight for weight in given.parameters() if weight.ndim > 1):
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.1)
    left = on_paths([weight for weight in given.parameters() if weight.ndim > 1])
    assert all(0 < each < 20 for each in left)
    small = compact(given, numbers(2, 6))
    assert [rows for rows, _ in sizes(small)] == [*left, 3]
    assert_same(given, small, (6,))


def test_compact__agrees_with_effective_sparsity() -> None:
    """Where constants can be folded, a convolutional network keeps exactly the channels that paths lead through."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((2, 12), (12, 12), (12, 12)):
        layers += [nn.Conv2d(inputs, outputs, 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    given = sparse(nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 25, 3)), density=0.15)
    given[-1].weight.data[:, 50:] = 0  # all but the first two channels
    weights = {name: weight for name, weight in given.named_parameters() if weight.ndim > 1}
    masks = synflow.active_masks(
        given.eval(), {name: weight != 0 for name, weight in weights.items()}, numbers(1, *IMAGES)
    )
    expected = [int(mask.flatten(1).any(1).sum()) for mask in masks.values()]
    assert all(0 < each < 12 for each in expected[:-1])
    assert [rows for rows, _ in sizes(compact(given, numbers(2, *IMAGES)))] == expected


def test_compact__folds_a_constant() -> None:
    """By hand: the second neuron is always relu(2) = 2, which 5 times over goes into the bias."""
    given = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    values = {"0.weight": [[3.0], [0.0]], "0.bias": [1.0, 2.0], "2.weight": [[4.0, 5.0]], "2.bias": [7.0]}
    given.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    small = compact(given, torch.ones(1, 1))
    assert {name: value.tolist() for name, value in small.state_dict().items()} == {
        "0.weight": [[3.0]],
        "0.bias": [1.0],
        "2.weight": [[4.0]],
        "2.bias": [17.0],
    }


def constants(values: list[float], padding: int = 1, **settings: Any) -> nn.Sequential:
    """Two convolutions, the first of which passes on the input and writes constants beside it."""
    layer = nn.Conv2d(1, 1 + len(values), 1)
    with torch.no_grad():
        layer.weight[1:] = 0
        layer.bias.copy_(torch.tensor([0.0, *values]))
    return nn.Sequential(layer, nn.ReLU(), nn.Conv2d(1 + len(values), 2, 3, padding=padding, **settings))


@pytest.mark.parametrize(
    ("values", "settings", "left"),
    [
        pytest.param([2.0, 3.0, 0.5], {"padding": 0}, 1, id="no_padding"),
        pytest.param([2.0, 3.0, 0.5], {"padding": 0, "bias": False}, 1, id="no_padding_no_bias"),
        pytest.param([2.0, 3.0, 0.5], {"padding_mode": "reflect"}, 1, id="reflected"),
        pytest.param([-2.0, 0.0], {}, 1, id="zero_behind_relu"),
        pytest.param([-2.0, 0.0], {"bias": False}, 1, id="zero_without_bias"),
        pytest.param([2.0], {}, 2, id="one_is_kept"),
        pytest.param([2.0, 3.0, 0.5], {}, 2, id="joined_in_one"),
        pytest.param([2.0, 3.0, -0.5], {"bias": False, "stride": 2, "dilation": 2}, 2, id="joined_with_stride"),
    ],
)
def test_compact__constants_at_borders(values: list[float], settings: dict[str, Any], left: int) -> None:
    """Zeros around an image are no constant: what cannot go into a bias is joined, and right at the borders, too."""
    torch.manual_seed(0)
    given = constants(values, **settings)
    small = compact(given, numbers(2, 1, 6, 6))
    assert len(small[0].weight) == left
    assert_same(given, small, (1, 6, 6), tolerance=1e-6)
    folded = left == 1 and any(value > 0 for value in values)
    assert (small[2].bias is not None) == (settings.get("bias", True) or folded)


def test_compact__residual_branch_is_no_constant() -> None:
    """What a cut-off branch adds to is not constant; a channel of the stream goes only if no one reads it."""
    given = randomised(ResidualNet()).eval()
    with torch.no_grad():
        given.block1.conv2.weight[1] = 0  # type: ignore[union-attr, operator]
        given.block2.conv1.weight[:, 2] = 0  # type: ignore[union-attr, operator]
    assert sizes(compact(given, numbers(2, *IMAGES))) == sizes(given)
    with torch.no_grad():
        given.block2.shortcut[0].weight[:, 2] = 0  # type: ignore[index, union-attr]
    small = compact(given, numbers(2, *IMAGES))
    assert small.block1.conv2.weight.shape[:2] == (3, 4)  # type: ignore[union-attr]
    assert small.block1.shortcut[0].weight.shape[:2] == (3, 3)  # type: ignore[index, union-attr]
    assert_same(given, small, IMAGES)


def test_compact__wholly_cut_off() -> None:
    """One channel of each layer is left where nothing gets through, and the output is the constant it was."""
    given = randomised(MLP(6, 8, 8, 3))
    with torch.no_grad():
        given[2].weight.zero_()
    small = compact(given, numbers(2, 6))
    assert sizes(small) == [(1, 6), (1, 1), (3, 1)]
    assert_same(given, small, (6,))


# What is left alone, because it could be wrong.


class Functional(nn.Module):
    """Two linear layers with a given function between them; the second neuron is not read by the last layer."""

    def __init__(self, between: Callable[["Functional", Tensor, Tensor], Tensor], *, constant: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.between = between
        self.extra = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        self.register_buffer("table", torch.tensor([1.0, 2.0, 3.0, 4.0]))
        randomised(self)
        with torch.no_grad():
            if constant:
                self.first.weight[1], self.first.bias[1] = 0, 1.5
            else:
                self.last.weight[:, 1] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, F.relu(self.first(x)), x)) + 0 * self.extra.sum()


BETWEEN: dict[str, Callable[[Functional, Tensor, Tensor], Tensor]] = {
    "softmax": lambda self, h, x: h.softmax(1),
    "layer_norm": lambda self, h, x: F.layer_norm(h, (4,)),
    "mean_over_channels": lambda self, h, x: h - h.mean(1, keepdim=True),
    "input_is_added": lambda self, h, x: h + x,
    "rolled": lambda self, h, x: h.roll(1, 1),
    "matrix": lambda self, h, x: h @ self.last.weight.new_ones(4, 4).triu(),
    "table": lambda self, h, x: h * self.table,
    "parameter": lambda self, h, x: h * self.extra,
    "size_written_down": lambda self, h, x: h.view(-1, 4).relu() + torch.ones(4),
    "read_without_gradient": lambda self, h, x: h * h.detach().amax(1, keepdim=True),
    "number_of_channels": lambda self, h, x: h / h.shape[1],
    "sorted": lambda self, h, x: h.sort(1).values,
    "flipped": lambda self, h, x: h.flip(1),
    "halves_swapped": lambda self, h, x: torch.cat(h.chunk(2, 1)[::-1], 1),
    "seen_as_pairs": lambda self, h, x: h.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4),
}


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("between", BETWEEN)
def test_compact__left_alone(between: str, constant: bool) -> None:
    """Whatever mixes channels or counts them keeps them all."""
    given = Functional(BETWEEN[between], constant=constant)
    small = compact(given, numbers(6, 4))
    assert_same(given, small, (4,))
    assert sizes(small.first) == sizes(given.first)  # type: ignore[arg-type]


def test_compact__a_mask_in_the_input() -> None:
    """What is constant only as long as a mask is all ones is not constant."""
    torch.manual_seed(0)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.last(self.first(x) * mask[:, None])

    given = Masked()
    with torch.no_grad():
        given.first.weight[1] = 0
    small = compact(given, {"x": numbers(3, 3), "mask": torch.ones(3, dtype=torch.int64)})
    assert difference(given, small, numbers(2, 3), torch.tensor([0, 1])) < 1e-6
    assert sizes(small) == sizes(given)


def cut(module: nn.Module) -> nn.Module:
    """Cut the second neuron of the first layer off from the output, and the third from the input."""
    with torch.no_grad():
        module[2].weight[:, 1] = 0  # type: ignore[index]
        module[0].weight[2] = 0  # type: ignore[index]
    return module


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.in_features


def with_hook() -> nn.Module:
    module = MLP(4, 6, 3)
    module[0].register_forward_hook(lambda layer, inputs, output: output.cumsum(-1))
    return module


def parametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3))


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    module[2].weight = module[0].weight
    with torch.no_grad():
        module[0].weight[1] = 0  # `cut` does the same to the column: the neuron could go, if the layers were apart
    return module


def repeated() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer, nn.ReLU(), layer)


def swapped() -> nn.Module:
    """A forward of one's own on a layer: it adds the first neuron to the second."""
    module = MLP(4, 6, 3)
    layer = module[2]

    def forward(layer: Any, x: Tensor) -> Tensor:
        return F.linear(torch.cat([x[:, :1], x[:, :1] + x[:, 1:2], x[:, 2:]], 1), layer.weight, layer.bias)

    layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Subclass(6, 3)), id="subclass"),
        pytest.param(with_hook, id="hook"),
        pytest.param(tied, id="tied"),
        pytest.param(repeated, id="repeated"),
        pytest.param(parametrised, id="parametrised"),
        pytest.param(swapped, id="forward_of_its_own"),
    ],
)
def test_compact__unusual_layers(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    given = make()
    if not hasattr(given[0], "parametrizations"):  # type: ignore[index]
        cut(given)
    small = compact(given, numbers(3, 4))
    assert_same(given, small, (4,))
    assert sizes(small) == sizes(given)


@pytest.mark.parametrize(
    "middle",
    [
        pytest.param(lambda: nn.Conv2d(8, 8, 3, groups=2), id="grouped"),
        pytest.param(lambda: nn.Conv2d(8, 16, 3, groups=8), id="depthwise_multiplied"),
        pytest.param(lambda: nn.GroupNorm(2, 8), id="group_norm"),
        pytest.param(lambda: nn.InstanceNorm2d(8, affine=True), id="instance_norm"),
        pytest.param(lambda: nn.PixelShuffle(2), id="pixel_shuffle"),
        pytest.param(lambda: nn.ChannelShuffle(2), id="channel_shuffle"),
        pytest.param(lambda: nn.ZeroPad2d(1), id="padded"),
        pytest.param(lambda: nn.LocalResponseNorm(3), id="local_response_norm"),
        pytest.param(lambda: nn.Softmax2d(), id="softmax"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*channel_shuffle.*:UserWarning")
def test_compact__other_layers(middle: Callable[[], nn.Module]) -> None:
    """Constants and unread channels before and behind them: right, or left alone."""
    given = sparse(
        built(
            lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.Sigmoid(), middle(), nn.LazyConv2d(8, 3, padding=1)), IMAGES
        ),
        density=0.6,
        seed=2,
    )
    small = compact(given, numbers(2, *IMAGES))
    assert_same(given, small, IMAGES)
    assert sizes(small[0]) == [(8, 2)]  # type: ignore[index]


def test_compact__attention() -> None:
    given = sparse(Attention(), density=0.6)
    small = compact(given, numbers(2, 16))
    assert sizes(small) == sizes(given)
    assert_same(given, small, (16,))


def test_compact__ends_stay() -> None:
    """Outputs that are all zero, an output that others are made of, and inputs that nobody reads keep their shapes."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.first(x)
            return {"hidden": hidden, "logits": self.second(hidden), "best": self.second(hidden).argmax(1)}

    given = Two()
    with torch.no_grad():
        given.first.weight[:, 0] = 0
        given.second.weight[:, 1:3] = 0
        given.second.weight[1] = 0
    small = compact(given, numbers(2, 4))
    assert sizes(small) == sizes(given)


def test_compact__hidden_reader_of_silence() -> None:
    """A channel that is read without its gradient, but is zero for the example, is not taken for unread."""
    given = Functional(lambda self, h, x: h * (1 + h.detach().amax(1, keepdim=True)))
    with torch.no_grad():
        given.first.weight[1], given.first.bias[1] = torch.tensor([40.0, 0, 0, 0]), -400.0  # relu is 0, mostly
    small = compact(given, numbers(6, 4))
    assert sizes(small.first) == sizes(given.first)  # type: ignore[arg-type]
    assert difference(given, small, torch.full((1, 4), 100.0)) < 1e-5


@pytest.mark.parametrize("example", [torch.zeros(2, 3, 3, 4), 0.01 * numbers(2, 3, 3, 4)], ids=["zeros", "small"])
def test_compact__channels_last(example: Tensor) -> None:
    """torch-pruning takes what was flattened for channels first; no comparison sees that where relu lets nothing by."""
    given = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(9 * 6, 3))
    randomised(given)
    with torch.no_grad():
        given[0].bias.fill_(-0.5)
        given[0].weight[1] = 0  # nothing writes the second neuron,
        given[3].weight.view(3, 9, 6)[..., 1] = 0  # and nothing reads it
    small = compact(given, example)
    assert sizes(small) == sizes(given)
    assert_same(given, small, (3, 3, 4))


@pytest.mark.parametrize("between", [nn.MaxPool2d(2), nn.Flatten(), nn.Sequential(nn.AvgPool2d(2), nn.Flatten())])
def test_compact__right_behind_a_layer(between: nn.Module) -> None:
    """A batch of another size, which is compared as well, does not hide that channels keep their place."""
    given = nn.Sequential(nn.Conv2d(2, 8, 1), between, nn.LazyConv2d(3, 1))
    if not isinstance(between, nn.MaxPool2d):
        given[2] = nn.LazyLinear(3)
    given(numbers(2, *IMAGES))
    with torch.no_grad():
        given[2].weight.view(3, 8, -1)[:, :4] = 0
    small = compact(given, numbers(2, *IMAGES))
    assert len(small[0].weight) == 4  # type: ignore[index]
    assert_same(given, small, IMAGES)


def test_compact__never_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in telling what is unread changes nothing: it is seen, and the rest goes on."""
    given = randomised(MLP(6, 8, 8, 3))
    with torch.no_grad():
        given[4].weight[:, :2] = 0
    right = removal._unread_

    def wrong(group: Any) -> Tensor:
        return torch.ones_like(right(group)) if group.name == "0" else right(group)

    monkeypatch.setattr(removal, "_unread_", wrong)
    small = compact(given, numbers(2, 6))
    assert sizes(small) == [(8, 6), (6, 8), (3, 6)]
    assert_same(given, small, (6,))


def test_compact__disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    given = randomised(MLP(6, 8, 3))
    before = fingerprint(given)
    monkeypatch.setattr(compact_module, "shrunk", lambda module, example: randomised(module, 5))
    with pytest.raises(RuntimeError, match=r"must give the outputs of the given one, and does not"):
        compact(given, numbers(2, 6))
    assert changes(given, before) == []


def test_compact__no_batch() -> None:
    """One image without a batch dimension: channels are in another place there, and are left."""
    given = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 1))
    cut(given)
    small = compact(given, numbers(8, 8, 8))
    assert sizes(small) == sizes(given)
    assert difference(given, small, numbers(8, 8, 8, seed=1)) < 1e-6


# The given module, and what the new one shares with it.


def test_compact__leaves_no_trace() -> None:
    given = sparse(ConvNet(), density=0.6).train()
    given.norm1.eval()  # type: ignore[union-attr, operator]
    given.conv2.weight.requires_grad = False  # type: ignore[union-attr]
    calls: list[str] = []
    given.fc.register_forward_hook(lambda *_: calls.append("hook"))  # type: ignore[union-attr, operator]
    given(numbers(2, *IMAGES)).sum().backward()
    before, hooks = fingerprint(given), dict(given.fc._forward_hooks)  # type: ignore[union-attr, arg-type]
    example = numbers(2, *IMAGES).requires_grad_()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        small = compact(given, example)
    assert changes(given, before) == []
    assert given.fc._forward_hooks == hooks  # type: ignore[union-attr]
    assert example.grad is None
    assert [each.training for each in small.modules()] == [each.training for each in given.modules()]
    assert not small.conv2.weight.requires_grad  # type: ignore[union-attr]
    assert all(each.grad is None for each in small.parameters())
    assert {id(each) for each in small.parameters()}.isdisjoint(map(id, given.parameters()))
    assert {each.data_ptr() for each in small.parameters()}.isdisjoint(each.data_ptr() for each in given.parameters())
    small.train()(numbers(2, *IMAGES)).sum().backward()  # it can be trained on
    assert changes(given, before) == ["torch"]  # of its Dropout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_compact__precision(dtype: torch.dtype) -> None:
    given = sparse(MLP(6, 12, 12, 3), density=0.5).to(dtype)
    given[4].weight.requires_grad = False
    small = compact(given, numbers(2, 6).to(dtype))
    assert {value.dtype for value in small.state_dict().values()} == {dtype}
    assert count(small) < count(given)
    tolerance = 20 * torch.finfo(dtype).eps
    assert difference(given, small, numbers(4, 6).to(dtype)) < tolerance


def test_compact__own_precision() -> None:
    """A module that writes its precision down cannot run in float64, and is compacted in its own."""

    class Single(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    given = sparse(Single(6, 12, 12, 3), density=0.5)
    small = compact(given, numbers(2, 6))
    assert [rows for rows, _ in sizes(small)][:-1] == on_paths([each for each in given.parameters() if each.ndim > 1])
    assert_same(given, small, (6,))


class Words(nn.Module):
    """Token ids and their weights, in one bag, then two layers; the embedding itself stays."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(9, 5), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor, weights: Tensor | None = None, scale: float = 1.0) -> Tensor:
        vectors = self.embedding(tokens)
        vectors = vectors if weights is None else vectors * weights[..., None]
        return self.last(F.relu(self.first(scale * vectors.mean(1))))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(torch.tensor([[1, 2, 8]]), id="tensor"),
        pytest.param((torch.tensor([[1, 2, 8]]), torch.ones(1, 3)), id="tuple"),
        pytest.param({"tokens": torch.tensor([[1, 2, 8]]), "scale": 2.0}, id="dict"),
    ],
)
def test_compact__kinds_of_input(given: Any) -> None:
    module = sparse(Words(), density=0.6)
    module.embedding.weight.data = numbers(9, 5)  # type: ignore[union-attr]
    small = compact(module, given)
    assert len(small.first.weight) < 8  # type: ignore[union-attr, arg-type]
    assert len(small.embedding.weight[0]) == 5  # type: ignore[union-attr, index]
    assert difference(module, small, torch.tensor([[3, 4], [5, 6]])) < 1e-6


def test_compact__fixed_batch() -> None:
    """A module that takes batches of one size only."""

    class Fixed(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(2, 6))

    given = sparse(Fixed(6, 12, 3), density=0.5)
    small = compact(given, numbers(2, 6))
    assert count(small) < count(given)
    assert difference(given, small, numbers(2, 6)) < 1e-6


def test_compact__lightning(tmp_path: Path) -> None:
    """After a fit, with its Trainer still attached: that stays where it is, and the copy is small, plain and usable."""
    module = fits.ConvModule()
    callback = fits.drive(sparsity=0.93)
    trainer = fits.trainer(tmp_path, callback)
    trainer.fit(module, fits.loader())
    before = fits.state_of(module)
    small = compact(module, numbers(2, 1, 8, 8))
    assert isinstance(small, fits.ConvModule)
    assert module.trainer is trainer
    assert small._trainer is None
    assert fits.equal_states(fits.state_of(module), before)
    assert count(small) < count(module)
    assert_same(module, small, (1, 8, 8))

    weights = {name: weight for name, weight in small.named_parameters() if name in callback.masks}
    assert sum(int((weight == 0).sum()) for weight in weights.values()) > 0
    save_sparse(small, tmp_path / "small.safetensors")
    save_sparse(module, tmp_path / "masked.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < (tmp_path / "masked.safetensors").stat().st_size
    assert fits.equal_states(load_sparse(tmp_path / "small.safetensors"), fits.state_of(small))
    torch.save(small, tmp_path / "small.pt")
    assert_same(module, torch.load(tmp_path / "small.pt", weights_only=False), (1, 8, 8))

    again = fits.trainer(tmp_path, max_epochs=1)
    again.fit(small, fits.loader())  # it trains on
    assert small.trainer is again


def test_compact__sparse_file(tmp_path: Path) -> None:
    """Weights within what is left stay zero, and are stored as bits."""
    given = sparse(MLP(60, 120, 120, 3), density=0.1)
    small = compact(given, numbers(2, 60))
    assert count(small) < count(given)
    kept = sum(int(weight.count_nonzero()) for weight in small.parameters() if weight.ndim > 1)
    assert kept <= sum(int(weight.count_nonzero()) for weight in given.parameters() if weight.ndim > 1)
    save_sparse(small, tmp_path / "small.safetensors")
    dense = sum(value.nbytes for value in small.state_dict().values())
    assert (tmp_path / "small.safetensors").stat().st_size < dense
    assert fits.equal_states(load_sparse(tmp_path / "small.safetensors"), fits.state_of(small))


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the page on this shows runs, and makes a network smaller."""
    page = Path(__file__).parents[2] / "docs" / "compact.md"
    [block] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block, found)
    before, after = map(int, capsys.readouterr().out.split())
    assert before > 2 * after
    assert_same(found["net"], found["small"], (3, 32, 32))


# What is refused.


class Branches(nn.Module):
    """Runs one of two layers, as the input has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.one if x.sum() > -1e9 else self.other)(self.first(x))


class Silent(MLP):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Noisy(MLP):
    """Draws other numbers in every call."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class Uncopied(MLP):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.lock = sys.stdout

    def __deepcopy__(self, memo: Mapping[int, Any]) -> "Uncopied":
        raise TypeError("no copies of me.")


def infinite() -> nn.Module:
    module = MLP(4, 3)
    module[0].bias.data.fill_(float("inf"))
    return module


class Coded(Tensor):
    """Has no numbers of its own, as a quantised weight."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "Coded":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)  # type: ignore[attr-defined, no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.detach.default
        return cls(args[0])


def coded() -> nn.Module:
    module = MLP(4, 3, 2)
    module.get_submodule("2").weight = nn.Parameter(Coded(torch.zeros(2, 3)), requires_grad=False)
    return module


REFUSED: list[Any] = [
    pytest.param(coded, TypeError, r"'2.weight' is a Coded of torch.float32.*before its weights", id="coded"),
    pytest.param(lambda: "net", TypeError, r"`module` must be a torch module, got str", id="no_module"),
    pytest.param(lambda: torch.compile(MLP(4, 3)), TypeError, r"`module` is compiled.*`_orig_mod`", id="compiled"),
    pytest.param(
        lambda: nn.Sequential(torch.compile(MLP(4, 3))), TypeError, r"`module.0` is compiled", id="compiled_inside"
    ),
    pytest.param(lambda: nn.DataParallel(MLP(4, 3)), TypeError, r"wrapped for several devices.*`module`", id="wrapped"),
    pytest.param(lambda: nn.Sequential(nn.LazyLinear(3)), ValueError, r"'0.weight' has no shape yet", id="lazy"),
    pytest.param(lambda: MLP(4, 3).to("meta"), ValueError, r"'0.weight' is on the meta device", id="meta"),
    pytest.param(nn.ReLU, ValueError, r"must have parameters, and has none", id="no_parameters"),
    pytest.param(Branches, ValueError, r"take part.*'other.weight', 'other.bias' did not", id="part_did_not_run"),
    pytest.param(Silent, ValueError, r"returned nothing with a gradient", id="no_gradient"),
    pytest.param(Noisy, ValueError, r"must be the same for the same input", id="random"),
    pytest.param(Uncopied, ValueError, r"`copy.deepcopy` can copy, and is not: no copies of me\.", id="not_copied"),
    pytest.param(infinite, ValueError, r"must be finite", id="infinite"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_compact__refused(make: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    module = make() if make is not Silent else Silent(4, 3)
    with pytest.raises(error, match=message):
        compact(module, numbers(2, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_compact__scripted() -> None:
    scripted = torch.jit.script(nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"`module` is scripted"):
        compact(scripted, numbers(2, 4))


def test_compact__sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_drive.core.shards.is_sharded", lambda tensor: tensor.ndim == 2)
    with pytest.raises(ValueError, match=r"'0.weight' is split over ranks"):
        compact(MLP(4, 3), numbers(2, 4))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        pytest.param(None, r"`example_input` must hold a tensor, got NoneType", id="none"),
        pytest.param(torch.ones(2, 4, device="meta"), r"on the module's device, cpu, got meta", id="other_device"),
    ],
)
def test_compact__input_error(example: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compact(MLP(4, 3), example)


def test_compact__error_of_forward() -> None:
    """An example that the module does not take gives the module's own error."""
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied"):
        compact(MLP(4, 3), numbers(2, 5))


class Between(nn.Module):
    """A convolution, and then anything that keeps the shape."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(8, 8, 1), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.conv(x))


class Unit(nn.Module):
    """Half of the channels goes through a branch, then the halves are shuffled, as in ShuffleNet."""

    def __init__(self, halves: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1, 1, 4))
        self.halves = halves

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.halves(x)
        joined = torch.cat((left, self.branch(right)), 1)
        return joined.view(-1, 2, 4, *x.shape[2:]).transpose(1, 2).contiguous().view(x.shape)


class Answer(nn.Linear):
    """A layer that returns something else than a tensor."""

    def forward(self, x: Tensor) -> Any:
        return {"answer": super().forward(x.movedim(1, -1)).movedim(-1, 1).contiguous()}


class Asked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Answer(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)["answer"]  # type: ignore[no-any-return]


class Cat(torch.autograd.Function):
    """Has the name of an operation of torch, and does something else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(1)


STUMBLING: dict[str, Callable[[], list[nn.Module]]] = {
    "chunks": lambda: [Unit(lambda x: x.chunk(2, 1)) for _ in range(3)],
    "splits": lambda: [Unit(lambda x: x.split([4, 4], 1)) for _ in range(4)],
    "slices": lambda: [Unit(lambda x: (x[:, :4], x[:, 4:])) for _ in range(5)],  # took a minute
    "unbound": lambda: [Unit(lambda x: x.unflatten(1, (2, 4)).unbind(1)) for _ in range(2)],
    "nested_splits": lambda: [
        Between(lambda x: torch.cat([torch.cat(half.split(1, 1), 1) for half in x.chunk(2, 1)], 1)) for _ in range(3)
    ],
    "flattened_halves": lambda: [
        Between(lambda x: torch.cat([half.flatten(1) for half in x.chunk(2, 1)], 1).view(x.shape)) for _ in range(3)
    ],
    "layer_that_returns_a_dictionary": lambda: [Asked()],
    "function_with_a_known_name": lambda: [Between(Cat.apply), Between(Cat.apply)],  # type: ignore[list-item]
}


@pytest.mark.parametrize("kind", STUMBLING)
def test_compact__part_that_torch_pruning_stumbles_over(kind: str) -> None:
    """Is left alone, and all before and after it is compacted."""
    middle = STUMBLING[kind]()
    before = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU()
    after = nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 9), nn.Linear(9, 4)
    given = nn.Sequential(*before, *middle, *after)
    randomised(given)
    with torch.no_grad():
        for layer in (before[0], after[0]):
            layer.weight[::2] = layer.bias[::2] = 0  # type: ignore[index]
    small = compact(given, numbers(2, 3, 6, 6))
    assert_same(given, small, (3, 6, 6))
    assert small[2].in_channels == small[-2].in_features == 8  # type: ignore[index]
    left = [sizes(layer) for layer in nn.Sequential(*middle).modules() if isinstance(layer, nn.Conv2d)]
    kept = small[len(before) : -len(after)]  # type: ignore[index]
    assert [sizes(layer) for layer in kept.modules() if isinstance(layer, nn.Conv2d)] == left


def test_compact__not_followed_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("torch_pruning")
    monkeypatch.setattr(library.DependencyGraph, "_build_dependency", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"torch-pruning cannot follow this module: ZeroDivisionError"):
        compact(MLP(4, 3), numbers(2, 4))


def test_compact__library_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-drive\[compact\]'"):
        compact(MLP(4, 3), numbers(2, 4))


# --- what forward returns and takes, in whatever container


@dataclass
class Output:
    """As networks of other libraries return it."""

    logits: Tensor


class Named(NamedTuple):
    logits: Tensor


@pytest.mark.parametrize(
    "kind",
    [Output, Named, lambda y: UserDict(logits=y), lambda y: {"logits": [y]}],
    ids=["dataclass", "namedtuple", "mapping", "nested"],
)
@pytest.mark.parametrize(
    "container", [lambda x: x, lambda x: {"x": x}, lambda x: UserDict(x=x)], ids=["x", "dict", "map"]
)
def test_compact__containers(kind: Callable[[Tensor], Any], container: Callable[[Tensor], Any]) -> None:
    """Tensors are found in all containers that batches may be, so outputs are compared, and are equal."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Any:
            return kind(self.net(x))

    torch.manual_seed(0)
    module, x = Wrapped(), torch.randn(2, 4)
    with torch.no_grad():
        module.net[0].weight[::2] = 0
        module.net[0].bias[::2] = 0
    small = compact(module, container(x))
    assert small.net[0].out_features == 4
    (found,), (expected,) = containers.leaves(small(x)), containers.leaves(module(x))
    assert type(small(x)) is type(module(x))
    torch.testing.assert_close(found, expected)
