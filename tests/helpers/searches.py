"""A search that leaves the module as it is, with its diagnosis."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_drive.core.arguments import Schedule, Scope
from lightning_drive.core.goal import Goal
from lightning_drive.core.rounds import Round, ScoreHistogram
from lightning_drive.network.costs import Costs
from lightning_drive.network.masks import Masks
from lightning_drive.search.diagnosis import diagnose
from lightning_drive.search.loop import search as search_network
from lightning_drive.search.methods import Method
from lightning_drive.search.scored_network import Network


@dataclass
class Searched:
    """What a search and its diagnosis say."""

    masks: Masks
    rounds: tuple[Round, ...]
    scores: ScoreHistogram | None
    active: Masks | None
    path_error: str | None
    costs: Costs
    warnings: list[str]


def search(
    module: nn.Module,
    method: Method,
    *,
    parameters: Iterable[str],
    sparsity: float,
    schedule: Schedule = "exponential",
    scope: Scope = "global",
    batches: Any = None,
    loss_fn: Any = None,
    example_input: Any = None,
    shuffle: Callable[[Masks], Masks] | None = None,
    **options: Any,
) -> Searched:
    data = {"batches": batches, "loss_fn": loss_fn, "example_input": example_input}
    goal = Goal(sparsity, schedule, scope)
    with Network.of(module, parameters, method.mode, **data) as network:
        found = search_network(network, method, goal, **options)
        if shuffle is not None:
            found = replace(found, masks=shuffle(found.masks))
        diagnosis = diagnose(network, method, goal, found)
    return Searched(
        found.masks,
        found.history.rounds,
        found.history.scores,
        diagnosis.active,
        diagnosis.path_error,
        diagnosis.costs,
        [*found.warnings, *diagnosis.warnings],
    )
