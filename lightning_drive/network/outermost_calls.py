"""Hooks on the outermost calls of a network: those of submodules with parameters that no other one of them makes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_drive.core import containers

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


@contextmanager
def recording(module: nn.Module) -> Iterator[list[tuple[str, Arguments | None]]]:
    """Record outermost calls: names of submodules, and what they are given (``None`` under ``no_grad``)."""
    calls: list[tuple[str, Arguments | None]] = []

    def note(name: str, arguments: Arguments) -> Arguments:
        counts = torch.is_grad_enabled()
        calls.append((name, containers.mapped(Tensor.detach, arguments) if counts else None))
        return arguments

    with hooked(module, note, lambda _: None):
        yield calls


@contextmanager
def hooked(
    module: nn.Module,
    before: Callable[[str, Arguments], Arguments],
    after: Callable[[Any], None],
    counts: Iterator[bool] | None = None,
) -> Iterator[None]:
    """Have outermost calls take the arguments that ``before`` returns, and pass what they return to ``after``.

    ``counts`` has for one call after another whether it counts; ``None``: all do. Calls that do not count, and those
    after its end, are left alone.
    """
    running: list[bool] = []  # whether the calls that are under way count

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        running.append(not running and (counts is None or next(counts, False)))
        return before(name, (args, kwargs)) if running[-1] else None

    def leave(output: Any) -> None:
        if running and running.pop():
            after(output)

    handles = []
    for name, submodule in module.named_modules():
        if next(submodule.parameters(), None) is not None and not isinstance(submodule, torch.jit.ScriptModule):
            handles.append(
                submodule.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True
                )
            )
            handles.append(submodule.register_forward_hook(lambda _, args, output: leave(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
