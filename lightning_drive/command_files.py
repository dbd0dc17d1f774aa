"""The commands ``lightning-drive report``, ``compress`` and ``expand``, which read and write files of weights."""

import re
from collections.abc import Mapping
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_drive import command_json
from lightning_drive.command_imports import current_folder
from lightning_drive.core.messages import listed
from lightning_drive.export import (
    checkpoint_metadata,
    checkpoints,
    files,
    foreign_masks,
    sparse_reader,
    sparse_writer,
)
from lightning_drive.report import zeros
from lightning_drive.report.pruning_report import PruningReport

_VERSION = "pytorch-lightning_version"


def report(checkpoint: Path, as_json: bool, trust_pickle: bool) -> None:
    """Print the report in a file, or the zeros in its tensors where it has none."""
    if checkpoints.is_safetensors(checkpoint):
        content = checkpoint_metadata.unpacked(sparse_reader.read_metadata(checkpoint), checkpoint)
    else:
        content = _loaded(checkpoint, trust_pickle, needs_weights=False)
    callback, values = checkpoints.pruning_in(content)
    if values is not None:
        pruning_report = _report_of(values, checkpoint)
        print(command_json.of_report(callback, pruning_report) if as_json else pruning_report)
        return
    weights = foreign_masks.joined(_state_dict(checkpoint, content, trust_pickle))
    counts = zeros.count_zeros(weights.state_dict)
    if as_json:
        print(command_json.of_zeros(callback, counts))
    else:
        reason = f"{callback} had not pruned yet" if callback else "no pruning callback was saved in it"
        print(f"No report in {checkpoint}: {reason}. These are the zeros in all parameters and buffers:")
        print("\n".join(zeros.table(counts)))
        if weights.parts:
            print(f"{_with_masks(weights)}: these are counted as the weights that the network multiplies by.")
        if weights.others:
            print(_other_masks(weights))


def compress(checkpoint: Path, out: Path, overwrite: bool, trust_pickle: bool) -> None:
    """Write the weights of a checkpoint as a sparse file, and print the sizes and what is left out."""
    _check_free(out, checkpoint, overwrite)
    content = _loaded(checkpoint, trust_pickle)
    plain = foreign_masks.joined(checkpoints.state_dict_of(content, checkpoint))
    state_dict = plain.state_dict
    rest = checkpoint_metadata.packed(content)
    sparse_writer.save_sparse(state_dict, out, metadata=rest.metadata)

    weights = sum({tensor.data_ptr(): tensor.nbytes for tensor in state_dict.values()}.values())
    size = out.stat().st_size
    before = checkpoint.stat().st_size
    print(f"{checkpoint}: {before:,} bytes, of which {weights:,} are weights and buffers")
    print(
        f"{out}: {size:,} bytes, {size / max(1, weights):.2%} of the weights and {size / before:.2%} of the checkpoint"
    )
    if size - sum(map(len, rest.metadata.values())) >= weights:
        print("Nothing was gained: no tensor has enough zeros. Was the checkpoint saved after pruning?")
    if plain.parts:
        print(
            f"{_with_masks(plain)}: the masks were put on, and the weights have the names of a network without them."
            " Load them into such a network, or call `torch.nn.utils.prune.remove` on its layers first."
        )
    if plain.others:
        print(_other_masks(plain))
    if rest.hyper_parameters_left_out:
        print(
            f"Hyper-parameters that JSON cannot hold are left out: {', '.join(rest.hyper_parameters_left_out)}. Give"
            " them to `load_from_checkpoint` again."
        )
    if rest.entries_left_out:
        print(
            f"Entries that JSON cannot hold are left out: {', '.join(rest.entries_left_out)}. If your"
            " `on_load_checkpoint` reads them, it must do without."
        )


def _with_masks(weights: foreign_masks.Joined) -> str:
    """Return which weights another tool stored as values and masks."""
    names = (f"{name!r} (as {value!r} and {mask!r})" for name, (value, mask) in weights.parts.items())
    return f"Another tool stored values and masks of {listed(names, most=3)}"


def _other_masks(weights: foreign_masks.Joined) -> str:
    """Return which weights seem to have a mask that only their module can put on."""
    names = (f"{value!r} (by {mask!r})" for value, mask in weights.others.items())
    return (
        f"These seem to be masked by a buffer of their module: {listed(names, most=3)}. What that prunes is not counted"
        " as zeros here. Write the zeros into the weights before they are saved, such as by"
        " `torch.nn.utils.parametrize.remove_parametrizations(layer, name)`."
    )


def expand(sparse: Path, out: Path, overwrite: bool) -> None:
    """Write a sparse file as a checkpoint again, and print its size."""
    _check_free(out, sparse, overwrite)
    state_dict, metadata = sparse_reader.load_with_metadata(sparse)
    checkpoint = checkpoint_metadata.unpacked(metadata, sparse)
    checkpoint[_VERSION] = _loadable_version(checkpoint.get(_VERSION))
    with files.replacing(out) as temporary:
        torch.save({**checkpoint, "state_dict": state_dict}, temporary)

    hyper_parameters = checkpoint.get("hyper_parameters")
    names = ", ".join(hyper_parameters if isinstance(hyper_parameters, dict) else ()) or "none"
    print(f"{out}: {out.stat().st_size:,} bytes, {len(state_dict)} tensors, hyper-parameters: {names}")


def _loaded(checkpoint: Path, trust_pickle: bool, *, needs_weights: bool = True) -> dict[str, Any]:
    if not trust_pickle:
        return checkpoints.load(checkpoint, needs_weights=needs_weights)
    with current_folder():
        return checkpoints.load(checkpoint, needs_weights=needs_weights, weights_only=False)


def _state_dict(path: Path, content: Mapping[str, Any], trust_pickle: bool) -> Mapping[str, Tensor]:
    """Return the weights of a file whose other content was read already; raise for a folder: it has them in parts."""
    if checkpoints.is_safetensors(path):
        return sparse_reader.load_sparse(path)
    return checkpoints.state_dict_of(_loaded(path, trust_pickle) if path.is_dir() else content, path)


def _report_of(values: Mapping[str, Any], path: Path) -> PruningReport:
    try:
        return PruningReport.from_dict(values)
    except ValueError as error:
        raise ValueError(f"The report in {str(path)!r} cannot be read. {error}") from error


def _loadable_version(version: object) -> str:
    """Return the version of Lightning to write into a checkpoint; ``load_from_checkpoint`` needs one."""
    # Those before 2 would be brought up to date first, in parts that a file of weights does not have.
    is_loadable = isinstance(version, str) and re.match(r"(\d{1,3})\.", version) and int(version.split(".")[0]) >= 2
    return str(version) if is_loadable else version_of("lightning")


def _check_free(out: Path, source: Path, overwrite: bool) -> None:
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"OUT must be another file than {str(source)!r}.")
    if out.exists() and not overwrite:
        raise ValueError(f"{str(out)!r} exists already. Choose another name, or set `--overwrite` to replace it.")
