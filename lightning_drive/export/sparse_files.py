"""Sparse files: a pruned ``state_dict`` on disk, as the bits of its masks and the values that are left.

A sparse file is a safetensors file. A tensor ``NAME`` that is smaller so is stored as ``NAME.bits`` (see
:func:`lightning_drive.masking.pack`) and ``NAME.values``; all others are stored as they are. Which is which, and a
checksum, is in the file's metadata. Nothing in it is ever unpickled.
"""

import hashlib
import json
import os
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.core import saved_values, shards, tensor_kinds
from lightning_drive.core.bits import INTEGERS, pack, unpack
from lightning_drive.core.messages import listed
from lightning_drive.export import reading

_VERSION = 1

_KEY = "lightning_drive"
"""Our own entry in the file's metadata."""

_EXTRA_HEADER = 256
"""Bytes, about, by which the header is longer for two tensors in place of one."""

_MOST_DIMENSIONS = 64
"""Of a sparse tensor: more than torch can compute with."""

_INTEGERS = {**INTEGERS, 16: torch.int64}
"""Bytes of a number to the integers that it is copied as."""

_NATIVE = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
"""What every version of safetensors can store."""

_AS_BYTES = (
    *("complex128", "complex64", "complex32", "uint64", "uint32", "uint16"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
"""What is stored as plain bytes, with its name in the metadata."""


def save_sparse(
    module_or_state_dict: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save a pruned network in a file that is smaller for its zeros. Needs safetensors.

    No masks are needed: whichever tensor has enough zeros is stored as one bit per number and the numbers that are
    left. What is zero is decided by the bits of a number, so -0.0 is a value like any other. The file is written
    beside its place and then moved there: it is there as a whole or not at all.

    Args:
        module_or_state_dict: A module, or its ``state_dict()``; on any device, with numbers of any kind.
        path: Where to; a file that is there is replaced.
        metadata: Any texts to store with it; :func:`read_metadata` gives them back.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
        TypeError: If something is no tensor with memory of its own, such as extra state or a shard (named).
        ValueError: If a name cannot be used (named).

    """
    library = _library("save_sparse")
    values = module_or_state_dict
    state_dict = values.state_dict() if isinstance(values, nn.Module) else values
    metadata = _checked_metadata(metadata or {})
    record: dict[str, Any] = {"version": _VERSION, "tensors": {}, "versions": _versions(state_dict)}
    tensors = {name: _checked(name, value) for name, value in state_dict.items()}
    stored: dict[str, Tensor] = {}
    owners: dict[object, str] = {}
    for name, tensor in tensors.items():
        owner = owners.setdefault(_memory(tensor), name) if tensor.numel() else name
        if owner == name:
            parts, record["tensors"][name] = _stored(name, tensor, tensors)
            stored.update(parts)
        else:
            record["tensors"][name] = {"stored": "tied", "to": owner}
    record["digest_of_texts"] = _digest_of_texts(record, metadata)
    record["digest"] = _digest(record, metadata, stored)
    with replacing(path) as temporary:
        try:
            library.torch.save_file(_apart(stored), temporary, {**metadata, _KEY: _json(record)})
        except library.SafetensorError as error:
            raise OSError(f"{str(path)!r} could not be written: {error}.") from error


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
    """Load what :func:`load_sparse` and :func:`read_metadata` give, out of one and the same file.

    Args:
        path: The file; errors are those of :func:`load_sparse`.

    """
    record, metadata, stored = _read(path)
    state_dict: OrderedDict[str, Tensor] = OrderedDict()
    for name, entry in record["tensors"].items():
        if entry["stored"] == "tied":
            if not isinstance(entry.get("to"), str) or entry["to"] not in state_dict:
                raise _damaged(path, f"{name!r} is tied to a tensor that does not come before it")
            state_dict[name] = state_dict[entry["to"]]
        else:
            try:
                state_dict[name] = _dense(name, entry, stored)
            except _DamagedError as error:
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


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file beside its place, and move it there when it is complete.

    Args:
        path: The file to write or replace. Its permissions stay as they are; those of a new one are the usual ones.

    Yields:
        The file to write to. If that fails, it is removed.

    Raises:
        FileNotFoundError: If the folder is missing.
        ValueError: If there is something else than a file at that place.

    """
    target = Path(os.path.realpath(path))  # a link stays one
    if target.exists() and not target.is_file():
        raise ValueError(f"{str(path)!r} must be a file, but is a folder or a device. Give another name.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(target.parent)!r} to write a file in. Make it first.")
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    temporary.open("xb").close()
    mode = (target if target.exists() else temporary).stat().st_mode  # safetensors makes files private
    try:
        yield temporary
        temporary.chmod(mode)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# What a tensor is in the file, and back.


def _stored(name: str, tensor: Tensor, taken: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give the tensors to write for a tensor, and the entry that says what they are."""
    entry: dict[str, Any] = {}
    if _name(tensor.dtype) in _AS_BYTES:
        entry = {"dtype": _name(tensor.dtype), "shape": list(tensor.shape)}
    given = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg().cpu().contiguous()
    flat = given.as_strided((given.numel(),), (1,))  # one number is contiguous whatever its strides are
    whole = flat.view(given.shape)
    words = _words(flat)
    kept = words.ne(0).any(1)
    keys = _keys(name)
    size = (len(flat) + 7) // 8 + int(kept.count_nonzero()) * flat.itemsize + _EXTRA_HEADER
    if size >= flat.nbytes or whole.ndim > _MOST_DIMENSIONS or any(key in taken for key in keys):
        return {name: _bytes(whole) if entry else whole}, {**entry, "stored": "whole"}
    values = words[kept].view(-1).view(tensor.dtype)
    parts = dict(zip(keys, (pack(kept), _bytes(values) if entry else values), strict=True))
    return parts, {**entry, "shape": list(tensor.shape), "stored": "sparse"}


def _dense(name: str, entry: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    """Give the tensor that :func:`_stored` took apart, in memory of its own."""
    if entry["stored"] == "whole":
        whole = stored[name].clone()
        if "dtype" not in entry:
            return whole
        shape, values = _shape(entry), _of_dtype(whole, entry)
        if len(values) != prod(shape):
            raise _DamagedError(f"has {len(values):,} numbers, but its shape {shape} has {prod(shape):,}")
        return values.view(shape)
    shape = _shape(entry)
    bits, values = (stored[key] for key in _keys(name))
    number = prod(shape[: _MOST_DIMENSIONS + 1])
    if not number or len(shape) > _MOST_DIMENSIONS:
        raise _DamagedError("has a shape that no sparse tensor has")
    if bits.dtype != torch.uint8 or bits.shape != ((number + 7) // 8,) or values.ndim != 1:
        raise _DamagedError(f"has bits or values that do not fit its shape {shape}")
    if "dtype" in entry:
        values = _of_dtype(values.clone(), entry)
    kept = unpack(bits, [8 * len(bits)])
    if kept[number:].any():
        raise _DamagedError(f"has bits set behind the {number:,} that it should have")
    if int(kept.count_nonzero()) != len(values):
        raise _DamagedError(f"has {int(kept.count_nonzero()):,} bits set, but {len(values):,} values")
    words = _words(values)
    whole = words.new_zeros(number, words.shape[1])
    whole[kept[:number]] = words
    return whole.view(-1).view(values.dtype).view(shape)


class _DamagedError(Exception):
    """What is wrong with a tensor of a file."""


def _words(flat: Tensor) -> Tensor:
    """See numbers as rows of integers, which tell -0.0 from 0.0 and keep the bits of NaN."""
    return flat.view(_INTEGERS[flat.itemsize]).view(len(flat), max(1, flat.itemsize // 8))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _of_dtype(tensor: Tensor, entry: Mapping[str, Any]) -> Tensor:
    name = entry["dtype"]
    dtype = getattr(torch, name, None) if name in _AS_BYTES else None
    if dtype is None:
        raise _DamagedError(f"has numbers of the unknown kind {name!r}")
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or len(tensor) % dtype.itemsize:
        raise _DamagedError(f"has bytes that are no whole numbers of {name}")
    return tensor.view(dtype)


def _shape(entry: Mapping[str, Any]) -> list[int]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise _DamagedError("has no valid shape")
    return shape


def _keys(name: str) -> tuple[str, str]:
    return f"{name}.bits", f"{name}.values"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# What is refused, and what is in the file beside tensors.


def _checked(name: object, value: object) -> Tensor:
    """Give a tensor whose memory can be written down."""
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"A name in the `state_dict` must be a text other than '__metadata__', got {name!r}.")
    reason = ""
    if not isinstance(value, Tensor):
        reason = f"is of type {type(value).__name__}, and only tensors can be stored. Take it out of the `state_dict`"
    elif shards.is_sharded(value):
        reason = (
            "is split over ranks. Gather it first: `torch.distributed.checkpoint.state_dict.get_model_state_dict` with"
            " `StateDictOptions(full_state_dict=True)`"
        )
    elif torch.nn.parameter.is_lazy(value):
        reason = "has no shape yet. Let the module see a batch first"
    elif value.is_meta:
        reason = "is on the meta device and has no values. Load the weights first"
    elif value.layout != torch.strided:
        reason = f"has the layout {value.layout}. Make it dense with `to_dense()`"
    elif value.is_nested:
        reason = "is a nested tensor. Make it one tensor with `to_padded_tensor`, or several"
    elif not tensor_kinds.is_plain(value) or _name(value.dtype) not in _NATIVE + _AS_BYTES:
        reason = f"is a {type(value).__name__} of {value.dtype}, which cannot be stored. Convert it first"
    elif not saved_values.has_memory(value):
        reason = (
            f"claims {value.numel():,} numbers, and has {value.untyped_storage().nbytes():,} bytes in memory. Store the"
            " tensor that it was expanded from"
        )
    if reason or not isinstance(value, Tensor):
        raise TypeError(f"{name!r} {reason}.")
    return value


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    wrong = [key for key, text in metadata.items() if not isinstance(key, str) or not isinstance(text, str)]
    if wrong:
        raise TypeError(f"`metadata` must be texts by name, but {listed(map(repr, wrong))} is not.")
    if _KEY in metadata:
        raise ValueError(f"`metadata` may not have the key {_KEY!r}: that is where the file describes itself.")
    return dict(metadata)


def _memory(tensor: Tensor) -> object:
    """Tell tensors that are one and the same in memory from all others."""
    strides = tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr(), strides


def _apart(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy what shares memory, such as a row of another tensor: safetensors refuses it."""
    seen: set[int] = set()
    apart = {}
    for key, tensor in stored.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart


def _versions(state_dict: Mapping[str, Any]) -> dict[str, int] | None:
    """Give the version of each module, by which some modules know how to read an old ``state_dict``."""
    found = getattr(state_dict, "_metadata", None)
    if not isinstance(found, dict):
        return None
    versions = {name: each.get("version") for name, each in found.items()}
    return {name: version for name, version in versions.items() if type(version) is int}


def _digest(record: Mapping[str, Any], metadata: Mapping[str, str], stored: Mapping[str, Tensor]) -> str:
    """Give a SHA-256 of all that is in the file."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    digest = hashlib.sha256(_json([rest, sorted(metadata.items())]).encode())
    for key in sorted(stored):
        digest.update(_json([key, _name(stored[key].dtype), list(stored[key].shape)]).encode())
        digest.update(_bytes(stored[key]).numpy().data)
    return digest.hexdigest()


def _digest_of_texts(record: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Give a SHA-256 of all that is in the file beside the tensors."""
    rest = {key: value for key, value in record.items() if key not in ("digest", "digest_of_texts")}
    return hashlib.sha256(_json([rest, sorted(metadata.items())]).encode()).hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


# Reading.


def _read(path: str | Path, *, with_tensors: bool = True) -> tuple[dict[str, Any], dict[str, str], dict[str, Tensor]]:
    """Give what a file says of itself, the user's metadata and the stored tensors; their names fit together."""
    library = _library("load_sparse")
    reading.check(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    with reading.held(path) as same:
        return _read_held(path, same, library, with_tensors=with_tensors)


def _read_held(
    path: str | Path, same: str, library: Any, *, with_tensors: bool
) -> tuple[dict[str, Any], dict[str, str], dict[str, Tensor]]:
    try:
        with library.safe_open(same, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            record = _record(path, metadata.pop(_KEY, None))
            keys = set(file.keys())
            has_own = "digest_of_texts" in record  # former files have a checksum of everything only
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
        expected.update({"whole": (name,), "sparse": _keys(name), "tied": ()}[kind])
    if expected != keys:
        raise _damaged(path, f"it should have other tensors: {listed(sorted(expected ^ keys))}")
    if with_tensors or not has_own:
        is_whole = record.get("digest") == _digest(record, metadata, stored)
    else:
        is_whole = record["digest_of_texts"] == _digest_of_texts(record, metadata)
    if not is_whole:
        raise _damaged(path, "its content does not have the checksum that was written with it")
    return record, metadata, stored


def _record(path: str | Path, text: str | None) -> dict[str, Any]:
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
        raise _damaged(path, "what it says of itself cannot be read")
    if record.get("version") != _VERSION:
        raise ValueError(
            f"{str(path)!r} has version {record.get('version')}, but this lightning_drive reads version {_VERSION}."
        )
    return record


def _damaged(path: str | Path, reason: str) -> ValueError:
    return ValueError(f"{str(path)!r} is damaged: {reason}. Copy it again from where it came from, or save it anew.")


def _library(function: str) -> Any:
    """Import safetensors, which not everybody needs."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"`{function}` needs safetensors: `pip install safetensors`.") from error
    return safetensors
