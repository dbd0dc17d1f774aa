"""Find the state that optimizers keep element by element, one number for each weight."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)
from torch.utils._pytree import tree_leaves

from lightning_drive.core import shards

_ELEMENT_WISE = frozenset(
    {
        "acc_delta",
        "exp_avg",
        "exp_avg_slow",
        "exp_avg_sq",
        "exp_avg_var",
        "exp_inf",
        "grad_avg",
        "max_exp_avg_sq",
        "momentum",
        "momentum_buffer",
        "slow",
        "slow_buffer",
        "square_avg",
        "z",  # of schedule-free optimizers, which bring it into the weights outside of steps
    }
)
"""Names under which optimizers keep one number for each weight."""

_OWN_NAMES = {Adagrad: {"sum"}, ASGD: {"ax"}, Rprop: {"prev", "step_size"}}
"""Such names of single optimizers: elsewhere ``sum`` may be one of matrices."""


_KEEP_ZEROS = frozenset({Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, SGD})
"""Optimizers that leave a weight at 0 whose gradient and state are 0. Subclasses may do anything."""


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Whether an optimizer is known to leave weights at 0 whose gradient and state are 0."""
    return type(optimizer) in _KEEP_ZEROS and all(group.get("eps", 1) > 0 for group in optimizer.param_groups)


def element_wise(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """Return the state tensors of a parameter, if they are known to have one number for each of its weights.

    If there is anything else but single numbers, return none: it may be a preconditioner or a basis, and then even
    moments are often those of rotated weights, whose zeros mean nothing.
    """
    state = optimizer.state.get(parameter)
    if not isinstance(state, Mapping):
        return []
    names = _ELEMENT_WISE.union(*(own for kind, own in _OWN_NAMES.items() if isinstance(optimizer, kind)))
    tensors = []
    for name, value in state.items():
        if name in names and _is_plain(value) and value.shape == parameter.shape:
            tensors.append(value)
        elif not (value is None or isinstance(value, (int, float, str)) or _is_single_number(value)):
            return []
    return tensors


def keeps_tensors_elsewhere(optimizer: Optimizer) -> bool:
    """Whether an optimizer has tensors that are neither parameters nor the state of one, such as bases of rotations."""
    own = [value for name, value in vars(optimizer).items() if name != "state"]
    parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(
        isinstance(value, Tensor) and id(value) not in parameters and not _is_single_number(value)
        for value in tree_leaves(own)
    )


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor that holds floating-point numbers themselves: no codes, no packed numbers."""
    return (
        isinstance(value, Tensor) and value.is_floating_point() and type(shards.local(value)) in (Tensor, nn.Parameter)
    )


def _is_single_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() <= 1


def is_like(tensor: Tensor, bits: Tensor) -> bool:
    """Whether a tensor can be viewed as integers of the bits' width."""
    return tensor.itemsize == bits.itemsize and tensor.is_floating_point() and not tensor.is_sparse


def with_wrapped(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer, such as SAM or Lookahead, and those that it wraps, each once.

    Wrapped optimizers are looked for in attributes, and in lists and dictionaries there. All objects with parameter
    groups count as optimizers: wrappers need not be of that class.
    """
    optimizers = [optimizer]
    for outer in optimizers:  # grows as wrapped optimizers turn up
        optimizers += [
            value
            for value in tree_leaves(list(vars(outer).values()))
            if isinstance(getattr(value, "param_groups", None), list) and value not in optimizers
        ]
    return optimizers
