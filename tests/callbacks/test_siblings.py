"""SNIP and SynFlow through a Trainer, what all callbacks have in common, and the controls that reviewers ask for."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import resumable
import torch
import torch.nn.functional as F
from fits import ConvModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchvision.models import resnet18

from lightning_drive import (
    SNIP,
    DRIVEPruningCallback,
    IMPPruningCallback,
    Masks,
    PruningReport,
    SNIPPruningCallback,
    SynFlow,
    SynFlowPruningCallback,
    find_masks,
)
from lightning_drive.callbacks.base import PruningCallback
from lightning_drive.network.paths import active_masks
from lightning_drive.warmup import WarmupPruningCallback

SIZES = {"features.0.weight": 54, "features.4.weight": 432, "head.weight": 512}

CALLBACKS: dict[str, Any] = {
    "DRIVE": lambda **settings: DRIVEPruningCallback(**{"warmup_epochs": 1, "rounds": 4, **settings}),
    "SNIP": SNIPPruningCallback,
    "SynFlow": lambda **settings: SynFlowPruningCallback(**{"rounds": 7, **settings}),
    "IMP": lambda **settings: IMPPruningCallback(**{"cycles": 2, "epochs_per_cycle": 1, **settings}),
}
EACH = pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
EACH_EARLY = pytest.mark.parametrize("make", list(CALLBACKS.values())[:3], ids=list(CALLBACKS)[:3])


def fit(tmp_path: Path, *callbacks: pl.Callback, module: Any = None, **kwargs: Any) -> ConvModule:
    module = ConvModule() if module is None else module
    fits.trainer(tmp_path, *callbacks, **kwargs).fit(module, fits.loader())
    return module


def loss_fn(module: nn.Module, batch: list[Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


# What all of them share.


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@EACH
def test_each__exact(tmp_path: Path, make: Any, schedule: str, scope: str, sparsity: float) -> None:
    callback = make(sparsity=sparsity, schedule=schedule, scope=scope)
    module = fit(tmp_path, callback, max_epochs=3)
    if scope == "global":
        assert callback.masks.num_kept == round(sum(SIZES.values()) * (1 - sparsity))
    else:
        kept = {name: int(mask.sum()) for name, mask in callback.masks.items()}
        assert kept == {name: max(1, round(size * (1 - sparsity))) for name, size in SIZES.items()}
    assert callback.masks.hold_for(module)
    assert callback.report is not None
    assert callback.report.digest == callback.masks.digest()


@EACH
def test_each__include_and_exclude(tmp_path: Path, make: Any) -> None:
    callback = make(sparsity=0.5, include=["features.*"], exclude=["features.0.*"])
    fit(tmp_path, callback, max_epochs=3)
    assert list(callback.masks) == ["features.4.weight"]


@EACH
def test_each__checkpoint(tmp_path: Path, make: Any) -> None:
    """The sparse phase resumes with the same masks and report, from plain types only."""
    callback = make(sparsity=0.8)
    running = fits.trainer(tmp_path, callback, max_epochs=3)
    running.fit(ConvModule(), fits.loader())
    running.save_checkpoint(tmp_path / "sparse.ckpt")
    torch.load(tmp_path / "sparse.ckpt", weights_only=True)
    resumed = make(sparsity=0.8)
    module = ConvModule()
    fits.trainer(tmp_path, resumed, max_epochs=4).fit(module, fits.loader(), ckpt_path=tmp_path / "sparse.ckpt")
    assert resumed.masks == callback.masks
    assert resumed.report == callback.report
    assert resumed.masks.hold_for(module)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")  # ModelCheckpoint is not needed
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@EACH
def test_each__resume(tmp_path: Path, make: Any, optimizer: str) -> None:
    """From every epoch boundary, with other weights to begin with, the run ends bit for bit as it would have."""
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(tmp_path, make(sparsity=0.8), saving, module=ConvModule(optimizer))
    for epoch in range(3):
        module = ConvModule(optimizer)
        resumable.forget(module)
        running = fits.trainer(tmp_path, make(sparsity=0.8))
        running.fit(module, fits.loader(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert fits.equal_states(fits.state_of(module), fits.state_of(whole))


@EACH
def test_each__takes_keywords_only(make: Any) -> None:
    """All settings are plain, named, and documented one by one where LightningCLI reads them."""
    kind = type(make(sparsity=0.5))
    assert PruningCallback in kind.__mro__
    for name, parameter in inspect.signature(kind).parameters.items():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert f"        {name}: " in (kind.__doc__ or "")
    with pytest.raises(TypeError):
        kind(0.5)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"must be in \[0, 1\), got 1.0"),
        ({"sparsity": 98}, ValueError, "For 98 % pass 0.98"),
        ({"sparsity": 0.5, "schedule": "cubic"}, ValueError, "`schedule` must be one of 'exponential', 'linear'"),
        ({"sparsity": 0.5, "scope": "local"}, ValueError, "`scope` must be one of 'global', 'layerwise'"),
        ({"sparsity": 0.5, "control": "random"}, ValueError, "`control` must be one of 'none', 'shuffle', 'reinit'"),
        ({"sparsity": 0.5, "bn_batches": -1}, ValueError, "`bn_batches` must be a whole number of at least 0"),
        ({"sparsity": 0.5, "reset_best": 1}, TypeError, "`reset_best` must be True or False"),
        ({"sparsity": 0.5, "include": "*.weight"}, TypeError, "`include` must be a list"),
    ],
)
@EACH
def test_each__error(make: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**settings)


def test_warmup__method_error() -> None:
    with pytest.raises(TypeError, match="`method` must be an instance of a method"):
        WarmupPruningCallback(
            SNIP,  # type: ignore[arg-type]
            sparsity=0.5,
            warmup_epochs=0,
            schedule="exponential",
            scope="global",
            include=None,
            exclude=None,
            loss_fn=None,
            bn_batches=0,
            reset_best=True,
            control="none",
        )


# SNIP.


def test_snip__defaults(tmp_path: Path) -> None:
    """One shot on the first batch, on the initial weights."""
    callback = SNIPPruningCallback(sparsity=0.9)
    fit(tmp_path, callback)
    expected = find_masks(ConvModule(), SNIP(), sparsity=0.9, batches=fits.loader(), loss_fn=loss_fn)
    assert callback.masks == expected
    assert callback.report is not None
    assert (callback.report.epoch, callback.report.step) == (0, 0)
    assert callback.report.method == "SNIP(rounds=1, batches_per_round=1, mode='train')"


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("batches_per_round", [1, 2])
def test_snip__iterative_is_drive_without_warmup(tmp_path: Path, batches_per_round: int, mode: str) -> None:
    settings: dict[str, Any] = {
        "sparsity": 0.9, "warmup_epochs": 0, "rounds": 6, "batches_per_round": batches_per_round, "mode": mode
    }  # fmt: skip
    snip, drive = SNIPPruningCallback(**settings), DRIVEPruningCallback(**settings)
    modules = [fit(tmp_path, callback) for callback in (snip, drive)]
    assert snip.masks == drive.masks
    assert fits.equal_states(*map(fits.state_of, modules))
    once = SNIPPruningCallback(sparsity=0.9, batches_per_round=batches_per_round, mode=mode)  # type: ignore[arg-type]
    fit(tmp_path, once)
    assert once.masks != snip.masks


def test_snip__after_warmup(tmp_path: Path) -> None:
    callback = SNIPPruningCallback(sparsity=0.9, warmup_epochs=2)
    fit(tmp_path, callback)
    assert callback.report is not None
    assert (callback.report.epoch, callback.report.step) == (2, 6)


# SynFlow.


def test_synflow__defaults(tmp_path: Path) -> None:
    callback = SynFlowPruningCallback(sparsity=0.9)
    fit(tmp_path, callback)
    expected = find_masks(ConvModule(), SynFlow(rounds=100), sparsity=0.9, batches=fits.loader())
    assert callback.masks == expected
    assert callback.report is not None
    assert (callback.report.epoch, callback.report.method) == (0, "SynFlow(rounds=100)")


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_synflow__precision(tmp_path: Path, precision: Any) -> None:
    """Scores are float64 whatever the Trainer computes in, so the masks are the same."""
    masks = []
    for each in ("32-true", precision):
        callback = SynFlowPruningCallback(sparsity=0.9, rounds=20)
        fit(tmp_path, callback, max_epochs=1, precision=each)
        masks.append(callback.masks)
    assert masks[0] == masks[1]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_synflow__half_precision(tmp_path: Path, precision: Any) -> None:
    """Weights are rounded then, and scored as they are."""
    callback = SynFlowPruningCallback(sparsity=0.9, rounds=20)
    fit(tmp_path, callback, max_epochs=1, precision=precision)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
    images = next(iter(fits.loader()))[0]
    assert callback.masks == find_masks(
        ConvModule().to(dtype), SynFlow(rounds=20), sparsity=0.9, example_input=images.to(dtype)
    )


class Backwards(ConvModule):
    """Takes labels before images, in training batches."""

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return batch[::-1] if self.trainer.training else batch

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        return super().training_step((batch[1], batch[0]), batch_idx)


def test_synflow__example_input_array(tmp_path: Path) -> None:
    """It goes before the batch, whose first tensor need not be the input."""
    module = Backwards()
    module.example_input_array = torch.zeros(2, 1, 8, 8)
    callback = SynFlowPruningCallback(sparsity=0.9, rounds=10, warmup_epochs=1)
    fit(tmp_path, callback, module=module)
    assert callback.masks.num_kept == 100
    recorded = SynFlowPruningCallback(sparsity=0.9, rounds=10, warmup_epochs=1)
    fit(tmp_path, recorded, module=Backwards())  # by what training calls the network with
    assert recorded.masks == callback.masks


class Stream(IterableDataset[Any]):
    """A stream that can be read once."""

    def __init__(self) -> None:
        self.samples = iter(fits.dataset(256))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.samples)


@pytest.mark.parametrize("make", [CALLBACKS["SynFlow"], CALLBACKS["IMP"]], ids=["SynFlow", "IMP"])
def test_stream(tmp_path: Path, make: Any) -> None:
    """Who needs no data works where data can be read only once, and takes nothing from training."""
    callback, module = make(sparsity=0.9), ConvModule()
    module.example_input_array = torch.zeros(2, 1, 8, 8)
    loader = DataLoader(Stream(), batch_size=16)
    fits.trainer(tmp_path, callback, max_epochs=3, limit_train_batches=4).fit(module, loader)
    assert callback.masks.num_kept == 100
    assert callback.report.effective_sparsity is not None
    assert len(module.calls) == 3 * 4


@pytest.mark.parametrize(
    "callback",
    [
        SNIPPruningCallback(sparsity=0.9, warmup_epochs=1),
        SynFlowPruningCallback(sparsity=0.9),
        SynFlowPruningCallback(sparsity=0.9, warmup_epochs=1),
    ],
    ids=["SNIP", "SynFlow_shape", "SynFlow_batch_norm"],
)
def test_stream__error(tmp_path: Path, callback: PruningCallback) -> None:
    """Who needs data says so before the first step, not when the warm-up is over."""
    module = ConvModule()
    if getattr(callback, "warmup_epochs", 0):
        module.example_input_array = torch.zeros(2, 1, 8, 8)
    with pytest.raises(MisconfigurationException, match=r"The training data \(Stream\) is an iterator"):
        fits.trainer(tmp_path, callback).fit(module, DataLoader(Stream(), batch_size=16))
    assert not module.calls


class Manual(ConvModule):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


@pytest.mark.parametrize("make", [CALLBACKS["SynFlow"], CALLBACKS["IMP"]], ids=["SynFlow", "IMP"])
def test_manual_optimization(tmp_path: Path, make: Any) -> None:
    """Who needs no loss needs no `loss_fn` for it, and never calls ``training_step``, which would train."""
    settings = {"warmup_epochs": 1} if make is CALLBACKS["SynFlow"] else {}
    callback, module = make(sparsity=0.9, **settings), Manual()
    running = fits.trainer(tmp_path, callback, max_epochs=3)
    running.fit(module, fits.loader())
    assert callback.masks.hold_for(module)
    assert callback.masks.num_kept == 100
    assert running.global_step == 9


def test_synflow__batch_norm_after_warmup(tmp_path: Path) -> None:
    """With and without automatic optimization, the same statistics are measured on the pruned network."""
    measured = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 0:
                measured.append(pl_module.norm.running_mean.clone())

    for module in (ConvModule(), Manual()):
        fit(tmp_path, SynFlowPruningCallback(sparsity=0.5, rounds=3, warmup_epochs=1), Look(), module=module)
    assert torch.equal(*measured)


class ResNet(pl.LightningModule):
    """torchvision's ResNet-18, with a choice of what starts at zero."""

    def __init__(self, zero: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = resnet18(num_classes=fits.NUM_CLASSES, zero_init_residual=zero == "residual")
        if zero == "head":
            nn.init.zeros_(self.network.fc.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.expand(-1, 3, -1, -1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_synflow__zero_head_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The synaptic flow R is 0: no signal reaches .* zero-initialised"):
        fit(tmp_path, SynFlowPruningCallback(sparsity=0.9, rounds=2), module=ResNet("head"), max_epochs=1)


@pytest.mark.filterwarnings("ignore:Layer collapse:UserWarning")
@pytest.mark.parametrize("make", [SNIPPruningCallback, SynFlowPruningCallback])
def test_zero_residual_gammas_warn(tmp_path: Path, make: Any) -> None:
    """98 % of the weights have a score of exactly 0 then, and position alone would decide between them."""
    callback = make(sparsity=0.5, rounds=2)
    with (
        pytest.warns(UserWarning, match="had a score above zero, fewer than the .* to keep: the cut fell inside"),
        pytest.warns(
            UserWarning, match=r"The scale of 'network.layer1.0.bn2.weight', .* is 0 .* `zero_init_last=False`"
        ),
    ):
        fit(tmp_path, callback, module=ResNet("residual"), max_epochs=1, limit_train_batches=1)
    assert len(callback.report.warnings) > 1
    assert callback.masks.density == pytest.approx(0.5, abs=1e-6)


class Saturating(ConvModule):
    """Has one more activation, or several, before its last layer."""

    def __init__(self, activation: nn.Module, times: int) -> None:
        super().__init__()
        self.dropout = nn.Sequential(*[activation] * times)


@pytest.mark.filterwarnings("ignore:(Layer collapse|The network is cut off|In round):UserWarning")
@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU6(), "hardtanh"),
        (nn.Tanh(), "tanh"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.LayerNorm(128), "layer_norm"),
        (nn.Softmax(1), "softmax"),
    ],
    ids=["ReLU6", "Tanh", "Sigmoid", "LayerNorm", "Softmax"],
)
def test_synflow__undefined_layers(tmp_path: Path, activation: nn.Module, name: str) -> None:
    """One is a warning with its name, many are an error before anything is trained."""
    callback = SynFlowPruningCallback(sparsity=0.5, rounds=2)
    with pytest.warns(UserWarning, match=rf"SynFlow is not defined for 'dropout.0' \({name}\): saturating"):
        fit(tmp_path, callback, module=Saturating(activation, 1), max_epochs=1)
    module = Saturating(activation, 3)
    with pytest.raises(ValueError, match=r"That is too much of this network; use another method, such as DRIVE"):
        fit(tmp_path, SynFlowPruningCallback(sparsity=0.5, rounds=2), module=module, max_epochs=1)
    assert len(module.calls) == 1  # to see what training calls


def test_synflow__saturated_output_error(tmp_path: Path) -> None:
    """Where nothing is left to rank by, the error names the layer that is to blame."""

    class Module(ConvModule):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tanh(super().forward(images))

    with pytest.raises(
        ValueError, match=r"does not depend on any weight. SynFlow is not defined for .forward. \(tanh\)"
    ):
        fit(tmp_path, SynFlowPruningCallback(sparsity=0.5, rounds=2), module=Module())


# Collapse.


def test_collapse__training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A network that is cut off is reported as such, with what helps, in warning, report and table."""

    def only_the_first_layer(module: Any, batch: list[Tensor]) -> Tensor:
        weight = module.features[0].weight
        return (weight * torch.arange(1.0, 55).view_as(weight)).sum() + 1e-6 * loss_fn(module, batch)

    callback = SNIPPruningCallback(sparsity=0.96, loss_fn=only_the_first_layer)
    helps = r"More rounds, a lower `sparsity` or `scope='layerwise'` commonly help\."
    with (
        pytest.warns(UserWarning, match=rf"cut off: no path from its input to its output is left.* {helps}"),
        pytest.warns(UserWarning, match=rf"no weight is left in 'features.4.weight', 'head.weight'\. {helps}"),
    ):
        module = fit(tmp_path, callback)
    assert callback.report is not None
    assert callback.report.effective_sparsity == 1.0
    assert "! The network is cut off" in str(callback.report)
    assert len(module.calls) == 4 * 3


# Controls.


@EACH_EARLY
def test_control__shuffle(tmp_path: Path, make: Any) -> None:
    """Every parameter keeps as many weights as without, elsewhere; report and checkpoint say so."""
    plain, shuffled = make(sparsity=0.8), make(sparsity=0.8, control="shuffle")
    fit(tmp_path, plain)
    module = ConvModule()
    running = fits.trainer(tmp_path, shuffled)
    running.fit(module, fits.loader())
    assert [int(mask.sum()) for mask in shuffled.masks.values()] == [int(mask.sum()) for mask in plain.masks.values()]
    assert shuffled.masks != plain.masks
    assert shuffled.masks.hold_for(module)
    assert shuffled.report is not None
    assert shuffled.report.digest == shuffled.masks.digest()
    assert shuffled.report.control == "shuffle"
    assert "control: the masks were shuffled within each parameter" in str(shuffled.report)
    running.save_checkpoint(tmp_path / "control.ckpt")
    state = torch.load(tmp_path / "control.ckpt", weights_only=True)["callbacks"][type(shuffled).__name__]
    assert PruningReport.from_dict(state["report"]).control == "shuffle"


def test_control__shuffle_measures_its_own_paths(tmp_path: Path) -> None:
    """Effective sparsity is that of the shuffled masks, not of those that the method found."""
    callback = SNIPPruningCallback(sparsity=0.96, control="shuffle")
    module = fit(tmp_path, callback)
    module.eval()
    active = Masks(active_masks(module, callback.masks, torch.ones(1, 1, 8, 8)))
    assert callback.report is not None
    assert callback.report.effective_sparsity == active.sparsity > callback.report.sparsity


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer as it is now."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: value.detach().clone() for name, value in named}


class Moments(pl.Callback):
    """The state right before and right after pruning."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 0:
            self.state = tensors_of(pl_module)
            optimizer = trainer.optimizers[0]
            self.momenta = [
                value.clone() for state in optimizer.state.values() for value in state.values() if value is not None
            ]


@pytest.mark.parametrize("warmup_epochs", [0, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad"])
def test_control__reinit(tmp_path: Path, optimizer: str, warmup_epochs: int) -> None:
    """The masks of the method; values drawn anew; biases, statistics and optimizer as in the beginning."""
    plain, moments = fits.drive(warmup_epochs=warmup_epochs), Moments(warmup_epochs)
    callback = fits.drive(warmup_epochs=warmup_epochs, control="reinit")
    fit(tmp_path, plain, module=ConvModule(optimizer))
    fit(tmp_path, callback, moments, module=ConvModule(optimizer))
    assert callback.masks == plain.masks
    assert callback.report is not None
    assert callback.report.control == "reinit"

    initial = tensors_of(ConvModule())
    for name, value in initial.items():
        now = moments.state[name]
        if name not in callback.masks:
            assert torch.equal(now, value), name
            continue
        mask = callback.masks[name]
        assert not now[~mask].any()
        assert (now[mask] != value[mask]).float().mean() > 0.9  # a permutation leaves one value in place on average
        assert torch.isin(now[mask], value).all()
        assert now[mask].std() == pytest.approx(value.std().item(), rel=0.5)
    assert all(not value.any() for value in moments.momenta)


def test_control__reinit_leaves_the_schedule_alone(tmp_path: Path) -> None:
    """Learning rates go on from where the warm-up brought them: the epochs are spent."""

    class Scheduled(ConvModule):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]

    seen = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            seen[-1].append(trainer.optimizers[0].param_groups[0]["lr"])

    for control in ("none", "reinit"):
        seen.append([])
        fit(tmp_path, fits.drive(control=control), Rates(), module=Scheduled())
    assert seen[0] == seen[1] == [0.05 * 0.5**epoch for epoch in range(4) for _ in range(3)]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
def test_control__reinit_after_resume(tmp_path: Path) -> None:
    """New values come from the first process's initial weights, also where a second one prunes."""
    whole = fits.drive(control="reinit")
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    expected = fit(tmp_path, whole, checkpoint)
    other = ConvModule()
    for parameter in other.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    resumed = fits.drive(control="reinit")
    fits.trainer(tmp_path, resumed).fit(other, fits.loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.masks == whole.masks
    assert fits.equal_states(fits.state_of(other), fits.state_of(expected))
    sizes = [(tmp_path / f"epoch={epoch}.ckpt").stat().st_size for epoch in (1, 3)]
    assert sizes[0] > sizes[1] + 4 * sum(SIZES.values())  # the copy is not kept once it is of no use


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
def test_control__reinit_without_the_beginning_error(tmp_path: Path) -> None:
    """From a checkpoint that does not have the initial weights, there is nothing to draw from."""
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, checkpoint)
    module = ConvModule()
    with pytest.raises(MisconfigurationException, match="to the weights of the start of epoch 0, but this run goes on"):
        fits.trainer(tmp_path, fits.drive(control="reinit")).fit(
            module, fits.loader(), ckpt_path=tmp_path / "epoch=0.ckpt"
        )
    assert not module.calls


@pytest.mark.parametrize("control", ["shuffle", "reinit"])
def test_control__seed(tmp_path: Path, control: str) -> None:
    """The same seed gives the same run, another one another, and training's random numbers are left alone."""
    states, drawn = [], []
    for seed, used in ((1, control), (1, control), (2, control), (1, "none")):
        module = ConvModule()
        torch.manual_seed(seed)
        fit(tmp_path, SNIPPruningCallback(sparsity=0.8, control=used), module=module)  # type: ignore[arg-type]
        states.append(fits.state_of(module))
        drawn.append(torch.rand(1).item())
    assert fits.equal_states(states[0], states[1])
    assert not fits.equal_states(states[0], states[2])
    assert drawn[0] == drawn[3]


def test_control__other_than_in_the_checkpoint_warns(tmp_path: Path) -> None:
    callback = SNIPPruningCallback(sparsity=0.8)
    running = fits.trainer(tmp_path, callback, max_epochs=1)
    running.fit(ConvModule(), fits.loader())
    running.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match=r"pruned with control='none' and stays so: `control='shuffle'` has no effect"):
        fits.trainer(tmp_path, SNIPPruningCallback(sparsity=0.8, control="shuffle"), max_epochs=2).fit(
            ConvModule(), fits.loader(), ckpt_path=tmp_path / "plain.ckpt"
        )
