"""Write a sparse file: a pruned ``state_dict`` as the bits of its masks and the values that are left."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.core import saved_values, shards, tensor_kinds
from lightning_drive.core.messages import listed
from lightning_drive.export import files, sparse_format


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
        metadata: Any texts to store with it; :func:`read_metadata` returns them.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
        TypeError: If something is no tensor with memory of its own, such as extra state or a shard (named).
        ValueError: If a name cannot be used (named).

    """
    library = sparse_format.library("save_sparse")
    values = module_or_state_dict
    state_dict = values.state_dict() if isinstance(values, nn.Module) else values
    metadata = _checked_metadata(metadata or {})
    record: dict[str, Any] = {"version": sparse_format.VERSION, "tensors": {}, "versions": _versions(state_dict)}
    tensors = {name: _checked(name, value) for name, value in state_dict.items()}
    stored: dict[str, Tensor] = {}
    owners: dict[object, str] = {}
    for name, tensor in tensors.items():
        owner = owners.setdefault(_memory(tensor), name) if tensor.numel() else name
        if owner == name:
            parts, record["tensors"][name] = sparse_format.stored_form(name, tensor, tensors)
            stored.update(parts)
        else:
            record["tensors"][name] = {"stored": "tied", "to": owner}
    record["digest_of_texts"] = sparse_format.digest_of_texts(record, metadata)
    record["digest"] = sparse_format.digest_of(record, metadata, stored)
    with files.replacing(path) as temporary:
        try:
            library.torch.save_file(
                _apart(stored), temporary, {**metadata, sparse_format.KEY: sparse_format.json_of(record)}
            )
        except library.SafetensorError as error:
            raise OSError(f"{str(path)!r} could not be written: {error}.") from error


def _checked(name: object, value: object) -> Tensor:
    """Return a tensor whose memory can be written down. Raise, naming it, if its name or its kind cannot be stored."""
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
    elif not tensor_kinds.is_plain(value) or not sparse_format.can_store(value.dtype):
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
    """Return a copy of the user's metadata. Raise if it is not texts by name, or has our own key."""
    wrong = [key for key, text in metadata.items() if not isinstance(key, str) or not isinstance(text, str)]
    if wrong:
        raise TypeError(f"`metadata` must be texts by name, but {listed(map(repr, wrong))} is not.")
    if sparse_format.KEY in metadata:
        raise ValueError(
            f"`metadata` may not have the key {sparse_format.KEY!r}: that is where the file describes itself."
        )
    return dict(metadata)


def _memory(tensor: Tensor) -> object:
    """Return a key that only tensors have in common that are one and the same in memory."""
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
    """Return the version of each module, by which some modules know how to read an old ``state_dict``."""
    metadata = getattr(state_dict, "_metadata", None)
    if not isinstance(metadata, dict):
        return None
    versions = {name: module.get("version") for name, module in metadata.items()}
    return {name: version for name, version in versions.items() if type(version) is int}
