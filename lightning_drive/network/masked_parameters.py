"""The live parameters of a module under its masks: what a training step needs, looked up once."""

from copy import copy

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_drive.core import shards, tensor_kinds
from lightning_drive.core.bits import INTEGERS
from lightning_drive.core.masks import Masks
from lightning_drive.core.zeroing import where_pruned
from lightning_drive.network.optimizer_state import element_wise, is_like, keeps_tensors_elsewhere, with_wrapped


class MaskedParameters:
    """The live parameters of one module under its masks: what a training step needs, looked up once.

    Of parameters that are split over ranks, every rank looks after its own part.

    Args:
        module: Has every masked parameter under its name, in the mask's shape.
        masks: Parameter name to boolean mask, on any device; ``True`` keeps.

    Attributes:
        may_divide_by_zero: Whether an optimizer's ``eps`` may be 0 in the precision of a parameter, and its step 0/0
            for a zero.

    Raises:
        TypeError: If a parameter is not dense, or a subclass that may keep its numbers elsewhere (named).
        ValueError: If a parameter is missing or has another shape (named).

    """

    def __init__(self, module: nn.Module, masks: Masks) -> None:
        parameters = masks.parameters_of(module)
        for name, parameter in parameters.items():
            if not tensor_kinds.is_plain(shards.local(parameter)):
                raise tensor_kinds.not_maskable(shards.local(parameter), name)
        self.may_divide_by_zero = any(parameter.dtype == torch.float16 for parameter in parameters.values())
        self._parameters = parameters
        self._covers = {parameter: _Cover(masks[name], parameter) for name, parameter in parameters.items()}

    def replaced_in(self, module: nn.Module) -> list[str]:
        """Name the parameters that the module no longer has, or has another one in place of.

        Args:
            module: The module that these were the parameters of.

        """
        now = dict(module.named_parameters(remove_duplicate=False))
        return [
            name
            for name, parameter in self._parameters.items()
            if now.get(name) is not parameter and type(parameter) is nn.Parameter  # shards come and go
        ]

    @torch.no_grad()
    def zero_weights_(self) -> None:
        """Set the pruned weights to exactly 0."""
        for parameter, cover in self._covers.items():
            cover.zero_(parameter)

    @torch.no_grad()
    def renew_weights_(self) -> dict[str, int]:
        """Set the pruned weights to exactly 0 where they are not, also on another device than before.

        Returns:
            Name of every parameter where some were not, and how many.

        """
        covers = {name: self._covers[parameter].on(parameter.device) for name, parameter in self._parameters.items()}
        counts = {name: cover.count_broken(self._parameters[name]) for name, cover in covers.items()}
        broken = {name: int(count) for name, count in counts.items() if count}
        for name in broken:
            covers[name].zero_(self._parameters[name])
        return broken

    @torch.no_grad()
    def zero_gradients_(self) -> None:
        """Set the gradients of pruned weights to exactly 0, where there are gradients."""
        for parameter, cover in self._covers.items():
            if parameter.grad is not None:
                cover.zero_(parameter.grad)

    def zero_gradients_at_once(self, *, keep_overflow: bool) -> list[RemovableHandle]:
        """Have every backward pass set the gradients of pruned weights to exactly 0 as soon as they are there.

        Args:
            keep_overflow: Whether infinite and NaN gradients stay, by which a ``GradScaler`` sees that it must skip
                the step, as it would in dense training.

        Returns:
            Handles whose ``remove`` ends it.

        """
        return [
            parameter.register_post_accumulate_grad_hook(_GradientHook(cover, keep_overflow))  # type: ignore[no-untyped-call]
            for parameter, cover in self._covers.items()
            if parameter.requires_grad
        ]

    @torch.no_grad()
    def zero_optimizer_state_(self, optimizer: Optimizer) -> None:
        """Make an optimizer forget pruned weights: its momentum would bring them back.

        State that is known to be kept element by element is masked, also in optimizers that this one wraps (SAM,
        Lookahead). Where there is any other beside it (a preconditioner, say), none is. The history of ``LBFGS``,
        which is of all parameters together, is of no use to a network with fewer of them, and begins anew, unless it
        is one of a pruned network already. Doing it twice does no harm.

        Args:
            optimizer: The optimizer.

        """
        for inner in with_wrapped(optimizer):
            if isinstance(inner, LBFGS) and self._is_in_history_of(inner):
                inner.state.clear()
            if not keeps_tensors_elsewhere(inner):
                for parameter, cover in self._covers.items():
                    for value in element_wise(inner, parameter):
                        cover.zero_(value)

    def _is_in_history_of(self, optimizer: LBFGS) -> bool:
        """Whether a pruned weight has moved, or had a gradient, in the steps that the optimizer remembers."""
        flat = [
            (self._covers[each].pruned if each in self._covers else torch.zeros_like(each, dtype=torch.bool))
            .reshape(-1)
            .repeat_interleave(1 + each.is_complex())
            for each in optimizer.param_groups[0]["params"]
        ]
        length = sum(map(len, flat))
        history = tree_leaves([dict(state) for state in optimizer.state.values()])
        vectors = [value for value in history if isinstance(value, Tensor) and value.shape == (length,)]
        return any(bool(vector[torch.cat(flat)].any()) for vector in vectors)


class _Cover:
    """What a mask prunes of a parameter, or of this rank's part of it, in the form that is applied the fastest.

    On a CPU ``masked_fill_`` looks at one number after the other. Clearing their bits is the same and several times as
    fast, most of all with masks as wide as the numbers.
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
        """The same as a boolean tensor."""
        return self._pruned if self._bits is None else self._bits == 0

    def on(self, device: torch.device) -> "_Cover":
        """Return the same on a device: when training ends, Lightning moves the module to the CPU."""
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
        """Fill in zeros, also into a sparse tensor, such as the gradient of an ``nn.Embedding(sparse=True)``."""
        tensor = shards.local(tensor)
        if self._bits is not None and not keep_overflow and is_like(tensor, self._bits):
            tensor.view(self._bits.dtype).bitwise_and_(self._bits)
            return
        pruned = self.pruned
        if tensor.is_sparse:
            tensor, pruned = tensor._values(), pruned[tuple(tensor._indices())]
        tensor.masked_fill_(pruned & tensor.isfinite() if keep_overflow else pruned, 0)


class _GradientHook:
    """Masks the gradient of a parameter after it was accumulated."""

    def __init__(self, cover: _Cover, keep_overflow: bool) -> None:
        self._cover, self._keep_overflow = cover, keep_overflow

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._cover.zero_(parameter.grad, keep_overflow=self._keep_overflow)
