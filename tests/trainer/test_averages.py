"""Averages of Lightning's callbacks, and the copies that `averages` returns, are pruned along with the network."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
from copies import METHODS, Averaged, Ema, EmaInAnObject, EmaOfTensors, MeanTeacher, Student, fit
from fits import CALLBACKS, NUM_PRUNABLE, ConvModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_drive import DRIVEPruningCallback, IMPPruningCallback, SNIPPruningCallback
from lightning_drive.callbacks.hooks import PruningCallback

each_method = pytest.mark.parametrize("method", METHODS)


# What `averages` returns.


def of_teacher(pl_module: Any, trainer: Any) -> Any:
    teacher = pl_module.teacher
    tensors = (*teacher.named_parameters(), *teacher.named_buffers())
    return [{f"student.{name}": each for name, each in tensors}]


def of_average(pl_module: Any, trainer: Any) -> Any:
    return [{f"student.{name}": each for name, each in pl_module.average.module.named_parameters()}]


def of_callback(pl_module: Any, trainer: Any) -> Any:
    return [each.average for each in trainer.callbacks if getattr(each, "average", None) is not None]


def of_shadow(pl_module: Any, trainer: Any) -> Any:
    names = [name for name, _ in pl_module.named_parameters()]
    shadows = [each.average for each in trainer.callbacks if getattr(each, "average", None) is not None]
    return [dict(zip(names, each.shadow_params, strict=True)) for each in shadows]


def along(method: str, of: Any) -> PruningCallback:
    base: Any = DRIVEPruningCallback if method == "DRIVE" else IMPPruningCallback

    class Along(base):  # type: ignore[misc]
        def averages(self, pl_module: pl.LightningModule) -> Iterable[nn.Module | Mapping[str, Tensor]]:
            return of(pl_module, pl_module.trainer)  # type: ignore[no-any-return]

    return METHODS[method](Along)


ALONG = [
    (MeanTeacher, None, of_teacher),
    (Averaged, None, of_average),
    (Student, Ema, of_callback),
    (Student, EmaOfTensors, of_callback),
    (Student, EmaInAnObject, of_shadow),
]


@each_method
@pytest.mark.parametrize(("kind", "other", "of"), ALONG)
def test_pruned_along(tmp_path: Path, kind: Any, other: Any, of: Any, method: str) -> None:
    """A copy is sparse where the network is, and nothing is said of it."""
    module, pruning = kind(), along(method, of)
    others = [other()] if other else []
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = fits.trainer(tmp_path, pruning, *others, checkpoints, max_epochs=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, fits.loader())
    assert not [each for each in caught if "the same names and shapes" in str(each.message)]
    assert pruning.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    [average] = of(module, trainer)
    tensors = dict(average.named_parameters()) if isinstance(average, nn.Module) else average
    for name, mask in pruning.masks.items():
        assert not tensors[name][~mask].any()
        assert tensors[name].count_nonzero() > 0
        assert not torch.equal(tensors[name], module.get_parameter(name))
    if other is None:
        saved = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["state_dict"]
        path = "teacher" if kind is MeanTeacher else "average.module"
        for name, mask in pruning.masks.items():
            assert not saved[name.replace("student", path)][~mask].any()


class Notes(pl.Callback):
    """Notes a copy and the network at the start of the first batch after pruning."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            norms = pl_module.student[2], pl_module.teacher[2]
            self.seen.append((norms[0].running_var.clone(), norms[1].running_var.clone()))


def test_statistics_go_along(tmp_path: Path) -> None:
    """BatchNorm is measured anew for the sparse network; an average of the statistics before would not do."""
    fit(tmp_path, MeanTeacher(), along("DRIVE", of_teacher), notes := Notes())
    student, teacher = notes.seen[1]
    assert torch.equal(student, teacher)


def test_restarted_in_every_cycle(tmp_path: Path) -> None:
    fit(tmp_path, module := MeanTeacher(), pruning := along("IMP", of_teacher), notes := Notes())
    student, teacher = notes.seen[1]
    assert torch.equal(student, teacher)
    assert pruning.masks.hold_for(module)


@each_method
def test_resume(tmp_path: Path, method: str) -> None:
    """To the same network and the same copy as without an interruption."""
    whole, saves = MeanTeacher(), pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, whole, along(method, of_teacher), saves)
    for epoch in range(2):
        module, path = MeanTeacher(), tmp_path / f"epoch={epoch}.ckpt"
        assert not fit(tmp_path, module, along(method, of_teacher), ckpt_path=path)
        assert fits.equal_states(fits.state_of(module), fits.state_of(whole))


@pytest.mark.parametrize(
    ("of", "error", "text"),
    [
        (
            lambda module, _: [module.teacher],
            ValueError,
            r"with '1.weight', .* but MeanTeacher has no parameter",
        ),
        (
            lambda module, _: [{"student.1.weight": torch.zeros(2, 3)}],
            ValueError,
            r"'student.1.weight' with shape \(2, 3\), but it has shape \(24, 64\) in MeanTeacher",
        ),
        (
            lambda module, _: {"student.1.weight": torch.zeros(2, 3)},
            TypeError,
            r"must return a list, with every copy .* got dict",
        ),
        (lambda module, _: None, TypeError, r"must return a list, with every copy in it, got NoneType"),
        (lambda module, _: module.teacher, TypeError, r"must return a list, with every copy in it, got Sequential"),
        (lambda module, _: [[torch.zeros(2)]], TypeError, r"must return a list of modules, or of mappings .* got list"),
    ],
)
@each_method
def test_averages__error(tmp_path: Path, of: Any, error: type[Exception], text: str, method: str) -> None:
    """Before training starts."""
    module = MeanTeacher()
    before = fits.state_of(module)
    with pytest.raises(error, match=text):
        fit(tmp_path, module, along(method, of))
    assert fits.equal_states(fits.state_of(module), before)


def test_averages_of_a_data_free_method(tmp_path: Path) -> None:
    """The default has none, and `SNIP` at once prunes a teacher along as well."""

    class Along(SNIPPruningCallback):
        def averages(self, pl_module: Any) -> Any:
            return of_teacher(pl_module, None)

    pruning = Along(sparsity=0.8)
    assert list(SNIPPruningCallback(sparsity=0.8).averages(MeanTeacher())) == []
    assert not fit(tmp_path, module := MeanTeacher(), pruning)
    for name, mask in pruning.masks.items():
        assert not module.teacher.get_parameter(name.removeprefix("student."))[~mask].any()


# Lightning's callbacks.


since_lightning_2_6 = pytest.mark.skipif(
    not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="weight averaging came with Lightning 2.6"
)


@since_lightning_2_6
@pytest.mark.parametrize("pruning_first", [True, False])
def test_averaged_weights_are_sparse(tmp_path: Path, pruning_first: bool) -> None:
    """What an EMA callback averages, validates with, saves, and leaves behind is pruned, too."""
    module, callback = ConvModule(), fits.drive()
    average = pl.callbacks.EMAWeightAveraging(decay=0.9)
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    callbacks = [callback, average] if pruning_first else [average, callback]
    fits.trainer(tmp_path, *callbacks, checkpoint).fit(module, fits.loader())
    assert callback.masks.hold_for(module)
    saved = ConvModule()
    saved.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert callback.masks.hold_for(saved)


@pytest.mark.filterwarnings("ignore:.*swa:UserWarning", "ignore:Swapping scheduler:UserWarning")
def test_averaged_weights_are_sparse__swa(tmp_path: Path) -> None:
    """Also where the averaging began with the dense network."""
    module, callback = ConvModule(), fits.drive(bn_batches=2)
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    fits.trainer(tmp_path, callback, averaging, max_epochs=5).fit(module, fits.loader())
    assert callback.masks.hold_for(module)


def resume_from_each(
    tmp_path: Path, method: str, average: Callable[[], Callback], max_epochs: int
) -> tuple[PruningCallback, ConvModule, list[tuple[PruningCallback, ConvModule]]]:
    """Train with an average, and again from the checkpoint of each epoch but the last."""
    callback, module = CALLBACKS[method](), ConvModule()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fits.trainer(tmp_path, callback, average(), saving, max_epochs=max_epochs).fit(module, fits.loader())
    resumed = []
    for epoch in range(max_epochs - 1):
        other = CALLBACKS[method](), ConvModule()
        for parameter in other[1].parameters():
            nn.init.zeros_(parameter)
        running = fits.trainer(tmp_path, other[0], average(), max_epochs=max_epochs)
        running.fit(other[1], fits.loader(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        resumed.append(other)
    return callback, module, resumed


NO_CHECKPOINTS = "ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning"


@since_lightning_2_6
@pytest.mark.filterwarnings(NO_CHECKPOINTS)
@each_method
def test_averaged_weights_are_sparse__resumed(tmp_path: Path, method: str) -> None:
    """From a checkpoint of any epoch, dense or sparse, the average ends where it would have, bit for bit."""

    def average() -> Callback:
        return pl.callbacks.EMAWeightAveraging(decay=0.9)

    callback, module, resumed = resume_from_each(tmp_path, method, average, 5)
    fits.assert_pruned(callback, module)
    for other, again in resumed:
        fits.assert_pruned(other, again)
        assert other.masks == callback.masks
        assert fits.equal_states(fits.state_of(again), fits.state_of(module))
    for epoch, kept in enumerate(fits.NUM_KEPT_IN[method]):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert (
            fits.num_zeros(saved["state_dict"]) == fits.num_zeros(saved["current_model_state"]) == NUM_PRUNABLE - kept
        )


@since_lightning_2_6
@pytest.mark.parametrize("pruning_first", [True, False])
def test_averaged_statistics_are_re_estimated(tmp_path: Path, pruning_first: bool) -> None:
    """BatchNorm's statistics in an average are those of the pruned network, not an average with the dense one's."""

    class Compare(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            theirs = dict(average._average_model.module.named_buffers())
            own = dict(pl_module.named_buffers())
            equal.append(all(torch.equal(theirs[name], own[name]) for name in own if name.endswith("running_var")))

    equal: list[bool] = []
    average = pl.callbacks.EMAWeightAveraging(decay=0.99)
    callbacks = [fits.drive(), average]
    fits.trainer(tmp_path, *callbacks[:: 1 if pruning_first else -1], Compare()).fit(ConvModule(), fits.loader())
    assert equal == [True, False, True, False]  # the start, an average with it, pruning, an average with that


SWA_WARNINGS = ("ignore:.*swa:UserWarning", "ignore:Swapping scheduler:UserWarning")


@pytest.mark.filterwarnings(*SWA_WARNINGS, NO_CHECKPOINTS)
@pytest.mark.parametrize("first", [1, 2, 3], ids=["before", "with", "after"])
def test_averaged_weights_are_sparse__swa_resumed(tmp_path: Path, first: int) -> None:
    """Whenever SWA starts, before, with or after pruning, and wherever it is resumed."""

    def average() -> Callback:
        return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=first + 1)  # it counts from 1

    callback, module, resumed = resume_from_each(tmp_path, "DRIVE", average, 5)
    fits.assert_pruned(callback, module)
    for other, again in resumed:
        fits.assert_pruned(other, again)
        assert other.masks == callback.masks
