"""Running statistics of BatchNorm layers: estimated afresh over batches, and loaded into a module."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_drive.core.messages import listed
from lightning_drive.network.gradients import LossFunction, batch_in_float32


def batch_norm_statistics(
    module: nn.Module, loss_fn: LossFunction, batches: Iterable[Any]
) -> dict[str, dict[str, Tensor]]:
    """Return the statistics of BatchNorm layers as cumulative averages over the batches: values by layer and buffer.

    Pruning shifts the activations of a trained network, and its running statistics no longer fit (10 % instead of
    43 % accuracy in one of our measurements). As in ``torch.optim.swa_utils.update_bn``, averages start at zero and
    every batch weighs the same; ``loss_fn`` runs a batch through the module, and its loss is not used. This leaves
    traces, so the module should be a replica.

    Only layers whose statistics are being tracked take part, in training mode (not frozen) and not untrained, and only
    layers that a batch reached are returned.
    """
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats and layer.num_batches_tracked
    }
    if not layers:
        return {}
    momenta = {layer: layer.momentum for layer in layers.values()}
    try:
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None  # torch then averages cumulatively
        for batch in batches:
            loss_fn(module, batch_in_float32(batch))
        return {
            path: {name: value.clone() for name, value in layer.named_buffers()}
            for path, layer in layers.items()
            if layer.num_batches_tracked
        }
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum


def load_batch_norm_statistics(module: nn.Module, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write statistics of :func:`batch_norm_statistics` into the module, or into a running average of it.

    Raise a ``ValueError`` before anything is written if a layer or a buffer is missing, new or of another shape.
    """
    layers = dict(module.named_modules())
    for path, values in statistics.items():
        buffers = dict(layers[path].named_buffers()) if path in layers else {}
        now, then = ({name: value.shape for name, value in tensors.items()} for tensors in (buffers, values))
        if now != then:
            raise ValueError(
                f"The new statistics of the BatchNorm layer {path!r} ({listed(then)}) do not fit the module, which has"
                f" {listed(now)}: they are damaged, or of another module."
            )
    for path, values in statistics.items():
        for name, buffer in layers[path].named_buffers():
            buffer.copy_(values[name])
