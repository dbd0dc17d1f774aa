"""torch-pruning's graph of the operations that ran, and of their channels that belong together.

Undocumented parts of torch-pruning are used here and nowhere else in this package. Each name has a test that fails when
torch-pruning drops it. Seen in torch-pruning 1.6.0.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import nn

from lightning_drive.compaction import layers


class Node(Protocol):
    """An operation of torch-pruning's graph."""

    module: Any
    """The layer, or what torch-pruning has in place of one."""
    grad_fn: Any
    """Autograd's node."""
    inputs: list["Node"]
    """The operations whose outputs it takes, as far as these have a gradient."""


class Part(NamedTuple):
    """The channels of one node that must be removed with some channels of a layer, the root."""

    node: Node
    reads: bool
    """Whether they are input channels of a layer whose output channels are others."""
    indices: list[int]
    roots: list[int]
    """For each of the indices the root's channel that it goes with."""


class DependencyGraph:
    """A module's operations as torch-pruning sees them."""

    def __init__(self) -> None:
        self._library = library()
        self._graph: Any = self._library.DependencyGraph()

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._graph.module2node

    def build(
        self, module: nn.Module, given: Any, forward: Callable[[nn.Module, Any], Any], ignored: Sequence[nn.Module]
    ) -> None:
        """Run a module's forward and follow what it returns; ``ignored`` layers are entered, not taken as a whole."""
        self._graph.build_dependency(module, given, forward_fn=forward, ignored_layers=ignored, verbose=False)

    def pass_over_failures(self, candidates: Iterable[nn.Module]) -> bool:
        """After a failed build, leave channels where they are at operations that torch-pruning fails to follow.

        Some views are such operations. Groups that contain them are left alone, unless their channels do stay where
        they are. Return whether the rest can be followed.
        """
        nodes = getattr(self._graph, "module2node", {})
        root = next((layer for layer in candidates if layer in nodes), None)
        if root is None or not all(map(_is_linked, nodes.values())):
            return False
        prune = self._graph.get_pruner_of_module(root).prune_out_channels
        for module, node in nodes.items():
            self._graph.module2node = {root: nodes[root], module: node}
            try:
                self._graph.get_pruning_group(root, prune, [])  # which looks at all nodes first
            except Exception:  # of many kinds: divisions by zero, sizes that are None, recursion without end
                node.type = self._library.ops.OPTYPE.ELEMENTWISE
        self._graph.module2node = nodes
        return True

    def stop_at(self, is_unknown: Callable[[Node], bool]) -> None:
        """Abandon a group at an operation that is not followed, before torch-pruning goes on from there.

        A group with a few shuffles of channels would take minutes, and then be left alone.
        """
        for node in self._graph.module2node.values():
            for dependency in node.dependencies:
                if is_unknown(dependency.target):
                    dependency.index_mapping.append(_stop)  # the last of the mappings that indices go through

    def parts(self, layer: nn.Module, channels: list[int]) -> list[Part] | None:
        """Return the parts that must be removed with some output channels of a layer; none if torch-pruning fails."""
        nodes = self._graph.module2node
        self._graph.module2node = {layer: nodes[layer]}  # it would look at all of these again, for long
        try:
            prune = self._graph.get_pruner_of_module(layer).prune_out_channels
            entries = self._graph.get_pruning_group(layer, prune, channels).items
        except Exception:  # of many kinds
            return None
        finally:
            self._graph.module2node = nodes
        return [
            Part(entry.dep.target, self._reads(entry.dep), list(entry.idxs), list(entry.root_idxs)) for entry in entries
        ]

    def _reads(self, dependency: Any) -> bool:
        module = dependency.target.module
        return (
            layers.joins_channels(module)
            and dependency.handler == self._graph.get_pruner_of_module(module).prune_in_channels
        )

    def remove_(self, layer: nn.Module, index: Iterable[int], *, reads: bool) -> None:
        """Remove input or output channels from a layer's tensors, and nothing from other nodes."""
        pruner = self._graph.get_pruner_of_module(layer)
        (pruner.prune_in_channels if reads else pruner.prune_out_channels)(layer, sorted(index))


def _is_linked(node: Any) -> bool:
    """Whether the build got far enough to connect a node with all its neighbours."""
    return len(node.dependencies) >= len(node.inputs) + len(node.outputs)


def _stop(indices: Sequence[Any]) -> Sequence[Any]:
    if indices:
        raise ValueError("This operation is not followed.")
    return indices


def library() -> Any:
    """Return torch-pruning, an optional package. Raise if it is not installed."""
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("`compact` needs torch-pruning: `pip install 'lightning-drive[compact]'`.") from error
    return torch_pruning
