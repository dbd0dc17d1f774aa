"""What is stored comes back to the bit, and is smaller where it can be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from stored import DTYPES, assert_same, first_ones, random_bits
from torch import Tensor, nn

from lightning_drive import load_sparse, save_sparse
from lightning_drive.core.bits import pack

SHAPES = [(), (1,), (0,), (3, 0, 2), (7,), (8, 25), (64, 65), (3, 4, 5, 6)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
def test_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever the numbers, shapes and densities."""
    generator = torch.Generator().manual_seed(0)
    state_dict = {
        f"{density}/{shape}": random_bits(shape, dtype, density, generator)
        for density in (0.0, 0.02, 0.5, 1.0)
        for shape in SHAPES
    }
    save_sparse(state_dict, tmp_path / "file")
    assert_same(load_sparse(tmp_path / "file"), state_dict)


def test_round_trip__negative_zero_and_nan(tmp_path: Path) -> None:
    """A -0.0 is a value, and a NaN keeps its payload."""
    tensor = torch.zeros(1000)
    tensor[3] = -0.0
    tensor.view(torch.int32)[5] = 0x7FA0_1234  # a signalling NaN
    save_sparse({"tensor": tensor}, tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.get_tensor("tensor.values").view(torch.int32).tolist() == [-(1 << 31), 0x7FA0_1234]
    assert_same(load_sparse(tmp_path / "file"), {"tensor": tensor})


def test_round_trip__layouts(tmp_path: Path) -> None:
    """Not contiguous, expanded, channels last, conjugated, negated, parameters."""
    base = first_ones(40, 50, kept=7)
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    waves = torch.randn(30, dtype=torch.complex64)
    state_dict = {
        "transposed": base.t(),
        "every_other": torch.arange(100.0)[::2],
        "expanded": torch.ones(1, 4).expand(300, 4),
        "channels_last": image,
        "waves": waves,
        "conjugated": waves.conj(),
        "imaginary": waves.conj().imag,
        "negated": torch._neg_view(base),
        "parameter": nn.Parameter(torch.randn(3)),
    }
    save_sparse(state_dict, tmp_path / "file")
    assert_same(load_sparse(tmp_path / "file"), state_dict)


ONE_NUMBER: dict[str, Callable[[Tensor], Tensor]] = {
    "column": lambda numbers: numbers.view(1, 24)[:, 3],
    "corner": lambda numbers: numbers.view(4, 6)[3:, 5:].t(),
    "block": lambda numbers: numbers.view(2, 3, 4)[1:, 2:, 3:].permute(2, 0, 1),
    "scalar": lambda numbers: numbers.view(4, 6)[1, 2],
    "strided": lambda numbers: numbers.as_strided((1, 1), (7, 11), 5),
    "expanded": lambda numbers: numbers[4].expand(1, 3),
    "nothing": lambda numbers: numbers.view(4, 6)[:0, ::2].t(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("view", ONE_NUMBER)
def test_round_trip__views_of_one_number(view: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Whose strides may be anything, although they are contiguous; also conjugated and negated ones."""
    odd = ONE_NUMBER[view](random_bits((24,), dtype, 1.0, torch.Generator().manual_seed(0)))
    state_dict = {"odd": odd, "parameter": nn.Parameter(odd, requires_grad=False)}
    if dtype in (torch.complex64, torch.complex128):
        state_dict |= {"conjugated": odd.conj(), "imaginary": odd.conj().imag}
    elif dtype in (torch.float32, torch.float64):
        state_dict |= {"negated": torch._neg_view(odd)}
    save_sparse(state_dict, tmp_path / "file")
    found = load_sparse(tmp_path / "file")
    assert list(found) == list(state_dict)
    for name, tensor in state_dict.items():
        expected = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].untyped_storage().tolist() == expected.reshape(-1).untyped_storage().tolist()


def test_save_sparse__format(tmp_path: Path) -> None:
    """The bits of `bits.pack` and the values in order; all else as any reader of safetensors expects it."""
    weight, bias = torch.zeros(30, 40), torch.randn(40)
    weight[2, 3], weight[4, 5] = 0.5, -2.0
    save_sparse({"weight": weight, "bias": bias}, tmp_path / "file")
    found = safetensors.torch.load_file(tmp_path / "file")
    assert found.keys() == {"weight.bits", "weight.values", "bias"}
    assert torch.equal(found["weight.bits"], pack(weight != 0))
    assert torch.equal(found["weight.values"], torch.tensor([0.5, -2.0]))
    assert torch.equal(found["bias"], bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bool, torch.complex64], ids=str)
def test_save_sparse__no_larger_than_dense(dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors are stored sparse exactly where that makes the file smaller, give or take what names take."""
    generator = torch.Generator().manual_seed(0)
    for density in (0.0, 0.3, 0.8, 0.9, 0.97, 1.0):
        tensor = random_bits((200, 50), dtype, 1.0, generator)
        tensor.view(-1)[int(density * 10_000) :] = 0
        save_sparse({"tensor": tensor}, tmp_path / "file")
        kept = int(tensor.count_nonzero())
        expected = min(tensor.nbytes, 10_000 // 8 + kept * tensor.itemsize)
        assert abs((tmp_path / "file").stat().st_size - expected) < 700


def test_save_sparse__small_tensors_stay(tmp_path: Path) -> None:
    """Two entries in the header would be longer than what is saved."""
    save_sparse({"small": torch.zeros(60)}, tmp_path / "file")
    assert safetensors.torch.load_file(tmp_path / "file").keys() == {"small"}


def test_save_sparse__name_clashes(tmp_path: Path) -> None:
    """Whatever names there are, nothing takes the place of anything else."""
    for clash in ("a.bits", "a.values"):
        state_dict = {
            "a": first_ones(40, 40),
            clash: torch.arange(5.0),
            "": first_ones(40, 40),
            "é \n\"'": first_ones(40, 40),
        }
        save_sparse(state_dict, tmp_path / "file")
        assert_same(load_sparse(tmp_path / "file"), state_dict)


def test_save_sparse__nothing(tmp_path: Path) -> None:
    save_sparse({}, tmp_path / "file")
    assert load_sparse(tmp_path / "file") == {}
