"""Where channels are said to be after an operation is where a change of each of them arrives, or nothing is said."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_drive.compaction import operations
from lightning_drive.compaction.operations import Position

SHAPE = (2, 3, 4, 4)


def arrives(function: Callable[[Tensor], Tensor], x: Tensor, dimension: int, into: int) -> set[tuple[int, int]]:
    """Pairs of an index of the output and the channel that it changes with, by trying."""
    pairs = set()
    for channel in range(x.shape[dimension]):
        other = x.detach().clone()
        other.select(dimension, channel).mul_(-1.7)
        changed = (function(other) != function(x)).movedim(into, 0).flatten(1).any(1)
        pairs |= {(int(index), channel) for index in changed.nonzero().flatten()}
    return pairs


KEPT: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
    "relu": (F.gelu, 1, 1),
    "scaled": (lambda x: 3 * x, 2, 2),
    "window": (lambda x: F.avg_pool2d(x, 2), 1, 1),
    "sum": (lambda x: x.sum((2, 3)), 1, 1),
    "sum_before": (lambda x: x.sum(1), 2, 1),
    "sum_around": (lambda x: x.mean((0, -1), keepdim=True), 1, 1),
    "extremum": (lambda x: x.amax(0), 3, 2),
    "flattened": (lambda x: x.view(2, 48), 1, 1),
    "flattened_behind": (lambda x: x.view(2, 3, 16), 1, 1),
    "flattened_before": (lambda x: x.view(24, 4), 3, 1),
    "unflattened": (lambda x: x.view(2, 3, 2, 2, 2, 2), 1, 1),
}


def position_after(function: Callable[[Tensor], Tensor], dimension: int) -> Position | None:
    x = torch.randn(SHAPE, requires_grad=True)
    number = SHAPE[dimension]
    every = torch.arange(number)
    before = Position(dimension, operations.paired(every, every, number), number)
    y = function(x.clone())
    return operations.after(y.grad_fn, [before], [SHAPE], tuple(y.shape))


@pytest.mark.parametrize("kind", KEPT)
def test_after(kind: str) -> None:
    function, dimension, into = KEPT[kind]
    torch.manual_seed(0)
    position = position_after(function, dimension)
    assert position is not None
    assert position.dimension == into
    pairs = {divmod(code, position.size) for code in position.codes.tolist()}
    assert pairs == arrives(function, torch.randn(SHAPE, dtype=torch.float64), dimension, into)


@pytest.mark.parametrize(
    ("function", "dimension"),
    [
        pytest.param(lambda x: x.sum(1), 1, id="summed_over"),
        pytest.param(lambda x: x.sum((-1, -3)), 1, id="summed_over_from_behind"),
        pytest.param(lambda x: x.amax(1, keepdim=True), 1, id="kept_at_1"),
        pytest.param(torch.sum, 1, id="all"),
        pytest.param(lambda x: F.avg_pool2d(x, 2), 2, id="windows_over_it"),
        pytest.param(lambda x: x.view(6, 16), 1, id="joined_with_what_is_before"),
        pytest.param(lambda x: x.view(2, 48), 3, id="channels_last"),
        pytest.param(lambda x: x.softmax(1), 1, id="unknown"),
        pytest.param(lambda x: x.roll(1, 1), 1, id="rolled"),
    ],
)
def test_after__mixed(function: Callable[[Tensor], Tensor], dimension: int) -> None:
    assert position_after(function, dimension) is None


def test_after__other_channels() -> None:
    """Two inputs whose channels are not the same at the same place cannot be added."""
    x = torch.randn(SHAPE, requires_grad=True)
    every = torch.arange(3)
    one = Position(1, operations.paired(every, every, 3), 3)
    shifted = Position(1, operations.paired(every, (every + 1) % 3, 3), 3)
    total = x.clone() + x.clone()
    assert operations.after(total.grad_fn, [one, one], [SHAPE, SHAPE], SHAPE) == one
    assert operations.after(total.grad_fn, [one, shifted], [SHAPE, SHAPE], SHAPE) is None


@pytest.mark.parametrize("dimension", [1, -3, 2])
def test_after_concatenation(dimension: int) -> None:
    """Behind the channels of the tensors before them, in dimension 1 only."""
    x = torch.randn(SHAPE, requires_grad=True)
    every = torch.arange(3)
    position = Position(1, operations.paired(every, every, 3), 3)
    joined = torch.cat([x.clone(), x.clone()], dimension)
    after = operations.after_concatenation(joined.grad_fn, [None, position], [3, 3], tuple(joined.shape))
    if dimension == 2:
        assert after is None
    else:
        assert after is not None
        assert [divmod(code, 3) for code in after.codes.tolist()] == [(3, 0), (4, 1), (5, 2)]
        assert operations.after_concatenation(joined.grad_fn, [position], [3], tuple(joined.shape)) is None
