"""Gradients of a loss over batches, and the operations that a loss comes from."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from lightning_drive.core import containers, function_modes, shards
from lightning_drive.core.messages import listed

LossFunction: TypeAlias = Callable[[Any, Any], Tensor | None]
"""``loss_fn(module, batch)`` returns a scalar tensor, or ``None`` for a batch to skip."""


def refuse(reason: str) -> None:
    """Raise a ``ValueError`` for a batch that cannot be scored by, with the reason."""
    raise ValueError(reason)


def loss_gradients(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss_fn: LossFunction,
    batches: Iterable[Any],
    skip: Callable[[str], None] = refuse,
) -> dict[str, Tensor]:
    """Sum the loss gradients over batches, with the weights as they are now.

    Gradients, not scores, are summed: several small batches then have the gradient of one large batch, up to the mean
    inside the loss. A forward and a backward pass leave traces, so the module should be a replica
    (:func:`lightning_drive.network.undisturbed.undisturbed`); its ``.grad`` fields must be ``None``. ``skip`` is called
    with the reason for every batch that cannot be scored by: without a loss, or with one that no prunable parameter has
    a gradient of.

    Gradients are dense, in the parameter's precision and on its device, and belong to the caller; parameters that the
    loss does not depend on have none, and of a parameter that is split over ranks it is this rank's part. Raise a
    ``ValueError`` if there is no batch, or the loss is not a scalar tensor or not finite.
    """
    losses = []
    for batch in batches:
        loss = loss_fn(module, batch_in_float32(batch))
        reason = no_loss(loss)
        if not reason:
            assert loss is not None
            before = _state(parameters)
            losses.append(loss.detach().reshape(()))
            function_modes.backward(loss)
            if _state(parameters) == before:
                names = listed(parameters)
                reason = f"The loss does not depend on any prunable parameter ({names}): all gradients are None."
        if reason:
            check_finite([] if loss is None else [loss.item()])
            skip(reason)
    if not losses:
        raise ValueError("There is nothing to score on: `batches` is empty.")
    check_finite(torch.stack(losses).tolist())  # at the end, where there is something to wait for anyway
    with function_modes.set_aside():
        return _taken(module, parameters)


def _taken(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the gradients, which the parameters then have no more."""
    gradients = {
        name: shards.local(parameter.grad) for name, parameter in parameters.items() if parameter.grad is not None
    }
    for parameter in module.parameters():
        parameter.grad = None
    return {name: gradient.to_dense() if gradient.is_sparse else gradient for name, gradient in gradients.items()}


def _state(parameters: Mapping[str, nn.Parameter]) -> list[tuple[int, int] | None]:
    """Return the identity and version of every gradient, one of which changes where a backward pass adds to it."""
    with function_modes.set_aside():
        gradients = [parameter.grad for parameter in parameters.values()]
        return [None if gradient is None else (id(gradient), shards.version(gradient)) for gradient in gradients]


def on_replica_only(loss_fn: LossFunction, original: nn.Module) -> LossFunction:
    """Return a loss function that raises if its first loss was computed with the original instead of its replica."""
    names = {id(parameter): name for name, parameter in original.named_parameters()}

    def checked(module: Any, batch: Any) -> Tensor | None:
        loss = loss_fn(module, batch)
        if names and isinstance(loss, Tensor):
            used = [names[id(leaf)] for leaf in leaves_of(loss) if id(leaf) in names]
            if used and module is not original:
                raise ValueError(
                    "The loss must be computed with the module that `loss_fn(module, batch)` is given, which is a copy"
                    f" to score on, but {listed(map(repr, used))} of the network itself took part. Use `module` in"
                    " place of a variable that holds the network."
                )
            names.clear()
        return loss

    return checked


def leaves_of(loss: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a loss depends on and that have no history of their own, such as parameters."""
    return (node.variable for node in add_history(loss, set()) if hasattr(node, "variable"))


def reached_by(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> tuple[list[str], bool]:
    """Return the names of the parameters in the history of a loss, and whether these are surely all it depends on.

    A function that is written in Python, such as a reentrant checkpoint, may depend on more.
    """
    history = add_history(loss, set())
    leaves = {id(node.variable) for node in history if hasattr(node, "variable")}
    names = [name for name, parameter in parameters.items() if id(parameter) in leaves]
    return names, not any(isinstance(node, BackwardCFunction) for node in history)


def add_history(tensor: Tensor, known: set[Any]) -> set[Any]:
    """Add all operations that a tensor comes from to those that are known with their history, and return the set."""
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in known:
            known.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return known


def no_loss(loss: object) -> str:
    """Return why a loss cannot be scored by, empty if it can; raise if it is no loss at all."""
    if loss is None:
        return "The loss must be a scalar tensor, got None, which skips a batch."
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"The loss must be a scalar tensor, got {shape}.")
    if not loss.requires_grad:
        return "The loss has no gradient (`requires_grad` is False): it must depend on trainable parameters."
    return ""


def check_finite(losses: list[float]) -> None:
    """Raise a ``ValueError`` if a loss is not finite."""
    for loss in losses:
        if not math.isfinite(loss):
            raise ValueError(f"The loss must be finite, got {loss}: check the batch and the weights.")


def batch_in_float32(batch: Any) -> Any:
    """Return a batch with its tensors in the precision that parameters have while scoring: float32 or more."""
    return containers.mapped(
        lambda leaf: leaf.to(torch.promote_types(leaf.dtype, torch.float32)) if leaf.is_floating_point() else leaf,
        batch,
    )
