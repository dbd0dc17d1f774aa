"""Whatever mixes, moves or counts channels keeps them all."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compacted import IMAGES, Functional, assert_same, built, cut, difference, numbers, sizes, sparse
from models import Attention, randomised
from torch import Tensor, nn

from lightning_drive import compact
from lightning_drive.compaction import group_check, group_search
from lightning_drive.compaction.groups import Group
from lightning_drive.compaction.tracing import Trace, trace

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


def test_compact__no_batch() -> None:
    """One image without a batch dimension: channels are in another place there, and are left."""
    given = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 1))
    cut(given)
    small = compact(given, numbers(8, 8, 8))
    assert sizes(small) == sizes(given)
    assert difference(given, small, numbers(8, 8, 8, seed=1)) < 1e-6


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


# Groups that torch-pruning could be wrong about.


def traced_group() -> tuple[Group, Trace]:
    """The group of the first layer of a small network."""
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    graph, traced = trace(module, [numbers(2, 4)])
    group = group_search.group_of(graph, traced, module[0], [0, 1, 2, 3])
    assert group is not None
    return group, traced


def test_is_sound() -> None:
    assert group_check.is_sound(*traced_group())


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("change", ["moved", "too_large", "doubled"])
def test_is_sound__wrong_indices(number: int, change: str) -> None:
    """Whichever of the nodes they are at: the layer that writes, the activation or the layer that reads."""
    group, traced = traced_group()
    key = [*group.items][number]
    item = group.items[key]
    index = {
        "moved": item.index.roll(1),
        "too_large": item.index + 1,
        "doubled": item.index.clamp(max=2),
    }[change]
    group.items[key] = replace(item, index=index)
    assert not group_check.is_sound(group, traced)


def test_is_sound__no_reader() -> None:
    group, traced = traced_group()
    for key in [key for key in group.items if key[1]]:
        del group.items[key]
    assert not group_check.is_sound(group, traced)


def test_is_sound__indices_that_no_layer_has() -> None:
    """Even if they are the same wherever the group is."""
    group, traced = traced_group()
    for key, item in group.items.items():
        group.items[key] = replace(item, index=item.index + 1)
    assert not group_check.is_sound(group, traced)
