"""Modules of every shape: what is prunable is pruned exactly and stays so; the rest is refused or left dense."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_drive import DRIVEPruningCallback, IMPPruningCallback, SynFlowPruningCallback
from lightning_drive.callbacks.hooks import PruningCallback

EPOCHS = 3


class Classifier(pl.LightningModule):
    """Any network for 8x8 images, here rows of tokens of 8 numbers; AdamW keeps every zero busy."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def mlp(*layers: nn.Module) -> nn.Sequential:
    """Two linear layers for images, with what else is given between them."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), *layers, nn.Linear(12, fits.NUM_CLASSES))


fit = partial(fits.fit, max_epochs=EPOCHS)


def drive(**kwargs: Any) -> DRIVEPruningCallback:
    return DRIVEPruningCallback(**({"sparsity": 0.7, "warmup_epochs": 1, "rounds": 3} | kwargs))


def synflow(**kwargs: Any) -> SynFlowPruningCallback:
    return SynFlowPruningCallback(**({"sparsity": 0.7, "warmup_epochs": 1, "rounds": 3} | kwargs))


def check(module: nn.Module, callback: PruningCallback, before: dict[str, Tensor]) -> None:
    """Assert exact zeros in the exact number, all that trains having moved, and nothing else being sparse."""
    masks, parameters = callback.masks, dict(module.named_parameters())
    assert masks.num_kept == round(masks.num_prunable * (1 - callback.sparsity))
    assert masks.hold_for(module)
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            assert parameter.equal(before[name]), name
        elif name in masks:
            assert (parameter != before[name])[masks[name]].any() or not masks[name].any(), name
        else:
            assert parameter.count_nonzero() == parameter.numel(), name


class Tokens(nn.Module):
    """Eight tokens of eight numbers through a layer that mixes them."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.mix, self.head = mix, nn.Linear(8, fits.NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.mix(images.flatten(1, 2)).mean(1))


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` as it can be called."""

    def __init__(self, *, batch_first: bool, need_weights: bool, split: bool) -> None:
        super().__init__()
        kwargs = {"kdim": 4, "vdim": 4} if split else {}
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=batch_first, **kwargs)
        self.batch_first, self.need_weights, self.split = batch_first, need_weights, split

    def forward(self, tokens: Tensor) -> Tensor:
        query = tokens if self.batch_first else tokens.transpose(0, 1)
        key = query[..., :4] if self.split else query
        mixed, _ = self.attention(query, key, key, need_weights=self.need_weights)
        return mixed if self.batch_first else mixed.transpose(0, 1)


class LanguageModel(nn.Module):
    """Pixels as token ids, and a head tied to the embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(8, 6), nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 8, bias=False)
        self.decoder.weight = self.embedding.weight
        self.head = nn.Linear(8, fits.NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = (images.flatten(1) * 2 + 4).clamp(0, 7).long()
        return self.head(self.decoder(F.relu(self.hidden(self.embedding(tokens)))).mean(1))


class TiedLinears(nn.Module):
    """Two layers that share a weight, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, fits.NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(images.flatten(1))))))


class TwoInputs(nn.Module):
    """A bilinear layer over the two halves of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear, self.head = nn.Bilinear(32, 32, 3), nn.Linear(3, fits.NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.bilinear(*images.flatten(1).split(32, 1))))


class Lists(nn.Module):
    """Weights that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(64, 8) / 8), nn.Parameter(torch.randn(8, 8) / 3)])
        self.named = nn.ParameterDict({"last": nn.Parameter(torch.randn(8, fits.NUM_CLASSES) / 3)})

    def forward(self, images: Tensor) -> Tensor:
        hidden = images.flatten(1)
        for weight in self.weights:
            hidden = F.relu(hidden @ weight)
        return hidden @ self.named["last"]


class Folded(nn.Module):
    """Convolutions in one and three dimensions, and transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.up_rows = nn.Conv1d(8, 4, 3, padding=1), nn.ConvTranspose1d(4, 8, 1)
        self.space, self.up_space = nn.Conv3d(1, 2, 3, padding=1), nn.ConvTranspose3d(2, 1, 1)
        self.up, self.head = nn.ConvTranspose2d(1, 2, 3, padding=1), nn.Linear(128, fits.NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.up_rows(F.relu(self.rows(images[:, 0])))
        x = self.up_space(F.relu(self.space(x.view(-1, 1, 4, 4, 4))))
        return self.head(F.relu(self.up(x.view(-1, 1, 8, 8))).flatten(1))


class LowRank(nn.Module):
    """A frozen linear layer with a trainable update of low rank (LoRA), in layers or in bare parameters."""

    def __init__(self, base: nn.Linear, *, bare: bool) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        if bare:
            self.a = nn.Parameter(torch.randn(4, base.in_features) / 8)
            self.b = nn.Parameter(torch.randn(base.out_features, 4) / 8)
        else:
            self.a = nn.Linear(base.in_features, 4, bias=False)
            self.b = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.a, nn.Linear):
            return self.base(x) + self.b(self.a(x))
        return self.base(x) + x @ self.a.T @ self.b.T


def lora(bare: bool, trainable_head: bool = True) -> nn.Sequential:
    net = mlp()
    net[1] = LowRank(net[1], bare=bare)
    net[3].requires_grad_(trainable_head)
    return net


def half_frozen() -> nn.Sequential:
    net = mlp(nn.Linear(12, 12), nn.ReLU())
    net[3].requires_grad_(False)
    return net


def quantised() -> nn.Sequential:
    """Eight-bit weights in linear layers, which cannot be trained."""
    net = mlp(nn.Linear(12, 12), nn.ReLU())
    net[3].weight = nn.Parameter(torch.randint(-9, 9, (12, 12), dtype=torch.int8), requires_grad=False)
    net[3].forward = lambda x: F.linear(x, net[3].weight.to(x.dtype) / 9)
    return net


def attention(batch_first: bool, need_weights: bool, split: bool) -> nn.Module:
    return Tokens(SelfAttention(batch_first=batch_first, need_weights=need_weights, split=split))


def encoder() -> Tokens:
    return Tokens(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True))


ATTENTION = ["net.mix.attention.in_proj_weight", "net.mix.attention.out_proj.weight", "net.head.weight"]
SPLIT = [f"net.mix.attention.{kind}_proj_weight" for kind in "qkv"]
ENCODER = [
    *("net.mix.self_attn.in_proj_weight", "net.mix.self_attn.out_proj.weight"),
    *("net.mix.linear1.weight", "net.mix.linear2.weight", "net.head.weight"),
]
FOLDED = [f"net.{name}.weight" for name in ("rows", "up_rows", "space", "up_space", "up", "head")]


@pytest.mark.parametrize(
    ("make", "callback", "names"),
    [
        pytest.param(TiedLinears, drive(), ["net.first.weight", "net.head.weight"], id="tied_linears"),
        pytest.param(TiedLinears, synflow(), ["net.first.weight", "net.head.weight"], id="tied_linears-synflow"),
        pytest.param(LanguageModel, drive(), ["net.hidden.weight", "net.head.weight"], id="tied_embedding"),
        pytest.param(
            LanguageModel,
            drive(include=["net.embedding.weight", "net.h*"]),
            ["net.embedding.weight", "net.hidden.weight", "net.head.weight"],
            id="tied_embedding-asked_for",
        ),
        *(
            pytest.param(lambda w=w, f=f: attention(f, w, False), drive(), ATTENTION, id=f"attention-{f}-{w}")
            for f, w in itertools.product((True, False), repeat=2)
        ),
        pytest.param(lambda: attention(True, False, True), drive(), [*SPLIT, *ATTENTION[1:]], id="attention-split"),
        pytest.param(lambda: attention(False, True, True), drive(), [*SPLIT, *ATTENTION[1:]], id="attention-split-2"),
        pytest.param(encoder, drive(), ENCODER, id="transformer"),
        pytest.param(encoder, drive(mode="eval"), ENCODER, id="transformer-eval"),
        pytest.param(Folded, drive(), FOLDED, id="convolutions"),
        pytest.param(Folded, synflow(), FOLDED, id="convolutions-synflow"),
        pytest.param(TwoInputs, drive(), ["net.bilinear.weight", "net.head.weight"], id="bilinear"),
        pytest.param(TwoInputs, drive(exclude=["net.bilinear.*"]), ["net.head.weight"], id="bilinear-left_out"),
        pytest.param(
            TwoInputs, drive(include=["net.bilinear.weight"]), ["net.bilinear.weight"], id="bilinear-asked_for"
        ),
        pytest.param(
            Lists,
            drive(include=["net.weights.*", "net.named.*"]),
            ["net.weights.0", "net.weights.1", "net.named.last"],
            id="parameter_lists",
        ),
        pytest.param(half_frozen, drive(), ["net.1.weight", "net.5.weight"], id="half_frozen"),
        pytest.param(half_frozen, synflow(), ["net.1.weight", "net.5.weight"], id="half_frozen-synflow"),
        pytest.param(quantised, drive(), ["net.1.weight", "net.5.weight"], id="quantised_in_part"),
        pytest.param(
            lambda: lora(bare=False), drive(), ["net.1.a.weight", "net.1.b.weight", "net.3.weight"], id="lora_layers"
        ),
        pytest.param(
            lambda: lora(bare=True),
            drive(),
            ["net.3.weight"],
            id="lora_parameters",
            marks=pytest.mark.filterwarnings("ignore:Only 13.6% of the weights in matrices are prunable"),
        ),
        pytest.param(
            lambda: lora(bare=True),
            drive(include=["net.1.a", "net.1.b"]),
            ["net.1.a", "net.1.b"],
            id="lora_parameters-asked_for",
        ),
        pytest.param(
            lambda: Classifier(mlp()), drive(), ["net.net.1.weight", "net.net.3.weight"], id="nested_lightning_module"
        ),
    ],
)
def test_fit(tmp_path: Path, make: Callable[[], nn.Module], callback: PruningCallback, names: list[str]) -> None:
    torch.manual_seed(0)
    module = Classifier(make())
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fit(tmp_path, module, callback)
    assert list(callback.masks) == names
    check(module, callback, before)


def test_fit__stays_tied(tmp_path: Path) -> None:
    module, callback = Classifier(TiedLinears()), drive()
    fit(tmp_path, module, callback)
    assert module.net.second.weight is module.net.first.weight
    state = module.state_dict()
    assert state["net.second.weight"].equal(state["net.first.weight"])
    assert not state["net.second.weight"][~callback.masks["net.first.weight"]].any()


def test_fit__transformer_fast_path(tmp_path: Path) -> None:
    """In evaluation without gradients torch runs one fused function on the weights themselves: they are pruned ones."""
    torch.manual_seed(0)
    module, callback = Classifier(encoder()), drive()
    fit(tmp_path, module, callback)
    (images, _), *_ = fits.loader()
    module.eval()
    slow = module(images).detach()
    with torch.no_grad(), torch.profiler.profile() as profiler:
        fast = module(images)
    assert any("_transformer_encoder_layer_fwd" in event.key for event in profiler.key_averages())
    torch.testing.assert_close(fast, slow)
    assert callback.report.effective_sparsity is not None


# --- what is refused by name, before training


class Trained(pl.Callback):
    """Counts the batches that were trained on."""

    batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1


PARAMETRISE: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "torch_prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")  # it is in use
@pytest.mark.parametrize("name", PARAMETRISE)
def test_fit__parametrised(tmp_path: Path, name: str) -> None:
    """Refused before training; the `exclude` that the message asks for works."""
    module, trained = Classifier(mlp(nn.Linear(12, 12))), Trained()
    PARAMETRISE[name](module.net[3])
    with pytest.raises(ValueError, match=r"'net\.3\.weight' is computed.*`exclude=\['net\.3\.weight'\]`"):
        fit(tmp_path, module, drive(), trained)
    assert trained.batches == 0

    callback = drive(exclude=["net.3.weight"])
    fit(tmp_path, module, callback)
    assert list(callback.masks) == ["net.1.weight", "net.4.weight"]
    assert callback.masks.num_kept == round(0.3 * callback.masks.num_prunable)
    assert callback.masks.hold_for(module)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: mlp(nn.LazyLinear(12)), r"'net\.3\.weight' is not initialised yet", id="lazy"),
        pytest.param(Lists, "There is no trainable parameter to prune. Linear and conv", id="no_layers"),
        pytest.param(
            lambda: lora(bare=True, trainable_head=False),
            r"no trainable parameter to prune \(net\.1\.base\.weight, net\.3\.weight matched, but `requires_grad`",
            id="lora_parameters_only",
        ),
        pytest.param(
            lambda: nn.Sequential(quantised()[3], nn.LayerNorm(12)),
            r"no trainable parameter to prune \(net\.0\.weight matched, but `requires_grad`",
            id="quantised",
        ),
        pytest.param(
            lambda: mlp(nn.Linear(12, 12, dtype=torch.complex64)),
            r"'net\.3\.weight' is complex \(torch\.complex64\)",
            id="complex",
        ),
    ],
)
def test_fit__error(tmp_path: Path, make: Callable[[], nn.Module], message: str) -> None:
    trained = Trained()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Classifier(make()), drive(), trained)
    assert trained.batches == 0


class ComplexLayer(nn.Module):
    """A complex linear layer between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(64, 12), nn.Linear(12, 12, dtype=torch.complex64)
        self.head = nn.Linear(12, fits.NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.middle(self.first(images.flatten(1)).to(torch.complex64)).abs())


def test_fit__complex_is_left_out(tmp_path: Path) -> None:
    """Complex weights train on beside masks; they are neither cast nor cut."""
    torch.manual_seed(0)
    module, callback = Classifier(ComplexLayer()), drive(exclude=["net.middle.*"])
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fit(tmp_path, module, callback)
    assert list(callback.masks) == ["net.first.weight", "net.head.weight"]
    check(module, callback, before)


# --- layers that come late


class MadeLate(Classifier):
    """Makes its layers when Lightning asks for them, or materialises lazy ones then."""

    def __init__(self, hook: str, lazy: bool) -> None:
        super().__init__()
        self.hook, self.lazy = hook, lazy

    def make(self, hook: str) -> None:
        if hook == self.hook and self.net is None:
            torch.manual_seed(0)
            self.net = mlp(nn.LazyLinear(12)) if self.lazy else mlp(nn.Linear(12, 12))
            if self.lazy:
                self.net(torch.zeros(1, 1, 8, 8))

    def setup(self, stage: str) -> None:
        self.make("setup")

    def configure_model(self) -> None:
        self.make("configure_model")


@pytest.mark.parametrize("lazy", [False, True], ids=["layers", "lazy_layers"])
@pytest.mark.parametrize("hook", ["setup", "configure_model"])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")  # it misses ModelCheckpoint
def test_fit__made_late(tmp_path: Path, hook: str, lazy: bool) -> None:
    """Trained, and resumed by a module without layers, from before and from after pruning."""
    module, callback = MadeLate(hook, lazy), drive()
    fit(tmp_path, module, callback, pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    assert list(callback.masks) == ["net.1.weight", "net.3.weight", "net.4.weight"]
    assert callback.masks.hold_for(module)
    assert callback.masks.num_kept == round(0.3 * callback.masks.num_prunable)
    for epoch in (0, 1):
        other, resumed = MadeLate(hook, lazy), drive()
        fit(tmp_path, other, resumed, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert resumed.masks == callback.masks
        assert fits.equal_states(fits.state_of(other), fits.state_of(module))


# --- what changes while training


class Change(pl.Callback):
    """Does something to the module at the start of an epoch, or of its second batch."""

    def __init__(self, epoch: int, change: Callable[[Any], None], batch_idx: int | None = None) -> None:
        self.epoch, self.change, self.batch_idx = epoch, change, batch_idx

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch and self.batch_idx is None:
            self.change(pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch_idx):
            self.change(pl_module)


class AllOptimised(Classifier):
    """Gives frozen parameters to the optimizer, too, so that they train once they are not frozen any more."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def thaw(module: Any) -> None:
    module.net[1].requires_grad_(False)
    module.net[3].requires_grad_(True)


def test_frozen_after_pruning(tmp_path: Path) -> None:
    """A layer that is frozen keeps its zeros, one that is thawed was not prunable and trains as a dense one."""
    torch.manual_seed(0)
    module, callback = AllOptimised(half_frozen()), drive()
    thawed = module.net[3].weight.detach().clone()
    frozen: list[Tensor] = []
    note = Change(2, lambda module: frozen.append(module.net[1].weight.detach().clone()))
    fit(tmp_path, module, callback, Change(2, thaw), note)
    assert list(callback.masks) == ["net.1.weight", "net.5.weight"]
    assert callback.masks.num_kept == round(0.3 * callback.masks.num_prunable)
    assert callback.masks.hold_for(module)
    assert module.net[1].weight.equal(frozen[0])
    assert (module.net[3].weight != thawed).all()


def test_frozen_between_cuts__error(tmp_path: Path) -> None:
    """IMP cannot go on pruning when other layers are prunable than at its first cut: it names them."""
    callback = IMPPruningCallback(sparsity=0.7, cycles=2, epochs_per_cycle=1)
    with pytest.raises(ValueError, match=r"net\.1\.weight, net\.3\.weight is in only one of the two.*what is frozen"):
        fit(tmp_path, AllOptimised(half_frozen()), Change(2, thaw), callback)


def replace_head(module: Any, features: int = 12) -> None:
    module.net[3] = nn.Linear(features, fits.NUM_CLASSES)
    module.trainer.optimizers[0].add_param_group({"params": list(module.net[3].parameters())})


def parametrise_first(module: Any) -> None:
    parametrizations.weight_norm(module.net[1])


@pytest.mark.parametrize(
    ("change", "batch_idx", "name", "batches"),
    [
        pytest.param(replace_head, None, "net.3.weight", 6, id="at_the_start"),
        pytest.param(replace_head, 1, "net.3.weight", 9, id="in_the_middle"),
        pytest.param(parametrise_first, None, "net.1.weight", 6, id="parametrised"),
    ],
)
def test_replaced_after_pruning__error(
    tmp_path: Path, change: Callable[[Any], None], batch_idx: int | None, name: str, batches: int
) -> None:
    """A layer that takes the place of a pruned one would train densely: the epoch is not begun, or not saved."""
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callback, trained = drive(), Trained()
    with pytest.raises(MisconfigurationException, match=f"but {name} was replaced or removed since"):
        fit(tmp_path, Classifier(mlp()), callback, Change(2, change, batch_idx), checkpoints, trained)
    assert trained.batches == batches
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=0.ckpt", "epoch=1.ckpt"]


@pytest.mark.parametrize(
    ("epoch", "callback"),
    [
        pytest.param(0, drive(), id="before_pruning"),
        pytest.param(1, drive(), id="right_before_pruning"),
        pytest.param(2, drive(exclude=["net.3.*"]), id="excluded"),
    ],
)
def test_replaced(tmp_path: Path, epoch: int, callback: PruningCallback) -> None:
    """A layer without a mask may be replaced."""
    module = Classifier(mlp())
    fit(tmp_path, module, Change(epoch, replace_head), callback)
    assert callback.masks.num_kept == round(0.3 * callback.masks.num_prunable)
    assert callback.masks.hold_for(module)


def test_written_to_after_pruning(tmp_path: Path) -> None:
    """New values may be written into a pruned layer; the next step masks them."""
    module, callback = Classifier(mlp()), drive()
    fit(tmp_path, module, callback, Change(2, lambda module: nn.init.ones_(module.net[3].weight)))
    assert callback.masks.hold_for(module)
    assert (module.net[3].weight[callback.masks["net.3.weight"]] > 0.5).all()
