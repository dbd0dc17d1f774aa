"""Masks on all that is alive in a training run: weights, gradients, states of optimizers and running averages."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_drive.core import shards, zeroing
from lightning_drive.core.masks import Masks
from lightning_drive.core.messages import listed
from lightning_drive.network import optimizer_state
from lightning_drive.network.masked_parameters import MaskedParameters
from lightning_drive.trainer import averages, checks, facts, other_callbacks


class Enforcement:
    """Keeps the masks on one module through every step of its optimizers, from :meth:`begin` to :meth:`end`.

    Args:
        pl_module: Has every masked parameter under its name, in the mask's shape.
        masks: Parameter name to boolean mask, on any device; ``True`` keeps.
        copies: Returns the tensors of copies that are pruned along, see
            :func:`lightning_drive.trainer.averages.tensors`.
        warned: Whether it was said already that others write into pruned weights.

    Raises:
        ValueError: If a parameter is missing or has another shape (named).

    """

    def __init__(
        self,
        pl_module: pl.LightningModule,
        masks: Masks,
        *,
        copies: Callable[[], Iterable[Mapping[str, Tensor]]] = tuple,
        warned: bool = False,
    ) -> None:
        shards.reshard_(pl_module)
        self._masks = masks
        self._copies = copies
        self._parameters = MaskedParameters(pl_module, masks)
        self._handles: list[RemovableHandle] = []
        self._hookless = False
        self._followed: list[Optimizer] = []
        self.warned = warned

    def begin(self, pruning: pl.Callback, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the masks on everything that is alive, and have every optimizer step followed by them.

        Args:
            pruning: The callback that prunes.
            trainer: Its Trainer, in the middle of ``fit``.
            pl_module: The module.

        """
        self._parameters.zero_weights_()
        self._parameters.zero_gradients_()
        for average in other_callbacks.averaged_models(trainer):
            self._masks.apply_(average)
        averages.mask_(self._copies(), self._masks)
        if facts.reads_gradients_early(pruning, trainer, pl_module):
            keep_overflow = facts.scaler(trainer) is not None
            self._handles += self._parameters.zero_gradients_at_once(keep_overflow=keep_overflow)
        self._hookless = not pl_module.automatic_optimization
        self.follow(trainer, pl_module)

    def follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *others: Optimizer) -> bool:
        """Have every step of the optimizers followed by the masks; those that are followed already are passed over.

        Args:
            trainer: The Trainer, whose optimizers may have been made anew after pruning.
            pl_module: The module.
            others: Optimizers that step, but may not be the Trainer's.

        Returns:
            Whether there was a new one.

        """
        alive = [*trainer.optimizers, *others]
        new = [each for each in alive if not any(each is known for known in self._followed)]
        if not new:
            return False
        self._followed = alive
        for optimizer in new:
            self._parameters.zero_optimizer_state_(optimizer)
            for each in optimizer_state.with_wrapped(optimizer):
                self._follow_steps(trainer, pl_module, each)
                if self._parameters.may_divide_by_zero:
                    checks.warn_of_small_eps(each)
        return True

    def end(self) -> None:
        """Let go of the optimizers and of the gradients."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._followed = [], []

    def before_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Mask the gradients, where they are unscaled already.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            optimizer: The optimizer that is going to step.

        """
        self.follow(trainer, pl_module, optimizer)
        if not facts.unscales_in_step(trainer, optimizer):
            self._parameters.zero_gradients_()

    def after_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask the weights, where not every change to them has a hook after it.

        Args:
            trainer: The Trainer.
            pl_module: The module.

        """
        if self.follow(trainer, pl_module) or self._hookless:
            self._parameters.zero_weights_()
            averages.mask_(self._copies(), self._masks)

    def renew(self, state_dict: Mapping[str, Any] | None = None) -> None:
        """Mask again what others wrote into pruned weights, and warn of it once.

        Args:
            state_dict: Weights that are going to be saved, which may be copies.

        """
        broken = self._parameters.renew_weights_()
        averages.mask_(self._copies(), self._masks)
        for name, mask in self._masks.items():
            value = (state_dict or {}).get(name)
            if isinstance(value, Tensor) and value.shape == mask.shape:
                zeroing.zero_({name: value}, {name: mask})
        if broken and not self.warned:
            self.warned = True
            counts = (f"{name} ({count:,} of {int((~self._masks[name]).sum()):,})" for name, count in broken.items())
            rank_zero_warn(
                f"Pruned weights were no longer 0, and were masked again: {listed(counts)}. Something writes into them"
                " outside of the optimizers' steps, such as a hook that centres or clips weights, an average of one's"
                " own, or `load_state_dict`. This is said once."
            )

    def check(self, pl_module: pl.LightningModule) -> None:
        """Refuse to go on where pruned layers were replaced by others.

        Args:
            pl_module: The module as it is now.

        Raises:
            MisconfigurationException: If one was (named).

        """
        replaced = self._parameters.replaced_in(pl_module)
        if replaced:
            raise MisconfigurationException(
                f"The masks are on the parameters that {type(pl_module).__name__} had when it was pruned, but"
                f" {listed(replaced)} was replaced or removed since, and what is there now would train without a mask."
                " Write new values into a layer in place, replace it before pruning, or leave it out with `exclude`."
            )

    def _follow_steps(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Have every step of an optimizer followed by the masks, and led by them where the gradients may need it."""
        # Lightning also takes wrappers that only look like an optimizer, or were never initialised as one.
        step = getattr(type(optimizer), "step", None)
        hooked = getattr(step, "hooked", False) and "_optimizer_step_post_hooks" in vars(optimizer)
        if not hooked:
            self._hookless = True
            return
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if not pl_module.automatic_optimization or facts.unscales_in_step(trainer, optimizer):
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))

    def _before_step(self, *_: Any) -> None:
        self._parameters.zero_gradients_()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._parameters.zero_weights_()
        if self._parameters.may_divide_by_zero:
            self._parameters.zero_optimizer_state_(optimizer)
