"""Weights that other tools store as a value and a mask, as the weight that the network multiplies by.

``torch.nn.utils.prune``, and with it Lightning's ``ModelPruning``, stores a pruned ``NAME`` as ``NAME_orig`` and
``NAME_mask``. Of other masks only the module knows what they prune, so these are named, and stay as they are.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_drive.core import saved_values, tensor_kinds

_OTHERS = (
    (re.compile(r"(.*parametrizations\.[^.]+)\.original"), r"\1.0.mask"),
    (re.compile(r"((?:.*\.)?)weight"), r"\1mask"),
    (re.compile(r"(.*)"), r"\1_mask"),
)
"""Names of values, and names that their masks have in modules of users."""

_VALUES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_MASKS = {*_VALUES, torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64}


class Joined(NamedTuple):
    """A ``state_dict`` with plain weights."""

    state_dict: Mapping[str, Tensor]
    parts: dict[str, tuple[str, str]]
    """The name of each joined weight to those of its value and its mask."""
    others: dict[str, str]
    """Names of values to those of what seem to be their masks, which are apart."""


def joined(state_dict: Mapping[str, Tensor]) -> Joined:
    """Put the masks of ``torch.nn.utils.prune`` on their values: zeros are filled in, under the plain names.

    What is no pair of a value and a mask of zeros and ones, in one shape, stays as it is.

    Examples:
        >>> stored = {"weight_orig": torch.tensor([2.0, 3.0]), "weight_mask": torch.tensor([0.0, 1.0])}
        >>> dict(joined(stored).state_dict)
        {'weight': tensor([0., 3.])}
        >>> joined(stored).parts
        {'weight': ('weight_orig', 'weight_mask')}

    """
    parts = dict(_parts(state_dict))
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
    return Joined(plain if parts else state_dict, parts, dict(_others(plain)))


def _parts(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, str]]]:
    for value in state_dict:
        name = value.removesuffix("_orig")
        mask = f"{name}_mask"
        is_value = name != value and bool(name.rpartition(".")[2]) and name not in state_dict
        if is_value and mask in state_dict and _fit(state_dict[value], state_dict[mask]):
            yield name, (value, mask)


def _others(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    for name, value in state_dict.items():
        candidates = (match.expand(mask) for pattern, mask in _OTHERS if (match := pattern.fullmatch(name)))
        for mask in candidates:
            if mask in state_dict and value.ndim > 1 and _fit(value, state_dict[mask]):
                yield name, mask
                break


def _fit(value: Tensor, mask: Tensor) -> bool:
    """Whether two tensors are a value and its mask."""
    is_plain = all(tensor_kinds.is_plain(tensor) and saved_values.has_memory(tensor) for tensor in (value, mask))
    are_numbers = value.dtype in _VALUES and mask.dtype in _MASKS
    return is_plain and are_numbers and value.shape == mask.shape and bool(((mask == 0) | (mask == 1)).all())
