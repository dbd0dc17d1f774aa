"""Warn of copies of the network that stay dense (EMA, teachers), and of zeros that have no masks."""

from collections.abc import Iterable, Iterator

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_drive.core import shards
from lightning_drive.network.masks import Masks
from lightning_drive.trainer import other_callbacks, trained_parameters
from lightning_drive.trainer.attribute_copies import copies_in_attributes
from lightning_drive.trainer.averages import Averages
from lightning_drive.trainer.network_copies import Copy
from lightning_drive.trainer.submodule_copies import copies_in_submodules

_LAST_LOOK = 64
"""Up to which batch of an epoch to look, at powers of two, for copies of the network that change."""

_MANY = 0.45
"""The share of zeros in a pruned network: two of four in most of its layers, or more."""


class UnmaskedWeights:
    """Warns, in the hooks of one ``fit``, of copies that stay dense and of zeros that are trained, once of each.

    It is made when the ``fit`` starts, for the parameters that are pruned (``names``), and is not saved.
    """

    def __init__(
        self,
        pruning: pl.Callback,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        averages: Averages,
        names: Iterable[str],
    ) -> None:
        self._pruning, self._trainer, self._pl_module = pruning, trainer, pl_module
        self._averages, self._names = averages, tuple(names)
        self._is_first_epoch = True
        self._warned: set[str | int] = set()  # names of copies, and the places of their tensors
        self._sums: dict[str, tuple[float, ...]] = {}  # of possible averages in this epoch

    def at_epoch_start(self, masks: Masks, *, is_due: bool) -> None:
        """Warn, before anything is pruned, of zeros in a dense network and of submodules that are copies.

        In the first epoch of a ``fit``, it is also called where that is resumed in the middle of it. ``is_due`` is
        whether the network is about to be pruned.
        """
        if self._is_first_epoch and not (masks or is_due):
            for text in zeros_without_masks(self._pruning, self._pl_module, self._names):
                rank_zero_warn(text)
        self._is_first_epoch = False
        untrained = trained_parameters.untrained(self._trainer, self._pl_module)
        parameters = self._pl_module.named_parameters()
        trained = {value for name, value in parameters if value.requires_grad and name not in untrained}
        for copy in copies_in_submodules(self._pl_module, self._names, trained):
            self._warn_of(copy, masks)

    def at_batch_start(self, masks: Masks, batch_idx: int) -> None:
        """Look for copies that change, after what is due has been pruned, at some batches of every epoch."""
        if batch_idx == 0:
            self._sums = {}
        if batch_idx <= _LAST_LOOK and batch_idx & (batch_idx - 1) == 0:
            self._warn_of_averages(masks)

    def at_epoch_end(self, masks: Masks) -> None:
        """Look for copies that change once more."""
        self._warn_of_averages(masks)

    def _warn_of_averages(self, masks: Masks) -> None:
        """Warn of copies in attributes that change while training goes on, so that they are no mere records."""
        callbacks = other_callbacks.others(self._pruning, self._trainer)
        for copy, sums, equals_module in copies_in_attributes(self._pl_module, callbacks, self._names):
            if self._sums.setdefault(copy.name, sums) != sums and not equals_module:
                self._warn_of(copy, masks)

    def _warn_of(self, copy: Copy, masks: Masks) -> None:
        """Warn of a copy, once, if it is not pruned along."""
        along = {tensor.data_ptr() for tensors in self._averages.tensors() for tensor in tensors.values()}
        places = {tensor.data_ptr() for tensor in copy.tensors.values()}
        is_known = copy.name in self._warned or not places.isdisjoint(along | self._warned)
        if not is_known and not copy.is_sparse(masks):
            self._warned.update((copy.name, *places))
            rank_zero_warn(_dense_copy(copy, type(self._pruning).__name__))


def zeros_without_masks(
    pruning: pl.Callback, pl_module: pl.LightningModule, names: Iterable[str], masks: Masks | None = None
) -> Iterator[str]:
    """Yield a warning if so many weights are 0 already that the network was pruned before, and some will be trained.

    They are all trained before a cut, and those that its masks keep after it.
    """
    parameters = dict(pl_module.named_parameters())
    weights = {name: parameters[name] for name in names if name in parameters}
    zeros, size, are_many = _count_zeros(weights.values())
    if not are_many:
        return
    trained = "these zeros will be trained like all other weights until it prunes"
    if masks is not None:
        kept = sum(
            int((shards.local(weight.detach()) == 0).logical_and_(shards.part(masks[name], of=weight)).sum())
            for name, weight in weights.items()
        )
        if not kept:
            return
        trained = f"{kept:,} of these zeros are kept, and will be trained like all other weights"
    yield (
        f"{zeros:,} of {size:,} prunable weights ({zeros / size:.1%}) are 0 already, as in a network that was pruned,"
        f" but {type(pruning).__name__} has no masks for them: {trained}. To go on with a pruned network, pass a"
        " checkpoint as `ckpt_path` that was saved with the state of the callback that pruned it; to fine-tune one"
        " without pruning it further, use `KeepZerosCallback`."
    )


def _count_zeros(parameters: Iterable[Tensor]) -> tuple[int, int, bool]:
    """Count the zeros in parameters, or in this rank's parts of them, and their weights, and tell if zeros are many.

    They are many if they are about half or more of the parameters that are not 0 altogether, as new layers may be.
    """
    weights = [shards.local(value.detach()) for value in parameters if value.layout == torch.strided]
    counts = [(weight.numel() - int(weight.count_nonzero()), weight.numel()) for weight in weights]
    partly = [(zeros, size) for zeros, size in counts if zeros < size]
    are_many = bool(partly) and sum(zeros for zeros, _ in partly) >= _MANY * sum(size for _, size in partly)
    return sum(zeros for zeros, _ in counts), sum(size for _, size in counts), are_many


def _dense_copy(copy: Copy, kind: str) -> str:
    """Return the warning of a copy that stays dense, for a user of this kind of callback."""
    how = f" by `return [{copy.mapping}]`" if copy.mapping else ""
    return (
        f"{copy.name} has the same names and shapes as {copy.of}, but is not trained, and is not pruned with it. If it"
        " is an average (of a mean teacher or a momentum encoder, say), it stays dense: an average of dense and sparse"
        " weights is dense. A copy that is written anew as a whole, as a target network is, becomes sparse then. To"
        f" prune it along, override `averages(pl_module)` of {kind} and return it{how}."
    )
