"""Find the groups of a module's channels that can be removed."""

from collections.abc import Iterator

import torch
from torch import nn

from lightning_drive.compaction import group_check, layers
from lightning_drive.compaction.dependency_graph import DependencyGraph, Node
from lightning_drive.compaction.groups import Group, Item
from lightning_drive.compaction.tracing import Trace


def groups(graph: DependencyGraph, trace: Trace) -> Iterator[Group]:
    """Yield the groups that can be followed, in the order in which their first layers ran."""
    seen: dict[nn.Module, set[int]] = {}
    for layer in trace.plain:
        if not layers.joins_channels(layer) or layer not in graph:
            continue
        free = sorted(set(range(len(layers.by_output(layer)))) - seen.get(layer, set()))
        group = group_of(graph, trace, layer, free) if free else None
        if group is not None:
            for item in group.writers:
                seen.setdefault(item.layer, set()).update(item.index.tolist())
            yield group


def group_of(graph: DependencyGraph, trace: Trace, layer: nn.Module, channels: list[int]) -> Group | None:
    """Return the group of some output channels, or nothing where anything in it cannot be followed."""
    device = next(layer.parameters()).device
    position = {channel: number for number, channel in enumerate(channels)}
    items: dict[tuple[Node, bool], Item] = {}
    for part in graph.parts(layer, channels) or ():
        if (part.node, part.reads) in items or any(root not in position for root in part.roots):
            return None
        index = torch.tensor(part.indices, device=device)
        root = torch.tensor([position[root] for root in part.roots], device=device)
        items[part.node, part.reads] = Item(part.node, part.reads, index, root)
    group = Group(trace.names[layer], layer, channels, items, device)
    return group if group_check.is_sound(group, trace) else None
