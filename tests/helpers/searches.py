"""A search that leaves the module alone, for tests of `finding.search`, which does not."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_drive.network import prunable
from lightning_drive.network.undisturbed import undisturbed
from lightning_drive.search import loop
from lightning_drive.search.loop import Found
from lightning_drive.search.methods import Method


def search(module: nn.Module, method: Method, *, parameters: Iterable[str], **settings: Any) -> Found:
    with undisturbed(module, method.mode) as (scored, _):
        chosen = prunable.parameters_by_name(scored, parameters)
        return loop.search(scored, method, parameters=chosen, **settings)
