"""What is prunable is named, each weight once, in the order of `named_parameters()`; the rest stays dense."""

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_drive import prunable


class Zoo(nn.Module):
    """One of each kind of layer that has something called weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.embedding = nn.Embedding(5, 4)
        self.conv1d = nn.Conv1d(1, 2, 3)
        self.upward = nn.ConvTranspose2d(1, 2, 3)
        self.conv3d = nn.Conv3d(1, 2, 3)
        self.layer_norm = nn.LayerNorm(4)
        self.prelu = nn.PReLU()
        self.lstm = nn.LSTM(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=2)
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4, 4))


ZOO = [
    "conv1d.weight",
    "upward.weight",
    "conv3d.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "cross.q_proj_weight",
    "cross.k_proj_weight",
    "cross.v_proj_weight",
    "cross.out_proj.weight",
    "head.weight",
]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        pytest.param(models.InnerProduct(), ["layer.weight"], id="inner_product"),
        pytest.param(models.MLP(4, 5, 3), ["0.weight", "2.weight"], id="mlp"),
        pytest.param(nn.Linear(2, 2), ["weight"], id="bare_layer"),
        pytest.param(models.ConvNet(), ["conv1.weight", "conv2.weight", "fc.weight"], id="conv_net"),
        pytest.param(
            models.ResidualNet(),
            [
                "stem.weight",
                "block1.conv1.weight",
                "block1.conv2.weight",
                "block1.shortcut.0.weight",
                "block2.conv1.weight",
                "block2.conv2.weight",
                "block2.shortcut.0.weight",
                "fc.weight",
            ],
            id="residual_net",
        ),
        pytest.param(models.Tied(), ["first.weight", "head.weight"], id="tied_once"),
        pytest.param(
            models.Attention(),
            ["attention.in_proj_weight", "attention.out_proj.weight", "fc.weight"],
            id="attention",
        ),
        pytest.param(Zoo(), ZOO, id="zoo"),
    ],
)
def test_prunable_parameters(module: nn.Module, expected: list[str]) -> None:
    found = prunable.prunable_parameters(module)
    assert list(found) == expected
    assert all(found[name] is module.get_parameter(name) for name in expected)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        pytest.param(None, ["conv*"], ZOO[1:2] + ZOO[3:], id="exclude_some"),
        pytest.param(None, ["attention.*", "cross.*", "conv?d.*"], ["upward.weight", "head.weight"], id="exclude_many"),
        pytest.param(["attention.*"], None, ZOO[3:5], id="include_leaves_biases_dense"),
        pytest.param(["*"], None, ZOO, id="include_everything_prunable"),
        pytest.param(["*"], ["*proj*"], ["conv1d.weight", "upward.weight", "conv3d.weight", "head.weight"], id="both"),
        pytest.param(["embedding.weight"], None, ["embedding.weight"], id="embedding_by_name"),
        pytest.param(["scale", "head.*"], None, ["scale", "head.weight"], id="bare_parameter_by_name"),
        pytest.param(["head.*", "conv1d.*"], None, ["conv1d.weight", "head.weight"], id="order_of_the_module"),
        pytest.param(None, ["embedding.weight"], ZOO, id="exclude_what_is_dense_anyway"),
        pytest.param([], None, None, id="include_nothing"),
    ],
)
def test_prunable_parameters__patterns(
    include: list[str] | None, exclude: list[str] | None, expected: list[str] | None
) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="no trainable parameter to prune"):
            prunable.prunable_parameters(Zoo(), include, exclude)
    else:
        assert list(prunable.prunable_parameters(Zoo(), include, exclude)) == expected


@pytest.mark.parametrize("embedding", [nn.Embedding, nn.EmbeddingBag])
def test_prunable_parameters__tied_to_an_embedding(embedding: type[nn.Module]) -> None:
    """An embedding's table stays dense although a head uses it too, whichever comes first, unless asked for by name."""
    module = nn.Sequential(embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    module[2].weight = module[0].weight
    assert list(prunable.prunable_parameters(module)) == ["1.weight"]
    assert list(prunable.prunable_parameters(module[::-1])) == ["1.weight"]
    assert list(prunable.prunable_parameters(module, include=["*"])) == ["1.weight"]
    assert list(prunable.prunable_parameters(module, include=["0.weight", "1.*"])) == ["0.weight", "1.weight"]
    with pytest.raises(ValueError, match=r"'2\.weight' matches no parameter.*\(a tied one by its first"):
        prunable.prunable_parameters(module, include=["2.weight"])


def test_prunable_parameters__frozen_is_left_out() -> None:
    module = models.MLP(4, 5, 3)
    module[0].requires_grad_(False)
    assert list(prunable.prunable_parameters(module)) == ["2.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_prunable_parameters__unmatched_error(argument: str) -> None:
    with pytest.raises(
        ValueError, match=rf"`{argument}` pattern 'encoder.\*' matches no parameter.* 0.weight, 2.weight, 0.bias"
    ):
        prunable.prunable_parameters(models.MLP(4, 5, 3), **{argument: ["0.*", "encoder.*"]})


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        pytest.param("clasifier.weight", "classifier.weight", id="parameter"),
        pytest.param("classifer.*", "classifier.*", id="layer"),
    ],
)
def test_prunable_parameters__misspelled_error(pattern: str, meant: str) -> None:
    """The name that was meant is said first, however many there are."""
    layers = [(f"layer{index}", nn.Linear(2, 2)) for index in range(40)]
    module = nn.Sequential(OrderedDict([*layers, ("classifier", nn.Linear(2, 2))]))
    with pytest.raises(ValueError, match=rf"matches no parameter\. Did you mean '{re.escape(meant)}'\? The parameters"):
        prunable.prunable_parameters(module, exclude=[pattern])


@pytest.mark.parametrize("patterns", ["0.*", [0], {"0.*": 1}], ids=["text", "number", "dict"])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_prunable_parameters__type_error(argument: str, patterns: Any) -> None:
    with pytest.raises(TypeError, match=f"`{argument}` must be a list of glob patterns"):
        prunable.prunable_parameters(models.MLP(4, 5, 3), **{argument: patterns})


@pytest.mark.parametrize(
    ("module", "exclude"),
    [
        pytest.param(nn.Sequential(nn.BatchNorm1d(3), nn.Embedding(2, 3)), None, id="no_prunable_layer"),
        pytest.param(nn.ReLU(), None, id="no_parameter"),
        pytest.param(models.MLP(4, 5, 3), ["*"], id="all_excluded"),
    ],
)
def test_prunable_parameters__nothing_error(module: nn.Module, exclude: list[str] | None) -> None:
    with pytest.raises(ValueError, match=r"no trainable parameter to prune\. Linear and conv"):
        prunable.prunable_parameters(module, exclude=exclude)


def test_prunable_parameters__all_frozen_error() -> None:
    module = models.MLP(4, 5, 3).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter to prune \(0.weight, 2.weight matched, but"):
        prunable.prunable_parameters(module)


def test_prunable_parameters__lazy_error() -> None:
    with pytest.raises(ValueError, match=r"'0\.weight' is not initialised yet"):
        prunable.prunable_parameters(nn.Sequential(nn.LazyLinear(3)))


def test_prunable_parameters__complex_error() -> None:
    module = nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"'0\.weight' is complex \(torch\.complex64\).*`exclude=\['0\.weight'\]`"):
        prunable.prunable_parameters(module)
    assert list(prunable.prunable_parameters(module, exclude=["0.weight"])) == ["1.weight"]


def test_prunable_parameters__parametrized_attention_error() -> None:
    """The input projection is no layer of its own, and yet it is found."""
    module = models.Attention()
    nn.utils.parametrizations.weight_norm(module.attention, "in_proj_weight")
    with pytest.raises(ValueError, match=r"'attention\.in_proj_weight' is computed"):
        prunable.prunable_parameters(module)
    names = list(prunable.prunable_parameters(module, exclude=["attention.in_proj_weight"]))
    assert names == ["attention.out_proj.weight", "fc.weight"]


@pytest.mark.parametrize(
    "parametrize",
    [
        pytest.param(nn.utils.parametrizations.weight_norm, id="weight_norm"),
        pytest.param(nn.utils.parametrizations.orthogonal, id="orthogonal"),
        pytest.param(nn.utils.spectral_norm, id="spectral_norm_by_hook"),
        pytest.param(lambda layer: prune.l1_unstructured(layer, "weight", 0.5), id="torch_prune"),
    ],
)
def test_prunable_parameters__parametrized_error(parametrize: Callable[[nn.Module], object]) -> None:
    """A weight that is computed anew before every forward pass would not keep its zeros."""
    module = models.MLP(4, 5, 3)
    parametrize(module[0])
    with pytest.raises(ValueError, match=r"'0\.weight' is computed"):
        prunable.prunable_parameters(module)


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        pytest.param(None, ["0.weight"], id="exclude_as_the_error_names_it"),
        pytest.param(None, ["0.*"], id="exclude_the_layer"),
        pytest.param(["2.*"], None, id="include_others"),
    ],
)
def test_prunable_parameters__parametrized_elsewhere(include: list[str] | None, exclude: list[str] | None) -> None:
    """Only a weight that is selected must be stored."""
    module = models.MLP(4, 5, 3)
    nn.utils.parametrizations.weight_norm(module[0])
    assert list(prunable.prunable_parameters(module, include, exclude)) == ["2.weight"]


def pair(first: torch.Tensor, second: torch.Tensor) -> nn.ModuleDict:
    layers = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    layers["first"].weight.data, layers["second"].weight.data = first, second
    return layers


class Embedded(nn.Module):
    """A head over the memory of an embedding, which is not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.embedding, self.other = nn.Linear(4, 5, bias=False), nn.Embedding(5, 4), nn.Linear(4, 4)
        self.head.weight.data = self.embedding.weight.data


FLAT, GRID = torch.arange(40.0), torch.arange(32.0).view(4, 8)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        pytest.param(pair(FLAT[:16].view(4, 4), FLAT[:16].view(4, 4)), "first second", id="tied_by_data"),
        pytest.param(pair(FLAT[:16].view(4, 4), FLAT[:16].view(4, 4).T), "first second", id="transposed"),
        pytest.param(pair(FLAT[:16].view(4, 4), FLAT[15:31].view(4, 4)), "first second", id="overlapping_slices"),
        pytest.param(pair(GRID[:, :4], GRID[:, 3:7]), "first second", id="overlapping_columns"),
        pytest.param(
            pair(FLAT[:16].view(4, 4), FLAT.view(torch.bfloat16)[2:18].view(4, 4)), "first second", id="types"
        ),
        pytest.param(Embedded(), "embedding head", id="unselected_embedding"),
        pytest.param(nn.ModuleList([pair(GRID[:, :4], GRID[:, 3:7].T)]), "first second", id="nested"),
    ],
)
def test_prunable_parameters__shared_memory_error(module: nn.Module, names: str) -> None:
    """A mask of one would prune the other: both are named, and what can be done."""
    one, two = names.split()
    with pytest.raises(ValueError, match=rf"{one}\.weight' and '.*{two}\.weight' are two parameters over one memory"):
        prunable.prunable_parameters(module)


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(FLAT[:4].expand(4, 4), id="rows"),
        pytest.param(FLAT[:4].view(4, 1).expand(4, 4), id="columns"),
        pytest.param(FLAT.as_strided((4, 4), (1, 1)), id="windows"),
    ],
)
def test_prunable_parameters__expanded_error(weight: torch.Tensor) -> None:
    """Weights that are one number cannot be pruned one by one."""
    with pytest.raises(ValueError, match=r"Several weights of 'first\.weight' are one number in memory"):
        prunable.prunable_parameters(pair(weight, torch.ones(4, 4)))
    assert list(prunable.prunable_parameters(pair(weight, torch.ones(4, 4)), exclude=["first.*"])) == ["second.weight"]


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(pair(FLAT[:16].view(4, 4), FLAT[16:32].view(4, 4)), id="slices_of_a_flat_buffer"),
        pytest.param(pair(FLAT[20:36].view(4, 4).T, FLAT[:16].view(4, 4)), id="slices_transposed"),
        pytest.param(pair(GRID[:, :4], GRID[:, 4:]), id="columns_side_by_side"),
        pytest.param(pair(FLAT[:32:2].view(4, 4), FLAT[1:33:2].view(4, 4)), id="interleaved"),
    ],
)
def test_prunable_parameters__one_storage(module: nn.Module) -> None:
    """Parameters may share a storage as long as no number is in both."""
    assert list(prunable.prunable_parameters(module)) == ["first.weight", "second.weight"]


def test_prunable_parameters__unselected_overlap() -> None:
    """Who shares memory does not matter where none of them is pruned; a tie of the parameter itself is one weight."""
    module = Embedded()
    assert list(prunable.prunable_parameters(module, exclude=["head.weight"])) == ["other.weight"]
    module.head.weight = module.embedding.weight
    assert "other.weight" in prunable.prunable_parameters(module)
