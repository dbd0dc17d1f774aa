"""A module to score, of which the module itself never notices: a replica, under settings that are put back."""

import copy
import random
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_drive.core import bits, shards
from lightning_drive.core.arguments import Mode
from lightning_drive.core.function_modes import FunctionMode
from lightning_drive.core.messages import listed
from lightning_drive.network.replica import Replica

_DROPOUTS = {
    *("dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_dropout_"),
    *("feature_alpha_dropout", "feature_alpha_dropout_", "dropout1d", "dropout2d", "dropout3d"),
}

_RECURRENT = {nn.LSTM, nn.GRU, nn.RNN}

_DROPOUT_ARGUMENTS = {
    "multi_head_attention_forward": (13, "training", False),
    "scaled_dot_product_attention": (4, "dropout_p", 0.0),
}
"""Function to the position, name and off value of the argument that controls its dropout."""


class Scored(NamedTuple):
    """What to score in place of a module."""

    module: nn.Module
    of: Callable[[Any], Any]
    """Returns what stands for an object that refers to the module, such as a function that holds it."""


@contextmanager
def undisturbed(
    module: nn.Module, mode: Mode = "train", known: Mapping[int, object] | None = None
) -> Generator[Scored]:
    """Score a replica of a module, with all the settings of this thread as scoring wants them.

    The module is only read, so whoever saves, copies or interrupts meanwhile finds what was there before. The replica
    has no gradients, its parameters and buffers are held in float32 or more, Dropout is off, what ``torch.compile``
    compiled runs as plain Python (or it would be compiled again for scoring), and it is in ``mode``. Gradients are
    enabled and autocast is off. Put back afterwards: these settings, and the random state of torch (CPU and CUDA),
    numpy and Python.

    Parameters that are split over ranks (FSDP2) cannot be copied so. Such a module is scored itself, in its own
    precision, and its parameters, gradients, buffers, modes and attributes are put back.

    Args:
        module: The module.
        mode: ``"train"``: batch statistics in BatchNorm. A module that is already training keeps the flags of its
            submodules, so what was frozen with ``.eval()`` stays frozen. ``"eval"``: running statistics.
        known: See :class:`~lightning_drive.network.replica.Replica`.

    Raises:
        RuntimeError: If a parameter is not the same object with the same bits afterwards: an error of this package.

    """
    device_types = {parameter.device.type for parameter in module.parameters()} | {"cpu"}
    settings = _Settings([each for each in device_types if torch.amp.is_autocast_available(each)])
    before = _fingerprint(module)
    try:
        try:
            settings.change()
            if any(map(shards.is_sharded, module.parameters())):
                with _put_back(module), in_mode(module, mode), _NoDropout():
                    yield Scored(module, _itself)
            else:
                replica = Replica(module, _scorable, known)
                with in_mode(replica.module, mode), _NoDropout():
                    yield Scored(replica.module, replica.of)
        finally:
            settings.put_back()
    finally:
        settings.put_back()  # once more, should an interrupt have cut it short
    _check_same(before, _fingerprint(module))


@contextmanager
def preserved_rng() -> Generator[None]:
    """Put the random state of torch (CPU and CUDA), numpy and Python back on exit."""
    state = _RandomState()
    try:
        try:
            yield
        finally:
            state.put_back()
    finally:
        state.put_back()  # once more, should an interrupt have cut it short


@contextmanager
def in_mode(module: nn.Module, mode: Mode) -> Generator[None]:
    """Set train or eval mode, without Dropout, and put every flag back.

    Args:
        module: The module.
        mode: As in :func:`undisturbed`.

    """
    training = {submodule: submodule.training for submodule in module.modules()}
    dropout = {submodule: submodule.dropout for submodule in module.modules() if isinstance(submodule, nn.RNNBase)}
    try:
        if mode == "eval" or not module.training:
            module.train(mode == "train")
        for submodule in module.modules():
            if isinstance(submodule, _DropoutNd):
                submodule.training = False
        for recurrent in dropout:
            recurrent.dropout = 0.0
            if type(recurrent) in _RECURRENT:  # without dropout the flag changes nothing, but cuDNN needs it backwards
                recurrent.training = True
        yield
    finally:
        for submodule, flag in training.items():
            submodule.training = flag
        for recurrent, probability in dropout.items():
            recurrent.dropout = probability


def is_expanded(tensor: Tensor) -> bool:
    """Whether entries share memory (``expand``), so that the tensor cannot be written to.

    Args:
        tensor: Any strided tensor.

    """
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _itself(value: Any) -> Any:
    return value


# What the copy has in place of parameters and buffers.


def _scorable(name: str, value: Tensor) -> Tensor:
    """Copy a parameter or buffer, to float32 if its precision is lower."""
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


def _fingerprint(module: nn.Module) -> list[tuple[str, int, Tensor | None]]:
    """Note which parameters a module has, and a sum of their bits."""
    found: list[tuple[str, int, Tensor | None]] = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        value = shards.local(parameter.detach())
        has_bits = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta
        integers = bits.INTEGERS.get(value.itemsize) if has_bits else None
        found.append((name, id(parameter), value.view(integers).sum(dtype=torch.int64) if integers else None))
    return found


def _check_same(before: list[tuple[str, int, Tensor | None]], now: list[tuple[str, int, Tensor | None]]) -> None:
    if [each[:2] for each in before] != [each[:2] for each in now]:
        changed = sorted({name for name, _ in {each[:2] for each in before} ^ {each[:2] for each in now}})
    else:
        pairs = zip(before, now, strict=True)
        changed = [name for (name, _, was), (_, _, is_) in pairs if was is not None and not torch.equal(was, is_)]  # type: ignore[arg-type]
    if changed:
        raise RuntimeError(
            f"Scoring must leave the module as it was, but {listed(map(repr, changed))} is another parameter or has"
            " other values now. Either something else wrote to it meanwhile (another thread, a signal handler, a"
            " `loss_fn` that holds the module by a global name), or this is an error of lightning_drive: please report"
            " it. Do not go on with these weights."
        )


# Settings of the thread and of the process.


class _RandomState:
    """The random state of torch (CPU and CUDA), numpy and Python when this was made."""

    def __init__(self) -> None:
        self._numpy = sys.modules.get("numpy")  # never imported for this alone
        self._states = random.getstate(), self._numpy and self._numpy.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def put_back(self) -> None:
        """Put it back; doing it twice does no harm."""
        random.setstate(self._states[0])
        if self._numpy:
            self._numpy.random.set_state(self._states[1])
        torch.set_rng_state(self._states[2])
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)


class _Settings:
    """The settings that scoring changes, as they were when this was made; reading them changes nothing."""

    def __init__(self, device_types: list[str]) -> None:
        self._random = _RandomState()
        self._grad = torch.is_grad_enabled()
        self._autocast = {each: torch.is_autocast_enabled(each) for each in device_types}
        self._modes = torch._C._len_torch_function_stack()

    def change(self) -> None:
        _PLAIN_PYTHON.enter(self)
        torch.set_grad_enabled(True)
        for device_type in self._autocast:
            torch.set_autocast_enabled(device_type, False)

    def put_back(self) -> None:
        """Put the settings back; doing it twice does no harm."""
        while torch._C._len_torch_function_stack() > self._modes:  # an interrupt kept one from leaving
            torch._C._pop_torch_function_stack()
        for device_type, is_on in self._autocast.items():
            torch.set_autocast_enabled(device_type, is_on)
        torch.set_grad_enabled(self._grad)
        _PLAIN_PYTHON.leave(self)
        self._random.put_back()


class _PlainPython:
    """Has compiled functions run as plain Python, which holds for all threads, until the last search has left."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._searches: set[object] = set()
        self._stance: Any = None

    def enter(self, search: object) -> None:
        if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
            return  # nothing was compiled without the one (a second to import), torch 2.5 lacks the other
        with self._lock:
            self._searches.add(search)
            if self._stance is None:
                self._stance = torch.compiler.set_stance("force_eager")

    def leave(self, search: object) -> None:
        with self._lock:
            self._searches.discard(search)
            if not self._searches and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_PLAIN_PYTHON = _PlainPython()


class _NoDropout(FunctionMode):
    """Turns off dropout that is called as a function, where no ``training`` flag of a Dropout layer reaches."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name in _DROPOUT_ARGUMENTS:
            position, argument, off = _DROPOUT_ARGUMENTS[name]
            if len(args) > position:
                args = (*args[:position], off, *args[position + 1 :])
            else:
                kwargs = {**kwargs, argument: off}
        return func(*args, **kwargs)


# Modules that are scored themselves, since their parameters are split over ranks.


@contextmanager
def _put_back(module: nn.Module) -> Generator[None]:
    """Put everything back that scoring changes in a module."""
    with _preserved_attributes(module), _preserved_gradients(module), _preserved_values(module):
        yield


@contextmanager
def _preserved_gradients(module: nn.Module) -> Generator[None]:
    """Park every ``.grad``, and the hooks that act on one as soon as it is there, such as an optimizer's."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    hooks = [parameter._post_accumulate_grad_hooks for parameter in module.parameters()]
    parked = [(hook, dict(hook)) for hook in hooks if hook]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        for hook, _ in parked:
            hook.clear()
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for hook, registered in parked:
            hook.update(registered)


@contextmanager
def _preserved_values(module: nn.Module) -> Generator[None]:
    """Put back the values of parameters and buffers, and which buffers there are."""
    parameters = [(each, each.data, shards.local(each.data).clone()) for each in module.parameters()]
    buffers = [(each, each.detach().clone()) for each in module.buffers() if not is_expanded(each)]
    names = [(submodule._buffers, dict(submodule._buffers)) for submodule in module.modules()]
    try:
        yield
    finally:
        for parameter, storage, value in parameters:
            parameter.data = storage
            shards.local(parameter.data).copy_(value)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for now, before in names:
            now.clear()
            now.update(before)


@contextmanager
def _preserved_attributes(module: nn.Module) -> Generator[None]:
    """Put back plain attributes of all submodules, in place, so that those that share states go on sharing them."""
    own = ("_parameters", "_buffers", "_modules")  # which FSDP2 changes as it gathers and frees parameters
    restores = [
        _restore_later(vars(submodule), {name: each for name, each in vars(submodule).items() if name not in own})
        for submodule in module.modules()
    ]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _restore_later(attributes: dict[str, Any], before: dict[str, Any]) -> Callable[[], None]:
    """Note what some attributes hold; return what puts that back, and removes others that are new."""
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
