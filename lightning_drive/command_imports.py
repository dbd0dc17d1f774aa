"""Import of torch modules and functions by name for the command, also from the folder that it is called in."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lightning_drive.core.messages import shown_error


def module_at(path: str) -> nn.Module:
    """Return the torch module with a path such as ``torchvision.models:resnet18``, or what a function there returns."""
    if not all(path.partition(":")):
        raise ValueError(f"MODULE must be PACKAGE.MODULE:NAME, such as torchvision.models:resnet18, got {path!r}.")
    module = object_at(path)
    if not isinstance(module, nn.Module) and callable(module):
        module = _called(module, path)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{path!r} must be a torch module or return one, got {type(module).__name__}.")
    return module


def object_at(path: str) -> Any:
    """Return what is at a path, PACKAGE.MODULE:NAME."""
    package, _, name = path.partition(":")
    try:
        with current_folder():
            found: Any = importlib.import_module(package)
            for part in name.split("."):
                found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}.") from error
    except Exception as error:  # raised by the user's own code
        raise ValueError(f"{path!r} cannot be imported: {shown_error(error)}.") from error
    return found


@contextmanager
def current_folder() -> Iterator[None]:
    """Import modules also from the current folder, inside of this context."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _called(make: Callable[[], Any], path: str) -> Any:
    """Return what a function or class returns without arguments; raise if it needs some, or fails."""
    _check_call(make, path)
    try:
        with current_folder():
            return make()
    except Exception as error:
        raise ValueError(f"{path!r} cannot be called: {shown_error(error)}.") from error


def _check_call(make: Callable[..., Any], path: str) -> None:
    """Raise if a function or class cannot be called without arguments."""
    try:
        signature = inspect.signature(make)
    except ValueError:  # written in C
        return
    try:
        signature.bind()
    except TypeError as error:
        raise TypeError(
            f"{path!r} needs arguments ({error}). Name a module that is made already, or a function without arguments"
            " that returns one."
        ) from error
