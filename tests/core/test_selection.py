"""Ranking must be exact, settle ties the same way everywhere, and see order only."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import pytest
import reference
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_drive.core import grouped_tensors, radix_select, sample_select, selection

SCORES = {"a": torch.tensor([[0.1, 0.9], [0.2, 0.5]]), "b": torch.tensor([0.7, 0.8])}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
INF, NAN = float("inf"), float("nan")

VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "distinct": lambda x: x,
    "many_ties": lambda x: (8 * x).round() / 8,
    "mostly_zero": lambda x: torch.where(x < 0.9, 0 * x, x),
    "all_equal": lambda x: 0 * x + 0.3,
    "all_zero": lambda x: 0 * x,
    "tiny": lambda x: x * torch.finfo(x.dtype).smallest_normal,  # denormals
    "huge": lambda x: x * torch.finfo(x.dtype).max,
    "wide": lambda x: torch.exp((x - 0.5) * 20),
    "close": lambda x: 1 + x * 4 * torch.finfo(x.dtype).eps,  # all in one bin but for the last digit
    "signed": lambda x: torch.where(x < 0.5, -1, 1) * torch.exp((x - 0.5) * 20),
    "signed_ties": lambda x: (8 * x).round() / 8 - 0.5,
    "negative": lambda x: -torch.exp((x - 0.5) * 20),
    "close_below_zero": lambda x: -1 - x * 4 * torch.finfo(x.dtype).eps,
    "signed_tiny": lambda x: (x - 0.5) * torch.finfo(x.dtype).smallest_normal,
    "signed_huge": lambda x: (2 * x - 1) * torch.finfo(x.dtype).max,
    "zeros_of_both_signs": lambda x: torch.where(x < 0.3, 0 * x, -0.0) + torch.where(x > 0.8, x, -0.0),
}


def random_scores(seed: int, dtype: torch.dtype = torch.float32, kind: str = "distinct") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv": (4, 3, 3, 3), "scalar": (), "fc": (5, 7), "row": (1, 11)}
    return {
        name: VALUES[kind](torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in shapes.items()
    }


def random_alive(scores: dict[str, Tensor], seed: int, density: float = 0.6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return {name: torch.rand(score.shape, generator=generator) < density for name, score in scores.items()}


def lists(masks: dict[str, Tensor]) -> dict[str, list[bool]]:
    return {name: mask.flatten().tolist() for name, mask in masks.items()}


@contextmanager
def by_digits() -> Generator[None]:
    """Find thresholds by digits also where a sample would do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_select, "cut", lambda *_: None)
        yield


def all_alive(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}


@pytest.mark.parametrize(
    ("num_kept", "expected"),
    [
        pytest.param(6, {"a": [[1, 1], [1, 1]], "b": [1, 1]}, id="dense"),
        pytest.param(3, {"a": [[0, 1], [0, 0]], "b": [1, 1]}, id="half"),
        pytest.param(1, {"a": [[0, 1], [0, 0]], "b": [0, 0]}, id="last_survivor"),
    ],
)
def test_keep_highest(num_kept: int, expected: dict[str, Any]) -> None:
    found = selection.keep_highest(SCORES, num_kept)
    assert {name: mask.int().tolist() for name, mask in found.masks.items()} == expected
    assert list(found.masks) == ["a", "b"]


@pytest.mark.parametrize(
    ("num_kept", "expected"),
    [
        pytest.param(1, {"a": [1, 0, 0], "b": [0, 0]}, id="lower_index"),
        pytest.param(3, {"a": [1, 1, 1], "b": [0, 0]}, id="earlier_tensor"),
        pytest.param(4, {"a": [1, 1, 1], "b": [1, 0]}, id="into_the_next"),
    ],
)
def test_keep_highest__all_tied(num_kept: int, expected: dict[str, list[int]]) -> None:
    scores = {"a": torch.ones(3), "b": torch.ones(2)}
    assert {
        name: mask.int().tolist() for name, mask in selection.keep_highest(scores, num_kept).masks.items()
    } == expected


def test_keep_highest__order_is_that_of_the_mapping() -> None:
    scores = {"z": torch.ones(2), "a": torch.ones(2)}
    assert lists(selection.keep_highest(scores, 2).masks) == {"z": [True, True], "a": [False, False]}


DENSITIES = {"no_masks": None, "all_alive": 1.0, "some_alive": 0.6, "few_alive": 0.1}
CASES = [
    pytest.param(dtype, chunk, density, id=f"{dtype}-{size}-{masks}")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for size, chunk in (("small_chunks", 7), ("one_chunk", 1 << 20))
    for masks, density in DENSITIES.items()
    if dtype.itemsize > 2 or (size == "one_chunk" and masks == "some_alive")  # halves are compared as float32
]


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize(("dtype", "chunk", "density"), CASES)
def test_keep_highest__matches_sort(
    dtype: torch.dtype, kind: str, chunk: int, density: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, by a sample and by digits, whatever the size of chunks and of samples."""
    monkeypatch.setattr(grouped_tensors, "CHUNK", chunk)
    monkeypatch.setattr(sample_select, "_CHUNK", chunk)
    monkeypatch.setattr(sample_select, "_SAMPLE", min(chunk, 1 << 15))
    scores = random_scores(3, dtype, kind)
    alive = None if density is None else random_alive(scores, 3, density)
    total = sum(int(mask.sum()) for mask in (alive or all_alive(scores)).values())
    for num_kept in {1, 2, total // 7, total // 2, total - 1, total} - {0}:
        found = selection.keep_highest(scores, num_kept, alive)
        expected = reference.keep_highest(scores, num_kept, alive or all_alive(scores))
        assert lists(found.masks) == lists(expected)
        assert all(found.masks[name].shape == score.shape for name, score in scores.items())
        with by_digits():
            again = selection.keep_highest(scores, num_kept, alive)
        assert lists(again.masks) == lists(expected)
        assert again[1:] == found[1:]


def test_keep_highest__many_counts() -> None:
    scores = random_scores(0, kind="many_ties")
    for num_kept in range(1, 156, 3):
        masks = selection.keep_highest(scores, num_kept).masks
        assert lists(masks) == lists(reference.keep_highest(scores, num_kept, all_alive(scores)))


@pytest.mark.parametrize("kind", ["distinct", "many_ties"])
@pytest.mark.parametrize("way", [by_digits, nullcontext])
def test_keep_highest__larger_than_a_chunk(kind: str, way: Callable[[], AbstractContextManager[None]]) -> None:
    generator = torch.Generator().manual_seed(0)
    size = grouped_tensors.CHUNK + 12_345
    score = torch.rand(size, generator=generator)
    score = (1000 * score).round() if kind == "many_ties" else score
    with way():
        found = selection.keep_highest({"a": score}, 100_001).masks["a"]
    expected = torch.zeros(size, dtype=torch.bool)
    expected[score.argsort(descending=True, stable=True)[:100_001]] = True
    assert found.equal(expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["distinct", "many_ties", "mostly_zero"])
class TestKeepHighestProperties:
    def test_ignores_positive_scale(self, seed: int, kind: str) -> None:
        scores = random_scores(seed, kind=kind)
        scaled = {name: 2.0**-20 * score for name, score in scores.items()}
        for num_kept in (5, 40, 100):
            masks = selection.keep_highest(scores, num_kept).masks
            assert lists(masks) == lists(selection.keep_highest(scaled, num_kept).masks)

    def test_sees_order_only(self, seed: int, kind: str) -> None:
        scores = random_scores(seed, torch.float64, kind)
        squared = {name: score**2 for name, score in scores.items()}
        lowered = {name: score - 0.5 for name, score in scores.items()}
        for num_kept in (5, 40, 100):
            masks = selection.keep_highest(scores, num_kept).masks
            assert lists(masks) == lists(selection.keep_highest(squared, num_kept).masks)
            assert lists(masks) == lists(selection.keep_highest(lowered, num_kept).masks)

    def test_nests(self, seed: int, kind: str) -> None:
        """What few places keep, more places keep too."""
        scores = random_scores(seed, kind=kind)
        masks = [selection.keep_highest(scores, num_kept).masks for num_kept in range(1, 150, 11)]
        for sparser, denser in pairwise(masks):
            assert all((sparser[name] <= denser[name]).all() for name in scores)

    def test_scores_unchanged(self, seed: int, kind: str) -> None:
        scores = random_scores(seed, kind=kind)
        copies = {name: score.clone() for name, score in scores.items()}
        selection.keep_highest(scores, 20, random_alive(scores, seed))
        assert all(score.equal(copies[name]) for name, score in scores.items())


def test_keep_highest__negative_zero_is_zero() -> None:
    """-0.0 has the sign bit set; it ties with 0.0 and the lower index wins."""
    scores = {"a": torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0])}
    assert lists(selection.keep_highest(scores, 3).masks) == {"a": [True, True, False, False, True]}


@DTYPES
def test_keep_highest__every_denormal_counts(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    steps = torch.tensor([0, 3, 1, 2], dtype=torch.float64) * torch.finfo(dtype).smallest_normal / 8
    scores = {"a": steps.to(dtype), "b": torch.tensor([tiny], dtype=dtype)}
    found = selection.keep_highest(scores, 3)
    assert lists(found.masks) == {"a": [False, True, False, True], "b": [True]}
    assert found.threshold == tiny / 4


def test_keep_highest__mixed_precision() -> None:
    """Equal in float32, different in float64."""
    scores = {"a": torch.tensor([1.0]), "b": torch.tensor([1 + 1e-12, 1 - 1e-12], dtype=torch.float64)}
    assert lists(selection.keep_highest(scores, 1).masks) == {"a": [False], "b": [True, False]}
    assert lists(selection.keep_highest(scores, 2).masks) == {"a": [True], "b": [True, False]}


@pytest.mark.parametrize("num_kept", [3, 7, 12, 20])
def test_keep_highest__channels_last(num_kept: int) -> None:
    """The memory layout of a convolution's weight has no say in its ties."""
    score = random_scores(0, kind="many_ties")["conv"]
    expected = selection.keep_highest({"conv": score}, num_kept).masks
    found = selection.keep_highest({"conv": score.to(memory_format=torch.channels_last)}, num_kept).masks
    assert lists(found) == lists(expected)


@pytest.mark.parametrize("num_kept", [2, 5])
def test_keep_highest__transposed(num_kept: int) -> None:
    scores = {"a": torch.tensor([[1.0, 2.0, 2.0], [2.0, 1.0, 2.0]]).t()}
    found = selection.keep_highest(scores, num_kept).masks
    assert lists(found) == lists(reference.keep_highest(scores, num_kept, all_alive(scores)))


def test_keep_highest__alive_cannot_return() -> None:
    scores = {"a": torch.tensor([9.0, 1.0, 8.0, 2.0])}
    alive = {"a": torch.tensor([False, True, False, True])}
    assert lists(selection.keep_highest(scores, 1, alive).masks) == {"a": [False, False, False, True]}
    assert lists(selection.keep_highest(scores, 2, alive).masks) == {"a": [False, True, False, True]}


@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF, -1.0])
@pytest.mark.parametrize("num_pruned", [1, 100], ids=["marked", "left_out"])
def test_keep_highest__pruned_scores_do_not_matter(bad: float, num_pruned: int) -> None:
    scores = {"a": torch.tensor([*[bad] * num_pruned, 1.0, 2.0])}
    alive = {"a": torch.tensor([*[False] * num_pruned, True, True])}
    assert lists(selection.keep_highest(scores, 1, alive).masks) == {"a": [False] * (num_pruned + 1) + [True]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keep_highest__every_bit_of_nan_counts(dtype: torch.dtype) -> None:
    """A NaN whose bits are all set, as pruned entries are marked, is still an error where it is alive."""
    integers = torch.int64 if dtype == torch.float64 else torch.int32
    scores = {"a": torch.tensor([-1, -1, 0, 1], dtype=integers).view(dtype)}
    with pytest.raises(ValueError, match=r"'a' contain nan or inf \(1 of 3\)"):
        selection.keep_highest(scores, 1, {"a": torch.tensor([False, True, True, True])})


class Waits(TorchDispatchMode):
    """Counts the operations whose results a program on a GPU has to wait for."""

    OPERATIONS = ("_local_scalar_dense.default", "nonzero.default", "bincount.default", "index.Tensor")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func).removeprefix("aten.") in self.OPERATIONS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_keep_highest__waits_do_not_grow_with_tensors(density: float) -> None:
    def waits(num_tensors: int) -> int:
        generator = torch.Generator().manual_seed(0)
        scores = {str(index): torch.rand(30, generator=generator) for index in range(num_tensors)}
        with by_digits(), Waits() as found:
            selection.keep_highest(scores, 10 * num_tensors, random_alive(scores, 0, density))
        return found.count

    assert waits(2) == waits(60) <= 16


@pytest.mark.parametrize(
    ("num_kept", "threshold", "num_above", "num_tied"),
    [(1, 3.0, 0, 1), (2, 2.0, 1, 3), (4, 2.0, 1, 3), (5, 1.0, 4, 1), (6, 0.0, 5, 2)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keep_highest__line(num_kept: int, threshold: float, num_above: int, num_tied: int, dtype: torch.dtype) -> None:
    scores = {"a": torch.tensor([2.0, 0.0, 3.0], dtype=dtype), "b": torch.tensor([2.0, 1.0, -0.0, 2.0], dtype=dtype)}
    found = selection.keep_highest(scores, num_kept)
    assert (found.threshold, found.num_above, found.num_tied) == (threshold, num_above, num_tied)


@DTYPES
@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF], ids=str)
def test_keep_highest__non_finite_error(dtype: torch.dtype, bad: float) -> None:
    scores = {"conv": torch.ones(3, dtype=dtype), "fc": torch.tensor([1.0, bad, bad], dtype=dtype)}
    with pytest.raises(ValueError, match=r"scores of 'fc' contain nan or inf \(2 of 3\)"):
        selection.keep_highest(scores, 2)


@DTYPES
@pytest.mark.parametrize("way", [by_digits, nullcontext])
@pytest.mark.parametrize(
    ("num_kept", "threshold", "num_above", "num_tied"),
    [(1, 1.0, 0, 1), (2, 0.0, 1, 2), (4, -0.25, 3, 2), (5, -0.25, 3, 2), (6, -2.0, 5, 1)],
)
def test_keep_highest__line_below_zero(
    dtype: torch.dtype, way: Any, num_kept: int, threshold: float, num_above: int, num_tied: int
) -> None:
    scores = {"a": torch.tensor([-0.25, -0.0, 0.0], dtype=dtype), "b": torch.tensor([1.0, -2, -0.25], dtype=dtype)}
    with way():
        found = selection.keep_highest(scores, num_kept)
    assert (found.threshold, found.num_above, found.num_tied) == (threshold, num_above, num_tied)
    assert str(found.threshold) == str(threshold)  # of -0.0 as well


def test_keep_highest__way_does_not_depend_on_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample leads to thresholds of either sign, so that scores of both cost no more than others."""
    monkeypatch.setattr(radix_select, "cut", pytest.fail)
    scores = torch.randn(200_001, generator=torch.Generator().manual_seed(0))
    for num_kept in (1_000, 100_000, 199_000):
        assert int(selection.keep_highest({"a": scores}, num_kept).masks["a"].sum()) == num_kept


@pytest.mark.parametrize("num_kept", [0, -1, 7])
def test_keep_highest__count_error(num_kept: int) -> None:
    with pytest.raises(ValueError, match=rf"`num_kept` must be in 1..6, .* got {num_kept}"):
        selection.keep_highest(SCORES, num_kept)


def test_keep_highest__count_of_alive_error() -> None:
    alive = {"a": torch.zeros(2, 2, dtype=torch.bool), "b": torch.tensor([True, False])}
    with pytest.raises(ValueError, match=r"`num_kept` must be in 1..1, .* got 2"):
        selection.keep_highest(SCORES, 2, alive)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "some_alive"])
def test_keep_highest__of_some(masked: bool) -> None:
    """Of more masks than scores, those of the scores count."""
    scores = {name: score for name, score in random_scores(1, kind="many_ties").items() if name != "scalar"}
    alive = random_alive(scores, 1) if masked else None
    counts = {"conv": 20, "fc": 10, "row": 3}
    for name, score in scores.items():
        found = selection.keep_highest({name: score}, counts[name], alive)
        lives = {name: (alive or all_alive(scores))[name]}
        assert lists(found.masks) == lists(reference.keep_highest({name: score}, counts[name], lives))
