"""The callback that trains a network which is sparse already, and keeps it so."""

import time
from collections.abc import Mapping
from os import PathLike
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_drive.callbacks.hooks import PruningCallback
from lightning_drive.core import shards
from lightning_drive.network import prunable, prunable_checks
from lightning_drive.network.masks import Masks, of_zeros
from lightning_drive.report import plan
from lightning_drive.report.plan import PruningPlan
from lightning_drive.trainer import given_masks, search_in_fit

_REMEDY = "Leave out a layer that is new and starts at zero with `exclude`, or it never trains."


class KeepZerosCallback(PruningCallback):
    """Fine-tune a network that is sparse already: its zeros stay zeros, and nothing else is pruned.

    For a new task, with a head, data and a number of epochs of its own. To go on with the run that pruned the network,
    pass ``ckpt_path`` to ``fit``, with the callback of that run.

    The zeros are read, or the masks put on, when the first epoch begins. Layers that are frozen then count, too, since
    they may be unfrozen later.

    Args:
        masks: Which weights to keep; ``None``: those that are not 0 when ``fit`` begins. Either a
            :class:`lightning_drive.Masks`, or a path: of a checkpoint of a pruning callback, whose masks are taken, or
            of any other checkpoint, saved ``state_dict`` or sparse file, whose zeros are taken. No weights are loaded.
            As an attribute, those that are on (:class:`lightning_drive.Masks`), on the CPU; empty before the first
            epoch.
        include: Glob patterns over parameter names; only what matches is kept at zero. Default: the weights of all
            layers that multiply by them, or all that ``masks`` are for.
        exclude: Glob patterns over parameter names that train densely, such as a new head that starts at zero.
        accelerate: Whether the network trains in sparse forms: layers whose forward and backward pass is faster so on
            this machine, measured at the first batch (on a CPU). Sums come in another order, so weights agree with
            those of a dense run, or of a run that is resumed, within rounding, not bit for bit.

    Attributes:
        pruned: Whether the masks are on.
        report: The report (:class:`lightning_drive.PruningReport`); ``None`` before the first epoch.

    Raises:
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import lightning.pytorch as pl
        >>> callback = KeepZerosCallback(exclude=["head.*"])
        >>> trainer = pl.Trainer(max_epochs=10, callbacks=[callback], logger=False)

    """

    def __init__(
        self,
        *,
        masks: Masks | str | PathLike[str] | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        accelerate: bool = False,
    ) -> None:
        super().__init__(
            sparsity=0.0,  # what is asked for beyond the zeros that are there
            schedule="exponential",
            scope="global",
            include=include,
            exclude=exclude,
            reset_best=False,
            control="none",
            accelerate=accelerate,
            remember_epoch=None,
        )
        self.given_masks = given_masks.checked(masks)
        self._read_masks: Masks | None = None  # those of this ``fit``, before they are on

    @override
    def prunable_parameters(self, pl_module: nn.Module) -> dict[str, nn.Parameter]:
        if self.given_masks is None:
            return self._in_scope(pl_module)
        return (self._read_masks or self._masks_for(pl_module)).parameters_of(pl_module)

    def _in_scope(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Select the prunable parameters, frozen ones, too."""
        with prunable.unfrozen(module):
            return prunable.prunable_parameters(module, self.include, self.exclude)

    def _masks_for(self, module: nn.Module) -> Masks:
        """Return the masks to put on a module; raise ValueError if they do not fit it, or prune nothing or all."""
        if self.given_masks is None:
            masks = of_zeros(self.prunable_parameters(module))
            remedy = "Load the weights of a sparse network before `fit`, or set `masks`."
            given_masks.check_share(masks, f"of {type(module).__name__} that are prunable", "0", remedy)
        else:
            masks = given_masks.read(self.given_masks, module, self._in_scope, self.include, self.exclude)
            remedy = "Pass the masks, or a file, of a sparse network."
            given_masks.check_share(masks, f"that `masks={self._source!r}` covers", "pruned", remedy)
        return masks

    @property
    def _source(self) -> str | None:
        """The path of the masks, or their digest; ``None``: the zeros of the network."""
        return self.given_masks.digest()[:12] if isinstance(self.given_masks, Masks) else self.given_masks

    # Decisions of every pruning callback.

    @property
    @override
    def _last_epoch(self) -> int:
        return 0

    @override
    def _is_due(self, trainer: pl.Trainer) -> bool:
        return True

    @override
    def _selected(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
        return self.prunable_parameters(pl_module)

    @override
    def _check_module(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read_masks = None if self.given_masks is None else self._masks_for(pl_module)
        selected = self.prunable_parameters(pl_module)
        prunable_checks.check_numbers(selected)
        shards.holders(selected)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if masks do not fit the module; what another ``fit`` held counts only if it is resumed."""
        if not self._fit.is_restored:
            self._start_afresh()
        super().on_fit_start(trainer, pl_module)

    @override
    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.monotonic()
        shards.reshard_(pl_module)
        masks = self._read_masks or self._masks_for(pl_module)
        outcome = search_in_fit.given(trainer, pl_module, masks, _REMEDY)
        # Everything is computed: from here on only commit.
        self._record(trainer, outcome, self._method, start, control="none")
        forgotten = self._commit(trainer, pl_module)
        self._announce(trainer, outcome, forgotten)

    @override
    def _plan(self, module: nn.Module, selected: Mapping[str, nn.Parameter], **run: Any) -> PruningPlan:
        masks = self._masks_for(module)
        kept = (masks.num_kept,)
        when: dict[str, Any] = {"first_epoch": 0, "last_epoch": 0}
        return plan.plan(module, masks, method=self._method, kept=kept, passes=0, pass_over="", **when, **run)

    @property
    def _method(self) -> str:
        return "KeepZeros()" if self._source is None else f"KeepZeros(masks={self._source!r})"

    @override
    def _settings(self) -> dict[str, Any]:
        return {"masks": self._source, "include": self.include, "exclude": self.exclude}

    @override
    def _warn_of_other_settings(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fit.is_restored and self._source not in (None, (self._restored_settings or {}).get("masks")):
            rank_zero_warn(
                f"The masks of the checkpoint stay on: `masks={self._source!r}` has no effect. To put other masks on,"
                " load the weights of the checkpoint, and call `fit` without `ckpt_path`."
            )

    @override
    def _release(self) -> None:
        self._read_masks = None
        super()._release()
