"""Which parameters a Trainer trains: those that its optimizers hold."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_drive.core import shards
from lightning_drive.core.messages import listed
from lightning_drive.network import optimizer_state

_MANY = 0.45
"""The share of zeros in a pruned network: two of four in most of its layers, or more."""

_Select = Callable[[pl.LightningModule], Mapping[str, nn.Parameter]]


def select(trainer: pl.Trainer, pl_module: pl.LightningModule, prunable: _Select) -> dict[str, nn.Parameter]:
    """Select the prunable parameters that are trained; those that no optimizer holds are left out like frozen ones.

    Args:
        trainer: The Trainer, with its optimizers.
        pl_module: Its module.
        prunable: Gives the prunable parameters of the module, by name.

    Raises:
        ValueError: If there are prunable parameters, but no optimizer holds one of them.

    """
    shards.reshard_(pl_module)  # optimizers hold the parts
    others = untrained(trainer, pl_module)
    if not others:
        return dict(prunable(pl_module))
    try:
        with _frozen(others.values()):
            selected = {name: each for name, each in prunable(pl_module).items() if name not in others}
    except ValueError:  # of a selection without any parameter, or of something else that is raised again here
        selected = {name: each for name, each in prunable(pl_module).items() if name not in others}
        if selected:
            raise
    if not selected:
        names = list(prunable(pl_module))
        raise ValueError(
            f"No prunable parameter is trained: {listed(map(repr, _grouped(names, _trained(pl_module, others))))} could"
            " be pruned, but no optimizer of the Trainer has any of it. Give what is to be pruned to an optimizer in"
            " `configure_optimizers`, or select what is trained with `include`."
        )
    return selected


def left_out(trainer: pl.Trainer, pl_module: pl.LightningModule, prunable: _Select) -> str:
    """Say which prunable parameters are left out since no optimizer holds them; empty if there is none.

    Args:
        trainer: The Trainer, with its optimizers.
        pl_module: Its module.
        prunable: Gives the prunable parameters of the module, by name.

    """
    others = untrained(trainer, pl_module)
    names = [name for name, each in others.items() if each.ndim > 1]
    if others:
        with suppress(ValueError):  # of what cannot be pruned, and need not be
            names = [name for name in prunable(pl_module) if name in others]
    if not names:
        return ""
    groups = listed(map(repr, _grouped(names, _trained(pl_module, others))))
    return f"Not trained, and left out of pruning, since no optimizer of the Trainer has it: {groups}."


def untrained(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, but that no optimizer holds; none where that is not known.

    It is not known where no optimizer holds any parameter of the module (manual optimization without
    ``configure_optimizers``), or where one does not show what it holds.

    Args:
        trainer: The Trainer, with its optimizers.
        pl_module: Its module.

    """
    held = [set(_parameters_of(optimizer)) for optimizer in trainer.optimizers]
    known = set().union(*held)
    if not all(held) or known.isdisjoint(pl_module.parameters()):
        return {}
    if not pl_module.automatic_optimization:
        known.update(*map(_parameters_of, _own_optimizers(pl_module)))
    return {
        name: parameter
        for name, parameter in pl_module.named_parameters()
        if parameter.requires_grad and parameter not in known
    }


class Zeros(NamedTuple):
    """How many weights are exactly 0."""

    number: int
    size: int
    are_many: bool
    """Whether it is about half or more of those parameters that are not 0 altogether, as new layers may be."""

    @property
    def share(self) -> float:
        """The fraction of all weights."""
        return self.number / max(1, self.size)


def zeros(parameters: Iterable[Tensor]) -> Zeros:
    """Count the zeros of parameters, or of this rank's parts of them.

    Args:
        parameters: The parameters.

    """
    weights = [shards.local(each.detach()) for each in parameters if each.layout == torch.strided]
    counts = [(each.numel() - int(each.count_nonzero()), each.numel()) for each in weights]
    partly = [(count, size) for count, size in counts if count < size]
    are_many = bool(partly) and sum(count for count, _ in partly) >= _MANY * sum(size for _, size in partly)
    return Zeros(sum(count for count, _ in counts), sum(size for _, size in counts), are_many)


def _parameters_of(optimizer: Any) -> list[Tensor]:
    """Return the parameters of an optimizer, of those that it wraps, or of what only looks like an optimizer."""
    alive = optimizer_state.with_wrapped(optimizer)
    groups = [group for each in alive for group in getattr(each, "param_groups", ())]
    if groups:
        return [parameter for group in groups for parameter in group["params"]]
    return [leaf for leaf in tree_leaves(list(vars(optimizer).values())) if isinstance(leaf, Tensor)]


def _own_optimizers(pl_module: pl.LightningModule) -> list[Any]:
    """Find the optimizers that a module keeps beside those of its Trainer, as manual optimization may step them."""
    values = list(vars(pl_module).values())
    values += [each for value in values if isinstance(value, (list, tuple)) for each in value]
    values += [each for value in values if isinstance(value, dict) for each in value.values()]
    return [value for value in values if isinstance(getattr(value, "param_groups", None), list)]


def _trained(pl_module: pl.LightningModule, others: Mapping[str, nn.Parameter]) -> list[str]:
    return [name for name, each in pl_module.named_parameters() if each.requires_grad and name not in others]


def _grouped(names: Iterable[str], apart_from: Iterable[str]) -> list[str]:
    """Name parameters by patterns of whole submodules, where these have none of the others.

    Example:
        >>> _grouped(["a.0.weight", "a.1.weight", "b.0.weight"], ["b.1.weight"])
        ['a.*', 'b.0.*']

    """
    taken = {prefix for name in apart_from for prefix in _prefixes(name)}
    patterns = (next((f"{prefix}.*" for prefix in _prefixes(name) if prefix not in taken), name) for name in names)
    return list(dict.fromkeys(patterns))


def _prefixes(name: str) -> list[str]:
    """Name the submodules around a parameter, the outermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: index + 1]) for index in range(len(parts))]


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Generator[None]:
    """Let parameters not require a gradient inside."""
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True
