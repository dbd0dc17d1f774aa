"""A search that leaves the module alone, for tests of `finding.search`, which does not."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_drive import finding
from lightning_drive.finding import Found
from lightning_drive.methods import Method
from lightning_drive.undisturbed import undisturbed


def search(module: nn.Module, method: Method, *, parameters: Iterable[str], **settings: Any) -> Found:
    with undisturbed(module, method.mode) as (scored, _):
        chosen = finding.parameters_by_name(scored, parameters)
        return finding.search(scored, method, parameters=chosen, **settings)
