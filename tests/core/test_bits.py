"""Masks take one bit per weight, and come back as they were."""

import pytest
import torch
from torch import Tensor

from lightning_drive.core.bits import pack, unpack

SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (3, 5), (2, 3, 1, 7), (4, 4, 3, 3), (1, 1000)]


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_pack__round_trip(shape: tuple[int, ...], seed: int) -> None:
    mask = random_mask(*shape, seed=seed)
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == ((mask.numel() + 7) // 8,)
    found = unpack(bits, list(shape))
    assert found.dtype == torch.bool
    assert found.equal(mask)


def test_pack__first_entry_in_the_highest_bit() -> None:
    assert pack(torch.tensor([[True, False, True], [False, False, False]])).tolist() == [0b10100000]


def test_pack__layout_does_not_matter() -> None:
    mask = random_mask(4, 3, 3, 3)
    assert pack(mask.to(memory_format=torch.channels_last)).equal(pack(mask))
    assert pack(mask.transpose(0, 1)).equal(pack(mask.transpose(0, 1).contiguous()))
