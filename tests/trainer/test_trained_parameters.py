"""What is pruned is what is trained: parameters that no optimizer holds are left out."""

import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torchmetrics import Metric

from lightning_drive import (
    DRIVEPruningCallback,
    IMPPruningCallback,
    PruningReport,
    SNIPPruningCallback,
    SynFlowPruningCallback,
)
from lightning_drive.callbacks.hooks import PruningCallback
from lightning_drive.trainer import trained_parameters


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Classifier(pl.LightningModule):
    """Trains `net`, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net: nn.Module = mlp(64, 24, fits.NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return Adam(self.net.parameters(), 1e-2)


class Distilled(Classifier):
    """Beside a teacher that is larger than it."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = mlp(64, 48, fits.NUM_CLASSES)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        with torch.no_grad():
            goal = self.teacher(batch[0]).softmax(1)
        return F.cross_entropy(self(batch[0]), goal)


class Probed(Classifier):
    """A convolutional body under the head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies = nn.ModuleDict({"images": nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten())})
        self.net = nn.Linear(72, fits.NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.bodies["images"](images))  # type: ignore[no-any-return]


class Perceptual(Metric):
    """A metric with a network inside."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(64, 32, 16, 2)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        self.total += self.network(images).detach().mean()

    def compute(self) -> Tensor:
        return self.total  # type: ignore[return-value]


class Measured(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.metrics = nn.ModuleList([Perceptual()])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        self.metrics[0].update(batch[0])
        return super().training_step(batch, batch_idx)


class DQN(Classifier):
    """Learns values by those of a target network: a copy of it, made anew, or an average."""

    def __init__(self, way: str = "copied", manual: bool = False) -> None:
        super().__init__()
        self.target, self.way, self.automatic_optimization = mlp(64, 24, fits.NUM_CLASSES), way, not manual
        self.target.load_state_dict(self.net.state_dict())

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            goal = 1 + 0.9 * self.target(batch[0]).amax(1)
        return F.mse_loss(self.net(batch[0]).gather(1, batch[1][:, None])[:, 0], goal)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def on_train_batch_end(self, *_: Any) -> None:
        if self.way == "copied":
            self.target.load_state_dict(self.net.state_dict())
        else:
            for mean, now in zip(self.target.parameters(), self.net.parameters(), strict=True):
                mean.data.lerp_(now.data, 0.1)


METHODS: dict[str, Callable[..., PruningCallback]] = {
    "DRIVE": lambda **kwargs: DRIVEPruningCallback(sparsity=0.8, warmup_epochs=1, rounds=4, **kwargs),
    "SNIP": lambda **kwargs: SNIPPruningCallback(sparsity=0.8, **kwargs),
    "SynFlow": lambda **kwargs: SynFlowPruningCallback(sparsity=0.8, rounds=10, **kwargs),
    "IMP": lambda **kwargs: IMPPruningCallback(sparsity=0.8, cycles=2, epochs_per_cycle=1, **kwargs),
}
each_method = pytest.mark.parametrize("method", METHODS)
KINDS = [(Distilled, "teacher"), (Probed, "bodies"), (Measured, "metrics"), (DQN, "target")]


def share_of_zeros(module: nn.Module) -> float:
    weights = [each for each in module.parameters() if each.ndim > 1]
    return sum(int((each == 0).sum()) for each in weights) / sum(each.numel() for each in weights)


def fit(folder: Path, module: Any, pruning: PruningCallback, *others: pl.Callback, **kwargs: Any) -> pl.Trainer:
    """Train for three epochs, not minding what is said."""
    ckpt_path = kwargs.pop("ckpt_path", None)
    running = fits.trainer(folder, pruning, *others, **{"max_epochs": 3, **kwargs})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        running.fit(module, fits.loader(), ckpt_path=ckpt_path)
    return running


def assert_pruned(module: Any, pruning: PruningCallback) -> None:
    assert pruning.masks
    assert all(name.startswith("net.") for name in pruning.masks)
    assert share_of_zeros(module.net) == pytest.approx(0.8, abs=2e-3)
    assert pruning.masks.hold_for(module)


@pytest.mark.parametrize(
    ("kind", "other", "method"),
    [*((*kind, method) for kind in KINDS for method in ("DRIVE", "IMP")), (*KINDS[0], "SNIP"), (*KINDS[0], "SynFlow")],
)
def test_untrained_networks(
    tmp_path: Path, kind: Any, other: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    module, pruning = kind(), METHODS[method]()
    with caplog.at_level("INFO"):
        fit(tmp_path, module, pruning)
    assert_pruned(module, pruning)
    assert share_of_zeros(getattr(module, other)) == (pytest.approx(0.8, abs=2e-3) if kind is DQN else 0)
    assert caplog.text.count("Left out of pruning, since they are not trained: no optimizer") == 1
    assert f"'{other}.*'" in caplog.text


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("way", ["copied", "averaged"])
def test_target_network(tmp_path: Path, way: str, manual: bool) -> None:
    """A copy that is made anew is sparse, too; an average is not, and that is said."""
    module = DQN(way, manual)
    pruning = SNIPPruningCallback(sparsity=0.8, warmup_epochs=1, loss_fn=lambda module, batch: module.loss(batch))
    with pytest.warns(UserWarning, match="'target' has the same names and shapes as 'net', but is not trained"):
        fits.trainer(tmp_path, pruning, max_epochs=3).fit(module, fits.loader())
    assert_pruned(module, pruning)
    assert share_of_zeros(module.target) == (pytest.approx(0.8, abs=2e-3) if way == "copied" else 0)


@pytest.mark.parametrize("method", ["DRIVE", "IMP"])
@pytest.mark.parametrize("kind", [Distilled, Probed])
def test_resume(tmp_path: Path, kind: Any, method: str) -> None:
    """From the checkpoint of every epoch, to the same masks and without a word on another selection."""
    saves = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, pruning = kind(), METHODS[method]()
    fit(tmp_path, whole, pruning, saves)
    for epoch in range(2):
        module, again = kind(), METHODS[method]()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fits.trainer(tmp_path, again, max_epochs=3).fit(
                module, fits.loader(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt"
            )
        assert not [each for each in caught if "stays so" in str(each.message)]
        assert again.masks == pruning.masks
        assert fits.equal_states(fits.state_of(module), fits.state_of(whole))


# What optimizers hold.


class SAM(torch.optim.Optimizer):
    """Wraps another optimizer, and has groups of its own only for show."""

    def __init__(self, parameters: Any) -> None:
        self.inner = SGD(parameters, 0.05)
        super().__init__(self.inner.param_groups, {})

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.inner.step(closure)


class OnlyALook:
    """Looks like an optimizer, and keeps its parameters in a list."""

    def __init__(self, parameters: Any) -> None:
        self.weights = list(parameters)
        self.param_groups: list[Any] = []
        self.defaults: dict[str, Any] = {}
        self.state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass

    def zero_grad(self) -> None:
        for each in self.weights:
            each.grad = None

    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        with torch.enable_grad():
            loss = closure()
        for each in self.weights:
            each.sub_(0.05 * each.grad)
        return loss


class Two(Distilled):
    """Two optimizers, one for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        for optimizer in self.both():
            optimizer.step()
            optimizer.zero_grad()

    def both(self) -> list[Any]:
        return self.optimizers()  # type: ignore[return-value]

    def configure_optimizers(self) -> Any:
        return [SGD(self.net[1].parameters(), 0.05), SGD(self.net[3].parameters(), 0.05)]  # type: ignore[index]


class OneOfItsOwn(Two):
    """One from `configure_optimizers`, and one that the module steps beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.other = {"last": SGD(self.net[3].parameters(), 0.05)}  # type: ignore[index]

    def both(self) -> list[Any]:
        return [self.optimizers(), *self.other.values()]

    def configure_optimizers(self) -> Any:
        return SGD(self.net[1].parameters(), 0.05)  # type: ignore[index]


class AsItGoes(Distilled):
    """An optimizer of any kind."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Any:
        return self.kind(self.net.parameters())


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize(
    "make",
    [lambda: AsItGoes(SAM), lambda: AsItGoes(OnlyALook), Two, OneOfItsOwn],
    ids=["wrapped", "look", "two", "own"],
)
def test_kinds_of_optimizers(tmp_path: Path, make: Callable[[], Any]) -> None:
    module, pruning = make(), METHODS["SNIP"](loss_fn=cross_entropy)
    fit(tmp_path, module, pruning)
    assert_pruned(module, pruning)
    assert share_of_zeros(module.teacher) == 0


class WithoutOptimizers(Two):
    """Makes its optimizers itself, so that nobody knows which parameters they have."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.hidden = hidden

    def both(self) -> list[Any]:
        return [SGD(self.net.parameters(), 0.05)]

    def configure_optimizers(self) -> Any:
        return self.opaque() if self.hidden else None

    def opaque(self) -> Any:
        optimizer = OnlyALook([])
        optimizer.weights = None  # type: ignore[assignment]
        return optimizer


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("hidden", [False, True])
def test_optimizers_that_nobody_knows(tmp_path: Path, hidden: bool) -> None:
    """Then everything that requires a gradient counts as trained."""
    module, pruning = WithoutOptimizers(hidden), METHODS["SNIP"](loss_fn=cross_entropy, exclude=["teacher.3.*"])
    fit(tmp_path, module, pruning)
    assert list(pruning.masks) == ["net.1.weight", "net.3.weight"]
    assert pruning.report is not None
    assert pruning.report.warnings[0].startswith("'teacher.1.weight' had no gradient in any round")  # so it was scored


class Rebuilt(Distilled):
    """Its optimizer is made anew, of the head alone, before it is pruned."""

    def on_train_epoch_end(self) -> None:
        self.trainer.optimizers = [SGD(self.net[3].parameters(), 0.05)]  # type: ignore[index]


def test_optimizers_made_anew(tmp_path: Path) -> None:
    pruning = METHODS["DRIVE"]()
    fit(tmp_path, Rebuilt(), pruning)
    assert list(pruning.masks) == ["net.3.weight"]


# Selections.


class Overridden(SNIPPruningCallback):
    """Whatever the rule of somebody's own selects."""

    def prunable_parameters(self, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
        return {name: each for name, each in pl_module.named_parameters() if name.endswith("1.weight")}


def test_own_selection(tmp_path: Path) -> None:
    pruning = Overridden(sparsity=0.8)
    fit(tmp_path, Distilled(), pruning)
    assert list(pruning.masks) == ["net.1.weight"]


class Normalised(Distilled):
    """The teacher has weights that could not be pruned."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.teacher[1])


def test_untrained_weights_need_not_be_prunable(tmp_path: Path) -> None:
    module, pruning = Normalised(), METHODS["SNIP"](exclude=["teacher.1.*"])
    fit(tmp_path, module, pruning)
    assert_pruned(module, pruning)


class OnlyNorms(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(fits.NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.net(images))  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return SGD(self.norm.parameters(), 0.05)


@each_method
def test_nothing_is_trained__error(tmp_path: Path, method: str) -> None:
    text = r"No prunable parameter is trained: 'net\.\*' could be pruned, but no optimizer of the Trainer holds any"
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, OnlyNorms(), METHODS[method]())


def test_nothing_is_trained__error_of_patterns(tmp_path: Path) -> None:
    """What is selected is only the teacher; other errors stay what they are."""
    with pytest.raises(ValueError, match=r"is trained: 'teacher\.\*' could be pruned"):
        fit(tmp_path, Distilled(), METHODS["SNIP"](include=["teacher.*"]))
    with pytest.raises(ValueError, match="pattern 'teachers' matches no parameter"):
        fit(tmp_path, Distilled(), METHODS["SNIP"](include=["teachers"]))


class Looks(pl.Callback):
    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning, self.plan = pruning, ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.plan = str(self.pruning.plan(pl_module))


def test_plan(tmp_path: Path) -> None:
    """Without a Trainer only frozen parameters are known not to be trained."""
    module, pruning = Distilled(), METHODS["SNIP"]()
    assert "of 4,896 prunable weights" in str(pruning.plan(module))
    fit(tmp_path, module, pruning, looks := Looks(pruning))
    assert "no: in no optimizer" in looks.plan
    assert "of 1,632 prunable weights" in looks.plan


def test_frozen_layers_are_still_named(tmp_path: Path) -> None:
    """Those that a finetuning callback froze, and no others that are not trained."""

    class Finetuned(Distilled):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = mlp(64, 64)

        def forward(self, images: Tensor) -> Tensor:
            return self.net(self.backbone(images))  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return SGD(
                [each for each in self.parameters() if each.requires_grad and each not in self.of_teacher()], 0.1
            )

        def of_teacher(self) -> set[Tensor]:
            return set(self.teacher.parameters())

    pruning = METHODS["SNIP"]()
    finetuning = pl.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    fit(tmp_path, Finetuned(), pruning, finetuning)
    report = pruning.report
    assert isinstance(report, PruningReport)
    [text] = [each for each in report.warnings if "BackboneFinetuning froze them" in each]
    assert text.startswith("'backbone.1.weight' were not pruned")


def test_requires_grad_is_put_back(tmp_path: Path) -> None:
    module = Distilled()
    module.teacher[1].bias.requires_grad = False
    before = [each.requires_grad for each in module.parameters()]
    fit(tmp_path, module, METHODS["SNIP"]())
    assert [each.requires_grad for each in module.parameters()] == before


# Parameters that an optimizer holds, but that have no gradient.


class AllInOne(Distilled):
    """The optimizer has the teacher, too, which gets no gradient."""

    def configure_optimizers(self) -> Any:
        return Adam(self.parameters(), 1e-2)


class AllInOneByHand(AllInOne):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad(set_to_none=False)
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class UnusedLayer(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.LSTM(8, 16)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), 0.05)


@pytest.mark.parametrize(("kind", "saves"), [(AllInOne, (0, 1, 2, 3)), (AllInOneByHand, (1, 2)), (UnusedLayer, (1,))])
def test_without_gradients_in_the_first_cycle(tmp_path: Path, kind: Any, saves: tuple[int, ...]) -> None:
    """What an optimizer holds, but the loss does not depend on, is left out of IMP; also where the run is resumed."""

    def fit_imp(module: Any, ckpt_path: Any = None) -> tuple[IMPPruningCallback, list[str]]:
        pruning = IMPPruningCallback(sparsity=0.5, cycles=2, epochs_per_cycle=2)
        saving = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = fits.trainer(tmp_path, pruning, saving, max_epochs=5, enable_checkpointing=True)
            trainer.fit(module, fits.loader(), ckpt_path=ckpt_path)
        return pruning, [str(each.message) for each in caught if "had no gradient" in str(each.message)]

    whole = kind()
    pruning, [text] = fit_imp(whole)
    assert "in all of the first cycle" in text
    assert "exclude=['teacher.*']" in text
    assert list(pruning.masks) == ["net.1.weight", "net.3.weight"]
    assert share_of_zeros(whole.net) == pytest.approx(0.5, abs=0.01)
    assert share_of_zeros(whole.teacher) == 0
    for epoch in saves:
        again = kind()
        resumed, texts = fit_imp(again, tmp_path / f"epoch={epoch}.ckpt")
        assert len(texts) == (epoch < 2)
        assert resumed.masks == pruning.masks
        assert fits.equal_states(fits.state_of(again), fits.state_of(whole))


def test_groups() -> None:
    assert trained_parameters._patterns(["a.0.weight", "a.1.weight", "b.0.weight", "c"], ["b.1.weight"]) == [
        "a.*",
        "b.0.*",
        "c",
    ]
