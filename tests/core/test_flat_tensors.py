"""Small tensors that are handled together give what each of them gives by itself."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_drive import DRIVE, SNIP, SynFlow, find_masks
from lightning_drive.core import bits, flat_tensors, scores, selection, zeroing
from lightning_drive.core import masks as masks_module
from lightning_drive.search.methods import Method

SHAPES = ((3, 4), (), (0, 5), (2, 2, 2), (70,), (0,), (1,), (5, 3))


@pytest.fixture(params=[None, 8, 20], ids=["all_small", "few_small", "some_small"])
def tensors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tensors of all shapes, of which all, few or some count as small, and of which few fit together."""
    if request.param:
        monkeypatch.setattr(flat_tensors, "_SMALL", request.param)
        monkeypatch.setattr(flat_tensors, "_TOGETHER", 2 * request.param)
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in SHAPES]


def test_groups(tensors: list[Tensor]) -> None:
    """Groups cover everything once and in order, and none is too large."""
    found = flat_tensors.groups(tensors)
    assert [index for each in found for index in range(each.start, each.stop)] == list(range(len(tensors)))
    sizes = [sum(tensor.numel() for tensor in tensors[each]) for each in found if each.stop - each.start > 1]
    assert all(size <= flat_tensors._TOGETHER for size in sizes)


def test_groups__kinds() -> None:
    """Only tensors of one type are joined, and none that are not what they seem."""
    kinds = [torch.ones(2), torch.ones(2, dtype=torch.float64), torch.ones(2).to_sparse(), torch.ones(2), torch.ones(2)]
    assert flat_tensors.groups(kinds) == [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 5)]
    assert flat_tensors.groups([]) == []


def test_parted(tensors: list[Tensor]) -> None:
    for group in (tensors[each] for each in flat_tensors.groups(tensors)):
        again = flat_tensors.parted(flat_tensors.joined(group), group)
        assert all(torch.equal(one, other) for one, other in zip(again, group, strict=True))


def test_counts(tensors: list[Tensor]) -> None:
    masks = [tensor > 0 for tensor in tensors]
    assert selection.count_each(masks) == [int(mask.sum()) for mask in masks]


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 5000, 300_000])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("begin", [0, 3, 8])
def test_count(size: int, density: float, begin: int) -> None:
    """Also of a part of a larger mask, from any entry on, and where all are set."""
    torch.manual_seed(0)
    mask = (torch.rand(begin + size) < density)[begin:]
    assert int(flat_tensors.count(mask)) == sum(mask.tolist())


def test_count__shapes() -> None:
    mask = torch.rand(64, 48) < 0.5
    assert all(int(flat_tensors.count(each)) == int(each.sum()) for each in (mask, mask.T, mask[1:, ::2], mask[0, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_zero_each(tensors: list[Tensor], dtype: torch.dtype) -> None:
    """The same bits as one by one: -0.0, NaN and infinity are kept, or become 0, in any memory layout."""
    odd = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), 1e-45])
    given = [torch.cat([tensor.flatten(), odd]) for tensor in tensors] + [torch.randn(3, 4).t(), *tensors]
    given = [(each if dtype.is_floating_point else each.nan_to_num(0, 1, -1)).to(dtype) for each in given]
    masks = [torch.rand(each.shape) < 0.5 for each in given]
    expected = [each.clone() for each in given]
    for tensor, mask in zip(expected, masks, strict=True):
        zeroing.zero_(tensor, mask)
    zeroing.zero_each_(given, masks)
    integers = bits.INTEGERS[dtype.itemsize]
    pairs = zip(given, expected, strict=True)
    assert all(one.contiguous().view(integers).equal(other.contiguous().view(integers)) for one, other in pairs)


def test_snip_each() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(3, 4), torch.randn(4, dtype=torch.float64), torch.randn(5).bfloat16(), torch.randn(2, 3).t()]
    gradients = [torch.randn_like(each).to(torch.promote_types(each.dtype, torch.float32)) for each in weights]
    expected = [scores.snip(*pair) for pair in zip(weights, gradients, strict=True)]
    scores.snip_each_(weights, gradients)
    assert all(one.equal(other) for one, other in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("small", [0, 20, 1 << 14], ids=["none_small", "some_small", "all_small"])
@pytest.mark.parametrize("density", [None, 1.0, 0.6, 0.05], ids=["no_masks", "all_alive", "some_alive", "few_alive"])
@pytest.mark.parametrize("digits", [1, 30], ids=["ties", "distinct"])
def test_keep_highest(small: int, density: float | None, digits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However tensors are joined, what is kept is what sorting keeps, with ties by position."""
    monkeypatch.setattr(flat_tensors, "_SMALL", small)
    torch.manual_seed(0)
    given = {
        str(index): (torch.rand(shape) * 2**digits).floor() / 2**digits
        for index, shape in enumerate(((3, 5), (41,), (), (0, 2), (2, 3, 3), (6,)))
    }
    dense = {name: torch.ones_like(score, dtype=torch.bool) for name, score in given.items()}
    alive = {name: torch.rand(score.shape) < (density or 1) for name, score in given.items()}
    total = sum(int(mask.sum()) for mask in alive.values())
    for num_kept in {1, total // 3, total // 2, total - 1, total} - {0}:
        found = selection.keep_highest(given, num_kept, None if density is None else alive).masks
        expected = reference.keep_highest(given, num_kept, dense if density is None else alive)
        assert all(found[name].tolist() == expected[name].tolist() for name in given)


def test_keep_highest__masks_of_some() -> None:
    """A tensor without a mask has nothing pruned, also where its neighbour has one."""
    given = {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([1.0, 4.0])}
    found = selection.keep_highest(given, 2, {"a": torch.tensor([False, True])}).masks
    assert {name: mask.tolist() for name, mask in found.items()} == {"a": [False, True], "b": [False, True]}


# --- growth


def perceptron(depth: int) -> nn.Module:
    return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(4, 4), nn.ReLU())))


def residual(depth: int) -> nn.Module:
    return nn.Sequential(*(Shortcut() for _ in range(depth // 2)))


def convolutions(depth: int) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 4)), *(nn.Conv1d(1, 1, 3, padding=1) for _ in range(depth)), nn.Flatten())


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.second(F.gelu(self.first(self.norm(x)))), 0.1, self.training)


def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
    return module(batch).square().mean()


def calls_of_a_round(net: nn.Module, method: Callable[[int], Method], scope: Any) -> int:
    """Count the functions of Python and C that are called from the end of the first round to that of the second."""
    count = 0
    ends: list[int] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    batch = torch.rand(8, 4)
    sys.setprofile(note)
    try:
        find_masks(
            net,
            method(2),
            sparsity=0.1,
            scope=scope,
            batches=[batch],
            loss_fn=loss_fn,
            on_round=lambda *_: ends.append(count),
        )
    finally:
        sys.setprofile(None)
    return ends[1] - ends[0]


@pytest.mark.parametrize("build", [perceptron, residual, convolutions])
@pytest.mark.parametrize(
    ("method", "scope"),
    [
        pytest.param(lambda rounds: DRIVE(rounds=rounds), "global", id="DRIVE"),
        pytest.param(lambda rounds: SNIP(rounds=rounds), "layerwise", id="SNIP_layerwise"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_growth(build: Callable[[int], nn.Module], method: Callable[[int], Method], scope: str) -> None:
    """Four times the layers take at most about four times the calls, and with one ranking few for each."""
    torch.manual_seed(0)
    few, many = (calls_of_a_round(build(depth), method, scope) for depth in (100, 400))
    assert many <= 4.2 * few
    if scope == "global":
        assert many <= 400 * 150


@pytest.mark.parametrize("method", [DRIVE(rounds=2), SNIP(), SynFlow(rounds=2)], ids=["DRIVE", "SNIP", "SynFlow"])
@pytest.mark.filterwarnings("ignore")
def test_no_function_mode_while_ranking(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode that turns Dropout off is on where the network runs, and nowhere in ranking and masking."""
    depths: dict[str, set[int]] = {"network": set(), "ranking": set()}

    def noted(function: Callable[..., Any], where: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            depths[where].add(torch._C._len_torch_function_stack())
            return function(*args, **kwargs)

        return run

    for owner, name in ((selection, "keep_highest"), (selection, "count_each"), (masks_module, "zero_")):
        monkeypatch.setattr(owner, name, noted(getattr(owner, name), "ranking"))
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    loss = noted(loss_fn, "network")
    find_masks(net, method, sparsity=0.5, batches=[torch.rand(8, 4)], loss_fn=loss)
    assert depths["ranking"] == {0}
    assert depths["network"] <= {1}
    assert torch._C._len_torch_function_stack() == 0
