"""What is prunable is named, each weight once, in the order of `named_parameters()`; the rest stays dense."""

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import models
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_drive import SNIP, DRIVEPruningCallback, IMPPruningCallback, Magnitude, Random, find_masks
from lightning_drive.network import prunable


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
    "lstm.weight_ih_l0",
    "lstm.weight_hh_l0",
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
        pytest.param(
            None, ["attention.*", "cross.*", "conv?d.*", "lstm.*"], ["upward.weight", "head.weight"], id="exclude_many"
        ),
        pytest.param(["attention.*"], None, ZOO[5:7], id="include_leaves_biases_dense"),
        pytest.param(["*"], None, ["scale", "embedding.weight", *ZOO], id="include_everything"),
        pytest.param(["*"], ["*proj*", "lstm.*"], ["scale", "embedding.weight", *ZOO[:3], "head.weight"], id="both"),
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
    assert list(prunable.prunable_parameters(module, include=["*.weight"])) == ["1.weight"]
    assert list(prunable.prunable_parameters(module, include=["*"])) == ["0.weight", "1.weight"]
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


RECURRENT = ["weight_ih_l0", "weight_hh_l0"]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        pytest.param(nn.RNN(3, 4), RECURRENT, id="rnn"),
        pytest.param(nn.GRU(3, 4, 2), [*RECURRENT, "weight_ih_l1", "weight_hh_l1"], id="gru_of_two_layers"),
        pytest.param(
            nn.LSTM(3, 4, bidirectional=True, proj_size=2),
            [f"weight_{kind}_l0{way}" for way in ("", "_reverse") for kind in ("ih", "hh", "hr")],
            id="lstm_in_both_directions_with_projections",
        ),
        pytest.param(nn.LSTMCell(3, 4), ["weight_ih", "weight_hh"], id="lstm_cell"),
        pytest.param(nn.GRUCell(3, 4), ["weight_ih", "weight_hh"], id="gru_cell"),
        pytest.param(type("Mine", (nn.GRU,), {})(3, 4), RECURRENT, id="subclass"),
        pytest.param(nn.Bilinear(2, 3, 4), ["weight"], id="bilinear"),
        pytest.param(nn.MultiheadAttention(4, 2).out_proj, ["weight"], id="non_dynamically_quantizable"),
        pytest.param(nn.ConvTranspose1d(3, 4, 1), ["weight"], id="transposed_convolution"),
    ],
)
def test_prunable_parameters__layers(layer: nn.Module, expected: list[str]) -> None:
    """Every layer that multiplies by weights; biases are none of them."""
    assert list(prunable.prunable_parameters(layer)) == expected


@pytest.mark.parametrize("make", [lambda: nn.LazyConv2d(4, 1), lambda: nn.LazyConvTranspose2d(4, 1)])
def test_prunable_parameters__lazy_once_initialised(make: Callable[[], nn.Module]) -> None:
    layer = make()
    layer(torch.ones(1, 3, 2, 2))
    assert list(prunable.prunable_parameters(layer)) == ["weight"]


def class_like(qualified: str, **weights: torch.Tensor) -> type[nn.Module]:
    """Imitate a layer of a library that is not installed."""

    def init(self: nn.Module) -> None:
        nn.Module.__init__(self)
        for name, weight in {**weights, "bias": torch.zeros(3)}.items():
            self.register_parameter(name, nn.Parameter(weight))

    module, _, name = qualified.rpartition(".")
    return type(name, (nn.Module,), {"__init__": init, "__module__": module, "__qualname__": name})


@pytest.mark.parametrize(
    ("qualified", "weights"),
    [
        pytest.param("transformers.pytorch_utils.Conv1D", ["weight"], id="transformers"),
        pytest.param("transformers.modeling_utils.Conv1D", ["weight"], id="older_transformers"),
        pytest.param("torch_geometric.nn.dense.linear.Linear", ["weight"], id="graph_network"),
        pytest.param("torch_geometric.nn.conv.rgcn_conv.RGCNConv", ["weight", "root"], id="relational_graph_network"),
    ],
)
def test_prunable_parameters__other_libraries(qualified: str, weights: list[str]) -> None:
    """They are known by name, subclasses too; a class of the same name elsewhere is not."""
    kind = class_like(qualified, **{name: torch.ones(2, 3) for name in weights})
    assert list(prunable.prunable_parameters(kind())) == weights
    assert list(prunable.prunable_parameters(type("Sub", (kind,), {})())) == weights
    elsewhere = class_like(f"mine.{qualified}", weight=torch.ones(2, 3))
    with pytest.raises(ValueError, match="no trainable parameter"):
        prunable.prunable_parameters(elsewhere())


def test_prunable_parameters__gpt2_head_is_tied() -> None:
    """A head that shares an embedding's table stays dense, with layers of transformers around it."""
    conv1d = class_like("transformers.pytorch_utils.Conv1D", weight=torch.ones(4, 4))
    module = nn.ModuleDict({"wte": nn.Embedding(5, 4), "c_attn": conv1d(), "lm_head": nn.Linear(4, 5, bias=False)})
    module["lm_head"].weight = module["wte"].weight
    assert list(prunable.prunable_parameters(module)) == ["c_attn.weight"]


def test_prunable_parameters__other_library_lazy_error() -> None:
    kind = class_like("torch_geometric.nn.dense.linear.Linear")
    module = kind()
    module.weight = nn.parameter.UninitializedParameter()
    with pytest.raises(ValueError, match="'weight' is not initialised yet"):
        prunable.prunable_parameters(module)


class Experts(nn.Module):
    """Its weights are in one parameter of three dimensions, beside a norm, a bias and an embedding of places."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 5))
        self.down = nn.Parameter(torch.randn(3, 5, 4))
        self.bias = nn.Parameter(torch.zeros(3, 1, 5))
        self.scale = nn.Parameter(torch.ones(4))
        self.places = nn.Parameter(torch.zeros(1, 7, 4))
        self.norm = nn.LayerNorm([7, 4])
        self.batch_norm = nn.BatchNorm1d(4)


@pytest.mark.filterwarnings("ignore:Only 40.5% of the weights in matrices are prunable:UserWarning")
@pytest.mark.parametrize(("name", "patterns"), [("up", ["up"]), ("both", ["up", "down"]), ("glob", ["[ud]*"])])
def test_register(name: str, patterns: list[str]) -> None:
    """By class or by name, with names or globs; subclasses count; it can be taken back."""
    expected = ["up"] if name == "up" else ["up", "down"]
    for layer in (Experts, f"{Experts.__module__}.{Experts.__qualname__}"):
        forget = prunable.register(layer, *patterns)
        try:
            assert list(prunable.prunable_parameters(Experts())) == expected
            assert list(find_masks(type("Sub", (Experts,), {})(), Magnitude(), sparsity=0.5)) == expected
        finally:
            forget()
        forget()  # harmless
        with pytest.raises(ValueError, match="no trainable parameter"):
            prunable.prunable_parameters(Experts())


def test_register__default_name() -> None:
    kind = class_like("mine.Linear", weight=torch.ones(2, 3))
    forget = prunable.register(kind)
    assert list(prunable.prunable_parameters(kind())) == ["weight"]
    forget()


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), 3, dict])
def test_register__error(layer: Any) -> None:
    with pytest.raises(TypeError, match=r"`layer` must be a subclass of `nn\.Module` or its qualified name"):
        prunable.register(layer, "weight")


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        pytest.param(["*"], ["up", "down", "places"], id="everything"),
        pytest.param(["?*"], ["up", "down", "places"], id="wildcards"),
        pytest.param(["[us]*"], ["up"], id="matrices_before_vectors"),
        pytest.param(["scale", "up"], ["up", "scale"], id="vector_by_name"),
        pytest.param(["norm.weight"], ["norm.weight"], id="norm_by_name"),
        pytest.param(["*norm.bias"], ["norm.bias", "batch_norm.bias"], id="biases_by_name"),
    ],
)
def test_prunable_parameters__include_without_default(include: list[str], expected: list[str]) -> None:
    assert list(prunable.prunable_parameters(Experts(), include=include)) == expected


@pytest.mark.parametrize("module", [Experts(), nn.ModuleDict({"norm": nn.BatchNorm1d(3), "fc": nn.Linear(3, 3)})])
@pytest.mark.parametrize("pattern", ["norm.*", "norm*"])
def test_prunable_parameters__include_only_norms_error(module: nn.Module, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"matches only norms, biases and other vectors \(norm.weight, norm.bias\)"):
        prunable.prunable_parameters(module, include=[pattern])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_prunable_parameters__empty_is_left_out() -> None:
    assert list(prunable.prunable_parameters(nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 3), nn.Linear(3, 2)))) == [
        "2.weight"
    ]


class WeightDrop(nn.Module):
    """As language models have it: dropout on recurrent weights, which are written into the layer for every pass."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm
        weight = lstm.weight_hh_l0
        del lstm.weight_hh_l0
        self.weight_hh_l0_raw = nn.Parameter(weight.data)
        lstm.weight_hh_l0 = self.weight_hh_l0_raw.clone()


def computed_layers() -> nn.Module:
    return nn.Sequential(
        nn.utils.weight_norm(nn.LSTM(3, 3), "weight_hh_l0"),
        nn.utils.spectral_norm(nn.Linear(3, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Conv1d(3, 3, 1)),
        prune.l1_unstructured(nn.GRUCell(3, 3), "weight_ih", 0.5),
        WeightDrop(nn.LSTM(3, 3)),
        nn.utils.weight_norm(nn.Linear(3, 3)),
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "select",
    [
        pytest.param(lambda module: find_masks(module, Magnitude(), sparsity=0.5), id="find_masks"),
        pytest.param(lambda module: DRIVEPruningCallback(sparsity=0.5).plan(module), id="plan"),
        pytest.param(lambda module: IMPPruningCallback(sparsity=0.5, include=["*"]).plan(module), id="everything"),
    ],
)
def test_prunable_parameters__computed_all_at_once(select: Callable[[nn.Module], object]) -> None:
    """All are named in the order of the module, each with the call that makes it plain, and the text can be pasted."""
    module = computed_layers()
    with pytest.raises(ValueError, match="are computed anew") as caught:
        select(module)
    text = str(caught.value)
    names = ["0.weight_hh_l0", "1.weight", "2.weight", "3.weight_ih", "4.lstm.weight_hh_l0", "5.weight"]
    assert text.startswith(", ".join(map(repr, names)))
    for call, place in (
        ('torch.nn.utils.remove_weight_norm(layer, "weight_hh_l0")', "0.weight_hh_l0"),
        ("torch.nn.utils.remove_spectral_norm(layer)", "1.weight"),
        ('torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")', "2.weight"),
        ('torch.nn.utils.prune.remove(layer, "weight_ih")', "3.weight_ih"),
        ("torch.nn.utils.remove_weight_norm(layer)", "5.weight"),
    ):
        assert f"`{call}` for '{place}'" in text
    [exclude] = re.findall(r"`exclude=(\[.*\])`", text)
    left = prunable.prunable_parameters(module, exclude=[*re.findall("'([^']+)'", exclude)])
    assert list(left) == ["0.weight_ih_l0", "3.weight_hh", "4.lstm.weight_ih_l0"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("include", [None, ["*"], ["*.weight*"]])
def test_prunable_parameters__computed_and_frozen(include: list[str] | None) -> None:
    """What they are computed from is not trained, so they are left out as other frozen weights are."""
    module = computed_layers()[:4].requires_grad_(False).append(nn.Linear(3, 3))
    assert list(prunable.prunable_parameters(module, include)) == ["4.weight"]
    with pytest.raises(ValueError, match=r"\(0\.weight_ih_l0, .*1\.weight.* matched, but `requires_grad` is False\)"):
        prunable.prunable_parameters(module[:4])


def test_prunable_parameters__many_computed() -> None:
    """Those too many to read are counted, and what to paste stays short."""
    vocoder = nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)) for _ in range(30)))
    module = nn.ModuleDict({"vocoder": vocoder, "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"'vocoder\.7\.weight' and 22 more are computed.*`exclude=\['vocoder\.\*'\]`"):
        prunable.prunable_parameters(module)


def test_prunable_parameters__adapter_in_a_parametrization() -> None:
    """A frozen weight to which something trained is added is not frozen."""

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(3, 1))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + self.a

    layer = nn.Linear(3, 3).requires_grad_(False)
    nn.utils.parametrize.register_parametrization(layer, "weight", Adapter())
    with pytest.raises(ValueError, match="'weight' is computed anew"):
        prunable.prunable_parameters(layer)


class Uncopied(torch.Tensor):
    """Has no `new_empty` of its own, without which torch does not copy it."""


def odd_linear(change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[0].weight = nn.Parameter(change(module[0].weight.detach()))
    return module


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Linear(4, 4))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize(
    ("make", "text"),
    [
        pytest.param(lambda: odd_linear(lambda w: w.to("meta")), "is on the meta device.*to_empty", id="meta"),
        pytest.param(lambda: odd_linear(lambda w: w.to(torch.float8_e5m2)), "is in torch.float8_e5m2", id="float8"),
        pytest.param(
            lambda: odd_linear(lambda w: w.to_sparse_csr()), r"is stored as torch.sparse_csr.*to_dense", id="csr"
        ),
        pytest.param(lambda: odd_linear(lambda w: w.to_sparse()), r"is stored as torch.sparse_coo.*to_dense", id="coo"),
        pytest.param(
            lambda: odd_linear(lambda w: w.as_subclass(Uncopied)), "is a Uncopied, which cannot be copied", id="class"
        ),
        pytest.param(made_in_inference_mode, r"was made in `torch.inference_mode\(\)`", id="inference"),
    ],
)
@pytest.mark.parametrize("method", [Magnitude(), Random()], ids=["magnitude", "random"])
def test_check_numbers(make: Callable[[], nn.Module], text: str, method: Any) -> None:
    """What cannot be pruned is named before anything runs, with what to do; without it the rest can be."""
    with pytest.raises(ValueError, match=rf"'0\.weight' {text}.*`exclude=\['0\.weight'\]`"):
        find_masks(make(), method, sparsity=0.5)
    assert list(prunable.prunable_parameters(make(), exclude=["0.weight"])) == ["1.weight"]


def test_check_numbers__plan_of_meta() -> None:
    """A plan needs shapes only."""
    plan = DRIVEPruningCallback(sparsity=0.5).plan(nn.Linear(4, 4, device="meta"))
    assert (plan.kept[-1], plan.num_weights, plan.overall_sparsity) == (8, 20, 0.4)


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
def test_what_a_weight_is_computed_from_is_excluded_with_it(compute: Any) -> None:
    """Then it is not named as dense either."""
    net = nn.Sequential(compute(nn.Linear(8, 8)), nn.Linear(8, 8), compute(nn.Conv1d(8, 8, 3)), nn.Linear(8, 2))
    exclude = ["0.weight", "2.weight"]
    selected = prunable.prunable_parameters(net, exclude=exclude)
    assert list(selected) == ["1.weight", "3.weight"]
    assert prunable.dense_matrices(net, selected, exclude) == []


class Spectral(nn.Module):
    """Mixes channels by frequency, as Fourier neural operators do; the first parameter is a complex one."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 4, 9, dtype=torch.complex64))
        self.lift, self.head = nn.Linear(1, 4), nn.Linear(4, 3)
        if raw:
            self.raw = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lift(x[..., None]).mT
        x = torch.fft.irfft(torch.einsum("bif,iof->bof", torch.fft.rfft(x), self.mix), x.shape[-1]).relu().mean(-1)
        return self.head(x @ self.raw if hasattr(self, "raw") else x)


class FourierModule(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
        self.net = Spectral()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return models.loss_fn(self.net, batch)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(models.make_batches(16, count=4), batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("raw", [False, True])
def test_complex_weights_stay_dense__find_masks(raw: bool) -> None:
    """They are named as what stays dense; the way that is offered to prune the rest leaves them out."""
    torch.manual_seed(0)
    settings: Any = {"sparsity": 0.5, "batches": models.make_batches(16), "loss_fn": models.loss_fn}
    with pytest.warns(UserWarning, match=r"The largest that stay dense are 'mix' \(144\)") as caught:
        find_masks(Spectral(raw), SNIP(), **settings)
    [text] = [str(each.message) for each in caught]
    if raw:
        assert text.endswith("by `include=[\"*\"], exclude=['mix']`.")
        assert "raw" in find_masks(Spectral(raw), SNIP(), include=["*"], exclude=["mix"], **settings)
    else:
        assert text.endswith("Complex weights cannot be pruned: scores are defined for real ones.")
    assert "mix" not in find_masks(Spectral(raw), SNIP(), exclude=["mix"], **settings)


@pytest.mark.parametrize("method", ["DRIVE", "IMP"])
def test_complex_weights_stay_dense__callback(tmp_path: Path, method: str) -> None:
    """The precision of the module is that of the real numbers."""
    pruning: Any = (
        DRIVEPruningCallback(sparsity=0.5, warmup_epochs=1, rounds=2)
        if method == "DRIVE"
        else IMPPruningCallback(sparsity=0.5, cycles=1, epochs_per_cycle=1)
    )
    with pytest.warns(UserWarning, match=r"The largest that stay dense are 'net.mix' \(144\), 'mix' \(4\)\. Complex"):
        fits.trainer(tmp_path, pruning, max_epochs=2).fit(FourierModule())
    assert list(pruning.masks) == ["net.lift.weight", "net.head.weight"]
