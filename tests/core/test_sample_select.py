"""The k-th highest is found exactly from a sample, or not at all."""

import pytest
import torch
from torch import Tensor

from lightning_drive.core import sample_select, selection

VALUES = {
    "distinct": lambda x: x,
    "wide": lambda x: torch.exp((x - 0.5) * 20),
    "tiny": lambda x: x * torch.finfo(x.dtype).smallest_normal,  # denormals
    "signed": lambda x: x - 0.5,
    "negative": lambda x: -torch.exp((x - 0.5) * 20),
}


def pieces_of(values: Tensor, alive: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Divide numbers and their mask into pieces of different sizes, an empty one among them."""
    sizes = [1000, 0, 7, len(values) - 1007]
    masks: list[Tensor | None] = [None] * 4 if alive is None else [*alive.split(sizes)]
    return [*zip(values.split(sizes), masks, strict=True)]


@pytest.mark.parametrize("density", [None, 0.5, 0.1])
@pytest.mark.parametrize("kind", VALUES)
def test_cut(kind: str, density: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample leads to the number, of which only the neighbourhood is copied out."""
    monkeypatch.setattr(sample_select, "_SAMPLE", 1 << 12)
    torch.manual_seed(0)
    values = VALUES[kind](torch.rand(200_001))
    alive = None if density is None else torch.rand(len(values)) < density
    living = values if alive is None else values[alive]
    for num_kept in (1, len(living) // 20, len(living) // 2, len(living) - 1):
        found = sample_select.cut(pieces_of(values, alive), len(living), num_kept)
        threshold = living.sort(descending=True).values[num_kept - 1]
        expected = threshold.item(), int((living > threshold).sum()), int((living == threshold).sum())
        assert found == expected


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_cut__ties(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the whole range is one number, nothing is copied out."""
    monkeypatch.setattr(sample_select, "_SAMPLE", 1 << 10)
    monkeypatch.setattr(sample_select, "_marked", pytest.fail)
    torch.manual_seed(0)
    values = torch.rand(100_001) * (torch.rand(100_001) > share)
    num_above = int(values.count_nonzero())
    found = sample_select.cut(pieces_of(values, None), len(values), (len(values) + num_above) // 2)
    assert found == (0, num_above, len(values) - num_above)


def test_cut__misled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample that sees only what is special leads to the digits, not to a wrong mask."""
    monkeypatch.setattr(sample_select, "_SAMPLE", 1 << 7)
    torch.manual_seed(0)
    values = torch.rand(100_000)
    values[::781] += 1  # the stride of the sample
    assert sample_select._range([(values, None)], len(values), 50_000)[0] > 1
    assert sample_select.cut([(values, None)], len(values), 50_000) is None
    found = selection.keep_highest({"a": values}, 50_000)
    assert found.threshold == values.sort(descending=True).values[49_999]
