"""Find the kept weights that lie on a path from the network's input to its output."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lightning_drive.core.arguments import Mode
from lightning_drive.core.masks import Masks
from lightning_drive.core.messages import shown_error
from lightning_drive.network import synflow
from lightning_drive.network.forward_calls import Passage
from lightning_drive.network.without_dropout import in_mode

_MODES: tuple[Mode, ...] = ("eval", "train")


class ActiveWeights(NamedTuple):
    """Weights on paths, or why paths could not be followed."""

    masks: Masks | None
    """The kept weights on a path; ``None`` if paths could not be followed."""
    unknown: Sequence[str] = ()
    """Names of parameters without a path in the dense network either: all that is kept there counts as active."""
    error: str | None = None
    """Why paths could not be followed; ``None`` if they could."""


def find(module: nn.Module, masks: Masks, passage: Passage) -> ActiveWeights:
    """Follow paths in eval mode, unless there are more in train mode: detection models choose among boxes then."""
    results: list[tuple[list[str], Masks]] = []
    errors = []
    for mode in _MODES:
        try:
            with in_mode(module, mode):
                active, unknown = _followed(module, masks, passage)
        except Exception as error:  # the module's own `forward`, called in a way it may not be made for
            could_help = passage.is_guess and "cannot be followed" not in str(error)
            remedy = " Set `example_input_array` on the module to what `forward` takes." if could_help else ""
            errors.append(f"{passage.source}: {shown_error(error)}.{remedy}")
            continue
        results.append((unknown, active))
        if not unknown:
            break
    if not results:
        return ActiveWeights(None, error=errors[0])
    unknown, active = min(results, key=lambda result: len(result[0]))
    return ActiveWeights(active, unknown)


def _followed(module: nn.Module, masks: Masks, passage: Passage) -> tuple[Masks, list[str]]:
    """Find the weights on paths; all that are kept count where not even the dense network has a path."""
    active = synflow.active_masks(module, masks, passage)
    lost = [name for name, mask in masks.items() if mask.any() and not active[name].any()]
    if not lost:
        return Masks(active), []
    dense = synflow.active_masks(module, {name: torch.ones_like(mask) for name, mask in masks.items()}, passage)
    if not any(mask.any() for mask in dense.values()):
        raise ValueError("Nothing that is sent into the network arrives at what it returns, not even without masks.")
    unknown = [name for name in lost if not dense[name].any()]
    return Masks({**active, **{name: masks[name] for name in unknown}}), unknown
