"""Batches repeat in order, a loader is read anew, and no more is taken from an iterator than was asked for."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_drive.network.repeated_batches import Passes, endless


def test_endless__reads_a_loader_anew() -> None:
    """Every pass over a shuffling loader has its own order; only an iterator is repeated."""
    loader = DataLoader(list(range(20)), batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(0))
    found = list(islice(endless(loader), 40))
    assert sorted(found[:20]) == sorted(found[20:]) == list(range(20))
    assert found[:20] != found[20:]


def test_endless__takes_no_more_than_asked() -> None:
    taken = []

    def stream() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    assert list(islice(endless(stream()), 3)) == [0, 1, 2]
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("empty", [[], iter([]), (i for i in ())], ids=["list", "iterator", "generator"])
def test_endless__empty_error(empty: Any) -> None:
    with pytest.raises(ValueError, match="nothing to score on: `batches` is empty"):
        next(endless(empty))


def test_passes__length() -> None:
    """It is known once a whole pass is over; an iterator is taken from only once."""
    taken = []
    passes = Passes(taken.append(number) or number for number in range(3))
    assert passes.length is None
    assert [list(islice(passes, 2)), passes.length] == [[0, 1], None]
    assert [list(passes), passes.length, list(passes)] == [[0, 1, 2], 3, [0, 1, 2]]
    assert taken == [0, 1, 2]
