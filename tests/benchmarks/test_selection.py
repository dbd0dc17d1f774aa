"""The cut: from scores to masks, against what torch and NumPy have for it. All peers make the mask, too."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from benchmarks.measure import in_turn, peak_growth, scores, seconds
from benchmarks.page import Figure
from torch import Tensor

from lightning_drive.core import selection

DENSITY = 0.02


def ours(values: Tensor) -> Tensor:
    return selection.keep_highest({"": values}, num_kept(values)).masks[""]


def kthvalue(values: Tensor) -> Tensor:
    return values >= values.kthvalue(len(values) - num_kept(values) + 1).values


def topk(values: Tensor) -> Tensor:
    return values >= values.topk(num_kept(values), sorted=False).values.min()


def sort(values: Tensor) -> Tensor:
    return values >= values.sort(descending=True).values[num_kept(values) - 1]


def partition(values: Tensor) -> Tensor:
    place = len(values) - num_kept(values)
    return values >= float(np.partition(values.numpy(), place)[place])


def num_kept(values: Tensor) -> int:
    return round(len(values) * DENSITY)


TORCH = {"`torch.kthvalue`": kthvalue, "`torch.topk`": topk, "`torch.sort`": sort}
NUMPY = {"`numpy.partition`": partition}
"""Needs 4 bytes per score, so that it fits beside 1e9 of them; torch's own need 12 and more."""


def peers_at(size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    return {**TORCH, **NUMPY} if size < 10**9 else NUMPY


@pytest.mark.parametrize(("size", "repeats"), [(10**6, 9), (10**7, 5), (10**8, 2), (10**9, 1)])
def test_time(figure: Callable[..., Figure], size: int, repeats: int) -> None:
    values, peers = scores(size), peers_at(size)
    assert all(torch.equal(ours(values), peer(values)) for peer in peers.values())

    def take() -> tuple[list[float], dict[str, list[float]]]:
        measures = {name: seconds(lambda peer=peer: peer(values)) for name, peer in peers.items()}
        own, others = in_turn(seconds(lambda: ours(values)), measures, repeats)
        torchs = [others[name] for name in TORCH if name in others]
        return own, {**({"the fastest of torch": list(map(min, *torchs))} if torchs else {}), **others}

    figure(
        "selection",
        f"{size:.0e} scores",
        "s",
        take,
        goal=1.0,
        note="2 % are kept" if size < 10**9 else "2 % are kept; torch's need more memory than there is",
    )


@pytest.mark.parametrize("size", [10**7, 10**8, 10**9])
def test_memory(figure: Callable[..., Figure], size: int) -> None:
    """Bytes per score beyond the scores and the mask that comes out."""
    values = scores(size)

    def extra(work: Callable[[Tensor], Tensor]) -> list[float]:
        return [max(0.0, peak_growth(lambda: work(values)) / size - 1)]

    figure(
        "selection",
        f"{size:.0e} scores: memory",
        "bytes per score",
        lambda: (extra(ours), {"one byte": [1.0], **{name: extra(peer) for name, peer in peers_at(size).items()}}),
        goal=1.0,
        note="growth of the process, beyond the scores and the mask",
    )
