"""The part of a checkpoint besides its weights, as JSON in the metadata of a sparse file, and back.

It is read back into the form of a checkpoint, with the report of the pruning under the key ``"lightning_drive"``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_drive.core.messages import shown
from lightning_drive.export import checkpoints

_HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")

_METADATA = "checkpoint"
"""What the metadata of a sparse file calls the rest of a checkpoint."""

_TRAINING = (
    *("state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers"),
    *("MixedPrecision", "native_amp_scaling_state", "amp_scaling_state"),
)
"""What Lightning stores to go on with training, and the weights."""

_MOST_BITS = 14_000
"""Of an integer in JSON: Python reads up to 4,300 digits."""

_TUPLE = "__tuple__"
"""Marks a tuple, which JSON does not know."""


class Packed(NamedTuple):
    """The part of a checkpoint that goes into a sparse file besides its weights."""

    metadata: dict[str, str]
    """What :func:`unpacked` reads."""
    hyper_parameters_left_out: list[str]
    """Those that JSON cannot hold, with their types."""
    entries_left_out: list[str]
    """Other entries of the checkpoint that it cannot hold."""


def packed(content: Mapping[str, Any]) -> Packed:
    """Return in JSON what ``load_from_checkpoint`` reads beside the weights, and the report of the pruning.

    Hyper-parameters and whatever else is in the checkpoint are kept as far as JSON can hold them (with tuples). What
    Lightning needs to go on with training is not: optimizers, learning-rate schedulers, loops and callbacks.

    A bare ``state_dict`` has no such things.

    Examples:
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
    callback, report = checkpoints.pruning_in(content)
    if report is not None:
        kept.update(_plain_part({checkpoints.PRUNING: {"callback": callback, "report": report}})[0])
    return Packed({_METADATA: json.dumps(kept)}, hyper_parameters, entries)


def unpacked(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Return the checkpoint without weights that :func:`packed` wrote into metadata, empty if it wrote nothing.

    Raise if something else wrote under its key.
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


def _plain_part(values: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the entries that JSON can hold, and the names and types of those that it cannot."""
    plain = {key: _tagged(value) for key, value in values.items() if _fits_json({key: value})}
    names = {key: key if isinstance(key, str) else shown(key) for key in values}
    return plain, [f"{names[key]} ({type(value).__name__})" for key, value in values.items() if key not in plain]


def _fits_json(value: object) -> bool:
    """Whether JSON can hold a value, however deep it is nested."""
    try:
        return _is_plain(value)
    except RecursionError:  # of lists in lists in lists, or of one in itself
        return False


def _is_plain(value: object) -> bool:
    """Whether a value comes back from JSON as it was, with tuples marked."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    if type(value) is dict:
        return all(type(key) is str and key != _TUPLE and _is_plain(entry) for key, entry in value.items())
    if type(value) is int:
        return value.bit_length() < _MOST_BITS
    return value is None or type(value) in (bool, float, str)


def _tagged(value: Any) -> Any:
    """Return a value with its tuples marked."""
    if isinstance(value, tuple):
        return {_TUPLE: [_tagged(entry) for entry in value]}
    if isinstance(value, list):
        return [_tagged(entry) for entry in value]
    return {key: _tagged(entry) for key, entry in value.items()} if isinstance(value, dict) else value
