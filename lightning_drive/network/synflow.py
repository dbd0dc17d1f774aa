"""The synaptic flow of a network, and its gradients, which the scores of SynFlow are made of."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.core.function_modes import InPrecision
from lightning_drive.network.forward_passes import ForwardPass, summed
from lightning_drive.network.parameter_names import is_bias
from lightning_drive.network.replica import Replica


class SynapticFlow:
    r"""The synaptic flow :math:`R = \mathbf{1}^T f(|\theta|; \mathbf{1})` of a network (Tanaka et al., 2020).

    The network runs in float64 on an input of ones, with absolute weights, and with all that would break its
    homogeneity removed: biases, BatchNorm's shift and running mean are zero; its absolute scale and its running
    variance stay. In a feed-forward network the scores :math:`|\theta \odot \partial R / \partial |\theta||` of every
    layer then sum to :math:`R`. The module itself is only read: a replica of it is run.

    Use it in eval mode with autocast off (:func:`lightning_drive.network.undisturbed.undisturbed`).

    Args:
        module: The network.
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
        twin = _positive(name, value)
        self._others[name] = value, twin
        return twin

    @property
    def weights(self) -> dict[str, Tensor]:
        r"""Prunable parameter name to :math:`|\theta|` in float64, as of the last call of :meth:`gradients`."""
        return {name: leaf.detach() for name, leaf in self._leaves.items()}

    def gradients(self, example_input: Any) -> tuple[dict[str, Tensor], float]:
        r"""Return parameter name to :math:`\partial R / \partial |\theta|` in float64, and :math:`R`.

        ``example_input`` is what the module takes, or a :class:`~lightning_drive.network.forward_passes.ForwardPass` of
        it; only shapes and devices matter (and values of integers, such as token ids).
        """
        for name, weight in self.weights.items():
            weight.copy_(self._parameters[name].detach()).abs_()
        for name, (value, twin) in self._others.items():
            twin.copy_(_positive(name, value))
        ones = partial(torch.ones_like, dtype=torch.float64)
        with InPrecision(torch.float64):
            outputs = ForwardPass.of(example_input).run(self._replica.module, ones)
        flow = summed(outputs)
        if not flow.requires_grad:
            return {name: torch.zeros_like(weight) for name, weight in self.weights.items()}, flow.item()
        gradients = torch.autograd.grad(flow, list(self._leaves.values()), allow_unused=True)
        self.reached = {name for name, gradient in zip(self._leaves, gradients, strict=True) if gradient is not None}
        return {
            name: torch.zeros_like(weight) if gradient is None else gradient
            for (name, weight), gradient in zip(self.weights.items(), gradients, strict=True)
        }, flow.item()


def _positive(name: str, value: Tensor) -> Tensor:
    """Return what stands for a parameter or buffer that is not prunable."""
    if not value.is_floating_point():
        return value.detach().clone()
    value = value.detach().double().abs()
    return torch.zeros_like(value) if is_bias(name) or name.endswith("running_mean") else value
