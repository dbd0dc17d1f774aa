"""Masks hold whatever steps after pruning; what others write into pruned weights is masked again, with one warning."""

import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
from optimizers import Orthogonal
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_drive import IMPPruningCallback, SNIPPruningCallback
from lightning_drive.network.masks import Masks

# Optimizers made anew after pruning.


class Drifting(torch.optim.AdamW):
    """Moves every weight by a little, and has moments."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            for each in group["params"]:
                each.add_(1e-3)
        return loss


class Watched(fits.BiaslessMLP):
    """Looks at the masks in every forward pass, and lets something happen in a hook of its own."""

    def __init__(self, kind: Any = Orthogonal, manual: bool = False) -> None:
        super().__init__()
        self.kind, self.automatic_optimization, self.masks, self.seen = kind, not manual, Masks(), 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        if self.masks:
            assert self.masks.hold_for(self)
            self.seen += 1
        loss = super().training_step(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.trainer.strategy.optimizers[0]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters())


class Before(pl.Callback):
    """Shows the module what the masks are, so that it can look."""

    def __init__(self, pruning: SNIPPruningCallback) -> None:
        self.pruning = pruning

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.masks = self.pruning.masks


def set_up_again(trainer: pl.Trainer, module: Any) -> None:
    trainer.strategy.setup_optimizers(trainer)


def assign(trainer: pl.Trainer, module: Any) -> None:
    trainer.optimizers = [module.kind(module.parameters())]


def assign_an_item(trainer: pl.Trainer, module: Any) -> None:
    trainer.strategy.optimizers[0] = module.kind(module.parameters())


def assign_two(trainer: pl.Trainer, module: Any) -> None:
    trainer.strategy.optimizers = [module.kind(module.parameters()), module.kind(module.last.parameters())]


def regroup(trainer: pl.Trainer, module: Any) -> None:
    optimizer = trainer.optimizers[0]
    parameters = optimizer.param_groups[0]["params"]
    optimizer.add_param_group({"params": [parameters.pop()], "lr": 0.005})


WAYS = [set_up_again, assign, assign_an_item, assign_two, regroup]
WHEN = ["on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad"]


def once(way: Any, when: str, at_step: int = 4) -> pl.Callback:
    """Let something happen in a hook, once, in the middle of the sparse epochs."""
    callback, done = pl.Callback(), []

    def hook(trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step >= at_step and not done:
            done.append(True)
            way(trainer, pl_module)

    setattr(callback, when, hook)
    return callback


def snip(**kwargs: Any) -> SNIPPruningCallback:
    return SNIPPruningCallback(**({"sparsity": 0.8, "warmup_epochs": 1, "bn_batches": 0} | kwargs))


def assert_sparse(module: nn.Module, pruning: SNIPPruningCallback) -> None:
    assert pruning.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    assert pruning.masks.hold_for(module)


@pytest.mark.parametrize(
    ("kind", "way", "when"),
    [*product([Orthogonal], WAYS, WHEN), *product([Drifting], WAYS, ["on_train_batch_start"])],
)
def test_optimizers_made_anew(tmp_path: Path, kind: Any, way: Any, when: str) -> None:
    """Masks hold in every forward pass after it and in the end; no hook stays behind."""
    module, pruning, optimizers = Watched(kind), snip(), []

    def made_anew(trainer: pl.Trainer, pl_module: Any) -> None:
        optimizers.extend(trainer.optimizers)
        way(trainer, pl_module)
        optimizers.extend(trainer.optimizers)

    callbacks = [pruning, Before(pruning), once(made_anew, when)]
    fits.trainer(tmp_path, *callbacks, max_epochs=4).fit(module, fits.loader())
    assert_sparse(module, pruning)
    assert module.seen == 3 * 3
    assert len(optimizers) >= 2
    assert not any(each._optimizer_step_post_hooks or each._optimizer_step_pre_hooks for each in optimizers)


@pytest.mark.parametrize("first", [True, False], ids=["before_the_pruning_callback", "after_it"])
@pytest.mark.parametrize("way", [set_up_again, assign, assign_two])
def test_optimizers_made_anew__order(tmp_path: Path, way: Any, first: bool) -> None:
    """At the very start of the epoch that prunes, too, by a callback before or after ours."""
    module, pruning = Watched(), snip()
    other = once(way, "on_train_epoch_start", at_step=3)
    callbacks = [other, pruning] if first else [pruning, other]
    fits.trainer(tmp_path, *callbacks, Before(pruning), max_epochs=3).fit(module, fits.loader())
    assert_sparse(module, pruning)
    assert module.seen == 2 * 3


@pytest.mark.parametrize("when", ["on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("way", [set_up_again, assign, assign_an_item])
def test_optimizers_made_anew__manual(tmp_path: Path, way: Any, when: str) -> None:
    """Where the module steps raw optimizers itself."""
    module = Watched(manual=True)
    pruning = snip(loss_fn=lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1]))
    fits.trainer(tmp_path, pruning, Before(pruning), once(way, when), max_epochs=4).fit(module, fits.loader())
    assert_sparse(module, pruning)
    assert module.seen == 3 * 3


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("way", [set_up_again, assign, regroup])
def test_optimizers_made_anew__by_the_module(tmp_path: Path, way: Any, hook: str) -> None:
    module, pruning, done = Watched(), snip(), []

    def own(*_: Any) -> None:
        if module.trainer.global_step >= 4 and not done:
            done.append(True)
            way(module.trainer, module)

    setattr(module, hook, own)
    fits.trainer(tmp_path, pruning, Before(pruning), max_epochs=4).fit(module, fits.loader())
    assert done
    assert_sparse(module, pruning)
    assert module.seen == 3 * 3


def test_optimizers_made_anew__old_ones_are_let_go(tmp_path: Path) -> None:
    """A new optimizer in every step does not pile up."""
    module, pruning = Watched(), snip()
    counts: list[int] = []

    class Restart(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            assign(trainer, pl_module)

        def on_train_batch_end(self, *_: Any) -> None:
            if pruning._fit.enforcement is not None:
                counts.append(len(pruning._fit.enforcement._followed))

    fits.trainer(tmp_path, Restart(), pruning, max_epochs=4).fit(module, fits.loader())
    assert_sparse(module, pruning)
    assert max(counts) == 1


# What others write into pruned weights.


class Net(fits.ConvModule):
    """Notes what validation sees."""

    def __init__(self) -> None:
        super().__init__()
        self.masks, self.validated = Masks(), 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        assert self.masks.hold_for(self)
        self.validated += bool(self.masks)
        super().validation_step(batch, batch_idx)

    def val_dataloader(self) -> DataLoader[Any]:
        return fits.loader(32)


class Other(pl.Callback):
    """Writes into the weights of the module, from the first sparse epoch on."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average = {name: value.detach().clone() + 0.1 for name, value in pl_module.named_parameters()}

    def write(self, pl_module: pl.LightningModule) -> None:
        pl_module.load_state_dict(self.average, strict=False)


class LeavesAnAverage(Other):
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write(pl_module)


class LeavesAnAverageLate(Other):
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write(pl_module)


class Centres(Other):
    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.current_epoch > 0:
            for layer in (pl_module.features[4], pl_module.head):
                layer.weight.sub_(layer.weight.mean())


class LoadsInTheMiddle(Other):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 2:
            self.write(pl_module)


class LoadsBeforeValidation(Other):
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 2:
            self.write(pl_module)


class SwapsForValidation(Other):
    """By pointer, as some averages are swapped in, and back again."""

    def swap(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch > 0:
            for name, parameter in pl_module.named_parameters():
                parameter.data, self.average[name] = self.average[name], parameter.data

    on_validation_epoch_start = on_validation_epoch_end = swap


class OwnLookahead(Other):
    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.current_epoch > 0:
            for name, parameter in pl_module.named_parameters():
                parameter.copy_(self.average[name].lerp_(parameter, 0.5))


class Replaces(Other):
    """Other tensors in place of the data."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.current_epoch > 0:
            for parameter in pl_module.parameters():
                parameter.data = parameter.data + 0.01


OTHERS = [
    *(LeavesAnAverage, LeavesAnAverageLate, Centres, LoadsInTheMiddle, LoadsBeforeValidation, SwapsForValidation),
    *(OwnLookahead, Replaces),
]


class Saves(pl.Callback):
    """Saves whenever it can, before anybody else has had a look."""

    def __init__(self, folder: Path, pruning: SNIPPruningCallback) -> None:
        self.folder, self.pruning, self.count = folder, pruning, 0

    def save(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.pruning.pruned:
            self.count += 1
            trainer.save_checkpoint(self.folder / f"own-{self.count}.ckpt")

    on_train_batch_end = on_train_epoch_end = on_validation_end = on_train_end = save


def show_masks(pruning: SNIPPruningCallback) -> pl.Callback:
    callback = pl.Callback()

    def show(trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.masks = pruning.masks

    callback.on_train_batch_start = show  # type: ignore[method-assign]
    return callback


def warnings_of_weights(caught: list[warnings.WarningMessage]) -> list[str]:
    return [text for warning in caught if "no longer 0" in (text := str(warning.message))]


@pytest.mark.parametrize("first", [True, False], ids=["before_the_pruning_callback", "after_it"])
@pytest.mark.parametrize("kind", OTHERS)
def test_written_by_others(tmp_path: Path, kind: Any, first: bool) -> None:
    """What is validated, saved and left behind is sparse, and who reads the log learns of it, once."""
    module, pruning, other = Net(), snip(), kind()
    saves = Saves(tmp_path, pruning)
    own = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1)
    ours = [other, pruning] if first else [pruning, other]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fits.trainer(tmp_path, *ours, saves, show_masks(pruning), own).fit(module, fits.loader())
    assert_sparse(module, pruning)
    assert module.validated == 3 * 2
    [text] = warnings_of_weights(caught)
    assert "head.weight (" in text
    checkpoints = [torch.load(path) for path in tmp_path.glob("*.ckpt")]
    sparse = [each for each in checkpoints if each["global_step"] > 3]
    assert len(sparse) == saves.count + 3
    for checkpoint in sparse:
        for name, mask in pruning.masks.items():
            assert not checkpoint["state_dict"][name][~mask].any()


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_fit_end"])
def test_written_by_the_module(tmp_path: Path, hook: str) -> None:
    """Hooks of the module come after those of all callbacks."""
    module, pruning = fits.ConvModule(), snip()

    @torch.no_grad()
    def centre(*_: Any) -> None:
        module.head.weight.sub_(module.head.weight.mean(1, keepdim=True))

    setattr(module, hook, centre)
    with pytest.warns(UserWarning, match=r"no longer 0.*: head\.weight \("):
        fits.trainer(tmp_path, pruning).fit(module, fits.loader())
    assert_sparse(module, pruning)


def test_written_by_others__in_every_cycle(tmp_path: Path) -> None:
    """The warning comes once in a run, however often it is pruned again."""
    module, pruning = fits.ConvModule(), IMPPruningCallback(sparsity=0.8, cycles=3, epochs_per_cycle=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fits.trainer(tmp_path, pruning, Centres(), max_epochs=5).fit(module, fits.loader())
    assert pruning.pruned
    assert pruning.masks.hold_for(module)
    assert len(warnings_of_weights(caught)) == 1


@pytest.mark.parametrize("make", [fits.ConvModule, Net, fits.BiaslessMLP])
@pytest.mark.parametrize(
    "other",
    [
        pl.Callback,
        pytest.param(
            lambda: pl.callbacks.EMAWeightAveraging(),
            marks=pytest.mark.skipif(
                not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="weight averaging came with Lightning 2.6"
            ),
        ),
        lambda: pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2),
    ],
)
def test_nobody_writes(tmp_path: Path, make: Callable[[], Any], other: Any) -> None:
    """There is no warning, also with averages that Lightning swaps in."""
    module, pruning = make(), snip()
    own = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_top_k=-1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fits.trainer(tmp_path, pruning, other(), own).fit(module, fits.loader())
    assert not warnings_of_weights(caught)
    assert_sparse(module, pruning)


@pytest.mark.parametrize("at", ["epoch end", "validation", "save"])
def test_renew_leaves_what_is_right(tmp_path: Path, at: str) -> None:
    """Kept weights, -0.0 among them, are not touched, and what is masked again is +0."""
    module, pruning = fits.ConvModule(), snip()
    hook = {"epoch end": "on_train_batch_end", "validation": "on_validation_start", "save": "on_train_batch_end"}[at]
    seen: list[Tensor] = []

    def write(trainer: pl.Trainer, *_: Any) -> None:
        if pruning.pruned and not seen:
            module.head.weight.data.fill_(torch.nan)
            module.head.weight.data[0] = -0.0
            if at == "save":
                trainer.save_checkpoint(tmp_path / "x.ckpt")
            else:
                assert pruning._fit.enforcement is not None
                pruning._fit.enforcement.renew()
            seen.append(module.head.weight.detach().clone())
            module.head.weight.data.fill_(0.1)
            pruning.masks.apply_(module)

    other = pl.Callback()
    setattr(other, hook, write)
    with pytest.warns(UserWarning, match="no longer 0"):
        fits.trainer(tmp_path, pruning, other).fit(module, fits.loader())
    mask = pruning.masks["head.weight"]
    assert seen[0][~mask].eq(0).all()
    assert seen[0][1:][mask[1:]].isnan().all()
    assert seen[0][0][mask[0]].signbit().all()
    assert not seen[0][0][~mask[0]].signbit().any()


class SavesAnAverage(Other):
    """Has checkpoints hold an average in place of the weights, as copies."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.current_epoch > 0:
            checkpoint["state_dict"] |= {name: self.changed(value) for name, value in self.average.items()}

    def changed(self, value: Tensor) -> Tensor:
        return value.clone()


class SavesAnAverageInHalfPrecision(SavesAnAverage):
    def changed(self, value: Tensor) -> Tensor:
        return value.half()


class SavesAnAverageTransposed(SavesAnAverage):
    def changed(self, value: Tensor) -> Tensor:
        return value.flatten().flip(0).reshape(value.shape).mT if value.ndim > 1 else value


@pytest.mark.filterwarnings("ignore:.*has the same names and shapes as:UserWarning")  # which is true
@pytest.mark.parametrize("kind", [SavesAnAverage, SavesAnAverageInHalfPrecision, SavesAnAverageTransposed])
def test_saved_by_others(tmp_path: Path, kind: Any) -> None:
    """Weights of another that go into a checkpoint are masked; what does not fit is left alone."""
    module, pruning = fits.ConvModule(), snip()
    own = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_top_k=-1)
    fits.trainer(tmp_path, kind(), pruning, own).fit(module, fits.loader())
    checkpoints = [torch.load(path) for path in tmp_path.glob("*.ckpt")]
    sparse = [each["state_dict"] for each in checkpoints if each["global_step"] > 3]
    assert len(sparse) == 3
    for weights in sparse:
        for name, mask in pruning.masks.items():
            assert weights[name].shape != mask.shape or not weights[name][~mask].any()
            assert not torch.equal(weights[name], module.get_parameter(name))
