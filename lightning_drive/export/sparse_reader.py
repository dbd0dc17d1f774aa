"""Read a sparse file: its ``state_dict``, to the bit, and the texts that were stored with it."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_drive.core.messages import listed
from lightning_drive.export import files, sparse_format


def load_sparse(path: str | Path) -> dict[str, Tensor]:
    """Load what :func:`save_sparse` saved, to the bit. Needs safetensors.

    Tensors that shared all of their memory, such as tied weights, do so again: one tensor stands under all their
    names. Tensors that shared some of it are apart. A module's ``load_state_dict`` copies either.

    Args:
        path: The file.

    Returns:
        A plain ``state_dict``, dense, on the CPU, in its old order.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If safetensors is not installed.
        ValueError: If it is another kind of file, is damaged or cut off, or was written by a newer version.

    """
    return load_with_metadata(path)[0]


def load_with_metadata(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what :func:`load_sparse` and :func:`read_metadata` return, out of one and the same file."""
    record, metadata, stored = _read(path)
    state_dict: OrderedDict[str, Tensor] = OrderedDict()
    for name, entry in record["tensors"].items():
        if entry["stored"] == "tied":
            if not isinstance(entry.get("to"), str) or entry["to"] not in state_dict:
                raise _damaged(path, f"{name!r} is tied to a tensor that does not come before it")
            state_dict[name] = state_dict[entry["to"]]
        else:
            try:
                state_dict[name] = sparse_format.dense(name, entry, stored)
            except sparse_format.DamagedError as error:
                raise _damaged(path, f"{name!r} {error}") from None
    versions = record.get("versions")
    if isinstance(versions, dict) and all(type(version) is int for version in versions.values()):
        # As `nn.Module.state_dict` does it:
        state_dict._metadata = {name: {"version": version} for name, version in versions.items()}  # type: ignore[attr-defined]
    elif versions is not None:
        raise _damaged(path, "the versions of its modules are no numbers")
    return state_dict, metadata


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the texts that were given to :func:`save_sparse`. Needs safetensors.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If safetensors is not installed.
        ValueError: If it is another kind of file, is damaged or cut off, or was written by a newer version.

    """
    return _read(path, with_tensors=False)[1]


def _read(path: str | Path, *, with_tensors: bool = True) -> tuple[dict[str, Any], dict[str, str], dict[str, Tensor]]:
    """Return a file's record, the user's metadata and the stored tensors; their names fit together."""
    library = sparse_format.library("load_sparse")
    files.check(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    with files.held(path) as same:
        return _read_held(path, same, library, with_tensors=with_tensors)


def _read_held(
    path: str | Path, same: str, library: Any, *, with_tensors: bool
) -> tuple[dict[str, Any], dict[str, str], dict[str, Tensor]]:
    try:
        with library.safe_open(same, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            record = _record(path, metadata.pop(sparse_format.KEY, None))
            keys = set(file.keys())
            has_own = "digest_of_texts" in record  # older files only have a checksum of everything
            stored = {key: file.get_tensor(key) for key in keys} if with_tensors or not has_own else {}
    except (library.SafetensorError, TypeError, RuntimeError) as error:  # the latter of shapes that torch cannot have
        raise ValueError(
            f"{str(path)!r} is not a file that `save_sparse` wrote, or it is damaged or cut off: {error}."
        ) from error
    expected: set[str] = set()
    for name, entry in record["tensors"].items():
        kind = entry.get("stored") if isinstance(entry, dict) else None
        if kind not in ("whole", "sparse", "tied"):
            raise _damaged(path, f"it does not say how {name!r} is stored")
        expected.update({"whole": (name,), "sparse": sparse_format.keys_of(name), "tied": ()}[kind])
    if expected != keys:
        raise _damaged(path, f"it should have other tensors: {listed(sorted(expected ^ keys))}")
    if with_tensors or not has_own:
        is_whole = record.get("digest") == sparse_format.digest_of(record, metadata, stored)
    else:
        is_whole = record["digest_of_texts"] == sparse_format.digest_of_texts(record, metadata)
    if not is_whole:
        raise _damaged(path, "its content does not have the checksum that was written with it")
    return record, metadata, stored


def _record(path: str | Path, text: str | None) -> dict[str, Any]:
    """Parse the record, which says how each tensor is stored. Raise if it is no record, or of another version."""
    if text is None:
        raise ValueError(
            f"{str(path)!r} is a safetensors file, but not one that `save_sparse` wrote. Read it with"
            " `safetensors.torch.load_file`."
        )
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("tensors"), dict):
        raise _damaged(path, "its description of itself cannot be read")
    if record.get("version") != sparse_format.VERSION:
        raise ValueError(
            f"{str(path)!r} has version {record.get('version')}, but this lightning_drive reads version"
            f" {sparse_format.VERSION}."
        )
    return record


def _damaged(path: str | Path, reason: str) -> ValueError:
    return ValueError(f"{str(path)!r} is damaged: {reason}. Copy it again from its source, or save it again.")
