"""IMP keeps what its definition says, returns to its rewind point bit for bit, and leaves no trace of a cycle."""

import contextlib
import copy
import io
import pickle
import random
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import numpy as np
import pytest
import resumable
import torch
import torch.nn.functional as F
from fits import NUM_PRUNABLE, PRUNABLE, ConvModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn

from lightning_drive import IMPPruningCallback, Magnitude, Masks, PruningReport, find_masks
from lightning_drive.network.rewinding import RewindPoint
from lightning_drive.trainer import cycle_checks

STEPS = 3  # per epoch


since_lightning_2_6 = pytest.mark.skipif(
    not hasattr(pl.callbacks, "EMAWeightAveraging"),
    reason="Lightning 2.5 does not go on with a Trainer that was stopped, and resumes after a last batch otherwise",
)


def imp(**kwargs: Any) -> IMPPruningCallback:
    settings: dict[str, Any] = {"sparsity": 0.9, "cycles": 2, "epochs_per_cycle": 2}
    return IMPPruningCallback(**(settings | kwargs))


class Quiet(ConvModule):
    """Nothing but training, where nothing but training matters."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def fit(tmp_path: Path, module: pl.LightningModule, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    """Train for six epochs: two cycles of two, and two for the ticket."""
    settings: dict[str, Any] = {
        "max_epochs": 6,
        **({"limit_val_batches": 0} if type(module) is Quiet else {}),
        **kwargs,
    }
    return fits.fit(tmp_path, module, *callbacks, **settings)


# What is seen from inside.


def tensors_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Every parameter and buffer, also those that `state_dict()` leaves out, and those that are not set."""
    tensors: dict[str, Tensor | None] = {name: value.detach().clone() for name, value in module.named_parameters()}
    for path, submodule in module.named_modules():
        for key, value in submodule._buffers.items():
            tensors[f"{path}.{key}".lstrip(".")] = None if value is None else value.clone()
    return tensors


@dataclass
class Seen:
    """What there is at the start of an epoch."""

    tensors: dict[str, Tensor | None]
    optimizer: dict[str, Any]
    masks: Masks
    report: PruningReport | None
    pruned: bool
    cycle: int

    @property
    def num_zeros(self) -> int:
        return sum(int((self.tensors[name] == 0).sum()) for name in PRUNABLE)  # type: ignore[union-attr,attr-defined]


class Look(pl.Callback):
    """Copies everything at the start of each epoch: before the callback that prunes, or after it, as it is placed."""

    def __init__(self, pruning: IMPPruningCallback) -> None:
        self.pruning = pruning
        self.seen: list[Seen] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pruning = self.pruning
        optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
        self.seen.append(
            Seen(tensors_of(pl_module), optimizer, pruning.masks, pruning.report, pruning.pruned, pruning.cycle)
        )


def looked(tmp_path: Path, module: pl.LightningModule, callback: IMPPruningCallback, **kwargs: Any) -> list[list[Seen]]:
    """Train, and give what was seen before and after the callback at the start of each epoch."""
    before, after = Look(callback), Look(callback)
    fit(tmp_path, module, before, callback, after, **kwargs)
    return [before.seen, after.seen]


# The definition, in plain Python and plain torch.


def num_kept(cycle: int, cycles: int, sparsity: float, schedule: str, num_weights: int = NUM_PRUNABLE) -> int:
    density = (1 - sparsity) ** (cycle / cycles) if schedule == "exponential" else 1 - sparsity * cycle / cycles
    return max(1, round(num_weights * density))


def keep_largest(module: nn.Module, masks: Mapping[str, Tensor], cut: Callable[[int], int], scope: str) -> Masks:
    """Sort every surviving weight by magnitude, and keep the first ones; sorted() is stable: earlier ones win ties."""
    weights = {name: module.get_parameter(name).detach().flatten().tolist() for name in PRUNABLE}
    alive = [
        (name, index, abs(value))
        for name in PRUNABLE
        for index, value in enumerate(weights[name])
        if not masks or masks[name].flatten()[index]
    ]
    kept: set[tuple[str, int]] = set()
    for group in [list(PRUNABLE)] if scope == "global" else [[name] for name in PRUNABLE]:
        largest = sorted((entry for entry in alive if entry[0] in group), key=lambda entry: -entry[2])
        kept |= {entry[:2] for entry in largest[: cut(sum(len(weights[name]) for name in group))]}
    return Masks(
        {
            name: torch.tensor([(name, index) in kept for index in range(len(weights[name]))]).view_as(
                module.get_parameter(name)
            )
            for name in PRUNABLE
        }
    )


@torch.no_grad()
def fill_zeros(module: nn.Module, masks: Mapping[str, Tensor], of: Callable[[nn.Parameter], list[Any]]) -> None:
    for name, mask in masks.items():
        for value in of(module.get_parameter(name)):
            if isinstance(value, Tensor) and value.shape == mask.shape:
                value[~mask] = 0


def train(module: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, masks: Mapping[str, Tensor]) -> None:
    for _ in range(epochs):
        for images, labels in fits.loader():
            optimizer.zero_grad()
            F.cross_entropy(module(images), labels).backward()
            fill_zeros(module, masks, lambda parameter: [parameter.grad])
            optimizer.step()
            fill_zeros(module, masks, lambda parameter: [parameter])


def plain_imp(
    module: ConvModule,
    *,
    sparsity: float = 0.9,
    cycles: int = 2,
    epochs_per_cycle: int = 2,
    rewind_epoch: int = 0,
    ticket_epochs: int = 2,
    find: Callable[[nn.Module, Mapping[str, Tensor], int], Masks],
) -> list[Masks]:
    """Train, prune, rewind: a loop without Lightning; return the masks of every cycle."""
    optimizer = module.configure_optimizers()
    train(module, optimizer, rewind_epoch, {})
    weights, momenta = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(module, optimizer, epochs_per_cycle - rewind_epoch, {})
    history: list[Masks] = []
    for cycle in range(1, cycles + 1):
        masks = find(module, history[-1] if history else {}, cycle)
        history.append(masks)
        module.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(momenta))
        fill_zeros(module, masks, lambda parameter: [parameter, *optimizer.state.get(parameter, {}).values()])
        train(module, optimizer, ticket_epochs if cycle == cycles else epochs_per_cycle, masks)
    return history


# What is kept.


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("sgd", {}),
        ("sgd", {"rewind_epoch": 1}),
        ("sgd", {"schedule": "linear", "cycles": 3}),
        ("sgd", {"scope": "layerwise"}),
        ("nesterov", {"schedule": "linear", "scope": "layerwise", "rewind_epoch": 1, "epochs_per_cycle": 3}),
        ("adamw", {"rewind_epoch": 1}),
        ("adamw", {"cycles": 1}),
        ("adagrad", {"cycles": 3, "epochs_per_cycle": 1, "sparsity": 0.7}),
        ("rmsprop", {"rewind_epoch": 1, "sparsity": 0.98}),
    ],
    ids=str,
)
def test_equals_the_definition(tmp_path: Path, optimizer: str, settings: dict[str, Any]) -> None:
    """The masks of each cycle, and the weights at the end bit for bit, are those of a plain loop of plain torch."""
    settings = {"sparsity": 0.9, "cycles": 2, "epochs_per_cycle": 2} | settings
    schedule, scope = settings.get("schedule", "exponential"), settings.get("scope", "global")

    def find(module: nn.Module, masks: Mapping[str, Tensor], cycle: int) -> Masks:
        def cut(num_weights: int) -> int:
            return num_kept(cycle, settings["cycles"], settings["sparsity"], schedule, num_weights)

        return keep_largest(module, masks, cut, scope)

    plain = Quiet(optimizer)
    loop = {name: settings[name] for name in settings if name not in ("schedule", "scope")}
    history = plain_imp(plain, **loop, find=find)

    module, callback = Quiet(optimizer), imp(**settings)
    cycles, length = settings["cycles"], settings["epochs_per_cycle"]
    _, after = looked(tmp_path, module, callback, max_epochs=cycles * length + 2)
    for cycle, masks in enumerate(history, 1):
        assert after[cycle * length].masks == masks
    assert fits.equal_states(fits.state_of(module), fits.state_of(plain))
    assert fits.equal_states(callback.masks, history[-1])


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_equals_find_masks_in_a_loop(tmp_path: Path, scope: Any) -> None:
    """What the callback does can be done by hand with the public function."""
    plain, cycles, sparsity = Quiet(), 3, 0.9

    def find(module: nn.Module, masks: Mapping[str, Tensor], cycle: int) -> Masks:
        now = 1 - (1 - sparsity) ** (cycle / cycles)
        return find_masks(module, Magnitude(), sparsity=now, masks=masks or None, scope=scope)

    history = plain_imp(plain, cycles=cycles, find=find)
    module, callback = Quiet(), imp(cycles=cycles, scope=scope)
    _, after = looked(tmp_path, module, callback, max_epochs=8)
    assert [after[epoch].masks for epoch in (2, 4, 6)] == history
    assert fits.equal_states(fits.state_of(module), fits.state_of(plain))


@pytest.fixture
def _is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs go on whose network, small as it is, a cut leaves without a path from input to output."""
    monkeypatch.setattr(cycle_checks, "check_paths", lambda *_: None)


@pytest.mark.usefixtures("_is_cut_off")
@pytest.mark.filterwarnings("ignore:Layer collapse", "ignore:The network is cut off")
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9, 0.98])
def test_counts(tmp_path: Path, sparsity: float, scope: Any, schedule: Any) -> None:
    """Exact after each cut, in each parameter where each has its own count, and nested."""
    callback = imp(sparsity=sparsity, cycles=4, epochs_per_cycle=1, scope=scope, schedule=schedule)
    _, after = looked(tmp_path, Quiet(), callback, max_epochs=5, limit_train_batches=1)
    for cycle in range(1, 5):
        masks = after[cycle].masks
        if scope == "global":
            assert masks.num_kept == num_kept(cycle, 4, sparsity, schedule)
        else:
            for mask in masks.values():
                assert mask.sum() == num_kept(cycle, 4, sparsity, schedule, mask.numel())
        assert after[cycle].num_zeros == NUM_PRUNABLE - masks.num_kept
        for name in PRUNABLE if cycle > 1 else ():
            assert (masks[name] <= after[cycle - 1].masks[name]).all()


@pytest.mark.usefixtures("_is_cut_off")
@pytest.mark.filterwarnings("ignore:Layer collapse", "ignore:The network is cut off")
def test_counts__at_least_one(tmp_path: Path) -> None:
    callback = imp(sparsity=0.998, scope="layerwise")
    fit(tmp_path, Quiet(), callback)
    assert [int(mask.sum()) for mask in callback.masks.values()] == [1, 1, 1]


@pytest.mark.usefixtures("_is_cut_off")
@pytest.mark.filterwarnings("ignore:Layer collapse", "ignore:The network is cut off")
def test_ties(tmp_path: Path) -> None:
    """Equal magnitudes, of either sign, go to the earlier parameter and then to the lower index."""
    module = Quiet(lr=0.0)
    with torch.no_grad():
        for name in PRUNABLE:
            weight = module.get_parameter(name)
            weight.copy_(torch.where(torch.rand_like(weight) < 0.5, 0.25, 0.5) * weight.sign())
    expected = [keep_largest(module, {}, lambda _, count=count: count, "global") for count in (316, 100)]
    _, after = looked(tmp_path, module, imp())
    assert [after[2].masks, after[4].masks] == expected


def test_include_and_exclude(tmp_path: Path) -> None:
    """Counts are of what is prunable; the rest stays dense, and returns as a whole."""
    callback = imp(include=["features.*.weight", "head.weight"], exclude=["features.[012].*", "features.*.bias"])
    before, after = looked(tmp_path, Quiet(), callback)
    assert tuple(callback.masks) == ("features.4.weight", "head.weight")
    assert callback.masks.num_kept == round((8 * 6 * 9 + 512) * 0.1)
    assert fits.equal_states(after[4].tensors["features.0.weight"], before[0].tensors["features.0.weight"])


# When.


def test_cuts_at_the_start_of_an_epoch(tmp_path: Path) -> None:
    """Not a hook earlier and not a hook later; a cycle is over with the last hook of its last epoch."""

    class Diary(pl.Callback):
        """Writes down how many weights are left, in every hook of every epoch."""

        def __init__(self) -> None:
            self.kept: dict[tuple[str, int], set[int]] = {}

        def _write(self, hook: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            kept = sum(int(pl_module.get_parameter(name).count_nonzero()) for name in PRUNABLE)
            self.kept.setdefault((hook, trainer.current_epoch), set()).add(kept)

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self._write("epoch_start", trainer, pl_module)

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            self._write("batch_start", trainer, pl_module)

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            self._write("batch_end", trainer, pl_module)

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self._write("validation_end", trainer, pl_module)

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self._write("epoch_end", trainer, pl_module)

    early, late = Diary(), Diary()
    fit(tmp_path, ConvModule(), early, imp(), late, max_epochs=7)
    after = [998, 998, 316, 316, 100, 100, 100]
    before = [998, 998, 998, 316, 316, 100, 100]
    for hook in ("batch_start", "batch_end", "validation_end", "epoch_end"):
        assert [late.kept[hook, epoch] for epoch in range(7)] == [{kept} for kept in after]
    assert [late.kept["epoch_start", epoch] for epoch in range(7)] == [{kept} for kept in after]
    assert [early.kept["epoch_start", epoch] for epoch in range(7)] == [{kept} for kept in before]


def test_attributes(tmp_path: Path) -> None:
    """`pruned`, `cycle`, `masks` and `report` follow the cuts, and stand still in between."""
    callback = imp()
    before, after = looked(tmp_path, Quiet(), callback, max_epochs=7)
    assert [seen.pruned for seen in after] == [False, False, True, True, True, True, True]
    assert [seen.cycle for seen in after] == [0, 0, 1, 1, 2, 2, 2]
    assert [seen.cycle for seen in before] == [0, 0, 0, 1, 1, 2, 2]
    assert len(after[0].masks) == len(after[1].masks) == 0
    assert after[1].report is None
    for first, *others in ([2, 3], [4, 5, 6]):
        report, masks = after[first].report, after[first].masks
        assert report is not None
        assert (report.epoch, report.step) == (first, STEPS * first)
        assert report.cycle == after[first].cycle
        assert (report.sparsity, report.digest) == (masks.sparsity, masks.digest())
        assert [layer.num_kept for layer in report.layers] == [int(mask.sum()) for mask in masks.values()]
        assert all(after[other].masks is masks and after[other].report is report for other in others)
    assert callback.report is after[6].report


def test_one_epoch_per_cycle_and_for_the_ticket(tmp_path: Path) -> None:
    """The shortest run there is."""
    module, callback = Quiet(), imp(cycles=1, epochs_per_cycle=1)
    fit(tmp_path, module, callback, max_epochs=2)
    assert callback.masks.num_kept == 100
    assert callback.masks.hold_for(module)


# What it returns to.


class Wandering(ConvModule):
    """Its buffers are not persistent, not set, replaced, of other shapes, or not there yet; they change as it trains.

    It is what makes them change that moves on with each step, so every step leaves other buffers.
    """

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.register_buffer("seen", torch.zeros(2), persistent=False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("absent", None)
        self.register_buffer("history", torch.ones(1), persistent=False)
        self.features[1].register_buffer("deep", torch.tensor(0.5), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.add_(1)
        self.count = self.count + 1
        self.absent = torch.full((3,), float(self.count))
        self.history = torch.cat([self.history, self.history[-1:] + 1])
        self.features[1].deep.mul_(0.9)
        if "late" not in self._buffers:
            self.register_buffer("late", torch.zeros(2))
        self.late = self.late + 1
        return super().training_step(batch, batch_idx)


def masked(state: Any, masks: Masks, names: list[str]) -> Any:
    """An optimizer's state with zeros where the masks prune."""
    state = copy.deepcopy(state)
    for index, entries in state["state"].items():
        for value in entries.values():
            if names[index] in masks and getattr(value, "shape", None) == masks[names[index]].shape:
                value[~masks[names[index]]] = 0
    return state


@pytest.mark.parametrize("rewind_epoch", [0, 1])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad"])
def test_everything_returns(tmp_path: Path, optimizer: str, rewind_epoch: int) -> None:
    """Right after each cut: weights, biases, every kind of buffer and the optimizer are as at the rewind point."""
    module = Wandering(optimizer)
    names = [name for name, _ in module.named_parameters()]
    before, after = looked(tmp_path, module, imp(rewind_epoch=rewind_epoch))
    point = before[rewind_epoch]
    assert (point.optimizer["state"] == {}) == (rewind_epoch == 0 and optimizer != "adagrad")
    for epoch in (2, 4):
        masks, now = after[epoch].masks, after[epoch].tensors
        expected = {name: copy.deepcopy(value) for name, value in point.tensors.items()}
        for name, mask in masks.items():
            expected[name][~mask] = 0  # type: ignore[index]
        assert now.keys() == expected.keys()
        assert [name for name in now if not fits.equal_states(now[name], expected[name])] == []
        assert fits.equal_states(after[epoch].optimizer, masked(point.optimizer, masks, names))
        # The oracle can fail: training had changed all of it.
        unchanged = [name for name in now if fits.equal_states(before[epoch].tensors.get(name), point.tensors[name])]
        assert unchanged == []


def test_everything_returns__settings_of_the_optimizer(tmp_path: Path) -> None:
    """Also what a schedule of the user's own, or a callback, wrote into the parameter groups."""

    class Tinker(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            for group in trainer.optimizers[0].param_groups:
                group["weight_decay"] *= 0.5
                group["momentum"] *= 0.5
                group["lr"] *= 0.5

    callback = imp()
    before, after = Look(callback), Look(callback)
    fit(tmp_path, Quiet(), before, callback, after, Tinker())
    for seen in (after[epoch] for after in [after.seen] for epoch in (2, 4)):
        assert fits.equal_states(seen.optimizer["param_groups"], before.seen[0].optimizer["param_groups"])
    assert before.seen[2].optimizer["param_groups"][0]["lr"] < 0.05


def test_parameters_are_the_same_objects(tmp_path: Path) -> None:
    module, callback = Quiet(), imp()
    parameters, names, keys = list(module.parameters()), [*dict(module.named_parameters())], [*module.state_dict()]
    running = fit(tmp_path, module, callback)
    assert all(now is before for now, before in zip(module.parameters(), parameters, strict=True))
    assert [*dict(module.named_parameters())] == names
    assert [*module.state_dict()] == keys
    held = [parameter for group in running.optimizers[0].param_groups for parameter in group["params"]]
    assert all(now is before for now, before in zip(held, parameters, strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad", "rmsprop"])
def test_stays_pruned(tmp_path: Path, optimizer: str) -> None:
    """In the last phase nothing brings a weight back, and every survivor is trained."""
    module, callback = Quiet(optimizer), imp(rewind_epoch=1)
    fit(tmp_path, module, callback, accumulate_grad_batches=2, gradient_clip_val=0.5)
    for name, mask in callback.masks.items():
        weight = module.get_parameter(name).detach()
        assert torch.equal(weight != 0, mask)
        assert not torch.signbit(weight[~mask]).any()
        state = module.trainer.optimizers[0].state[module.get_parameter(name)]
        remembered = [value[~mask] for value in state.values() if getattr(value, "shape", None) == mask.shape]
        assert remembered
        assert not any(value.any() for value in remembered)


# Beside other callbacks.

averaging_exists = pytest.mark.skipif(
    not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="weight averaging came with Lightning 2.6"
)


class Weights(pl.Callback):
    """Copies the weights after every step, and at the start of every epoch."""

    def __init__(self) -> None:
        self.after_step: list[list[Tensor]] = []
        self.at_epoch: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.after_step.append([parameter.detach().clone() for parameter in pl_module.parameters()])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.at_epoch.append([parameter.detach().clone() for parameter in pl_module.parameters()])


@averaging_exists
@pytest.mark.parametrize("pruning_first", [True, False])
def test_averages_restart__ema(tmp_path: Path, pruning_first: bool) -> None:
    """At the end there is the moving average of the ticket's own steps, as if nothing had been averaged before."""
    module, callback, weights = Quiet(), imp(), Weights()
    average = pl.callbacks.EMAWeightAveraging(decay=0.9)
    restarted: list[bool] = []

    class Check(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert average._average_model is not None
            same = fits.equal_states(tensors_of(average._average_model.module), tensors_of(pl_module))
            restarted.append(same and average._average_model.n_averaged == 0)

    callbacks = [callback, average] if pruning_first else [average, callback]
    fit(tmp_path, module, *callbacks, weights, Check())
    assert restarted == [True, False, True, False, True, False]

    first, *others = weights.after_step[4 * STEPS :]
    expected = first
    for now in others:
        expected = [0.9 * mean + 0.1 * value for mean, value in zip(expected, now, strict=True)]
    for parameter, mean in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), mean)
    assert callback.masks.hold_for(module)


quiet_swa = pytest.mark.filterwarnings(
    "ignore:.*swa:UserWarning",
    "ignore:Swapping scheduler:UserWarning",
    "ignore:.*call of `lr_scheduler.step:UserWarning",
)


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


class Decaying(ConvModule):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def swa_in_order(callback: IMPPruningCallback, pruning_first: bool, **kwargs: Any) -> list[pl.Callback]:
    averaging = StochasticWeightAveraging(**kwargs)
    return [callback, averaging] if pruning_first else [averaging, callback]


@quiet_swa
@pytest.mark.parametrize(
    ("swa_epoch_start", "pruning_first"), [(3, True), (5, True), (6, True), (6, False), (0.8, True), (0.8, False)]
)
def test_averages_restart__swa(tmp_path: Path, swa_epoch_start: Any, pruning_first: bool) -> None:
    """SWA ends with the mean over the starts of the ticket's epochs, wherever it began, and its extra epoch."""
    module, callback, weights = ConvModule(), imp(), Weights()
    callbacks = swa_in_order(callback, pruning_first, swa_lrs=0.01, swa_epoch_start=swa_epoch_start)
    if swa_epoch_start == 3:
        with pytest.warns(UserWarning, match="StochasticWeightAveraging starts in epoch 2, before IMP's last cut"):
            running = fit(tmp_path, module, *callbacks, weights, max_epochs=8)
    else:
        running = fit(tmp_path, module, *callbacks, weights, max_epochs=8)
    assert running.max_epochs == 8
    assert running.current_epoch == 9  # one more for BatchNorm
    epochs = weights.at_epoch[5:8]
    for parameter, *values in zip(module.parameters(), *epochs, strict=True):
        torch.testing.assert_close(parameter.detach(), torch.stack(values).mean(0))
    assert callback.masks.num_kept == 100
    assert callback.masks.hold_for(module)
    assert all(norm.num_batches_tracked == STEPS for norm in (module.norm, module.features[1]))


@quiet_swa
@pytest.mark.parametrize("module", [ConvModule, Decaying])
@pytest.mark.parametrize(("swa_epoch_start", "pruning_first"), [(5, True), (6, True), (6, False)])
def test_swa_of_the_ticket_has_its_learning_rate(
    tmp_path: Path, swa_epoch_start: int, pruning_first: bool, module: Any
) -> None:
    """SWA that starts with the ticket, or in it, anneals to its own rate."""
    rates = Rates()
    settings = {"swa_lrs": 0.003, "swa_epoch_start": swa_epoch_start, "annealing_epochs": 2}
    fit(tmp_path, module(), *swa_in_order(imp(), pruning_first, **settings), rates, max_epochs=9)
    assert rates.seen[: 2 * STEPS] == rates.seen[2 * STEPS : 4 * STEPS]
    assert rates.seen[8 * STEPS] == pytest.approx(0.003)


@quiet_swa
@pytest.mark.filterwarnings("ignore:StochasticWeightAveraging starts in epoch")
@pytest.mark.parametrize("swa_epoch_start", [2, 3, 4])
def test_swa_in_the_cycles_ends_with_each(tmp_path: Path, swa_epoch_start: int) -> None:
    """The schedule that a cut returns to is the module's own, and the cycles before SWA began know nothing of it."""
    rates = Rates()
    settings = {"swa_lrs": 0.003, "swa_epoch_start": swa_epoch_start, "annealing_epochs": 1}
    fit(tmp_path, Decaying(), *swa_in_order(imp(), True, **settings), rates, max_epochs=7)
    assert rates.seen[4 * STEPS : 7 * STEPS : STEPS] == pytest.approx([0.05, 0.025, 0.0125])
    before = (swa_epoch_start - 1) * STEPS
    plain = [0.05] * STEPS + [0.025] * STEPS
    assert rates.seen[:before] == pytest.approx((2 * plain)[:before])


@pytest.mark.parametrize(
    ("swa_epoch_start", "pruning_first", "rewind_epoch"),
    [(1, True, 0), (1, False, 0), (0.1, True, 0), (2, True, 1), (3, False, 0), (5, False, 0), (0.5, False, 1)],
)
def test_swa__error(tmp_path: Path, swa_epoch_start: Any, pruning_first: bool, rewind_epoch: int) -> None:
    """Refused where it would have replaced the schedule before it could be remembered, or put back for the ticket."""
    callbacks = swa_in_order(
        imp(rewind_epoch=rewind_epoch), pruning_first, swa_lrs=0.01, swa_epoch_start=swa_epoch_start
    )
    with pytest.raises(MisconfigurationException, match="Set `swa_epoch_start` to 5 or more"):
        fit(tmp_path, Decaying(), *callbacks, max_epochs=10)


@quiet_swa
@pytest.mark.parametrize("module", [ConvModule, Decaying])
@pytest.mark.parametrize("pruning_first", [True, False])
def test_swa_of_the_ticket_can_be_resumed(tmp_path: Path, pruning_first: bool, module: Any) -> None:
    path, ends = tmp_path / "swa.ckpt", []
    for ckpt_path in (None, path):
        trained = module()
        settings = {"swa_lrs": 0.003, "swa_epoch_start": 6, "annealing_epochs": 2}
        callbacks = swa_in_order(imp(), pruning_first, **settings)
        fit(tmp_path, trained, *callbacks, SaveAt(path, 6), max_epochs=9, ckpt_path=ckpt_path)
        ends.append(fits.state_of(trained))
    assert fits.equal_states(*ends)


class Scripted(ConvModule):
    """Its validation score is best in the first epoch of each cycle, and best of all before the last cut."""

    SCORES = (0.1, 0.2, 0.15, 0.3, 0.9, 0.7, 0.8, 0.75, 0.9, 0.95)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.SCORES[self.current_epoch])


def test_best_is_of_the_ticket(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", save_top_k=2)
    callback = imp()
    fit(tmp_path, Scripted(), callback, checkpoint, max_epochs=8)
    assert Path(checkpoint.best_model_path).name == "epoch=5.ckpt"
    assert checkpoint.best_model_score == torch.tensor(0.7)
    assert sorted(Path(path).name for path in checkpoint.best_k_models) == ["epoch=5.ckpt", "epoch=7.ckpt"]
    module = Quiet()
    module.load_state_dict(torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"])
    assert callback.masks.hold_for(module)


def test_best_is_of_the_ticket__turned_off(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss")
    fit(tmp_path, Scripted(), imp(reset_best=False), checkpoint, max_epochs=8)
    assert Path(checkpoint.best_model_path).name == "epoch=0.ckpt"


@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_waits_for_the_ticket(tmp_path: Path, patience: int) -> None:
    """No epoch of a cycle stops the run or sets the bar; then the patience is the user's."""
    stopping, callback = EarlyStopping("val_loss", patience=patience), imp()
    running = fit(tmp_path, Scripted(), callback, stopping, max_epochs=10)
    assert callback.cycle == 2
    assert running.current_epoch - 1 == {1: 6, 2: 7}[patience]
    assert stopping.best_score == torch.tensor(0.7)


@pytest.mark.parametrize(
    "settings",
    [{"patience": 2}, {"stopping_threshold": 0.5}, {"divergence_threshold": 1.5}],
    ids=lambda settings: next(iter(settings)),
)
def test_early_stopping_waits_for_the_ticket__other_reasons(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Nor does it stop between the epochs of a cycle, where validation comes more often, nor for another reason."""

    class Rising(ConvModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", float((self.global_step - 1) % STEPS))

    callback = imp()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Training ended in epoch")
        fit(tmp_path, Rising(), callback, EarlyStopping("val_loss", **settings), val_check_interval=0.34)
    assert callback.cycle == 2


@pytest.mark.parametrize(
    ("epoch", "settings", "expected"),
    [(1, {"stopping_threshold": 0.12}, 8), pytest.param(3, {"patience": 1}, 6, marks=since_lightning_2_6)],
)
def test_early_stopping_waits_for_the_ticket__resumed(
    tmp_path: Path, epoch: int, settings: dict[str, Any], expected: int
) -> None:
    """Also where a resumed run enters an epoch after its start: none of a cycle counts, and the ticket's first does."""
    path = tmp_path / "last_batch.ckpt"

    class Worse(Scripted):
        SCORES = (0.1, 0.2, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8)

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == (epoch + 1) * STEPS:
                trainer.save_checkpoint(path)

    for ckpt_path in (None, path):
        callbacks = [imp(), EarlyStopping("val_loss", **settings), Save()]
        running = fit(tmp_path, Worse(), *callbacks, max_epochs=8, ckpt_path=ckpt_path)
        assert running.current_epoch == expected
        assert callbacks[0].cycle == 2


@pytest.mark.parametrize("fails", [True, False])
def test_early_stopping_waits_for_the_ticket__and_is_then_as_ever(tmp_path: Path, fails: bool) -> None:
    """After the run, or after an error in it, the same EarlyStopping stops another run that is not pruned."""

    class Fail(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if fails and trainer.current_epoch == 3:
                raise RuntimeError("power cut")

    stopping = EarlyStopping("val_loss", patience=1)
    with pytest.raises(RuntimeError, match="power cut") if fails else contextlib.nullcontext():
        fit(tmp_path, Scripted(), imp(), stopping, Fail())
    stopping.best_score, stopping.wait_count = torch.tensor(torch.inf), 0
    assert fit(tmp_path, Scripted(), stopping).current_epoch == 2


@pytest.mark.filterwarnings("ignore:Training ended in epoch", "ignore:EarlyStopping")
def test_early_stopping_waits_for_the_ticket__turned_off(tmp_path: Path) -> None:
    callback = imp(reset_best=False)
    running = fit(tmp_path, Scripted(), callback, EarlyStopping("val_loss", patience=1), max_epochs=8)
    assert running.current_epoch == 2
    assert callback.cycle == 0


def test_training_that_ends_in_a_cycle(tmp_path: Path) -> None:
    """A warning names the sparsity that was reached."""

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    message = r"in cycle 1 \(counted from 0\) of 2: the network has a sparsity of 0\.6834, not 0\.9"
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, Quiet(), imp(), Stop())


# Checkpoints. Processes of their own, and kills, are in `test_resume.py`.


@pytest.mark.parametrize("rewind_epoch", [0, 1])
def test_resume(tmp_path: Path, rewind_epoch: int) -> None:
    """From the end of every epoch, with other initial weights, to the same end bit for bit."""
    settings: dict[str, Any] = {"method": "imp", "scheduler": "onecycle", "rewind_epoch": rewind_epoch}
    whole = resumable.run(tmp_path, "sgd", **settings, save=True)
    for epoch in range(resumable.IMP_EPOCHS):
        result = resumable.run(tmp_path, "sgd", **settings, ckpt_path=tmp_path / f"{epoch}-epoch_end.ckpt")
        assert fits.equal_states(result["state"], whole["state"])
        assert fits.equal_states(result["optimizer"], whole["optimizer"])
        assert result["digest"] == whole["digest"]


class SaveAt(pl.Callback):
    """Saves one checkpoint, at the end of an epoch."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


class SaveWhatIsLeft(pl.Callback):
    """Saves a checkpoint when training breaks off, like OnExceptionCheckpoint, and keeps it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("epoch", [2, 4])
@pytest.mark.parametrize("control", ["none", "reinit"])
def test_resume__interrupted_in_a_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, control: Any
) -> None:
    """A rewind that was cut short, with masks but with old weights, is made good by the run that resumes."""
    settings: dict[str, Any] = {"rewind_epoch": int(control == "none"), "control": control}
    _, whole = looked(tmp_path, Quiet(), imp(**settings))
    path = tmp_path / "interrupted.ckpt"

    def fail(point: RewindPoint, module: nn.Module, masks: Masks) -> None:
        if running.current_epoch == epoch:
            raise RuntimeError("power cut")
        rewind_module_(point, module, masks)

    rewind_module_ = RewindPoint.rewind_module_
    running = fits.trainer(tmp_path, imp(**settings), SaveWhatIsLeft(path), max_epochs=6, limit_val_batches=0)
    with monkeypatch.context() as patch:
        patch.setattr(RewindPoint, "rewind_module_", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            running.fit(Quiet(), fits.loader())
    module = Quiet()
    resumable.forget(module)
    before, _ = looked(tmp_path, module, imp(**settings), ckpt_path=path)
    assert fits.equal_states(before[0].tensors, whole[epoch].tensors)
    assert fits.equal_states(before[0].optimizer, whole[epoch].optimizer)
    assert before[0].masks == whole[epoch].masks


def saved(tmp_path: Path, epoch: int, **kwargs: Any) -> Path:
    """A checkpoint from the end of an epoch."""
    path = tmp_path / f"{epoch}.ckpt"
    fit(tmp_path, Quiet(), imp(**kwargs), SaveAt(path, epoch))
    return path


def test_checkpoint(tmp_path: Path) -> None:
    """It loads without unpickling anything, and has the rewind point until the last cut, in all its dtypes."""
    paths = {epoch: tmp_path / f"{epoch}.ckpt" for epoch in (0, 3, 4)}
    module = Wandering("adamw")
    initial = tensors_of(module)
    fit(tmp_path, module, imp(), *(SaveAt(path, epoch) for epoch, path in paths.items()))
    starts = {}
    for epoch, path in paths.items():
        checkpoint = torch.load(path, weights_only=True)
        starts[epoch] = checkpoint["callbacks"]["IMPPruningCallback"]["start"]
        assert any("count" in key for key in checkpoint["state_dict"])
    assert fits.equal_states(starts[0]["snapshot"], initial)
    assert fits.equal_states(starts[3]["snapshot"], initial)
    assert starts[4] is None


def test_checkpoint__is_not_shared_with_training(tmp_path: Path) -> None:
    """A state taken in memory does not change while training goes on."""
    callback = imp(rewind_epoch=1)

    class Take(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                self.state = callback.state_dict()
                self.copy = copy.deepcopy(self.state)

    take = Take()
    fit(tmp_path, Quiet("adamw"), callback, take)
    assert fits.equal_states(take.state, take.copy)


@pytest.mark.parametrize(
    "other", [{"cycles": 3, "epochs_per_cycle": 1}, {"epochs_per_cycle": 1}, {"rewind_epoch": 1}], ids=str
)
def test_resume__other_settings_error(tmp_path: Path, other: dict[str, Any]) -> None:
    path = saved(tmp_path, 2)
    message = "The checkpoint is from cycle 1 of an IMP run with .*Resume with the settings of the checkpoint"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Quiet(), imp(**other), ckpt_path=path)


@pytest.mark.parametrize("other", [{"cycles": 1}, {"epochs_per_cycle": 1}, {"rewind_epoch": 1}], ids=str)
def test_resume__other_settings_of_the_ticket(tmp_path: Path, other: dict[str, Any]) -> None:
    """When the cycles are over, it no longer matters how long they were."""
    path, callback, module = saved(tmp_path, 4), imp(**other), Quiet()
    fit(tmp_path, module, callback, ckpt_path=path)
    assert callback.masks.num_kept == 100
    assert callback.masks.hold_for(module)


def test_resume__more_cycles_error(tmp_path: Path) -> None:
    """A ticket has no rewind point any more, so no further cycles can follow."""
    path = saved(tmp_path, 4)
    with pytest.raises((ValueError, MisconfigurationException), match="Resume"):
        fit(tmp_path, Quiet(), imp(cycles=3), ckpt_path=path, max_epochs=9)


def test_resume__another_sparsity(tmp_path: Path) -> None:
    path = saved(tmp_path, 4)
    with pytest.warns(UserWarning, match=r"was pruned to a sparsity of 0\.8998 and stays so"):
        fit(tmp_path, Quiet(), imp(sparsity=0.5), ckpt_path=path)


@pytest.mark.parametrize("rewind_epoch", [0, 1])
def test_resume__without_a_rewind_point(tmp_path: Path, rewind_epoch: int) -> None:
    """A checkpoint made without the callback will do up to the rewind epoch, and is refused after it."""
    for epoch in (0, 1):
        fit(tmp_path, Quiet(), SaveAt(tmp_path / f"{epoch}.ckpt", epoch), max_epochs=2)
    callback = imp(rewind_epoch=rewind_epoch)
    if rewind_epoch == 1:
        fit(tmp_path, Quiet(), callback, ckpt_path=tmp_path / "0.ckpt")
        assert callback.cycle == 2
        callback = imp(rewind_epoch=rewind_epoch)
    message = f"returns to the weights of the start of epoch {rewind_epoch}, but this run goes on in epoch 2"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, Quiet(), callback, ckpt_path=tmp_path / "1.ckpt")


def test_resume__masks_of_another_module_error(tmp_path: Path) -> None:
    path = saved(tmp_path, 2)
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["IMPPruningCallback"]
    state["masks"]["masks"]["encoder.weight"] = state["masks"]["masks"].pop("head.weight")
    state["report"]["layers"][-1]["name"] = "encoder.weight"
    state["report"]["digest"] = Masks.from_state_dict(state["masks"]).digest()
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"hold 'encoder\.weight', but the module has no parameter of that name"):
        fit(tmp_path, Quiet(), imp(), ckpt_path=path)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("epoch", [1, 3, 5])
def test_evaluation_from_a_checkpoint(tmp_path: Path, stage: str, epoch: int) -> None:
    path, other, module = saved(tmp_path, epoch), imp(), Quiet()
    module.test_step = module.validation_step  # type: ignore[method-assign]
    module.predict_step = lambda batch, batch_idx: module(batch[0])  # type: ignore[method-assign, assignment]
    getattr(fits.trainer(tmp_path, other), stage)(module, fits.loader(), ckpt_path=path)
    assert other.cycle == epoch // 2
    assert other.masks.hold_for(module)
    assert other.masks.num_kept == (0, 316, 100)[epoch // 2]


# What is refused.


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"cycles": 0}, ValueError, "`cycles` must be a whole number of at least 1, got 0"),
        ({"cycles": 2.0}, ValueError, "`cycles` must be a whole number"),
        ({"epochs_per_cycle": 0}, ValueError, "`epochs_per_cycle` must be a whole number of at least 1, got 0"),
        ({"rewind_epoch": -1}, ValueError, "`rewind_epoch` must be a whole number of at least 0, got -1"),
        ({"rewind_epoch": 2}, ValueError, r"`rewind_epoch` .* less than `epochs_per_cycle` \(2\), got 2"),
        ({"rewind_epoch": 1, "control": "reinit"}, ValueError, "needs `rewind_epoch=0`, got rewind_epoch=1"),
        ({"control": "magic"}, ValueError, "`control` must be one of 'none', 'shuffle', 'reinit', got 'magic'"),
        ({"bn_batches": -1}, ValueError, "`bn_batches` must be a whole number of at least 0, got -1"),
        ({"sparsity": 98}, ValueError, r"`sparsity` .* in \[0, 1\), got 98. For 98 % pass 0.98"),
        ({"schedule": "square"}, ValueError, "`schedule` must be one of"),
        ({"scope": "local"}, ValueError, "`scope` must be one of"),
        ({"reset_best": None}, TypeError, "`reset_best` must be True or False"),
        ({"include": "head"}, TypeError, "`include` must be a list of glob patterns"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings__error(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        imp(**settings)


def test_settings__defaults() -> None:
    callback = IMPPruningCallback(sparsity=0.98)
    assert (callback.cycles, callback.epochs_per_cycle, callback.rewind_epoch) == (50, 20, 0)
    with pytest.raises(TypeError, match="positional"):
        IMPPruningCallback(0.9)  # type: ignore[misc]


def backbone_module() -> ConvModule:
    module = Quiet()
    module.backbone = module.features
    return module


@pytest.mark.parametrize(
    ("module", "callbacks", "settings", "error", "message"),
    [
        (ConvModule, [], {"max_epochs": 4}, MisconfigurationException, "at the start of epoch 4 .*max_epochs=4 epochs"),
        (ConvModule, [], {"max_epochs": 1}, MisconfigurationException, "Set `max_epochs` to 4 plus the epochs for"),
        (
            ConvModule,
            [],
            {"max_epochs": -1, "max_steps": 12},
            MisconfigurationException,
            "for the last time after 12 steps .*max_steps=12",
        ),
        (ConvModule, [], {"max_steps": 5}, MisconfigurationException, "after max_steps=5. Raise `max_steps`"),
        (
            backbone_module,
            [BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
            {},
            MisconfigurationException,
            "cannot return to one before BackboneFinetuning unfroze layers",
        ),
    ],
    ids=["max_epochs", "far_too_few", "max_steps", "max_steps_and_epochs", "finetuning"],
)
def test_fit__error(
    tmp_path: Path, module: Any, callbacks: Any, settings: Any, error: type[Exception], message: str
) -> None:
    """Refused before the first optimizer step, and the module is left as it was."""
    refused, steps = module(), []

    class Steps(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, *_: Any) -> None:
            steps.append(trainer.global_step)

    with pytest.raises(error, match=message):
        fit(tmp_path, refused, imp(), *callbacks, Steps(), **settings)
    assert steps == []
    assert "configure_optimizers" not in vars(refused)


@pytest.mark.parametrize("settings", [{"max_epochs": 5}, {"max_epochs": -1, "max_steps": 13}], ids=str)
def test_fit__just_long_enough(tmp_path: Path, settings: Any) -> None:
    module, callback = Quiet(), imp()
    fit(tmp_path, module, callback, **settings)
    assert callback.masks.num_kept == 100
    assert callback.masks.hold_for(module)


# Loggers, reports, copies, further fits.


def test_metrics_are_logged(tmp_path: Path) -> None:
    """The cycle with every epoch, the rest once at each cut, and steps count on through all of it."""
    logger, folder = pl.loggers.CSVLogger(tmp_path), tmp_path / "checkpoints"
    checkpoint = ModelCheckpoint(
        folder, filename="{epoch}-{pruning/cycle:.0f}", save_top_k=-1, auto_insert_metric_name=False
    )
    running = fit(tmp_path, ConvModule(), imp(), checkpoint, logger=logger)
    assert running.global_step == 6 * STEPS
    header, *rows = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    values = [dict(zip(header, row, strict=True)) for row in rows]
    by_epoch = {row["epoch"]: float(row["pruning/cycle"]) for row in values if row["epoch"] and row["pruning/cycle"]}
    assert by_epoch == {"0": 0, "1": 0, "2": 1, "3": 1, "4": 2, "5": 2}
    sparsity = {row["epoch"]: row["pruning/sparsity"] for row in values if row["epoch"] and row["pruning/cycle"]}
    assert sparsity["1"] == ""
    assert float(sparsity["3"]) == pytest.approx(1 - 316 / 998)
    assert float(sparsity["5"]) == pytest.approx(1 - 100 / 998)
    cuts = [(row["step"], float(row["pruning/cycle"])) for row in values if row["pruning/density"]]
    assert cuts == [("6", 1), ("12", 2)]
    steps = [int(row["step"]) for row in values if row["train_loss_step"]]
    assert steps == list(range(6 * STEPS))
    assert sorted(path.stem for path in folder.glob("*.ckpt")) == ["0-0", "1-0", "2-1", "3-1", "4-2", "5-2"]


def test_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line after each cycle, and the whole report after the last."""
    callback = imp(rewind_epoch=1)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(tmp_path, Quiet(), callback)
    assert "IMP cycle 1 of 2 is over: 316 of 998 weights are kept (sparsity 68.34%)" in caplog.text
    assert "training returns to the start of epoch 1" in caplog.text
    assert "IMP cycle 2" not in caplog.text
    assert callback.report is not None
    assert str(callback.report) in caplog.text
    assert callback.report.method == "IMP(cycles=2, epochs_per_cycle=2, rewind_epoch=1)"
    assert callback.report.cycle == 2
    assert callback.report.control == "none"
    assert callback.report.effective_sparsity is not None


def test_second_module_starts_afresh(tmp_path: Path) -> None:
    """A used callback does on a new module what a new callback does."""
    callback, fresh = imp(rewind_epoch=1), imp(rewind_epoch=1)
    fit(tmp_path, Quiet(), callback)

    def second_module() -> ConvModule:
        module = Quiet()
        resumable.forget(module)
        return module

    second, expected = second_module(), second_module()
    first_masks = callback.masks
    _, after = looked(tmp_path, second, callback)
    fit(tmp_path, expected, fresh)
    assert [seen.cycle for seen in after] == [0, 0, 1, 1, 2, 2]
    assert fits.equal_states(fits.state_of(second), fits.state_of(expected))
    assert callback.masks == fresh.masks != first_masks


@pytest.mark.filterwarnings("ignore:Training ended in epoch")
def test_second_module_starts_afresh__in_the_middle_of_the_cycles(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    callback, second = imp(), Quiet()
    fit(tmp_path, Quiet(), callback, Stop())
    assert callback.cycle == 1
    resumable.forget(second)
    before, after = looked(tmp_path, second, callback)
    assert [seen.cycle for seen in after] == [0, 0, 1, 1, 2, 2]
    assert fits.equal_states(after[4].tensors["head.bias"], before[0].tensors["head.bias"])


def test_same_module_goes_on(tmp_path: Path) -> None:
    """A second fit of the ticket keeps it sparse, cuts no more, and may be shorter than the cycles."""
    module, callback = Quiet(), imp()
    fit(tmp_path, module, callback)
    masks, weights = callback.masks, fits.state_of(module)
    before, after = looked(tmp_path, module, callback, max_epochs=3)
    assert callback.masks is masks
    assert [seen.num_zeros for seen in after] == [898] * 3
    assert fits.equal_states(before[0].tensors["head.weight"], weights["head.weight"])
    assert masks.hold_for(module)


@since_lightning_2_6
@pytest.mark.filterwarnings("ignore:Training ended in epoch")
def test_same_module_goes_on__from_within_a_cycle(tmp_path: Path) -> None:
    """The same Trainer, interrupted and told to go on, does the cycles that are left, from the same rewind point."""

    class StopOnce(pl.Callback):
        def __init__(self) -> None:
            self.stopped = False

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 2 and not self.stopped:
                self.stopped = trainer.should_stop = True

    module, callback = Quiet(), imp()
    initial = fits.state_of(module)
    look = Look(callback)
    running = fits.trainer(tmp_path, callback, look, StopOnce(), max_epochs=6)
    running.fit(module, fits.loader())
    assert (callback.cycle, running.current_epoch) == (1, 3)
    running.fit(module, fits.loader())
    assert callback.cycle == 2
    assert fits.equal_states(look.seen[-2].tensors["head.bias"], initial["head.bias"])
    assert callback.masks.hold_for(module)


@pytest.mark.filterwarnings("ignore:Layer collapse", "ignore:The network is cut off")
@pytest.mark.parametrize("settings", [{}, {"rewind_epoch": 1}, {"control": "reinit"}, {"control": "shuffle"}], ids=str)
def test_fast_dev_run(tmp_path: Path, settings: Any) -> None:
    """A quick check of one batch prunes at once, to the final sparsity, so that it checks pruning too."""
    module, callback = Quiet(), imp(cycles=50, epochs_per_cycle=20, **settings)
    fit(tmp_path, module, callback, fast_dev_run=True)
    assert callback.masks.num_kept == 100
    assert callback.masks.hold_for(module)
    assert callback.cycle == 50


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
@pytest.mark.parametrize("hook", ["setup", "on_train_batch_end"])
def test_copies(tmp_path: Path, copied: Any, hook: str) -> None:
    """A copy made in the middle of fit has all that is to be kept, and nothing alive."""
    callback = imp()
    copies = []

    class Copy(pl.Callback):
        pass

    def take(trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        copies.append((copied(callback), copy.deepcopy(callback.state_dict()), callback.cycle))

    setattr(Copy, hook, staticmethod(take))
    fit(tmp_path, Quiet(), callback, Copy())
    assert len(copies) == (1 if hook == "setup" else 6 * STEPS)
    for taken, state, cycle in copies:
        assert fits.equal_states(taken.state_dict(), state)
        assert taken.cycle == cycle
        assert taken._fit.enforcement is None
        assert taken._schedules is None
    again = copies[-1][0]
    fit(tmp_path, Quiet(), again)
    assert again.masks == callback.masks


def test_state_dict__before_fit() -> None:
    """The tuner asks for it before anything has happened."""
    file = io.BytesIO()
    torch.save(imp().state_dict(), file)
    file.seek(0)
    callback = imp()
    callback.load_state_dict(torch.load(file, weights_only=True))
    assert (callback.cycle, callback.pruned) == (0, False)


# Controls.


class Randomness(pl.Callback):
    """Copies the states of the global random generators at the start of each epoch."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.states.append((torch.get_rng_state(), random.getstate(), str(np.random.get_state())))


@dataclass
class Outcome:
    history: list[Masks]
    masks: Masks
    ticket: dict[str, Tensor | None]
    final: dict[str, Tensor]
    report: PruningReport | None


def controlled(tmp_path: Path, control: str, seed: int = 0) -> Outcome:
    """One run from the same weights; ``seed`` seeds the global generator for what comes after."""
    module = Quiet()
    torch.manual_seed(seed)
    callback = imp(control=control)
    early, late = Randomness(), Randomness()
    before, after = Look(callback), Look(callback)
    fit(tmp_path, module, early, before, callback, late, after)
    assert all(map(fits.equal_states, early.states, late.states))
    history = [after.seen[epoch].masks for epoch in (2, 4)]
    return Outcome(history, callback.masks, after.seen[4].tensors, fits.state_of(module), callback.report)


def counts(masks: Masks) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


def test_control__shuffle(tmp_path: Path) -> None:
    """The last masks have as many weights in every parameter, elsewhere; all before is the same."""
    none, shuffled = controlled(tmp_path, "none"), controlled(tmp_path, "shuffle")
    assert shuffled.history[0] == none.history[0]
    assert counts(shuffled.masks) == counts(none.masks)
    assert all(not torch.equal(shuffled.masks[name], none.masks[name]) for name in PRUNABLE)
    start = tensors_of(Quiet())
    for name, mask in shuffled.masks.items():
        expected = start[name].clone()  # type: ignore[union-attr]
        expected[~mask] = 0
        assert fits.equal_states(shuffled.ticket[name], expected)
    assert shuffled.report is not None
    assert shuffled.report.control == "shuffle"
    assert counts(shuffled.masks) == [layer.num_kept for layer in shuffled.report.layers]


def test_control__reinit(tmp_path: Path) -> None:
    """The masks stay; survivors get other initial values of their own parameter, all else the initial ones."""
    none, fresh = controlled(tmp_path, "none"), controlled(tmp_path, "reinit")
    assert fresh.history == none.history
    start = tensors_of(Quiet())
    for name, mask in fresh.masks.items():
        now, then = fresh.ticket[name], start[name]
        assert now is not None
        assert then is not None
        assert torch.equal(now != 0, mask)
        assert not torch.signbit(now[~mask]).any()
        assert (now[mask] == then[mask]).float().mean() < 0.2
        assert Counter(now[mask].tolist()) <= Counter(then.flatten().tolist())
    others = [name for name in start if name not in PRUNABLE]
    assert all(fits.equal_states(fresh.ticket[name], start[name]) for name in others)
    assert fresh.report is not None
    assert fresh.report.control == "reinit"


@pytest.mark.parametrize("control", ["shuffle", "reinit"])
def test_control__is_seeded(tmp_path: Path, control: str) -> None:
    """The same for the same global seed, another for another, and training's own random numbers are not used up."""
    first, again, other = (controlled(tmp_path, control, seed) for seed in (0, 0, 1))
    assert fits.equal_states(first.final, again.final)
    assert first.history[0] == other.history[0]
    assert not fits.equal_states(first.ticket["head.weight"], other.ticket["head.weight"])


@pytest.mark.parametrize("control", ["shuffle", "reinit"])
def test_control__checkpoint(tmp_path: Path, control: Any) -> None:
    """A resumed ticket keeps its control, and says so where another is asked for."""
    path, module = saved(tmp_path, 4, control=control), Quiet()
    whole = Quiet()
    fit(tmp_path, whole, imp(control=control))
    fit(tmp_path, module, imp(control=control), ckpt_path=path)
    assert fits.equal_states(fits.state_of(module), fits.state_of(whole))
    with pytest.warns(UserWarning, match=f"was pruned with control='{control}' and stays so"):
        fit(tmp_path, Quiet(), imp(), ckpt_path=path)


def test_random_numbers_go_on(tmp_path: Path) -> None:
    """Cutting and rewinding uses up no random numbers, and does not put them back either."""
    early, late = Randomness(), Randomness()
    fit(tmp_path, Quiet(dropout=0.5), early, imp(), late)
    assert all(map(fits.equal_states, early.states, late.states))
    assert not fits.equal_states(early.states[2], early.states[0])
