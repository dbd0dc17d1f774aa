"""Formulas for what torch's flop counter does not count, and names of operations that nobody has a formula for.

One multiply-add is two operations.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor


def recurrent(inputs: Any, *given: Any, **_: Any) -> int:
    """Count as for a product of every step with every matrix: an oneDNN or cuDNN kernel does all of them in one."""
    shapes = given[0] if isinstance(given[0], list) else given[:4]  # oneDNN: weights and biases, then states
    matrices = [shape for shape in shapes if isinstance(shape, tuple) and len(shape) == 2]
    return int(2 * prod(inputs[:-1]) * sum(map(prod, matrices)))


def grouped(first: Any, second: Any, *_: Any, **__: Any) -> int:
    """Count as for a product of every row with the matrix of its group, as mixtures of experts compute them."""
    is_split = len(first) == 2 or len(second) == 3
    return int(2 * prod(first if is_split else first[1:]) * second[-1])


def with_vector(*shapes: Any, **_: Any) -> int:
    """Count a product with a vector: two operations for each number of the matrix, or of the other vector."""
    return 2 * max(prod(shape) for shape in shapes if isinstance(shape, tuple))


def _operations(*names: str) -> set[Any]:
    """Return the operations of these names that this version of torch has."""
    return {getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)}


RECURRENT = _operations("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")
FORMULAS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys(RECURRENT, recurrent),
    **dict.fromkeys(_operations("_grouped_mm"), grouped),
    **dict.fromkeys(_operations("mv", "addmv", "addmv_", "dot", "vdot"), with_vector),
}
"""Operations to what they cost, given the shapes of their arguments."""

_COSTLY = ("fft_", "linalg", "cdist", "pdist", "trilinear", "sparse_mm", "sparse_addmm", "cholesky", "matrix_exp")
"""Parts of the names of operations of torch that multiply, and for which there is no formula."""


def multiplies_without_formula(func: Any, given: list[Tensor]) -> bool:
    """Return whether an operation that counts as nothing multiplies the tensors given to it, as far as can be told."""
    library, name = func._schema.name.split("::")
    if library == "aten":
        return any(part in name for part in _COSTLY) and not any(part in name for part in ("norm", "check"))
    matrices = [tensor for tensor in given if tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel()]
    return library not in ("prims", "torchvision") and len(matrices) > 1
