"""Pack masks into one bit per weight, and unpack them."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_drive.core import saved_values
from lightning_drive.core.messages import shown

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number to the integer type that has as many."""


def pack(mask: Tensor) -> Tensor:
    """Return a boolean tensor of any shape as bits, the first entry in the highest bit of a flat ``uint8`` CPU tensor.

    Examples:
        >>> pack(torch.tensor([True, False, False, False, False, False, False, True, True]))
        tensor([129, 128], dtype=torch.uint8)

    """
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return (padded << _bit_positions(padded.device)).sum(1, dtype=torch.uint8).cpu()


def unpack(bits: Tensor, shape: list[int]) -> Tensor:
    """Return the boolean tensor of a shape whose ``prod(shape)`` entries :func:`pack` packed."""
    flat = (bits.view(-1, 1) >> _bit_positions(bits.device) & 1).view(-1)
    return flat[: prod(shape)].view(shape).bool()


def unpacked(name: str, packed: Mapping[str, Any]) -> Tensor:
    """Return the mask of a ``shape`` and ``bits`` from a file; raise a ``ValueError`` if the two do not fit."""
    shape, bits = packed.get("shape"), packed.get("bits")
    if not isinstance(shape, list) or not isinstance(bits, Tensor):
        raise ValueError(f"The packed mask of {name!r} needs a `shape` and `bits`: the file is damaged.")
    saved_values.check(list[int], shape, f"the shape of the mask of {name!r}")
    number = prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != ((number + 7) // 8,) or not saved_values.has_memory(bits):
        raise ValueError(f"The packed mask of {name!r} does not hold {shown(number)} bits: the file is damaged.")
    if number % 8 and int(bits[-1]) & (255 >> number % 8):
        raise ValueError(
            f"The packed mask of {name!r} has bits set behind the {number} that it should have: the file is damaged."
        )
    try:
        return unpack(bits, shape)
    except (RuntimeError, TypeError):  # of shapes that torch cannot have, such as one of a hundred dimensions
        raise ValueError(f"The packed mask of {name!r} has a shape that no tensor has: the file is damaged.") from None


def _bit_positions(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
