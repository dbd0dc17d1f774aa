"""Training batches for scoring, read from copies, so that what knows its place in the data is never moved on."""

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
from lightning_drive.trainer.data_copies import Copier

_LOST = "batches read to score weights would be lost to training"
_OR_WORKER = "or read it in a worker (`num_workers=1`), which has a copy of its own."


class TrainingBatches:
    """The training batches, ready for the device, from copies of the loaders.

    Nothing that training reads from is touched: not its live iterator, and no position, counter or random generator
    of a loader, sampler or dataset. So there is nothing to put back, and a checkpoint that is saved in between has the
    true places. Every pass goes in the loader's own order and under ``limit_train_batches``; both transfer hooks of
    the module run. Reading them raises what :func:`check_data` does.

    Args:
        trainer: A Trainer in the middle of ``fit``.
        pl_module: Its module.

    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._source: _Source | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._source is None:
            self._source = _Source(_live(self._trainer))
        length = self._trainer.num_training_batches  # the loop, not the loader, counts up to `limit_train_batches`
        for batch, _, _ in islice(iter(self._source.loader), int(length) if math.isfinite(length) else None):
            yield self._transferred(batch)

    def _transferred(self, batch: Any) -> Any:
        batch = self._trainer.precision_plugin.convert_input(batch)
        batch = self._pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    @contextmanager
    def opened(self) -> Generator["TrainingBatches"]:
        """Stop workers and close files at the end."""
        try:
            yield self
        finally:
            if self._source is not None:
                self._source.close()


def check_data(trainer: pl.Trainer) -> None:
    """Raise if the training data cannot be read a second time.

    Args:
        trainer: A Trainer in the middle of ``fit``, after ``on_train_start``.

    Raises:
        MisconfigurationException: If it is a stream.

    """
    source = _Source(_live(trainer))
    try:
        if source.has_unusable:  # whether it is in the way only reading tells
            with preserved_rng():
                next(iter(source.loader), None)
    finally:
        source.close()


def _live(trainer: pl.Trainer) -> CombinedLoader:
    """Give the loader that training itself reads; there is one from `on_train_start` on."""
    live = trainer.fit_loop._combined_loader
    assert live is not None
    return live


class _Source:
    """A combined loader that can be iterated without moving the one it is a copy of."""

    def __init__(self, live: CombinedLoader) -> None:
        names = " and ".join(dict.fromkeys(map(_name_of_data, live.flattened)))
        copier = Copier(_is_shared, lambda place: _error(names, place))
        for loader in live.flattened:
            _check_no_iterator(loader)
            if getattr(loader, "num_workers", 0) > 0:
                for part in ("dataset", "collate_fn", "worker_init_fn"):
                    copier.copy_for_workers(getattr(loader, part, None))
        self.loader = CombinedLoader(live.iterables, live._mode)
        self.loader.flattened = copier.copy(live.flattened)
        self.loader.limits = live.limits
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


def _error(names: str, place: str) -> Exception:
    return MisconfigurationException(
        f"The training data ({names}) goes on in {place}, which cannot be copied: {_LOST}. Let its `__iter__` make a"
        f" new one each time, {_OR_WORKER}"
    )


def _is_shared(value: Any) -> bool:
    """Whether this is no data: a network, but not the module, which data may be made by and count in."""
    if isinstance(value, nn.Module):
        return not isinstance(value, pl.LightningModule) and next(value.parameters(), None) is not None
    return isinstance(value, (pl.Trainer, pl.Callback))
