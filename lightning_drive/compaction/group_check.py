"""Check that every channel of a group stays apart, from the layers that write it to those that read it.

torch-pruning proposes groups and can be wrong about them. A comparison of outputs misses errors in channels that are
silent on the compared inputs, so what every operation does with every index is checked here.
"""

import torch

from lightning_drive.compaction import layers, operations
from lightning_drive.compaction.dependency_graph import Node
from lightning_drive.compaction.groups import Group, Item
from lightning_drive.compaction.operations import Position
from lightning_drive.compaction.tracing import Trace


def is_sound(group: Group, trace: Trace) -> bool:
    """Whether channels stay apart in a group, are where torch-pruning says they are, and something reads them."""
    positions = _Positions(group, trace)
    return (
        bool(group.readers)
        and all(map(positions.arrive, group.readers))
        and all(positions.at(node) is not None for node, reads in group.items if not reads)
    )


class _Positions:
    """Where a group's channels are in the output of each node, ``None`` where they are mixed or somewhere else."""

    def __init__(self, group: Group, trace: Trace) -> None:
        self._group = group
        self._trace = trace
        self._known: dict[Node, Position | None] = {}

    def at(self, node: Node) -> Position | None:
        if node not in self._known:
            self._known[node] = None  # should the graph run in circles
            position = self._written(node) if self._is_writer(node) else self._passed_on(node)
            item = self._group.items[node, False]
            if position is not None and int(item.index.max()) < self._trace.shape(node)[position.dimension]:
                self._known[node] = position
        return self._known[node]

    def arrive(self, item: Item) -> bool:
        """Whether channels are where a layer is said to read them."""
        if item.layer not in self._trace.plain or len(item.node.inputs) != 1:
            return False
        [source] = item.node.inputs
        before = self.at(source) if self._group.written(source) else None
        if before is None:
            return False
        dimension = layers.channel_dimension(item.layer, self._trace.input_dims[item.layer])
        return before.dimension == dimension and torch.equal(before.codes, self._codes(item))

    def _is_writer(self, node: Node) -> bool:
        return node.module in self._trace.plain and layers.joins_channels(node.module)

    def _codes(self, item: Item) -> torch.Tensor:
        return operations.paired(item.index, item.root, self._group.size)

    def _written(self, node: Node) -> Position:
        dimension = layers.channel_dimension(node.module, len(self._trace.shape(node)))
        return Position(dimension, self._codes(self._group.items[node, False]), self._group.size)

    def _passed_on(self, node: Node) -> Position | None:
        """Follow channels through an operation or a channelwise layer, and compare them with the group."""
        sources = self._group.sources(node)
        before = [position for position in map(self.at, sources) if position is not None]
        if not before or len(before) < len(sources):
            return None
        position = self._after(node, before)
        expected = self._codes(self._group.items[node, False])
        return position if position is not None and torch.equal(position.codes, expected) else None

    def _after(self, node: Node, before: list[Position]) -> Position | None:
        if isinstance(node.module, layers.LAYERS):
            is_followed = node.module in self._trace.plain and len(before) == 1 and before[0].dimension == 1
            return before[0] if is_followed else None
        shape, shapes = self._trace.shape(node), [self._trace.shape(source) for source in node.inputs]
        if operations.is_concatenation(node):
            if any(len(given) != len(shape) for given in shapes) or len(shape) < 2:
                return None
            every = [self.at(source) if self._group.written(source) else None for source in node.inputs]
            return operations.after_concatenation(node.grad_fn, every, [given[1] for given in shapes], shape)
        if len(before) != len(node.inputs):
            return None
        return operations.after(node.grad_fn, before, shapes, shape)
