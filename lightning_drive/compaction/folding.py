"""Fold constants: move channels that do not depend on the input into biases, or into one channel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_drive.compaction import autograd_nodes, layers
from lightning_drive.compaction.dependency_graph import Node
from lightning_drive.compaction.groups import Group
from lightning_drive.compaction.tracing import Trace


def fold_(group: Group, trace: Trace) -> bool:
    """Move constants from where they are read into biases, or into one channel. Return whether there were any."""
    constant = _constant(group, trace)
    values = []
    for item in group.readers:
        value, uniform = trace.constants(item.layer, item.index)
        constant[item.root[~uniform & item.columns()]] = False
        values.append(value)
    changed = False
    for item, value in zip(group.readers, values, strict=True):
        chosen = constant[item.root] & item.columns()
        index, weights = item.index[chosen], layers.by_input(item.layer)
        sums = (weights[index].transpose(0, -1) * value[chosen]).transpose(0, -1)
        if _adds_the_same_everywhere(item.layer) or not value[chosen].any():
            if value[chosen].any():
                _add_to_bias_(item.layer, sums.sum(0))
            weights[index] = 0
            changed |= len(index) > 0
        elif len(index) > 1:
            carrier = int(value[chosen].abs().argmax())
            joined = sums.sum(0) / value[chosen][carrier]
            weights[index] = 0
            weights[index[carrier]] = joined
            changed = True
    return changed


def _constant(group: Group, trace: Trace) -> Tensor:
    """Return which channels do not depend on the input, wherever they are read: those that no weight writes to."""
    known: dict[Node, Tensor] = {}

    def passes_on(node: Node) -> bool:
        if layers.joins_channels(node.module):
            return False
        return node.module in trace.plain or not autograd_nodes.takes_ungraded(node.grad_fn)

    def at(node: Node) -> Tensor:
        if node not in known:
            item = group.items[node, False]
            silent = item.root.new_zeros(group.size, dtype=torch.bool)
            if isinstance(item.layer, (nn.Linear, _ConvNd, _BatchNorm)):
                silent = group.everywhere(item, ~item.rows())
            sources = group.sources(node)
            if sources and passes_on(node):
                silent = silent | torch.stack([at(source) | ~group.has(source) for source in sources]).all(0)
            known[node] = silent & group.has(node)
        return known[node]

    result = torch.ones(group.size, dtype=torch.bool, device=group.device)
    for item in group.readers:
        for source in item.node.inputs:
            result &= at(source) | ~group.has(source)
    return result


def _adds_the_same_everywhere(layer: nn.Module) -> bool:
    """Whether a constant input adds a constant to the output, at the borders, too."""
    if isinstance(layer, nn.Linear):
        return True
    if not isinstance(layer, _ConvNd) or isinstance(layer, _ConvTransposeNd):
        return False
    return layer.padding_mode != "zeros" or layer.padding == "valid" or not any(_numbers(layer.padding))


def _numbers(padding: Any) -> tuple[Any, ...]:
    return padding if isinstance(padding, tuple) else (padding,)


def _add_to_bias_(layer: nn.Module, sums: Tensor) -> None:
    """Add what constants contribute to the bias, one number for each output, summed over a kernel's places."""
    amount = sums.flatten(1).sum(1) if sums.ndim > 1 else sums
    bias = layer._parameters["bias"]
    if bias is None:
        layer.bias = nn.Parameter(amount.clone())
    else:
        bias.add_(amount)
