"""Averages and other copies of the network that are pruned along: of Lightning's callbacks, and of the user."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn

from lightning_drive.core import zeroing
from lightning_drive.core.messages import listed
from lightning_drive.network.masks import Masks
from lightning_drive.trainer import lightning_internals, other_callbacks
from lightning_drive.trainer.lightning_internals import Average


class Averages:
    """The copies of one module that are pruned along with it, looked up anew whenever something is done to them.

    They are the averages that callbacks of Lightning keep (EMA, SWA), and whatever ``returned`` returns: the
    ``averages`` of a pruning callback, which a user overrides.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, returned: Callable[[pl.LightningModule], object]
    ) -> None:
        self._trainer, self._pl_module, self._returned = trainer, pl_module, returned

    def tensors(self) -> list[dict[str, Tensor]]:
        """Return the tensors of every copy, by the names that they have in the module.

        Raise a ``TypeError`` if the user's copies are no list of modules or mappings from names to tensors, and a
        ``ValueError`` if one has a name that the module does not have, or a tensor of another shape than there.
        """
        copies = self._returned(self._pl_module)
        if not isinstance(copies, Iterable) or isinstance(copies, (nn.Module, Mapping, str)):
            raise TypeError(f"`averages` must return a list, with every copy in it, got {type(copies).__name__}.")
        own, kind = _named_tensors(self._pl_module), type(self._pl_module).__name__
        of_callbacks = [_named_tensors(average.module) for _, average in self._of_callbacks()]
        return [*of_callbacks, *(_checked(copy, own, kind) for copy in copies)]

    @torch.no_grad()
    def mask_(self, masks: Masks) -> None:
        """Set the pruned weights of all copies to exactly 0."""
        for tensors in self.tensors():
            zeroing.zero_(tensors, masks)

    @torch.no_grad()
    def load_batch_norm_statistics_(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the statistics of BatchNorm layers, by layer and buffer, into the copies that have these buffers."""
        values = {
            f"{layer}.{buffer}".lstrip("."): value
            for layer, buffers in statistics.items()
            for buffer, value in buffers.items()
        }
        for tensors in self.tensors():
            for name in tensors.keys() & values.keys():
                tensors[name].copy_(values[name])

    @torch.no_grad()
    def restart_(self) -> None:
        """Let all copies begin again with the module as it is now."""
        own = _named_tensors(self._pl_module)
        for tensors in self.tensors():
            for name, tensor in tensors.items():
                tensor.copy_(own[name])
        for callback, average in self._of_callbacks():
            count = getattr(average.holder, "n_averaged", None)
            if count is not None:
                count.zero_()
            if isinstance(callback, StochasticWeightAveraging):  # or it would average the start of this epoch at once
                lightning_internals.count_as_averaged(callback, self._trainer.current_epoch)

    def _of_callbacks(self) -> Iterator[tuple[pl.Callback, Average]]:
        """Yield Lightning's averaging callbacks, each with its average, where it has one already."""
        for callback in other_callbacks.callbacks_of(self._trainer):
            if (average := lightning_internals.average_of(callback)) is not None:
                yield callback, average


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by name."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


def _checked(copy: object, own: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the tensors of a user's copy by name; raise if they are not like those of the module."""
    tensors = _named_tensors(copy) if isinstance(copy, nn.Module) else copy
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise TypeError(
            "`averages` must return a list of modules, or of mappings from the names of parameters to tensors, got"
            f" {type(copy).__name__} in it."
        )
    unknown = [name for name in tensors if name not in own]
    if unknown:
        raise ValueError(
            f"`averages` returned a copy with {listed(map(repr, unknown))}, but {kind} has no parameter or buffer of"
            " that name. Return a mapping from the names that they have there, such as"
            ' `{f"student.{name}": tensor for name, tensor in pl_module.teacher.named_parameters()}`.'
        )
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"`averages` returned {name!r} with shape {tuple(value.shape)}, but it has shape"
                f" {tuple(own[name].shape)} in {kind}: it must be a copy of it."
            )
    return dict(tensors)
