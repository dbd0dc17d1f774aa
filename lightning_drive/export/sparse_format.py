"""The form of a sparse file: how each tensor is stored in it, and its checksums.

A sparse file is a safetensors file. A tensor ``NAME`` that is smaller so is stored as ``NAME.bits`` (see
:func:`lightning_drive.core.bits.pack`) and ``NAME.values``; all others are stored as they are. Which is which, and a
checksum, is in the file's metadata. Nothing in it is ever unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_drive.core.bits import INTEGERS, pack, unpack

VERSION = 1
"""The version of the form that is written, and the only one that is read."""

KEY = "lightning_drive"
"""Our own entry in the file's metadata: the record, in JSON, of how each tensor is stored."""

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


def stored_form(name: str, tensor: Tensor, taken: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors to write for a tensor, and the entry that describes them.

    It is stored whole where bits and values would be no smaller, or have a name that another tensor has ``taken``.
    """
    entry: dict[str, Any] = {}
    if _name(tensor.dtype) in _AS_BYTES:
        entry = {"dtype": _name(tensor.dtype), "shape": list(tensor.shape)}
    given = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg().cpu().contiguous()
    flat = given.as_strided((given.numel(),), (1,))  # one number is contiguous whatever its strides are
    whole = flat.view(given.shape)
    words = _words(flat)
    kept = words.ne(0).any(1)
    keys = keys_of(name)
    size = (len(flat) + 7) // 8 + int(kept.count_nonzero()) * flat.itemsize + _EXTRA_HEADER
    if size >= flat.nbytes or whole.ndim > _MOST_DIMENSIONS or any(key in taken for key in keys):
        return {name: _bytes(whole) if entry else whole}, {**entry, "stored": "whole"}
    values = words[kept].view(-1).view(tensor.dtype)
    parts = dict(zip(keys, (pack(kept), _bytes(values) if entry else values), strict=True))
    return parts, {**entry, "shape": list(tensor.shape), "stored": "sparse"}


def dense(name: str, entry: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor that :func:`stored_form` took apart, in memory of its own. Raise if its parts do not fit."""
    if entry["stored"] == "whole":
        whole = stored[name].clone()
        if "dtype" not in entry:
            return whole
        shape, values = _shape(entry), _of_dtype(whole, entry)
        if len(values) != prod(shape):
            raise DamagedError(f"has {len(values):,} numbers, but its shape {shape} has {prod(shape):,}")
        return values.view(shape)
    shape = _shape(entry)
    bits, values = (stored[key] for key in keys_of(name))
    number = prod(shape[: _MOST_DIMENSIONS + 1])
    if not number or len(shape) > _MOST_DIMENSIONS:
        raise DamagedError("has a shape that no sparse tensor has")
    if bits.dtype != torch.uint8 or bits.shape != ((number + 7) // 8,) or values.ndim != 1:
        raise DamagedError(f"has bits or values that do not fit its shape {shape}")
    if "dtype" in entry:
        values = _of_dtype(values.clone(), entry)
    kept = unpack(bits, [8 * len(bits)])
    if kept[number:].any():
        raise DamagedError(f"has bits set behind the {number:,} that it should have")
    if int(kept.count_nonzero()) != len(values):
        raise DamagedError(f"has {int(kept.count_nonzero()):,} bits set, but {len(values):,} values")
    words = _words(values)
    whole = words.new_zeros(number, words.shape[1])
    whole[kept[:number]] = words
    return whole.view(-1).view(values.dtype).view(shape)


class DamagedError(Exception):
    """An error about parts of a tensor that do not fit together; the message names them."""


def _words(flat: Tensor) -> Tensor:
    """Return a view of numbers as rows of integers, which tell -0.0 from 0.0 and keep the bits of NaN."""
    return flat.view(_INTEGERS[flat.itemsize]).view(len(flat), max(1, flat.itemsize // 8))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _of_dtype(tensor: Tensor, entry: Mapping[str, Any]) -> Tensor:
    name = entry["dtype"]
    dtype = getattr(torch, name, None) if name in _AS_BYTES else None
    if dtype is None:
        raise DamagedError(f"has numbers of the unknown kind {name!r}")
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or len(tensor) % dtype.itemsize:
        raise DamagedError(f"has bytes that are no whole numbers of {name}")
    return tensor.view(dtype)


def _shape(entry: Mapping[str, Any]) -> list[int]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise DamagedError("has no valid shape")
    return shape


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def keys_of(name: str) -> tuple[str, str]:
    """Return the names of the two tensors that a sparse one is stored as."""
    return f"{name}.bits", f"{name}.values"


def can_store(dtype: torch.dtype) -> bool:
    """Whether numbers of a kind can be stored."""
    return _name(dtype) in _NATIVE + _AS_BYTES


def digest_of(record: Mapping[str, Any], metadata: Mapping[str, str], stored: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of all that is in the file."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    digest = hashlib.sha256(json_of([rest, sorted(metadata.items())]).encode())
    for key in sorted(stored):
        digest.update(json_of([key, _name(stored[key].dtype), list(stored[key].shape)]).encode())
        digest.update(_bytes(stored[key]).numpy().data)
    return digest.hexdigest()


def digest_of_texts(record: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Return a SHA-256 of all that is in the file beside the tensors."""
    rest = {key: value for key, value in record.items() if key not in ("digest", "digest_of_texts")}
    return hashlib.sha256(json_of([rest, sorted(metadata.items())]).encode()).hexdigest()


def json_of(value: object) -> str:
    """Return a value in JSON without blanks."""
    return json.dumps(value, separators=(",", ":"))


def library(function: str) -> Any:
    """Return safetensors, an optional package. Raise, naming the function that needs it, if it is not installed."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"`{function}` needs safetensors: `pip install safetensors`.") from error
    return safetensors
