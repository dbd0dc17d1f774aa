"""Lightning's checkpoints: read without running code that is in them; and what is not weights, as JSON and back.

What stands in the metadata of a sparse file is read back into the form of a checkpoint, with the report of the pruning
under the key ``"lightning_drive"``.
"""

import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_drive.core.messages import listed, shown
from lightning_drive.export import reading

_HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")

_METADATA = "checkpoint"
"""What the metadata of a sparse file calls the rest of a checkpoint."""

_PRUNING = "lightning_drive"
"""Our own entry in a checkpoint that came out of a sparse file."""

_SHARDED_REST = "meta.pt"
"""What Lightning calls the file of a sharded checkpoint in which everything is that is not sharded."""

_TRAINING = (
    *("state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers"),
    *("MixedPrecision", "native_amp_scaling_state", "amp_scaling_state"),
)
"""What Lightning stores to go on with training, and the weights."""

_MOST_BITS = 14_000
"""Of an integer in JSON: Python reads up to 4,300 digits."""

_TUPLE = "__tuple__"
"""Marks a tuple, which JSON does not know."""


def load(path: str | Path, *, needs_weights: bool = True, weights_only: bool = True) -> dict[str, Any]:
    """Load a checkpoint without running any code that is in it; tensors are on the CPU.

    Args:
        path: A file that ``torch.save`` or Lightning wrote. Without weights, it may also be the folder that sharded
            training writes.
        needs_weights: Whether the weights are needed.
        weights_only: As of ``torch.load``: ``False`` also loads objects of any class, and runs code from the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, is damaged or cut off, or cannot be read without running code.

    """
    path, file = Path(path), _file(Path(path), needs_weights)
    with reading.held(file) as same:
        try:
            content = torch.load(same, map_location="cpu", weights_only=weights_only, mmap=zipfile.is_zipfile(same))
        except OSError:
            raise
        except Exception as error:  # of many kinds, where a file is damaged
            if not weights_only and isinstance(error, (ImportError, AttributeError)):
                raise ValueError(
                    f"{str(path)!r} holds something that cannot be imported here: {error}. Install its package, or be"
                    " in the folder of its module. What a script defined that was run itself (`__main__`) cannot be"
                    " found again: save the checkpoint without it."
                ) from error
            raise ValueError(_unreadable(path, error, is_sound=_is_sound(same))) from error
        if zipfile.is_zipfile(same) and not _is_sound(same, weights=needs_weights):
            raise ValueError(f"{str(path)!r} is damaged: a checksum in it is not that of what it holds.")
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is not a checkpoint: it holds a {type(content).__name__}, not a dictionary.")
    return content


def is_safetensors(path: str | Path) -> bool:
    """Whether a file looks like a safetensors file.

    Args:
        path: Any path.

    """
    reading.check(path)
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(9)[8:] == b"{"


def state_dict_of(content: Mapping[str, Any], path: Path) -> Mapping[str, Tensor]:
    """Find the weights in a checkpoint, which may be nothing else.

    Args:
        content: The checkpoint.
        path: Where it is from, for messages.

    Raises:
        ValueError: If there are none, or something is no tensor (named).

    """
    state_dict = content.get("state_dict", content)
    if not isinstance(state_dict, dict):
        raise ValueError(f"The 'state_dict' in {str(path)!r} must be a dictionary, got a {type(state_dict).__name__}.")
    odd = [shown(name) for name in state_dict if not isinstance(name, str)]
    if odd:
        raise ValueError(f"The names in the 'state_dict' of {str(path)!r} must be texts, but {listed(odd)} is none.")
    others = [repr(name) for name, each in state_dict.items() if not isinstance(each, Tensor)]
    if others:
        place = "its 'state_dict'" if "state_dict" in content else "it"
        raise ValueError(
            f"{str(path)!r} must have a 'state_dict' of nothing but tensors, or be one, but in {place} are"
            f" {listed(others)}, which are no tensors."
        )
    return state_dict


def pruning_states(content: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    """Return the states of our callbacks in a checkpoint, known by their form, under their names there.

    Args:
        content: The checkpoint.

    """
    callbacks = content.get("callbacks")
    return {
        name: state
        for name, state in (callbacks if isinstance(callbacks, dict) else {}).items()
        if isinstance(state, dict) and {"version", "masks", "report"} <= state.keys()
    }


def pruning_in(content: Mapping[str, Any]) -> tuple[str, Any]:
    """Find our callback in a checkpoint, whatever a subclass of it is called.

    Args:
        content: The checkpoint, or what :func:`unpacked` gives of one.

    Returns:
        The callback's class, ``""`` without one; and its report as a dictionary, ``None`` if it has not pruned yet.

    """
    own = content.get(_PRUNING)
    found = [
        ((name if isinstance(name, str) else shown(name)).partition("{")[0], state["report"])
        for name, state in pruning_states(content).items()
    ]
    if isinstance(own, dict):
        name = own.get("callback")
        found.append((name if isinstance(name, str) else shown(name), own.get("report")))
    pruned = [each for each in found if each[1] is not None]
    return next(iter(pruned or found), ("", None))


class Packed(NamedTuple):
    """What of a checkpoint goes into a sparse file beside its weights."""

    metadata: dict[str, str]
    """What :func:`unpacked` reads."""
    hyper_parameters_left_out: list[str]
    """Those that JSON cannot hold, with their types."""
    entries_left_out: list[str]
    """Other entries of the checkpoint that it cannot hold."""


def packed(content: Mapping[str, Any]) -> Packed:
    """Write in JSON what ``load_from_checkpoint`` reads beside the weights, and the report of the pruning.

    Hyper-parameters and whatever else is in the checkpoint are kept as far as JSON can hold them (with tuples). What
    Lightning needs to go on with training is not: optimizers, learning-rate schedulers, loops and callbacks.

    Args:
        content: The checkpoint; a bare ``state_dict`` has no such things.

    Example:
        >>> packed({"state_dict": {}, "epoch": 3, "labels": ("cat", "dog"), "set": {1}, "loops": {}})
        Packed(metadata={'checkpoint': '{"epoch": 3, "labels": {"__tuple__": ["cat", "dog"]}}'}, \
hyper_parameters_left_out=[], entries_left_out=['set (set)'])

    """
    if "state_dict" not in content:
        return Packed({}, [], [])
    kept: dict[str, Any] = {}
    hyper_parameters: list[str] = []
    entries: list[str] = []
    for key, value in content.items():
        if key in _TRAINING:
            continue
        if key in _HYPER_PARAMETERS and isinstance(value, dict):
            kept[key], left_out = _plain_part(value)
            hyper_parameters += left_out
        else:
            part, left_out = _plain_part({key: value})
            kept.update(part)
            (hyper_parameters if key in _HYPER_PARAMETERS else entries).extend(left_out)
    callback, report = pruning_in(content)
    if report is not None:
        kept.update(_plain_part({_PRUNING: {"callback": callback, "report": report}})[0])
    return Packed({_METADATA: json.dumps(kept)}, hyper_parameters, entries)


def unpacked(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Read what :func:`packed` wrote.

    Args:
        metadata: The metadata of a sparse file, which may have nothing of the kind.
        path: Where it is from, for messages.

    Returns:
        A checkpoint without weights.

    Raises:
        ValueError: If something else wrote it.

    """
    try:
        rest = json.loads(
            metadata.get(_METADATA, "{}"),
            object_hook=lambda value: tuple(value[_TUPLE]) if _TUPLE in value else value,
        )
    except (ValueError, TypeError, RecursionError):
        rest = None
    if not isinstance(rest, dict):
        raise ValueError(
            f"{str(path)!r} has metadata under {_METADATA!r} that `lightning-drive compress` did not write."
        )
    return {key: value for key, value in rest.items() if key not in _TRAINING}


def _file(path: Path, needs_weights: bool) -> Path:
    """Give the file to read, or say why there is none."""
    reading.check(path)
    if path.is_dir():
        if not (path / _SHARDED_REST).is_file():
            raise ValueError(f"{str(path)!r} is a folder, not a checkpoint. Give a file in it.")
        if needs_weights:
            raise ValueError(
                f"{str(path)!r} is a sharded checkpoint, a folder with the weights in parts. Join them to one file"
                f" first: `python -m lightning.pytorch.utilities.consolidate_checkpoint {path}`."
            )
        return path / _SHARDED_REST  # a regular file, as was checked
    if is_safetensors(path):
        raise ValueError(
            f"{str(path)!r} seems to be a safetensors file. If it is a sparse file, make a checkpoint of it first, by"
            " `lightning-drive expand`."
        )
    return path


def _is_sound(file: str, *, weights: bool = True) -> bool:
    """Whether the checksums in a file of ``torch.save`` are right, as far as it has them; torch does not look."""
    try:
        with zipfile.ZipFile(file) as content:
            for member in content.infolist():
                if member.CRC and (weights or member.filename.endswith("data.pkl")):
                    with content.open(member) as part:
                        while part.read(1 << 20):
                            pass
    except (OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile):
        return False
    return True


def _unreadable(path: Path, error: Exception, *, is_sound: bool) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if not found and is_sound and isinstance(error, pickle.UnpicklingError):
        return (
            f"{str(path)!r} holds what torch cannot load without running code, such as an integer of more than 255"
            f" bytes, so it was not loaded. {_if_trusted(path)}"
        )
    if not found:
        return f"{str(path)!r} is not a file that `torch.save` wrote, or it is damaged or cut off."
    return (
        f"{str(path)!r} holds a {found[1]}, and loading that could run any code, so it was not loaded."
        f" {_if_trusted(path)}"
    )


def _if_trusted(path: Path) -> str:
    return (
        "If you trust the file's source, let `lightning-drive` load it with `--trust-pickle`, or in Python take what"
        f" you need out of `torch.load({str(path)!r}, weights_only=False)`: its 'state_dict' for"
        " `lightning_drive.save_sparse`, the 'report' of one of its 'callbacks' for"
        " `lightning_drive.PruningReport.from_dict`."
    )


def _plain_part(values: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """Give what JSON can hold, and name what it cannot."""
    plain = {key: _tagged(value) for key, value in values.items() if _fits_json({key: value})}
    names = {key: key if isinstance(key, str) else shown(key) for key in values}
    return plain, [f"{names[key]} ({type(value).__name__})" for key, value in values.items() if key not in plain]


def _fits_json(value: object) -> bool:
    try:
        return _is_plain(value)
    except RecursionError:  # of lists in lists in lists, or of one in itself
        return False


def _is_plain(value: object) -> bool:
    """Whether a value comes back from JSON as it was, with tuples marked."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    if type(value) is dict:
        return all(type(key) is str and key != _TUPLE and _is_plain(each) for key, each in value.items())
    if type(value) is int:
        return value.bit_length() < _MOST_BITS
    return value is None or type(value) in (bool, float, str)


def _tagged(value: Any) -> Any:
    if isinstance(value, tuple):
        return {_TUPLE: [_tagged(each) for each in value]}
    if isinstance(value, list):
        return [_tagged(each) for each in value]
    return {key: _tagged(each) for key, each in value.items()} if isinstance(value, dict) else value
