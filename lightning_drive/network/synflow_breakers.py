"""Calls that break synaptic flow: functions that are known to, and whatever stops growing with the network's input."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_drive.core.function_modes import FunctionMode
from lightning_drive.network import synflow_growth
from lightning_drive.network.forward_passes import ForwardPass, precision_of
from lightning_drive.network.synflow_growth import Growth, has_growth

_KNOWN_BREAKERS = {
    *("relu6", "hardtanh", "hardtanh_", "hardsigmoid", "tanh", "tanh_", "sigmoid", "sigmoid_", "softsign"),
    *("lstm", "gru", "rnn_tanh", "lstm_cell", "gru_cell", "rnn_tanh_cell"),
    *("layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm", "normalize"),
    *("softmax", "log_softmax", "softmin", "logsumexp", "scaled_dot_product_attention", "multi_head_attention_forward"),
}
_WITH_WEIGHTS = {
    *("linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot"),
}
_STOPPED = 0.25
"""The highest degree of what no longer grows with the input of the network."""


class FlowBreaker(NamedTuple):
    """A call that breaks synaptic flow."""

    layer: str
    """Who calls what, such as ``"'encoder.norm' (layer_norm)"``."""
    weights: tuple[nn.Parameter, ...]
    """The parameters that the call takes."""


def flow_breakers(module: nn.Module, example_input: Any) -> list[FlowBreaker]:
    """Return the calls for which synaptic flow is not defined, in the order in which they run.

    Saturating activations (ReLU6, Tanh, Sigmoid, and with them LSTM and GRU) stop the flow, and normalising layers
    (LayerNorm, softmax, attention) mix its signs; neither conserves it. Calls of functions (``F.softmax``) are noted,
    too, and so is what is written out, by what it does (:class:`FlowWatch`). The module runs on ones.
    """
    watch = FlowWatch(module)
    ones = partial(torch.ones_like, dtype=precision_of(module))
    with _running_names(module, watch.running), watch:
        for output in ForwardPass.of(example_input).run(module, lambda tensor: synflow_growth.start(ones(tensor))):
            watch.end(output)
    return watch.breakers


class FlowWatch(FunctionMode):
    """Notes calls of functions that are known to break the flow, and inputs of layers that do not grow.

    What stops the growth with the input of the network (:mod:`lightning_drive.network.synflow_growth`) is named where
    a layer, or the end of the network, gets what has stopped growing.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._kinds = {name: type(submodule).__name__ for name, submodule in module.named_modules()}
        self.running: list[str] = []
        """Names of the submodules that are running, from the outside in."""
        self.breakers: list[FlowBreaker] = []

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of torch, and note it if it breaks the flow."""
        name = getattr(func, "__name__", "")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in _KNOWN_BREAKERS:
            weights = tuple(tensor for tensor in given if isinstance(tensor, nn.Parameter))
            self.breakers.append(FlowBreaker(self._caller(name), weights))
            return tree_map(synflow_growth.start, func(*args, **kwargs))
        if name in ("embedding", "embedding_bag"):
            return synflow_growth.start(func(*args, **kwargs))
        grown = [tensor for tensor in given if has_growth(tensor)]
        if not grown or "_like" in name or name.startswith("new_"):  # of their shape and type alone
            return func(*args, **kwargs)
        if name in _WITH_WEIGHTS and any(tensor.is_floating_point() and not has_growth(tensor) for tensor in given):
            self.end(grown)
            growths: Iterable[Growth] = repeat(synflow_growth.as_highest(grown))  # as with absolute weights
        else:
            growths = synflow_growth.measured(func, args, kwargs, grown)
        result = func(*args, **kwargs)
        self._follow(args[0] if name in ("__setitem__", "copy_") else result, growths, grown)
        return result

    def _follow(self, result: Any, growths: Iterable[Growth], grown: list[Tensor]) -> None:
        """Note how a result grows, and what stopped its growth: what is running now, or what stopped its arguments."""
        earlier = next(filter(None, map(synflow_growth.stopper_of, grown)), None)
        highest = max(map(synflow_growth.degree_of, grown))
        for tensor, (degree, sign) in zip(synflow_growth.floating(result), growths, strict=False):
            stopper = self._caller() if degree <= _STOPPED < highest else earlier
            synflow_growth.set_growth(tensor, degree, sign, stopper if degree <= _STOPPED else None)

    def end(self, values: Any) -> None:
        """Name what stopped the growth of a layer's inputs or the network's outputs, and let them grow again."""
        for value in tree_leaves(values):
            stopper = synflow_growth.stopper_of(value)
            if stopper is not None:
                self.breakers.append(FlowBreaker(stopper, ()))
                synflow_growth.set_growth(value)

    def _caller(self, function: str | None = None) -> str:
        name = self.running[-1] if self.running else ""
        return f"{name!r} ({function or self._kinds[name]})" if name else f"`forward` ({function or self._kinds['']})"


@contextmanager
def _running_names(module: nn.Module, running: list[str]) -> Generator[None]:
    """Keep the name of the submodule that is running at the end of a list."""

    def forget(*_: Any) -> None:
        running.pop()

    handles = []
    try:
        for name, submodule in module.named_modules():
            handles.append(submodule.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
            handles.append(submodule.register_forward_hook(forget, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
