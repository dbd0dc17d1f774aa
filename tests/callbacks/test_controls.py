"""The controls that reviewers ask for keep the method's counts or masks, and change only what they say."""

from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
from fits import ConvModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_drive import (
    DRIVEPruningCallback,
    Masks,
    PruningReport,
    SNIPPruningCallback,
    SynFlowPruningCallback,
)
from lightning_drive.network.synflow import active_masks

SIZES = {"features.0.weight": 54, "features.4.weight": 432, "head.weight": 512}


EACH_EARLY = pytest.mark.parametrize(
    "make",
    [
        lambda **settings: DRIVEPruningCallback(**{"warmup_epochs": 1, "rounds": 4, **settings}),
        SNIPPruningCallback,
        lambda **settings: SynFlowPruningCallback(**{"rounds": 7, **settings}),
    ],
    ids=["DRIVE", "SNIP", "SynFlow"],
)


@EACH_EARLY
def test_control__shuffle(tmp_path: Path, make: Any) -> None:
    """Every parameter keeps as many weights as without, elsewhere; report and checkpoint say so."""
    plain, shuffled = make(sparsity=0.8), make(sparsity=0.8, control="shuffle")
    fits.fit(tmp_path, ConvModule(), plain)
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
    module = fits.fit(tmp_path, ConvModule(), callback).lightning_module
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
    fits.fit(tmp_path, ConvModule(optimizer), plain)
    fits.fit(tmp_path, ConvModule(optimizer), callback, moments)
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
        fits.fit(tmp_path, Scheduled(), fits.drive(control=control), Rates())
    assert seen[0] == seen[1] == [0.05 * 0.5**epoch for epoch in range(4) for _ in range(3)]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
def test_control__reinit_after_resume(tmp_path: Path) -> None:
    """New values come from the first process's initial weights, also where a second one prunes."""
    whole = fits.drive(control="reinit")
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    expected = fits.fit(tmp_path, ConvModule(), whole, checkpoint).lightning_module
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
    fits.fit(tmp_path, ConvModule(), checkpoint)
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
        fits.fit(tmp_path, module, SNIPPruningCallback(sparsity=0.8, control=used))  # type: ignore[arg-type]
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
