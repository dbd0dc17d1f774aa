"""Try the sparse forms of the layers of a network while it runs on an example, and take those that are faster."""

import copy
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_drive.acceleration import choice
from lightning_drive.acceleration.operations import Operation
from lightning_drive.acceleration.sparse_attention import SparseAttention, projections
from lightning_drive.acceleration.sparse_layer import SparseLayer
from lightning_drive.core import containers
from lightning_drive.network import comparison, given_modules, prunable_layers
from lightning_drive.network.comparison import Example
from lightning_drive.report.acceleration_report import LayerForm


def layers_of(module: nn.Module) -> dict[str, tuple[nn.Module, float]]:
    """Return the layers that multiply by weights, by their names in the module, and the sparsity of each."""
    layers = {}
    inside = {part.out_proj for part in module.modules() if isinstance(part, nn.MultiheadAttention)}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            weights = projections(layer)
        else:
            stored = [layer._parameters.get(weight) for weight in prunable_layers.weight_names(layer)]
            weights = [weight for weight in stored if weight is not None and layer not in inside]
        if size := sum(weight.numel() for weight in weights):
            layers[name] = (layer, 1 - sum(int(weight.count_nonzero()) for weight in weights) / size)
    return layers


def with_sparse_layers(
    module: nn.Module, memory_format: torch.memory_format, example: Example
) -> tuple[nn.Module, tuple[LayerForm, ...]]:
    """Return a copy in which every layer that is faster so is sparse, and the forms of all layers with zeros."""
    variant = copy.deepcopy(module)
    for layer in variant.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=memory_format)
        elif isinstance(layer, nn.TransformerEncoderLayer):
            layer.activation_relu_or_gelu = 0  # torch's word for: no fused kernel, which would pass its layers over
    forms: dict[str, LayerForm] = {}
    sparse: dict[nn.Module, nn.Module] = {}
    with ExitStack() as stack:
        for name, (layer, sparsity) in layers_of(variant).items():
            if not sparsity:
                continue
            forms[name] = LayerForm(name, sparsity, reason=_NOT_RUN if _has_sparse_form(layer) else _NO_FORM)
            if given_modules.has_hooks(layer):
                forms[name] = LayerForm(name, sparsity, reason=_HOOKS)
            elif _has_sparse_form(layer):
                trial = _Trial(name, layer, sparsity, forms, sparse)
                layer.forward = trial.run
                stack.callback(delattr, layer, "forward")
        comparison.call(variant, example.inputs[0])
    for name, layer in list(variant.named_modules(remove_duplicate=False)):
        if layer in sparse:
            if not name:
                return sparse[layer], tuple(forms.values())
            variant.set_submodule(name, sparse[layer])
    return variant, tuple(forms.values())


_NO_FORM = "there is no sparse form for such a layer"
_HOOKS = "it has hooks, or a `forward` of its own"
_NOT_RUN = "it did not run on the example"


def _has_sparse_form(layer: nn.Module) -> bool:
    return type(layer) is nn.MultiheadAttention or Operation.of_layer(layer) is not None


def _sparse_forms(layer: nn.Module, args: tuple[Any, ...]) -> dict[str, nn.Module]:
    """Return the sparse forms of a layer for such arguments, with their names."""
    if type(layer) is nn.MultiheadAttention:
        return {"tokens": SparseAttention.of(layer)}
    operation = Operation.of_layer(layer)
    assert operation is not None
    return {form: SparseLayer(layer, operation, form) for form in operation.layouts(operation.batch(args[0]))}


class _Trial:
    """The first run of a layer on the example: there its forms are timed, and the fastest is noted."""

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        sparsity: float,
        forms: dict[str, LayerForm],
        sparse: dict[nn.Module, nn.Module],
    ) -> None:
        self._name, self._layer, self._sparsity = name, layer, sparsity
        self._forms, self._sparse = forms, sparse

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the layer, after the choice of its form."""
        dense = partial(type(self._layer).forward, self._layer, *args, **kwargs)
        output = dense()
        if self._forms[self._name].reason:
            expected = containers.leaves(output)
            layers = {
                form: layer
                for form, layer in _sparse_forms(self._layer, args or tuple(kwargs.values())).items()
                if comparison.are_close(containers.leaves(layer(*args, **kwargs)), expected)
            }
            works = {form: partial(layer, *args, **kwargs) for form, layer in layers.items()}
            self._forms[self._name] = chosen = choice.fastest(self._name, self._sparsity, dense, works)
            if chosen.is_sparse:
                self._sparse[self._layer] = layers[chosen.form]
        return output
