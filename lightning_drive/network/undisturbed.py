"""Score a module without leaving a trace: on a replica of it, under settings that are put back."""

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_drive.core import bits, shards
from lightning_drive.core.arguments import Mode
from lightning_drive.core.messages import listed
from lightning_drive.network.module_state import is_expanded, preserved_state
from lightning_drive.network.replica import Replica
from lightning_drive.network.scoring_settings import Settings
from lightning_drive.network.without_dropout import NoDropout, in_mode


class Scored(NamedTuple):
    """A module to score in place of another one."""

    module: nn.Module
    of: Callable[[Any], Any]
    """Returns the counterpart of an object that refers to the module, such as a function that holds it."""


@contextmanager
def undisturbed(
    module: nn.Module, mode: Mode = "train", known: Mapping[int, object] | None = None
) -> Generator[Scored]:
    """Yield a replica of a module to score, with all settings of this thread as scoring needs them.

    The module is only read, so whoever saves, copies or interrupts meanwhile finds what was there before. The replica
    has no gradients, its parameters and buffers are held in float32 or more, Dropout is off, what ``torch.compile``
    compiled runs as plain Python (or it would be compiled again for scoring), and it is in ``mode``: ``"train"``
    normalises by the statistics of the batch in BatchNorm, ``"eval"`` by running ones. A module that is already
    training keeps the flags of its submodules in ``"train"``, so a frozen part (``.eval()``) stays frozen. Gradients
    are enabled and autocast is off. Put back afterwards: these settings, and the random state of torch (CPU and CUDA),
    numpy and Python. ``known`` is that of :class:`~lightning_drive.network.replica.Replica`.

    Parameters that are split over ranks (FSDP2) cannot be copied so. Such a module is scored itself, in its own
    precision, and its parameters, gradients, buffers, modes and attributes are put back.

    Raise a ``RuntimeError`` if a parameter is not the same object with the same bits afterwards: an error of this
    package.
    """
    device_types = {parameter.device.type for parameter in module.parameters()} | {"cpu"}
    settings = Settings([kind for kind in device_types if torch.amp.is_autocast_available(kind)])
    before = _fingerprint(module)
    try:
        try:
            settings.change()
            if any(map(shards.is_sharded, module.parameters())):
                with preserved_state(module), in_mode(module, mode), NoDropout():
                    yield Scored(module, lambda value: value)
            else:
                replica = Replica(module, _scorable, known)
                with in_mode(replica.module, mode), NoDropout():
                    yield Scored(replica.module, replica.of)
        finally:
            settings.put_back()
    finally:
        settings.put_back()  # once more, should an interrupt have cut it short
    _check_same(before, _fingerprint(module))


def _scorable(name: str, value: Tensor) -> Tensor:
    """Copy a parameter or buffer for the replica, to float32 if its precision is lower."""
    if torch.nn.parameter.is_lazy(value) or type(value) not in (nn.Parameter, Tensor, nn.Buffer):
        return copy.deepcopy(value)
    if value.layout == torch.strided and is_expanded(value):
        return value
    twin = value.detach()
    is_promoted = twin.is_floating_point() and twin.itemsize > 1  # float8 is a way to store numbers
    dtype = torch.promote_types(twin.dtype, torch.float32) if is_promoted else twin.dtype
    twin = twin.clone() if dtype == twin.dtype else twin.to(dtype)
    if not isinstance(value, nn.Parameter):
        return twin
    parameter = nn.Parameter(twin, requires_grad=value.requires_grad)
    vars(parameter).update(vars(value))
    return parameter


def _fingerprint(module: nn.Module) -> dict[str, tuple[int, Tensor | None]]:
    """Return the identity of every parameter by name, and the sum of its bits if they can be read."""
    fingerprint: dict[str, tuple[int, Tensor | None]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        value = shards.local(parameter.detach())
        has_bits = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta
        integers = bits.INTEGERS.get(value.itemsize) if has_bits else None
        fingerprint[name] = id(parameter), value.view(integers).sum(dtype=torch.int64) if integers else None
    return fingerprint


def _check_same(before: dict[str, tuple[int, Tensor | None]], now: dict[str, tuple[int, Tensor | None]]) -> None:
    """Raise if parameters were added, removed or replaced, or else if the bits of one are other ones."""
    changed = sorted(name for name in before | now if before.get(name, ())[:1] != now.get(name, ())[:1])
    if not changed:
        sums = ((name, then, now[name][1]) for name, (_, then) in before.items())
        changed = [name for name, then, after in sums if then is not None and not torch.equal(then, after)]  # type: ignore[arg-type]
    if changed:
        raise RuntimeError(
            f"Scoring must leave the module as it was, but {listed(map(repr, changed))} is another parameter or has"
            " other values now. Either something else wrote to it meanwhile (another thread, a signal handler, a"
            " `loss_fn` that holds the module by a global name), or this is an error of lightning_drive: please report"
            " it. Do not go on with these weights."
        )
