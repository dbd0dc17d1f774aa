"""A network that is sparse already is trained, and its zeros, or those of masks that are given, stay zeros."""

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import resumable
import torch
import torch.nn.functional as F
from fits import ConvModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_drive import (
    DRIVEPruningCallback,
    IMPPruningCallback,
    KeepZerosCallback,
    Magnitude,
    Masks,
    PruningReport,
    Random,
    SNIPPruningCallback,
    find_masks,
    save_sparse,
)

NO_SETTINGS: dict[str, Any] = {}


def sparse_masks(module: nn.Module | None = None, sparsity: float = 0.7) -> Masks:
    return find_masks(module or ConvModule(), Random(seed=3), sparsity=sparsity, scope="layerwise")


def sparse(module: Any, sparsity: float = 0.7) -> Any:
    """Prune a module, and forget the masks."""
    sparse_masks(module, sparsity).apply_(module)
    return module


class Watch(pl.Callback):
    """Counts, after every batch and validation, the weights that are alive where masks prune."""

    def __init__(self, masks: Masks) -> None:
        self.masks, self.alive = masks, [0]

    def _count(self, module: nn.Module) -> None:
        self.alive.append(
            sum(int(module.get_parameter(name)[~mask].count_nonzero()) for name, mask in self.masks.items())
        )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self._count(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._count(pl_module)


# Zeros of the network.


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw", "rmsprop", "adagrad"])
def test_zeros_stay(tmp_path: Path, optimizer: str) -> None:
    """In every step, while all other weights are trained; nothing else is pruned."""
    module, callback = sparse(ConvModule(optimizer)), KeepZerosCallback()
    masks, before = Masks.of(module), fits.state_of(module)
    trainer = fits.fit(tmp_path, module, callback, watch := Watch(masks))
    assert callback.masks == masks == sparse_masks()
    assert max(watch.alive) == 0
    assert len(watch.alive) == 1 + 4 * (3 + 1)
    assert all((module.get_parameter(name) != before[name])[mask].all() for name, mask in masks.items())
    assert trainer.callback_metrics["pruning/sparsity"].item() == pytest.approx(masks.sparsity)


def test_equals_training_by_hand(tmp_path: Path) -> None:
    """It is SGD on the weights that are not 0, bit for bit."""
    module, twin = sparse(ConvModule()), sparse(ConvModule())
    fits.fit(tmp_path, module, KeepZerosCallback(), max_epochs=2)
    masks, optimizer = Masks.of(twin), twin.configure_optimizers()
    for _ in range(2):
        for images, labels in fits.loader():
            optimizer.zero_grad()
            F.cross_entropy(twin(images), labels).backward()
            for name, mask in masks.items():
                twin.get_parameter(name).grad.masked_fill_(~mask, 0)
            optimizer.step()
    for name, weight in twin.named_parameters():
        assert torch.equal(weight, module.get_parameter(name))


class Tokens(ConvModule):
    """Has zeros that nobody pruned: of a new position embedding, and in a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 1, 8, 8))
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + self.position)


def test_other_zeros_are_trained(tmp_path: Path) -> None:
    module = sparse(Tokens())
    fits.fit(tmp_path, module, callback := KeepZerosCallback())
    assert list(callback.masks) == list(fits.PRUNABLE)
    assert module.position.all()
    assert module.head.bias.all()


def test_include_and_exclude(tmp_path: Path) -> None:
    """A new head that starts at zero is left out."""
    module = sparse(ConvModule())
    nn.init.zeros_(module.head.weight)
    fits.fit(tmp_path, module, callback := KeepZerosCallback(exclude=["head.*"]))
    assert list(callback.masks) == ["features.0.weight", "features.4.weight"]
    assert module.head.weight.all()
    module = sparse(ConvModule())
    fits.fit(tmp_path, module, callback := KeepZerosCallback(include=["head.*"]))
    assert list(callback.masks) == ["head.weight"]


def test_new_layer_at_zero__warns(tmp_path: Path) -> None:
    """Without that, the remedy is named: it cannot learn."""
    module = sparse(ConvModule())
    nn.init.zeros_(module.head.weight)
    with (
        pytest.warns(UserWarning, match=r"no weight is left in 'head.weight'\. Leave out a layer .* with `exclude`"),
        pytest.warns(UserWarning, match="cut off: no path from its input"),
    ):
        fits.fit(tmp_path, module, KeepZerosCallback())
    assert not module.head.weight.any()


def test_weights_that_come_late(tmp_path: Path) -> None:
    """Hooks of the module may load them when training starts."""

    class Loads(ConvModule):
        def on_train_start(self) -> None:
            sparse(self)

    fits.fit(tmp_path, module := Loads(), callback := KeepZerosCallback())
    assert callback.masks == Masks.of(module) == sparse_masks()


class WithBackbone(ConvModule):
    @property
    def backbone(self) -> nn.Module:
        return self.features

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], lr=0.05, weight_decay=0.1)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.features)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.features, optimizer)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
@pytest.mark.parametrize(
    "other",
    [lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False), Unfreeze],
    ids=["backbone", "own"],
)
@pytest.mark.parametrize("given", [False, True])
def test_layers_that_are_unfrozen_later(tmp_path: Path, other: Any, given: bool) -> None:
    """They are held from the beginning, and stay sparse when they train."""
    module = sparse(WithBackbone())
    before = module.features[4].weight.detach().clone()
    callback = KeepZerosCallback(masks=sparse_masks() if given else None)
    fits.fit(tmp_path, module, callback, other(), watch := Watch(sparse_masks()))
    assert list(callback.masks) == list(fits.PRUNABLE)
    assert max(watch.alive) == 0
    assert not torch.equal(module.features[4].weight, before)


def test_averages(tmp_path: Path) -> None:
    module = sparse(ConvModule("adamw"))
    fits.fit(tmp_path, module, KeepZerosCallback(masks=sparse_masks()), EMAWeightAveraging(decay=0.5))
    assert sparse_masks().hold_for(module)  # which has the average now


def test_manual_optimization(tmp_path: Path) -> None:
    fits.fit(tmp_path, module := sparse(fits.Manual()), KeepZerosCallback(), watch := Watch(sparse_masks()))
    assert max(watch.alive) == 0
    assert sparse_masks().hold_for(module)


def test_fast_dev_run(tmp_path: Path) -> None:
    fits.fit(tmp_path, module := sparse(ConvModule()), callback := KeepZerosCallback(), fast_dev_run=True)
    assert callback.masks.hold_for(module)
    assert callback.pruned


def test_accelerate(tmp_path: Path) -> None:
    fits.fit(tmp_path, module := sparse(ConvModule()), callback := KeepZerosCallback(accelerate=True))
    assert callback.masks.hold_for(module)
    assert callback.report is not None
    assert callback.report.acceleration is not None


# Masks that are given.


def in_a_checkpoint_of_drive(folder: Path) -> Path:
    pruning = SNIPPruningCallback(sparsity=0.7)
    trainer = fits.fit(folder, ConvModule(), pruning, max_epochs=1)
    trainer.save_checkpoint(folder / "snip.ckpt")
    return folder / "snip.ckpt"


def in_a_checkpoint_of_its_own(folder: Path) -> Path:
    trainer = fits.fit(folder, sparse(ConvModule()), KeepZerosCallback(), max_epochs=1)
    trainer.save_checkpoint(folder / "own.ckpt")
    return folder / "own.ckpt"


def in_a_sparse_file(folder: Path) -> Path:
    save_sparse(sparse(ConvModule()), folder / "own.safetensors")
    return folder / "own.safetensors"


def in_a_state_dict(folder: Path) -> Path:
    torch.save(sparse(ConvModule()).state_dict(), folder / "own.pt")
    return folder / "own.pt"


def in_a_checkpoint_of_another_tool(folder: Path) -> Path:
    module, masks = ConvModule(), sparse_masks()
    for name, mask in masks.items():
        prune.custom_from_mask(module.get_submodule(name.rpartition(".")[0]), "weight", mask)
    torch.save({"state_dict": module.state_dict()}, folder / "other.ckpt")
    return folder / "other.ckpt"


FILES: dict[str, Callable[[Path], Path]] = {
    function.__name__.removeprefix("in_a_"): function
    for function in (
        in_a_checkpoint_of_drive,
        in_a_checkpoint_of_its_own,
        in_a_sparse_file,
        in_a_state_dict,
        in_a_checkpoint_of_another_tool,
    )
}


@pytest.mark.parametrize("kind", FILES)
def test_file(tmp_path: Path, kind: str) -> None:
    """A dense network gets its masks, and no weights of it."""
    path = FILES[kind](tmp_path)
    callback, module = KeepZerosCallback(masks=path), ConvModule()
    before = fits.state_of(module)

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 0:
                for name, mask in callback.masks.items():
                    assert torch.equal(pl_module.get_parameter(name), before[name] * mask)

    fits.fit(tmp_path, module, callback, Look())
    assert callback.masks.hold_for(module)
    assert callback.masks.sparsity == pytest.approx(0.7, abs=1e-2)
    if "of_drive" not in kind:
        assert callback.masks == sparse_masks()
    assert callback.report is not None
    assert callback.report.method == f"KeepZeros(masks='{path}')"


def test_masks(tmp_path: Path) -> None:
    """As such, or any mapping of boolean tensors; more of a network that is sparse already may go."""
    for given in (sparse_masks(), dict(sparse_masks())):
        fits.fit(tmp_path, module := ConvModule(), callback := KeepZerosCallback(masks=given))  # type: ignore[arg-type]
        assert callback.masks == Masks.of(module) == sparse_masks()


def test_masks__of_anything(tmp_path: Path) -> None:
    """Also of a parameter that is not prunable by default."""
    own = Masks({"features.1.weight": torch.tensor([True, True, False, True, True, False])})
    fits.fit(tmp_path, module := ConvModule(), callback := KeepZerosCallback(masks=own))
    assert callback.masks == own
    assert (module.features[1].weight == 0).tolist() == (~own["features.1.weight"]).tolist()


class NewTask(ConvModule):
    """With another head than the network that was pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.accuracy = nn.Linear(8 * 16, 7), MulticlassAccuracy(7)


@pytest.mark.parametrize("kind", FILES)
def test_new_head(tmp_path: Path, kind: str) -> None:
    """Of another shape, it is left out by its name."""
    path = FILES[kind](tmp_path)
    with pytest.raises(
        ValueError, match=r"its 'head.weight' has the shape \(7, 128\), not \(4, 128\)\. .*\['head.weight'\]"
    ):
        fits.fit(tmp_path, NewTask(), KeepZerosCallback(masks=path))
    callback = KeepZerosCallback(masks=path, exclude=["head.*"])
    fits.fit(tmp_path, module := NewTask(), callback)
    assert list(callback.masks) == ["features.0.weight", "features.4.weight"]
    assert module.head.weight.all()


class Renamed(ConvModule):
    """Calls its new head by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.head = self.head, nn.Identity()  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(super().forward(images))


def test_new_head__of_another_name(tmp_path: Path) -> None:
    """Masks must all fit; of a file of weights, those of the module are read."""
    with pytest.raises(ValueError, match=r"`masks` do not fit Renamed: it has no 'head.weight'\. .*\['head.weight'\]"):
        fits.fit(tmp_path, Renamed(), KeepZerosCallback(masks=sparse_masks()))
    for masks, exclude in ((sparse_masks(), ["head.*"]), (in_a_state_dict(tmp_path), None)):
        fits.fit(tmp_path, module := Renamed(), callback := KeepZerosCallback(masks=masks, exclude=exclude))
        assert list(callback.masks) == ["features.0.weight", "features.4.weight"]
        assert module.classifier.weight.all()


# Checkpoints and further fits.


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("given", [False, True])
def test_resume(tmp_path: Path, given: bool, optimizer: str) -> None:
    """From every moment, with other weights to begin with: bit for bit from all but the middle of an epoch."""
    settings = {"masks": sparse_masks()} if given else NO_SETTINGS

    def module() -> ConvModule:
        return ConvModule(optimizer) if given else sparse(ConvModule(optimizer))

    saving = resumable.SaveEverywhere(tmp_path)
    whole = fits.fit(tmp_path, module(), first := KeepZerosCallback(**settings), saving)
    for path in sorted(tmp_path.glob("*.ckpt")):
        again = module()
        resumable.forget(again)
        callback = KeepZerosCallback(**settings)
        fits.trainer(tmp_path, callback).fit(again, fits.loader(), ckpt_path=path, weights_only=True)
        assert callback.masks == first.masks
        assert callback.report == first.report
        if not path.stem.endswith("middle"):
            assert fits.equal_states(fits.state_of(again), fits.state_of(whole.lightning_module))


def test_resume__other_masks_warn(tmp_path: Path) -> None:
    path = in_a_checkpoint_of_its_own(tmp_path)
    other = Masks({"head.weight": torch.eye(4, 128).bool()})
    with pytest.warns(UserWarning, match="The masks of the checkpoint stay on: `masks='.*'` has no effect"):
        fits.trainer(tmp_path, again := KeepZerosCallback(masks=other), max_epochs=2).fit(
            ConvModule(), fits.loader(), ckpt_path=path
        )
    assert again.masks == sparse_masks()


def test_resume__without_the_file(tmp_path: Path) -> None:
    """The masks are in the checkpoint; the file that they came from is not needed any more."""
    path = in_a_state_dict(tmp_path)
    trainer = fits.fit(tmp_path, ConvModule(), KeepZerosCallback(masks=path), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    path.unlink()
    callback, module = KeepZerosCallback(masks=path), ConvModule()
    fits.trainer(tmp_path, callback, max_epochs=2).fit(module, fits.loader(), ckpt_path=tmp_path / "last.ckpt")
    assert callback.masks == Masks.of(module) == sparse_masks()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_resume__the_run_that_pruned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Goes on with its masks, as with any callback that prunes once."""
    path = in_a_checkpoint_of_drive(tmp_path)
    callback, module = KeepZerosCallback(), ConvModule()
    fits.trainer(tmp_path, callback, max_epochs=2).fit(module, fits.loader(), ckpt_path=path)
    assert callback.masks.hold_for(module)
    assert callback.report is not None
    assert callback.report.method.startswith("SNIP")
    assert "takes over the masks of SNIPPruningCallback" in caplog.text


def test_resume__checkpoint_without_masks(tmp_path: Path) -> None:
    """The zeros of its weights count."""
    trainer = fits.fit(tmp_path, sparse(ConvModule()), max_epochs=0)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    callback, module = KeepZerosCallback(), ConvModule()
    fits.trainer(tmp_path, callback, max_epochs=2).fit(module, fits.loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert callback.masks == Masks.of(module) == sparse_masks()


def test_another_fit_reads_zeros_anew(tmp_path: Path) -> None:
    """Of another module, or of the same one that was pruned further meanwhile."""
    callback, module = KeepZerosCallback(), sparse(ConvModule(), 0.5)
    fits.fit(tmp_path, module, callback, max_epochs=1)
    further = find_masks(module, Magnitude(), sparsity=0.8)
    further.apply_(module)
    fits.fit(tmp_path, module, callback, max_epochs=1)
    assert callback.masks == further
    fits.fit(tmp_path, sparse(ConvModule()), callback, max_epochs=1)
    assert callback.masks == sparse_masks()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_copies(tmp_path: Path, copied: Any) -> None:
    first = KeepZerosCallback(masks=sparse_masks())
    fits.fit(tmp_path, ConvModule(), first, max_epochs=1)
    twin = copied(first)
    assert twin.masks == first.masks
    fits.fit(tmp_path, module := ConvModule(), twin, max_epochs=1)
    assert Masks.of(module) == sparse_masks()


def test_interrupted(tmp_path: Path) -> None:
    """After an exception in the middle of a step, the module is sparse and free of hooks."""

    class Breaks(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.global_step == 2:
                with torch.no_grad():
                    pl_module.head.weight.add_(1)
                raise RuntimeError("stop")

    module = sparse(ConvModule())
    with pytest.raises(RuntimeError, match="stop"):
        fits.fit(tmp_path, module, KeepZerosCallback(), Breaks())
    assert sparse_masks().hold_for(module)
    assert not any(weight._post_accumulate_grad_hooks for weight in module.parameters())


class Searched(ConvModule):
    """Has a learning rate and a batch size that can be searched for."""

    batch_size = 16

    def train_dataloader(self) -> DataLoader[Any]:
        return fits.loader(batch_size=self.batch_size)


SEARCHES: dict[str, tuple[Callable[[Tuner, Any], Any], Callable[[], pl.Callback]]] = {
    "lr": (
        lambda tuner, module: tuner.lr_find(module, num_training=20, update_attr=True),
        lambda: LearningRateFinder(num_training_steps=20),
    ),
    "batch_size": (
        lambda tuner, module: tuner.scale_batch_size(module, max_trials=2, steps_per_trial=1, init_val=8),
        lambda: BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=8),
    ),
}


@pytest.mark.parametrize("what", SEARCHES)
@pytest.mark.parametrize("given", [False, True])
def test_search(tmp_path: Path, what: str, given: bool) -> None:
    """A search for a learning rate or batch size, before training or as it starts, leaves weights and zeros alone."""
    tune, finder = SEARCHES[what]
    module = Searched() if given else sparse(Searched())
    callback, before = KeepZerosCallback(masks=sparse_masks() if given else None), fits.state_of(module)
    running = fits.trainer(tmp_path, callback)
    tune(Tuner(running), module)
    assert fits.equal_states(fits.state_of(module), before)
    running.fit(module)
    assert callback.masks == Masks.of(module) == sparse_masks()

    after = fits.state_of(module)
    tune(Tuner(fits.trainer(tmp_path, callback, max_epochs=6)), module)
    assert fits.equal_states(fits.state_of(module), after)

    module = Searched() if given else sparse(Searched())
    fits.trainer(tmp_path, callback, finder(), watch := Watch(sparse_masks())).fit(module)
    assert callback.masks == Masks.of(module) == sparse_masks()
    assert max(watch.alive) == 0


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_from_a_checkpoint(tmp_path: Path, stage: str) -> None:
    class Evaluated(ConvModule):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

    path = in_a_checkpoint_of_its_own(tmp_path)
    module, callback = Evaluated(), KeepZerosCallback()
    run: Any = getattr(fits.trainer(tmp_path, callback), stage)
    run(module, fits.loader(), ckpt_path=path)
    assert callback.masks == Masks.of(module) == sparse_masks()


class Stream(IterableDataset[Any]):
    """A stream that can be read once."""

    def __init__(self) -> None:
        self.samples = iter(fits.dataset(64))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.samples)


def test_stream(tmp_path: Path) -> None:
    """Nothing is taken from data that can be read only once."""
    module, callback = sparse(ConvModule()), KeepZerosCallback()
    module.example_input_array = torch.zeros(2, 1, 8, 8)
    fits.trainer(tmp_path, callback, max_epochs=1).fit(module, DataLoader(Stream(), batch_size=16))
    assert callback.masks.hold_for(module)
    assert len(module.calls) == 4


# What is said.


def test_report_and_plan(tmp_path: Path) -> None:
    module, callback = sparse(ConvModule()), KeepZerosCallback()
    plan = callback.plan(module)
    trainer = fits.fit(tmp_path, module, callback)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    report = callback.report
    assert report is not None
    assert report == PruningReport.from_checkpoint(tmp_path / "last.ckpt")
    assert (report.method, report.epoch, report.step, report.warnings) == ("KeepZeros()", 0, 0, ())
    assert {layer.name: layer.num_kept for layer in report.layers} == {
        name: int(mask.sum()) for name, mask in sparse_masks().items()
    }
    assert report.sparsity == sparse_masks().sparsity
    assert report.effective_sparsity is not None
    assert report.multiply_adds is not None
    assert (report.rounds, report.pictures) == ((), ["density"])
    assert (plan.method, plan.kept, plan.passes, plan.num_prunable) == ("KeepZeros()", (report.num_kept,), 0, 998)
    assert str(plan).splitlines()[-1] == "costs: next to nothing"


def test_plan__of_masks() -> None:
    masks = Masks({"head.weight": sparse_masks()["head.weight"]})
    plan = KeepZerosCallback(masks=masks).plan(ConvModule())
    assert (plan.num_prunable, plan.kept) == (512, (masks.num_kept,))
    assert f"KeepZeros(masks='{masks.digest()[:12]}') keeps 154 of 512" in str(plan)


def test_no_word_of_zeros_without_masks(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fits.fit(tmp_path, sparse(ConvModule()), KeepZerosCallback())
    assert not [each for each in caught if "already" in str(each.message)]


def test_keywords_only() -> None:
    for name, parameter in inspect.signature(KeepZerosCallback).parameters.items():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert f"        {name}: " in (KeepZerosCallback.__doc__ or "")


# Errors.


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"masks": 3}, TypeError, "`masks` must be a `Masks`, the path of .* got 3"),
        ({"masks": ConvModule()}, TypeError, "`masks` must be a `Masks`, .* got a ConvModule"),
        ({"masks": ConvModule().state_dict()}, TypeError, "The mask of 'features.0.weight' must be a boolean tensor"),
        ({"include": "*"}, TypeError, "`include` must be a list"),
        ({"accelerate": 1}, TypeError, "`accelerate` must be True or False"),
    ],
)
def test_settings__error(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KeepZerosCallback(**settings)


def zeros(module: nn.Module) -> None:
    for weight in module.parameters():
        nn.init.zeros_(weight)


FULL = Masks({"head.weight": torch.ones(4, 128).bool()})
EMPTY = Masks({"head.weight": torch.zeros(4, 128).bool()})


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (
            ConvModule,
            {},
            "None of the 998 weights of ConvModule that are prunable is 0. Load the weights of a sparse network",
        ),
        (lambda: ConvModule().apply(zeros), {}, "All 998 weights of ConvModule that are prunable are 0"),
        (ConvModule, {"masks": FULL}, "None of the 512 weights that `masks='.*'` covers is pruned"),
        (ConvModule, {"masks": EMPTY}, "All 512 weights that `masks='.*'` covers are pruned"),
        (ConvModule, {"masks": Masks()}, "None of the 0 weights that"),
        (ConvModule, {"exclude": ["tail"]}, "`exclude` pattern 'tail' matches no parameter"),
        (ConvModule, {"masks": FULL, "include": ["tail"]}, "`include` pattern 'tail' matches no parameter"),
    ],
)
def test_fit__error(tmp_path: Path, module: Any, settings: dict[str, Any], message: str) -> None:
    """Before the first step."""
    made = module()
    with pytest.raises(ValueError, match=message):
        fits.fit(tmp_path, made, KeepZerosCallback(**settings))
    assert not made.calls


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"There is no file '.*it\.ckpt'"),
        (b"text", ValueError, r"'.*it\.ckpt' is not a file that `torch.save` wrote"),
        (
            {"state_dict": {"net.weight": torch.eye(3)}},
            ValueError,
            r"has none of the prunable weights .* has net\.weight",
        ),
        ({"state_dict": {"a": 3}}, ValueError, "must have a 'state_dict' of nothing but tensors"),
        (
            fits.state_of(ConvModule()),
            ValueError,
            r"None of the 998 weights that `masks='.*it\.ckpt'` covers is pruned",
        ),
        (
            {"callbacks": {"DRIVE": {"version": 1, "masks": {"version": 9}, "report": None}}, "state_dict": {}},
            ValueError,
            r"The masks of 'DRIVE' in '.*it\.ckpt' cannot be read\. These masks have version 9",
        ),
    ],
)
def test_file__error(tmp_path: Path, content: Any, error: type[Exception], message: str) -> None:
    path, module = tmp_path / "it.ckpt", ConvModule()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(error, match=message):
        fits.fit(tmp_path, module, KeepZerosCallback(masks=path))
    assert not module.calls


def test_masks_of_another_tool__error(tmp_path: Path) -> None:
    """All layers are named, in order, with the call that makes them plain."""
    module = ConvModule()
    for layer in (module.head, module.features[0]):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    for masks in (None, sparse_masks(), in_a_state_dict(tmp_path)):
        with pytest.raises(ValueError, match=r"^'features.0.weight', 'head.weight' are .*`torch.nn.utils.prune.remove"):
            fits.fit(tmp_path, module, KeepZerosCallback(masks=masks))
    assert not module.calls
    for layer in (module.head, module.features[0]):
        prune.remove(layer, "weight")
    fits.fit(tmp_path, module, callback := KeepZerosCallback(exclude=["features.4.*"]))
    assert callback.masks.num_kept == (54 + 512) // 2


@pytest.mark.parametrize(
    "other",
    [
        lambda: DRIVEPruningCallback(sparsity=0.5),
        lambda: IMPPruningCallback(sparsity=0.5, cycles=1, epochs_per_cycle=1),
        KeepZerosCallback,
        lambda: pl.callbacks.ModelPruning("l1_unstructured"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_beside_another__error(tmp_path: Path, other: Any, first: bool) -> None:
    pair = [KeepZerosCallback(), other()]
    if len({type(each) for each in pair}) == 1:
        pair[1] = type("Own", (KeepZerosCallback,), {})()
    with pytest.raises(MisconfigurationException, match="Only one callback of a Trainer can prune"):
        fits.fit(tmp_path, sparse(ConvModule()), *(pair if first else reversed(pair)))
