"""Find the kept weights that lie on a path from the network's input to its output."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lightning_drive.core.arguments import Mode
from lightning_drive.core.messages import shown_error
from lightning_drive.network import paths
from lightning_drive.network.forward_passes import ForwardPass
from lightning_drive.network.masks import Masks
from lightning_drive.network.without_dropout import in_mode

_MODES: tuple[Mode, ...] = ("eval", "train")


class ActiveWeights(NamedTuple):
    """Weights on paths, or why paths could not be followed."""

    masks: Masks | None
    """The kept weights on a path; ``None`` if paths could not be followed."""
    unknown: Sequence[str] = ()
    """Names of parameters without a path even in the dense network: all their kept weights count as active."""
    error: str | None = None
    """Why paths could not be followed; ``None`` if they could."""


def find(module: nn.Module, masks: Masks, forward_pass: ForwardPass) -> ActiveWeights:
    """Find the kept weights on paths, in eval mode or, where paths reach more in it, in train mode.

    Detection models, for one, select among their boxes in eval mode, and paths end there.
    """
    results: list[tuple[list[str], Masks]] = []
    errors = []
    for mode in _MODES:
        try:
            with in_mode(module, mode):
                active, unknown = _followed(module, masks, forward_pass)
        except Exception as error:  # from the module's own `forward`, which may not be made for this call
            could_help = forward_pass.is_guess and "cannot be followed" not in str(error)
            remedy = " Set `example_input_array` on the module to what `forward` takes." if could_help else ""
            errors.append(f"{forward_pass.source}: {shown_error(error)}.{remedy}")
            continue
        results.append((unknown, active))
        if not unknown:
            break
    if not results:
        return ActiveWeights(None, error=errors[0])
    unknown, active = min(results, key=lambda result: len(result[0]))
    return ActiveWeights(active, unknown)


def _followed(module: nn.Module, masks: Masks, forward_pass: ForwardPass) -> tuple[Masks, list[str]]:
    """Find the kept weights on paths, and name the parameters without a path even in the dense network.

    All kept weights of these parameters count as active.
    """
    active = paths.active_masks(module, masks, forward_pass)
    lost = [name for name, mask in masks.items() if mask.any() and not active[name].any()]
    if not lost:
        return Masks(active), []
    dense = paths.active_masks(module, {name: torch.ones_like(mask) for name, mask in masks.items()}, forward_pass)
    if not any(mask.any() for mask in dense.values()):
        raise ValueError("Nothing of the input reaches the output of the network, not even without masks.")
    unknown = [name for name in lost if not dense[name].any()]
    return Masks({**active, **{name: masks[name] for name in unknown}}), unknown
