"""Training runs of two real processes (gloo): ``python distributed.py FOLDER LAUNCH SCENARIO ...``.

LAUNCH says who starts the processes: ``ddp`` (Lightning starts this script again), ``torchrun`` (it has started both),
``ddp_spawn`` or ``ddp_fork``. Every rank writes what each scenario found to ``FOLDER/SCENARIO-RANK.pt``.
"""

import hashlib
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import own_methods
import pytest
import torch
import torch.nn.functional as F
from chosen_forms import IN_TRAINING, prefer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_drive import (
    DRIVEPruningCallback,
    GradualPruningCallback,
    IMPPruningCallback,
    KeepZerosCallback,
    Magnitude,
    Random,
    SNIPPruningCallback,
    SynFlowPruningCallback,
    find_masks,
)
from lightning_drive.core.shards import is_sharded, local
from lightning_drive.warmup import WarmupPruningCallback

EPOCHS = 4
BATCH = 8
"""On each of the two ranks: together they see what one process sees in batches of 16."""

METHODS: dict[str, Callable[..., Any]] = {
    "drive": lambda **kwargs: DRIVEPruningCallback(**{"sparsity": 0.8, "warmup_epochs": 1, "rounds": 5} | kwargs),
    "snip": lambda **kwargs: SNIPPruningCallback(**{"sparsity": 0.8} | kwargs),
    "synflow": lambda **kwargs: SynFlowPruningCallback(**{"sparsity": 0.8, "rounds": 5} | kwargs),
    "imp": lambda **kwargs: IMPPruningCallback(**{"sparsity": 0.8, "cycles": 2, "epochs_per_cycle": 1} | kwargs),
    "gradual": lambda **kwargs: GradualPruningCallback(**GRADUAL | kwargs),
    "gradual_by_drive": lambda **kwargs: GradualPruningCallback(**GRADUAL | {"criterion": "drive"} | kwargs),
}
GRADUAL: dict[str, Any] = {"sparsity": 0.8, "start_epoch": 0, "end_epoch": 2, "cuts_per_epoch": 3}
GOALS: dict[str, dict[str, Any]] = {
    "groups": {"sparsity": {"net.0.*": 0.9, "*": 0.5}},
    "erk": {"scope": "erk"},
    "all": {"sparsity": {"*": 0.8, "net.2.*": 0.3}, "scope": "erk", "schedule": math.sqrt},
}
CONTROLLED = [(name, "none") for name in METHODS] + [(name, "shuffle") for name in ("snip", "imp", "gradual")]
CONTROLLED += [(name, "reinit") for name in ("drive", "imp", "gradual")]
RESUMED = [("drive", "sgd"), ("drive", "adamw"), ("snip", "adamw"), ("synflow", "sgd"), ("imp", "adamw")]
RESUMED += [("gradual", "sgd"), ("gradual_by_drive", "adamw")]
DDP_VARIANTS: dict[str, tuple[int, dict[str, bool]]] = {
    "default": (1, {}),
    "static_graph": (1, {"static_graph": True}),  # accumulation fails with it in Lightning, dense networks too
    "accumulated": (2, {}),
    "gradient_as_bucket_view": (2, {"gradient_as_bucket_view": True}),
    "find_unused_parameters": (2, {"find_unused_parameters": True}),
}
"""How many batches to accumulate, and the settings of DDP."""


class Data(pl.LightningDataModule):
    """Each rank reads every other image, in order."""

    def __init__(self, batch_size: int = BATCH) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        data, world = fits.dataset(), self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False) if world > 1 else None
        return DataLoader(data, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        return fits.loader(16)


class Exact(pl.LightningModule):
    """In float64 and without BatchNorm, so that averaging over ranks gives what a joined batch gives.

    Its layers have odd numbers of rows, which two ranks cannot share evenly.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 23), nn.ReLU(), nn.Linear(23, 7), nn.ReLU(), nn.Linear(7, 5)).double()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.flatten(1).double())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


class Sharded(Exact):
    """The same network under FSDP2; its last layer is the outermost module's own, which validation leaves whole."""

    def configure_model(self) -> None:
        if any(is_sharded(parameter) for parameter in self.parameters()):  # fitted before
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net[:-1]:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class PartlySharded(Exact):
    """Only its first layer is under FSDP2; nothing averages the gradients of the others."""

    steps = 0

    def configure_model(self) -> None:
        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        return super().training_step(batch, batch_idx)


class Scheduled(fits.ConvModule):
    """With a learning-rate schedule."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, step_size=1, gamma=0.7)}


class DependsOnRank(fits.ConvModule):
    """Its loss is not a number on the second rank from the first round on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_rank == 1 else loss


class LeavesAlone(pl.Callback):
    """Changes the weights of the second rank when training starts."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == 1:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.add_(torch.randn_like(parameter))


class Same:
    """A method by which all weights score the same: zeros go first, and then position decides."""

    rounds = 1
    mode = "eval"

    def score(self, network: Any) -> dict[str, Tensor]:
        return {name: torch.ones_like(weight) for name, weight in network.weights.items()}


class FindsTies(pl.Callback):
    """Finds masks among weights with many equal values, when training starts."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = masks_among_ties(pl_module)


def masks_among_ties(module: nn.Module) -> dict[str, Any]:
    """Round all weights to multiples of 0.05, and find masks by methods that need no data."""
    with torch.no_grad():
        for parameter in module.parameters():
            local(parameter).copy_(local(parameter).mul(20).round().div(20))
    methods = {"magnitude": Magnitude(rounds=2), "random": Random(seed=3), "same": Same()}
    goals: dict[str, dict[str, Any]] = {**GOALS, "global": {}, "layerwise": {"scope": "layerwise"}}
    return {
        f"{name}-{goal}": find_masks(module, method, **{"sparsity": 0.17, **settings}).state_dict()
        for name, method in methods.items()
        for goal, settings in goals.items()
    }


class Watch(pl.Callback):
    """Saves at every epoch boundary if asked to, counts how often the masks change, and compares the weights."""

    def __init__(self, pruning: Any, folder: Path | None = None) -> None:
        self.pruning, self.folder, self.changes, self.last = pruning, folder, 0, None
        self.start: str | None = None
        self.statistics: str | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.pruning.pruned and self.statistics is None:
            self.statistics = digest_of({name: value for name, value in pl_module.named_buffers() if "running" in name})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        digest = self.pruning.masks.digest() if self.pruning.pruned else None
        self.changes += digest != self.last
        self.last = digest
        if self.pruning._start is not None:
            self.start = digest_of(self.pruning._start.weights)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


def digest_of(tensors: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(
    folder: Path,
    module: pl.LightningModule,
    pruning: Any,
    strategy: Any,
    *,
    save: bool = False,
    ckpt_path: Path | None = None,
    others: tuple[pl.Callback, ...] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Train, and return what the tests compare."""
    watch = Watch(pruning, folder if save else None)
    kwargs = {"max_epochs": EPOCHS, "strategy": strategy, "devices": 2} | settings
    trainer = fits.trainer(folder, pruning, *others, watch, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=Data(), ckpt_path=ckpt_path)
    state = {name: whole(value).detach().clone() for name, value in module.state_dict().items()}
    return {
        "state": state,
        "optimizer": [
            whole(value).clone()
            for optimizer in trainer.optimizers[0].state.values()
            for value in optimizer.values()
            if isinstance(value, Tensor)
        ],
        "digest": pruning.masks.digest(),
        "masks": pruning.masks.state_dict(),
        "report": pruning.report.to_dict(),
        "warned": [str(warning.message) for warning in caught],
        "changes": watch.changes,
        "start": watch.start,
        "statistics": watch.statistics,
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items() if "pruning" in name},
    }


def joined(folder: Path) -> dict[str, Any]:
    """Find masks on batches that one process sees joined."""
    results = {
        f"{name}-{warmup}": train(folder, Exact(), METHODS[name](warmup_epochs=warmup, batches_per_round=2), "ddp")
        for name in ("drive", "snip")
        for warmup in (0, 1)
    }
    for name, goal in GOALS.items():
        results[name] = train(folder, Exact(), METHODS["drive"](**goal, batches_per_round=2), "ddp")
    return results


def variants(folder: Path) -> dict[str, Any]:
    """Train under every way in which DDP can be set up, pruning before and after its first iteration."""
    return {
        f"{name}-{warmup}": train(
            folder,
            fits.ConvModule("adamw"),
            METHODS["drive"](warmup_epochs=warmup),
            DDPStrategy(**settings),
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.5,
        )
        for name, (accumulate, settings) in DDP_VARIANTS.items()
        for warmup in (0, 1)
    }


def methods(folder: Path) -> dict[str, Any]:
    """Train with every callback and control from other random weights and seeds on each rank."""
    results = {}
    for name, control in CONTROLLED:
        module = Scheduled()
        torch.manual_seed(1000 + rank())
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        results[f"{name}-{control}"] = train(folder, module, METHODS[name](control=control), "ddp")
    return results


def resume(folder: Path) -> dict[str, Any]:
    """Train to the end, and again from the checkpoints of all epoch boundaries, from other weights."""
    results = {}
    for name, optimizer in RESUMED:
        own, make = folder / f"{name}-{optimizer}", METHODS[name]
        results[own.name] = train(own, Scheduled(optimizer), make(), "ddp", save=True)
        for epoch in range(EPOCHS - 1):
            module = Scheduled(optimizer)
            for parameter in module.parameters():
                nn.init.normal_(parameter)
            results[f"{own.name}-{epoch}"] = train(own, module, make(), "ddp", ckpt_path=own / f"{epoch}.ckpt")
    own = folder / f"alone-{rank()}"
    results["alone"] = train(own, Scheduled(), METHODS["drive"](), "auto", devices=1, save=True)
    results["alone-1"] = train(own, Scheduled(), METHODS["drive"](), "ddp", ckpt_path=own / "1.ckpt")
    return results


def failing(folder: Path) -> dict[str, Any]:
    """Let the loss of one rank be not a number."""
    try:
        train(folder, DependsOnRank(), METHODS["snip"](), "ddp")
    except (ValueError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


OWN: dict[str, Callable[[], Any]] = {
    "GraSP": lambda: own_methods.on_page("GraSP")(batches_per_round=2),
    "Fisher": lambda: own_methods.on_page("Fisher")(),
    "LossGradients": own_methods.LossGradients,
}


def own_callback(method: Any) -> WarmupPruningCallback:
    return WarmupPruningCallback(method, sparsity=0.8, bn_batches=0)


def own(folder: Path) -> dict[str, Any]:
    """Prune by methods that read losses themselves, one of which fails on one rank."""
    results = {name: train(folder, Exact(), own_callback(make()), "ddp", max_epochs=1) for name, make in OWN.items()}
    try:
        train(folder, Exact(), own_callback(own_methods.FailsOnRank(1)), "ddp", max_epochs=1)
    except (ZeroDivisionError, RuntimeError) as error:
        results["error"] = f"{type(error).__name__}: {error}"
    results["again"] = train(folder, Exact(), own_callback(OWN["GraSP"]()), "ddp", max_epochs=1)
    return results


class WithExperts(Exact):
    """Has three more layers: one for each rank, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.experts = nn.ModuleList([nn.Linear(4, 4).double() for _ in range(3)])


def skipping(folder: Path) -> dict[str, Any]:
    """Let one rank skip two batches, and each rank use another layer."""

    def loss_fn(module: Any, batch: Any) -> Tensor | None:
        calls.append(rank())
        if rank() == 1 and len(calls) in (1, 3):
            return None
        loss = F.cross_entropy(module(batch[0]), batch[1])
        return loss + module.experts[rank()].weight.square().sum()

    calls: list[int] = []
    pruning = METHODS["drive"](loss_fn=loss_fn, bn_batches=0)
    result = train(folder, WithExperts(), pruning, "ddp_find_unused_parameters_true")
    return {**result, "calls": len(calls)}


def accelerated(folder: Path) -> dict[str, Any]:
    """Train in sparse forms and dense; the clock of the second rank would choose the dense ones."""
    results = {}
    for name in ("drive", "imp"):
        for accelerate in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                prefer(patch, *(IN_TRAINING if rank() == 0 else ("dense",)))
                pruning = METHODS[name](accelerate=accelerate)
                result = train(folder, Exact(), pruning, DDPStrategy(), accumulate_grad_batches=2)
                results[f"{name}-{accelerate}"] = result
    own = folder / "accelerated"
    with pytest.MonkeyPatch.context() as patch:
        prefer(patch, *IN_TRAINING)
        train(own, Exact(), METHODS["drive"](accelerate=True), "ddp", save=True)
        results["whole"] = train(own, Exact(), METHODS["drive"](accelerate=True), "ddp")
        results["resumed"] = train(own, Exact(), METHODS["drive"](accelerate=True), "ddp", ckpt_path=own / "1.ckpt")
    if SHARDS_ON_CPU:
        results["sharded"] = train(
            folder,
            Sharded(),
            METHODS["drive"](accelerate=True),
            ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        )
    return results


def disagreeing(folder: Path) -> dict[str, Any]:
    """Let the weights of one rank differ."""
    return train(folder, fits.ConvModule(), METHODS["snip"](), "ddp", others=(LeavesAlone(),))


def keeping(folder: Path) -> dict[str, Any]:
    """Train a network that is sparse already, elsewhere on each rank until DDP makes them equal, or by given masks."""
    module = sparse(Exact(), seed=rank())
    masks = find_masks(Exact(), Random(seed=5), sparsity=0.8)
    results = {
        "zeros": train(folder, module, KeepZerosCallback(), "ddp", save=True),
        "given": train(folder, Exact(), KeepZerosCallback(masks=masks), "ddp"),
        "resumed": train(folder, Exact(), KeepZerosCallback(), "ddp", ckpt_path=folder / "1.ckpt"),
    }
    if SHARDS_ON_CPU:
        for name, module, callback in (
            ("sharded_zeros", sparse(Sharded(), seed=0), KeepZerosCallback()),
            ("sharded_given", Sharded(), KeepZerosCallback(masks=masks)),
        ):
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            results[name] = train(folder, module, callback, strategy)
    return results


def sparse(module: Any, seed: int) -> Any:
    find_masks(module, Random(seed=seed), sparsity=0.8).apply_(module)
    return module


def sharded(folder: Path) -> dict[str, Any]:
    """Train under FSDP2, with a checkpoint in pieces and a joined one, and resume from both."""
    results = {}
    for kind in (True, False):
        own = folder / f"sharded-{kind}"

        def strategy(distributed: bool = kind) -> ModelParallelStrategy:
            return ModelParallelStrategy(
                data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed
            )

        results[f"{kind}"] = train(own, Sharded(), METHODS["drive"](), strategy(), save=True)
        for epoch in range(EPOCHS - 1):
            results[f"{kind}-{epoch}"] = train(
                own,
                Sharded(),
                METHODS["drive"](),
                strategy(),
                ckpt_path=own / f"{epoch}.ckpt",
                num_sanity_val_steps=1,
            )
    for name in ("gradual", "gradual_by_drive"):
        own = folder / name
        results[name] = train(own, Sharded(), METHODS[name](), strategy(), save=True)
        results[f"{name}-0"] = train(own, Sharded(), METHODS[name](), strategy(), ckpt_path=own / "0.ckpt")
    results["unsaved"] = train(folder, Sharded(), METHODS["drive"](), strategy())
    module = Sharded()
    fits.trainer(folder, max_epochs=1, strategy=strategy(), devices=2).fit(module, datamodule=Data())
    results["again"] = train(folder, module, METHODS["drive"](), strategy())
    results["layerwise"] = train(folder, Sharded(), METHODS["snip"](scope="layerwise", rounds=2), strategy())
    results["shuffle"] = train(folder, Sharded(), METHODS["snip"](control="shuffle"), strategy())
    for name, goal in GOALS.items():
        results[name] = train(folder, Sharded(), METHODS["drive"](**goal, batches_per_round=2), strategy())
    ties = FindsTies()
    train(folder, Sharded(), METHODS["snip"](), strategy(), others=(ties,))
    results["ties"] = ties.found
    results["refused"] = {}
    tensor_parallel = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    for name, module, callback, how in (
        ("synflow", Sharded(), METHODS["synflow"](), strategy()),
        ("imp", Sharded(), METHODS["imp"](), strategy()),
        ("reinit", Sharded(), METHODS["snip"](control="reinit"), strategy()),
        ("tensor_parallel", Sharded(), METHODS["drive"](), tensor_parallel),
        ("partly_sharded", partly := PartlySharded(), METHODS["drive"](), strategy()),
        ("own", Sharded(), own_callback(OWN["GraSP"]()), strategy()),
    ):
        try:
            train(folder, module, callback, how)
        except (MisconfigurationException, ValueError) as error:
            results["refused"][name] = f"{type(error).__name__}: {error}"
    results["steps"] = partly.steps
    return results


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def spawned(folder: Path, strategy: str) -> dict[str, Any]:
    """Train in processes that Lightning starts from this one, which then has the report."""
    module, pruning = fits.ConvModule(), METHODS["drive"]()
    trainer = fits.trainer(folder, pruning, max_epochs=EPOCHS, strategy=strategy, devices=2)
    trainer.fit(module, fits.loader())
    result = {
        "state": fits.state_of(module),
        "masks": pruning.masks.state_dict(),
        "report": pruning.report.to_dict() if pruning.report else None,
        "pruned": pruning.pruned,
    }
    # The weights go on in new processes, with a callback that knows of its masks.
    again = fits.trainer(folder, pruning, max_epochs=1, strategy=strategy, devices=2)
    again.fit(module, fits.loader())
    return {**result, "again": fits.state_of(module)}


SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
"""Whether this torch can run FSDP2 without a GPU; 2.6 cannot."""

SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        *(joined, variants, methods, resume, failing, own),
        *(skipping, accelerated, disagreeing, keeping, sharded),
    )
    if scenario is not sharded or SHARDS_ON_CPU
}


if __name__ == "__main__":
    folder, launch, *names = sys.argv[1:]
    torch.set_num_threads(1)
    if launch in ("ddp_spawn", "ddp_fork"):
        torch.save(spawned(Path(folder), launch), Path(folder) / "spawned-0.pt")
    for name in names:
        result = SCENARIOS[name](Path(folder) / name)
        torch.save(result, Path(folder) / f"{name}-{rank()}.pt")
