"""What a Trainer brings along: what pruning cannot work with is refused by name, what it has to heed is found out."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch.distributed.fsdp
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_drive.trainer import facts


def check_namespace(pruning: pl.Callback, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse classes of ``pytorch_lightning``: their twins in ``lightning.pytorch`` are what is looked for everywhere.

    Args:
        pruning: The pruning callback.
        trainer: The Trainer, of whichever namespace.
        pl_module: The module, of whichever namespace.

    Raises:
        MisconfigurationException: If the Trainer or one of its callbacks is such a class.

    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found = [thing for thing in (trainer, *callbacks) if _is_of_pytorch_lightning(thing)]
    if not found:
        return
    needs = f"{type(pruning).__name__} needs the classes of `lightning.pytorch`, got"
    heirs = [heir for thing in (trainer, pl_module, *callbacks) if (heir := _of_library(thing)) is not None]
    if heirs:
        library, kind = _package(heirs[0]), heirs[0].__name__
        raise MisconfigurationException(
            f"{needs} `{library}`, whose {kind} is a class of `pytorch_lightning`, which is another package. That"
            f" is an import of `{library}`, not of yours. Use a variant of `{library}` that imports"
            " `lightning.pytorch`, or prune its network without the callback: `lightning_drive.find_masks` before its"
            " training, and `masks.apply_(module)` after every optimizer step."
        )
    raise MisconfigurationException(
        f"{needs} the {type(found[0]).__name__} of"
        " `pytorch_lightning`, which is another class of the same name. Write `import lightning.pytorch as pl` in"
        " place of `import pytorch_lightning as pl`, for the Trainer, the LightningModule and all callbacks."
    )


def check_strategy(pruning: pl.Callback, trainer: pl.Trainer, unshardable: str) -> None:
    """Refuse a strategy under which ranks would not end with the same masks, or masks could not be kept.

    Args:
        pruning: The pruning callback.
        trainer: The Trainer, with its processes connected.
        unshardable: Why the callback cannot work on weights that are sharded over ranks; empty if it can.

    Raises:
        MisconfigurationException: If it is such a strategy.

    """
    strategy = trainer.strategy
    name = f"{type(pruning).__name__} with {type(strategy).__name__}"
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy)):
        raise MisconfigurationException(
            f"{name}: this strategy keeps parameters as pieces without a shape of their own, which cannot be masked."
            " Shard with `ModelParallelStrategy` and `fully_shard` (FSDP2), or use `strategy='ddp'`."
        )
    if isinstance(strategy, ModelParallelStrategy):
        if not hasattr(torch.distributed.fsdp, "fully_shard"):
            raise MisconfigurationException(f"{name} needs torch 2.6 or newer, got {torch.__version__}.")
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
    """Refuse a second callback that prunes.

    Args:
        pruning: The pruning callback.
        trainer: The Trainer.
        kind: What all our pruning callbacks are.

    Raises:
        MisconfigurationException: If there is one, of ours or Lightning's own.

    """
    for other in facts.others(pruning, trainer):
        if isinstance(other, (kind, ModelPruning)):
            raise MisconfigurationException(
                f"Only one callback of a Trainer can prune, got {type(pruning).__name__} and {type(other).__name__}:"
                " each would cut what the other keeps, and neither would reach its `sparsity`. Remove one of them."
            )


def check_finetuning(pruning: pl.Callback, trainer: pl.Trainer) -> None:
    """Refuse callbacks that unfreeze layers, beside one that returns to an earlier state of the training.

    Args:
        pruning: The pruning callback.
        trainer: The Trainer.

    Raises:
        MisconfigurationException: If there is one.

    """
    for other in facts.others(pruning, trainer):
        if isinstance(other, BaseFinetuning):
            raise MisconfigurationException(
                f"{type(pruning).__name__} returns to an earlier state of the training (as IMP and control='reinit'"
                f" do), but cannot return to one before {type(other).__name__} unfroze layers and gave them to the"
                " optimizer. Train with one of the two."
            )


def warn_of_small_eps(optimizer: Optimizer) -> None:
    """Say so if an optimizer's safeguard against 0/0 is none for float16 weights, which pruning makes matter more.

    Args:
        optimizer: An optimizer of float16 weights.

    """
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
    # Third-party callbacks may well have its bare `Callback` as their base: it does nothing, and nothing looks for it.
    return any(_package(kind) == "pytorch_lightning" for kind in type(thing).__mro__ if kind.__name__ != "Callback")


def _of_library(thing: object) -> type | None:
    """Find the class of a library by which something is one of ``pytorch_lightning``; ``None`` if there is none."""
    for kind in type(thing).__mro__:
        bases = {_package(base) for base in kind.__mro__[1:] if base.__name__ != "Callback"}
        if "pytorch_lightning" in bases and _package(kind) != "pytorch_lightning" and not _is_of_user(kind.__module__):
            return kind
    return None


def _is_of_user(name: str) -> bool:
    """Whether a module is likely to be the user's own: it is what runs, or lies beside it or where it was started."""
    path = getattr(sys.modules.get(name), "__file__", None)
    if name == "__main__" or path is None:
        return name == "__main__"
    file, main = Path(path).resolve(), getattr(sys.modules["__main__"], "__file__", None)
    places = [Path.cwd(), *([Path(main).resolve().parent] if main else [])]
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return not installed and any(file.is_relative_to(place) for place in places)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]
