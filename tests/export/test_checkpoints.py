"""A checkpoint is read without running code in it, or is an error in one line."""

import argparse
import errno
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import numpy as np
import pytest
import safetensors.torch
import torch
from odd_values import mutations

from lightning_drive.command import main
from lightning_drive.export import checkpoints

CONTENT = {"state_dict": {"weight": torch.arange(300.0)}, "callbacks": {}, "epoch": 3, "labels": ("cat", 1.5)}


def saved(folder: Path, content: object, name: str = "bad.ckpt", **kwargs: Any) -> Path:
    torch.save(content, folder / name, **kwargs)
    return folder / name


def written(folder: Path, content: bytes) -> Path:
    (folder / "bad.ckpt").write_bytes(content)
    return folder / "bad.ckpt"


def cut(folder: Path, size: int, zipped: bool = True) -> Path:
    whole = saved(folder, CONTENT, _use_new_zipfile_serialization=zipped).read_bytes()
    assert len(whole) > abs(size)
    return written(folder, whole[:size])


def sharded(folder: Path) -> Path:
    (folder / "shards").mkdir()
    saved(folder / "shards", {"callbacks": {}, "epoch": 3}, "meta.pt")
    return folder / "shards"


def safetensors_file(folder: Path) -> Path:
    safetensors.torch.save_file({"weight": torch.ones(3)}, folder / "bad.ckpt")
    return folder / "bad.ckpt"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("needs_weights", [True, False])
def test_load(needs_weights: bool, zipped: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, CONTENT, _use_new_zipfile_serialization=zipped)
    for each in (path, str(path)):
        found = checkpoints.load(each, needs_weights=needs_weights)
        assert torch.equal(found.pop("state_dict")["weight"], CONTENT["state_dict"]["weight"])  # type: ignore[index]
        assert found == {key: value for key, value in CONTENT.items() if key != "state_dict"}


def test_load__sharded(tmp_path: Path) -> None:
    assert checkpoints.load(sharded(tmp_path), needs_weights=False) == {"callbacks": {}, "epoch": 3}


DAMAGED = "is not a file that `torch.save` wrote, or it is damaged or cut off"


WRONG: dict[str, tuple[Callable[[Path], Path], type[Exception], str]] = {
    "missing": (lambda folder: folder / "missing", FileNotFoundError, "There is no file"),
    "folder": (lambda folder: folder, ValueError, "is a folder, not a checkpoint. Name a file in it"),
    "sharded": (
        sharded,
        ValueError,
        r"is a sharded checkpoint.* `python -m .*consolidate_checkpoint .*shards`",
    ),
    "empty": (lambda folder: written(folder, b""), ValueError, DAMAGED),
    "text": (lambda folder: written(folder, b"text\n" * 9), ValueError, DAMAGED),
    "zip_of_others": (lambda folder: written(folder, b"PK\5\6" + bytes(18)), ValueError, DAMAGED),
    "cut_at_its_end": (lambda folder: cut(folder, -100), ValueError, DAMAGED),
    "cut_in_the_middle": (lambda folder: cut(folder, 1000), ValueError, DAMAGED),
    "cut_at_its_beginning": (lambda folder: cut(folder, 20), ValueError, DAMAGED),
    "legacy_cut": (lambda folder: cut(folder, -100, zipped=False), ValueError, DAMAGED),
    "legacy_cut_early": (lambda folder: cut(folder, 60, zipped=False), ValueError, DAMAGED),
    "safetensors": (safetensors_file, ValueError, "seems to be a safetensors file.*by `lightning-drive expand`"),
    "list": (lambda folder: saved(folder, [1]), ValueError, "is not a checkpoint: it holds a list, not a dictionary"),
    "tensor": (lambda folder: saved(folder, torch.ones(1)), ValueError, "is not a checkpoint: it holds a Tensor"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_load__cut_anywhere(zipped: bool, tmp_path: Path) -> None:
    """Whatever byte it ends at, it is said to be cut off: torch raises errors of eight kinds there."""
    content = {"state_dict": {f"{layer}.weight": torch.ones(20, 20) for layer in range(4)}}
    whole = saved(tmp_path, content, _use_new_zipfile_serialization=zipped).read_bytes()
    kinds = set()
    for size in [*range(0, len(whole), 61), *(range(100, 400) if not zipped else ())]:
        path = written(tmp_path, whole[:size])
        with pytest.raises(ValueError, match=rf"bad\.ckpt' {DAMAGED}") as raised:
            checkpoints.load(path)
        kinds.add(type(raised.value.__cause__))
    assert OSError in kinds or not zipped


def without(folder: Path, name: str) -> Path:
    """Return a checkpoint whose zip file lacks an entry."""
    path = saved(folder, CONTENT)
    with zipfile.ZipFile(path) as whole:
        parts = {part: whole.read(part) for part in whole.namelist() if not part.endswith(name)}
        assert len(parts) == len(whole.namelist()) - 1
    with zipfile.ZipFile(path, "w") as less:
        for part, value in parts.items():
            less.writestr(part, value)
    return path


@pytest.mark.parametrize("needs_weights", [True, False])
@pytest.mark.parametrize("name", ["/data.pkl", "/data/0", "/version"])
def test_load__entry_missing(name: str, needs_weights: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"bad\.ckpt' {DAMAGED}"):
        checkpoints.load(without(tmp_path, name), needs_weights=needs_weights)


@pytest.mark.parametrize("name", WRONG)
def test_load__error(name: str, tmp_path: Path) -> None:
    make, kind, message = WRONG[name]
    path = make(tmp_path)
    with pytest.raises(kind, match=message) as raised:
        checkpoints.load(path)
    assert repr(str(path)) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_load__any_damage(tmp_path: Path) -> None:
    """Whatever single byte of the pickle is another one, it is a checkpoint still or an error of ours."""
    whole = saved(tmp_path, CONTENT, _use_new_zipfile_serialization=False).read_bytes()
    errors = 0
    for place in range(0, 400, 3):
        path = written(tmp_path, whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            assert isinstance(checkpoints.load(path), dict)
        except ValueError as error:
            errors += str(error).startswith(repr(str(path)))
    assert errors > 50


def test_load__error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for damage, and names the file."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("not allowed")

    path = saved(tmp_path, CONTENT)
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(OSError, match=r"bad\.ckpt' cannot be read: not allowed\."):
        checkpoints.load(path)


def test_load__error_of_the_disk_within_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one that comes again where the file is read once more."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    class Opened(io.BytesIO):
        read = fail

    path = saved(tmp_path, CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        with pytest.raises(ValueError, match=DAMAGED):  # torch found something wrong, and the disk gives every byte
            checkpoints.load(path)
        sound = Path.open

        def opened(file: Path, *args: Any) -> Any:
            return sound(file, *args) if file == path else Opened()  # what is held open is read by another path

        patch.setattr(Path, "open", opened)
        with pytest.raises(OSError, match=r"bad\.ckpt' cannot be read: .*Input/output error\."):
            checkpoints.load(path)


class Payload:
    """Leaves a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("needs_weights", [True, False])
def test_load__runs_no_code(needs_weights: bool, zipped: bool, tmp_path: Path) -> None:
    """The error says what is in the file, and how to take the risk; and the payload works."""
    content, trace = {"hyper_parameters": Payload(tmp_path / "trace")}, tmp_path / "trace"
    path = saved(tmp_path, content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"holds a (posix|nt)\.mkdir, and loading that could run any code") as raised:
        checkpoints.load(path, needs_weights=needs_weights)
    assert f"`torch.load({str(path)!r}, weights_only=False)`" in str(raised.value)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.is_dir()


def test_load__runs_no_code_of_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    saved(folder, {"epoch": Payload(tmp_path / "trace")}, "meta.pt")
    with pytest.raises(ValueError, match=r"\.mkdir, and loading that could run any code"):
        checkpoints.load(folder, needs_weights=False)
    assert not (tmp_path / "trace").exists()


class Own:
    """A class of the user's."""


def test_load__unknown_class(tmp_path: Path) -> None:
    """Whether it can be imported or not."""
    path = saved(tmp_path, {"hyper_parameters": Own()})
    with pytest.raises(ValueError, match=r"holds a [\w.]*test_checkpoints\.Own, and loading that could run any code"):
        checkpoints.load(path)
    legacy = saved(tmp_path, {"hyper_parameters": Own()}, _use_new_zipfile_serialization=False).read_bytes()
    assert legacy.count(b"Own") == 1
    with pytest.raises(ValueError, match=r"\.Gun, and loading that could run any code"):
        checkpoints.load(written(tmp_path, legacy.replace(b"Own", b"Gun")))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("value", [Path("data"), argparse.Namespace(lr=0.1), np.float64(0.5)], ids=repr)
def test_load__trusted(value: Any, zipped: bool, tmp_path: Path) -> None:
    """Refused with a way to load it, which works."""
    path = saved(tmp_path, {"hyper_parameters": {"it": value}}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"so it was not loaded\..* with `--trust-pickle`"):
        checkpoints.load(path)
    assert checkpoints.load(path, weights_only=False) == {"hyper_parameters": {"it": value}}


def test_load__trusted_but_unknown(tmp_path: Path) -> None:
    legacy = saved(tmp_path, {"it": Own()}, _use_new_zipfile_serialization=False).read_bytes()
    for other in (b"Gun", b"owN"):
        path = written(tmp_path, legacy.replace(b"Own", other))
        with pytest.raises(ValueError, match=rf"cannot be imported here: .*{other.decode()}") as raised:
            checkpoints.load(path, weights_only=False)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=DAMAGED):
        checkpoints.load(cut(tmp_path, -100), weights_only=False)


def state(report: object) -> dict[str, Any]:
    return {"version": 1, "masks": {}, "report": report}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param({}, ("", None), id="nothing"),
        pytest.param({"callbacks": None}, ("", None), id="weights_only"),
        pytest.param({"callbacks": {"Timer": {"report": 1}, "Other": None, 3: 4}}, ("", None), id="others"),
        pytest.param({"callbacks": {"Drive{'every': 1}": state(None)}}, ("Drive", None), id="not_yet"),
        pytest.param({"callbacks": {"A": state(None), "B": state({"x": 1})}}, ("B", {"x": 1}), id="the_second"),
        pytest.param({"lightning_drive": {"callback": "A", "report": {"x": 1}}}, ("A", {"x": 1}), id="expanded"),
        pytest.param({"lightning_drive": 7}, ("", None), id="no_dictionary"),
    ],
)
def test_pruning_in(content: dict[str, Any], expected: tuple[str, Any]) -> None:
    assert checkpoints.pruning_in(content) == expected


@pytest.fixture(scope="module")
def report_values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    callback = fits.CALLBACKS["IMP"]()
    trainer = fits.trainer(tmp_path_factory.mktemp("run"), callback, limit_train_batches=1, max_epochs=3)
    trainer.fit(fits.ConvModule(), fits.loader())
    assert callback.report is not None
    return callback.report.to_dict()


def test_load__odd_content(report_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0, or 2 and one line, for checkpoints and sparse files alike."""
    state = {"version": 1, "masks": {}, "report": report_values}
    content = {
        "state_dict": {"a": torch.eye(40)},
        "callbacks": {"IMP": state},
        "hyper_parameters": {"width": 3},
        "pytorch-lightning_version": "2.6.0",
        "epoch": 1,
    }
    path, small, out = tmp_path / "a.ckpt", tmp_path / "a.small", tmp_path / "out"
    for odd in mutations(content, deepest=3, every=3):
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
    try:
        torch.save({"state_dict": {"a": 0.7 * torch.ones(50)}}, path)
    finally:
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
