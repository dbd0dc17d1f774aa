"""Weights that other tools store as a value and a mask, as the weight that the network multiplies by.

``torch.nn.utils.prune``, and with it Lightning's ``ModelPruning``, stores a pruned ``NAME`` as ``NAME_orig`` and
``NAME_mask``; a parametrization of torch with a buffer ``mask`` stores it as ``parametrizations.NAME.original`` and
``parametrizations.NAME.0.mask``.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_drive.core import saved_values, tensor_kinds

_FORMS = (
    (re.compile(r"(?P<layer>.*?)(?P<name>[^.]+)_orig"), "{layer}{name}_mask"),
    (re.compile(r"(?P<layer>.*?)parametrizations\.(?P<name>[^.]+)\.original"), "{layer}parametrizations.{name}.0.mask"),
)
"""Names of values, and the names of their masks."""


_VALUES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_MASKS = {*_VALUES, torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64}


class Joined(NamedTuple):
    """A ``state_dict`` with plain weights."""

    state_dict: Mapping[str, Tensor]
    parts: dict[str, tuple[str, str]]
    """The name of each joined weight to those of its value and its mask."""


def joined(state_dict: Mapping[str, Tensor]) -> Joined:
    """Put the masks of other tools on their values: zeros are filled in under the names that plain modules have.

    What is no pair of a value and a mask of zeros and ones, in one shape, stays as it is.

    Example:
        >>> stored = {"weight_orig": torch.tensor([2.0, 3.0]), "weight_mask": torch.tensor([0.0, 1.0])}
        >>> dict(joined(stored).state_dict)
        {'weight': tensor([0., 3.])}
        >>> joined(stored).parts
        {'weight': ('weight_orig', 'weight_mask')}

    """
    parts = {
        name: (value, mask)
        for value in state_dict
        for name, mask in _names(value)
        if name not in state_dict and mask in state_dict and _fit(state_dict[value], state_dict[mask])
    }
    names = {value: name for name, (value, _) in parts.items()}
    masks = {mask for _, mask in parts.values()}
    plain: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in state_dict.items():
        if name in names:
            plain[names[name]] = tensor.masked_fill(state_dict[parts[names[name]][1]] == 0, 0)
        elif name not in masks:
            plain[name] = tensor
    if hasattr(state_dict, "_metadata"):
        plain._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return Joined(plain if parts else state_dict, parts)


def _names(value: str) -> list[tuple[str, str]]:
    """Return the names of a weight and of its mask where this is the name of a value."""
    matches = ((pattern.fullmatch(value), mask) for pattern, mask in _FORMS)
    return [
        ("{layer}{name}".format(**found.groupdict()), mask.format(**found.groupdict()))
        for found, mask in matches
        if found
    ]


def _fit(value: Tensor, mask: Tensor) -> bool:
    """Whether two tensors are a value and its mask."""
    is_plain = all(tensor_kinds.is_plain(tensor) and saved_values.has_memory(tensor) for tensor in (value, mask))
    are_numbers = value.dtype in _VALUES and mask.dtype in _MASKS
    return is_plain and are_numbers and value.shape == mask.shape and bool(((mask == 0) | (mask == 1)).all())
