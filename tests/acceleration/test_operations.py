"""Every form of every layer computes what torch does: outputs, gradients of inputs and of kept weights, in float64."""

import pytest
import torch
import torch.nn.functional as F
from sparse_layers import EACH, KEPT, layer_and_input
from torch import nn

from lightning_drive.acceleration import operations
from lightning_drive.acceleration.operations import Operation

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kept", KEPT)
@EACH
def test_each__dense_oracle(name: str, kept: str, channels_last: bool) -> None:
    layer, places, input = layer_and_input(name, kept)
    operation = Operation.of_layer(layer)
    assert operation is not None
    if channels_last and input.ndim == 4 and operation.stride:
        input = input.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = layer(input)
    gradient = torch.randn_like(expected)
    of_input, of_weight = torch.autograd.grad(expected, [input, layer.weight], gradient)

    images = operation.batch(input.detach())
    layouts = operation.layouts(images)
    assert layouts
    for layout in layouts.values():
        pattern = operation.pattern(layout, places)
        entries = pattern.values(layer.weight.detach().flatten()[places])
        bias = None if layer.bias is None else layer.bias.detach()
        result = operations.output(operation, layout, pattern, entries, bias, images)
        torch.testing.assert_close(operation.unbatch(result, input), expected.detach())
        batched = gradient if not operation.stride else gradient.view(result.shape)
        of_images, of_kept = operations.gradients(layout, pattern, entries, images, batched, True)
        assert of_images is not None
        torch.testing.assert_close(operation.unbatch(of_images, input), of_input)
        torch.testing.assert_close(of_kept, of_weight.flatten()[places])
        nothing, alone = operations.gradients(layout, pattern, entries, images, batched, False)
        assert nothing is None
        torch.testing.assert_close(alone, of_kept)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(3, 4, 3),
        nn.ConvTranspose2d(3, 4, 3),
        nn.Embedding(3, 4),
        type("Own", (nn.Linear,), {"forward": lambda self, input: input})(3, 4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_of_layer__none_for_others(layer: nn.Module) -> None:
    assert Operation.of_layer(layer) is None


def test_of_call__same_as_of_layer() -> None:
    layer = nn.Conv2d(3, 4, (3, 4), padding="same", dilation=(2, 1))
    assert Operation.of_call(torch.conv2d, (4, 3, 3, 4), 1, "same", (2, 1)) == Operation.of_layer(layer)
    assert Operation.of_call(F.linear, (4, 3)) == Operation.of_layer(nn.Linear(3, 4))
