"""Layers that a finetuning callback keeps frozen for a while, and that may be pruned or left out for it."""

from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning

from lightning_drive.core.messages import listed
from lightning_drive.network import prunable, sparsity_groups
from lightning_drive.trainer import other_callbacks


def check_groups(pruning: Any, trainer: pl.Trainer, pl_module: pl.LightningModule, selected: Iterable[str]) -> None:
    """Raise if a parameter has no pattern in ``sparsity`` that is selected, or may be once a callback unfreezes it."""
    names = dict.fromkeys(selected)
    if any(isinstance(other, BaseFinetuning) for other in other_callbacks.callbacks_of(trainer)):
        with prunable.unfrozen(pl_module), suppress(ValueError):  # from what need not be prunable while it is frozen
            names |= dict.fromkeys(pruning.prunable_parameters(pl_module))
    sparsity_groups.check(pruning._goal, pl_module, names, pruning.prunable_parameters)


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
