"""Remove unread channels, round by round, and undo whatever changes the outputs."""

import copy
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_drive.compaction import group_search, layers
from lightning_drive.compaction.folding import fold_
from lightning_drive.compaction.groups import Group
from lightning_drive.compaction.tracing import trace
from lightning_drive.network.comparison import Example


def shrunk(module: nn.Module, example: Example) -> nn.Module:
    """Remove channels until no more can be removed, and leave those whose removal changes the outputs."""
    left: set[str] = set()
    while True:
        attempt = copy.deepcopy(module)
        step = _step_(attempt, example, left)
        if not step.changed:
            return module
        if step.is_sound and example.agrees(attempt):
            module = attempt
            continue
        for name in step.changed:  # find out which of them it is
            attempt = copy.deepcopy(module)
            step = _step_(attempt, example, left, only=name)
            if step.changed and step.is_sound and example.agrees(attempt):
                module = attempt
            else:
                left.add(name)


class _Step(NamedTuple):
    """The outcome of one round."""

    changed: list[str]
    """The groups in which something was folded or removed."""
    is_sound: bool
    """Whether what seemed unread is unread."""


def _step_(module: nn.Module, example: Example, left: Set[str], *, only: str | None = None) -> _Step:
    """Fold constants and remove unread channels once, in place."""
    graph, traced = trace(module, example.inputs)
    groups = [
        group
        for group in group_search.groups(graph, traced)
        if group.name not in left and (only is None or group.name == only)
    ]
    with torch.no_grad():
        changed = {group.name for group in groups if fold_(group, traced)}
        unread = {group.name: _unread_(group) for group in reversed(groups)}
        if not _is_unread(module, example, groups, unread):
            return _Step([group.name for group in groups], is_sound=False)
        gone: dict[tuple[nn.Module, bool], set[int]] = {}
        for group in groups:
            roots = unread[group.name].nonzero().flatten().tolist()
            removed = roots[1:] if len(roots) == group.size else roots
            if not removed:
                continue
            again = group_search.group_of(graph, traced, group.layer, [group.channels[root] for root in removed])
            # Channels that hang together only in one direction of the graph would come along: leave them.
            if again is None or any(item.columns().any() for item in again.readers):
                continue
            changed.add(group.name)
            for item in (*again.writers, *again.channelwise, *again.readers):
                gone.setdefault((item.layer, item.reads), set()).update(item.index.tolist())
        for (layer, reads), index in gone.items():
            graph.remove_(layer, index, reads=reads)
    return _Step([group.name for group in groups if group.name in changed], is_sound=True)


def _unread_(group: Group) -> Tensor:
    """Find the channels that nothing reads, and let nothing write to them, so that more is unread before them."""
    unread = torch.ones(group.size, dtype=torch.bool, device=group.device)
    for item in group.readers:
        unread[item.root[item.columns()]] = False
    for item in group.writers:
        layers.by_output(item.layer)[item.index[unread[item.root]]] = 0
    return unread


def _is_unread(module: nn.Module, example: Example, groups: Sequence[Group], unread: Mapping[str, Tensor]) -> bool:
    """Whether outputs stay the same whatever is in the channels that nothing reads.

    This reveals what the graph does not show, such as a channel that is read without its gradient.
    """
    generator = torch.Generator().manual_seed(0)
    places = []
    for group in groups:
        for item in group.writers:
            index = item.index[unread[group.name][item.root]]
            if len(index):
                bias = item.layer._parameters["bias"]
                places.append((layers.by_output(item.layer), index, 10.0))
                places += [] if bias is None else [(bias, index, 100.0)]
    before = [values[index] for values, index, _ in places]
    noise = [scale * torch.randn(values[index].shape, generator=generator) for values, index, scale in places]
    agrees = True
    for sign in (1, -1) if places else ():  # an activation passes the one where it stops the other
        for (values, index, _), numbers in zip(places, noise, strict=True):
            values[index] = (sign * numbers).to(values)
        agrees = agrees and example.agrees(module)
    for (values, index, _), numbers in zip(places, before, strict=True):
        values[index] = numbers
    return agrees
