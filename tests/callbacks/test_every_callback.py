"""What all callbacks have in common: exact counts, patterns, checkpoints, resumes, keywords, and a word on collapse."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import resumable
import torch
from fits import ConvModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_drive import (
    SNIP,
    DRIVEPruningCallback,
    IMPPruningCallback,
    SNIPPruningCallback,
    SynFlowPruningCallback,
)
from lightning_drive.callbacks.hooks import PruningCallback
from lightning_drive.callbacks.warmup_base import WarmupPruningCallback

SIZES = {"features.0.weight": 54, "features.4.weight": 432, "head.weight": 512}

CALLBACKS: dict[str, Any] = {
    "DRIVE": lambda **settings: DRIVEPruningCallback(**{"warmup_epochs": 1, "rounds": 4, **settings}),
    "SNIP": SNIPPruningCallback,
    "SynFlow": lambda **settings: SynFlowPruningCallback(**{"rounds": 7, **settings}),
    "IMP": lambda **settings: IMPPruningCallback(**{"cycles": 2, "epochs_per_cycle": 1, **settings}),
    "Gradual": lambda **settings: fits.gradual(**{"start_epoch": 0, **settings}),
    "Gradual_by_drive": lambda **settings: fits.gradual(**{"start_epoch": 0, "criterion": "drive", **settings}),
}
EACH = pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)


@pytest.mark.parametrize(("scope", "sparsity"), [("global", 0.0), ("global", 0.9), ("layerwise", 0.3)])
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@EACH
def test_each__exact(tmp_path: Path, make: Any, schedule: str, scope: str, sparsity: float) -> None:
    callback = make(sparsity=sparsity, schedule=schedule, scope=scope)
    module = fits.fit(tmp_path, ConvModule(), callback, max_epochs=3).lightning_module
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
    fits.fit(tmp_path, ConvModule(), callback, max_epochs=3)
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
    whole = fits.fit(tmp_path, ConvModule(optimizer), make(sparsity=0.8), saving).lightning_module
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
        (
            {"sparsity": 0.5, "schedule": "square"},
            ValueError,
            "`schedule` must be one of .* 'linear', 'cubic'",
        ),
        ({"sparsity": 0.5, "scope": "local"}, ValueError, "`scope` must be one of 'global', 'layerwise'"),
        ({"sparsity": 0.5, "control": "random"}, ValueError, "`control` must be one of 'none', 'shuffle', 'reinit'"),
        ({"sparsity": 0.5, "bn_batches": -1}, ValueError, "`bn_batches` must be a whole number of at least 0"),
        ({"sparsity": 0.5, "reset_best": 1}, TypeError, "`reset_best` must be True or False"),
        ({"sparsity": 0.5, "accelerate": "yes"}, TypeError, "`accelerate` must be True or False, got 'yes'"),
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


# Who reads no data needs none, and who needs no loss asks for none.


class Stream(IterableDataset[Any]):
    """A stream that can be read once."""

    def __init__(self) -> None:
        self.samples = iter(fits.dataset(256))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.samples)


WITHOUT_LOSS = {name: CALLBACKS[name] for name in ("SynFlow", "IMP", "Gradual")}
NO_LOSS = pytest.mark.parametrize("make", WITHOUT_LOSS.values(), ids=WITHOUT_LOSS)


@NO_LOSS
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


@NO_LOSS
def test_manual_optimization(tmp_path: Path, make: Any) -> None:
    """Who needs no loss needs no `loss_fn` for it, and never calls ``training_step``, which would train."""
    settings = {"warmup_epochs": 1} if make is CALLBACKS["SynFlow"] else {}
    callback, module = make(sparsity=0.9, **settings), fits.Manual()
    running = fits.trainer(tmp_path, callback, max_epochs=3)
    running.fit(module, fits.loader())
    assert callback.masks.hold_for(module)
    assert callback.masks.num_kept == 100
    assert running.global_step == 9


def test_collapse__training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A network that is cut off is reported as such, with what helps, in warning, report and table."""

    def only_the_first_layer(module: Any, batch: list[Tensor]) -> Tensor:
        weight = module.features[0].weight
        return (weight * torch.arange(1.0, 55).view_as(weight)).sum() + 1e-6 * fits.loss_fn(module, batch)

    callback = SNIPPruningCallback(sparsity=0.96, loss_fn=only_the_first_layer)
    helps = r"More rounds, a lower `sparsity` or `scope='layerwise'` commonly help\."
    with (
        pytest.warns(UserWarning, match=rf"cut off: no path from its input to its output is left.* {helps}"),
        pytest.warns(UserWarning, match=rf"no weight is left in 'features.4.weight', 'head.weight'\. {helps}"),
    ):
        module = fits.fit(tmp_path, ConvModule(), callback).lightning_module
    assert callback.report is not None
    assert callback.report.effective_sparsity == 1.0
    assert "! The network is cut off" in str(callback.report)
    assert len(module.calls) == 4 * 3
