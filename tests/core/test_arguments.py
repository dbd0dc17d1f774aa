"""Settings come from many tools; what is kept of them is plain Python, and what is wrong is named and not printed."""

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import fits
import numpy as np
import pytest
import torch
from torch import nn

from lightning_drive import (
    SNIP,
    DRIVEPruningCallback,
    IMPPruningCallback,
    Magnitude,
    Random,
    SNIPPruningCallback,
    SynFlow,
    SynFlowPruningCallback,
    find_masks,
)
from lightning_drive.core import arguments, schedules
from lightning_drive.report.plan import planned_parameters


class ListConfig(Sequence[Any]):
    """As configuration libraries have it: a sequence that is no list."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


class Pattern(str, enum.Enum):
    FIRST = "0.*"


class Choice(str, enum.Enum):
    LINEAR = "linear"


CONTAINERS: dict[str, Callable[[list[str]], Any]] = {
    "tuple": tuple,
    "sequence": ListConfig,
    "array": np.array,
    "set": set,
    "keys_view": lambda patterns: dict.fromkeys(patterns).keys(),
    "generator": lambda patterns: (pattern for pattern in patterns),
    "enumeration": lambda patterns: [Pattern(pattern) for pattern in patterns],
}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
class TestPatterns:
    @pytest.mark.parametrize("argument", ["include", "exclude"])
    def test_callbacks(self, make: Callable[[list[str]], Any], argument: str) -> None:
        for kind in (DRIVEPruningCallback, SNIPPruningCallback, SynFlowPruningCallback, IMPPruningCallback):
            callback = kind(sparsity=0.5, **{argument: make(["0.*"])})
            kept = getattr(callback, argument)
            assert type(kept) is list
            assert [type(pattern) for pattern in kept] == [str]
            planned = [each.name for each in callback.plan(net()).parameters if not each.stays_dense]
            assert planned == (["0.weight"] if argument == "include" else ["2.weight"])
            assert callback.state_dict()["settings"][argument] == ["0.*"]

    def test_find_masks(self, make: Callable[[list[str]], Any]) -> None:
        assert list(find_masks(net(), Magnitude(), sparsity=0.5, include=make(["0.*"]))) == ["0.weight"]
        assert list(find_masks(net(), Magnitude(), sparsity=0.5, exclude=make(["0.*"]))) == ["2.weight"]

    def test_planned_parameters(self, make: Callable[[list[str]], Any]) -> None:
        planned = planned_parameters(net(), {}, make(["0.*"]))
        assert [each.name for each in planned if each.stays_dense == "excluded"] == ["0.weight", "0.bias"]


def test_patterns__order() -> None:
    """That of a set depends on the hash seed."""
    assert arguments.check_patterns("include", {"c", "a", "b"}) == ["a", "b", "c"]
    assert arguments.check_patterns("include", ("c", "a")) == ["c", "a"]
    assert arguments.check_patterns("include", []) == []


@pytest.mark.parametrize(
    ("given", "text"),
    [
        pytest.param(net(), r"got a Sequential \(a module\)\. Use names", id="module"),
        pytest.param(nn.ModuleDict({"a": nn.Linear(2, 2)}), r"got a ModuleDict \(a module\)", id="iterable_module"),
        pytest.param(dict(net().named_parameters()), r"got a dict\. Use names", id="dictionary"),
        pytest.param(OrderedDict(net().state_dict()), r"got an OrderedDict\.", id="state_dict"),
        pytest.param(list(net().parameters()), r"got a list with a Parameter in it\. Use names", id="parameters"),
        pytest.param(net().named_parameters(), r"got a generator with a tuple in it", id="named_parameters"),
        pytest.param([net()[0]], r"got a list with a Linear in it", id="modules"),
        pytest.param(torch.ones(3), r"got a Tensor\.", id="tensor"),
        pytest.param(np.ones(3), r"got a ndarray with .* in it|got an ndarray with .* in it", id="array_of_numbers"),
        pytest.param([["0.*"]], r"got a list with a list in it", id="list_of_lists"),
        pytest.param([b"0.*"], r"got a list with a bytes in it", id="bytes"),
        pytest.param(3, r"got 3\. Use names", id="number"),
        pytest.param("0.*", r"got '0\.\*'\.$", id="text"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda given: DRIVEPruningCallback(sparsity=0.5, include=given),
        lambda given: IMPPruningCallback(sparsity=0.5, exclude=given),
        lambda given: find_masks(net(), Magnitude(), sparsity=0.5, include=given),
    ],
    ids=["callback", "imp", "find_masks"],
)
def test_patterns__error(use: Callable[[Any], object], given: Any, text: str) -> None:
    if isinstance(given, Iterator):  # which the first use would have read
        given = net().named_parameters()
    with pytest.raises(TypeError, match=rf"must be a list of glob patterns over parameter names.*{text}") as caught:
        use(given)
    assert "tensor(" not in str(caught.value)
    assert len(str(caught.value)) < 250


NUMBERS: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda value: np.asarray(value)[()],
    "array_without_dimensions": np.asarray,
    "tensor_without_dimensions": torch.tensor,
    "narrow": lambda value: np.int8(value) if type(value) is int else np.asarray(value)[()],
}


@pytest.mark.parametrize("of", NUMBERS.values(), ids=NUMBERS)
def test_numbers(of: Callable[[Any], Any]) -> None:
    """Each becomes the number of Python that it is."""
    drive = DRIVEPruningCallback(
        sparsity=of(0.75),
        rounds=of(3),
        batches_per_round=of(2),
        warmup_epochs=of(4),
        bn_batches=of(0),
        reset_best=of(False),
    )
    imp = IMPPruningCallback(
        sparsity=of(0.5), cycles=of(2), epochs_per_cycle=of(3), rewind_epoch=of(1), bn_batches=of(7)
    )
    for callback, settings in (
        (drive, {"sparsity": 0.75, "warmup_epochs": 4, "bn_batches": 0, "reset_best": False}),
        (imp, {"sparsity": 0.5, "cycles": 2, "epochs_per_cycle": 3, "rewind_epoch": 1, "bn_batches": 7}),
    ):
        kept = {name: getattr(callback, name) for name in settings}
        assert kept == settings
        assert {name: type(value) for name, value in kept.items()} == {k: type(v) for k, v in settings.items()}
    for method, text in (
        (drive.method, "DRIVE(rounds=3, batches_per_round=2, mode='train')"),
        (SNIP(rounds=of(3)), "SNIP(rounds=3, batches_per_round=1, mode='train')"),
        (SynFlow(rounds=of(3)), "SynFlow(rounds=3)"),
        (Magnitude(rounds=of(3)), "Magnitude(rounds=3)"),
        (Random(rounds=of(3), seed=of(-5)), "Random(rounds=3, seed=-5)"),
    ):
        assert str(method) == text
    plan = drive.plan(net(), max_epochs=of(10), steps_per_epoch=of(20))
    assert (plan.steps, type(plan.steps), type(plan.max_epochs)) == (200, int, int)
    assert type(schedules.exponential(of(1), of(2), of(0.75))) is float
    assert schedules.linear(of(1), of(2), of(0.5), of(0.25)) == 0.625
    assert find_masks(net(), Magnitude(), sparsity=of(0.75), scope="layerwise").num_kept == 12


@pytest.mark.parametrize("value", [np.float32(0.9), torch.tensor(0.9), np.float16(0.9), Fraction(9, 10)])
def test_numbers__exact(value: Any) -> None:
    """A narrow float is what it is, not what it was rounded from."""
    callback = DRIVEPruningCallback(sparsity=value)
    assert (callback.sparsity, type(callback.sparsity)) == (float(value), float)


@pytest.mark.parametrize(
    "text", [np.str_("linear"), enum.StrEnum("S", {"A": "linear"}).A if hasattr(enum, "StrEnum") else "linear"]
)
def test_choices(text: Any) -> None:
    assert type(DRIVEPruningCallback(sparsity=0.5, schedule=text).schedule) is str


@pytest.mark.parametrize(
    "wrong", [np.float64(2.5), np.float32(3), np.int64(0), np.bool_(True), True, torch.tensor(2.0), "3"]
)
@pytest.mark.parametrize("argument", ["rounds", "batches_per_round"])
def test_numbers__count_error(argument: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must be a whole number of at least 1, got"):
        DRIVEPruningCallback(sparsity=0.9, **{argument: wrong})


@pytest.mark.parametrize("wrong", [np.bool_(True), torch.tensor(True), "0.9", np.array([0.9]), 1j])
def test_numbers__sparsity_error(wrong: Any) -> None:
    for use in (
        lambda: IMPPruningCallback(sparsity=wrong),
        lambda: find_masks(net(), Magnitude(), sparsity=wrong),
    ):
        with pytest.raises(TypeError, match="`sparsity` is the fraction removed and must be a number"):
            use()


@pytest.mark.parametrize("wrong", [nn.Linear(9, 9), torch.rand(99, 9), nn.Parameter(torch.rand(9)), [0.5] * 99])
@pytest.mark.parametrize("argument", ["sparsity", "rounds", "reset_best", "schedule", "scope", "mode"])
def test_errors_are_short(argument: str, wrong: Any) -> None:
    kind = type(wrong).__name__
    text = (
        f"`schedule` is a function, '{kind}'.* raised "
        if (argument, kind) == ("schedule", "Linear")
        else "`{}` .* got a {}.$"
    )
    with pytest.raises((TypeError, ValueError), match=text.format(argument, kind)) as error:
        DRIVEPruningCallback(**{"sparsity": 0.5, argument: wrong})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("wrong", [1, np.int64(1), "yes", None])
def test_flags__error(wrong: Any) -> None:
    with pytest.raises(TypeError, match="`reset_best` must be True or False"):
        DRIVEPruningCallback(sparsity=0.9, reset_best=wrong)


def test_checkpoint_is_plain(tmp_path: Path) -> None:
    """What was given by other tools is not in checkpoints, which load without pickles."""
    callback = DRIVEPruningCallback(
        sparsity=np.float32(0.5),
        warmup_epochs=np.int64(0),
        rounds=np.int32(2),
        bn_batches=np.int8(0),
        schedule=np.str_("linear"),
        exclude=np.array(["features.0.*"]),
        reset_best=np.bool_(False),
    )
    trainer = fits.trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(fits.ConvModule(), fits.loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert callback.report is not None
    assert callback.report.overall_sparsity is not None
    assert callback.report.overall_sparsity < callback.report.sparsity
