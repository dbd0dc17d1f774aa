"""Whatever is wrong with a state, report or file: it loads, or one error of ours says what is wrong."""

import contextlib
import copy
import functools
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import safetensors.torch
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_drive import Masks, PruningReport, load_sparse, save_sparse
from lightning_drive.command import main
from lightning_drive.export import sparse_files
from lightning_drive.network.rewinding import RewindPoint

MISSING = object()
ODD: list[Any] = [
    *(MISSING, None, [], {}, (), "", "x", -1, 0, 10**30, 10**5000, float("nan"), float("inf"), True, (1,), [None]),
    *({"a": 1}, {("a", 1): 2}, {1: {}}, b"x", torch.ones(2), torch.ones(1).expand(10**12), [[]], ["x"], [10**12]),
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested dictionaries and lists; of a list the first and the last."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*path, key))
    elif isinstance(value, (list, tuple)) and value:
        for index in {0, len(value) - 1}:
            yield from paths(value[index], (*path, index))


def changed(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    """A copy of dictionaries and lists with another value in one place."""
    head, *rest = path
    new = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        new[head] = changed(value[head], tuple(rest), odd)
    elif odd is MISSING:
        del new[head]
    else:
        new[head] = odd
    return new


def renamed(value: Any, path: tuple[Any, ...]) -> Any:
    """A copy with a tuple in place of a name."""
    *rest, name = path
    owner = value
    for key in rest:
        owner = owner[key]
    if not isinstance(owner, dict):
        return changed(value, path, (1, 2))
    new = {("a", 1) if key == name else key: each for key, each in owner.items()}
    return changed(value, tuple(rest), new) if rest else new


def mutations(value: Any) -> Iterator[Any]:
    for path in paths(value):
        yield renamed(value, path)
        for odd in ODD:
            yield changed(value, path, odd)


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
    for odd in mutations(state):
        callback = make()
        total += 1
        try:
            callback.load_state_dict(odd)
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 2000  # noqa: PT017
            assert not callback.pruned
            assert callback.report is None
    assert total > 500
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
    with pytest.raises(ValueError, match="has to return to remembered weights"):
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
    for odd in mutations(report_values):
        total += 1
        try:
            report = PruningReport.from_dict(odd)
        except ValueError:
            refused += 1
        else:
            assert str(report)
            assert report.to_markdown()
            assert json.dumps(report.to_dict())
    assert total > 1000
    assert refused > 0.5 * total


def test_command(report_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0, or 2 and one line, for checkpoints and sparse files alike."""
    state = {"version": 1, "masks": {}, "report": report_values}
    content = {
        "state_dict": {"a": torch.eye(40)},
        "callbacks": {"IMP": state},
        "hyper_parameters": {"width": 3},
        "pytorch-lightning_version": "2.6.0",
        "epoch": 1,
    }
    every = [
        odd
        for path in paths(content)
        if len(path) < 4
        for odd in (renamed(content, path), *(changed(content, path, odd) for odd in ODD))
    ]
    path, small, out = tmp_path / "a.ckpt", tmp_path / "a.small", tmp_path / "out"
    for odd in every:
        torch.save(odd, path)
        for words in (
            ("report", path),
            ("report", path, "--json"),
            ("compress", path, small, "--overwrite"),
            ("report", small),
            ("expand", small, out, "--overwrite"),
        ):
            status = main([str(word) for word in words])
            error = capsys.readouterr().err
            assert (status, len(error.splitlines())) in ((0, 0), (2, 1)), (words, error)


@pytest.mark.skipif(
    not hasattr(torch.serialization, "set_crc32_options"), reason="this torch writes checksums in any case"
)
@pytest.mark.parametrize("has_checksums", [True, False])
def test_checkpoint__with_or_without_checksums(tmp_path: Path, has_checksums: bool) -> None:
    path = tmp_path / "a.ckpt"
    torch.serialization.set_crc32_options(has_checksums)
    torch.save({"state_dict": {"a": 0.7 * torch.ones(50)}}, path)
    torch.serialization.set_crc32_options(True)
    assert main(["report", str(path)]) == 0


def test_checkpoint__every_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit is an error where it is read: in a text by all, in a weight where weights are stored anew."""
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": 0.7 * torch.ones(50)}, "note": "found"}, path)
    whole = path.read_bytes()
    for what, words in (
        (b"found", [["report", path], ["compress", path, tmp_path / "b"]]),
        (torch.tensor(0.7).numpy().tobytes(), [["compress", path, tmp_path / "b"]]),
    ):
        for bit in range(8 * whole.index(what), 8 * (whole.index(what) + 4)):
            wrong = bytearray(whole)
            wrong[bit // 8] ^= 1 << bit % 8
            path.write_bytes(wrong)
            for each in words:
                assert main([str(word) for word in each]) == 2
                assert "damaged" in capsys.readouterr().err


def test_metadata__every_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a new file and of one of the former version, whose only checksum is that of everything."""
    for former in (False, True):
        path = tmp_path / f"{former}"
        with monkeypatch.context() as patch:
            if former:
                patch.setattr(sparse_files, "_digest_of_texts", lambda *_: None)
            save_sparse({"a": torch.eye(30)}, path, metadata={"checkpoint": '{"epoch": 12}'})
        if former:
            with safetensors.safe_open(path, "pt") as file:
                metadata, stored = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            record = json.loads(metadata.pop("lightning_drive"))
            del record["digest_of_texts"]
            record["digest"] = sparse_files._digest(record, metadata, stored)
            safetensors.torch.save_file(stored, path, {**metadata, "lightning_drive": json.dumps(record)})
        assert torch.equal(load_sparse(path)["a"], torch.eye(30))
        assert sparse_files.read_metadata(path) == {"checkpoint": '{"epoch": 12}'}
        whole = path.read_bytes()
        place = whole.index(b"epoch")
        for bit in range(8 * place, 8 * (place + 12)):
            wrong = bytearray(whole)
            wrong[bit // 8] ^= 1 << bit % 8
            path.write_bytes(wrong)
            with pytest.raises(ValueError, match="damaged"):
                sparse_files.read_metadata(path)


@pytest.mark.parametrize("kind", ["pipe", "socket", "/dev/zero", "/dev/null", "dangling"])
def test_no_file(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Never opened: a pipe without a writer, or a device without an end, would never end."""
    path = Path(kind) if kind.startswith("/") else tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    for words in (("report", path), ("compress", path, tmp_path / "out"), ("expand", path, tmp_path / "out")):
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert ("There is no file" if kind == "dangling" else "must be a file, but is a") in error
    for function in (load_sparse, sparse_files.read_metadata, PruningReport.from_checkpoint):
        with pytest.raises((ValueError, FileNotFoundError), match=r"must be a file|There is no file"):
            function(path)


HUGE = {
    "expanded": torch.ones(1).expand(10**12),
    "rows": torch.ones(1, 10).expand(10**11, 10),
    "windows": torch.ones(2 * 10**6).as_strided((10**6, 10**6), (1, 1)),
}


@pytest.mark.parametrize("name", HUGE)
def test_expanded(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError, match=r"'a' claims 1,000,000,000,000 numbers, and has"):
        save_sparse({"a": HUGE[name]}, tmp_path / "out")
    torch.save({"state_dict": {"a": HUGE[name]}}, tmp_path / "a.ckpt")
    assert main(["compress", str(tmp_path / "a.ckpt"), str(tmp_path / "out")]) == 2
    assert main(["report", str(tmp_path / "a.ckpt")]) == (2 if name == "windows" else 0)
    bits = {"shape": [8 * 10**12], "bits": torch.ones(1).byte().expand(10**12)}
    with pytest.raises(ValueError, match="does not hold"):
        Masks.from_state_dict({"version": 1, "masks": {"a": bits}})


def test_replaced_while_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was opened is read to its end; what is written to meanwhile is named."""
    for name, value in (("old", 1.0), ("new", 2.0)):
        save_sparse({"a": value * torch.eye(30)}, tmp_path / name)
    opened, act = safetensors.safe_open, {"do": lambda: (tmp_path / "new").replace(tmp_path / "old")}

    def slowly(*args: Any, **settings: Any) -> Any:
        act.pop("do", lambda: None)()
        return opened(*args, **settings)

    monkeypatch.setattr(safetensors, "safe_open", slowly)
    assert torch.equal(load_sparse(tmp_path / "old")["a"], torch.eye(30))
    assert torch.equal(load_sparse(tmp_path / "old")["a"], 2 * torch.eye(30))
    act["do"] = lambda: (tmp_path / "old").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"was changed while it was read\. Try again"):
        load_sparse(tmp_path / "old")


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
