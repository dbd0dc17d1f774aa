"""Whatever switch of the Trainer is turned: pruned once per cut, to the exact count, and zeros stay, until a stop."""

import os
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fits
import lightning.pytorch as pl
import processes
import pytest
import resumable
import stopped
import torch
import torch.nn.functional as F
from fits import CALLBACKS, LAST_CUT, NUM_KEPT, NUM_PRUNABLE, PRUNABLE, ConvModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, timer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_drive import Masks, SNIPPruningCallback, SynFlowPruningCallback
from lightning_drive.callbacks.hooks import PruningCallback

EACH = pytest.mark.parametrize("method", CALLBACKS)
NUM_CUTS = {"DRIVE": 1, "IMP": 2, "Gradual": 2, "Gradual_by_drive": 2}


class Watch(Callback):
    """Sees after every batch and before every validation that zeros are where the masks say, and nowhere else."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.counter = resumable.CountPruning(pruning)
        self.pruning = pruning
        self.batches = 0

    def _look(self, pl_module: pl.LightningModule) -> None:
        masks = self.pruning.masks
        weights = dict(pl_module.named_parameters())
        zeros = sum(int((weights[name] == 0).sum()) for name in masks or PRUNABLE if name in weights)
        assert masks.hold_for(pl_module)
        assert zeros == masks.num_prunable - masks.num_kept

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.counter.on_train_batch_end(trainer)
        self.batches += 1
        self._look(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(pl_module)


class Metered(ConvModule):
    """Validates with a metric, and keeps a running mean that a forward pass replaces: in inference mode, as well."""

    def __init__(self) -> None:
        super().__init__()
        self.val_accuracy = MulticlassAccuracy(fits.NUM_CLASSES)
        self.register_buffer("mean", torch.zeros(8, 8))

    def forward(self, images: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * images.detach().mean((0, 1))
        return super().forward(images)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.val_accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.val_accuracy)


class Wordless(ConvModule):
    """Logs nothing, as barebones training wants it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class OnDicts(Wordless):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["images"], batch["labels"]), batch_idx)


class OnPairs(Wordless):
    """Trains on batches of two loaders; one of them may have run out."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum((F.cross_entropy(self(part[0]), part[1]) for part in batch.values() if part), torch.zeros(()))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(list(fits.dataset()))


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return fits.loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return fits.loader(16)


def in_dicts() -> DataLoader[Any]:
    images, labels = fits.dataset().tensors
    return DataLoader([{"images": i, "labels": j} for i, j in zip(images, labels, strict=True)], batch_size=16)


def combined(mode: Any) -> CombinedLoader:
    return CombinedLoader({"a": fits.loader(48), "b": fits.loader(32)}, mode)


def fit(
    tmp_path: Path, callback: PruningCallback, *others: Callback, module: Any = None, data: Any = None, **kwargs: Any
) -> tuple[pl.Trainer, pl.LightningModule, Watch]:
    module, watch = ConvModule() if module is None else module, Watch(callback)
    ckpt_path = kwargs.pop("ckpt_path", None)
    running = fits.trainer(tmp_path, callback, watch, *others, **kwargs)
    running.fit(module, fits.loader() if data is None else data, ckpt_path=ckpt_path)
    return running, module, watch


def check(callback: PruningCallback, module: pl.LightningModule) -> None:
    assert callback.report is not None
    assert callback.report.epoch == LAST_CUT
    assert callback.masks.num_prunable == NUM_PRUNABLE
    assert callback.masks.num_kept == NUM_KEPT == round(NUM_PRUNABLE * 0.2)
    assert callback.masks.hold_for(module)


# Switches.

SWITCHES: dict[str, tuple[dict[str, Any], int]] = {  # settings, and the batches that are trained on
    "overfit_batches": ({"overfit_batches": 2}, 8),
    "limit_train_batches_int": ({"limit_train_batches": 2}, 8),
    "limit_train_batches_float": ({"limit_train_batches": 0.5}, 4),
    "limit_val_batches_0": ({"limit_val_batches": 0}, 12),
    "max_steps_alone": ({"max_steps": 9, "max_epochs": None}, 9),
    "max_steps_and_endless_epochs": ({"max_steps": 9, "max_epochs": -1}, 9),
    "max_steps_first": ({"max_steps": 9, "max_epochs": 20}, 9),
    "val_check_interval_fraction": ({"val_check_interval": 0.5, "data": lambda: fits.loader(64)}, 16),
    "val_check_interval_across_epochs": ({"val_check_interval": 4, "check_val_every_n_epoch": None}, 12),
    "check_val_every_n_epoch": ({"check_val_every_n_epoch": 3}, 12),
    "detect_anomaly": ({"detect_anomaly": True, "module": Wordless}, 12),
    "deterministic": ({"deterministic": True}, 12),
    "reload_dataloaders": ({"reload_dataloaders_every_n_epochs": 1}, 12),
    "accumulate_grad_batches": ({"accumulate_grad_batches": 2}, 12),
    "profiler": ({"profiler": "simple"}, 12),
    "inference_mode": ({"inference_mode": True, "num_sanity_val_steps": 2, "module": Metered}, 12),
    "no_inference_mode": ({"inference_mode": False, "num_sanity_val_steps": 2, "module": Metered}, 12),
    "use_distributed_sampler": ({"use_distributed_sampler": False}, 12),
    "data_module": ({"data": Data}, 12),
    "stream": ({"data": lambda: DataLoader(Stream(), batch_size=16)}, 12),
    "batches_are_dicts": ({"module": OnDicts, "data": in_dicts}, 12),
    "max_size_cycle": ({"module": OnPairs, "data": lambda: combined("max_size_cycle")}, 12),
    "min_size": ({"module": OnPairs, "data": lambda: combined("min_size")}, 8),
    "max_size": ({"module": OnPairs, "data": lambda: combined("max_size")}, 12),
    "barebones": (
        {
            "barebones": True,
            "module": Wordless,
            **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")),
            **dict.fromkeys(("num_sanity_val_steps", "log_every_n_steps")),
        },
        12,
    ),
}


@pytest.fixture
def _any_algorithm() -> Iterator[None]:
    """Undo `deterministic=True`, which Lightning leaves behind."""
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if workspace is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


@pytest.mark.usefixtures("_any_algorithm")
@pytest.mark.parametrize("switch", SWITCHES)
@EACH
def test_switch(tmp_path: Path, method: str, switch: str) -> None:
    settings, num_batches = SWITCHES[switch]
    settings = dict(settings)
    module, data = settings.pop("module", ConvModule)(), settings.pop("data", fits.loader)()
    callback = CALLBACKS[method]()
    _, _, watch = fit(tmp_path, callback, module=module, data=data, **settings)
    check(callback, module)
    assert watch.counter.changes == NUM_CUTS[method]
    assert watch.batches == num_batches


@pytest.mark.parametrize("switch", ["batches_are_dicts", "max_size", "data_module"])
@pytest.mark.parametrize(
    "make", [SNIPPruningCallback, partial(SynFlowPruningCallback, rounds=5)], ids=["SNIP", "SynFlow"]
)
def test_switch__at_initialisation(tmp_path: Path, make: Any, switch: str) -> None:
    """Also where the very first thing that happens to the data is that it is scored on."""
    settings = dict(SWITCHES[switch][0])
    module, data = settings.pop("module", ConvModule)(), settings.pop("data", fits.loader)()
    callback = make(sparsity=0.8)
    _, _, watch = fit(tmp_path, callback, module=module, data=data, max_epochs=2, **settings)
    assert callback.masks.num_kept == NUM_KEPT
    assert callback.masks.hold_for(module)
    assert watch.counter.changes == 1


@EACH
def test_fast_dev_run__several_batches(tmp_path: Path, method: str) -> None:
    callback = CALLBACKS[method]()
    _, module, watch = fit(tmp_path, callback, fast_dev_run=2)
    assert callback.masks.num_kept == NUM_KEPT
    assert callback.masks.hold_for(module)
    assert (watch.batches, watch.counter.changes) == (2, 1)


@EACH
def test_limit_train_batches__none(tmp_path: Path, method: str) -> None:
    """Without training there is no pruning either, and the module stays as it is."""
    callback, before = CALLBACKS[method](), fits.state_of(ConvModule())
    _, module, watch = fit(tmp_path, callback, limit_train_batches=0)
    assert watch.batches == 0
    assert not callback.pruned
    assert fits.equal_states(fits.state_of(module), before)


class SecondsAreBatches(Callback):
    """Has Lightning's Timer think that every batch takes a second, and all else no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0
        monkeypatch.setattr(timer, "time", SimpleNamespace(monotonic=lambda: self.seconds))

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds += 1


@EACH
def test_max_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Training that only the clock stops prunes once, however long it lasts."""
    callback, clock = CALLBACKS[method](), SecondsAreBatches(monkeypatch)
    running, module, watch = fit(tmp_path, callback, clock, max_time=timedelta(seconds=13), max_epochs=-1)
    check(callback, module)
    assert watch.counter.changes == NUM_CUTS[method]
    assert running.current_epoch > LAST_CUT


def test_max_time__too_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback, clock = fits.drive(), SecondsAreBatches(monkeypatch)
    with pytest.warns(
        UserWarning, match=r"by Timer \(or `max_time`\), before the warm-up was over: the network is dense"
    ):
        _, _, watch = fit(tmp_path, callback, clock, max_time=timedelta(seconds=4))
    assert not callback.pruned
    assert watch.batches < 2 * 3


@EACH
def test_min_epochs(tmp_path: Path, method: str) -> None:
    """What would stop training in the first epoch is put off until the network is sparse."""

    class Impatient(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    callback = CALLBACKS[method]()
    running, module, watch = fit(tmp_path, callback, Impatient(), min_epochs=3, max_epochs=8)
    check(callback, module)
    assert watch.counter.changes == NUM_CUTS[method]
    assert running.current_epoch == 3


# Several fits.


@EACH
def test_several_fits__raised_max_epochs(tmp_path: Path, method: str) -> None:
    """The same Trainer goes on, and neither prunes again nor forgets."""
    callback = CALLBACKS[method]()
    running, module, watch = fit(tmp_path, callback)
    digest = callback.masks.digest()
    running.fit_loop.max_epochs = 6
    running.fit(module, fits.loader())
    check(callback, module)
    assert callback.masks.digest() == digest
    assert (watch.counter.changes, running.current_epoch) == (NUM_CUTS[method], 6)


@EACH
def test_several_fits__new_trainer(tmp_path: Path, method: str) -> None:
    """A pruned module, given to a new Trainer with its callback, is sparse from the first step on."""
    callback = CALLBACKS[method]()
    _, module, _ = fit(tmp_path, callback)
    digest = callback.masks.digest()
    _, _, watch = fit(tmp_path, callback, module=module, max_epochs=3)
    check(callback, module)
    assert callback.masks.digest() == digest
    assert watch.counter.changes == 1  # seen once, at the first batch


@EACH
def test_several_fits__another_module(tmp_path: Path, method: str) -> None:
    """The same callback prunes another module by that module's own weights."""
    callback, alone = CALLBACKS[method](), CALLBACKS[method]()
    fit(tmp_path, callback)
    modules = [ConvModule(), ConvModule()]
    for module in modules:
        nn.init.kaiming_normal_(module.head.weight, generator=torch.Generator().manual_seed(5))
    _, _, watch = fit(tmp_path, callback, module=modules[0])
    fit(tmp_path, alone, module=modules[1])
    check(callback, modules[0])
    assert callback.masks == alone.masks
    assert watch.counter.changes == NUM_CUTS[method]


# Checkpoints.


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
@EACH
def test_evaluation(tmp_path: Path, method: str) -> None:
    """In every stage, from whichever checkpoint: weights are sparse, masks and report are there, for a new fit too."""
    callback, module = CALLBACKS[method](), ConvModule()
    module.test_step = module.validation_step  # type: ignore[method-assign]
    module.predict_step = lambda batch, batch_idx: module(batch[0])  # type: ignore[method-assign, assignment]
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="train_loss", save_last=True)
    running, _, _ = fit(tmp_path, callback, checkpoint, module=module)
    masks, report = callback.masks, callback.report
    for stage in ("validate", "test", "predict"):
        for ckpt_path in ("best", "last", tmp_path / "last.ckpt"):
            resumable.forget(module)
            getattr(running, stage)(module, fits.loader(16), ckpt_path=ckpt_path)
            check(callback, module)
            assert (callback.masks, callback.report) == (masks, report)

    running.fit_loop.max_epochs = 5
    running.fit(module, fits.loader())
    check(callback, module)
    assert callback.masks == masks


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each callback a folder with a checkpoint of every epoch of a whole run, `0.ckpt` to `3.ckpt`."""
    folders = {method: tmp_path_factory.mktemp(method) for method in CALLBACKS}
    for method, folder in folders.items():
        saving = ModelCheckpoint(folder, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
        fits.trainer(folder, CALLBACKS[method](), saving).fit(ConvModule(), fits.loader())
    return folders


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
@EACH
def test_resume__finished(checkpoints: Any, tmp_path: Path, method: str) -> None:
    """Resuming what is over trains nothing, and leaves the module pruned, with masks and report."""
    callback, module, last = CALLBACKS[method](), ConvModule(), checkpoints[method] / "3.ckpt"
    resumable.forget(module)
    _, _, watch = fit(tmp_path, callback, module=module, ckpt_path=last)
    assert watch.batches == 0
    check(callback, module)
    assert fits.equal_states(fits.state_of(module), torch.load(last, weights_only=True)["state_dict"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
@pytest.mark.parametrize("epoch", [0, 1, 3])
@EACH
def test_resume__another_max_epochs(checkpoints: Any, tmp_path: Path, method: str, epoch: int) -> None:
    """A run that is resumed to be longer than planned prunes when it would have, and is sparse to its new end."""
    callback, module = CALLBACKS[method](), ConvModule()
    resumable.forget(module)
    running, _, _ = fit(
        tmp_path, callback, module=module, max_epochs=6, ckpt_path=checkpoints[method] / f"{epoch}.ckpt"
    )
    check(callback, module)
    whole = torch.load(checkpoints[method] / "3.ckpt", weights_only=True)["callbacks"][type(callback).__name__]
    assert callback.masks == Masks.from_state_dict(whole["masks"])
    assert running.current_epoch == 6


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
@EACH
def test_resume__too_short_error(checkpoints: Any, tmp_path: Path, method: str) -> None:
    """A dense run that is resumed to end before it prunes is refused before it trains."""
    callback = CALLBACKS[method]()
    with pytest.raises(MisconfigurationException, match="training ends after max_epochs=2 epochs"):
        fit(tmp_path, callback, max_epochs=2, ckpt_path=checkpoints[method] / "0.ckpt")


class Renamed(ConvModule):
    """Has its last layer under another name, and takes a checkpoint that does not know it."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.classifier = self.head
        del self.head

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.features(images)))
        return self.classifier(features.flatten(1))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
@EACH
def test_resume__masks_of_another_module_error(checkpoints: Any, tmp_path: Path, method: str) -> None:
    """Named, and before the first batch."""
    callback = CALLBACKS[method]()
    watch = Watch(callback)
    with pytest.raises(ValueError, match=r"'head\.weight', but the module has no parameter of that name"):
        fits.trainer(tmp_path, callback, watch, max_epochs=6).fit(
            Renamed(), fits.loader(), ckpt_path=checkpoints[method] / "2.ckpt"
        )
    assert watch.batches == 0


# Stops.


def test_exception__optimizer_that_evaluates_several_times(tmp_path: Path) -> None:
    """An interrupt between two evaluations of one step, when pruned weights have moved, leaves them at zero."""

    class MovesInBetween(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            closure()
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.add_(0.01)
            return super().step(closure)

    class Interrupted(fits.BiaslessMLP):
        evaluations = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.current_epoch == 3:
                self.evaluations += 1
                moved.append(not callback.masks.hold_for(self))
            if self.evaluations == 4:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return MovesInBetween(self.parameters(), lr=0.01)

    moved: list[bool] = []
    module, callback = Interrupted(), fits.drive()
    saving = pl.callbacks.OnExceptionCheckpoint(tmp_path)
    running = fits.trainer(tmp_path, callback, saving, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="ckpt_path"), pytest.raises(SystemExit):
        running.fit(module, fits.loader())
    assert moved[-1]  # else this test shows nothing
    saved = fits.BiaslessMLP()
    saved.load_state_dict(torch.load(saving.ckpt_path, weights_only=True)["state_dict"])
    assert callback.masks.hold_for(saved)


def test_exception__before_training(tmp_path: Path) -> None:
    """What fails before it begins does not put the masks of an earlier module on the one that it was given."""

    class Broken(ConvModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            raise RuntimeError("no optimizer")

    callback, module = fits.drive(), Broken()
    fit(tmp_path, callback)
    resumable.forget(module)
    before = fits.state_of(module)
    with pytest.raises(RuntimeError, match="no optimizer"):
        fits.trainer(tmp_path, callback).fit(module, fits.loader())
    assert fits.equal_states(fits.state_of(module), before)


@pytest.fixture(scope="module")
def stops(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All runs of `stopped.py`, in a process of their own."""
    folder = tmp_path_factory.mktemp("stopped")
    done = processes.script(stopped.__file__, folder, folder=folder)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt", weights_only=True)


CASES = [
    (method, name, moment)
    for method in stopped.METHODS
    for name in stopped.SIGNALS
    for moment in stopped.MOMENTS
    if stopped.is_possible(method, moment)
]


def is_complete(name: str, moment: str) -> bool:
    """SIGINT stops at once. SIGTERM waits until the batch is over, and so for rounds and commit."""
    return moment in ("commit", "step") or (name == "term" and moment != "before")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name", "moment"), CASES)
def test_stop(stops: Any, method: str, name: str, moment: str) -> None:
    """The run stops with what was there before the cut or after it, in every checkpoint that is saved on the way."""
    case = stops[f"{method}-{name}-{moment}"]
    before = round(NUM_PRUNABLE * 0.2**0.5) if method == "imp" else NUM_PRUNABLE
    kept = NUM_KEPT if is_complete(name, moment) else before
    assert case["stopped"]["is_over"]
    assert case["stopped"]["stopped"] == {"int": "SystemExit", "term": "SIGTERMException"}[name]
    assert len(case["saved"]) == 1 + stopped.HAS_SAVE_ON_EXCEPTION
    for path in case["saved"]:
        checkpoint = torch.load(path, weights_only=True)
        [state] = [state for key, state in checkpoint["callbacks"].items() if "masks" in state]
        masks, module = Masks.from_state_dict(state["masks"]), ConvModule()
        module.load_state_dict(checkpoint["state_dict"])
        weights = dict(module.named_parameters())
        assert sum(int((weights[name] == 0).sum()) for name in PRUNABLE) == NUM_PRUNABLE - kept
        assert masks.hold_for(module)
        assert masks.num_kept == (kept if masks else 0)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name", "moment"), CASES)
def test_stop__resumed(stops: Any, method: str, name: str, moment: str) -> None:
    """The resumed run prunes once; with the same masks and to the same end if it was stopped between two batches."""
    whole = stops[method]
    for resumed in stops[f"{method}-{name}-{moment}"]["resumed"]:
        assert resumed["stopped"] is None
        assert (resumed["kept"], resumed["epoch"]) == (NUM_KEPT, stopped.LAST_CUT)
        assert resumed["holds"]
        assert resumed["changes"] == (2 if method == "imp" and moment == "before" else 1)
        if moment != "before":
            assert Masks.from_state_dict(resumed["masks"]) == Masks.from_state_dict(whole["masks"])
        if name == "int" and moment in ("rounds", "statistics", "commit"):
            assert fits.equal_states(resumed["state"], whole["state"])
