"""Fold BatchNorm into the layer before it, for inference."""

import copy
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from lightning_drive.acceleration.operations import KINDS, Operation
from lightning_drive.network import comparison, given_modules
from lightning_drive.network.comparison import Example

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d)


def folded(module: nn.Module, example: Example) -> nn.Module:
    """Return a copy of a module in eval mode without the BatchNorms that directly follow a layer.

    A pair is known by the tensor that the one returns and the other is given. If the outputs on the example are no
    longer the same, something else reads such a tensor as well; then nothing is folded.
    """
    pairs = list(_pairs(module, example))
    twin = copy.deepcopy(module)
    for layer_name, norm_name in pairs:
        _fold_(twin.get_submodule(layer_name), twin.get_submodule(norm_name))
        twin.set_submodule(norm_name, nn.Identity())
    return twin if example.agrees(twin) else copy.deepcopy(module)


def _pairs(module: nn.Module, example: Example) -> Iterator[tuple[str, str]]:
    """Yield the names of every layer and of the BatchNorm that follows it, where both run once."""
    names = {layer: name for name, layer in module.named_modules() if not given_modules.has_hooks(layer)}
    outputs: list[tuple[nn.Module, weakref.ref[Tensor]]] = []
    pairs: list[tuple[nn.Module, nn.Module]] = []
    calls: Counter[nn.Module] = Counter()

    def after_layer(layer: nn.Module, _: Any, output: Tensor) -> None:
        calls[layer] += 1
        if output.ndim == layer._parameters["weight"].ndim:  # type: ignore[union-attr]  # else of another dimension
            outputs.append((layer, weakref.ref(output)))

    def before_norm(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        calls[norm] += 1
        pairs.extend((layer, norm) for layer, output in outputs if output() is given[0])

    with ExitStack() as stack:
        for layer in names:
            if Operation.of_layer(layer) is not None and issubclass(type(layer), tuple(KINDS)):
                stack.callback(layer.register_forward_hook(after_layer).remove)
            elif type(layer) in _KINDS and layer.running_mean is not None:
                stack.callback(layer.register_forward_pre_hook(before_norm).remove)
        comparison.call(module, example.inputs[0])
    for layer, norm in pairs:
        if calls[layer] == calls[norm] == 1:
            yield names[layer], names[norm]


def _fold_(layer: Any, norm: Any) -> None:
    """Change weight and bias of a layer so that it returns what the BatchNorm after it would."""
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics)
