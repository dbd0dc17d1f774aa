"""A batch that gives nothing to score by is skipped, counted, and replaced by the next one."""

import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import models
import pytest
import torch
import torch.nn.functional as F
from fits import ConvModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_drive import DRIVE, SNIP, Masks, SynFlow, find_masks

NOTHING: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "none": lambda module, loss: None,
    "constant": lambda module, loss: torch.zeros((), requires_grad=True),
    "detached": lambda module, loss: loss.detach(),
    "of_a_bias": lambda module, loss: module[0].bias.sum(),
}
EACH_NOTHING = pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "loader": lambda batches: DataLoader(batches, batch_size=None),
    "iterator": iter,
    "generator": lambda batches: (batch for batch in batches),
}


def marked(count: int, odd: tuple[int, ...]) -> list[Any]:
    """Batches with a note of whether the loss is to give nothing for them."""
    return [
        (*batch, torch.tensor(index in odd)) for index, batch in enumerate(models.make_batches(4, count=count, size=8))
    ]


def with_nothing(nothing: Callable[[nn.Module, Tensor], Any]) -> Callable[[nn.Module, Any], Any]:
    def loss_fn(module: nn.Module, batch: Any) -> Any:
        loss = models.loss_fn(module, batch[:2])
        return nothing(module, loss) if batch[2] else loss

    return loss_fn


def found(batches: Any, loss_fn: Any, method: Any = None, sparsity: float = 0.6) -> tuple[Masks, list[str]]:
    module = models.randomised(models.MLP(4, 6, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masks = find_masks(module, method or DRIVE(rounds=6), sparsity=sparsity, batches=batches, loss_fn=loss_fn)
    return masks, [str(each.message) for each in caught if "Scoring skipped" in str(each.message)]


@EACH_NOTHING
@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("batches_per_round", [1, 3])
def test_the_next_batch_is_taken(
    nothing: Callable[[nn.Module, Tensor], Any], container: Callable[[list[Any]], Any], batches_per_round: int
) -> None:
    """As if the odd batches were not there; also where the data is gone through several times."""
    batches = marked(7, odd=(0, 2, 3))
    method = DRIVE(rounds=6, batches_per_round=batches_per_round)
    masks, texts = found(container(batches), with_nothing(nothing), method)
    expected, silence = found([batches[index] for index in (1, 4, 5, 6)], with_nothing(nothing), method)
    assert masks == expected
    assert silence == []
    assert len(texts) == 1


def test_they_are_counted() -> None:
    assert found(marked(6, odd=(1, 4)), with_nothing(NOTHING["none"]))[1][0].startswith(
        "Scoring skipped 3 batches without a loss, or"
    )


def test_gradients_of_zero() -> None:
    """`0 * loss` skips a batch in training, too; a round with other batches in it needs no more."""
    batches = marked(4, odd=(1,))
    zero = with_nothing(lambda module, loss: 0 * loss)
    masks, texts = found(batches, zero, SNIP(rounds=4))
    assert masks == found([batches[0], *batches[2:]], zero, SNIP(rounds=4))[0]
    assert texts[0].startswith("Scoring skipped 1 batch without a loss")


@EACH_NOTHING
@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_a_whole_pass_without_a_loss_is_an_error(
    nothing: Callable[[nn.Module, Tensor], Any], container: Callable[[list[Any]], Any]
) -> None:
    seen: list[int] = []

    def loss_fn(module: nn.Module, batch: Any) -> Any:
        seen.append(0)
        return with_nothing(nothing)(module, batch)

    with pytest.raises(ValueError, match="This was the case for 5 batches in a row, a whole pass over the data"):
        found(container(marked(5, odd=tuple(range(5)))), loss_fn)
    assert len(seen) == 5


def test_an_endless_stream_without_a_loss_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"got None, which skips a batch\. This was the case for 10,000 batches in a row: "
    ):
        found(repeat(torch.ones(1, 4)), lambda module, batch: None)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stays_an_error(loss: float) -> None:
    with pytest.raises(ValueError, match="The loss must be finite"):
        found(marked(3, odd=(1,)), with_nothing(lambda module, right: right * loss))


def test_without_a_loss_synflow_minds_nothing() -> None:
    masks, texts = found(marked(2, odd=(0, 1)), with_nothing(NOTHING["none"]), SynFlow(rounds=2))
    assert masks.sparsity == pytest.approx(0.6, abs=0.03)
    assert texts == []


# --- in a Trainer


class Skipping(ConvModule):
    """Returns something else than the loss for some batches of every epoch."""

    def __init__(self, odd: Any = None, first: int = 1, all_from_epoch: int = 99) -> None:
        super().__init__()
        self.odd, self.first, self.all_from_epoch = odd, first, all_from_epoch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx % 3 == self.first or self.trainer.current_epoch >= self.all_from_epoch:
            return self.odd(loss) if self.odd else None
        return UserDict(loss=loss) if batch_idx % 3 == 2 else loss


def constant(loss: Tensor) -> Tensor:
    return torch.zeros((), requires_grad=True)


def detached(loss: Tensor) -> Any:
    return loss.detach().requires_grad_()


def fit(tmp_path: Path, module: pl.LightningModule, **settings: Any) -> Any:
    callback = fits.drive(**{"warmup_epochs": 1, **settings})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*(Scoring skipped|`training_step` returned `None`)")
        fits.trainer(tmp_path, callback, max_epochs=2).fit(module, fits.loader())
    return callback


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    "odd", [None, constant, detached, lambda loss: {"loss": 0.0 * loss}], ids=["none", "constant", "detached", "zero"]
)  # fmt: skip
def test_training_step(tmp_path: Path, odd: Any, first: int) -> None:
    callback = fit(tmp_path, Skipping(odd, first), rounds=4)
    assert callback.pruned
    assert sum("Scoring skipped" in text for text in callback.report.warnings) == 1


def test_training_step__one_batch_of_all(tmp_path: Path) -> None:
    """Each pass has it at its place: indices of batches begin anew."""

    class OneOnly(ConvModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx == 1 else None

    callback = fit(tmp_path, OneOnly(), rounds=4)
    assert callback.pruned
    assert any("Scoring skipped 7 batches" in text for text in callback.report.warnings)


def test_training_step__as_without_the_batch(tmp_path: Path) -> None:
    masks = [fit(tmp_path, Skipping(odd), rounds=1, batches_per_round=4).masks for odd in (None, constant, detached)]
    assert masks[0] == masks[1] == masks[2]


@pytest.mark.parametrize("odd", [lambda loss: {"loss": None}, lambda loss: {"log": loss}], ids=["loss_none", "no_loss"])
def test_training_step__what_lightning_refuses(tmp_path: Path, odd: Any) -> None:
    """A dict without a loss ends training, too: it is no way to skip a batch."""
    module = Skipping(odd, all_from_epoch=1, first=5)
    with pytest.raises(MisconfigurationException, match="`training_step` must return the loss as a tensor or"):
        fit(tmp_path, module)


def test_training_step__never_a_loss(tmp_path: Path) -> None:
    module = Skipping(all_from_epoch=1)
    with pytest.raises(
        ValueError, match=r"got None, which skips a batch\. This was the case for 3 batches in a row, a whole"
    ):
        fit(tmp_path, module)


def test_batch_norm_statistics__without_a_forward_pass(tmp_path: Path) -> None:
    """They stay, rather than to become those of nothing: mean 0 and variance 1."""

    class Never(ConvModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if self.trainer.current_epoch >= 1 else super().training_step(batch, batch_idx)

    def loss_fn(module: pl.LightningModule, batch: Any) -> Any:
        if next(calls) >= 5:
            return None
        return F.cross_entropy(module(batch[0]), batch[1])

    calls: Iterator[int] = iter(range(100))
    module = Never()
    before: list[Tensor] = []

    class Note(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            before.append(module.norm.running_mean.clone())  # type: ignore[union-attr, operator]

    callback = fits.drive(warmup_epochs=1, rounds=5, loss_fn=loss_fn, bn_batches=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`training_step` returned `None`")
        fits.trainer(tmp_path, Note(), callback, max_epochs=2).fit(module, fits.loader())
    assert module.norm.running_mean.equal(before[1])  # type: ignore[operator, arg-type]
    assert before[1].any()
