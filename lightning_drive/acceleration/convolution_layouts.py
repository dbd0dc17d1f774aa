"""How a convolution reads its input: tables of images for :mod:`lightning_drive.acceleration.layouts`."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_drive.acceleration.layouts import COLUMNS, Layout, Tokens, split
from lightning_drive.acceleration.pattern import Pattern


class PixelTokens(Tokens):
    """A convolution that computes each pixel by itself, as a linear layer over pixels with their channels last."""

    def arranged(self, tensor: Tensor) -> Tensor:
        """Return images with their channels last in memory."""
        return tensor.contiguous(memory_format=torch.channels_last)

    def empty_output(self, input: Tensor, num_outputs: int) -> Tensor:
        """Return images with their channels last in memory."""
        output = input.new_empty(len(input), *input.shape[2:], num_outputs)
        return output.permute(0, 3, 1, 2)

    def blocks(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return blocks of pixels."""
        return super().blocks(tensor.permute(0, 2, 3, 1))


class Axis(NamedTuple):
    """One spatial dimension of a convolution."""

    inputs: int
    kernel: int
    stride: int
    dilation: int
    padding: int
    """Zeros before the first input."""
    outputs: int

    @property
    def is_pointwise(self) -> bool:
        """Whether each output reads the one input at its place."""
        return self.kernel == self.stride == 1 and self.inputs == self.outputs

    def read(self, place: int) -> tuple[slice, slice]:
        """Return which outputs read an input, not a zero beside them, at a place of the kernel; and which inputs."""
        shift = place * self.dilation - self.padding
        first = max(0, -(shift // self.stride))
        last = min(self.outputs - 1, (self.inputs - 1 - shift) // self.stride)
        if last < first:
            return slice(0, 0), slice(0, 0)
        begin = first * self.stride + shift
        return slice(first, last + 1), slice(begin, begin + (last - first) * self.stride + 1, self.stride)


_Copy: TypeAlias = tuple[tuple[int | slice, ...], Tensor]
"""A place in a table, and the part of the images that stands there."""


class Convolution(Layout):
    """A convolution over images: blocks of images, each with all of their channels."""

    def __init__(self, height: Axis, width: Axis) -> None:
        self.height, self.width = height, width

    def empty_output(self, input: Tensor, num_outputs: int) -> Tensor:
        """Return a tensor of images in the memory format of the input."""
        output = input.new_empty(len(input), num_outputs, self.height.outputs, self.width.outputs)
        return output.contiguous(memory_format=torch.channels_last) if is_channels_last(input) else output

    def blocks(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return blocks of images."""
        return split(tensor, max(1, COLUMNS // self._columns_per_image))

    def add_table_(self, block: Tensor, table: Tensor) -> None:
        """Add the shifted copies up."""
        parts = table.view(self._table_shape(block))
        for target, source in self._copies(block.transpose(0, 1)):
            source.add_(parts[target])

    @property
    def _lines(self) -> int:
        """The lines that windows reach, zeros above and below included."""
        reach = (self.height.outputs - 1) * self.height.stride + (self.height.kernel - 1) * self.height.dilation + 1
        return max(reach, self.height.padding + self.height.inputs)

    @property
    @abstractmethod
    def _columns_per_image(self) -> int: ...

    @abstractmethod
    def _num_rows(self, channels: int) -> int: ...

    @abstractmethod
    def _table_shape(self, block: Tensor) -> tuple[int, ...]: ...

    @abstractmethod
    def _copies(self, images: Tensor) -> Iterator[_Copy]:
        """Yield which part of the table each part of a block, its channels first, is copied to."""


class Windows(Convolution):
    """A convolution whose table has a column for each output pixel, with all pixels in its window.

    Rows go by place in the kernel, then channel.
    """

    def pattern(self, places: Tensor, shape: torch.Size) -> Pattern:
        """Return the pattern of the weight, its columns in the order of the table's rows."""
        area = shape[2:].numel()
        channels, spots = places // area % shape[1], places % area
        columns = spots * shape[1] + channels
        rows = places // shape[1:].numel()
        return Pattern.of(rows, columns, num_rows=shape[0], num_columns=shape[1:].numel())

    def table(self, block: Tensor, used: Tensor | None = None) -> Tensor:
        """Return the windows: first copies of all lines, shifted by columns, of which each is then shifted by lines."""
        images = _by_channel(block)
        if self.height.is_pointwise and self.width.is_pointwise:
            return images.reshape(len(images), -1)
        lines = block.new_zeros(self.width.kernel, *images.shape[:2], self._lines, self.width.outputs)
        inside = slice(self.height.padding, self.height.padding + self.height.inputs)
        for x in range(self.width.kernel):
            to_columns, from_columns = self.width.read(x)
            lines[x, :, :, inside, to_columns] = images[..., from_columns]
        table = _room(used, self._table_shape(block))
        if table is None:
            table = block.new_empty(self._table_shape(block))
        reach = (self.height.outputs - 1) * self.height.stride + 1
        for y in range(self.height.kernel):
            begin = y * self.height.dilation
            table[y] = lines[:, :, :, begin : begin + reach : self.height.stride]
        return table.view(self._num_rows(block.shape[1]), -1)

    def write_(self, block: Tensor, product: Tensor) -> None:
        """Write the product with the images first."""
        if is_channels_last(block):
            block.permute(0, 2, 3, 1).view(-1, block.shape[1]).copy_(product.t())
        else:
            block.transpose(0, 1).copy_(product.view(block.shape[1], len(block), *block.shape[2:]))

    def product(self, block: Tensor) -> Tensor:
        """Return the outputs with the channels first."""
        return block.transpose(0, 1).reshape(block.shape[1], -1)

    @property
    def _columns_per_image(self) -> int:
        return self.height.outputs * self.width.outputs

    def _num_rows(self, channels: int) -> int:
        return self.height.kernel * self.width.kernel * channels

    def _table_shape(self, block: Tensor) -> tuple[int, ...]:
        kernel = (self.height.kernel, self.width.kernel)
        return (*kernel, block.shape[1], len(block), self.height.outputs, self.width.outputs)

    def _copies(self, images: Tensor) -> Iterator[_Copy]:
        for y in range(self.height.kernel):
            to_rows, from_rows = self.height.read(y)
            for x in range(self.width.kernel):
                to_columns, from_columns = self.width.read(x)
                yield (y, x, slice(None), slice(None), to_rows, to_columns), images[:, :, from_rows, from_columns]


class Lines(Convolution):
    """A convolution whose table has a row for each line of pixels, so that windows above one another share its rows.

    The table has as many copies of the images as the kernel is wide. The sparse matrix has a copy of the weight for
    each line of outputs instead. Rows go by place in the kernel's width, then channel, then line.
    """

    def pattern(self, places: Tensor, shape: torch.Size) -> Pattern:
        """Return the pattern of the weight for all lines of outputs."""
        num_outputs, channels, _, width = shape
        x, y = places % width, places // width % self.height.kernel
        channel, output = places // shape[2:].numel() % channels, places // shape[1:].numel()
        columns = (x * channels + channel) * self._lines + y * self.height.dilation
        first = Pattern.of(output, columns, num_rows=num_outputs, num_columns=self._num_rows(channels))
        return first.repeated(self.height.outputs, self.height.stride)

    def table(self, block: Tensor, used: Tensor | None = None) -> Tensor:
        """Return shifted copies of the images, one below the other; what lies beside images is zero in all tables."""
        images = _by_channel(block)
        if self._lines == self.height.inputs and self.width.is_pointwise:
            return images.transpose(1, 2).reshape(self._num_rows(len(images)), -1)
        table = _room(used, self._table_shape(block))
        if table is None:
            table = block.new_zeros(self._table_shape(block))
        for target, source in self._copies(images):
            table[target] = source
        return table.view(self._num_rows(len(images)), -1)

    def write_(self, block: Tensor, product: Tensor) -> None:
        """Write the product with images and channels first."""
        lines = product.view(self.height.outputs, -1, len(block), self.width.outputs)
        block.copy_(lines.permute(2, 1, 0, 3))

    def product(self, block: Tensor) -> Tensor:
        """Return the outputs with lines and channels first."""
        return block.permute(2, 1, 0, 3).reshape(self.height.outputs * block.shape[1], -1)

    @property
    def _columns_per_image(self) -> int:
        return self.width.outputs

    def _num_rows(self, channels: int) -> int:
        return self.width.kernel * channels * self._lines

    def _table_shape(self, block: Tensor) -> tuple[int, ...]:
        return (self.width.kernel, block.shape[1], self._lines, len(block), self.width.outputs)

    def _copies(self, images: Tensor) -> Iterator[_Copy]:
        images = images.transpose(1, 2)
        lines = slice(self.height.padding, self.height.padding + self.height.inputs)
        for x in range(self.width.kernel):
            to_columns, from_columns = self.width.read(x)
            yield (x, slice(None), lines, slice(None), to_columns), images[..., from_columns]


class Pixels(Lines):
    """A convolution that computes each pixel by itself, on lines of pixels of a length that suits the cache."""

    def __init__(self, num_pixels: int) -> None:
        width = max(width for width in range(1, COLUMNS * 3 // 2) if num_pixels % width == 0)
        if width < COLUMNS // 3:
            width = num_pixels
        super().__init__(_pointwise(num_pixels // width), _pointwise(width))

    def arranged(self, tensor: Tensor) -> Tensor:
        """Return contiguous images."""
        return tensor.contiguous()

    def empty_output(self, input: Tensor, num_outputs: int) -> Tensor:
        """Return contiguous images."""
        return input.new_empty(len(input), num_outputs, *input.shape[2:])

    def blocks(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return blocks of images, their pixels in other lines."""
        return super().blocks(tensor.view(*tensor.shape[:2], self.height.outputs, self.width.outputs))


def _room(used: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return the table of another block as room for one of this shape, if it has that many numbers."""
    return None if used is None or used.numel() != prod(shape) else used.view(shape)


def is_channels_last(images: Tensor) -> bool:
    """Whether images have their channels last in memory, and not first as well."""
    return images.ndim == 4 and images.stride(1) == 1 and not images.is_contiguous()


def _by_channel(images: Tensor) -> Tensor:
    """Return images with their channels first: a view, or, if channels are last in memory, a copy made at once."""
    if not is_channels_last(images):
        return images.transpose(0, 1)
    number, channels, *sizes = images.shape
    return images.permute(0, 2, 3, 1).reshape(-1, channels).t().contiguous().view(channels, number, *sizes)


def _pointwise(size: int) -> Axis:
    return Axis(size, kernel=1, stride=1, dilation=1, padding=0, outputs=size)
