"""Layers that can lose channels, and their weights seen by channel."""

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

LAYERS = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED, *_NORMS, nn.PReLU)
"""The types that can lose channels. A subclass may do anything, so only these very types count."""


def can_lose_channels(layer: nn.Module) -> bool:
    """Whether a layer is what its type says: nothing computes its weights, nothing sees its inputs and outputs."""
    if type(layer) not in LAYERS or "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, _ConvNd) and layer.groups != 1 and not is_depthwise(layer):
        return False
    if "weight" not in layer._parameters or ("bias" not in layer._parameters and not isinstance(layer, nn.PReLU)):
        return False
    return all(parameter is None or parameter.is_floating_point() for parameter in layer._parameters.values())


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of every channel by itself."""
    if not isinstance(layer, _ConvNd) or type(layer) not in _CONVOLUTIONS:
        return False
    return 1 < layer.groups == layer.in_channels == layer.out_channels


def joins_channels(layer: nn.Module) -> bool:
    """Whether every output channel of a layer is made of all its input channels."""
    return isinstance(layer, (nn.Linear, _ConvNd)) and not is_depthwise(layer)


def channel_dimension(layer: nn.Module, ndim: int) -> int:
    """Return which of a tensor's dimensions a layer takes for its channels."""
    return ndim - 1 if isinstance(layer, nn.Linear) else 1


def is_batched(layer: nn.Module, ndim: int) -> bool:
    """Whether a layer's input has a batch dimension, without which the channels would be in another place."""
    return not isinstance(layer, _ConvNd) or ndim == layer.weight.ndim


def sharing_parameters(module: nn.Module) -> set[nn.Module]:
    """Return the layers with a parameter that stands in more than one place."""
    owners: dict[Tensor, list[nn.Module]] = {}
    for layer in module.modules():
        for parameter in layer._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append(layer)
    return {layer for layers in owners.values() if len(layers) > 1 for layer in layers}


def by_input(layer: nn.Module) -> Tensor:
    """Return a view of a layer's weights with its input channels first."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight if isinstance(layer, _ConvTransposeNd) else weight.transpose(0, 1)


def by_output(layer: nn.Module) -> Tensor:
    """Return a view of a layer's weights with its output channels first."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.transpose(0, 1) if isinstance(layer, _ConvTransposeNd) else weight
