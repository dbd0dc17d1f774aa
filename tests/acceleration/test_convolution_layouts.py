"""Tables of inputs: every place of a kernel reads what it reads in torch, and gradients go the same way back."""

import pytest
import torch
from sparse_layers import EACH, layer_and_input

from lightning_drive.acceleration.convolution_layouts import Axis
from lightning_drive.acceleration.operations import Operation


@pytest.mark.parametrize("channels_last", [False, True])
@EACH
def test_add_table__adjoint_of_table(name: str, channels_last: bool) -> None:
    """The scalar product of a table with any other one is that of the block with what comes back."""
    layer, _, input = layer_and_input(name)
    operation = Operation.of_layer(layer)
    assert operation is not None
    images = operation.batch(input.detach())
    if channels_last and images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    for layout in operation.layouts(images).values():
        arranged = layout.arranged(images)
        back, table = layout.new_gradient(arranged), None
        for block, target in zip(layout.blocks(arranged), layout.blocks(back), strict=True):
            table = layout.table(block, table)
            other = torch.randn_like(table)
            layout.add_table_(target, other.clone())
            torch.testing.assert_close((table * other).sum(), (block * target).sum())


@EACH
def test_product__what_was_written(name: str) -> None:
    """Outputs that are written block by block are read as they were written."""
    layer, _, input = layer_and_input(name)
    operation = Operation.of_layer(layer)
    assert operation is not None
    images = operation.batch(input.detach())
    for layout in operation.layouts(images).values():
        arranged = layout.arranged(images)
        result = layout.empty_output(arranged, operation.num_outputs)
        for target in layout.blocks(result):
            target.copy_(torch.randn_like(target))
            written = target.clone()
            product = layout.product(target).clone()
            target.zero_()
            layout.write_(target, product)
            assert torch.equal(target, written)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_read__every_output_and_input_within_bounds(stride: int, padding: int, dilation: int) -> None:
    inputs, kernel = 7, 3
    outputs = (inputs + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    axis = Axis(inputs, kernel, stride, dilation, padding, outputs)
    for place in range(kernel):
        to, source = axis.read(place)
        pairs = [(output, output * stride + place * dilation - padding) for output in range(outputs)]
        expected = [pair for pair in pairs if 0 <= pair[1] < inputs]
        assert list(zip(range(outputs)[to], range(inputs)[source], strict=True)) == expected
