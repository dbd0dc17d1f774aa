"""The command ``lightning-drive plan``."""

import ast
import inspect
from collections.abc import Sequence
from typing import Any

import lightning_drive
from lightning_drive.command_imports import module_at


def plan(
    module: str,
    callback: str,
    sparsity: float,
    settings: Sequence[str],
    max_epochs: int | None,
    steps_per_epoch: int | None,
) -> None:
    """Print the plan of a callback, given by the name of its class, for a module, given by its path."""
    make: Any = getattr(lightning_drive, callback)
    others = [name for name in inspect.signature(make).parameters if name != "sparsity"]
    pruning = make(sparsity=sparsity, **dict(_setting(text, callback, others) for text in settings))
    print(pruning.plan(module_at(module), max_epochs=max_epochs, steps_per_epoch=steps_per_epoch))


def _setting(text: str, callback: str, known: Sequence[str]) -> tuple[str, Any]:
    """Return the name and the value in a text such as ``rounds=50``."""
    name, is_given, value = text.partition("=")
    if not is_given or not name.isidentifier():
        raise ValueError(f"`--set` takes NAME=VALUE, such as rounds=50, got {text!r}.")
    if name not in known:
        raise ValueError(
            f"`--set {text}`: {callback} has no such argument. Apart from the sparsity: {', '.join(known)}."
        )
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word, such as layerwise
