"""Which weights lie on a path from the input to the output of a network, as its effective sparsity counts them."""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_drive.network.forward_passes import ForwardPass, summed
from lightning_drive.network.parameter_names import is_bias
from lightning_drive.network.path_marks import start
from lightning_drive.network.path_rules import PathRules
from lightning_drive.network.replica import Replica


def active_masks(module: nn.Module, masks: Mapping[str, Tensor], example_input: Any) -> dict[str, Tensor]:
    """Keep only the weights that lie on a path from the input to the output.

    A kept weight is inactive when everything before it or everything after it is pruned (Vysogorets & Kempe, 2023; the
    share of inactive weights is the *effective sparsity*). Paths are followed with marks of zeros and ones: every
    layer's output and every gradient is reduced to 1 where a path arrives and to 0 elsewhere, so depth can neither
    overflow nor underflow. Activations, norms and Dropout let everything through, max pooling passes on all of its
    window, signs and scales do not count, and weights without a mask lead all paths on. No path starts at what does not
    come from the input: biases, buffers, and constants that are added or subtracted. Nothing is known of weights that
    were not used, so all that are kept count as active. The module is only read: a replica of it is run.

    Args:
        module: The network.
        masks: Parameter name to boolean mask, on the parameter's device; ``True`` keeps.
        example_input: What the module takes, or a :class:`~lightning_drive.network.forward_passes.ForwardPass` of it;
            only shapes and devices matter (and values of integers, such as token ids).

    Returns:
        Parameter name to boolean mask, a subset of ``masks``.

    Raises:
        ValueError: If nothing that the network returns depends on what it is given.

    """
    tensors = {name: buffer.float() for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    tensors |= {name: _stand_in(name, parameter, masks) for name, parameter in module.named_parameters()}
    reached: dict[str, Tensor] = {}

    def note(name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        reached[name] = (leaf.grad > 0).logical_and_(masks[name])
        leaf.grad = None  # one at a time: all of them would take as much memory as the weights

    replica = Replica(module, lambda name, value: tensors.get(name, value))
    for name in masks:
        tensors[name].register_post_accumulate_grad_hook(partial(note, name))  # type: ignore[no-untyped-call]
    with torch.enable_grad(), PathRules():
        total = summed(_marked_outputs(replica.module, ForwardPass.of(example_input)))
    if not total.requires_grad:
        raise ValueError("Nothing of the input reaches the output of the network.")
    total.backward()  # type: ignore[no-untyped-call]
    return {name: reached[name] if name in reached else mask.clone() for name, mask in masks.items()}


def _marked_outputs(module: nn.Module, forward_pass: ForwardPass) -> list[Tensor]:
    """Send ones, in place of the first argument alone if a network rejects others (boxes without an extent, say)."""

    def started(tensor: Tensor) -> Tensor:
        return start(torch.ones_like(tensor, dtype=torch.float32))

    with suppress(Exception):  # the module's own `forward`, which may check its arguments
        return forward_pass.run(module, started)
    return forward_pass.run(module, started, first_only=True)


def _stand_in(name: str, parameter: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    """Return what stands for a parameter in the replica: its mask, or positive numbers; zeros for a bias."""
    if name in masks:
        return masks[name].float().requires_grad_()
    if not parameter.is_floating_point():
        return parameter
    if parameter.layout != torch.strided:  # such as which nodes of a graph are neighbours
        return parameter.detach().float()
    value = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
    if is_bias(name):
        return value
    generator = torch.Generator(value.device).manual_seed(crc32(name.encode()))
    return value.uniform_(0.5, 1.5, generator=generator)  # and not ones, or a norm of them were zero
