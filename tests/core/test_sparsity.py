"""Counts and fractions are those of the masks, and an empty layer is found."""

import pytest
import torch

from lightning_drive.core import sparsity

MASKS = {
    "conv": torch.tensor([[True, False, False], [False, False, False]]),
    "fc": torch.tensor([True, True]),
    "gone": torch.zeros(2, 1, dtype=torch.bool),
}


def test_counts() -> None:
    assert sparsity.num_kept(MASKS) == 3
    assert sparsity.num_prunable(MASKS) == 10


def test_fractions() -> None:
    assert sparsity.density(MASKS) == 0.3
    assert sparsity.sparsity(MASKS) == 0.7


@pytest.mark.parametrize(("value", "expected"), [(True, 0.0), (False, 1.0)], ids=["all_kept", "all_pruned"])
def test_sparsity__limits(value: bool, expected: float) -> None:
    masks = {"a": torch.full((3, 4), value)}
    assert sparsity.sparsity(masks) == expected
    assert sparsity.density(masks) == 1 - expected


def test_sparsity__no_masks() -> None:
    assert sparsity.sparsity({}) == 0.0
    assert sparsity.density({}) == 1.0


def test_collapsed_layers() -> None:
    assert sparsity.collapsed_layers(MASKS) == ["gone"]
    assert sparsity.collapsed_layers({"fc": MASKS["fc"]}) == []


def test_counts__beyond_float32() -> None:
    """2**24 + 1 weights: a sum in float32 would lose the last one."""
    masks = {"a": torch.ones(2**24 + 1, dtype=torch.bool)}
    assert sparsity.num_kept(masks) == 2**24 + 1
