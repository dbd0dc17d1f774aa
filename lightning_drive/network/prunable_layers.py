"""Which parameters a layer multiplies by: the table of layers, and what is a weight, a norm or a bias."""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from lightning_drive.network import computed_weights
from lightning_drive.network.computed_weights import Computed
from lightning_drive.network.name_patterns import has_wildcard

LAYERS: list[tuple[type[nn.Module] | str, tuple[str, ...]]] = [
    (nn.Linear, ("weight",)),
    (nn.Bilinear, ("weight",)),
    (_ConvNd, ("weight",)),
    (nn.MultiheadAttention, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
    (nn.RNNBase, ("weight_ih_l*", "weight_hh_l*", "weight_hr_l*")),
    (nn.RNNCellBase, ("weight_ih", "weight_hh")),
    ("transformers.pytorch_utils.Conv1D", ("weight",)),
    ("transformers.modeling_utils.Conv1D", ("weight",)),
    ("torch_geometric.nn.dense.linear.Linear", ("weight",)),
    ("torch_geometric.nn.dense.linear.HeteroLinear", ("weight",)),
    ("torch_geometric.nn.conv.rgcn_conv.RGCNConv", ("weight", "root")),
    ("dgl.nn.pytorch.conv.graphconv.GraphConv", ("weight",)),
    ("torchvision.ops.deform_conv.DeformConv2d", ("weight",)),
]
"""Classes of layers, or their qualified names, and patterns over their own parameters that they multiply by."""

_NORM = re.compile(r"Norm(\dd)?$")
"""The end of the names of classes of norms."""


def default_names(module: nn.Module) -> list[str]:
    """Return the names of the weights that layers multiply by, but of no embedding; those that are stored first."""
    weights: set[Tensor | None] = set()
    computed: list[str] = []
    for path, layer in module.named_modules():
        names = weight_names(layer)
        weights.update(layer._parameters[name] for name in names if name in layer._parameters)  # unused ones are `None`
        computed += [_joined(path, name) for name in names if name not in layer._parameters]
    for layer in module.modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            weights.discard(layer._parameters.get("weight"))
    return [*(name for name, parameter in module.named_parameters() if parameter in weights), *computed]


def weight_names(layer: nn.Module) -> list[str]:
    """Return the names within a layer of its own weights that it multiplies by, stored or computed from parameters."""
    classes = {known for kind in type(layer).__mro__ for known in (kind, f"{kind.__module__}.{kind.__qualname__}")}
    patterns = [pattern for kind, names in LAYERS if kind in classes for pattern in names]
    if not patterns:
        return []
    tensors = [name for name, value in vars(layer).items() if isinstance(value, Tensor)]
    bases = [
        base for base in map(computed_weights.base_name, layer._parameters) if base and base not in layer._parameters
    ]
    present = dict.fromkeys([*layer._parameters, *computed_weights.of_layer(layer), *tensors, *bases])
    fixed = [pattern for pattern in patterns if pattern not in present and not has_wildcard(pattern)]
    matched = [name for name in present if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [*(name for name in matched if computed_weights.base_name(name) not in bases), *fixed]


def computed_in(module: nn.Module) -> dict[str, Computed]:
    """Return the weights that are not stored, by full name, in the order of the layers."""
    computed = {}
    for path, layer in module.named_modules():
        known = computed_weights.of_layer(layer)
        for name in dict.fromkeys([*known, *weight_names(layer)]):
            if name not in layer._parameters:
                computed[_joined(path, name)] = known.get(name) or computed_weights.of_sources(layer, name)
    return computed


def matrices(module: nn.Module, computed: Mapping[str, Computed]) -> dict[str, bool]:
    """Return the names of weights, stored or computed, with two dimensions or more that are no norm or bias.

    With each name stands whether ``"*"`` selects it: a parameter that a weight is computed from counts as that weight.
    """
    parameters = dict(module.named_parameters())
    norms = {
        parameter
        for layer in module.modules()
        if any(_NORM.search(kind.__name__) for kind in type(layer).__mro__)
        for parameter in layer.parameters(recurse=False)
    }
    sources = {parameter for weight in computed.values() for parameter in weight.sources}
    stored = {
        name: parameter not in sources
        for name, parameter in parameters.items()
        if not (parameter in norms or name.rpartition(".")[2].startswith("bias"))
        and (isinstance(parameter, UninitializedParameter) or parameter.ndim >= 2)
    }
    of_matrices = {parameters[name] for name in stored}
    return {**stored, **{name: True for name, weight in computed.items() if of_matrices.intersection(weight.sources)}}


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
