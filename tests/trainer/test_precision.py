"""In every precision of the Trainer: exact and finite zeros, masks of full precision, and overflow as when dense."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lightning_drive import DRIVEPruningCallback, Masks, SNIPPruningCallback, SynFlowPruningCallback

Make = Callable[[Iterable[nn.Parameter]], Optimizer]

PRECISIONS = {
    "32-true": (torch.float32, torch.float32),
    "64-true": (torch.float64, torch.float64),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "16-true": (torch.float16, torch.float16),
}
"""Precision to the types of weights and of what is computed from them."""


def trainer(tmp_path: Path, *callbacks: pl.Callback, precision: str, **kwargs: Any) -> pl.Trainer:
    """On the CPU, Lightning takes "16-mixed" for "bf16-mixed"; the plugin given by hand has a real GradScaler."""
    given = {"plugins": [MixedPrecision("16-mixed", "cpu")]} if precision == "16-mixed" else {"precision": precision}
    return fits.trainer(tmp_path, *callbacks, **({"max_epochs": 3} | given | kwargs))


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.05),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, betas=(0.9, 0.9), weight_decay=0.05),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=1e-3, momentum=0.9, weight_decay=0.05),
    "adagrad": lambda parameters: Adagrad(parameters, lr=0.01, weight_decay=0.05),
}


class Plain(fits.BiaslessMLP):
    """Two matrices, an optimizer, and a factor on the loss: squares of small gradients underflow in float16.

    With tanh of something no gradient of a survivor is 0: in float16 that would be 0/0 in dense training, too.
    """

    def __init__(self, make: Make, factor: float = 1.0) -> None:
        super().__init__()
        self.make, self.factor = make, factor
        self.types: set[torch.dtype] = set()

    def forward(self, images: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(images.flatten(1)) + 0.5))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        if self.trainer.global_step:  # not while scoring before the first step
            self.types.add(logits.dtype)
        return self.factor * F.cross_entropy(logits, batch[1])

    def configure_optimizers(self) -> Optimizer:
        return self.make(self.parameters())


def drive(**kwargs: Any) -> DRIVEPruningCallback:
    return fits.drive(**({"warmup_epochs": 0, "rounds": 2, "bn_batches": 0} | kwargs))


def assert_zeros(module: nn.Module, masks: Masks) -> None:
    """What is pruned is +0, and everything is finite."""
    for name, mask in masks.items():
        weight = module.get_parameter(name).detach()
        assert torch.equal(weight[~mask], torch.zeros_like(weight[~mask]))
        assert not weight[~mask].signbit().any()
        assert weight.isfinite().all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision(tmp_path: Path, precision: Any, optimizer: str) -> None:
    """Exact count, +0 and finite; optimizers forget; resumed bit for bit. In float16, eps is 0, and 0/0 in the step."""
    underflows = precision == "16-true" and optimizer != "sgd"
    make, factor = OPTIMIZERS[optimizer], 100.0 if underflows else 1.0
    module, callback = Plain(make, factor), drive(include=["first.*"])
    eps = 1e-10 if optimizer == "adagrad" else 1e-8
    with pytest.warns(UserWarning, match=f"eps={eps:g} is 0 in float16") if underflows else nullcontext():
        trainer(tmp_path, callback, fits.SaveEpochs(), precision=precision).fit(module, fits.loader())
    assert callback.masks.num_kept == round(callback.masks.num_prunable * 0.2)
    assert_zeros(module, callback.masks)
    weights, computed = PRECISIONS[precision]
    assert {parameter.dtype for parameter in module.parameters()} == {weights}
    assert computed in module.types
    [trained] = module.trainer.optimizers
    seen = 0
    for name, mask in callback.masks.items():
        for value in trained.state[module.get_parameter(name)].values():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                seen += 1
                assert not value[~mask].any()
                assert value.isfinite().all()
    assert seen >= 1

    again = Plain(make, factor)
    pruning = drive(include=["first.*"])
    with pytest.warns(UserWarning, match="is 0 in float16") if underflows else nullcontext():
        trainer(tmp_path, pruning, precision=precision).fit(again, fits.loader(), ckpt_path=tmp_path / "1.ckpt")
    assert pruning.masks == callback.masks
    assert_zeros(again, pruning.masks)
    if precision != "64-true":  # Lightning loads weights before it makes the module double, so they are rounded
        assert fits.equal_states(fits.state_of(again), fits.state_of(module))


@pytest.mark.parametrize(
    "make",
    [
        lambda: drive(rounds=5),
        lambda: SNIPPruningCallback(sparsity=0.8),
        lambda: SynFlowPruningCallback(sparsity=0.8, rounds=5),
    ],
    ids=["drive", "snip", "synflow"],
)
def test_masks_do_not_depend_on_autocast(tmp_path: Path, make: Callable[[], Any]) -> None:
    """Equal weights give equal masks, also those that a float16 gradient would tell apart no more."""
    masks = {}
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        callback: Any = make()
        running = trainer(tmp_path, callback, precision=precision, max_epochs=1, limit_train_batches=1)
        running.fit(fits.ConvModule(), fits.loader())
        masks[precision] = callback.masks
    assert masks["32-true"].num_kept == round(masks["32-true"].num_prunable * 0.2)
    assert masks["32-true"] == masks["bf16-mixed"] == masks["16-mixed"]


# Overflow in mixed precision.

LAST_STEP, POISONED = 8, 3


class Poisoned(Plain):
    """In one batch, the gradient of one weight is infinite, or the loss so large that all gradients are."""

    def __init__(self, make: Make, entry: int | None, *, manual: bool = False) -> None:
        super().__init__(make)
        self.entry, self.automatic_optimization = entry, not manual
        self.batches = 0
        self.first.weight.register_hook(self._poison)

    @property
    def is_poisoned(self) -> bool:
        return self.batches == POISONED

    def _poison(self, gradient: Tensor) -> Tensor:
        if self.entry is None or not self.is_poisoned:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[self.entry] = torch.inf
        return gradient

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        if self.entry is None and self.is_poisoned:
            loss = loss * 1e36
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None


class Clipped(Poisoned):
    """Looks at the gradients as soon as they are there, so they are masked at once."""

    def on_after_backward(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 1e5)


class Steps(pl.Callback):
    """Writes down what every batch did: the scale after it, and whether weights moved."""

    def __init__(self, pruning: DRIVEPruningCallback | None) -> None:
        self.pruning = pruning
        self.scales: list[float] = []
        self.moved: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.before = fits.state_of(pl_module)
        pl_module.batches = len(self.moved)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.scales.append(trainer.precision_plugin.scaler.get_scale())  # type: ignore[attr-defined]
        self.moved.append(not fits.equal_states(self.before, fits.state_of(pl_module)))
        if self.pruning is not None:
            assert_zeros(pl_module, self.pruning.masks)


PATHS: dict[str, tuple[type[Poisoned], Make, dict[str, Any], dict[str, Any]]] = {
    "plain": (Poisoned, OPTIMIZERS["sgd"], {}, {}),
    "clipped_by_the_trainer": (Poisoned, OPTIMIZERS["adamw"], {}, {"gradient_clip_val": 0.5}),
    "clipped_in_the_module": (Clipped, OPTIMIZERS["sgd"], {}, {}),
    "accumulated": (Clipped, OPTIMIZERS["sgd"], {}, {"accumulate_grad_batches": 2}),
    "manual": (Poisoned, OPTIMIZERS["adamw"], {"manual": True}, {}),
    "fused": (Poisoned, lambda parameters: Adam(parameters, lr=0.01, fused=True), {}, {}),
    "fused_manual": (Poisoned, lambda parameters: SGD(parameters, 0.05, 0.9, fused=True), {"manual": True}, {}),
}


@pytest.mark.parametrize("where", ["one_pruned_entry", "everywhere"])
@pytest.mark.parametrize("path", PATHS)
def test_overflow(tmp_path: Path, path: str, where: str) -> None:
    """The step is left out and the scale halved exactly where dense training does that; then training goes on.

    An infinite gradient counts also where a weight is pruned: masks must not hide it from the GradScaler.
    """
    kind, make, settings, switches = PATHS[path]
    callback = drive(loss_fn=fits.loss_fn)
    module = kind(make, None, **settings)

    class Choose(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if where == "one_pruned_entry":
                module.entry = int((~callback.masks["first.weight"]).flatten().nonzero()[7])

    sparse, dense = Steps(callback), Steps(None)
    trainer(tmp_path, callback, Choose(), sparse, precision="16-mixed", **switches).fit(module, fits.loader())
    unpruned = kind(make, module.entry, **settings)
    trainer(tmp_path, dense, precision="16-mixed", **switches).fit(unpruned, fits.loader())

    assert (sparse.scales, sparse.moved) == (dense.scales, dense.moved)
    skipped = POISONED + 1 if "accumulate_grad_batches" in switches else POISONED
    halved = [i for i in range(1, LAST_STEP + 1) if sparse.scales[i] == sparse.scales[i - 1] / 2]
    assert halved == [skipped]
    assert not sparse.moved[skipped]
    assert sparse.moved[LAST_STEP]
    for name, mask in callback.masks.items():
        for value in module.trainer.optimizers[0].state[module.get_parameter(name)].values():
            assert value.isfinite().all()
            if value.shape == mask.shape:
                assert not value[~mask].any()
