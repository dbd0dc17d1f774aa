"""State dicts to store in sparse files, and files that say something else of themselves with a right checksum."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_drive.export import sparse_format

FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")  # some are newer


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.complex32),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    torch.bool,
    *(getattr(torch, name) for name in FLOAT8 if hasattr(torch, name)),
]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, density: float, generator: torch.Generator) -> Tensor:
    """Return numbers of any bits at all, NaN with payloads and -0.0 among them, of which a part is not 0."""
    numbers = torch.Size(shape).numel()
    data = torch.randint(256, (numbers, dtype.itemsize), generator=generator, dtype=torch.uint8)
    if dtype == torch.bool:
        data = data % 2
    data[torch.rand(numbers, generator=generator) >= density] = 0
    return data.view(-1).view(dtype).view(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def first_ones(*shape: int, kept: int = 5) -> Tensor:
    """Return a tensor with as many ones, the first ones."""
    tensor = torch.zeros(shape)
    tensor.view(-1)[:kept] = 1
    return tensor


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def crafted(path: Path, change: Change) -> None:
    """Change what a file says of itself, or its tensors, and write it again with the right checksum."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        stored = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    record = json.loads(metadata.pop("lightning_drive"))
    change(record, stored)
    record["digest"] = sparse_format.digest_of(record, metadata, stored)
    safetensors.torch.save_file(stored, path, {**metadata, "lightning_drive": json.dumps(record)})
