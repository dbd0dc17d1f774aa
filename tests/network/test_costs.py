"""Multiply-adds are those one counts by hand, per weight and sample."""

import re

import models
import pytest
import torch
from costing import measure
from torch import Tensor, nn

from lightning_drive.network import costs, prunable
from lightning_drive.network.forward_passes import ForwardPass


@pytest.mark.parametrize("batch_size", [1, 5])
def test_measure__mlp(batch_size: int) -> None:
    """One for each weight, whatever the batch."""
    measured = measure(models.MLP(6, 4, 3), torch.randn(batch_size, 6))
    assert (measured.multiply_adds, measured.others) == ({"0.weight": 24, "2.weight": 12}, 0)
    assert (measured.itemsizes, measured.error, measured.warnings) == ({"0.weight": 4, "2.weight": 4}, None, ())


def test_measure__convolutions() -> None:
    """Each weight once for every pixel of the output: 6x6, after pooling 3x3, and one."""
    measured = measure(models.ConvNet(), torch.randn(2, 2, 6, 6))
    assert measured.multiply_adds == {"conv1.weight": 36 * 4 * 2 * 9, "conv2.weight": 9 * 5 * 4 * 9, "fc.weight": 15}


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        pytest.param(nn.Conv2d(4, 6, 3, groups=2), (4, 8, 8), 6 * 6 * 6 * 2 * 9, id="groups"),
        pytest.param(nn.Conv2d(4, 6, 3, stride=2, dilation=2), (4, 9, 9), 3 * 3 * 6 * 4 * 9, id="stride_dilation"),
        pytest.param(nn.Conv1d(2, 3, 5), (2, 9), 5 * 3 * 2 * 5, id="1d"),
        pytest.param(nn.ConvTranspose2d(2, 3, 4, stride=2), (2, 5, 5), 5 * 5 * 2 * 3 * 16, id="transposed"),
        pytest.param(nn.Linear(4, 5), (7, 4), 7 * 20, id="every_token"),
    ],
)
def test_measure__layer(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    counts = measure(nn.Sequential(layer), torch.randn(3, *shape))
    assert (counts.multiply_adds, counts.others) == ({"0.weight": expected}, 0)


def resnet18_by_hand() -> list[int]:
    """ResNet-18 for 32x32 images: pixels of the output, times channels, times inputs and kernel."""
    counts, channels = [32 * 32 * 64 * 3 * 9], 64
    for pixels, wider in ((32 * 32, 64), (16 * 16, 128), (8 * 8, 256), (4 * 4, 512)):
        counts += [pixels * wider * channels * 9, pixels * wider * wider * 9]
        counts += [pixels * wider * channels] if wider > channels else []
        counts += [pixels * wider * wider * 9] * 2
        channels = wider
    return [*counts, 512 * 10]


def test_measure__resnet18() -> None:
    """The well-known 0.56 billion."""
    resnet = pytest.importorskip("torchvision.models").resnet18(num_classes=10)
    resnet.conv1, resnet.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    measured = measure(resnet, torch.randn(2, 3, 32, 32))
    assert list(measured.multiply_adds.values()) == resnet18_by_hand()
    assert sum(resnet18_by_hand()) == 555_422_720


def test_measure__attention() -> None:
    """The projections belong to their weights, also where they are not called as a layer; the products to none."""
    measured = measure(models.Attention(), torch.randn(2, 16))
    assert measured.multiply_adds == {
        "attention.in_proj_weight": 4 * 12 * 4,
        "attention.out_proj.weight": 4 * 4 * 4,
        "fc.weight": 12,
    }
    assert measured.others == 2 * 4 * 4 * 4  # queries and keys, then values: 4 by 4 tokens, 4 numbers


class FusedAttention(nn.Module):
    """Attention as one operation of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(query, key, value)


def test_measure__fused_attention() -> None:
    measured = measure(FusedAttention(), torch.randn(1, 5, 8))
    assert (measured.multiply_adds, measured.others) == ({"project.weight": 5 * 24 * 8}, 2 * 5 * 5 * 8)


def test_measure__tied() -> None:
    """A weight that is used twice works twice."""
    measured = measure(models.Tied(), torch.randn(3, 4))
    assert measured.multiply_adds == {"first.weight": 32, "head.weight": 12}


class Standardised(nn.Conv2d):
    """Computes with a standardised kernel, as normaliser-free networks do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return self._conv_forward(x, weight, self.bias)


class Gained(nn.Linear):
    """Multiplies its weight by a gain."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(sizes[1], 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.gain, self.bias)


class Lowered(nn.Linear):
    """Computes in another type."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return torch.addmm(self.bias.double(), x.double(), self.weight.double().T).float()


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        pytest.param(Standardised(2, 3, 3), (2, 5, 5), 9 * 2 * 3 * 9, id="standardised"),
        pytest.param(Gained(6, 4), (6,), 24, id="gain"),
        pytest.param(Lowered(6, 4), (6,), 24, id="type"),
    ],
)
def test_measure__computed_weight(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    """What a product with a computed weight costs belongs to the weight, and not to the bias beside it."""
    measured = measure(nn.Sequential(layer), torch.randn(2, *shape))
    assert (measured.multiply_adds, measured.others) == ({"0.weight": expected}, 0)


def test_measure__others() -> None:
    """What is left out of pruning costs all the same."""
    module = models.MLP(6, 4, 3)
    measured = measure(module, torch.randn(1, 6), ["0.weight"])
    assert (measured.multiply_adds, measured.others) == ({"0.weight": 24}, 12)


@pytest.mark.parametrize(
    ("dtype", "input_dtype", "itemsize"),
    [
        (torch.float64, torch.float32, 8),
        (torch.float64, torch.float64, 8),
        (torch.bfloat16, torch.bfloat16, 2),
        (torch.float16, torch.float32, 2),
    ],
    ids=str,
)
def test_measure__precision(dtype: torch.dtype, input_dtype: torch.dtype, itemsize: int) -> None:
    module = models.MLP(6, 3).to(dtype)
    measured = measure(module, torch.randn(2, 6).to(input_dtype))
    assert (measured.multiply_adds, measured.others) == ({"0.weight": 18}, 0)
    assert costs.measure(module, dict(module.named_parameters()), None).itemsizes["0.weight"] == itemsize


def test_measure__one_forward_pass() -> None:
    module, calls = models.MLP(6, 4, 3), models.Record()
    module.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape)))
    measure(module, torch.randn(7, 6))
    assert calls == [(1, 6)]


class Partly(nn.Module):
    """Uses one layer in a way that the counter has no formula for, one in training only, and one always."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.auxiliary, self.last = nn.Bilinear(3, 3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.two(x, x)
        return self.last(hidden) + self.auxiliary(hidden) if self.training else self.last(hidden)


def test_measure__partly() -> None:
    """What cannot be counted is not known; what is not used is nothing; both are said."""
    module = Partly()
    measured = measure(module, torch.randn(1, 3), [name for name, _ in module.named_parameters()])
    assert measured.others is None
    assert {name: number for name, number in measured.multiply_adds.items() if name.endswith("weight")} == {
        "two.weight": None,
        "auxiliary.weight": 0,
        "last.weight": 8,
    }
    assert measured.multiply_adds["last.bias"] == 0
    unused, unknown = measured.warnings
    assert "did not use 'auxiliary.weight', 'auxiliary.bias' in eval mode" in unused
    assert "'two.weight'" in unknown
    assert "no formula" in unknown


@pytest.mark.parametrize(
    ("example_input", "error"),
    [
        pytest.param(torch.randn(2, 5), r"RuntimeError: .*shapes cannot be multiplied.*", id="fails"),
        pytest.param(None, None, id="unknown_input"),
    ],
)
def test_measure__not_possible(example_input: Tensor | None, error: str | None) -> None:
    """Never an invented number."""
    measured = measure(models.MLP(6, 3), example_input)
    assert (measured.itemsizes, measured.multiply_adds, measured.others) == ({"0.weight": 4}, {"0.weight": None}, None)
    if error is None:
        assert measured.error is None
    else:
        assert measured.error is not None
        assert re.match(error, measured.error)


def test_empty_parts_cost_nothing() -> None:
    """An expert that got no sample is one that the counter has a formula for."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.first(x), self.second(x[:0])])

    module = Experts()
    measured = costs.measure(module, prunable.prunable_parameters(module), torch.zeros(1, 4))
    assert measured.multiply_adds == {"first.weight": 12, "second.weight": 0}
    assert (measured.others, measured.warnings) == (0, ())


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo], ids=str)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_constants(layout: torch.layout) -> None:
    """They have no place in memory to look for parameters at."""

    class Neighbours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.neighbours = nn.Parameter(torch.eye(3).to_sparse(layout=layout), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.neighbours @ self.head(x)

    module = Neighbours()
    nodes = ForwardPass.of(torch.randn(3, 4), whole=True)
    measured = costs.measure(module, {"head.weight": module.head.weight}, nodes)
    assert measured.error is None
    assert measured.multiply_adds["head.weight"]
