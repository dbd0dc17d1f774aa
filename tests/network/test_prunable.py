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

from lightning_drive import SNIP, DRIVEPruningCallback, IMPPruningCallback, Magnitude, find_masks
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
        pytest.param("stage.*", "stages.*", id="part_of_many_layers"),
    ],
)
def test_prunable_parameters__misspelled_error(pattern: str, meant: str) -> None:
    """The name that was meant is said first, however many there are."""
    layers = [(f"layer{index}", nn.Linear(2, 2)) for index in range(40)]
    stages = nn.Sequential(OrderedDict([("first", models.MLP(2, 2, 2)), ("second", models.MLP(2, 2, 2))]))
    parts = [("stem", nn.Sequential(nn.Linear(2, 2))), ("stages", stages), ("classifier", nn.Linear(2, 2))]
    module = nn.Sequential(OrderedDict([*layers, *parts]))
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
        assert text.endswith("set `include=[\"*\"], exclude=['mix']`.")
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
