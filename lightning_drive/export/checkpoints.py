"""Read checkpoints of Lightning or ``torch.save`` without running code in them, and find weights and masks there."""

import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_drive.core.messages import listed, shown
from lightning_drive.export import files

PRUNING = "lightning_drive"
"""Our own entry in a checkpoint that came out of a sparse file."""

_SHARDED_REST = "meta.pt"
"""What Lightning calls the file of a sharded checkpoint in which everything is that is not sharded."""


def load(path: str | Path, *, needs_weights: bool = True, weights_only: bool = True) -> dict[str, Any]:
    """Load a checkpoint without running any code that is in it; tensors are on the CPU.

    Where no weights are needed, it may also be the folder that sharded training writes. As in ``torch.load``,
    ``weights_only=False`` also loads objects of any class, and runs code from the file. Raise, naming the file, if it
    is no checkpoint, is damaged or cut off, or cannot be read at all or without running code.
    """
    path, file = Path(path), _file(Path(path), needs_weights)
    with files.held(file) as same:
        try:
            content = torch.load(same, map_location="cpu", weights_only=weights_only, mmap=zipfile.is_zipfile(same))
        except Exception as error:  # of many kinds, for damaged files
            if isinstance(error, OSError) and not _is_of_content(error, same):
                raise OSError(f"{str(path)!r} cannot be read: {error}.") from error
            if not weights_only and isinstance(error, (ImportError, AttributeError)):
                raise ValueError(
                    f"{str(path)!r} holds something that cannot be imported here: {error}. Install its package, or be"
                    " in the folder of its module. What a script defined that was run itself (`__main__`) cannot be"
                    " found again: save the checkpoint without it."
                ) from error
            raise ValueError(_unreadable(path, error, same)) from error
        if zipfile.is_zipfile(same) and not _is_sound(same, weights=needs_weights):
            raise ValueError(f"{str(path)!r} is damaged: a checksum in it is not that of what it holds.")
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is not a checkpoint: it holds a {type(content).__name__}, not a dictionary.")
    return content


def is_safetensors(path: str | Path) -> bool:
    """Whether a path leads to what looks like a safetensors file. Raise if it leads to no file or folder."""
    files.check(path)
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(9)[8:] == b"{"


def state_dict_of(content: Mapping[str, Any], path: Path) -> Mapping[str, Tensor]:
    """Return the weights in a checkpoint, which may be nothing else. Raise if anything in them is no tensor."""
    state_dict = content.get("state_dict", content)
    if not isinstance(state_dict, dict):
        raise ValueError(f"The 'state_dict' in {str(path)!r} must be a dictionary, got a {type(state_dict).__name__}.")
    odd = [shown(name) for name in state_dict if not isinstance(name, str)]
    if odd:
        raise ValueError(f"The names in the 'state_dict' of {str(path)!r} must be texts, but {listed(odd)} is none.")
    others = [repr(name) for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if others:
        place = "its 'state_dict'" if "state_dict" in content else "it"
        raise ValueError(
            f"{str(path)!r} must have a 'state_dict' of nothing but tensors, or be one, but in {place} are"
            f" {listed(others)}, which are no tensors."
        )
    return state_dict


def pruning_states(content: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    """Return the states of our callbacks in a checkpoint, known by their form, under their names there."""
    callbacks = content.get("callbacks")
    return {
        name: state
        for name, state in (callbacks if isinstance(callbacks, dict) else {}).items()
        if isinstance(state, dict) and {"version", "masks", "report"} <= state.keys()
    }


def pruning_in(content: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the class of our callback in a checkpoint, and its report as a dictionary.

    The class is ``""`` where there is no such callback; the report ``None`` where it has not pruned yet. The checkpoint
    may be one that was read out of a sparse file.
    """
    own = content.get(PRUNING)
    callbacks = [
        ((name if isinstance(name, str) else shown(name)).partition("{")[0], state["report"])
        for name, state in pruning_states(content).items()
    ]
    if isinstance(own, dict):
        name = own.get("callback")
        callbacks.append((name if isinstance(name, str) else shown(name), own.get("report")))
    pruned = [(name, report) for name, report in callbacks if report is not None]
    return next(iter(pruned or callbacks), ("", None))


def _file(path: Path, needs_weights: bool) -> Path:
    """Return the file to read. Raise if there is none, or it is of another kind."""
    files.check(path)
    if path.is_dir():
        if not (path / _SHARDED_REST).is_file():
            raise ValueError(f"{str(path)!r} is a folder, not a checkpoint. Name a file in it.")
        if needs_weights:
            raise ValueError(
                f"{str(path)!r} is a sharded checkpoint, a folder with the weights in parts. Join them to one file"
                f" first: `python -m lightning.pytorch.utilities.consolidate_checkpoint {path}`."
            )
        return path / _SHARDED_REST  # checked to be a regular file
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


def _is_of_content(error: OSError, file: str) -> bool:
    """Whether an error is not one of the disk: torch looks for parts of a file that is cut off before its beginning."""
    if type(error) is not OSError:  # one of permissions, say
        return False
    try:
        with Path(file).open("rb") as content:
            while content.read(1 << 20):
                pass
    except OSError:
        return False
    return True


def _unreadable(path: Path, error: Exception, file: str) -> str:
    """Return the message on a file that ``torch.load`` could not read: it is damaged, or needs code to be run."""
    is_sound, is_unpickling = _is_sound(file), isinstance(error, pickle.UnpicklingError)
    named = re.search(r"GLOBAL ([\w.]+)", str(error)) if is_unpickling else None
    if named and (is_sound if zipfile.is_zipfile(file) else not _ends_within(file, named[1])):
        return (
            f"{str(path)!r} holds a {named[1]}, and loading that could run any code, so it was not loaded."
            f" {_if_trusted(path)}"
        )
    if is_unpickling and is_sound:
        return (
            f"{str(path)!r} holds what torch cannot load without running code, such as an integer of more than 255"
            f" bytes, so it was not loaded. {_if_trusted(path)}"
        )
    return f"{str(path)!r} is not a file that `torch.save` wrote, or it is damaged or cut off."


def _ends_within(file: str, name: str) -> bool:
    """Whether a pickle ends within the qualified name of a class, whose last letter torch drops then, or behind it."""
    module, _, kind = name.rpartition(".")
    ending = f"{module}\n{kind}".strip().encode()
    with Path(file).open("rb") as content:
        content.seek(max(0, content.seek(0, os.SEEK_END) - len(ending) - 2))
        return ending in content.read()


def _if_trusted(path: Path) -> str:
    return (
        "If you trust the file's source, let `lightning-drive` load it with `--trust-pickle`, or in Python take what"
        f" you need out of `torch.load({str(path)!r}, weights_only=False)`: its 'state_dict' for"
        " `lightning_drive.save_sparse`, the 'report' of one of its 'callbacks' for"
        " `lightning_drive.PruningReport.from_dict`."
    )
