"""Groups: channels of several layers that must be removed together."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_drive.compaction import layers
from lightning_drive.compaction.dependency_graph import Node


@dataclass(frozen=True, eq=False)
class Item:
    """Channels of one node of the graph: ``index`` there belongs to the group's channel at the position ``root``."""

    node: Node
    reads: bool
    """Whether they are input channels of a layer whose output channels are others."""
    index: Tensor
    root: Tensor

    @property
    def layer(self) -> nn.Module:
        """The layer, or what torch-pruning has in place of one."""
        return self.node.module  # type: ignore[no-any-return]

    def columns(self) -> Tensor:
        """Return for each channel that is read whether any weight is not zero."""
        return layers.by_input(self.layer)[self.index].flatten(1).ne(0).any(1)

    def rows(self) -> Tensor:
        """Return for each channel that is written whether any weight is not zero."""
        if not isinstance(self.layer.weight, Tensor):  # a norm that has none
            return torch.ones_like(self.index, dtype=torch.bool)
        return layers.by_output(self.layer)[self.index].reshape(len(self.index), -1).ne(0).any(1)


@dataclass(frozen=True, eq=False)
class Group:
    """Some output channels of one layer, the root, and all channels of other nodes that go with them."""

    name: str
    layer: nn.Module
    channels: list[int]
    items: dict[tuple[Node, bool], Item]
    """By node, and whether they are read there."""
    device: torch.device

    @property
    def size(self) -> int:
        """The number of channels of the root."""
        return len(self.channels)

    @property
    def readers(self) -> list[Item]:
        """The items that read the channels: every output of theirs is made of all of them."""
        return [item for item in self.items.values() if item.reads]

    @property
    def writers(self) -> list[Item]:
        """The items that write the channels."""
        return [item for item in self.items.values() if layers.joins_channels(item.layer) and not item.reads]

    @property
    def channelwise(self) -> list[Item]:
        """The layers between that have parameters for each channel by itself."""
        return [
            item
            for item in self.items.values()
            if isinstance(item.layer, layers.LAYERS) and not item.reads and not layers.joins_channels(item.layer)
        ]

    def written(self, node: Node) -> Item | None:
        """Return the channels that come out of a node, if any do."""
        return self.items.get((node, False))

    def sources(self, node: Node) -> list[Node]:
        """Return those inputs of a node that the group's channels come out of."""
        return [source for source in node.inputs if (source, False) in self.items]

    def everywhere(self, item: Item, is_true: Tensor) -> Tensor:
        """Return for which of the root's channels a statement is true of all channels of an item that go with it."""
        result = self.has(item.node)
        result[item.root[~is_true]] = False
        return result

    def has(self, node: Node) -> Tensor:
        """Return which of the root's channels have channels that come out of a node."""
        result = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        item = self.written(node)
        if item is not None:
            result[item.root] = True
        return result
