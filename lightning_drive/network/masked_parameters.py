"""Keep the pruned parameters of a live module at zero in every step: weights, gradients and optimizer state."""

from collections.abc import Collection
from copy import copy

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_drive.core import shards, tensor_kinds
from lightning_drive.core.bits import INTEGERS
from lightning_drive.core.zeroing import where_pruned
from lightning_drive.network.masks import Masks
from lightning_drive.network.optimizer_state import element_wise, is_like, keeps_tensors_elsewhere, with_wrapped


class MaskedParameters:
    """The live parameters of one module and their masks, prepared for being masked in every training step.

    Of parameters that are split over ranks, every rank masks its own part.

    Args:
        module: Has every masked parameter under its name, in the mask's shape.
        masks: Parameter name to boolean mask, on any device; ``True`` keeps.

    Attributes:
        may_divide_by_zero: Whether an optimizer's ``eps`` may be 0 in the precision of a parameter, and its step 0/0
            for a zero.

    Raises:
        TypeError: If a parameter is not dense, or of a subclass that may keep its numbers elsewhere (named).
        ValueError: If a parameter is missing or has another shape (named).

    """

    def __init__(self, module: nn.Module, masks: Masks) -> None:
        parameters = masks.parameters_of(module)
        for name, parameter in parameters.items():
            if not tensor_kinds.is_plain(shards.local(parameter)):
                raise tensor_kinds.not_maskable(shards.local(parameter), name)
        self.may_divide_by_zero = any(parameter.dtype == torch.float16 for parameter in parameters.values())
        self._parameters = parameters
        self._fast_masks = {parameter: _FastMask(masks[name], parameter) for name, parameter in parameters.items()}

    def replaced_in(self, module: nn.Module) -> list[str]:
        """Return the names of the parameters that the module no longer has, or has replaced by others."""
        now = dict(module.named_parameters(remove_duplicate=False))
        return [
            name
            for name, parameter in self._parameters.items()
            if now.get(name) is not parameter and type(parameter) is nn.Parameter  # shards come and go
        ]

    @torch.no_grad()
    def zero_weights_(self, at_zero: Collection[Tensor] = ()) -> None:
        """Set the pruned weights to exactly 0, but for those of parameters that are known to be ``at_zero``."""
        for parameter, mask in self._fast_masks.items():
            if parameter not in at_zero:
                mask.zero_(parameter)

    @torch.no_grad()
    def renew_weights_(self) -> dict[str, int]:
        """Set the pruned weights to exactly 0, also on another device than before.

        Return the name of every parameter in which some were not 0, and their number.
        """
        fast_masks = {
            name: self._fast_masks[parameter].on(parameter.device) for name, parameter in self._parameters.items()
        }
        counts = {name: mask.count_broken(self._parameters[name]) for name, mask in fast_masks.items()}
        broken = {name: int(count) for name, count in counts.items() if count}
        for name in broken:
            fast_masks[name].zero_(self._parameters[name])
        return broken

    @torch.no_grad()
    def zero_gradients_(self, masked: Collection[Tensor] = ()) -> None:
        """Set the gradients of pruned weights to exactly 0, where there are gradients and they are not ``masked``."""
        for parameter, mask in self._fast_masks.items():
            if parameter.grad is not None and parameter not in masked:
                mask.zero_(parameter.grad)

    def zero_gradients_at_once(self, *, keep_overflow: bool) -> list[RemovableHandle]:
        """Set the gradients of pruned weights to exactly 0 within every backward pass, until the handles are removed.

        With ``keep_overflow`` infinite and NaN gradients stay, by which a ``GradScaler`` sees that it must skip the
        step, as it would in dense training.
        """
        return [
            parameter.register_post_accumulate_grad_hook(_GradientHook(mask, keep_overflow))  # type: ignore[no-untyped-call]
            for parameter, mask in self._fast_masks.items()
            if parameter.requires_grad
        ]

    @torch.no_grad()
    def zero_optimizer_state_(self, optimizer: Optimizer) -> None:
        """Remove pruned weights from the state of an optimizer, whose momentum would bring them back.

        State that is known to be kept element by element is masked, also in optimizers that this one wraps (SAM,
        Lookahead). If there is any other beside it (a preconditioner, say), none is. The history of ``LBFGS``, which
        joins all parameters, begins anew, unless no pruned weight has moved in it. A second call changes nothing.
        """
        for inner in with_wrapped(optimizer):
            if isinstance(inner, LBFGS) and self._is_in_history_of(inner):
                inner.state.clear()
            if not keeps_tensors_elsewhere(inner):
                for parameter, mask in self._fast_masks.items():
                    for value in element_wise(inner, parameter):
                        mask.zero_(value)

    def _is_in_history_of(self, optimizer: LBFGS) -> bool:
        """Whether a pruned weight has moved, or had a gradient, in the steps that the optimizer remembers."""
        flat = [
            (self._fast_masks[value].pruned if value in self._fast_masks else torch.zeros_like(value, dtype=torch.bool))
            .reshape(-1)
            .repeat_interleave(1 + value.is_complex())
            for value in optimizer.param_groups[0]["params"]
        ]
        length = sum(map(len, flat))
        history = tree_leaves([dict(state) for state in optimizer.state.values()])
        vectors = [value for value in history if isinstance(value, Tensor) and value.shape == (length,)]
        return any(bool(vector[torch.cat(flat)].any()) for vector in vectors)


class _FastMask:
    """A mask of a parameter, or of this rank's part of it, prepared for being written many times.

    On a CPU ``masked_fill_`` looks at one number after the other. Clearing bits gives the same and is several times as
    fast, most of all by masks as wide as the numbers. To write zeros once, see :mod:`lightning_drive.core.zeroing`.
    """

    def __init__(self, mask: Tensor, parameter: Tensor) -> None:
        self._bits: Tensor | None = None
        weights = shards.local(parameter.detach())
        if weights.device.type == "cpu" and weights.is_floating_point():
            kept = shards.part(mask, of=parameter)
            self._bits = torch.empty_like(weights, dtype=INTEGERS[weights.itemsize]).copy_(kept).neg_()
        else:
            self._pruned = where_pruned(mask, parameter)

    @property
    def pruned(self) -> Tensor:
        """The pruned entries, as a boolean tensor."""
        return self._pruned if self._bits is None else self._bits == 0

    def on(self, device: torch.device) -> "_FastMask":
        """Return the mask on a device: when training ends, Lightning moves the module to the CPU."""
        if (self._pruned if self._bits is None else self._bits).device == device:
            return self
        moved = copy(self)
        moved._bits, moved._pruned = None, self.pruned.to(device)
        return moved

    def count_broken(self, tensor: Tensor) -> Tensor:
        """Count the pruned weights that are not 0."""
        tensor = shards.local(tensor.detach())
        if self._bits is not None and is_like(tensor, self._bits):
            return tensor.view(self._bits.dtype).bitwise_and(~self._bits).view(tensor.dtype).count_nonzero()
        return tensor.masked_fill(~self.pruned, 0).count_nonzero()

    def zero_(self, tensor: Tensor, *, keep_overflow: bool = False) -> None:
        """Write zeros, also into a sparse tensor, such as the gradient of an ``nn.Embedding(sparse=True)``."""
        tensor = shards.local(tensor)
        if self._bits is not None and not keep_overflow and is_like(tensor, self._bits):
            tensor.view(self._bits.dtype).bitwise_and_(self._bits)
            return
        pruned = self.pruned
        if tensor.is_sparse:
            tensor, pruned = tensor._values(), pruned[tuple(tensor._indices())]
        tensor.masked_fill_(pruned & tensor.isfinite() if keep_overflow else pruned, 0)


class _GradientHook:
    """Masks the gradient of a parameter once it is accumulated."""

    def __init__(self, mask: _FastMask, keep_overflow: bool) -> None:
        self._mask, self._keep_overflow = mask, keep_overflow

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._mask.zero_(parameter.grad, keep_overflow=self._keep_overflow)
