"""SparseAttention, an ``nn.MultiheadAttention`` for inference whose projections skip the zeros of their weights."""

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_drive.acceleration.operations import Operation
from lightning_drive.acceleration.sparse_calls import SparseCalls, SparseWeight


class SparseAttention(nn.MultiheadAttention):
    """Attention as torch computes it, but for the projections. Make one by :meth:`of`."""

    _sparse_weights: list[SparseWeight] | None

    @classmethod
    def of(cls, attention: nn.MultiheadAttention) -> "SparseAttention":
        """Return the sparse form of an attention, which shares its parameters."""
        sparse = copy.copy(attention)
        sparse.__dict__.pop("forward", None)
        sparse.__class__ = cls
        assert isinstance(sparse, cls)
        sparse._sparse_weights = None
        return sparse

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return what the dense attention does. Under a mode, torch does not take its fused kernel."""
        if self._sparse_weights is None:
            self._sparse_weights = [_sparse(weight) for weight in projections(self) if bool((weight == 0).any())]
        with SparseCalls(self._sparse_weights):
            return super().forward(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the first call makes again."""
        return {**super().__getstate__(), "_sparse_weights": None}  # type: ignore[no-untyped-call]


def projections(attention: nn.MultiheadAttention) -> list[Tensor]:
    """Return the weights of the projections into and out of an attention."""
    weights = [weight for name, weight in attention.named_parameters(recurse=False) if name.endswith("proj_weight")]
    return [*weights, attention.out_proj.weight]


def _sparse(weight: Tensor) -> SparseWeight:
    operation = Operation.of_call(F.linear, tuple(weight.shape))
    assert operation is not None
    return SparseWeight(weight, weight.detach().flatten().nonzero()[:, 0], operation, "tokens")
