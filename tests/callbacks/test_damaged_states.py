"""Whatever is wrong with a callback's state in a checkpoint: it loads, or one error of ours says what is wrong."""

import contextlib
import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from odd_values import changed, mutations, paths

from lightning_drive import Masks, PruningReport
from lightning_drive.network.rewinding import RewindPoint


@pytest.fixture(scope="module", params=["DRIVE", "IMP", "IMP in its cycles", "IMP before them"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """What makes a callback, and the state of one that has trained."""
    settings = (
        {"cycles": 4} if "in its" in request.param else {"epochs_per_cycle": 4} if "before" in request.param else {}
    )
    make = fits.CALLBACKS[request.param.split()[0]]
    callback = make(**settings)
    saved: dict[str, Any] = {}

    class Saves(pl.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            saved.update(copy.deepcopy(callback.state_dict()))

    trainer = fits.trainer(tmp_path_factory.mktemp("run"), callback, Saves(), limit_train_batches=1, max_epochs=20)

    class Stops(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    trainer.callbacks.append(Stops())
    with pytest.warns(UserWarning, match="Training ended") if settings else _nothing():
        trainer.fit(fits.ConvModule(), fits.loader())
    return lambda: make(**settings), saved


def _nothing() -> Any:
    return contextlib.nullcontext()


def test_callback_state(made: tuple[Callable[[], Any], dict[str, Any]]) -> None:
    """Each change loads or is a `ValueError`, and then nothing of it was taken."""
    make, state = made
    make().load_state_dict(state)
    refused = total = 0
    for odd in mutations(state, every=3):
        callback = make()
        total += 1
        try:
            callback.load_state_dict(odd)
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 2000  # noqa: PT017
            assert not callback.pruned
            assert callback.report is None
    assert total > 250
    assert refused > 0.3 * total


def test_callback_state__every_bit_of_a_mask(made: tuple[Callable[[], Any], dict[str, Any]]) -> None:
    make, state = made
    for name, packed in state["masks"]["masks"].items():
        for place in range(0, 8 * len(packed["bits"]), 7):
            odd = copy.deepcopy(state)
            odd["masks"]["masks"][name]["bits"][place // 8] ^= 1 << place % 8
            with pytest.raises(ValueError, match=r"mask.*damaged"):
                make().load_state_dict(odd)


def test_callback_state__former_version(made: tuple[Callable[[], Any], dict[str, Any]]) -> None:
    """States without the newer settings load."""
    make, state = made
    kept = {name: value for name, value in state["settings"].items() if "cycle" in name or name == "rewind_epoch"}
    former = {**state, "settings": kept} if kept else {key: state[key] for key in state if key != "settings"}
    callback = make()
    callback.load_state_dict(former)
    assert callback.masks == Masks.from_state_dict(state["masks"])


def test_rewind_point__odd_names() -> None:
    for odd in (None, {}, {"snapshot": {}}, {"snapshot": {(1,): torch.ones(1)}, "optimizers": [], "schedulers": []}):
        with pytest.raises(ValueError, match=r"rewind point|remembered weights"):
            RewindPoint.from_state_dict(odd)  # type: ignore[arg-type]


def test_rewind_point__every_value(made: tuple[Callable[[], Any], dict[str, Any]]) -> None:
    """What optimizers and schedulers hold has no form that could be checked, so it is what was saved, or an error."""
    make, state = made
    if state["start"] is None:
        return
    for path in paths(state["start"]):
        for odd in (None, -1, 10**5000, "x", [None], {("a", 1): 2}, torch.ones(2), 0.123):
            if odd is None and functools.reduce(lambda owner, key: owner[key], path, state["start"]) is None:
                continue  # as it was
            with pytest.raises(ValueError, match=r"rewind point|remembered weights"):
                make().load_state_dict({**state, "start": changed(state["start"], path, odd)})
    nested = functools.reduce(lambda inner, _: [inner], range(5000), [])
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        make().load_state_dict({**state, "start": {**state["start"], "schedulers": [{"x": nested}]}})
    former = {name: value for name, value in state["start"].items() if name != "digest"}
    make().load_state_dict({**state, "start": former})


@pytest.mark.parametrize("make", [fits.CALLBACKS["IMP"], lambda: fits.drive(control="reinit")])
def test_unfinished__nothing_to_return_to(make: Callable[[], Any], made: tuple[Any, dict[str, Any]]) -> None:
    state = {**made[1], "start": None, "unfinished": {}, "settings": {}}
    with pytest.raises(ValueError, match="has to return to stored weights"):
        make().load_state_dict(state)


BN: dict[str, dict[str, Any]] = {
    "other_shape": {"norm": {"running_mean": torch.ones(2)}},
    "missing": {"norm": {}},
    "no_such_layer": {"norms": {"running_mean": torch.ones(8)}},
    "no_batch_norm": {"head": {"running_mean": torch.ones(8)}},
    "new": {"norm": {"a": torch.ones(8)}},
}


@pytest.mark.parametrize("name", BN)
@pytest.mark.parametrize("kind", ["DRIVE", "IMP"])
def test_unfinished__other_statistics(name: str, kind: str, tmp_path: Path) -> None:
    """A commit that a resume has to finish is finished, or is an error that names the layer."""
    trainer = fits.trainer(tmp_path, fits.CALLBACKS[kind](), limit_train_batches=1, max_epochs=3)
    module = fits.ConvModule()
    trainer.fit(module, fits.loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    [state] = content["callbacks"].values()
    [(layer, values)] = BN[name].items()
    whole = dict(module.norm.named_buffers()) if layer == "norm" and values else {}
    state["unfinished"] = {layer: {**whole, **values}}
    torch.save(content, tmp_path / "a.ckpt")
    resumed = fits.trainer(tmp_path, fits.CALLBACKS[kind](), limit_train_batches=1, max_epochs=4)
    with pytest.raises(ValueError, match=f"statistics of the BatchNorm layer '{layer}' .* do not fit the module"):
        resumed.fit(fits.ConvModule(), fits.loader(), ckpt_path=tmp_path / "a.ckpt")


@pytest.fixture(scope="module")
def report_values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    callback = fits.CALLBACKS["IMP"]()
    trainer = fits.trainer(tmp_path_factory.mktemp("run"), callback, limit_train_batches=1, max_epochs=3)
    trainer.fit(fits.ConvModule(), fits.loader())
    assert callback.report is not None
    return callback.report.to_dict()


def test_report(report_values: dict[str, Any]) -> None:
    """What is read can be printed in every form."""
    refused = total = 0
    for odd in mutations(report_values, every=2):
        total += 1
        try:
            report = PruningReport.from_dict(odd)
        except ValueError:
            refused += 1
        else:
            assert str(report)
            assert report.to_markdown()
            assert json.dumps(report.to_dict())
    assert total > 500
    assert refused > 0.5 * total


@pytest.mark.parametrize(
    "other", [{"sparsity": 0.7}, {"schedule": "linear"}, {"scope": "layerwise"}, {"control": "shuffle"}]
)
def test_imp__settings_in_the_cycles(other: dict[str, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cycles": 3, "epochs_per_cycle": 1}
    callback = fits.CALLBACKS["IMP"](**settings)
    trainer = fits.trainer(tmp_path, callback, limit_train_batches=1, max_epochs=5, max_steps=2)
    state = None
    try:
        trainer.fit(fits.ConvModule(), fits.loader())
    except MisconfigurationException:
        state = callback.state_dict()
    state = state or callback.state_dict()
    with pytest.raises(ValueError, match=f"{next(iter(other))}=.*{next(iter(other))}=.*Resume with the settings"):
        fits.CALLBACKS["IMP"](**settings, **other).load_state_dict(state)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"schedule": "linear"}, "with schedule='exponential' and stays so: `schedule='linear'` has no effect"),
        ({"scope": "layerwise"}, "with scope='global' and stays so: `scope='layerwise'` has no effect"),
        ({"exclude": ["head.*"]}, r"stays so: `exclude=\['head.\*'\]` would select other parameters"),
        ({"include": ["features.*"]}, r"stays so: `include=\['features.\*'\]` would select other parameters"),
        ({"include": ["features.*", "head.weight"]}, None),
    ],
)
def test_resume__other_settings(other: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    def fit(epochs: int, ckpt_path: Any = None, **settings: Any) -> Any:
        trainer = fits.trainer(tmp_path, fits.drive(**settings), limit_train_batches=1, max_epochs=epochs)
        trainer.fit(fits.ConvModule(), fits.loader(), ckpt_path=ckpt_path)
        return trainer

    fit(3).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=message) if message else _nothing():
        resumed = fit(4, tmp_path / "a.ckpt", **other)
    resumed.save_checkpoint(tmp_path / "b.ckpt")  # which still says how it was pruned
    with pytest.warns(UserWarning, match=message) if message else _nothing():
        fit(5, tmp_path / "b.ckpt", **other)


@pytest.mark.parametrize("other", [{"exclude": ["head.*"]}, {"include": ["features.*"]}, {"include": ["*.weight"]}])
def test_imp__other_selection_in_the_cycles(other: dict[str, Any], tmp_path: Path) -> None:
    """Other patterns are refused where they select other parameters, and go on where they do not."""
    settings: dict[str, Any] = {"cycles": 2, "epochs_per_cycle": 2}
    every = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)

    def fit(*callbacks: pl.Callback, ckpt_path: Any = None) -> None:
        trainer = fits.trainer(tmp_path, *callbacks, limit_train_batches=1, max_epochs=5)
        trainer.fit(fits.ConvModule(), fits.loader(), ckpt_path=ckpt_path)

    fit(fits.CALLBACKS["IMP"](**settings), every)
    path = tmp_path / "epoch=2.ckpt"
    content = torch.load(path, weights_only=True)
    content["callbacks"] = {name: state for name, state in content["callbacks"].items() if "IMP" in name}
    torch.save(content, path)
    resumed = fits.CALLBACKS["IMP"](**settings, **other)
    if other == {"include": ["*.weight"]}:
        fit(resumed, ckpt_path=path)
        assert resumed.cycle == 2
    else:
        with pytest.raises(MisconfigurationException, match="prunes other parameters than"):
            fit(resumed, ckpt_path=path)
