"""Zeros are counted in tensors of every kind, or it is plain that they were not."""

import pytest
import torch

from lightning_drive.report import zeros

COUNTED = {
    **{
        str(dtype): (torch.tensor([0, 3, 0]).to(dtype), 2)
        for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.bfloat16, torch.float8_e4m3fn)
    },
    "expanded": (torch.tensor([[0.0], [1.0]]).expand(2, 1000), 1000),
    "strided": (torch.arange(6.0).view(2, 3).t(), 1),
    "negative_zero": (torch.tensor([-0.0, 1.0]), 1),
    "empty": (torch.zeros(0, 3), 0),
    "scalar": (torch.tensor(0.0), 1),
}
NOT_COUNTED = {
    "meta": torch.zeros(3, device="meta"),
    "sparse": torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_count_zeros(kind: str) -> None:
    tensor, expected = COUNTED[kind]
    [counted] = zeros.count_zeros({"weight": tensor})
    assert counted == {
        "name": "weight",
        "shape": list(tensor.shape),
        "numbers": tensor.numel(),
        "zeros": expected,
    }


@pytest.mark.parametrize("kind", NOT_COUNTED)
def test_count_zeros__unknown(kind: str) -> None:
    """Nothing is invented: neither of the tensor, nor of the sum of all."""
    counted = zeros.count_zeros({"odd": NOT_COUNTED[kind], "plain": torch.zeros(2)})
    assert [tensor["zeros"] for tensor in counted] == [None, 2]
    _, odd, plain, total = (line.split() for line in zeros.table(counted))
    assert (odd[-2:], plain[-2:], total[-2:]) == (["-", "-"], ["2", "100.00%"], ["-", "-"])


def test_count_zeros__repeated_numbers() -> None:
    """What only repeats one number is counted at once; any other claim beyond the memory is an error."""
    repeated = torch.zeros(1).as_strided((1 << 30,), (0,))
    assert zeros.count_zeros({"weight": repeated})[0]["zeros"] == 1 << 30
    overlapping = torch.zeros(1 << 17).as_strided((1 << 16, 1 << 16), (1, 1))
    with pytest.raises(ValueError, match=r"'weight' claims 4,294,967,296 numbers, far more than it has in memory"):
        zeros.count_zeros({"weight": overlapping})
