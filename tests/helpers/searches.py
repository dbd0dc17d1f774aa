"""A search that leaves the module as it is, with its diagnosis."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_drive.core.goal import Goal
from lightning_drive.search.diagnosis import Diagnosis, diagnose
from lightning_drive.search.loop import Found
from lightning_drive.search.loop import search as search_network
from lightning_drive.search.methods import Method
from lightning_drive.search.scored_network import Network


def search(
    module: nn.Module,
    method: Method,
    goal: Goal,
    names: Sequence[str],
    *,
    masks: Mapping[str, Tensor] | None = None,
    only_round: int | None = None,
    **data: Any,
) -> tuple[Found, Diagnosis]:
    data = {"batches": None, "loss_fn": None, "example_input": None, **data}
    with Network.of(module, names, method.mode, **data) as network:
        found = search_network(network, method, goal, masks=masks, only_round=only_round)
        return found, diagnose(network, method, goal, found)
