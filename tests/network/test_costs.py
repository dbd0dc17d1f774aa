"""Multiply-adds are those one counts by hand, per weight and sample, and zeros that are lost in products are seen."""

import re
from collections.abc import Callable, Collection
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_drive.network import costs, flop_formulas, prunable
from lightning_drive.network.costs import Costs
from lightning_drive.network.forward_passes import ForwardPass
from lightning_drive.network.undisturbed import undisturbed


def measure(module: nn.Module, example_input: Any, names: Collection[str] | None = None, **masks: Any) -> Costs:
    names = prunable.prunable_parameters(module) if names is None else names
    with undisturbed(module, "eval") as scored:
        parameters = dict(scored.module.named_parameters())
        return costs.measure(scored.module, {name: parameters[name] for name in names}, example_input, **masks)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_measure__mlp(batch_size: int) -> None:
    """One for each weight, whatever the batch."""
    found = measure(models.MLP(6, 4, 3), torch.randn(batch_size, 6))
    assert (found.multiply_adds, found.others) == ({"0.weight": 24, "2.weight": 12}, 0)
    assert (found.itemsizes, found.error, found.warnings) == ({"0.weight": 4, "2.weight": 4}, None, ())


def test_measure__convolutions() -> None:
    """Each weight once for every pixel of the output: 6x6, after pooling 3x3, and one."""
    found = measure(models.ConvNet(), torch.randn(2, 2, 6, 6))
    assert found.multiply_adds == {"conv1.weight": 36 * 4 * 2 * 9, "conv2.weight": 9 * 5 * 4 * 9, "fc.weight": 15}


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
    found = measure(nn.Sequential(layer), torch.randn(3, *shape))
    assert (found.multiply_adds, found.others) == ({"0.weight": expected}, 0)


def resnet18_by_hand() -> list[int]:
    """ResNet-18 for 32x32 images: pixels of the output, times channels, times inputs and kernel."""
    found, channels = [32 * 32 * 64 * 3 * 9], 64
    for pixels, wider in ((32 * 32, 64), (16 * 16, 128), (8 * 8, 256), (4 * 4, 512)):
        found += [pixels * wider * channels * 9, pixels * wider * wider * 9]
        found += [pixels * wider * channels] if wider > channels else []
        found += [pixels * wider * wider * 9] * 2
        channels = wider
    return [*found, 512 * 10]


def test_measure__resnet18() -> None:
    """The well-known 0.56 billion."""
    resnet = pytest.importorskip("torchvision.models").resnet18(num_classes=10)
    resnet.conv1, resnet.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    found = measure(resnet, torch.randn(2, 3, 32, 32))
    assert list(found.multiply_adds.values()) == resnet18_by_hand()
    assert sum(resnet18_by_hand()) == 555_422_720


def test_measure__attention() -> None:
    """The projections belong to their weights, also where they are not called as a layer; the products to none."""
    found = measure(models.Attention(), torch.randn(2, 16))
    assert found.multiply_adds == {
        "attention.in_proj_weight": 4 * 12 * 4,
        "attention.out_proj.weight": 4 * 4 * 4,
        "fc.weight": 12,
    }
    assert found.others == 2 * 4 * 4 * 4  # queries and keys, then values: 4 by 4 tokens, 4 numbers


class FusedAttention(nn.Module):
    """Attention as one operation of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(query, key, value)


def test_measure__fused_attention() -> None:
    found = measure(FusedAttention(), torch.randn(1, 5, 8))
    assert (found.multiply_adds, found.others) == ({"project.weight": 5 * 24 * 8}, 2 * 5 * 5 * 8)


def test_measure__tied() -> None:
    """A weight that is used twice works twice."""
    found = measure(models.Tied(), torch.randn(3, 4))
    assert found.multiply_adds == {"first.weight": 32, "head.weight": 12}


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
    found = measure(nn.Sequential(layer), torch.randn(2, *shape))
    assert (found.multiply_adds, found.others) == ({"0.weight": expected}, 0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        pytest.param((7, 4), (3, 4, 5), 7 * 4 * 5, id="rows_in_groups"),
        pytest.param((3, 2, 4), (4, 6), 2 * 4 * 6, id="columns_in_groups"),
        pytest.param((3, 2, 4), (3, 4, 5), 3 * 2 * 4 * 5, id="batch"),
    ],
)
def test_grouped_products(first: tuple[int, ...], second: tuple[int, ...], expected: int) -> None:
    assert flop_formulas.grouped(first, second, None, offs=None) == 2 * expected


def test_measure__others() -> None:
    """What is left out of pruning costs all the same."""
    module = models.MLP(6, 4, 3)
    found = measure(module, torch.randn(1, 6), ["0.weight"])
    assert (found.multiply_adds, found.others) == ({"0.weight": 24}, 12)


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
    found = measure(module, torch.randn(2, 6).to(input_dtype))
    assert (found.multiply_adds, found.others) == ({"0.weight": 18}, 0)
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
    found = measure(module, torch.randn(1, 3), [name for name, _ in module.named_parameters()])
    assert found.others is None
    assert {name: number for name, number in found.multiply_adds.items() if name.endswith("weight")} == {
        "two.weight": None,
        "auxiliary.weight": 0,
        "last.weight": 8,
    }
    assert found.multiply_adds["last.bias"] == 0
    unused, unknown = found.warnings
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
    found = measure(models.MLP(6, 3), example_input)
    assert (found.itemsizes, found.multiply_adds, found.others) == ({"0.weight": 4}, {"0.weight": None}, None)
    if error is None:
        assert found.error is None
    else:
        assert found.error is not None
        assert re.match(error, found.error)


# What is multiplied with: zeros that stay, and what is added to them.


class Computing(nn.Linear):
    """Multiplies with what it computes from its weight."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(6, 5)
        self.compute = compute
        self.shift, self.scale = nn.Parameter(torch.zeros(5, 1)), nn.Parameter(torch.zeros(5, 1))
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(5, 2))
        self.step = nn.Parameter(torch.tensor(0.1))
        self.register_buffer("nothing", torch.zeros(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.compute(self, self.weight), self.bias)


@pytest.mark.parametrize(
    ("compute", "is_dense"),
    [
        (lambda layer, weight: weight + layer.lora_B @ layer.lora_A, True),
        (lambda layer, weight: weight - layer.shift, True),
        (lambda layer, weight: weight.clone().add_(0.5 * layer.shift), True),
        (lambda layer, weight: weight * (1 + layer.scale), False),
        (lambda layer, weight: weight + layer.nothing, False),
        (lambda layer, weight: weight + ((weight / layer.step).round() * layer.step - weight).detach(), False),
    ],
    ids=["low_rank", "shift", "in_place", "scale", "buffer", "learned_step"],
)
def test_what_is_still_zero_is_added(compute: Any, is_dense: bool) -> None:
    """A term that training will make other than 0 counts as what it will be; one that nobody trains as what it is."""
    module = nn.Sequential(Computing(compute), nn.ReLU(), nn.Linear(5, 3))
    masks = {"0.weight": torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) > 0.5}
    with torch.no_grad():
        module.get_parameter("0.weight").mul_(masks["0.weight"])
    measured = measure(module, torch.ones(2, 6), ["0.weight"], masks=masks)
    assert measured.error is None
    assert measured.dense_again == (("0.weight",) if is_dense else ())


def test_products_with_one_vector() -> None:
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.addmv(torch.ones(3), self.second.T, torch.mv(self.first, each)) for each in x])

    module = OneByOne()
    measured = measure(module, torch.ones(4, 6), ["first", "second"])
    assert measured.multiply_adds == {"first": 30, "second": 15}
    assert measured.in_products == ("first", "second")
    assert not measured.warnings


# --- what is multiplied with


def standardised(weight: Tensor) -> Tensor:
    return (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1e-6)


def merged(weight: Tensor) -> Tensor:
    torch.manual_seed(1)
    return weight + torch.rand(len(weight), 2) @ torch.rand(2, weight[0].numel())


def centred_in_place(weight: Tensor) -> Tensor:
    return weight.clone().sub_(weight.mean())


def gain(weight: Tensor) -> Tensor:
    return weight * torch.linspace(1, 2, len(weight)).unsqueeze(1)


DENSE = {
    "standardised": standardised,
    "centred": lambda weight: weight - weight.mean(),
    "centred_in_place": centred_in_place,
    "added_to": merged,
    "binarised": lambda weight: torch.where(weight >= 0, 1.0, -1.0),
    "softmax": lambda weight: weight.softmax(1),
    "real_part": lambda weight: torch.fft.fft(weight).real,
    "smoothed": lambda weight: weight + 0.1 * weight.roll(1, 1),
}
SPARSE = {
    "itself": lambda weight: weight,
    "gain": gain,
    "normalised": lambda weight: weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-9),
    "clipped": lambda weight: weight.clamp(-0.1, 0.1),
    "transposed_twice": lambda weight: weight.t().contiguous().t(),
    "repeated": lambda weight: weight.repeat(2, 1)[: len(weight)],
    "sign": torch.sign,
    "cast": lambda weight: weight.double().float(),
    "masked": lambda weight: standardised(weight) * (weight != 0),
}


class Computes(nn.Module):
    """Multiplies, in one of several ways, with what it computes from its weight."""

    def __init__(self, compute: Any, way: str) -> None:
        super().__init__()
        self.weight, self.compute, self.way = nn.Parameter(torch.randn(12, 9)), compute, way
        self.last = nn.Linear(4 if way == "conv" else 12, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.compute(self.weight)
        if self.way == "linear":
            return self.last(nn.functional.linear(x, weight))  # type: ignore[no-any-return]
        if self.way == "matmul":
            return self.last(x @ weight.t())  # type: ignore[no-any-return]
        if self.way == "einsum":
            return self.last(torch.einsum("bi,oi->bo", x, weight))  # type: ignore[no-any-return]
        if self.way == "chunks":
            return self.last(torch.cat([x @ part.t() for part in weight.chunk(3)], 1))  # type: ignore[no-any-return]
        images = x.reshape(-1, 1, 3, 3).expand(-1, 3, 3, 3)
        return self.last(nn.functional.conv2d(images, weight.reshape(4, 3, 3, 3)).flatten(1))  # type: ignore[no-any-return]


WAYS = ["linear", "matmul", "einsum", "chunks", "conv"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [*DENSE, *SPARSE])
def test_measure__dense_again(kind: str, way: str) -> None:
    """Zeros that do not stay zeros are seen, whatever the layer does, and those that do are never complained of."""
    torch.manual_seed(0)
    module = Computes((DENSE | SPARSE)[kind], way)
    mask = torch.rand(12, 9) > 0.7
    with torch.no_grad():
        module.weight.mul_(mask)
    found = measure(module, torch.randn(5, 9), ["weight"], masks={"weight": mask})
    assert found.error is None
    assert found.dense_again == (("weight",) if kind in DENSE else ())
    assert "weight" in found.in_products


def test_measure__dense_again_only_where_something_is_pruned() -> None:
    module = Computes(standardised, "linear")
    found = measure(module, torch.randn(5, 9), ["weight"], masks={"weight": torch.ones(12, 9, dtype=torch.bool)})
    assert found.dense_again == ()


class Expert(nn.Module):
    """Chooses one matrix of a parameter for every sample."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.table, self.shift = nn.Embedding(7, 6), nn.Parameter(torch.randn(1, 6))
        self.up, self.how = nn.Parameter(torch.randn(4, 6, 5)), how

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.shift
        if self.how == "bmm":
            return torch.bmm(x.unsqueeze(1), self.up[tokens % 4])
        if self.how == "einsum":
            return torch.einsum("bi,eio->beo", x, self.up)
        return torch.stack([row @ self.up[int(token) % 4] for row, token in zip(x, tokens, strict=True)])


@pytest.mark.parametrize("how", ["bmm", "einsum", "loop"])
def test_measure__in_products(how: str) -> None:
    """Experts are multiplied with; a table is looked up, a shift is added."""
    found = measure(Expert(how), torch.tensor([1, 2, 3]), ["up"])
    assert found.in_products == ("up",)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.LSTM(4, 5, batch_first=True), {"0.weight_ih_l0": 7 * 4 * 20, "0.weight_hh_l0": 7 * 5 * 20}),
        (nn.GRU(4, 5, batch_first=True), {"0.weight_ih_l0": 7 * 4 * 15, "0.weight_hh_l0": 7 * 5 * 15}),
        (nn.RNN(4, 5, batch_first=True), {"0.weight_ih_l0": 7 * 4 * 5, "0.weight_hh_l0": 7 * 5 * 5}),
    ],
    ids=["lstm", "gru", "rnn"],
)
def test_measure__recurrent(layer: nn.Module, expected: dict[str, int]) -> None:
    """Each weight once for every step of a sequence."""

    class Last(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)[0]  # type: ignore[no-any-return]

    found = measure(Last(layer), torch.randn(3, 7, 4), expected)
    assert (found.multiply_adds, found.others) == (expected, 0)


def test_empty_parts_cost_nothing() -> None:
    """An expert that got no sample is one that the counter has a formula for."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.first(x), self.second(x[:0])])

    module = Experts()
    found = costs.measure(module, prunable.prunable_parameters(module), torch.zeros(1, 4))
    assert found.multiply_adds == {"first.weight": 12, "second.weight": 0}
    assert (found.others, found.warnings) == (0, ())


@pytest.mark.parametrize(
    "product",
    [lambda w, x: w @ x, lambda w, x: torch.addmv(w[:, 0], w, x), lambda w, x: torch.stack([row.dot(x) for row in w])],
    ids=["mv", "addmv", "dot"],
)
def test_products_with_a_vector(product: Any) -> None:
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([product(self.weight, row) for row in x])

    found = costs.measure(OneByOne(), prunable.prunable_parameters(OneByOne(), ["*"]), torch.zeros(1, 4))
    assert found.multiply_adds == {"weight": 12}
    assert found.others == 0


@torch.library.custom_op("lightning_drive_tests::attention", mutates_args=())
def attention(query: Tensor, key: Tensor) -> Tensor:
    """Compute what no formula is known for, as a kernel of another library does."""
    return (query @ key.mT).softmax(-1) @ key


UNKNOWN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "custom": (lambda x: attention(x, x), "lightning_drive_tests::attention"),
    "fft": (lambda x: torch.fft.fft2(x).real, "aten::_fft_c2c"),
    "cdist": (lambda x: torch.cdist(x, x) @ x, "aten::_cdist_forward"),
    "solve": (lambda x: torch.linalg.solve(x.mT @ x + torch.eye(4), x.mT).mT, "aten::_linalg_solve_ex"),
    "sparse": (lambda x: torch.sparse.mm(torch.eye(3).to_sparse(), x[0])[None], "aten::_sparse_addmm"),
}


@pytest.mark.parametrize(("function", "name"), UNKNOWN.values(), ids=UNKNOWN)
def test_products_without_a_formula_are_named(function: Callable[[Tensor], Tensor], name: str) -> None:
    """No parameter takes part in them, so only the total of all others is unknown."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(function(x))

    found = measure(Products(), torch.randn(1, 3, 4))
    assert (found.multiply_adds, found.others) == ({"head.weight": 24}, None)
    assert [f"`{name}`" in text for text in found.warnings] == [True]


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
    found = costs.measure(module, {"head.weight": module.head.weight}, nodes)
    assert found.error is None
    assert found.multiply_adds["head.weight"]
