"""Keep pruned weights at zero while training goes on: in weights, gradients, states of optimizers and averages."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_drive.core import shards, zeroing
from lightning_drive.core.messages import listed
from lightning_drive.network import optimizer_state
from lightning_drive.network.masked_parameters import MaskedParameters
from lightning_drive.network.masks import Masks
from lightning_drive.trainer import checks, lightning_internals, other_callbacks
from lightning_drive.trainer.averages import Averages


class Enforcement:
    """Keeps the masks on one module, and its averages, through every optimizer step from :meth:`begin` to :meth:`end`.

    A ``ValueError`` names a masked parameter that the module does not have, or has in another shape. ``warned`` is
    whether there was a warning already that others write into pruned weights.
    """

    def __init__(
        self,
        pl_module: pl.LightningModule,
        masks: Masks,
        averages: Averages,
        *,
        warned: bool = False,
        masked_gradients: Callable[[], Collection[Tensor]] = tuple,
    ) -> None:
        shards.reshard_(pl_module)
        self._masks = masks
        self._averages = averages
        self._parameters = MaskedParameters(pl_module, masks)
        self._handles: list[RemovableHandle] = []
        self._hookless = False
        self._followed: list[Optimizer] = []
        self._masked_gradients = masked_gradients  # of accelerated weights, which spare the work twice in each step
        self._versions: dict[Tensor, int] = {}  # of these weights, after the last step
        self._at_zero: set[Tensor] = set()  # those that nobody has written to since
        self.warned = warned

    def begin(self, pruning: pl.Callback, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the masks on everything that is alive, and let them follow every optimizer step of this ``fit``."""
        self._parameters.zero_weights_()
        self._parameters.zero_gradients_()
        self._averages.mask_(self._masks)
        if _reads_gradients_early(pruning, trainer, pl_module):
            keep_overflow = lightning_internals.scaler(trainer) is not None
            self._handles += self._parameters.zero_gradients_at_once(keep_overflow=keep_overflow)
        self._hookless = not pl_module.automatic_optimization
        self.follow(trainer, pl_module)

    def follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *others: Optimizer) -> bool:
        """Let the masks follow every step of the optimizers that were made anew after pruning, and of others that step.

        Return whether there was one whose steps they do not follow already.
        """
        optimizers = [*trainer.optimizers, *others]
        new = [optimizer for optimizer in optimizers if not any(optimizer is known for known in self._followed)]
        if not new:
            return False
        self._followed = optimizers
        for optimizer in new:
            self._parameters.zero_optimizer_state_(optimizer)
            for inner in optimizer_state.with_wrapped(optimizer):
                self._follow_steps(trainer, pl_module, inner)
                if self._parameters.may_divide_by_zero:
                    checks.warn_of_small_eps(inner)
        return True

    def end(self) -> None:
        """Release the optimizers and the gradients."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._followed = [], []

    def before_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Mask the gradients, where they are unscaled already."""
        self.follow(trainer, pl_module, optimizer)
        masked = self._masked_gradients()
        self._at_zero = {weight for weight in masked if self._versions.get(weight) == weight._version}
        if not lightning_internals.unscales_in_step(trainer, optimizer):
            self._parameters.zero_gradients_(masked)

    def after_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask the weights if changes to them may come without a hook."""
        if self.follow(trainer, pl_module) or self._hookless:
            self._parameters.zero_weights_()
            self._averages.mask_(self._masks)

    def renew(self, state_dict: Mapping[str, Any] | None = None) -> None:
        """Mask again what others wrote into pruned weights, and warn of it once.

        Weights that are going to be saved (``state_dict``) may be copies, and are masked as well.
        """
        broken = self._parameters.renew_weights_()
        self._averages.mask_(self._masks)
        for name, mask in self._masks.items():
            value = (state_dict or {}).get(name)
            if isinstance(value, Tensor) and value.shape == mask.shape:
                zeroing.zero_({name: value}, {name: mask})
        if broken and not self.warned:
            self.warned = True
            counts = (f"{name} ({count:,} of {int((~self._masks[name]).sum()):,})" for name, count in broken.items())
            rank_zero_warn(
                f"Pruned weights were no longer 0, and were masked again: {listed(counts)}. Something writes into them"
                " outside of the optimizers' steps, such as a hook that centres or clips weights, an average of your"
                " own, or `load_state_dict`. This warning is given once."
            )

    def check(self, pl_module: pl.LightningModule) -> None:
        """Raise if a pruned layer was replaced by another one since."""
        replaced = self._parameters.replaced_in(pl_module)
        if replaced:
            raise MisconfigurationException(
                f"The masks are on the parameters that {type(pl_module).__name__} had when it was pruned, but"
                f" {listed(replaced)} was replaced or removed since, and what is there now would train without a mask."
                " Write new values into a layer in place, replace it before pruning, or leave it out with `exclude`."
            )

    def _follow_steps(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Let the masks follow every step of an optimizer, and go before it where the gradients may need them."""
        # Lightning also takes wrappers that only look like an optimizer, or were never initialised as one.
        step = getattr(type(optimizer), "step", None)
        hooked = getattr(step, "hooked", False) and "_optimizer_step_post_hooks" in vars(optimizer)
        if not hooked:
            self._hookless = True
            return
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if not pl_module.automatic_optimization or lightning_internals.unscales_in_step(trainer, optimizer):
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))

    def _before_step(self, *_: Any) -> None:
        self._parameters.zero_gradients_()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        is_known = len(self._followed) == 1 and optimizer_state.keeps_zeros(optimizer)
        masked = self._masked_gradients() if is_known else ()
        stay = self._at_zero.intersection(masked)
        self._parameters.zero_weights_(stay)
        self._versions, self._at_zero = {weight: weight._version for weight in masked}, set()
        stay_from_now_on = len(stay) < len(masked)  # if nothing but zeros is remembered of them
        if self._parameters.may_divide_by_zero or stay_from_now_on:
            self._parameters.zero_optimizer_state_(optimizer)


def _reads_gradients_early(pruning: pl.Callback, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether gradients may be used, or clipped, before ``on_before_optimizer_step`` of the pruning callback."""
    in_module = ("backward", "on_after_backward", "optimizer_step")
    in_callbacks = ("on_after_backward", "on_before_optimizer_step")
    others = other_callbacks.others(pruning, trainer)
    return (
        not pl_module.automatic_optimization
        or any(is_overridden(hook, pl_module, pl.LightningModule) for hook in in_module)
        or any(is_overridden(hook, other, pl.Callback) for other in others for hook in in_callbacks)
    )
