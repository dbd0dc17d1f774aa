"""Weights that are not plain dense numbers (sparse, quantised, subclasses): recognise, read, and write zeros."""

import torch
from torch import Tensor

_UNREAD = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError)
"""The errors of operations that a kind of tensor does not have; ``NotImplementedError`` is a ``RuntimeError``."""

_COMPRESSED = {torch.sparse_csr: "row", torch.sparse_bsr: "row", torch.sparse_csc: "col", torch.sparse_bsc: "col"}
"""Sparse layouts to the dimension whose indices they compress."""


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds the numbers that it stands for; ask of this rank's part if it is split.

    Examples:
        >>> weight = torch.eye(2)
        >>> is_plain(weight), is_plain(weight.to_sparse())
        (True, False)

    """
    has_numbers = tensor.layout == torch.strided and not tensor.is_meta
    return has_numbers and not (is_own_kind(tensor) or tensor.is_quantized or tensor.is_nested)


def is_own_kind(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass that computes in its own way, as quantised weights of torchao are."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def numbers(tensor: Tensor, name: str) -> Tensor:
    """Return the numbers that a tensor stands for as a plain dense tensor.

    It may be sparse, quantised or a subclass with ``dequantize()`` or ``to_dense()``. Raise a ``TypeError`` with its
    name if it is none of these.
    """
    if is_plain(tensor):
        return tensor
    if tensor.is_meta:
        raise TypeError(f"{name!r} is on the meta device and has no values. Load the weights first.")
    # What every tensor has would first ask the subclass for operations that it may not have.
    ways = [way for way in ("dequantize", "to_dense") if getattr(type(tensor), way) is not getattr(Tensor, way)]
    for way in (*ways, "dequantize", "to_dense"):
        try:
            dense: Tensor = getattr(tensor, way)()
        except _UNREAD:
            continue
        if type(dense) is Tensor and is_plain(dense) and dense.shape == tensor.shape:
            return dense
    raise TypeError(
        f"{name!r} is {described(tensor)}, and neither its `dequantize()` nor its `to_dense()` returns the numbers that"
        " it stands for. Look at the weights before they are converted."
    )


def zero_(tensor: Tensor, pruned: Tensor, name: str) -> None:
    """Set the pruned entries of a sparse tensor, a quantised one or a subclass to exactly 0.

    ``pruned`` is a boolean tensor of the same shape, on the same device. Raise a ``TypeError`` with the tensor's name
    if zeros cannot be written, and the entries are not 0 already.
    """
    tensor = tensor.detach()
    before = numbers(tensor, name)
    if not before[pruned].any():
        return
    wanted = before.masked_fill(pruned, 0)
    try:
        if tensor.layout == torch.sparse_coo:  # which may hold an entry in several parts
            tensor._values().masked_fill_(pruned[tuple(tensor._indices())], 0)
        elif tensor.layout in _COMPRESSED:
            places = _places(tensor)
            tensor.values().view(-1)[places[pruned & (places > 0)] - 1] = 0
        else:
            tensor.copy_(wanted)
    except _UNREAD:
        pass
    if not torch.equal(numbers(tensor, name), wanted):
        raise not_maskable(tensor, name)


def not_maskable(tensor: Tensor, name: str) -> TypeError:
    """Return the error for a parameter of some name that cannot be masked."""
    return TypeError(
        f"{name!r} is {described(tensor)}, into which zeros cannot be written one by one. Put the masks on"
        " before the weights are quantised or converted: `masks.apply_(module)`, then convert."
    )


def _places(tensor: Tensor) -> Tensor:
    """Return the place, from 1 on, that each entry of a compressed sparse tensor has among its values; 0 for none."""
    values = tensor.values()
    order = torch.arange(1, values.numel() + 1, dtype=torch.float64, device=values.device).view(values.shape)
    if _COMPRESSED[tensor.layout] == "row":
        indices = tensor.crow_indices(), tensor.col_indices()
    else:
        indices = tensor.ccol_indices(), tensor.row_indices()
    places = torch.sparse_compressed_tensor(
        *indices, order, size=tensor.shape, layout=tensor.layout, check_invariants=False
    )
    return places.to_dense().long()


def described(tensor: Tensor) -> str:
    """Return a short text for the kind of a tensor: its class, its type of numbers and its layout."""
    own = "" if type(tensor) in (Tensor, torch.nn.Parameter) else f"a {type(tensor).__name__} of "
    layout = "" if tensor.layout == torch.strided else f" with the layout {tensor.layout}"
    return f"{own or 'a tensor of '}{tensor.dtype}{layout}"
