"""Every callback takes a sparsity for each group of parameters, other densities, and a schedule that is a function."""

import copy
import json
import math
import pickle
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import reference
import resumable
import torch
import torch.nn.functional as F
from fits import PRUNABLE, ConvModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn

from lightning_drive import (
    DRIVEPruningCallback,
    GradualPruningCallback,
    IMPPruningCallback,
    Masks,
    PruningReport,
    SNIPPruningCallback,
    SynFlowPruningCallback,
)
from lightning_drive.callbacks.hooks import PruningCallback

SIZES = {"features.0.weight": 54, "features.4.weight": 432, "head.weight": 512}
MAPPING = {"features.0.*": 0.5, "features.*": 0.9, "*": 0.75}


def early(done: float) -> float:
    return math.sin(done * math.pi / 2)


def late(done: float) -> float:
    return done**3


GOALS: dict[str, dict[str, Any]] = {
    "mapping": {"sparsity": MAPPING},
    "mapping_layerwise": {"sparsity": {"*": 0.9, "head.*": 0.25}, "scope": "layerwise", "schedule": "linear"},
    "mapping_erk": {"sparsity": {"head.*": 0.5, "*": 0.8}, "scope": "erk", "schedule": early},
    "erk": {"sparsity": 0.8, "scope": "erk"},
    "function": {"sparsity": 0.8, "schedule": late},
}
KINDS: dict[str, Callable[..., PruningCallback]] = {
    "drive": lambda **goal: DRIVEPruningCallback(rounds=4, warmup_epochs=1, **goal),
    "snip": lambda **goal: SNIPPruningCallback(rounds=3, **goal),
    "synflow": lambda **goal: SynFlowPruningCallback(rounds=5, **goal),
    "imp": lambda **goal: IMPPruningCallback(cycles=3, epochs_per_cycle=1, **goal),
    "gradual": lambda **goal: GradualPruningCallback(start_epoch=1, end_epoch=3, cuts_per_epoch=2, **goal),
}
ROUNDS = {"drive": 4, "snip": 3, "synflow": 5, "imp": 3, "gradual": 4}
REPEATED = ("imp", "gradual")


class Quiet(ConvModule):
    """Nothing but training, where nothing but training matters."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def fit(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    return fits.fit(folder, module, *callbacks, **{"limit_val_batches": 0, "max_epochs": 4, **settings})


def groups_after(kind: str, goal: dict[str, Any]) -> list[dict[tuple[str, ...], int]]:
    """How many weights each ranking keeps after each round, by the oracle."""
    schedule = goal.get("schedule", "exponential")
    if kind == "gradual" and "schedule" not in goal:
        schedule = lambda done: 1 - (1 - done) ** 3  # noqa: E731 - its default, cubic
    masks, history = reference.ones_like_weights(ConvModule(), PRUNABLE), []
    for index in range(1, ROUNDS[kind] + 1):
        kept = reference.to_keep(masks, index, ROUNDS[kind], goal["sparsity"], schedule, goal.get("scope", "global"))
        history.append({tuple(names): count for names, count in kept})
    return history


# Counts, in the run, in the report and in the plan.


@pytest.mark.filterwarnings("ignore:In round", "ignore:Layer collapse", "ignore:The network is cut off")
@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("kind", KINDS)
def test_counts(tmp_path: Path, kind: str, goal: str) -> None:
    """Of each ranking and after each round they are exact, as the plan said and as the report says; masks nest."""
    callback, module = KINDS[kind](**GOALS[goal]), Quiet()
    plan = callback.plan(module, max_epochs=4)
    seen: list[Masks] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if callback.pruned and (not seen or seen[-1] is not callback.masks):
                seen.append(callback.masks)

    fit(tmp_path, module, callback, Look())
    expected = groups_after(kind, GOALS[goal])
    assert list(plan.kept) == [sum(kept.values()) for kept in expected]
    for masks, kept in zip(reversed(seen), reversed(expected), strict=False):
        for names, count in kept.items():
            assert sum(int(masks[name].sum()) for name in names) == count
    for before, after in pairwise(seen):
        assert all((after[name] <= before[name]).all() for name in PRUNABLE)
    assert len(seen) == (ROUNDS[kind] if kind in REPEATED else 1)

    report = callback.report
    assert report is not None
    removed = accumulate(sum(each.removed) for each in report.rounds)
    assert [report.num_weights - number for number in removed] == list(plan.kept)
    assert {layer.name: layer.num_kept for layer in report.layers} == {
        name: int((module.get_parameter(name) != 0).sum()) for name in PRUNABLE
    }
    planned = {each.name: each.num_kept for each in plan.parameters if each.num_kept is not None}
    assert planned == {names[0]: count for names, count in expected[-1].items() if len(names) == 1}
    assert PruningReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_erk__is_as_sparse_as_global(tmp_path: Path) -> None:
    """In all, and by hand in each: sums of dimensions 13, 20 and 132; 158 of 200 would go to the last one."""
    callback = DRIVEPruningCallback(sparsity=0.8, scope="erk", warmup_epochs=0, rounds=3)
    fit(tmp_path, Quiet(), callback)
    assert callback.masks.num_kept == fits.NUM_KEPT
    assert [int(mask.sum()) for mask in callback.masks.values()] == [round(200 * part / 165) for part in (13, 20, 132)]


def test_plan__text() -> None:
    """Each group has a line, and each parameter that is not ranked with others its own number."""
    plan = DRIVEPruningCallback(sparsity={"features.*": 0.75, "*": 0.5}, rounds=2).plan(Quiet())
    assert str(plan).splitlines()[:6] == [
        "DRIVE(rounds=2, batches_per_round=1, mode='train') keeps 378 of 998 prunable weights, a sparsity of 62.12%",
        "of all 1,044 weights 95.59% are prunable, an overall sparsity of 59.39%",
        "'features.*' keeps 122 of 486 weights, a sparsity of 74.90%",
        "'*' keeps 256 of 512 weights, a sparsity of 50.00%",
        "when: at the start of epoch 5, in 2 rounds",
        "weights left after round 1: 605; 2: 378",
    ]
    rows = [line.split() for line in str(plan).splitlines()[6:-1]]
    assert rows == [
        ["parameter", "shape", "weights", "pruned", "kept"],
        ["features.0.weight", "6x1x3x3", "54", "yes", "-"],
        ["features.4.weight", "8x6x3x3", "432", "yes", "-"],
        ["head.weight", "4x128", "512", "yes", "256"],
        ["7", "biases", "and", "norms", "46", "no", "-"],
        ["prunable", "998", "-", "378"],
    ]
    assert [(group.pattern, group.num_weights, group.num_kept) for group in plan.groups] == [
        ("features.*", 486, 122),
        ("*", 512, 256),
    ]
    plain = DRIVEPruningCallback(sparsity={"*": 0.5}, rounds=2).plan(Quiet())
    assert str(plain) == str(DRIVEPruningCallback(sparsity=0.5, rounds=2).plan(Quiet()))
    assert plain.groups == ()


def test_attributes() -> None:
    """What was given can be read, also of a copy and of what went through a pickle."""
    callback = GradualPruningCallback(sparsity={"*": 0.5, "a.*": 0.9}, schedule=early, scope="erk")
    for each in (callback, copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert each.sparsity == {"a.*": 0.9, "*": 0.5}
        assert (each.schedule, each.scope) == (early, "erk")


# Resume.


class SaveAll(pl.Callback):
    """Saves after every step."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.global_step}.ckpt")


def run(folder: Path, kind: str, goal: dict[str, Any], ckpt_path: Path | None = None) -> dict[str, Any]:
    """Train from the start, and save everywhere, or from a checkpoint, in which case all else must come from it."""
    module, callback = Equal("adamw"), KINDS[kind](**goal)
    if ckpt_path is not None:
        resumable.forget(module)
    saving = [SaveAll()] if ckpt_path is None else []
    running = fits.trainer(folder, callback, *saving, max_epochs=4, limit_val_batches=0)
    running.fit(module, ckpt_path=ckpt_path)
    assert callback.report is not None
    return {
        "state": fits.state_of(module),
        "optimizer": [dict(state) for state in running.optimizers[0].state.values()],
        "masks": dict(callback.masks),
        "rounds": callback.report.rounds,
    }


class Loader:
    """Three equal batches, so that an epoch that is resumed may begin with the first again."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        return iter([next(iter(fits.loader()))] * 3)


class Equal(Quiet):
    """Trains on equal batches."""

    def train_dataloader(self) -> Loader:
        return Loader()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:In round")
@pytest.mark.parametrize(("kind", "goal"), [("imp", "mapping_erk"), ("gradual", "mapping_erk"), ("gradual", "mapping")])
def test_resume(tmp_path: Path, kind: str, goal: str) -> None:
    """From between any two steps, from other weights: the same weights, momenta, masks and history, bit for bit."""
    whole = run(tmp_path, kind, GOALS[goal])
    steps = range(1, 12) if kind == "gradual" else (1, 3, 4, 6, 8, 9, 11)
    for step in steps:
        path = tmp_path / f"{step}.ckpt"
        assert torch.load(path, weights_only=True)["callbacks"]
        resumed = run(tmp_path, kind, GOALS[goal], path)
        assert [name for name in whole if not fits.equal_states(resumed[name], whole[name])] == [], step


def saved(folder: Path, kind: str, epoch: int, **goal: Any) -> Path:
    fit(folder, Quiet(), KINDS[kind](**goal), fits.SaveEpochs())
    return folder / f"{epoch}.ckpt"


OTHERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "mapping_for_number": (
        {"sparsity": 0.8},
        r"sparsity={'features.0.\*': 0.5, 'features.\*': 0.9, '\*': 0.75}",
        "sparsity=0.8",
    ),
    "another_number": ({"sparsity": {**MAPPING, "*": 0.7}}, r"'\*': 0.75}", r"'\*': 0.7}"),
    "another_order": (
        {"sparsity": {"features.*": 0.9, "features.?.weight": 0.5, "*": 0.75}},
        r"sparsity={'features.0.\*'",
        r"sparsity={'features.\*'",
    ),
    "a_name_for_a_function": ({"schedule": "linear"}, r"schedule=a function \(0.", "schedule='linear'"),
    "another_function": ({"schedule": late}, r"schedule=a function \(0.[35]", r"schedule=a function \(0.0"),
    "scope": ({"scope": "layerwise"}, "scope='erk'", "scope='layerwise'"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("kind", REPEATED)
def test_resume__other_settings_error(tmp_path: Path, kind: str, other: str) -> None:
    """With cuts to come they are refused before the first step; both are in the message."""
    given: dict[str, Any] = {"sparsity": MAPPING, "schedule": early, "scope": "erk"}
    path, module = saved(tmp_path, kind, {"imp": 1, "gradual": 1}[kind], **given), ConvModule()
    changes, before, after = OTHERS[other]
    with pytest.raises(
        ValueError, match=f"with .*{before}.* this .* has .*{after}.*Resume with the settings of the ch"
    ):
        fit(tmp_path, module, KINDS[kind](**{**given, **changes}), ckpt_path=path)
    assert not module.calls


@pytest.mark.parametrize("kind", REPEATED)
def test_resume__the_same_in_other_words(tmp_path: Path, kind: str) -> None:
    """A function of another name that reaches the same, and the rest in another place."""
    path = saved(tmp_path, kind, 1, sparsity=MAPPING, schedule=early, scope="erk")
    again = KINDS[kind](
        sparsity={"*": 0.75, "features.0.*": 0.5, "features.*": 0.9}, schedule=lambda done: early(done), scope="erk"
    )
    fit(tmp_path, Quiet(), again, ckpt_path=path)
    assert again.masks.num_kept == sum(groups_after(kind, {"sparsity": MAPPING, "scope": "erk"})[-1].values())


def test_resume__pruned(tmp_path: Path) -> None:
    """Of a network that is pruned to the end only a warning says that others have no effect."""
    path = saved(tmp_path, "drive", 2, sparsity=MAPPING, schedule=early)
    fit(tmp_path, Quiet(), KINDS["drive"](sparsity=MAPPING, schedule=early), ckpt_path=path)
    rounded = {**MAPPING, "*": 0.7505}
    fit(tmp_path, Quiet(), KINDS["drive"](sparsity=rounded, schedule=early), ckpt_path=path)
    for changes, message in (
        (
            {"sparsity": {**MAPPING, "*": 0.5}},
            r"stays so: `sparsity={'features.0.\*': 0.5, .* '\*': 0.5}` has no effect",
        ),
        ({"sparsity": {"features.*": 0.5}}, r"stays so: `sparsity={'features.\*': 0.5}` has no effect"),
        ({"sparsity": 0.5}, "stays so: `sparsity=0.5` has no effect"),
        ({"schedule": "linear"}, r"with schedule=a function \(.*, 1\) and stays so: `schedule='linear'` has no effect"),
    ):
        callback = KINDS["drive"](**{"sparsity": MAPPING, "schedule": early, **changes})
        with pytest.warns(UserWarning, match=message):
            fit(tmp_path, Quiet(), callback, ckpt_path=path)
        assert [int(mask.sum()) for mask in callback.masks.values()] == [27, 43, 128]


@pytest.mark.parametrize("kind", KINDS)
def test_settings__of_one_number_are_as_ever(tmp_path: Path, kind: str) -> None:
    """In a checkpoint a number and names are what they were, so those of earlier versions go on."""
    callback = KINDS[kind](sparsity=0.8)
    fit(tmp_path, Quiet(), callback)
    settings = callback.state_dict()["settings"]
    schedule = "cubic" if kind == "gradual" else "exponential"
    common = {"sparsity": 0.8, "schedule": schedule, "scope": "global", "control": "none"}
    assert {name: settings[name] for name in common} == common


# What is wrong is said by name before the first step.


def halves(done: float) -> float:
    return done / 2


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"sparsity": {"featurs.*": 0.5, "*": 0.9}}, r"`sparsity` pattern 'featurs.\*' matches no .* mean 'features"),
        ({"sparsity": {"*.bias": 0.5, "*": 0.9}}, "matches only parameters that are not pruned"),
        ({"sparsity": {"features.*": 0.5}}, r"no pattern that matches 'head.weight'. Add '\*' for the rest"),
        ({"sparsity": {"features.*": 0.5, "features.0.*": 0.5, "*": 0}}, r"'features.0.\*' is never used"),
        ({"sparsity": {"head.*": 0.5, "*": 0.9}, "exclude": ["head.*"]}, "only parameters that are not pruned"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_patterns__error(tmp_path: Path, kind: str, goal: dict[str, Any], message: str) -> None:
    module = ConvModule()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, KINDS[kind](**goal))
    assert not module.calls
    with pytest.raises(ValueError, match=message):
        KINDS[kind](**goal).plan(module, max_epochs=4)


@pytest.mark.parametrize(
    ("goal", "error", "message"),
    [
        ({"sparsity": {"*": 90}}, ValueError, r"`sparsity\['\*'\]` .* For 90 % pass 0.9"),
        ({"sparsity": {}}, ValueError, "got an empty mapping"),
        ({"sparsity": {"*": None}}, TypeError, r"`sparsity\['\*'\]` .* must be a number in \[0, 1\), got None"),
        ({"sparsity": 0.5, "schedule": halves}, ValueError, "'halves', .* must end at 1, got 0.5 at 1"),
        ({"sparsity": 0.5, "schedule": lambda *, done: done}, ValueError, "must take it, but raised TypeError"),
        ({"sparsity": 0.5, "schedule": "square"}, ValueError, "'cubic', or a function, got 'square'"),
        ({"sparsity": 0.5, "scope": "erdos"}, ValueError, "'layerwise', 'erk', got 'erdos'"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_goal__error(kind: str, goal: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KINDS[kind](**goal)


def test_function__error_in_a_window_that_the_run_decides(tmp_path: Path) -> None:
    """How many cuts there are is known when training starts; it is still before the first step."""
    module = ConvModule()
    with pytest.raises(ValueError, match=r"'halves', .* must end at 1, got 0.5 at 1"):
        fit(tmp_path, module, GradualPruningCallback(sparsity=0.5, schedule=halves))
    assert not module.calls


class Backbone(Quiet):
    """Has its features under the name that `BackboneFinetuning` knows."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.features
        del self.features

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.backbone(images)))
        return self.head(self.dropout(features.flatten(1)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([value for value in self.parameters() if value.requires_grad], lr=0.05)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen", "ignore:The provided params to be unfrozen")
def test_frozen__at_first(tmp_path: Path) -> None:
    """What is unfrozen before it is pruned has its pattern; without one it is missed when training starts."""
    unfreeze = BackboneFinetuning(1, lambda epoch: 1.0, backbone_initial_lr=0.05)
    callback = DRIVEPruningCallback(sparsity={"backbone.*": 0.75, "*": 0.5}, warmup_epochs=2, rounds=2)
    fit(tmp_path, Backbone(), copy.deepcopy(unfreeze), callback)
    assert callback.masks.num_kept == round(486 * 0.25) + 256
    module, callback = Backbone(), DRIVEPruningCallback(sparsity={"head.*": 0.5}, warmup_epochs=2, rounds=2)
    with pytest.raises(ValueError, match=r"no pattern that matches 'backbone.0.weight', 'backbone.4.weight'"):
        fit(tmp_path, module, copy.deepcopy(unfreeze), callback)


def test_frozen__for_good(tmp_path: Path) -> None:
    """A pattern for it is in vain, and none is not missed."""
    for sparsity in ({"features.*": 0.9, "head.*": 0.5}, {"head.*": 0.5}):
        module, callback = Quiet(), SNIPPruningCallback(sparsity=sparsity)
        module.features.requires_grad_(False)
        fit(tmp_path, module, callback)
        assert {name: int(mask.sum()) for name, mask in callback.masks.items()} == {"head.weight": 256}


# Warnings.


@pytest.mark.parametrize(("kind", "epochs"), [("imp", 4), ("gradual", 4)])
def test_training_that_ends_early(tmp_path: Path, kind: str, epochs: int) -> None:
    """The sparsity that would have been reached is that of all groups together."""

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    overall = 1 - (27 + 43 + 128) / 998
    with pytest.warns(UserWarning, match=f"the network has a sparsity of 0.[0-9]+, not {overall:.6f}"):
        fit(tmp_path, Quiet(), KINDS[kind](sparsity=MAPPING), Stop(), max_epochs=epochs)


def test_cut_off__remedy(tmp_path: Path) -> None:
    """IMP's error proposes another scope only where there is one ranking for all."""
    for goal, proposes in (({"sparsity": 0.998}, True), ({"sparsity": 0.998, "scope": "erk"}, False)):
        with pytest.raises(MisconfigurationException, match="no path from its input to its output") as raised:
            fit(tmp_path, Quiet(), IMPPruningCallback(cycles=1, epochs_per_cycle=1, **goal))  # type: ignore[arg-type]
        assert ("set `scope='layerwise'`" in str(raised.value)) == proposes


def test_quick_check(tmp_path: Path) -> None:
    """`fast_dev_run` has fewer rounds, and prunes to the end all the same."""
    for kind, make in KINDS.items():
        callback, module = make(**GOALS["mapping_erk"]), Quiet()
        trainer = pl.Trainer(fast_dev_run=True, callbacks=[callback], accelerator="cpu", enable_progress_bar=False)
        trainer.fit(module, fits.loader())
        expected = groups_after(kind, GOALS["mapping_erk"])[-1]
        assert {(name,): int(mask.sum()) for name, mask in callback.masks.items()} == expected


def test_modules_own_selection(tmp_path: Path) -> None:
    """Patterns are for what an overridden `prunable_parameters` selects."""

    class Last(SNIPPruningCallback):
        def prunable_parameters(self, pl_module: nn.Module) -> dict[str, nn.Parameter]:
            return {"head.weight": pl_module.get_parameter("head.weight")}

    callback = Last(sparsity={"head.*": 0.75})
    fit(tmp_path, Quiet(), callback)
    assert callback.masks.num_kept == 128
    with pytest.raises(ValueError, match=r"'features.\*' matches only parameters that are not pruned"):
        fit(tmp_path, Quiet(), Last(sparsity={"features.*": 0.5, "*": 0.75}))
