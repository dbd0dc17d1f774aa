"""The masks that a callback is given: as such, in a checkpoint of ours, or as the zeros in a file of weights."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from lightning_drive.core.messages import listed, shown
from lightning_drive.export import checkpoints, foreign_masks, sparse_reader
from lightning_drive.network import computed_weights, name_patterns, prunable_layers
from lightning_drive.network.masks import Masks, of_zeros

Given: TypeAlias = Masks | str | None
"""Masks, the path of a file that has them, or nothing: the zeros of the module itself."""


def checked(masks: object) -> Given:
    """Return the argument ``masks`` of a callback; raise TypeError if it is neither masks nor a path nor ``None``."""
    if masks is None:
        return None
    if isinstance(masks, (str, os.PathLike)):
        return os.fspath(masks)
    if isinstance(masks, Mapping):
        return masks if isinstance(masks, Masks) else Masks(masks)
    raise TypeError(
        "`masks` must be a `Masks`, the path of a sparse file or of a checkpoint, or None for the zeros of the network,"
        f" got {shown(masks)}."
    )


def read(
    given: Masks | str,
    module: nn.Module,
    prunable: Callable[[nn.Module], Mapping[str, Tensor]],
    include: list[str] | None,
    exclude: list[str] | None,
) -> Masks:
    """Return the masks for a module; raise ValueError if a file has none, or they do not fit the module (named).

    ``prunable`` returns the prunable parameters, which decide what of a file of weights is read. Masks themselves are
    chosen by the glob patterns ``include`` and ``exclude`` over their names.
    """
    found = given if isinstance(given, Masks) else _in_file(Path(given))
    if isinstance(found, Masks):
        masks = _chosen(found, module, include, exclude)
    else:
        names = [name for name in prunable(module) if name in found]
        if not names:
            raise ValueError(
                f"{given!r} has none of the prunable weights of {type(module).__name__}, {listed(prunable(module))}: it"
                f" has {listed(found)}. Save the weights under the names that the module has."
            )
        masks = of_zeros({name: found[name] for name in names})
    computed = {name: weight for name, weight in prunable_layers.computed_in(module).items() if name in masks}
    if computed:
        raise computed_weights.error(computed, [name for name in masks if name not in computed])
    if misfits := dict(_misfits(masks, module)):
        raise ValueError(
            f"`masks` do not fit {type(module).__name__}: {listed(misfits.values())}. Leave out what is new in this"
            f" network with `exclude={[*misfits]}`, or take masks of this network."
        )
    return masks


def check_share(masks: Masks, of_what: str, is_what: str, remedy: str) -> None:
    """Raise ValueError if masks prune nothing or everything; ``of_what`` and ``is_what`` say which weights are what."""
    if 0 < masks.num_kept < masks.num_prunable:
        return
    if masks.num_prunable and not masks.num_kept:
        raise ValueError(f"All {masks.num_prunable:,} weights {of_what} are {is_what}. {remedy}")
    raise ValueError(f"None of the {masks.num_prunable:,} weights {of_what} is {is_what}. {remedy}")


def _in_file(path: Path) -> Masks | Mapping[str, Tensor]:
    """Return the masks in a checkpoint, or the weights in any file."""
    if checkpoints.is_safetensors(path):
        return foreign_masks.joined(sparse_reader.load_sparse(path)).state_dict
    content = checkpoints.load(path, needs_weights=not path.is_dir())
    for name, state in checkpoints.pruning_states(content).items():
        try:
            masks = Masks.from_state_dict(state["masks"])
        except ValueError as error:
            raise ValueError(f"The masks of {shown(name)} in {str(path)!r} cannot be read. {error}") from error
        if masks:
            return masks
    weights = checkpoints.state_dict_of(checkpoints.load(path) if path.is_dir() else content, path)
    return foreign_masks.joined(weights).state_dict


def _chosen(masks: Masks, module: nn.Module, include: list[str] | None, exclude: list[str] | None) -> Masks:
    """Return the masks whose names match; raise ValueError if a pattern matches no name of the masks or the module."""
    known = list(dict.fromkeys([*masks, *(name for name, _ in module.named_parameters())]))
    name_patterns.check_matches("include", include or (), known, list(masks))
    name_patterns.check_matches("exclude", exclude or (), known, list(masks))
    names = set(masks) if include is None else name_patterns.matching(include, masks)
    names -= name_patterns.matching(exclude or (), masks)
    return Masks({name: mask for name, mask in masks.items() if name in names})


def _misfits(masks: Masks, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the name of every mask that fits no parameter, and why, in words for a sentence."""
    parameters = dict(module.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            yield name, f"it has no {name!r}"
        elif parameters[name].shape != mask.shape:
            yield name, f"its {name!r} has the shape {tuple(parameters[name].shape)}, not {tuple(mask.shape)}"
