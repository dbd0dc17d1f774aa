"""Gradual pruning cuts where its window says, to exact counts that nest, and resumes bit for bit at any step."""

import copy
import logging
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import resumable
import torch
import torch.nn.functional as F
from fits import NUM_PRUNABLE, PRUNABLE, ConvModule, gradual
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_drive import GradualPruningCallback, Masks, PruningReport
from lightning_drive.search import find
from lightning_drive.trainer import sparse_training

STEPS = 3  # per epoch


class Quiet(ConvModule):
    """Nothing but training, where nothing but training matters."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def fit(tmp_path: Path, module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    return fits.fit(tmp_path, module, *callbacks, **{"limit_val_batches": 0, **settings})


class Watch(pl.Callback):
    """Notes the masks in every training step, and what is 0 in it."""

    def __init__(self, pruning: GradualPruningCallback) -> None:
        self.pruning = pruning
        self.masks: list[Masks] = []
        self.zeros: list[int] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.masks.append(self.pruning.masks)
        self.zeros.append(sum(int((pl_module.get_parameter(name) == 0).sum()) for name in PRUNABLE))

    @property
    def kept(self) -> list[int]:
        """How many weights were left in every step."""
        return [masks.num_kept if masks else NUM_PRUNABLE for masks in self.masks]


# The definition, in plain Python and plain torch.


def density(t: float, sparsity: float, schedule: str) -> float:
    removed = {
        "cubic": sparsity - sparsity * (1 - t) ** 3,
        "linear": sparsity * t,
        "exponential": 1 - (1 - sparsity) ** t,
    }[schedule]
    return 1 - removed


def keep_highest(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], share: float, scope: str
) -> dict[str, Tensor]:
    """Sort every surviving weight by its score, and keep the first ones."""
    kept = {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
    for group in [list(PRUNABLE)] if scope == "global" else [[name] for name in PRUNABLE]:
        entries = [
            (score, name, index)
            for name in group
            for index, score in enumerate(scores[name].flatten().tolist())
            if not masks or masks[name].flatten()[index]
        ]
        count = round(sum(scores[name].numel() for name in group) * share)
        for _, name, index in sorted(entries, key=lambda entry: -entry[0])[:count]:
            kept[name].view(-1)[index] = True
    return kept


@torch.no_grad()
def fill_zeros(masks: Mapping[str, Tensor], of: Callable[[str], list[Any]]) -> None:
    for name, mask in masks.items():
        for value in of(name):
            if isinstance(value, Tensor) and value.shape == mask.shape:
                value[~mask] = 0


def plain_gradual(
    module: ConvModule, epochs: int, start: int, end: int, cuts_per_epoch: int, criterion: str, **goal: Any
) -> list[dict[str, Tensor]]:
    """Train with cuts in between, in a loop without Lightning; return the masks of every step."""
    optimizer, masks, history, done = module.configure_optimizers(), {}, [], 0
    num_cuts = (end - start) * cuts_per_epoch

    def loss_of(network: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(network(batch[0]), batch[1])

    for epoch in range(epochs):
        for index, batch in enumerate(fits.loader()):
            position = epoch + index / STEPS - start  # in epochs of the window
            due = min(max(0, math.floor(position * cuts_per_epoch + 1e-9)), num_cuts)
            if due > done:
                if criterion == "drive":
                    twin = copy.deepcopy(module)
                    twin.zero_grad()
                    loss_of(twin, batch).backward()
                scores = {}
                for name in PRUNABLE:
                    weight = module.get_parameter(name).detach()
                    gradient = twin.get_parameter(name).grad if criterion == "drive" else torch.ones(())
                    scores[name] = (weight * gradient).abs()
                share = density(due / num_cuts, goal["sparsity"], goal["schedule"])
                masks, done = keep_highest(scores, masks, share, goal["scope"]), due
                fill_zeros(
                    masks,
                    lambda name: [
                        module.get_parameter(name),
                        *optimizer.state.get(module.get_parameter(name), {}).values(),
                    ],
                )
            history.append(masks)
            optimizer.zero_grad()
            loss_of(module, batch).backward()
            fill_zeros(masks, lambda name: [module.get_parameter(name).grad])
            optimizer.step()
            fill_zeros(masks, lambda name: [module.get_parameter(name)])
    return history


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("sgd", {}),
        ("adamw", {"start_epoch": 0, "end_epoch": 3, "cuts_per_epoch": 2}),
        ("sgd", {"schedule": "exponential", "scope": "layerwise"}),
        ("nesterov", {"schedule": "linear", "cuts_per_epoch": 1}),
        ("sgd", {"criterion": "drive"}),
        ("adamw", {"criterion": "drive", "scope": "layerwise", "start_epoch": 0, "schedule": "exponential"}),
        ("sgd", {"cuts_per_epoch": 50, "sparsity": 0.9}),
    ],
    ids=str,
)
def test_equals_the_definition(tmp_path: Path, optimizer: str, settings: dict[str, Any]) -> None:
    """The masks of each step, and the weights at the end bit for bit, are those of a plain loop of plain torch."""
    module, callback = Quiet(optimizer), gradual(**settings)
    watch = Watch(callback)
    fit(tmp_path, module, callback, watch)
    plain, goal = Quiet(optimizer), {"sparsity": callback.sparsity, "scope": callback.scope}
    window = (callback.start_epoch, callback.end_epoch, callback.cuts_per_epoch, callback.criterion)
    expected = plain_gradual(plain, 4, *window, **goal, schedule=callback.schedule)  # type: ignore[arg-type]
    for found, masks in zip(watch.masks, expected, strict=True):
        assert found == Masks(masks)
    assert fits.equal_states(fits.state_of(module), fits.state_of(plain))
    assert fits.equal_states(fits.state_of(module)["norm.running_mean"], plain.norm.running_mean)


@pytest.mark.filterwarnings("ignore:Layer collapse", "ignore:The network is cut off")
@pytest.mark.parametrize("control", ["none", "shuffle"])
@pytest.mark.parametrize("criterion", ["magnitude", "drive"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.98])
def test_counts(tmp_path: Path, sparsity: float, criterion: Any, control: Any) -> None:
    """Exact after each cut, and nested, also where they are chosen at random; final from the end of the window on."""
    callback = gradual(sparsity=sparsity, criterion=criterion, control=control)
    watch = Watch(callback)
    fit(tmp_path, Quiet(), callback, watch)
    shares = [1.0] * 4 + [density(t, sparsity, "cubic") for t in (1 / 3, 2 / 3, 1)] + [1 - sparsity] * 5
    assert watch.kept == [round(NUM_PRUNABLE * share) for share in shares]
    assert watch.zeros == [NUM_PRUNABLE - kept for kept in watch.kept]
    for before, after in zip(watch.masks[4:], watch.masks[5:], strict=False):
        assert all((after[name] <= before[name]).all() for name in PRUNABLE if before)
    assert all(masks is callback.masks for masks in watch.masks[6:])
    assert callback.report is not None
    assert callback.report.control == control


def test_shuffle__counts_of_each_parameter(tmp_path: Path) -> None:
    """The first cut keeps as much of every parameter as the criterion would, elsewhere."""
    kept = []
    for control in ("none", "shuffle"):
        callback = gradual(control=control)
        watch = Watch(callback)
        fit(tmp_path, Quiet(), callback, watch)
        kept.append(watch.masks[4])
    for name in PRUNABLE:
        assert kept[0][name].sum() == kept[1][name].sum()
        assert not torch.equal(kept[0][name], kept[1][name])


# When.


class Equal:
    """A loader of equal batches, so that an epoch that is resumed may begin with the first again."""

    def __init__(self, number: int) -> None:
        self.batches = [next(iter(fits.loader()))] * number

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Batches(Quiet):
    """Trains on equal batches."""

    num_batches = 8

    def train_dataloader(self) -> Equal:
        return Equal(self.num_batches)


@pytest.mark.parametrize(
    ("settings", "cuts", "expected"),
    [
        ({}, {"cuts_per_epoch": 4}, {10: 1, 12: 2, 14: 3, 16: 4}),
        ({}, {"cuts_per_epoch": 3}, {11: 1, 14: 2, 16: 3}),
        ({"accumulate_grad_batches": 4}, {"cuts_per_epoch": 4}, {12: 2, 16: 4}),
        ({"accumulate_grad_batches": 3}, {"cuts_per_epoch": 2}, {14: 1, 16: 2}),
        ({"limit_train_batches": 2}, {"cuts_per_epoch": 2}, {3: 1, 4: 2}),
        ({"limit_train_batches": 1}, {"cuts_per_epoch": 5}, {2: 5}),
        ({"max_epochs": 4}, {"start_epoch": 0, "end_epoch": 3, "cuts_per_epoch": 1}, {8: 1, 16: 2, 24: 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("criterion", ["magnitude", "drive"])
def test_when(tmp_path: Path, settings: Any, cuts: Any, expected: dict[int, int], criterion: Any) -> None:
    """At equal distances, before a batch with which no gradients wait; the last one at the start of an epoch."""
    callback, seen = gradual(criterion=criterion, **cuts), {}

    class Look(pl.Callback):
        number = 0

        def on_train_batch_start(self, *_: Any) -> None:
            if callback.cut and callback.cut not in seen.values():
                seen[self.number] = callback.cut
            self.number += 1

    running = fits.trainer(tmp_path, callback, Look(), limit_val_batches=0, **{"max_epochs": 3, **settings})
    running.fit(Batches())
    assert seen == expected
    assert callback.report is not None
    assert [cut.cut for cut in callback.report.cuts] == list(expected.values())
    per_epoch = running.num_training_batches
    assert [cut.epoch for cut in callback.report.cuts] == pytest.approx([batch / per_epoch for batch in expected])


@pytest.mark.parametrize(
    ("settings", "max_epochs", "window"),
    [
        ({}, 3, (1, 2)),
        ({}, 2, (0, 1)),
        ({}, 15, (2, 10)),
        ({}, 35, (2, 23)),
        ({"start_epoch": 0}, 15, (0, 10)),
        ({"end_epoch": 14}, 15, (2, 14)),
        ({"end_epoch": 3}, 15, (1, 3)),
    ],
    ids=str,
)
def test_window__defaults(settings: Any, max_epochs: int, window: tuple[int, int]) -> None:
    plan = GradualPruningCallback(sparsity=0.5, **settings).plan(Quiet(), max_epochs=max_epochs)
    assert (plan.first_epoch, plan.last_epoch) == window
    assert len(plan.kept) == 4 * (window[1] - window[0])


def test_plan(tmp_path: Path) -> None:
    """It says what the run then does, and what scoring costs."""
    callback = gradual(criterion="drive")
    plan = callback.plan(Quiet(), max_epochs=4, steps_per_epoch=STEPS)
    watch = Watch(callback)
    fit(tmp_path, Quiet(), callback, watch)
    assert list(plan.kept) == sorted({*watch.kept[4:]}, reverse=True)
    assert plan.passes == 3
    assert "when: from the start of epoch 1 to that of epoch 2, in 3 cuts" in str(plan)
    assert callback.report is not None
    assert callback.report.method == plan.method
    assert gradual().plan(Quiet()).passes == 0
    with pytest.raises(ValueError, match="the number of epochs of the run is not known"):
        GradualPruningCallback(sparsity=0.5).plan(Quiet())


# What a cut costs, and what it does not touch.


@pytest.mark.parametrize("criterion", ["magnitude", "drive"])
def test_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, criterion: str) -> None:
    """One forward pass more for a cut by ``drive``, none by magnitude; paths and costs are followed once."""
    diagnose, outcomes = find.diagnose, []

    def noted(*arguments: Any) -> Any:
        module.calls.append("diagnosis")
        outcomes.append(diagnose(*arguments))
        del module.calls[module.calls.index("diagnosis") :]
        return outcomes[-1]

    monkeypatch.setattr(find, "diagnose", noted)
    module = ConvModule()
    fit(tmp_path, module, gradual(criterion=criterion, bn_batches=0))
    assert len(outcomes) == 1
    assert len(module.calls) == 4 * STEPS + (3 if criterion == "drive" else 0)


@pytest.mark.parametrize("criterion", ["magnitude", "drive"])
def test_random_numbers_go_on(tmp_path: Path, criterion: Any) -> None:
    """Cutting uses up no random numbers: with a sparsity of 0 it changes nothing at all."""
    dense, module = Quiet(dropout=0.5), Quiet(dropout=0.5)
    for each, callbacks in ((dense, []), (module, [gradual(sparsity=0.0, criterion=criterion)])):
        torch.manual_seed(3)
        fit(tmp_path, each, *callbacks)
    assert fits.equal_states(fits.state_of(module), fits.state_of(dense))


def test_batch__is_not_written_to(tmp_path: Path) -> None:
    """What a loss does to the batch that it scores on does not reach the training step."""

    def greedy(module: nn.Module, batch: list[Tensor]) -> Tensor:
        loss = F.cross_entropy(module(batch[0].clone()), batch[1])
        batch[0].zero_()
        return loss

    modules = []
    for loss_fn in (greedy, None):
        modules.append(Quiet())
        fit(tmp_path, modules[-1], gradual(criterion="drive", loss_fn=loss_fn))
    assert fits.equal_states(*map(fits.state_of, modules))


# Resume.


class SaveAll(pl.Callback):
    """Saves after every step, and at the end of every epoch."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"epoch-{trainer.current_epoch}.ckpt")


def run(tmp_path: Path, optimizer: str, ckpt_path: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Train from the start, and save everywhere, or from a checkpoint, in which case all else must come from it."""
    module, callback = Batches(optimizer), gradual(**{"start_epoch": 0, "cuts_per_epoch": 2, **settings})
    module.num_batches = 4
    if ckpt_path is not None:
        resumable.forget(module)
    saving = [SaveAll()] if ckpt_path is None else []
    running = fits.trainer(tmp_path, callback, *saving, max_epochs=3, limit_val_batches=0)
    running.fit(module, ckpt_path=ckpt_path)
    assert callback.report is not None
    return {
        "state": fits.state_of(module),
        "optimizer": [dict(state) for state in running.optimizers[0].state.values()],
        "masks": dict(callback.masks),
        "cuts": [(cut.cut, cut.epoch, cut.step, cut.num_kept) for cut in callback.report.cuts],
        "rounds": callback.report.rounds,
    }


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("sgd", {}),
        ("adamw", {"criterion": "drive"}),
        ("sgd", {"scope": "layerwise", "cuts_per_epoch": 9}),
        ("adamw", {"control": "reinit"}),
    ],
    ids=str,
)
def test_resume(tmp_path: Path, optimizer: str, settings: Any) -> None:
    """From between any two steps, from other weights: the same weights, momenta, masks and history, bit for bit."""
    torch.manual_seed(11)
    whole = run(tmp_path, optimizer, **settings)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 3 * 4 + 3
    for path in paths:
        if path.stem in ("12", "epoch-2"):
            continue  # training is over
        torch.manual_seed(11)
        resumed = run(tmp_path, optimizer, path, **settings)
        assert [name for name in whole if not fits.equal_states(resumed[name], whole[name])] == [], path.stem


def test_resume__other_length(tmp_path: Path) -> None:
    """A run that goes on for longer keeps the window that it began with."""
    fit(tmp_path, Quiet(), GradualPruningCallback(sparsity=0.8, cuts_per_epoch=3), fits.SaveEpochs(), max_epochs=4)
    longer = GradualPruningCallback(sparsity=0.8, cuts_per_epoch=3)
    fit(tmp_path, Quiet(), longer, ckpt_path=tmp_path / "1.ckpt", max_epochs=9)
    assert longer.report is not None
    assert longer.report.method == "GradualMagnitude(start_epoch=1, end_epoch=3, cuts_per_epoch=3)"
    assert longer.report.epoch == 3


def saved(tmp_path: Path, epoch: int, **settings: Any) -> Path:
    fit(tmp_path, Quiet(), gradual(**settings), fits.SaveEpochs())
    return tmp_path / f"{epoch}.ckpt"


@pytest.mark.parametrize(
    "other",
    [
        {"sparsity": 0.7},
        {"schedule": "linear"},
        {"scope": "layerwise"},
        {"criterion": "drive"},
        {"cuts_per_epoch": 2},
        {"end_epoch": 3},
        {"control": "shuffle"},
        {"exclude": ["head.*"]},
    ],
    ids=str,
)
def test_resume__other_settings_error(tmp_path: Path, other: dict[str, Any]) -> None:
    """In the middle of the window they are refused before the first step."""
    path, module = saved(tmp_path, 1), ConvModule()
    with pytest.raises((ValueError, MisconfigurationException), match="Resume with the settings of the checkpoint"):
        fit(tmp_path, module, gradual(**other), ckpt_path=path)
    assert not module.calls


@pytest.mark.parametrize("other", [{"criterion": "drive"}, {"cuts_per_epoch": 2}, {"start_epoch": 0}], ids=str)
def test_resume__other_settings_after_the_window(tmp_path: Path, other: dict[str, Any]) -> None:
    """When all cuts are done, it no longer matters how."""
    path, module, callback = saved(tmp_path, 2), Quiet(), gradual(**other)
    fit(tmp_path, module, callback, ckpt_path=path)
    assert callback.masks.num_kept == 200
    assert callback.masks.hold_for(module)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resume__of_another_method_error(tmp_path: Path) -> None:
    """DRIVE does not take over a network that is still to be pruned, nor the other way round."""
    path = saved(tmp_path, 1)
    with pytest.raises(ValueError, match=r"its kind \(IMP, gradual pruning, or neither\)"):
        fit(tmp_path, Quiet(), fits.drive(), ckpt_path=path)
    fit(tmp_path, Quiet(), fits.drive(warmup_epochs=0), fits.SaveEpochs())
    with pytest.raises(ValueError, match="was pruned by DRIVEPruningCallback"):
        fit(tmp_path, Quiet(), gradual(), ckpt_path=tmp_path / "1.ckpt")


def test_resume__from_a_run_without_the_callback(tmp_path: Path) -> None:
    """A dense run is pruned to where the window is by then."""
    fit(tmp_path, Quiet(), fits.SaveEpochs())
    callback = gradual(start_epoch=0, end_epoch=3)
    fit(tmp_path, Quiet(), callback, ckpt_path=tmp_path / "1.ckpt")
    assert callback.report is not None
    assert [cut.cut for cut in callback.report.cuts] == [6, 7, 8, 9]
    assert callback.masks.num_kept == 200


# The report, what is logged, and what is said.


def test_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One summary at the end; a history of all cuts, with what validation said where an epoch ended."""
    callback, module = gradual(start_epoch=0), ConvModule()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        running = fits.fit(tmp_path, module, callback, EarlyStopping("val_loss", patience=99))
    report = callback.report
    assert report is not None
    assert caplog.text.count("Pruned by") == 1
    assert str(report) in caplog.text
    assert (report.epoch, report.step, report.cycle) == (2, 6, None)
    assert report.effective_sparsity is not None
    assert report.multiply_adds is not None
    assert report.scores is not None
    assert [one.index for one in report.rounds] == [1, 2, 3, 4, 5, 6]
    assert [cut.num_kept for cut in report.cuts] == [
        NUM_PRUNABLE - sum(map(sum, (one.removed for one in report.rounds[:number]))) for number in range(1, 7)
    ]
    assert [next(iter(cut.metrics), "") for cut in report.cuts] == ["", "", "val_loss", "", "", "val_loss"]
    assert report.pictures == ["density", "rounds", "scores", "cuts"]
    assert set(report.phases) == {"warmup", "rounds", "measuring", "batch_norm", "commit"}
    parts = sum(report.phases[name] for name in ("rounds", "measuring", "batch_norm"))
    assert report.seconds == pytest.approx(parts, rel=0.5)
    running.save_checkpoint(tmp_path / "last.ckpt")
    assert PruningReport.from_checkpoint(tmp_path / "last.ckpt") == report


def test_metrics_are_logged(tmp_path: Path) -> None:
    """With every cut at its step, and with every epoch as it is at the end of it."""
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(tmp_path, ConvModule(), gradual(start_epoch=0), logger=logger)
    header, *lines = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    logged = [(int(row["step"]), float(row["pruning/sparsity"])) for row in rows if row["pruning/sparsity"]]
    kept = [round(NUM_PRUNABLE * density(t / 6, 0.8, "cubic")) for t in range(7)]
    at = {step: 1 - kept[cut] / NUM_PRUNABLE for step, cut in zip((1, 2, 3, 4, 5, 6), range(1, 7), strict=True)}
    at_end = [(2, at[2]), (5, at[5]), (8, at[6]), (11, at[6])]
    assert dict(logged) == pytest.approx(dict([*at.items(), *at_end]))
    assert len(logged) == len(at) + len(at_end)


def test_early_stopping_and_best_model(tmp_path: Path) -> None:
    """The one is held off until the last cut, and the other begins again there."""

    class Worsens(ConvModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("score", float(self.current_epoch))

    callback, module = gradual(), Worsens()
    stopping = EarlyStopping("score", patience=1)
    best = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="score")
    running = fits.fit(tmp_path, module, callback, stopping, best, max_epochs=9)
    assert running.current_epoch == 4  # the first epoch of the final network is its best, the next one stops
    assert Path(best.best_model_path).stem == "epoch=2"


def test_training_ends_before__warning(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    message = (
        r"before the last cut, which would have been at the start of epoch 2 .*: the network has a sparsity of 0\.7705,"
        r" not 0\.8\. Let training run longer, or lower `end_epoch`"
    )
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, Quiet(), gradual(), Stop())


# Settings.


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"start_epoch": -1}, ValueError, "`start_epoch` must be a whole number of at least 0, got -1"),
        ({"start_epoch": 1.5}, ValueError, "`start_epoch` must be a whole number"),
        ({"end_epoch": 0}, ValueError, "`end_epoch` must be a whole number of at least 1, got 0"),
        ({"start_epoch": 2}, ValueError, "`start_epoch` must be less than 2, got start_epoch=2"),
        ({"cuts_per_epoch": 0}, ValueError, "`cuts_per_epoch` must be a whole number of at least 1, got 0"),
        ({"criterion": "snip"}, ValueError, "`criterion` must be one of 'magnitude', 'drive', got 'snip'"),
        ({"schedule": "square"}, ValueError, "`schedule` must be one of"),
        ({"loss_fn": 1}, TypeError, "`loss_fn` must be a function"),
        ({"bn_batches": -1}, ValueError, "`bn_batches` must be a whole number of at least 0, got -1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings__error(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gradual(**settings)


class Stream(IterableDataset[Any]):
    """A stream that can be read once."""

    def __init__(self) -> None:
        self.samples = iter(fits.dataset(256))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.samples)


class Manual(fits.Manual):
    steps = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize(
    ("settings", "own", "message"),
    [
        ({"max_epochs": 2}, {}, "for the last time at the start of epoch 2 .* ends after max_epochs=2 epochs"),
        ({"max_epochs": 1}, {"end_epoch": None, "start_epoch": None}, "ends after max_epochs=1 epochs"),
        ({"max_epochs": 3}, {"end_epoch": None, "start_epoch": 2}, r"less than 2 \(two thirds of max_epochs=3\), got"),
        ({"max_epochs": -1}, {"end_epoch": None}, "number of epochs of the run is not known"),
        ({"max_steps": 6}, {}, "for the last time after 6 steps, but training ends after max_steps=6"),
    ],
    ids=["max_epochs", "one_epoch", "start", "no_end", "max_steps"],
)
def test_fit__error(tmp_path: Path, settings: Any, own: Any, message: str) -> None:
    """Refused before the first step."""
    module = ConvModule()
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, module, gradual(**own), **settings)
    assert not module.calls


def test_fit__just_long_enough(tmp_path: Path) -> None:
    for settings in ({"max_epochs": 3}, {"max_steps": 7}):
        callback = gradual()
        fit(tmp_path, Quiet(), callback, **settings)
        assert callback.masks.num_kept == 200


def test_stream__error(tmp_path: Path) -> None:
    """Where an epoch has no known length, cuts within it have no place; at its start they have."""
    module, loader = ConvModule(), DataLoader(Stream(), batch_size=16)
    with pytest.raises(MisconfigurationException, match=r"Set `limit_train_batches` .* or `cuts_per_epoch=1`"):
        fits.trainer(tmp_path, gradual(cuts_per_epoch=2), max_epochs=9).fit(module, loader)
    assert not module.calls
    with pytest.raises(MisconfigurationException, match=r"training data \(Stream\) is an iterator"):
        fits.trainer(tmp_path, gradual(bn_batches=1), limit_train_batches=2).fit(module, loader)


def test_stream(tmp_path: Path) -> None:
    """A cut by ``drive`` scores on the batch that is trained on anyway, and takes none from the stream."""
    callback, module = gradual(criterion="drive", cuts_per_epoch=2), ConvModule()
    fits.trainer(tmp_path, callback, limit_train_batches=4, limit_val_batches=0).fit(
        module, DataLoader(Stream(), batch_size=16)
    )
    assert callback.masks.num_kept == 200
    trained = torch.cat([*dict.fromkeys(module.calls)])
    assert torch.equal(trained.unique(), torch.stack([image[0, 0, 0] for image, _ in fits.dataset(256)]).unique())


def test_manual_optimization(tmp_path: Path) -> None:
    """Magnitude needs no loss, and ``drive`` asks for one before the first step."""
    for settings in ({}, {"criterion": "drive", "loss_fn": fits.loss_fn}):
        callback, module = gradual(**settings), Manual()
        fit(tmp_path, module, callback)
        assert callback.masks.num_kept == 200
        assert callback.masks.hold_for(module)
    refused = Manual()
    with pytest.raises(MisconfigurationException, match="Pass `loss_fn`"):
        fit(tmp_path, refused, gradual(criterion="drive"))
    assert refused.steps == 0


class TakesIterator(fits.ConvModule):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, *_ = next(dataloader_iter)
        return fits.loss_fn(self, batch)


@pytest.mark.filterwarnings(
    "ignore:You are using the `dataloader_iter` step", "ignore:Found `dataloader_iter` argument"
)
@pytest.mark.parametrize("settings", [{}, {"loss_fn": fits.loss_fn}], ids=["by_training_step", "by_loss_fn"])
def test_dataloader_iter(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Where callbacks see no batch, magnitude prunes, and ``drive`` is refused by name."""
    callback, module = gradual(), TakesIterator()
    fit(tmp_path, module, callback)
    assert callback.masks.num_kept == 200
    assert callback.masks.hold_for(module)
    with pytest.raises(MisconfigurationException, match=r"`dataloader_iter`, so that .* Use criterion='magnitude'"):
        fit(tmp_path, TakesIterator(), gradual(criterion="drive", **settings))


# Other trainings.


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batch_without_loss(tmp_path: Path) -> None:
    """It leaves the cut to the next batch."""

    class Skips(Quiet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if self.current_epoch in (1, 2) and batch_idx < 2 else super().training_step(batch, batch_idx)

    callback, module = gradual(criterion="drive"), Skips()
    fit(tmp_path, module, callback)
    assert callback.report is not None
    assert [(cut.cut, round(cut.epoch, 2)) for cut in callback.report.cuts] == [(2, 1.67), (3, 2.67)]
    assert callback.masks.num_kept == 200


class WithSpare(Quiet):
    """Has a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(5, 5)


@pytest.mark.parametrize("criterion", ["magnitude", "drive"])
def test_parameters_without_a_gradient(tmp_path: Path, criterion: Any) -> None:
    """They stay dense, and do not count."""
    callback, module = gradual(criterion=criterion), WithSpare()
    with pytest.warns(UserWarning, match=r"'spare.weight' had no gradient in all of the training before the first cut"):
        fit(tmp_path, module, callback)
    assert tuple(callback.masks) == PRUNABLE
    assert callback.masks.num_kept == 200
    assert module.spare.weight.count_nonzero() == 25
    assert callback.report is not None
    assert "'spare.weight' had no gradient" in callback.report.warnings[0]


class WithBackbone(Quiet):
    """Its convolutions are its backbone, which a finetuning callback unfreezes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.features

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([value for value in self.parameters() if value.requires_grad], lr=0.05, momentum=0.9)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_layers_unfrozen_within_the_window(tmp_path: Path) -> None:
    """What is frozen at the first cut stays dense, as a warning says, and later cuts go on without it."""
    callback, module = gradual(end_epoch=3), WithBackbone()
    with pytest.warns(UserWarning, match=r"Set `start_epoch` to more than the epoch in which that happens, got 1"):
        fit(tmp_path, module, callback, BackboneFinetuning(2))
    assert list(callback.masks) == ["head.weight"]
    assert callback.masks.num_kept == round(512 * 0.2)
    assert callback.report is not None
    assert any("BackboneFinetuning froze them" in text for text in callback.report.warnings)


@pytest.mark.filterwarnings("ignore:Layer collapse", "ignore:The network is cut off")
@pytest.mark.parametrize("settings", [{}, {"criterion": "drive"}, {"control": "reinit"}, {"end_epoch": 40}], ids=str)
def test_fast_dev_run(tmp_path: Path, settings: Any) -> None:
    """A quick check of one batch prunes at once, to the final sparsity, so that it checks pruning too."""
    module, callback = Quiet(), gradual(**settings)
    fit(tmp_path, module, callback, fast_dev_run=True)
    assert callback.masks.num_kept == 200
    assert callback.masks.hold_for(module)


@pytest.mark.parametrize("criterion", ["magnitude", "drive"])
def test_averages(tmp_path: Path, criterion: Any) -> None:
    """A running average is pruned along with every cut, and begins no new life by it."""
    average_of = pytest.importorskip("lightning.pytorch.callbacks", reason="Lightning 2.6").__dict__.get(
        "EMAWeightAveraging"
    )
    if average_of is None:
        pytest.skip("Lightning 2.5 has no EMAWeightAveraging")
    callback, module, average = gradual(criterion=criterion), Quiet(), average_of(decay=0.5)
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            copied = dict(average._average_model.module.named_parameters())
            seen.append(sum(int((copied[name] == 0).sum()) for name in PRUNABLE))

    fit(tmp_path, module, callback, average, Look())
    assert seen == [NUM_PRUNABLE - kept for kept in [998] * 4 + [436, 229] + [200] * 6]


def test_second_module_starts_afresh(tmp_path: Path) -> None:
    """A used callback does on a new module what a new callback does, also from the middle of its window."""
    callback, modules = gradual(), [Quiet(), Quiet()]
    fit(tmp_path, Quiet(), callback)
    for module, pruning in zip(modules, (callback, gradual()), strict=True):
        fit(tmp_path, module, pruning)
    assert fits.equal_states(*map(fits.state_of, modules))


def test_same_module_goes_on(tmp_path: Path) -> None:
    """A second fit of the final network keeps its masks, and may be shorter than the window."""
    callback, module = gradual(), Quiet()
    fit(tmp_path, module, callback)
    masks = callback.masks
    fit(tmp_path, module, callback, max_epochs=1)
    assert callback.masks is masks
    assert masks.hold_for(module)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_copies(tmp_path: Path, copied: Any) -> None:
    """A copy made in the middle of fit has all that is to be kept, and nothing alive."""
    callback, copies = gradual(), []

    class Copy(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            copies.append((copied(callback), callback.state_dict()))

    fit(tmp_path, Quiet(), callback, Copy())
    for taken, state in copies:
        assert fits.equal_states(taken.state_dict(), state)
        assert taken._fit.enforcement is None
    again = copies[4][0]
    fit(tmp_path, Quiet(), again)
    assert again.masks == callback.masks


def test_reinit(tmp_path: Path) -> None:
    """The final masks are those of the run itself; survivors then get new initial values of their own parameter."""
    plain, fresh, module = gradual(), gradual(control="reinit"), Quiet()
    fit(tmp_path, Quiet(), plain)
    initial, after = fits.state_of(module), {}

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            after[trainer.current_epoch] = fits.state_of(pl_module)

    fit(tmp_path, module, fresh, Look())
    assert fresh.masks == plain.masks
    for name, mask in fresh.masks.items():
        assert set(after[2][name][mask].tolist()) <= set(initial[name].flatten().tolist())
        assert not torch.equal(after[2][name][mask], initial[name][mask])
    assert fits.equal_states(after[2]["head.bias"], initial["head.bias"])


def test_accelerate__after_the_last_cut_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse forms are measured once, for the final masks."""
    choose, chosen = sparse_training._choice, []

    def noted(trainer: pl.Trainer, pl_module: Any, masks: Masks, *others: Any) -> Any:
        chosen.append((trainer.global_step, masks.num_kept))
        return choose(trainer, pl_module, masks, *others)

    monkeypatch.setattr(sparse_training, "_choice", noted)
    callback = gradual(accelerate=True)
    fit(tmp_path, Quiet(), callback)
    assert chosen == [(6, 200)]
    assert callback.report is not None
    assert callback.report.acceleration is not None
