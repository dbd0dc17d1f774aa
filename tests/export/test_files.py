"""A file is written as a whole or not at all, and read as one, whatever happens to it meanwhile."""

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lightning_drive import PruningReport, load_sparse, save_sparse
from lightning_drive.command import main
from lightning_drive.export import sparse_reader


@pytest.mark.parametrize("error", [KeyboardInterrupt, safetensors.SafetensorError], ids=lambda error: error.__name__)
def test_save_sparse__interrupted(error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays, and nothing else is left."""
    save_sparse({"old": torch.ones(3)}, tmp_path / "file")

    def stop(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise error("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", stop)
    with pytest.raises(OSError if error is safetensors.SafetensorError else error, match="disk full"):
        save_sparse({"new": torch.ones(3)}, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert load_sparse(tmp_path / "file").keys() == {"old"}


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of another kind")
def test_save_sparse__permissions_and_links(tmp_path: Path) -> None:
    """As of any new file; those of a file that is replaced stay, and so does a link to it."""

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    (tmp_path / "usual").touch()
    save_sparse({}, tmp_path / "new")
    assert mode(tmp_path / "new") == mode(tmp_path / "usual")
    (tmp_path / "usual").chmod(0o640)
    (tmp_path / "link").symlink_to(tmp_path / "usual")
    save_sparse({"a": torch.ones(1)}, tmp_path / "link")
    assert mode(tmp_path / "usual") == 0o640
    assert (tmp_path / "link").is_symlink()
    assert load_sparse(tmp_path / "usual").keys() == {"a"}


def test_save_sparse__nowhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a file, but is a folder or a device"):
        save_sparse({}, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no folder '.*nowhere' to write a file in"):
        save_sparse({}, tmp_path / "nowhere" / "file")


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
    for function in (load_sparse, sparse_reader.read_metadata, PruningReport.from_checkpoint):
        with pytest.raises((ValueError, FileNotFoundError), match=r"must be a file|There is no file"):
            function(path)


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
