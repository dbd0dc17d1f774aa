"""Passes through a network made all-positive: synaptic flow, and which weights still lie on a path.

Both run a replica of the module that has other tensors in place of its parameters; the module itself is only read.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_drive.core.function_modes import InPrecision
from lightning_drive.network import synflow_limits
from lightning_drive.network.forward_calls import Passage, precision_of
from lightning_drive.network.gradients import add_history
from lightning_drive.network.path_rules import Paths
from lightning_drive.network.path_signals import begin
from lightning_drive.network.replica import Replica
from lightning_drive.network.synflow_limits import WithoutFlow


class SynapticFlow:
    r"""The synaptic flow :math:`R = \mathbf{1}^T f(|\theta|; \mathbf{1})` of a network (Tanaka et al., 2020).

    The network runs in float64 on an input of ones, with absolute weights, and with all that would break its
    homogeneity removed: biases, BatchNorm's shift and running mean are zero; its absolute scale and its running
    variance stay. In a feed-forward network the scores :math:`|\theta \odot \partial R / \partial |\theta||` of every
    layer then sum to :math:`R`.

    Use it in eval mode with autocast off (:func:`lightning_drive.network.undisturbed.undisturbed`).

    Args:
        module: The network; its ``forward`` takes one tensor.
        parameters: Parameter name to the live prunable parameters. They may change from one use to the next, by
            masks, say; memory for them in float64 is kept.

    Raises:
        ValueError: If a parameter, prunable or not, is complex.

    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in module.named_parameters():
            if parameter.is_complex():
                raise ValueError(f"SynFlow is not defined for complex parameters ({name!r}). Use another method.")
        self._parameters = parameters
        self._leaves = {
            name: torch.empty_like(parameter, dtype=torch.float64, requires_grad=True)
            for name, parameter in parameters.items()
        }
        self._others: dict[str, tuple[Tensor, Tensor]] = {}
        self.reached: set[str] = set()
        """Names of the parameters that the flow depends on."""
        self._replica = Replica(module, self._stand_in)

    def _stand_in(self, name: str, value: Tensor) -> Tensor:
        if name in self._leaves:
            return self._leaves[name]
        twin = _flow_value(name, value)
        self._others[name] = value, twin
        return twin

    @property
    def weights(self) -> dict[str, Tensor]:
        r"""Prunable parameter name to :math:`|\theta|` in float64, as of the last call of :meth:`gradients`."""
        return {name: leaf.detach() for name, leaf in self._leaves.items()}

    def gradients(self, example_input: Any) -> tuple[dict[str, Tensor], float]:
        r"""Compute the gradients of the flow with respect to the absolute weights.

        Args:
            example_input: What the module takes, or a :class:`~lightning_drive.network.forward_calls.Passage`
                through it; only shapes and devices matter (and values of integers, such as token ids).

        Returns:
            Parameter name to :math:`\partial R / \partial |\theta|` in float64, and :math:`R`.

        """
        for name, weight in self.weights.items():
            weight.copy_(self._parameters[name].detach()).abs_()
        for name, (value, twin) in self._others.items():
            twin.copy_(_flow_value(name, value))
        with InPrecision(torch.float64):
            outputs = Passage.of(example_input).run(self._replica.module, _ones(torch.float64))
        total = _sum(outputs)
        if not total.requires_grad:
            return {name: torch.zeros_like(weight) for name, weight in self.weights.items()}, total.item()
        gradients = torch.autograd.grad(total, list(self._leaves.values()), allow_unused=True)
        found = {
            name: torch.zeros_like(weight) if gradient is None else gradient
            for (name, weight), gradient in zip(self.weights.items(), gradients, strict=True)
        }
        self.reached = {name for name, gradient in zip(found, gradients, strict=True) if gradient is not None}
        return found, total.item()


def layers_without_flow(module: nn.Module, example_input: Any) -> list[WithoutFlow]:
    """Find the layers for which synaptic flow is not defined, in the order in which they run.

    Saturating activations (ReLU6, Tanh, Sigmoid, and with them LSTM and GRU) stop the flow, and normalising layers
    (LayerNorm, softmax, attention) mix its signs; neither conserves it. Calls to functions (``F.softmax``) are found,
    too, and so is what is written out, by what it does (:class:`lightning_drive.network.synflow_limits.Watch`).

    Args:
        module: The network.
        example_input: As in :meth:`SynapticFlow.gradients`.

    """
    watch = synflow_limits.Watch(synflow_limits.WITHOUT_FLOW, module)
    ones = _ones(precision_of(module))
    with synflow_limits.module_names(module, watch.path), watch:
        for output in Passage.of(example_input).run(module, lambda tensor: synflow_limits.begin(ones(tensor))):
            watch.end(output)
    return watch.seen


def active_masks(module: nn.Module, masks: Mapping[str, Tensor], example_input: Any) -> dict[str, Tensor]:
    """Keep only the weights that lie on a path from the input to the output.

    A kept weight is inactive when everything before it or everything after it is pruned (Vysogorets & Kempe, 2023; the
    share of inactive weights is the *effective sparsity*). Paths are followed with a signal of zeros and ones: every
    layer's output and every gradient is reduced to "something arrives" or "nothing does", so depth can neither overflow
    nor underflow. Activations, norms and Dropout let everything through, max pooling passes on all of its window, signs
    and scales do not count, and weights without a mask carry everything. What does not come from the input carries
    nothing: biases, buffers, and constants that are added or subtracted. Nothing is known of weights that were not
    used, so all that are kept count as active.

    Args:
        module: The network.
        masks: Parameter name to boolean mask, on the parameter's device; ``True`` keeps.
        example_input: As in :meth:`SynapticFlow.gradients`.

    Returns:
        Parameter name to boolean mask, a subset of ``masks``.

    Raises:
        ValueError: If nothing that the network returns depends on what it is given.

    """
    tensors = {name: buffer.float() for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    tensors |= {name: _path_value(name, parameter, masks) for name, parameter in module.named_parameters()}
    reached: dict[str, Tensor] = {}

    def note(name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        reached[name] = (leaf.grad > 0).logical_and_(masks[name])
        leaf.grad = None  # one at a time: all of them would take as much memory as the weights

    replica = Replica(module, lambda name, value: tensors.get(name, value))
    for name in masks:
        tensors[name].register_post_accumulate_grad_hook(partial(note, name))  # type: ignore[no-untyped-call]
    with torch.enable_grad(), Paths():
        total = _sum(_signals(replica.module, Passage.of(example_input)))
    if not total.requires_grad:
        raise ValueError("Nothing that is sent into the network arrives at what it returns.")
    total.backward()  # type: ignore[no-untyped-call]
    return {name: reached[name] if name in reached else mask.clone() for name, mask in masks.items()}


def _signals(module: nn.Module, way: Passage) -> list[Tensor]:
    """Send ones, in place of the first argument alone if a network refuses others (boxes without an extent, say)."""

    def start(tensor: Tensor) -> Tensor:
        return begin(torch.ones_like(tensor, dtype=torch.float32))

    with suppress(Exception):  # the module's own `forward`, which may check its arguments
        return way.run(module, start)
    return way.run(module, start, first_only=True)


def _flow_value(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value.detach().clone()
    value = value.detach().double().abs()
    return torch.zeros_like(value) if _is_bias(name) or name.endswith("running_mean") else value


def _path_value(name: str, parameter: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    if name in masks:
        return masks[name].float().requires_grad_()
    if not parameter.is_floating_point():
        return parameter
    if parameter.layout != torch.strided:  # such as which nodes of a graph are neighbours
        return parameter.detach().float()
    value = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
    if _is_bias(name):
        return value
    generator = torch.Generator(value.device).manual_seed(crc32(name.encode()))
    return value.uniform_(0.5, 1.5, generator=generator)  # and not ones, or a norm of them were zero


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[-1]  # "bias", "in_proj_bias", "bias_ih_l0"


def _ones(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return partial(torch.ones_like, dtype=dtype)


def _sum(outputs: Sequence[Tensor]) -> Tensor:
    total = torch.stack([output.sum() for output in outputs]).sum()
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in add_history(total, set())):
        raise ValueError(
            "`torch.utils.checkpoint` with `use_reentrant=True` runs parts of the network without gradients, so nothing"
            " can be followed through them. Set `use_reentrant=False`."
        )
    return total
