"""Costs of networks of any kind, measured on a replica as a search does."""

from collections.abc import Collection
from typing import Any

from torch import nn

from lightning_drive.network import costs, prunable
from lightning_drive.network.costs import Costs
from lightning_drive.network.undisturbed import undisturbed


def measure(module: nn.Module, example_input: Any, names: Collection[str] | None = None, **masks: Any) -> Costs:
    """Measure what the parameters of these names cost, or those that are prunable by default."""
    names = prunable.prunable_parameters(module) if names is None else names
    with undisturbed(module, "eval") as scored:
        parameters = dict(scored.module.named_parameters())
        return costs.measure(scored.module, {name: parameters[name] for name in names}, example_input, **masks)
