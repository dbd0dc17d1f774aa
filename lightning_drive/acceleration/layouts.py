"""How a layer with sparse weights reads its input: as columns of a dense matrix that its weights are multiplied with.

A layer is computed block by block. For each block, a table is made of the input; the outputs are a sparse matrix times
the table, and are written to where they belong. For gradients the same ways are gone back.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_drive.acceleration.pattern import Pattern

COLUMNS = 128
"""About how many columns a block has: enough for wide registers, few enough for the cache."""


class Layout(ABC):
    """The tables of a layer for inputs of one size."""

    @abstractmethod
    def pattern(self, places: Tensor, shape: torch.Size) -> Pattern:
        """Return the pattern of the sparse matrix; the kept weights are at ``places`` of a flattened weight."""

    def arranged(self, tensor: Tensor) -> Tensor:
        """Return an input or output in the memory format that its blocks are views of; as it is, wherever possible."""
        return tensor

    @abstractmethod
    def empty_output(self, input: Tensor, num_outputs: int) -> Tensor:
        """Return a tensor to write the outputs to."""

    @abstractmethod
    def blocks(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return views of the blocks of an input or output."""

    @abstractmethod
    def table(self, block: Tensor, used: Tensor | None = None) -> Tensor:
        """Return the table of a block of inputs, in place of that of another block, which is used no more."""

    def new_gradient(self, input: Tensor) -> Tensor:
        """Return the gradient of an input, to which :meth:`add_table_` adds all: zeros, unless it only writes."""
        return torch.zeros_like(input)

    @abstractmethod
    def add_table_(self, block: Tensor, table: Tensor) -> None:
        """Add gradients of a table to those of its block of inputs: the adjoint of :meth:`table`."""

    @abstractmethod
    def write_(self, block: Tensor, product: Tensor) -> None:
        """Write the product of a block to its block of outputs; the rows of a product end with the outputs."""

    @abstractmethod
    def product(self, block: Tensor) -> Tensor:
        """Return a contiguous copy of a block of outputs in the shape of a product."""


class Tokens(Layout):
    """A linear layer: the table has a column for each vector of the input."""

    def arranged(self, tensor: Tensor) -> Tensor:
        """Return a contiguous tensor."""
        return tensor.contiguous()

    def pattern(self, places: Tensor, shape: torch.Size) -> Pattern:
        """Return the pattern of the weight itself."""
        num_columns = shape[1:].numel()
        rows, columns = places // num_columns, places % num_columns
        return Pattern.of(rows, columns, num_rows=shape[0], num_columns=num_columns)

    def empty_output(self, input: Tensor, num_outputs: int) -> Tensor:
        """Return a tensor of vectors of outputs."""
        return input.new_empty(*input.shape[:-1], num_outputs)

    def blocks(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return blocks of vectors."""
        return split(tensor.view(-1, tensor.shape[-1]), COLUMNS)

    def table(self, block: Tensor, used: Tensor | None = None) -> Tensor:
        """Return the transposed block."""
        return block.t().contiguous()

    def new_gradient(self, input: Tensor) -> Tensor:
        """Return a tensor to write to."""
        return torch.empty_like(input)

    def add_table_(self, block: Tensor, table: Tensor) -> None:
        """Write the transposed table."""
        block.copy_(table.t())

    def write_(self, block: Tensor, product: Tensor) -> None:
        """Write the transposed product."""
        block.copy_(product.t())

    def product(self, block: Tensor) -> Tensor:
        """Return the transposed block."""
        return block.t().contiguous()


def split(tensor: Tensor, size: int) -> Sequence[Tensor]:
    """Return views of parts of a tensor, without the time that ``torch.split`` takes where one part is all of it."""
    return (tensor,) if len(tensor) <= size else torch.split(tensor, size)
