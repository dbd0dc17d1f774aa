"""The state of a module that scoring changes, and the return to it, for modules that cannot be copied."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.core import shards


@contextmanager
def preserved_state(module: nn.Module) -> Generator[None]:
    """Put parameters, gradients, buffers and attributes of a module back on exit."""
    with _preserved_attributes(module), _preserved_gradients(module), _preserved_values(module):
        yield


@contextmanager
def _preserved_gradients(module: nn.Module) -> Generator[None]:
    """Put every ``.grad`` aside, and the hooks that act on one as soon as it is there, such as an optimizer's."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    hooks = [parameter._post_accumulate_grad_hooks for parameter in module.parameters()]
    put_aside = [(hook, dict(hook)) for hook in hooks if hook]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        for hook, _ in put_aside:
            hook.clear()
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for hook, registered in put_aside:
            hook.update(registered)


@contextmanager
def _preserved_values(module: nn.Module) -> Generator[None]:
    """Put back the values of parameters and buffers, and which buffers there are."""
    parameters = [(one, one.data, shards.local(one.data).clone()) for one in module.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers() if not is_expanded(buffer)]
    owners = [(submodule._buffers, dict(submodule._buffers)) for submodule in module.modules()]
    try:
        yield
    finally:
        for parameter, storage, value in parameters:
            parameter.data = storage
            shards.local(parameter.data).copy_(value)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for now, before in owners:
            now.clear()
            now.update(before)


@contextmanager
def _preserved_attributes(module: nn.Module) -> Generator[None]:
    """Put back plain attributes of all submodules, in place, so that states that some share stay shared."""
    own = ("_parameters", "_buffers", "_modules")  # which FSDP2 changes as it gathers and frees parameters
    restores = [
        _restore_later(vars(submodule), {name: value for name, value in vars(submodule).items() if name not in own})
        for submodule in module.modules()
    ]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _restore_later(attributes: dict[str, Any], before: dict[str, Any]) -> Callable[[], None]:
    """Return a function that puts back what some attributes hold now, and removes attributes that are new by then."""
    kept = attributes.keys() - before.keys()
    tensors = [(value, value.detach().clone()) for value in before.values() if isinstance(value, Tensor)]
    lists = [(value, list(value)) for value in before.values() if isinstance(value, list)]
    # `MetricCollection` keeps its compute groups as a dict of lists
    dicts = [
        (value, {key: list(entry) if isinstance(entry, list) else entry for key, entry in value.items()})
        for value in before.values()
        if type(value) is dict
    ]

    def restore() -> None:
        for name in attributes.keys() - kept - before.keys():
            del attributes[name]
        attributes.update(before)
        with torch.no_grad():
            for tensor, saved in tensors:
                tensor.copy_(saved)
        for sequence, items in lists:
            sequence[:] = items
        for mapping, entries in dicts:
            mapping.clear()
            mapping.update(entries)

    return restore


def is_expanded(tensor: Tensor) -> bool:
    """Whether entries share memory (``expand``), so that the tensor cannot be written to."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
