"""Compare masks from a checkpoint with the settings of the callback that restores them."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_drive.core import saved_values
from lightning_drive.core.arguments import Control
from lightning_drive.core.goal import Goal
from lightning_drive.core.messages import listed, shown
from lightning_drive.network import prunable
from lightning_drive.network.masks import Masks
from lightning_drive.report.pruning_report import PruningReport


def warn_of_differences(masks: Masks, report: PruningReport, goal: Goal, control: Control) -> None:
    """Warn if masks differ from the ``goal`` and the ``control`` of the callback, since they stay as they are."""
    if not _has_sparsity(masks, goal):
        rank_zero_warn(
            f"The checkpoint was pruned to a sparsity of {masks.sparsity:.4f} and stays so:"
            f" `sparsity={in_words(goal.settings(1)['sparsity'])}` has no effect. To prune to another one, start from a"
            " dense checkpoint."
        )
    if report.control != control:
        rank_zero_warn(
            f"The checkpoint was pruned with control={report.control!r} and stays so: `control={control!r}` has no"
            " effect. Start from a dense checkpoint."
        )


def warn_of_other_settings(
    masks: Masks,
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    selects: Iterable[Callable[[pl.LightningModule], Mapping[str, nn.Parameter]]],
    pl_module: pl.LightningModule,
) -> None:
    """Warn if restored masks were found with other settings than those of the callback, since they stay as they are.

    ``then`` has the settings that the checkpoint holds, ``now`` those of the callback. Every function in ``selects``
    returns prunable parameters of the module by name; the masks may be for any of these selections.
    """
    for name in ("schedule", "scope"):
        if name in then and then[name] != now[name]:
            rank_zero_warn(
                f"The checkpoint was pruned with {name}={in_words(then[name])} and stays so:"
                f" `{name}={in_words(now[name])}` has no effect. Start from a dense checkpoint."
            )
    patterns = [name for name in ("include", "exclude") if name not in then or then[name] != now[name]]
    if patterns and not any(is_selection(masks, select, pl_module) for select in selects):
        asked = " and ".join(f"`{name}={now[name]!r}`" for name in patterns)
        rank_zero_warn(
            f"The checkpoint was pruned in {listed(masks)} and stays so: {asked} would select other parameters, and"
            " has no effect. Start from a dense checkpoint."
        )


def other_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str]:
    """Return in words the settings that differ, those of a checkpoint and those of the callback; empty if none does.

    Left out are patterns of what to prune, settings that older checkpoints do not have, and those that are ``None``
    now, which is their default.
    """
    names = [name for name in now if name in then and now[name] is not None and name not in ("include", "exclude")]
    other = [name for name in names if (type(then[name]), then[name]) != (type(now[name]), now[name])]
    before, after = (", ".join(f"{name}={in_words(of[name])}" for name in other) for of in (then, now))
    return before, after


def in_words(setting: object) -> str:
    """Return a setting as a short text: a mapping is saved as a list of pairs, a function as a list of numbers.

    Examples:
        >>> in_words([["a.*", 0.9], ["*", 0.5]]), in_words([0.5, 0.75, 1.0]), in_words("linear")
        ("{'a.*': 0.9, '*': 0.5}", 'a function (0.5, 0.75, 1)', "'linear'")

    """
    if isinstance(setting, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in setting):
        return f"{{{listed(f'{shown(pattern)}: {shown(sparsity)}' for pattern, sparsity in setting)}}}"
    if isinstance(setting, list) and all(isinstance(reached, float) for reached in setting):
        return f"a function ({listed(f'{reached:g}' for reached in setting)})"
    return shown(setting)


def _has_sparsity(masks: Masks, goal: Goal) -> bool:
    """Whether masks have the sparsity of a goal, but for one weight of every parameter, which rounding may take."""
    try:
        groups = goal.groups(masks)
    except ValueError:  # from a parameter without a pattern
        return False
    for group in groups:
        own = Masks({name: masks[name] for name in group.parameters})
        if abs(own.num_kept - own.num_prunable * (1 - group.sparsity)) > len(own):
            return False
    return True


def is_selection(
    masks: Masks,
    select: Callable[[pl.LightningModule], Mapping[str, nn.Parameter]],
    pl_module: pl.LightningModule,
) -> bool:
    """Whether masks are for the parameters that ``select`` returns now, or would return if none were frozen."""
    for context in (nullcontext(), prunable.unfrozen(pl_module)):
        with context, suppress(ValueError):  # from a pattern that matches nothing
            if set(select(pl_module)) == set(masks):
                return True
    return False


def check_selection(
    pruning: Any,
    run: str,
    unit: str,
    select: Callable[[pl.LightningModule], Mapping[str, nn.Parameter]],
    pl_module: pl.LightningModule,
) -> None:
    """Raise if masks from the middle of a ``run`` (in words) are for other parameters than are selected now.

    ``unit`` is what the run calls its rounds.
    """
    if not is_selection(pruning.masks, select, pl_module):
        raise MisconfigurationException(
            f"The checkpoint is from {run} that prunes other parameters than `include={pruning.include}` and"
            f" `exclude={pruning.exclude}` select now: its {unit}s would not continue that run. Resume with the"
            f" settings of the checkpoint, which select: {listed(pruning.masks)}."
        )


def check_belong_together(masks: Masks, report: PruningReport | None) -> None:
    """Raise ValueError if the masks and the report of a checkpoint differ, or one of them is missing."""
    layers = [] if report is None else [(layer.name, layer.shape, layer.num_kept) for layer in report.layers]
    of_masks = [(name, tuple(mask.shape), int(mask.count_nonzero())) for name, mask in masks.items()]
    if layers != of_masks or (report is not None and report.digest != masks.digest()):
        raise ValueError(
            "The masks in the checkpoint are damaged, or do not belong to its report: names, shapes, counts or digest"
            f" differ. {saved_values.REMEDY}"
        )
