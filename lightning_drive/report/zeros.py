"""Counts of the zeros in all tensors of a file that holds no report."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_drive.core import bits, saved_values
from lightning_drive.report import parts, tables


def count_zeros(state_dict: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Return name, shape, numbers and zeros of each tensor for JSON; ``None`` where torch cannot count zeros."""
    return [
        {
            "name": name,
            "shape": list(tensor.shape),
            "numbers": tensor.numel(),
            "zeros": _num_zeros(name, tensor),
        }
        for name, tensor in state_dict.items()
    ]


def totals(counts: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """Return the numbers and zeros of all tensors together; ``None`` where torch cannot count the zeros of one.

    Examples:
        >>> totals([{"numbers": 8, "zeros": 6}, {"numbers": 2, "zeros": 0}])
        {'numbers': 10, 'zeros': 6}

    """
    return {
        "numbers": sum(tensor["numbers"] for tensor in counts),
        "zeros": parts.total(tensor["zeros"] for tensor in counts),
    }


def table(counts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of what :func:`count_zeros` returns.

    Examples:
        >>> for line in table([{"name": "weight", "shape": [2, 4], "numbers": 8, "zeros": 6}]):
        ...     print(line)
        tensor  shape  numbers  zeros   share
        weight  2x4          8      6  75.00%
        all                  8      6  75.00%

    """
    rows = [(tensor["name"], tables.shape(tensor["shape"]), tensor["numbers"], tensor["zeros"]) for tensor in counts]
    total = totals(counts)
    rows.append(("all", "", total["numbers"], total["zeros"]))
    texts = (
        (name, shape, f"{numbers:,}", *(("-", "-") if zero is None else (f"{zero:,}", f"{zero / max(1, numbers):.2%}")))
        for name, shape, numbers, zero in rows
    )
    return tables.plain([("tensor", "shape", "numbers", "zeros", "share"), *texts])


def _num_zeros(name: str, tensor: Tensor) -> int | None:
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        return None
    repeated = [dim for dim, stride in enumerate(tensor.stride()) if stride == 0 and tensor.shape[dim] > 1]
    stored = tensor  # without what only repeats it
    for dim in repeated:
        stored = stored.narrow(dim, 0, 1)
    if not saved_values.has_memory(stored):
        raise ValueError(f"{name!r} claims {tensor.numel():,} numbers, far more than it has in memory.")
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        stored = stored.view(bits.INTEGERS[tensor.itemsize])
    elif tensor.is_floating_point() and tensor.itemsize == 1:
        stored = stored.float()
    try:
        zeros = stored.numel() - int(stored.count_nonzero())
    except RuntimeError:  # of a kind of number that is newer than this
        return None
    return int(zeros * (tensor.numel() // max(1, stored.numel())))
