"""Outputs are compared in the precision, and on the batches, that a module takes."""

import pytest
import torch
from compacted import assert_same, count, difference, numbers, on_paths, sizes, sparse
from models import MLP, changes, fingerprint, randomised
from torch import Tensor

from lightning_drive import compact
from lightning_drive.compaction import compact as compact_module
from lightning_drive.network import comparison


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


def test_compact__fixed_batch() -> None:
    """A module that takes batches of one size only."""

    class Fixed(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(2, 6))

    given = sparse(Fixed(6, 12, 3), density=0.5)
    small = compact(given, numbers(2, 6))
    assert count(small) < count(given)
    assert difference(given, small, numbers(2, 6)) < 1e-6


def test_compact__disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    given = randomised(MLP(6, 8, 3))
    before = fingerprint(given)
    monkeypatch.setattr(compact_module, "shrunk", lambda module, example: randomised(module, 5))
    with pytest.raises(RuntimeError, match=r"must give the outputs of the given one, and does not"):
        compact(given, numbers(2, 6))
    assert changes(given, before) == []


def test_in_float64() -> None:
    """The module, what it is given and what it returns; whole numbers stay what they are."""
    given = MLP(6, 8, 3)
    precise = comparison.in_float64(given, [numbers(2, 6)])
    assert precise is not None
    module, example = precise
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
    assert [leaf.dtype for leaf in (*example.inputs, *example.outputs[0])] == [torch.float64] * 2
    assert example.agrees(module)
    assert {parameter.dtype for parameter in given.parameters()} == {torch.float32}
