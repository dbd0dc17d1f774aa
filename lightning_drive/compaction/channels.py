"""Which channels of which layers belong together, and the paths on which each of them goes its own way.

torch-pruning's dependency graph proposes what belongs together. Of that only what is known to treat every channel by
itself is taken, and only where each index is where it must be.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_drive.core import containers
from lightning_drive.core.messages import listed

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_LAYERS = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED, *_NORMS, nn.PReLU)
"""What can lose channels. A subclass may do anything, so only these very types count."""

_ELEMENTWISE = {
    *("Relu", "LeakyRelu", "Gelu", "Silu", "Elu", "Mish", "Hardtanh", "Hardswish", "Hardsigmoid", "Sigmoid", "Tanh"),
    *("Softplus", "LogSigmoid", "Threshold", "Abs", "Exp", "Log", "Log1P", "Sqrt", "Rsqrt", "Pow", "Neg", "Clamp"),
    *("ClampMin", "ClampMax", "Erf", "Reciprocal", "Clone", "ToCopy", "Add", "Sub", "Rsub", "Mul", "Div", "Maximum"),
    "Minimum",
}
_WINDOWS = {
    *("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D"),
    *("AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "UpsampleNearest2D", "UpsampleBilinear2D"),
}
_REDUCTIONS = {"Mean", "Sum", "Amax", "Amin"}
_VIEWS = {"View", "UnsafeView", "ReshapeAlias"}
_FOLLOWED = {"Cat"} | _ELEMENTWISE | _WINDOWS | _REDUCTIONS | _VIEWS

_UNIFORM = {torch.float64: 1e-12, torch.float32: 1e-6}
"""How far values of one channel may be apart to be one constant; in no other precision are constants told."""


# Channels that belong together.


@dataclass(frozen=True, eq=False)
class Item:
    """Some channels of one node of the graph, and to which channels of the root they belong."""

    node: Any
    reads: bool
    """Whether they are input channels of a layer whose output channels are others."""
    index: Tensor
    root: Tensor

    @property
    def layer(self) -> nn.Module:
        """The layer, or what torch-pruning has in place of one."""
        return self.node.module  # type: ignore[no-any-return]

    def columns(self) -> Tensor:
        """Say for each channel that is read whether any weight is not zero."""
        return by_input(self.layer)[self.index].flatten(1).ne(0).any(1)

    def rows(self) -> Tensor:
        """Say for each channel that is written whether any weight is not zero."""
        if not isinstance(self.layer.weight, Tensor):  # a norm that has none
            return torch.ones_like(self.index, dtype=torch.bool)
        return by_output(self.layer)[self.index].reshape(len(self.index), -1).ne(0).any(1)


@dataclass(frozen=True, eq=False)
class Group:
    """Channels of one layer and all that goes with them: position in ``channels`` is what items call a root."""

    name: str
    root: nn.Module
    channels: list[int]
    items: dict[tuple[Any, bool], Item]
    device: torch.device

    @property
    def size(self) -> int:
        """How many channels of the root there are."""
        return len(self.channels)

    @property
    def readers(self) -> list[Item]:
        """What reads the channels: every output of it is made of all of them."""
        return [item for item in self.items.values() if item.reads]

    @property
    def writers(self) -> list[Item]:
        """What writes the channels."""
        return [item for item in self.items.values() if self.is_writer(item.node) and not item.reads]

    @property
    def channelwise(self) -> list[Item]:
        """The layers between that have something of their own for each channel."""
        return [
            item
            for item in self.items.values()
            if isinstance(item.layer, _LAYERS) and not item.reads and not self.is_writer(item.node)
        ]

    def is_writer(self, node: Any) -> bool:
        """Whether what comes out of a node is made of other channels."""
        return _joins_channels(node.module)

    def codes(self, index: Tensor, root: Tensor) -> Tensor:
        """Give one number for each pair of a channel and its root, in their order."""
        return torch.unique(index * self.size + root)  # type: ignore[no-any-return]

    def everywhere(self, item: Item, each: Tensor) -> Tensor:
        """Turn a statement about an item's channels into one about the roots: true if it is of all of them."""
        result = torch.ones(self.size, dtype=torch.bool, device=self.device)
        result[item.root[~each]] = False
        return result & self.has(item.node)

    def has(self, node: Any) -> Tensor:
        """Say which roots have channels at a node."""
        result = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        if (node, False) in self.items:
            result[self.items[node, False].root] = True
        return result


def groups(graph: Any, traced: "Traced") -> Iterator[Group]:
    """Give the groups that can be followed, in the order in which their first layers run."""
    seen: dict[nn.Module, set[int]] = {}
    for layer in traced.plain:
        if not _joins_channels(layer) or layer not in graph.module2node:
            continue
        free = sorted(set(range(len(by_output(layer)))) - seen.get(layer, set()))
        group = group_of(graph, traced, layer, free) if free else None
        if group is not None:
            for item in group.writers:
                seen.setdefault(item.layer, set()).update(item.index.tolist())
            yield group


def group_of(graph: Any, traced: "Traced", layer: nn.Module, channels: list[int]) -> Group | None:
    """Give the group of some output channels, or nothing where anything in it cannot be followed."""
    pruner = graph.get_pruner_of_module(layer)
    device = next(layer.parameters()).device
    position = {channel: root for root, channel in enumerate(channels)}
    items: dict[tuple[Any, bool], Item] = {}
    nodes = graph.module2node
    graph.module2node = {layer: nodes[layer]}  # it would look at all of these again, for long
    try:
        entries = graph.get_pruning_group(layer, pruner.prune_out_channels, channels).items
    except Exception:  # where torch-pruning gives up
        return None
    finally:
        graph.module2node = nodes
    for entry in entries:
        node, roots = entry.dep.target, entry.root_idxs
        reads = (
            _joins_channels(node.module)
            and entry.dep.handler == graph.get_pruner_of_module(node.module).prune_in_channels
        )
        if (node, reads) in items or any(root not in position for root in roots):
            return None
        index, root = torch.tensor(entry.idxs, device=device), torch.tensor([position[root] for root in roots])
        items[node, reads] = Item(node, reads, index, root.to(device))
    group = Group(traced.names[layer], layer, channels, items, device)
    return group if _can_be_followed(group, traced) else None


def _can_be_followed(group: Group, traced: "Traced") -> bool:
    """Whether each channel goes its own way through all of a group, and is where torch-pruning says it is."""
    ways: dict[Any, _Way | None] = {}

    def way(node: Any) -> _Way | None:
        if node not in ways:
            ways[node] = None  # should the graph run in circles
            ways[node] = way_found = found(node)
            shape, item = traced.shape(node), group.items[node, False]
            if way_found is None or int(item.index.max()) >= shape[way_found.place]:
                ways[node] = None
        return ways[node]

    def found(node: Any) -> _Way | None:
        item = group.items[node, False]
        if node.module in traced.plain and group.is_writer(node):
            place = len(traced.shape(node)) - 1 if isinstance(node.module, nn.Linear) else 1
            return _Way(place, group.codes(item.index, item.root))
        inputs = [source for source in node.inputs if (source, False) in group.items]
        before = [way(source) for source in inputs]
        known = [each for each in before if each is not None]
        if not known or len(known) < len(before):
            return None
        if isinstance(node.module, _LAYERS):
            after = known[0] if node.module in traced.plain and len(known) == 1 and known[0].place == 1 else None
        else:
            after = _after(node, inputs, known, group, traced)
        return after if after is not None and torch.equal(after.codes, group.codes(item.index, item.root)) else None

    def arrives(item: Item) -> bool:
        if item.layer not in traced.plain or len(item.node.inputs) != 1:
            return False
        before = way(item.node.inputs[0]) if (item.node.inputs[0], False) in group.items else None
        place = traced.input_dims[item.layer] - 1 if isinstance(item.layer, nn.Linear) else 1
        return (
            before is not None
            and before.place == place
            and torch.equal(before.codes, group.codes(item.index, item.root))
        )

    return (
        bool(group.readers)
        and all(map(arrives, group.readers))
        and all(way(node) is not None for node, reads in group.items if not reads)
    )


class _Way(NamedTuple):
    """Where a group's channels are in a tensor."""

    place: int
    """The dimension they are in."""
    codes: Tensor
    """Which index in it belongs to which root."""


def _after(node: Any, inputs: Sequence[Any], before: Sequence[_Way], group: Group, traced: "Traced") -> _Way | None:
    """Follow channels through an operation that is no layer, if it keeps them apart."""
    name = _operation(node)
    place, after = before[0].place, traced.shape(node)
    if any(each.place != place for each in before):
        return None
    if name == "Cat":
        if place != 1 or _signed(node.grad_fn._saved_dim) % len(after) != place:
            return None
        return _after_concatenation(node, place, group, traced)
    if len(inputs) != len(node.inputs) or any(not torch.equal(each.codes, before[0].codes) for each in before):
        return None
    shapes = [traced.shape(source) for source in inputs]
    if name in _ELEMENTWISE:
        alike = all(len(shape) == len(after) and shape[place] == after[place] for shape in shapes)
        return before[0] if alike else None
    if len(shapes) != 1:
        return None
    if name in _WINDOWS:
        return before[0] if place == 1 and shapes[0][:2] == after[:2] and len(after) == len(shapes[0]) else None
    if name in _REDUCTIONS:
        return _after_reduction(node.grad_fn, before[0], shapes[0])
    return _after_view(before[0], shapes[0], after, group) if name in _VIEWS else None


def _operation(node: Any) -> str:
    """Return the name of an operation of torch; that of anybody's own is ``""``, whatever it is called."""
    if isinstance(node.grad_fn, torch.autograd.function.BackwardCFunction):
        return ""
    return node.grad_fn.name().rpartition("::")[-1].rstrip("0123456789").removesuffix("Backward")  # type: ignore[no-any-return]


def _after_concatenation(node: Any, place: int, group: Group, traced: "Traced") -> _Way | None:
    codes, start = [], 0
    for source in node.inputs:
        if (source, False) in group.items:
            item = group.items[source, False]
            codes.append(group.codes(item.index + start, item.root))
        start += traced.shape(source)[place]
    if start != traced.shape(node)[place]:  # what has no gradient is not among the inputs
        return None
    return _Way(place, torch.unique(torch.cat(codes)))


def _after_reduction(operation: Any, before: _Way, shape: tuple[int, ...]) -> _Way | None:
    if getattr(operation, "_saved_dim", None) is None:
        return None
    saved = operation._saved_dim
    reduced = {_signed(each) % len(shape) for each in (saved if isinstance(saved, tuple) else (saved,))}
    if before.place in reduced or not reduced:
        return None
    kept = operation._saved_keepdim
    return before if kept else before._replace(place=before.place - sum(each < before.place for each in reduced))


def _after_view(before: _Way, shape: tuple[int, ...], after: tuple[int, ...], group: Group) -> _Way | None:
    """Numbers stay in their order: channels stay apart if what is before or behind them keeps its size."""
    place = before.place
    if len(after) > place and shape[: place + 1] == after[: place + 1]:
        return before
    if len(after) == place + 1 and shape[:place] == after[:place]:  # flattened, with all that is behind them
        index, root = before.codes // group.size, before.codes % group.size
        each = math.prod(shape[place + 1 :])
        spread = index[:, None] * each + torch.arange(each, device=group.device)
        return _Way(place, group.codes(spread.flatten(), root.repeat_interleave(each)))
    last = place == len(shape) - 1 and shape[-1] == after[-1]
    return before._replace(place=len(after) - 1) if last else None


def _signed(number: int) -> int:
    """Read a negative number that autograd has stored as an unsigned one."""
    return number - (1 << 64) if number >= 1 << 63 else number


# What runs, and on what.


class Traced:
    """Which layers ran, in which order, and what they were given."""

    def __init__(self, module: nn.Module) -> None:
        self.names = {layer: name for name, layer in module.named_modules()}
        self.calls: dict[nn.Module, int] = {}
        self.plain: dict[nn.Module, None] = {}
        self.input_dims: dict[nn.Module, int] = {}
        self.shapes: dict[nn.Module, tuple[int, ...]] = {}
        self.ranges: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def run(self, layer: nn.Module, run: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run a layer as one operation of the graph, whatever it consists of."""
        self.calls[layer] = self.calls.get(layer, 0) + 1
        output = _Whole.apply(partial(run, *args, **kwargs), input, *layer.parameters(recurse=False))
        self.input_dims[layer], self.shapes[layer] = input.ndim, tuple(output.shape)
        place = input.ndim - 1 if isinstance(layer, nn.Linear) else 1
        if input.ndim > place:
            values = input.detach().movedim(place, 0).flatten(1)
            low, high = self.ranges.get(layer, (values[:, 0], values[:, 0]))
            self.ranges[layer] = torch.minimum(low, values.amin(1)), torch.maximum(high, values.amax(1))
        return output  # type: ignore[no-any-return]

    def is_batched(self, layer: nn.Module) -> bool:
        """Whether a layer's input had a batch dimension, without which the channels would be in another place."""
        return not isinstance(layer, _ConvNd) or self.input_dims[layer] == layer.weight.ndim

    def shape(self, node: Any) -> tuple[int, ...]:
        """Give the shape of a node's output."""
        return self.shapes.get(node.module) or tuple(node.grad_fn._input_metadata[0].shape)

    def constants(self, item: Item) -> tuple[Tensor, Tensor]:
        """Give what a layer was given in some channels, and whether that was the same everywhere."""
        low, high = (each[item.index] for each in self.ranges[item.layer])
        tolerance = _UNIFORM.get(low.dtype, -1.0)
        return (low + high) / 2, (high - low) <= tolerance * high.abs().clamp(min=low.abs())


class _Whole(torch.autograd.Function):
    """A layer as one node of the graph. It is never gone through backwards."""

    @staticmethod
    def forward(ctx: Any, run: Any, input: Tensor, *parameters: Tensor) -> Tensor:
        return run(input)  # type: ignore[no-any-return]


class _Border(torch.autograd.Function):
    """Marks where the graph begins and ends: nothing beyond it may change its shape."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()


def is_mixed(node: Any) -> bool:
    """Whether an operation takes something that has no gradient, and may hang on the input nevertheless: a mask, say.

    Args:
        node: A node of the graph that is no layer.

    """
    return any(source is None for source, _ in node.grad_fn.next_functions)


def trace(library: Any, module: nn.Module, inputs: Sequence[Any]) -> tuple[Any, Traced]:
    """Run the module, and give torch-pruning's graph of it and what its layers saw."""
    traced = Traced(module)
    flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
    shared = _shared(module)
    graph = library.DependencyGraph()
    outputs: list[Tensor] = []

    def forward(module: nn.Module, given: Any) -> list[Tensor]:
        found = containers.leaves(call(module, containers.mapped(_begin, given)))
        outputs.extend(_Border.apply(leaf) for leaf in found if leaf.requires_grad)
        if not outputs:
            raise ValueError(
                "`forward` must return what is computed from parameters, with autograd: that is how it is followed. It"
                " returned nothing with a gradient; take `torch.no_grad()` or `detach()` out of it."
            )
        return outputs

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # about what torch-pruning does not know; nor is that followed here
        for parameter in flags:
            parameter.requires_grad_(parameter.is_floating_point())
        plain = {layer: None for layer in module.modules() if _is_plain(layer) and layer not in shared}
        for layer in plain:
            run = layer.forward
            layer.forward = partial(traced.run, layer, run)
            stack.callback(delattr, layer, "forward")
        # Whatever others return is not followed. A metric equals anything, and would stand for all in a list.
        others = [each for each in module.modules() if each not in plain and type(each).__eq__ is object.__eq__]
        try:
            graph.build_dependency(module, inputs[0], forward_fn=forward, ignored_layers=others, verbose=False)
        except Exception as error:
            if not outputs:
                raise
            if not _pass_over_failures(library, graph, plain):
                raise ValueError(f"torch-pruning cannot follow this module: {error!r}.") from error
        traced.plain = dict.fromkeys(
            layer for layer in traced.calls if traced.calls[layer] == 1 and traced.is_batched(layer)
        )
        _stop_at_unknown(graph, traced)
        with torch.no_grad():
            for given in inputs[1:]:
                call(module, given)
    _check_used(module, outputs)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    return graph, traced


def _pass_over_failures(library: Any, graph: Any, layers: Iterable[nn.Module]) -> bool:
    """Have torch-pruning leave the channels where they are at operations that it fails to follow, such as some views.

    Groups that these take part in are left alone then, unless the channels do stay where they are.

    Returns:
        Whether the rest can be followed.

    """
    nodes = getattr(graph, "module2node", {})
    root = next((layer for layer in layers if layer in nodes), None)
    if root is None or any(len(node.dependencies) < len(node.inputs) + len(node.outputs) for node in nodes.values()):
        return False
    prune = graph.get_pruner_of_module(root).prune_out_channels
    for module, node in nodes.items():
        graph.module2node = {root: nodes[root], module: node}
        try:
            graph.get_pruning_group(root, prune, [])  # which looks at all nodes first
        except Exception:  # of many kinds: divisions by zero, sizes that are None, recursion without end
            node.type = library.ops.OPTYPE.ELEMENTWISE
    graph.module2node = nodes
    return True


def _stop_at_unknown(graph: Any, traced: Traced) -> None:
    """Have torch-pruning give up a group where it meets what is not followed, before it goes on from there.

    A group with a few shuffles of channels would take minutes, and then be left alone.
    """
    for node in graph.module2node.values():
        for dependency in node.dependencies:
            target = dependency.target
            if target.module not in traced.plain and _operation(target) not in _FOLLOWED:
                dependency.index_mapping.append(_stop)  # the last of the mappings that indices go through


def _stop(indices: Sequence[Any]) -> Sequence[Any]:
    if indices:
        raise ValueError("This operation is not followed.")
    return indices


def _begin(value: Tensor) -> Tensor:
    return _Border.apply(value.detach().requires_grad_()) if value.is_floating_point() else value


def _check_used(module: nn.Module, outputs: Iterable[Tensor]) -> None:
    """Refuse a module of which a part did not run: nobody knows what it would have read."""
    waiting, seen, used = [output.grad_fn for output in outputs], set(), set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            used.add(getattr(node, "variable", None))
            waiting.extend(source for source, _ in node.next_functions)
    unused = [name for name, each in module.named_parameters() if each.is_floating_point() and each not in used]
    if unused:
        raise ValueError(
            f"Every parameter must take part in the outputs, but {listed(map(repr, unused))} did not with this"
            " `example_input`. Compact the part of the module that runs, or take out what does not."
        )


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is what its type says: nothing computes its weights, nothing sees its inputs and outputs."""
    if type(layer) not in _LAYERS or "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, _ConvNd) and layer.groups != 1 and not _is_depthwise(layer):
        return False
    if "weight" not in layer._parameters or ("bias" not in layer._parameters and not isinstance(layer, nn.PReLU)):
        return False
    return all(value is None or value.is_floating_point() for value in layer._parameters.values())


def _is_depthwise(layer: nn.Module) -> bool:
    if not isinstance(layer, _ConvNd) or type(layer) not in _CONVOLUTIONS:
        return False
    return 1 < layer.groups == layer.in_channels == layer.out_channels


def _joins_channels(layer: nn.Module) -> bool:
    """Whether every output channel of a layer is made of all its input channels."""
    return isinstance(layer, (nn.Linear, _ConvNd)) and not _is_depthwise(layer)


def _shared(module: nn.Module) -> set[nn.Module]:
    """Find the layers with a parameter that stands in more than one place."""
    owners: dict[Tensor, list[nn.Module]] = {}
    for layer in module.modules():
        for parameter in layer._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append(layer)
    return {layer for layers in owners.values() if len(layers) > 1 for layer in layers}


def by_input(layer: nn.Module) -> Tensor:
    """See a layer's weights with its input channels first."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight if isinstance(layer, _ConvTransposeNd) else weight.transpose(0, 1)


def by_output(layer: nn.Module) -> Tensor:
    """See a layer's weights with its output channels first."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.transpose(0, 1) if isinstance(layer, _ConvTransposeNd) else weight


def call(module: nn.Module, given: Any) -> Any:
    """Run a module as Lightning does with its ``example_input_array``.

    Args:
        module: The module.
        given: Its argument, a tuple of its arguments, or a mapping of its keyword arguments.

    """
    args, kwargs = containers.arguments(given)
    return module(*args, **kwargs)
