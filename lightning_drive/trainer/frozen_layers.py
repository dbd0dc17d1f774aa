"""Layers that a finetuning callback keeps frozen for a while, and that may be pruned or left out for it."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from lightning_drive.core.messages import listed
from lightning_drive.network import prunable
from lightning_drive.trainer import other_callbacks


def with_frozen(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    selected: Iterable[str],
    select: Callable[[pl.LightningModule], Mapping[str, nn.Parameter]],
) -> list[str]:
    """Return the names of what is selected, and of what ``select`` returns once a finetuning callback unfreezes it."""
    names = dict.fromkeys(selected)
    if any(isinstance(other, BaseFinetuning) for other in other_callbacks.callbacks_of(trainer)):
        with prunable.unfrozen(pl_module), suppress(ValueError):  # from what need not be prunable while it is frozen
            names |= dict.fromkeys(select(pl_module))
    return [*names]


def warnings(
    pruning: Any, trainer: pl.Trainer, pl_module: pl.LightningModule, pruned: Container[str], setting: str, value: int
) -> Iterator[str]:
    """Yield a warning for every finetuning callback that keeps layers frozen that a pruning callback would prune.

    ``pruned`` has the names of parameters that it prunes all the same; ``setting`` and ``value`` are name and value of
    its argument that decides when.
    """
    for other in other_callbacks.callbacks_of(trainer):
        if isinstance(other, BaseFinetuning):
            known = [*pruning.prunable_parameters(pl_module)]
            named = pl_module.named_parameters()
            before = {name for name, parameter in named if not parameter.requires_grad}
            with prunable.unfrozen(pl_module):
                candidates = [name for name in pruning.prunable_parameters(pl_module) if name in before]
            frozen = [name for name in candidates if name not in pruned and name not in known]
            if frozen:
                unit = "epoch" if "epoch" in setting else "step"
                yield (
                    f"{listed(map(repr, frozen))} were not pruned, since {type(other).__name__} froze them, and stay"
                    f" dense when they are unfrozen. Set `{setting}` to more than the {unit} in which that happens, got"
                    f" {value}, or name them in `exclude` if they are to stay dense."
                )
