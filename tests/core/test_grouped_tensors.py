"""Small tensors that are handled together give what each of them gives by itself."""

import pytest
import reference
import torch
from torch import Tensor

from lightning_drive.core import grouped_tensors, selection


def test_groups(tensors: list[Tensor]) -> None:
    """Groups cover everything once and in order, and none is too large."""
    found = grouped_tensors.groups(tensors)
    assert [index for each in found for index in range(each.start, each.stop)] == list(range(len(tensors)))
    sizes = [sum(tensor.numel() for tensor in tensors[each]) for each in found if each.stop - each.start > 1]
    assert all(size <= grouped_tensors._TOGETHER for size in sizes)


@pytest.mark.filterwarnings("ignore:.*[qQ]uantize")
def test_groups__kinds() -> None:
    """Only tensors of one type are joined, and none that are not what they seem."""
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    ones = torch.ones(2)
    kinds = [ones, ones.double(), ones.to_sparse(), ones, ones, quantised, quantised]
    expected = [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 5), slice(5, 6), slice(6, 7)]
    assert grouped_tensors.groups(kinds) == expected
    assert grouped_tensors.groups([]) == []


def test_parted(tensors: list[Tensor]) -> None:
    for group in (tensors[each] for each in grouped_tensors.groups(tensors)):
        again = grouped_tensors.parted(grouped_tensors.joined(group), group)
        assert all(torch.equal(one, other) for one, other in zip(again, group, strict=True))


@pytest.mark.parametrize("small", [0, 20, 1 << 14], ids=["none_small", "some_small", "all_small"])
@pytest.mark.parametrize("density", [None, 1.0, 0.6, 0.05], ids=["no_masks", "all_alive", "some_alive", "few_alive"])
@pytest.mark.parametrize("digits", [1, 30], ids=["ties", "distinct"])
def test_keep_highest(small: int, density: float | None, digits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However tensors are joined, what is kept is what sorting keeps, with ties by position."""
    monkeypatch.setattr(grouped_tensors, "_SMALL", small)
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
