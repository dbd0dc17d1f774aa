"""Raise before training starts if the Trainer, a callback or the module is one that pruning cannot work with."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.optim import Optimizer

from lightning_drive.trainer import other_callbacks


def check_namespace(pruning: pl.Callback, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Raise if the Trainer or a callback is of ``pytorch_lightning``, whose classes ``isinstance`` would not know."""
    callbacks = other_callbacks.callbacks_of(trainer)
    strangers = [thing for thing in (trainer, *callbacks) if _is_of_pytorch_lightning(thing)]
    if not strangers:
        return
    needs = f"{type(pruning).__name__} needs the classes of `lightning.pytorch`, got"
    kinds = [kind for thing in (trainer, pl_module, *callbacks) if (kind := _library_class(thing)) is not None]
    if kinds:
        library, name = _package(kinds[0]), kinds[0].__name__
        raise MisconfigurationException(
            f"{needs} `{library}`, whose {name} is a class of `pytorch_lightning`, which is another package. That"
            f" is an import of `{library}`, not of yours. Use a variant of `{library}` that imports"
            " `lightning.pytorch`, or prune its network without the callback: `lightning_drive.find_masks` before its"
            " training, and `masks.apply_(module)` after every optimizer step."
        )
    raise MisconfigurationException(
        f"{needs} the {type(strangers[0]).__name__} of"
        " `pytorch_lightning`, which is another class of the same name. Write `import lightning.pytorch as pl` in"
        " place of `import pytorch_lightning as pl`, for the Trainer, the LightningModule and all callbacks."
    )


def check_strategy(pruning: pl.Callback, trainer: pl.Trainer, unshardable: str) -> None:
    """Raise if ranks would not end with the same masks under the Trainer's strategy, or masks could not be kept.

    ``unshardable`` is why the callback cannot work on weights that are sharded over ranks; empty if it can.
    """
    strategy = trainer.strategy
    name = f"{type(pruning).__name__} with {type(strategy).__name__}"
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy)):
        raise MisconfigurationException(
            f"{name}: this strategy keeps parameters as pieces without a shape of their own, which cannot be masked."
            " Shard with `ModelParallelStrategy` and `fully_shard` (FSDP2), or use `strategy='ddp'`."
        )
    if isinstance(strategy, ModelParallelStrategy):
        if unshardable:
            raise MisconfigurationException(
                f"{name} cannot work on sharded weights: {unshardable} Use `strategy='ddp'`."
            )
        if (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
            raise MisconfigurationException(
                f"{name} works with `tensor_parallel_size=1`, got {size}: layers in tensor parallel are split in other"
                f" ways than masks can follow. Set `data_parallel_size={trainer.world_size}` and"
                " `tensor_parallel_size=1`."
            )
    elif trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
        raise MisconfigurationException(
            f"{name} on {trainer.world_size} processes is not known to give all of them the same masks. Use"
            " `strategy='ddp'`, or `ModelParallelStrategy` with `fully_shard`."
        )


def check_alone(pruning: pl.Callback, trainer: pl.Trainer, kind: type[pl.Callback]) -> None:
    """Raise if a second callback prunes: one of ours, which are all of ``kind``, or Lightning's own."""
    for other in other_callbacks.others(pruning, trainer):
        if isinstance(other, (kind, ModelPruning)):
            raise MisconfigurationException(
                f"Only one callback of a Trainer can prune, got {type(pruning).__name__} and {type(other).__name__}:"
                " each would cut what the other keeps, and neither would reach its `sparsity`. Remove one of them."
            )


def check_finetuning(pruning: pl.Callback, trainer: pl.Trainer) -> None:
    """Raise if a callback unfreezes layers while the pruning callback returns to an earlier state of training."""
    for other in other_callbacks.others(pruning, trainer):
        if isinstance(other, BaseFinetuning):
            raise MisconfigurationException(
                f"{type(pruning).__name__} returns to an earlier state of the training (as IMP and control='reinit'"
                f" do), but cannot return to one before {type(other).__name__} unfroze layers and gave them to the"
                " optimizer. Train with one of the two."
            )


def check_batches_are_seen(pl_module: pl.LightningModule) -> None:
    """Raise if callbacks do not see the batch that is trained on next, which ``criterion="drive"`` scores by."""
    if _takes_iterator(pl_module):
        raise MisconfigurationException(
            "criterion='drive' scores weights by the batch that is trained on next, but `training_step` takes"
            " `dataloader_iter`, so that callbacks do not see it. Use criterion='magnitude', or a `training_step` that"
            " takes the batch."
        )


def check_training_step(pl_module: pl.LightningModule) -> None:
    """Raise if ``training_step`` cannot be called for its loss alone: it optimizes, or takes a ``dataloader_iter``."""
    remedy = "Pass `loss_fn`, a function `loss_fn(pl_module, batch)` that returns the loss, to the callback."
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "With manual optimization (`automatic_optimization=False`), calling `training_step` to score weights would"
            f" step the optimizers. {remedy}"
        )
    if _takes_iterator(pl_module):
        raise MisconfigurationException(
            f"`training_step` takes `dataloader_iter`, so it cannot be given a batch to score weights on. {remedy}"
        )


def _takes_iterator(pl_module: pl.LightningModule) -> bool:
    return is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True)


def warn_of_small_eps(optimizer: Optimizer) -> None:
    """Warn if an optimizer of float16 weights has an ``eps`` that is 0 there: pruning makes 0/0 more likely."""
    for group in optimizer.param_groups:
        eps = group.get("eps")
        if isinstance(eps, float) and not torch.tensor(eps, dtype=torch.float16):
            rank_zero_warn(
                f"{type(optimizer).__name__}'s eps={eps:g} is 0 in float16, so its step is 0/0 = NaN for a weight whose"
                " gradient is 0. Pruned weights stay 0, but kept ones that are cut off from the input or the output"
                " would be NaN. Set `eps=1e-4` or more, or train with another `precision`."
            )
            return


def _is_of_pytorch_lightning(thing: object) -> bool:
    # Its bare `Callback` is a frequent base of third-party callbacks: it does nothing, and nothing looks for it.
    return any(_package(kind) == "pytorch_lightning" for kind in type(thing).__mro__ if kind.__name__ != "Callback")


def _library_class(thing: object) -> type | None:
    """Return the class, of another library, that makes something one of ``pytorch_lightning``; ``None`` without one."""
    for kind in type(thing).__mro__:
        bases = {_package(base) for base in kind.__mro__[1:] if base.__name__ != "Callback"}
        if "pytorch_lightning" in bases and _package(kind) != "pytorch_lightning" and not _is_of_user(kind.__module__):
            return kind
    return None


def _is_of_user(name: str) -> bool:
    """Whether a module is likely the user's own: it is what runs, lies beside it, or lies where it was started."""
    path = getattr(sys.modules.get(name), "__file__", None)
    if name == "__main__" or path is None:
        return name == "__main__"
    file, main = Path(path).resolve(), getattr(sys.modules["__main__"], "__file__", None)
    places = [Path.cwd(), *([Path(main).resolve().parent] if main else [])]
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return not installed and any(file.is_relative_to(place) for place in places)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]
