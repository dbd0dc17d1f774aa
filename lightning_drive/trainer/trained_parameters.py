"""Select the parameters that a Trainer trains: those that its optimizers hold."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_drive.core import shards
from lightning_drive.core.messages import listed
from lightning_drive.network import optimizer_state

_Select: TypeAlias = Callable[[pl.LightningModule], Mapping[str, nn.Parameter]]
"""Returns the prunable parameters of a module, by name."""


def select(trainer: pl.Trainer, pl_module: pl.LightningModule, prunable: _Select) -> dict[str, nn.Parameter]:
    """Select the prunable parameters that are trained; those that no optimizer holds are left out like frozen ones.

    Raise a ``ValueError`` if there are prunable parameters, but no optimizer holds one of them.
    """
    shards.reshard_(pl_module)  # optimizers hold the parts
    others = untrained(trainer, pl_module)
    if not others:
        return dict(prunable(pl_module))
    try:
        with _frozen(others.values()):
            selected = _without(others, prunable(pl_module))
    except ValueError:  # of a selection without any parameter, or of something else that is raised again here
        selected = _without(others, prunable(pl_module))
        if selected:
            raise
    if not selected:
        names = _patterns(prunable(pl_module), _trained(pl_module, others))
        raise ValueError(
            f"No prunable parameter is trained: {listed(map(repr, names))} could be pruned, but no optimizer of the"
            " Trainer holds any of them. Pass them to an optimizer in `configure_optimizers`, or select trained"
            " parameters with `include`."
        )
    return selected


def left_out(trainer: pl.Trainer, pl_module: pl.LightningModule, prunable: _Select) -> str:
    """Return a message that names the prunable parameters that no optimizer holds; empty if there is none."""
    others = untrained(trainer, pl_module)
    names = [name for name, parameter in others.items() if parameter.ndim > 1]
    if others:
        with suppress(ValueError):  # from parameters that cannot be pruned, and need not be
            names = [name for name in prunable(pl_module) if name in others]
    if not names:
        return ""
    patterns = listed(map(repr, _patterns(names, _trained(pl_module, others))))
    return f"Left out of pruning, since they are not trained: no optimizer of the Trainer holds {patterns}."


def untrained(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, but that no optimizer holds; none where that is not known.

    It is not known where no optimizer holds any parameter of the module (manual optimization without
    ``configure_optimizers``), or where one does not show what it holds.
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


def _parameters_of(optimizer: Any) -> list[Tensor]:
    """Return the parameters of an optimizer, of those that it wraps, or of what only looks like an optimizer."""
    optimizers = optimizer_state.with_wrapped(optimizer)
    groups = [group for inner in optimizers for group in getattr(inner, "param_groups", ())]
    if groups:
        return [parameter for group in groups for parameter in group["params"]]
    return [leaf for leaf in tree_leaves(list(vars(optimizer).values())) if isinstance(leaf, Tensor)]


def _own_optimizers(pl_module: pl.LightningModule) -> list[Any]:
    """Find the optimizers that a module keeps besides those of its Trainer, as manual optimization may step them."""
    values = list(vars(pl_module).values())
    values += [item for value in values if isinstance(value, (list, tuple)) for item in value]
    values += [item for value in values if isinstance(value, dict) for item in value.values()]
    return [value for value in values if isinstance(getattr(value, "param_groups", None), list)]


def _without(others: Mapping[str, nn.Parameter], parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in parameters.items() if name not in others}


def _trained(pl_module: pl.LightningModule, others: Mapping[str, nn.Parameter]) -> list[str]:
    return [name for name, value in pl_module.named_parameters() if value.requires_grad and name not in others]


def _patterns(names: Iterable[str], apart_from: Iterable[str]) -> list[str]:
    """Name parameters by patterns of whole submodules, where these have none of the others.

    Examples:
        >>> _patterns(["a.0.weight", "a.1.weight", "b.0.weight"], ["b.1.weight"])
        ['a.*', 'b.0.*']

    """
    taken = {prefix for name in apart_from for prefix in _prefixes(name)}
    patterns = (next((f"{prefix}.*" for prefix in _prefixes(name) if prefix not in taken), name) for name in names)
    return list(dict.fromkeys(patterns))


def _prefixes(name: str) -> list[str]:
    """Return the paths of the submodules around a parameter, the outermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: index + 1]) for index in range(len(parts))]


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Generator[None]:
    """Let parameters require no gradient inside."""
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True
