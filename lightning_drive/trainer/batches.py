"""Training batches for scoring, read from copies of the loaders, so that training itself loses none."""

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch import nn

from lightning_drive.network.random_state import preserved_rng
from lightning_drive.trainer import lightning_internals
from lightning_drive.trainer.data_copies import Copier

_LOST = "batches read to score weights would be lost to training"
_OR_WORKER = "or read it in a worker (`num_workers=1`), which has a copy of its own."


class TrainingBatches:
    """The training batches, ready for the device, of a Trainer that is in the middle of ``fit``.

    Nothing that training reads from is touched: not its live iterator, and no position, counter or random generator
    of a loader, sampler or dataset. So there is nothing to put back, and a checkpoint that is saved in between has the
    true places. Every pass goes in the loader's own order and under ``limit_train_batches``; both transfer hooks of
    the module run. Reading them raises what :func:`check_data` does.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._copy: _CopiedLoader | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._copy is None:
            self._copy = _CopiedLoader(lightning_internals.combined_loader(self._trainer))
        length = self._trainer.num_training_batches  # the loop, not the loader, counts up to `limit_train_batches`
        for batch, _, _ in islice(iter(self._copy.loader), int(length) if math.isfinite(length) else None):
            yield self._on_device(batch)

    def _on_device(self, batch: Any) -> Any:
        batch = self._trainer.precision_plugin.convert_input(batch)
        batch = lightning_internals.before_batch_transfer(self._pl_module, batch)
        return self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    @contextmanager
    def opened(self) -> Generator["TrainingBatches"]:
        """Stop workers and close files at the end."""
        try:
            yield self
        finally:
            if self._copy is not None:
                self._copy.close()


def check_data(trainer: pl.Trainer) -> None:
    """Raise MisconfigurationException, from ``on_train_start`` on, if the data cannot be read a second time."""
    copy = _CopiedLoader(lightning_internals.combined_loader(trainer))
    try:
        if copy.has_unusable:  # only reading shows whether that is in the way
            with preserved_rng():
                next(iter(copy.loader), None)
    finally:
        copy.close()


class _CopiedLoader:
    """A copy of the loader that training reads, with copies of all that would move when it is read."""

    def __init__(self, live: CombinedLoader) -> None:
        names = " and ".join(dict.fromkeys(map(_name_of_data, live.flattened)))
        copier = Copier(_is_shared, lambda place: _uncopyable(names, place))
        for loader in live.flattened:
            _check_no_iterator(loader)
            if getattr(loader, "num_workers", 0) > 0:
                for part in ("dataset", "collate_fn", "worker_init_fn"):
                    copier.copy_for_workers(getattr(loader, part, None))
        self.loader = lightning_internals.like(live, copier.copy(live.flattened))
        self.has_unusable = copier.has_unusable
        self._files = copier.files

    def close(self) -> None:
        self.loader.reset()
        for file in self._files:
            file.close()


def _name_of_data(loader: Any) -> str:
    dataset = getattr(loader, "dataset", None)
    return type(loader if dataset is None else dataset).__name__


def _check_no_iterator(loader: Any) -> None:
    in_worker = getattr(loader, "num_workers", 0) > 0
    if isinstance(loader, Iterator) or (isinstance(getattr(loader, "dataset", None), Iterator) and not in_worker):
        raise MisconfigurationException(
            f"The training data ({_name_of_data(loader)}) is an iterator: {_LOST}. Let its `__iter__` return a new"
            f" iterator each time, {_OR_WORKER}"
        )


def _uncopyable(names: str, place: str) -> Exception:
    return MisconfigurationException(
        f"The training data ({names}) goes on in {place}, which cannot be copied: {_LOST}. Let its `__iter__` make a"
        f" new one each time, {_OR_WORKER}"
    )


def _is_shared(value: Any) -> bool:
    """Whether something is no data: a network, but not the module, which data may be made by and count in."""
    if isinstance(value, nn.Module):
        return not isinstance(value, pl.LightningModule) and next(value.parameters(), None) is not None
    return isinstance(value, (pl.Trainer, pl.Callback))
