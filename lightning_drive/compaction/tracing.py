"""Run a module once and record its layers: in which order they ran, on which shapes and on which values."""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.compaction import autograd_nodes, layers, operations
from lightning_drive.compaction.dependency_graph import DependencyGraph, Node
from lightning_drive.core import containers
from lightning_drive.core.messages import listed
from lightning_drive.network.comparison import call

_UNIFORM = {torch.float64: 1e-12, torch.float32: 1e-6}
"""How far values of one channel may be apart to be one constant; in no other precision are constants told."""


class Trace:
    """The layers that ran, in their order, and their inputs and outputs."""

    def __init__(self, module: nn.Module) -> None:
        self.names = {layer: name for name, layer in module.named_modules()}
        self.plain: dict[nn.Module, None] = {}
        """The layers that can lose channels, as a set in their order: they ran once on the first input, in batches."""
        self.input_dims: dict[nn.Module, int] = {}
        self._calls: dict[nn.Module, int] = {}
        self._shapes: dict[nn.Module, tuple[int, ...]] = {}
        self._ranges: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def run(self, layer: nn.Module, run: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run a layer as one operation of the graph, whatever it consists of."""
        self._calls[layer] = self._calls.get(layer, 0) + 1
        output = _OneOperation.apply(partial(run, *args, **kwargs), input, *layer.parameters(recurse=False))
        self.input_dims.setdefault(layer, input.ndim)
        self._shapes.setdefault(layer, tuple(output.shape))
        dimension = layers.channel_dimension(layer, input.ndim)
        if input.ndim > dimension:
            values = input.detach().movedim(dimension, 0).flatten(1)
            low, high = self._ranges.get(layer, (values[:, 0], values[:, 0]))
            self._ranges[layer] = torch.minimum(low, values.amin(1)), torch.maximum(high, values.amax(1))
        return output  # type: ignore[no-any-return]

    def note_plain(self) -> None:
        """Note which layers can lose channels, after the first input."""
        once = [layer for layer, calls in self._calls.items() if calls == 1]
        self.plain = {layer: None for layer in once if layers.is_batched(layer, self.input_dims[layer])}

    def shape(self, node: Node) -> tuple[int, ...]:
        """Return the shape of a node's output."""
        return self._shapes.get(node.module) or autograd_nodes.output_shape(node.grad_fn)

    def constants(self, layer: nn.Module, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of some input channels of a layer, and whether every channel had one value throughout."""
        low, high = (bound[index] for bound in self._ranges[layer])
        tolerance = _UNIFORM.get(low.dtype, -1.0)
        return (low + high) / 2, (high - low) <= tolerance * high.abs().clamp(min=low.abs())


class _OneOperation(torch.autograd.Function):
    """A layer as one node of the graph. No backward pass runs through it."""

    @staticmethod
    def forward(ctx: Any, run: Any, input: Tensor, *parameters: Tensor) -> Tensor:
        return run(input)  # type: ignore[no-any-return]


class _Border(torch.autograd.Function):
    """Marks where the graph begins and ends: nothing beyond it may change its shape."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()


def trace(module: nn.Module, inputs: Sequence[Any]) -> tuple[DependencyGraph, Trace]:
    """Run a module on all inputs; return the graph of the first run, and the inputs of all layers.

    Raise if it returns nothing with a gradient, a part of it does not run, or torch-pruning cannot follow it.
    """
    traced, graph = Trace(module), DependencyGraph()
    flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
    shared = layers.sharing_parameters(module)
    outputs: list[Tensor] = []

    def forward(module: nn.Module, given: Any) -> list[Tensor]:
        returned = containers.leaves(call(module, containers.mapped(_begin, given)))
        outputs.extend(_Border.apply(leaf) for leaf in returned if leaf.requires_grad)
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
        wrapped = {layer: None for layer in module.modules() if layers.can_lose_channels(layer) and layer not in shared}
        for layer in wrapped:
            run = layer.forward
            layer.forward = partial(traced.run, layer, run)
            stack.callback(delattr, layer, "forward")
        # Whatever others return is not followed. A metric equals anything, and would stand for all in a list.
        others = [part for part in module.modules() if part not in wrapped and type(part).__eq__ is object.__eq__]
        try:
            graph.build(module, inputs[0], forward, others)
        except Exception as error:
            if not outputs:
                raise
            if not graph.pass_over_failures(wrapped):
                raise ValueError(f"torch-pruning cannot follow this module: {error!r}.") from error
        traced.note_plain()
        graph.stop_at(lambda node: node.module not in traced.plain and not operations.is_followed(node))
        with torch.no_grad():
            for given in inputs[1:]:
                call(module, given)
    _check_used(module, outputs)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    return graph, traced


def _begin(value: Tensor) -> Tensor:
    return _Border.apply(value.detach().requires_grad_()) if value.is_floating_point() else value


def _check_used(module: nn.Module, outputs: Sequence[Tensor]) -> None:
    """Raise if a part of a module did not run, since the channels that it reads are unknown."""
    used = autograd_nodes.leaves_behind(outputs)
    unused = [
        name for name, parameter in module.named_parameters() if parameter.is_floating_point() and parameter not in used
    ]
    if unused:
        raise ValueError(
            f"Every parameter must take part in the outputs, but {listed(map(repr, unused))} did not with this"
            " `example_input`. Compact the part of the module that runs, or take out what does not."
        )
