"""The command ``lightning-drive plan``."""

import ast
import inspect
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import lightning_drive
from lightning_drive.command_imports import module_at, object_at


def plan(
    module: str,
    callback: str,
    sparsity: Sequence[str],
    settings: Sequence[str],
    max_epochs: int | None,
    steps_per_epoch: int | None,
) -> None:
    """Print the plan of a callback, given by the name of its class, for a module, given by its path."""
    make: Any = getattr(lightning_drive, callback)
    others = [name for name in inspect.signature(make).parameters if name != "sparsity"]
    pruning = make(sparsity=_sparsity(sparsity), **dict(_setting(text, callback, others) for text in settings))
    print(pruning.plan(module_at(module), max_epochs=max_epochs, steps_per_epoch=steps_per_epoch))


def _sparsity(texts: Sequence[str]) -> float | dict[str, float]:
    """Return the number in a text such as ``0.9``, or the mapping in texts such as ``encoder.*=0.9``."""
    pairs = [text.rpartition("=") for text in texts]
    sparsity = {pattern: number for pattern, _, number in pairs}
    try:
        if len(pairs) == 1 and not pairs[0][1]:
            return float(texts[0])
        if all(pattern for pattern, *_ in pairs) and len(sparsity) == len(pairs):
            return {pattern: float(number) for pattern, number in sparsity.items()}
    except ValueError:  # from a word for a number
        pass
    raise ValueError(
        "`--sparsity` takes one FRACTION, such as 0.98, or PATTERN=FRACTION, such as 'encoder.*=0.9' and '*=0.5', once"
        f" for every pattern, got {' and '.join(map(repr, texts))}."
    )


def _setting(text: str, callback: str, known: Sequence[str]) -> tuple[str, Any]:
    """Return the name and the value in a text such as ``rounds=50``."""
    name, is_given, value = text.partition("=")
    if not is_given or not name.isidentifier():
        raise ValueError(f"`--set` takes NAME=VALUE, such as rounds=50, got {text!r}.")
    if name not in known:
        meant = "".join(f" Did you mean {close!r}?" for close in get_close_matches(name, known, n=1))
        raise ValueError(
            f"`--set {text}`: {callback} has no such argument.{meant} Apart from the sparsity: {', '.join(known)}."
        )
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a word, such as layerwise
        return name, object_at(value) if re.fullmatch(r"[\w.]+:[\w.]+", value) else value
