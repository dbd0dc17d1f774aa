"""Methods from outside the package: those that the documentation builds, taken from its page, and some more."""

import ast
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def on_page(name: str) -> Any:
    """Return a class from the page on adding a method."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in ast.parse(block).body]
    wanted = (ast.Import, ast.ImportFrom, ast.ClassDef)
    body: list[ast.stmt] = [line for line in lines if isinstance(line, wanted)]
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile(ast.Module(body, type_ignores=[]), str(PAGE), "exec"), namespace)
    return namespace[name]


class LossGradients:
    """The size of gradients that are taken from the loss; no average is asked for."""

    rounds = 2
    mode = "eval"
    reads = "loss"

    def score(self, network: Any) -> dict[str, Tensor]:
        weights = network.weights
        [batch] = network.batches(1)
        gradients = torch.autograd.grad(network.loss(batch), [*weights.values()], materialize_grads=True)
        return {name: gradient.abs() for name, gradient in zip(weights, gradients, strict=True)}


class FailsOnRank(LossGradients):
    """Fails on one rank, outside all that the package calls, before the others wait for it in a mean."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def score(self, network: Any) -> dict[str, Tensor]:
        if network.ranks.index == self.rank:
            raise ZeroDivisionError("on purpose")
        scores = super().score(network)
        return dict(zip(scores, network.mean(scores.values()), strict=True))
