"""Gradients of a loss over batches, and what a pass over batches says of BatchNorm."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_drive.core import containers, function_modes, shards
from lightning_drive.core.messages import listed

LossFunction: TypeAlias = Callable[[Any, Any], Tensor | None]
"""``loss_fn(module, batch)`` returns a scalar tensor, or ``None`` for a batch to skip."""


def refuse(reason: str) -> None:
    """Raise for a batch that gives nothing to score by.

    Args:
        reason: Why it gives nothing.

    Raises:
        ValueError: Always.

    """
    raise ValueError(reason)


def loss_gradients(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss_fn: LossFunction,
    batches: Iterable[Any],
    skip: Callable[[str], None] = refuse,
) -> dict[str, Tensor]:
    """Sum the loss gradients over batches, with the weights as they are now.

    Gradients, not scores, are summed: several small batches then give what one large batch gives, up to the mean
    inside the loss. A forward and a backward pass leave traces: give it a replica
    (:func:`lightning_drive.network.undisturbed.undisturbed`).

    Args:
        module: Passed to ``loss_fn``. Its ``.grad`` fields must be ``None``.
        parameters: Parameter name to the live parameters to differentiate by.
        loss_fn: ``loss_fn(module, batch)`` returns a scalar tensor, or ``None`` for a batch to skip.
        batches: The batches to sum over, at least one.
        skip: Called with the reason for every batch that gives nothing to score by: no loss, or one that no prunable
            parameter has a gradient of.

    Returns:
        Parameter name to its gradient, dense, in the parameter's precision and on its device; without those that the
        loss does not depend on; of a parameter that is split over ranks, this rank's part. The caller owns these
        tensors.

    Raises:
        ValueError: If there is no batch, or the loss is not a scalar tensor or not finite.

    """
    losses = []
    for batch in batches:
        loss = loss_fn(module, batch_in_float32(batch))
        reason = _no_loss(loss)
        if not reason:
            assert loss is not None
            before = _state(parameters)
            losses.append(loss.detach().reshape(()))
            function_modes.backward(loss)
            if _state(parameters) == before:
                names = listed(parameters)
                reason = f"The loss does not depend on any prunable parameter ({names}): all gradients are None."
        if reason:
            _check_finite([] if loss is None else [loss.item()])
            skip(reason)
    if not losses:
        raise ValueError("There is nothing to score on: `batches` is empty.")
    _check_finite(torch.stack(losses).tolist())  # at the end, where there is something to wait for anyway
    with function_modes.set_aside():
        return _taken(module, parameters)


def _taken(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Take the gradients out of the parameters."""
    gradients = {
        name: shards.local(parameter.grad) for name, parameter in parameters.items() if parameter.grad is not None
    }
    for parameter in module.parameters():
        parameter.grad = None
    return {name: gradient.to_dense() if gradient.is_sparse else gradient for name, gradient in gradients.items()}


def _state(parameters: Mapping[str, nn.Parameter]) -> list[tuple[int, int] | None]:
    """Return what tells whether a backward pass added to a gradient."""
    with function_modes.set_aside():
        gradients = [parameter.grad for parameter in parameters.values()]
    return [None if gradient is None else (id(gradient), gradient._version) for gradient in gradients]


class Passes:
    """Batches that can be gone through again. What an iterator gave is kept and repeated.

    Args:
        batches: A finite or endless iterable.

    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._kept: list[Any] | None = [] if isinstance(batches, Iterator) else None
        self._ended = False
        self.length: int | None = None
        """How many batches the last whole pass had; ``None`` before its end."""

    def __iter__(self) -> Iterator[Any]:
        length = 0
        for length, batch in enumerate(self._batches if self._kept is None else self._repeated(self._kept), 1):  # noqa: B007
            yield batch
        self.length = length

    def _repeated(self, kept: list[Any]) -> Iterator[Any]:
        yield from kept
        if not self._ended:
            for batch in self._batches:
                kept.append(batch)
                yield batch
        self._ended = True


def endless(batches: Iterable[Any]) -> Iterator[Any]:
    """Go through the batches in order, again and again.

    A loader or a list is read anew each time. An iterator cannot be, so what it gave is kept and repeated.

    Args:
        batches: A finite or endless iterable.

    Raises:
        ValueError: If it is empty.

    Example:
        >>> from itertools import islice
        >>> list(islice(endless([1, 2, 3]), 5)), list(islice(endless(iter([1, 2, 3])), 5))
        ([1, 2, 3, 1, 2], [1, 2, 3, 1, 2])

    """
    passes = batches if isinstance(batches, Passes) else Passes(batches)
    while True:
        yield from passes
        if not passes.length:
            raise ValueError("There is nothing to score on: `batches` is empty.")


def on_replica_only(loss_fn: LossFunction, original: nn.Module) -> LossFunction:
    """Refuse a loss that is computed with the original of the replica that is scored, instead of with the replica.

    Args:
        loss_fn: ``loss_fn(module, batch)`` returns a scalar tensor.
        original: The module that must take no part.

    Returns:
        The same function, which looks at its first loss.

    """
    names = {id(parameter): name for name, parameter in original.named_parameters()}

    def checked(module: Any, batch: Any) -> Tensor | None:
        loss = loss_fn(module, batch)
        if names and isinstance(loss, Tensor):
            found = [names[id(leaf)] for leaf in leaves_of(loss) if id(leaf) in names]
            if found and module is not original:
                raise ValueError(
                    "The loss must be computed with the module that `loss_fn(module, batch)` is given, which is a copy"
                    f" to score on, but {listed(map(repr, found))} of the network itself took part. Use `module` in"
                    " place of a variable that holds the network."
                )
            names.clear()
        return loss

    return checked


def leaves_of(loss: Tensor) -> Iterator[Tensor]:
    """Return the tensors that a tensor depends on and that have no history of their own.

    Args:
        loss: The tensor.

    """
    return (node.variable for node in add_history(loss, set()) if hasattr(node, "variable"))


def add_history(tensor: Tensor, known: set[Any]) -> set[Any]:
    """Add all operations that a tensor comes from to a set, and return it.

    Args:
        tensor: The tensor.
        known: Operations, whose own history is known, too.

    """
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in known:
            known.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return known


def _no_loss(loss: object) -> str:
    """Say why a loss gives nothing to score by, or raise if it is none at all."""
    if loss is None:
        return "The loss must be a scalar tensor, got None, which skips a batch."
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"The loss must be a scalar tensor, got {shape}.")
    if not loss.requires_grad:
        return "The loss has no gradient (`requires_grad` is False): it must depend on trainable parameters."
    return ""


def _check_finite(losses: list[float]) -> None:
    for loss in losses:
        if not math.isfinite(loss):
            raise ValueError(f"The loss must be finite, got {loss}: check the batch and the weights.")


def batch_in_float32(batch: Any) -> Any:
    """Bring the tensors of a batch to the precision that parameters have while scoring.

    Args:
        batch: The batch; it is not changed.

    """
    return containers.mapped(
        lambda leaf: leaf.to(torch.promote_types(leaf.dtype, torch.float32)) if leaf.is_floating_point() else leaf,
        batch,
    )
