"""Modules that users give to make another one of: what cannot be changed, copies, and how to run them."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_drive.core import containers, shards, tensor_kinds
from lightning_drive.core.messages import listed
from lightning_drive.network.random_state import preserved_rng


def check(module: nn.Module, example_input: Any, verb: str) -> None:
    """Raise if no other module can be made of a module on an example; ``verb`` says what is to be done with it."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a torch module, got {type(module).__name__}.")
    for name, part in module.named_modules():
        place = f"`module.{name}`" if name else "`module`"
        if hasattr(part, "_orig_mod"):
            raise TypeError(f"{place} is compiled. {verb} what was compiled, its `_orig_mod`, and compile the result.")
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(f"{place} is scripted, which cannot be changed. {verb} it first, and script the result.")
        if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise TypeError(f"{place} is wrapped for several devices. {verb} what it wraps, its `module`.")
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(value):
            raise ValueError(f"{name!r} has no shape yet. Let the module see a batch first.")
        if shards.is_sharded(value):
            raise ValueError(
                f"{name!r} is split over ranks. Load the joined weights into a plain module, and {verb.lower()} that."
            )
        if value.is_meta:
            raise ValueError(f"{name!r} is on the meta device and has no values. Load the weights first.")
        if tensor_kinds.is_own_kind(value):
            raise TypeError(
                f"{name!r} is {tensor_kinds.described(value)}, whose numbers cannot be taken out. {verb} the"
                " module before its weights are quantised or converted."
            )
    if not any(parameter.is_floating_point() for parameter in module.parameters()):
        raise ValueError("`module` must have parameters, and has none.")
    tensors = containers.leaves(example_input)
    if not tensors:
        raise ValueError(f"`example_input` must hold a tensor, got {type(example_input).__name__}.")
    devices = {parameter.device for parameter in module.parameters()}
    apart = {tensor.device for tensor in tensors} - devices
    if apart:
        raise ValueError(
            f"`example_input` must be on the module's device, {listed(sorted(map(str, devices)))}, got"
            f" {listed(sorted(map(str, apart)))}. Move one of them with `to`."
        )


def copied(module: nn.Module) -> nn.Module:
    """Copy a module, without the Trainer that a LightningModule may be attached to."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name in ("_trainer", "_fabric"):
            attached = vars(part).get(name)
            if attached is not None:
                memo[id(attached)] = None
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ValueError(
            f"The module must be one that `copy.deepcopy` can copy, and is not: {error} Remove such attributes first."
        ) from error


@contextmanager
def undisturbed_run(example_input: Any) -> Iterator[None]:
    """Switch autocast off where the example is, and put random states back afterwards."""
    with preserved_rng(), ExitStack() as stack:
        for device in {leaf.device.type for leaf in containers.leaves(example_input)} | {"cpu"}:
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def has_hooks(layer: nn.Module) -> bool:
    """Whether a forward pass of a layer does more than its class says: by hooks, or a ``forward`` of its own."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
