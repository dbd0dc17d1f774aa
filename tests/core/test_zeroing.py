"""What masks prune becomes +0 to the bit, and what they keep stays to the bit, whatever it is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_drive import Masks
from lightning_drive.core import grouped_tensors, zeroing
from lightning_drive.network.masked_parameters import MaskedParameters

INF, NAN = float("inf"), float("nan")
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64, torch.complex128, torch.int32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 100, 1 << 19])
def test_zero_(dtype: torch.dtype, layout: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pruned is +0 to the bit, and what is kept is what it was to the bit: NaN, -0.0 and infinities, too."""
    monkeypatch.setattr(grouped_tensors, "CHUNK", chunk)
    values = (
        torch.tensor([1.5, -2.0, -0.0]) if dtype == torch.int32 else torch.tensor([1.5, -2.0, NAN, INF, -INF, -0.0])
    )
    generator = torch.Generator().manual_seed(0)
    tensor = values[torch.randint(len(values), (6, 5, 3, 4), generator=generator)].to(dtype)
    mask = torch.rand(tensor.shape, generator=generator) < 0.4
    kept = mask.flatten().tolist()
    expected = [bits if keeps else bytes(len(bits)) for bits, keeps in zip(bits_of(tensor), kept, strict=True)]

    once, again = layout(tensor).clone(), layout(tensor).clone()
    zeroing.zero_({"weight": once}, {"weight": mask})
    module = nn.ParameterDict({"weight": nn.Parameter(again, requires_grad=False)})
    live = MaskedParameters(module, Masks({"weight": mask}))
    live.zero_weights_()
    assert bits_of(once) == bits_of(module["weight"].detach()) == expected


def bits_of(tensor: torch.Tensor) -> list[bytes]:
    flat = tensor.contiguous().view(-1, 1).view(torch.uint8)
    return [bytes(row) for row in flat.tolist()]


def test_zero___scalar_and_empty() -> None:
    for shape in ((), (0, 3)):
        tensor = torch.full(shape, NAN)
        zeroing.zero_({"": tensor}, {"": torch.zeros(shape, dtype=torch.bool)})
        assert tensor.equal(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_zero___many(tensors: list[Tensor], dtype: torch.dtype) -> None:
    """The same bits as one by one: -0.0, NaN and infinity are kept, or become 0, in any memory layout."""
    odd = torch.tensor([-0.0, NAN, INF, -INF, 1e-45])
    given = [torch.cat([tensor.flatten(), odd]) for tensor in tensors] + [torch.randn(3, 4).t(), *tensors]
    given = [(tensor if dtype.is_floating_point else tensor.nan_to_num(0, 1, -1)).to(dtype) for tensor in given]
    named = {str(index): tensor for index, tensor in enumerate(given)}
    masks = {name: torch.rand(tensor.shape) < 0.5 for name, tensor in named.items()}
    expected = {name: tensor.clone() for name, tensor in named.items()}
    for name, tensor in expected.items():
        zeroing.zero_({name: tensor}, masks)
    zeroing.zero_(named, {**masks, "of none": torch.zeros(2, dtype=torch.bool)})
    assert all(bits_of(tensor) == bits_of(expected[name]) for name, tensor in named.items())


def test_zero___over_one_memory() -> None:
    """Each mask clears its own zeros, also where two names stand for the same numbers."""
    weight = torch.ones(4)
    masks = {"a": torch.tensor([True, False, True, True]), "b": torch.tensor([True, True, False, True])}
    zeroing.zero_({"a": weight, "b": weight.view(4)}, masks)
    assert weight.tolist() == [1, 0, 0, 1]
