"""Products with a matrix whose nonzero entries are known in advance: dense results from a few entries.

The workhorse is ``torch.embedding_bag``: a row of the product is a weighted sum of rows of the dense matrix, which is
what it computes for a bag. Its kernel keeps a row of sums in registers, and was two to three times as fast as
``torch.sparse.mm`` (MKL) wherever we measured it on a CPU, except for a single column.
"""

import warnings
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pattern:
    """The places of the entries of a sparse matrix, in compressed rows, and which kept weight stands at each.

    Args:
        indices: The column of each entry, row by row, as int32.
        offsets: Where each row begins in ``indices``, and where the last one ends, as int32.
        num_columns: How many columns the matrix has.
        order: Which of the kept weights each entry is, or ``None`` if they are in order.
        copies: How often every kept weight stands in the matrix; the copies follow one another, all weights at a time.

    Examples:
        The matrix ``[[0, 2, 0], [3, 0, 4]]``, times a vector of ones:

        >>> pattern = Pattern.of(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 2]), num_rows=2, num_columns=3)
        >>> pattern.product(torch.tensor([2.0, 3.0, 4.0]), torch.ones(3, 1))
        tensor([[2.],
                [7.]])

    """

    indices: Tensor
    offsets: Tensor
    num_columns: int
    order: Tensor | None = None
    copies: int = 1

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, *, num_rows: int, num_columns: int) -> "Pattern":
        """Return the pattern of entries in any order; their values come in that order, too."""
        order = torch.argsort(rows * num_columns + columns)
        counts = torch.bincount(rows, minlength=num_rows)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        in_order = torch.equal(order, torch.arange(len(order), device=order.device))
        return cls(columns[order].int(), offsets, num_columns, None if in_order else order)

    @property
    def num_rows(self) -> int:
        """How many rows the matrix has."""
        return len(self.offsets) - 1

    def repeated(self, copies: int, step: int) -> "Pattern":
        """Return the pattern of copies of the matrix below one another, each ``step`` columns further to the right."""
        shifts = torch.arange(copies, device=self.indices.device, dtype=torch.int32)[:, None]
        starts = (self.offsets[:-1] + shifts * len(self.indices)).flatten()
        end = starts.new_tensor([copies * len(self.indices)])
        indices = (self.indices + shifts * step).flatten()
        return Pattern(indices, torch.cat([starts, end]), self.num_columns, self.order, copies)

    def values(self, kept: Tensor) -> Tensor:
        """Return the entries for the values of the kept weights."""
        ordered = kept if self.order is None else kept.index_select(0, self.order)
        return ordered.repeat(self.copies) if self.copies > 1 else ordered

    def gathered(self, values: Tensor) -> Tensor:
        """Return, for each kept weight, the sum of the entries that it is: the adjoint of :meth:`values`."""
        summed = values.view(self.copies, -1).sum(0) if self.copies > 1 else values
        return summed if self.order is None else torch.empty_like(summed).index_copy_(0, self.order, summed)

    def product(self, values: Tensor, dense: Tensor) -> Tensor:
        """Return the matrix with these entries, times a contiguous dense matrix."""
        if dense.shape[1] == 1:
            return torch.mv(self._matrix(values), dense[:, 0])[:, None]
        sums: Tensor = torch.embedding_bag(dense, self.indices, self.offsets, False, 0, False, values, True)[0]
        return sums

    def transposed_product(self, values: Tensor, dense: Tensor) -> Tensor:
        """Return the transposed matrix with these entries, times a contiguous dense matrix."""
        transposed = self._transposed
        return transposed.product(transposed.values(values), dense)

    def add_outer_products(self, values: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Return these entries, plus those of ``left @ right.T`` at their places."""
        sums: Tensor = torch.sparse.sampled_addmm(self._matrix(values), left, right.t()).values()
        return sums

    def _matrix(self, values: Tensor) -> Tensor:
        _have_beta_warning_behind()
        size = (self.num_rows, self.num_columns)
        return torch.sparse_csr_tensor(self.offsets, self.indices, values, size, check_invariants=False)

    @cached_property
    def _transposed(self) -> "Pattern":
        rows = torch.repeat_interleave(torch.arange(self.num_rows, device=self.offsets.device), self.offsets.diff())
        return Pattern.of(self.indices.long(), rows, num_rows=self.num_columns, num_columns=self.num_rows)


@cache
def _have_beta_warning_behind() -> None:
    """Make a matrix in compressed rows, about the first of which torch warns that they are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()
