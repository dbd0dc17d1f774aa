"""The base of callbacks that prune several times in one run, which leave out parameters that never had a gradient."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_drive.callbacks.hooks import PruningCallback
from lightning_drive.core import saved_values
from lightning_drive.search import unscored_parameters


class RepeatedPruningCallback(PruningCallback):
    """Prune several times, and leave out what had no gradient in all of the training before the first cut.

    A method that reads no loss cannot tell such parameters, which stay dense with other methods, too.

    The arguments are those of :class:`~lightning_drive.callbacks.actions.PruningActions`.
    """

    _without_gradient: set[str] | None = None
    """The names of parameters without a gradient so far, before the first cut; ``None`` until training starts."""

    # Hooks.

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put restored masks on, and begin to note which parameters have a gradient."""
        super().on_train_start(trainer, pl_module)
        if self._without_gradient is None:
            self._without_gradient = set() if self.pruned else set(self._selected(trainer, pl_module))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Mask the gradients; before the first cut, note which parameters have one."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._without_gradient and not self.pruned:
            names = self._without_gradient
            self._without_gradient = {name for name in names if pl_module.get_parameter(name).grad is None}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of any pruning callback, and the names of parameters without a gradient so far."""
        names = self._without_gradient
        return {**super().state_dict(), "without_gradient": None if names is None else sorted(names)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` of this or an earlier version returned."""
        what = "the names of parameters without a gradient in the callback state"
        names = saved_values.check(list[str] | None, dict(state_dict).get("without_gradient"), what)
        super().load_state_dict(state_dict)
        self._without_gradient = None if names is None else set(names)

    @override
    def _start_afresh(self) -> None:
        super()._start_afresh()
        self._without_gradient = None

    # Pruning.

    @override
    def _selected(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
        """Select the prunable parameters that an optimizer holds and, from the first cut on, that had gradients."""
        selected = super()._selected(trainer, pl_module)
        left_out = self._without_gradient if self.pruned or self._is_due(trainer) else None
        reached = {name: parameter for name, parameter in selected.items() if name not in (left_out or ())}
        return reached or selected  # if none is left, there was no step yet

    def _sparsities(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[float, float]:
        """Return the sparsity so far, and that which the last cut would reach, both of all parameters together."""
        shapes = {name: parameter.shape for name, parameter in self._selected(trainer, pl_module).items()}
        return self.masks.sparsity, round(self._goal.overall_sparsity(shapes), 6)

    def _left_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule, phase: str) -> list[str]:
        """Return a warning if the first cut leaves out parameters, which had no gradient in the phase before it."""
        names, selected = list(super()._selected(trainer, pl_module)), self._selected(trainer, pl_module)
        left_out = [] if self.pruned else [name for name in names if name not in selected]
        return [unscored_parameters.unreached_before_cut(left_out, names, phase)] if left_out else []

    @override
    def _others(self, trainer: pl.Trainer, pl_module: pl.LightningModule, selected: Iterable[str]) -> list[str]:
        others = super()._others(trainer, pl_module, selected)
        return [name for name in others if name not in (self._without_gradient or ())]
