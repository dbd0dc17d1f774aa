"""Gradients of a loss over batches, taken so that the module never notices."""

import math
import random
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lightning_drive import shards
from lightning_drive.messages import listed

Mode: TypeAlias = Literal["train", "eval"]
LossFunction: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss_fn(module, batch)`` returns a scalar tensor."""

_DROPOUTS = {
    *("dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_dropout_"),
    *("feature_alpha_dropout", "feature_alpha_dropout_", "dropout1d", "dropout2d", "dropout3d"),
}

_DROPOUT_ARGUMENTS = {
    "multi_head_attention_forward": (13, "training", False),
    "scaled_dot_product_attention": (4, "dropout_p", 0.0),
}
"""Function to the position, name and off value of the argument that controls its dropout."""


def loss_gradients(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss_fn: LossFunction,
    batches: Iterable[Any],
    *,
    hookless: bool = False,
) -> dict[str, Tensor]:
    """Sum the loss gradients over batches, with the weights as they are now.

    Gradients, not scores, are summed: several small batches then give what one large batch gives, up to the mean
    inside the loss. Call it within :func:`undisturbed`, which puts back what a forward and backward pass leaves.

    Args:
        module: Passed to ``loss_fn``. Its ``.grad`` fields must be ``None``.
        parameters: Parameter name to the live parameters to differentiate by.
        loss_fn: ``loss_fn(module, batch)`` returns a scalar tensor.
        batches: The batches to sum over, at least one.
        hookless: Whether to leave hooks that wait for gradients alone. DDP has some, which take a backward pass for one
            of training's. Activation checkpointing then has to be of the kind ``use_reentrant=False``.

    Returns:
        Parameter name to its gradient, dense, in the parameter's precision and on its device; zeros where the loss
        does not depend on it; of a parameter that is split over ranks, this rank's part. The caller owns these tensors.

    Raises:
        ValueError: If there is no batch, or the loss is not a scalar tensor, not finite or without a gradient.

    """
    losses = []
    for batch in batches:
        loss = loss_fn(module, _batch_in_float32(batch))
        _check_loss(loss)
        losses.append(loss.detach().reshape(()))
        if hookless:
            _accumulate(loss, parameters)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
    if not losses:
        raise ValueError("There is nothing to score on: `batches` is empty.")
    _check_finite(torch.stack(losses).tolist())  # at the end, where there is something to wait for anyway
    if all(parameter.grad is None for parameter in parameters.values()):
        raise ValueError(
            f"The loss does not depend on any prunable parameter ({listed(parameters)}): all gradients are None."
        )
    gradients = {
        name: torch.zeros_like(shards.local(parameter)) if parameter.grad is None else shards.local(parameter.grad)
        for name, parameter in parameters.items()
    }
    for parameter in module.parameters():
        parameter.grad = None
    return {name: gradient.to_dense() if gradient.is_sparse else gradient for name, gradient in gradients.items()}


def _accumulate(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
    """Add to ``.grad`` what a backward pass would, without a backward pass."""
    gradients = list(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
    for parameter in reversed(list(parameters.values())):
        gradient = gradients.pop()
        if gradient is not None:  # which may be another parameter's, too, or an expanded one
            parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient


@contextmanager
def undisturbed(module: nn.Module, mode: Mode = "train") -> Generator[None]:
    """Score inside this context, and the module is afterwards bit for bit what it was.

    Inside: ``.grad`` fields are ``None``, gradients are enabled, autocast and Dropout are off, parameters and buffers
    below float32 are held in float32 (unless they are split over ranks), what ``torch.compile`` compiled runs as plain
    Python (or it would be compiled again for scoring), and the module is in ``mode``. Put back afterwards: parameters,
    gradients and their hooks, buffers, the ``training`` flag of every submodule, and the random state of torch (CPU
    and CUDA), numpy and Python. The copy of frozen parameters, which only few modules write to, is kept on the CPU.

    Args:
        module: The module to score.
        mode: ``"train"``: batch statistics in BatchNorm. A module that is already training keeps the flags of its
            submodules, so what was frozen with ``.eval()`` stays frozen. ``"eval"``: running statistics.

    """
    with ExitStack() as stack:
        stack.enter_context(_uncompiled(module))
        stack.enter_context(preserved_rng())
        stack.enter_context(_preserved_gradients(module))
        stack.enter_context(_preserved_parameters(module))
        stack.enter_context(_preserved_buffers(module))
        stack.enter_context(_at_least_float32(module))
        stack.enter_context(_switched_to(module, mode))
        for device_type in {parameter.device.type for parameter in module.parameters()} | {"cpu"}:
            if torch.amp.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_NoDropout())
        yield


@contextmanager
def preserved_rng() -> Generator[None]:
    """Put the random state of torch (CPU and CUDA), numpy and Python back on exit."""
    numpy = sys.modules.get("numpy")  # never imported for this alone
    states = random.getstate(), numpy and numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


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
    kept: list[Any] | None = [] if isinstance(batches, Iterator) else None
    empty = True
    while True:
        for batch in batches:
            empty = False
            if kept is not None:
                kept.append(batch)
            yield batch
        if empty:
            raise ValueError("There is nothing to score on: `batches` is empty.")
        if kept is not None:
            batches, kept = kept, None


def batch_norm_statistics(
    module: nn.Module, loss_fn: LossFunction, batches: Iterable[Any]
) -> dict[nn.Module, dict[str, Tensor]]:
    """Estimate BatchNorm's running statistics afresh, as cumulative averages over the batches.

    Pruning shifts what flows through a trained network, and its running statistics no longer fit (10 % instead of
    43 % accuracy in one of our measurements). As in ``torch.optim.swa_utils.update_bn``, averages start at zero and
    every batch weighs the same. Call it within :func:`undisturbed`, which puts the layers' own statistics back, and
    hand the result to :func:`load_batch_norm_statistics` afterwards.

    Only layers whose statistics are being tracked take part: in training mode (not frozen) and not untrained.

    Args:
        module: The pruned module.
        loss_fn: Runs a batch through the module; its loss is not used.
        batches: The batches to average over.

    Returns:
        BatchNorm layer to the names and new values of its buffers; empty if no layer takes part or there is no batch.

    """
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats and layer.num_batches_tracked
    ]
    if not layers:
        return {}
    momenta = {layer: layer.momentum for layer in layers}
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch then averages cumulatively
        count = 0
        for count, batch in enumerate(batches, 1):  # noqa: B007
            loss_fn(module, _batch_in_float32(batch))
        return {layer: {name: value.clone() for name, value in layer.named_buffers()} for layer in layers if count}
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum


def load_batch_norm_statistics(statistics: Mapping[nn.Module, Mapping[str, Tensor]]) -> None:
    """Write what :func:`batch_norm_statistics` measured into the layers.

    Args:
        statistics: BatchNorm layer to the names and values of its buffers.

    """
    for layer, values in statistics.items():
        for name, buffer in layer.named_buffers():
            buffer.copy_(values[name])


class _NoDropout(TorchFunctionMode):
    """Turns off dropout that is called as a function, where no ``training`` flag of a Dropout layer reaches."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name in _DROPOUT_ARGUMENTS:
            position, argument, off = _DROPOUT_ARGUMENTS[name]
            if len(args) > position:
                args = (*args[:position], off, *args[position + 1 :])
            else:
                kwargs = {**kwargs, argument: off}
        return func(*args, **kwargs)


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"The loss must be a scalar tensor, got {shape}.")
    if not loss.requires_grad:
        raise ValueError("The loss has no gradient (`requires_grad` is False): it must depend on trainable parameters.")


def _check_finite(losses: list[float]) -> None:
    for loss in losses:
        if not math.isfinite(loss):
            raise ValueError(f"The loss must be finite, got {loss}: check the batch and the weights.")


@contextmanager
def _uncompiled(module: nn.Module) -> Generator[None]:
    """Run the originals of compiled modules, methods and functions; what is compiled already stays for later."""
    if "torch._dynamo" not in sys.modules:  # whose import takes a second; nothing was compiled without it
        yield
        return
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    # torch 2.5: `torch.compile` and `module.compile()` both leave a wrapper in the attributes of a module
    wrappers = [
        (vars(submodule), name, value)
        for submodule in module.modules()
        for name, value in vars(submodule).items()
        if "_torchdynamo_orig_callable" in getattr(value, "__dict__", ())
    ]
    try:
        for attributes, name, wrapper in wrappers:
            attributes[name] = wrapper._torchdynamo_orig_callable
        yield
    finally:
        for attributes, name, wrapper in wrappers:
            attributes[name] = wrapper


@contextmanager
def _switched_to(module: nn.Module, mode: Mode) -> Generator[None]:
    """Set train or eval mode, without Dropout, and put every flag back."""
    training = {submodule: submodule.training for submodule in module.modules()}
    dropout = {submodule: submodule.dropout for submodule in module.modules() if isinstance(submodule, nn.RNNBase)}
    try:
        if mode == "eval" or not module.training:
            module.train(mode == "train")
        for submodule in module.modules():
            if isinstance(submodule, _DropoutNd):
                submodule.training = False
        for recurrent in dropout:
            recurrent.dropout = 0.0
        yield
    finally:
        for submodule, flag in training.items():
            submodule.training = flag
        for recurrent, probability in dropout.items():
            recurrent.dropout = probability


@contextmanager
def _preserved_gradients(module: nn.Module) -> Generator[None]:
    """Park every ``.grad``, and the hooks that act on one as soon as it is there, such as an optimizer's."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    hooks = [parameter._post_accumulate_grad_hooks for parameter in module.parameters()]
    parked = [(hook, dict(hook)) for hook in hooks if hook]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        for hook, _ in parked:
            hook.clear()
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for hook, registered in parked:
            hook.update(registered)


@contextmanager
def _preserved_parameters(module: nn.Module) -> Generator[None]:
    """Put back the values of all parameters, also of those that a forward pass itself moves (momentum encoders)."""
    saved = [
        (parameter, parameter.data, _copied(shards.local(parameter.data), parameter.requires_grad))
        for parameter in module.parameters()
    ]
    try:
        yield
    finally:
        for parameter, storage, value in saved:
            parameter.data = storage
            shards.local(parameter.data).copy_(value)


def _copied(value: Tensor, is_trained: bool) -> Tensor:
    return value.to(value.device if is_trained else "cpu", copy=True)


@contextmanager
def _preserved_buffers(module: nn.Module) -> Generator[None]:
    """Put back which buffers there are, the same tensors with the same values."""
    buffers = [(submodule._buffers, dict(submodule._buffers)) for submodule in module.modules()]
    saved = [
        (buffer, buffer.detach().clone())
        for _, before in buffers
        for buffer in before.values()
        if buffer is not None and not _is_expanded(buffer)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)
        for now, before in buffers:
            now.clear()
            now.update(before)


def _is_expanded(tensor: Tensor) -> bool:
    """Whether entries share memory (``expand``), so that the tensor cannot be written to."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


@contextmanager
def _at_least_float32(module: nn.Module) -> Generator[None]:
    """Hold parameters and buffers of lower precision in float32; the originals are not touched."""
    originals = [
        (tensor, tensor.data)
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.is_floating_point()
        and tensor.dtype != torch.promote_types(tensor.dtype, torch.float32)
        and not shards.is_sharded(tensor)  # FSDP2 has the precision in its own hands
    ]
    try:
        for tensor, original in originals:
            tensor.data = original.float()
        yield
    finally:
        for tensor, original in originals:
            tensor.data = original


def _batch_in_float32(batch: Any) -> Any:
    """Bring the tensors of a batch to the precision that parameters have while scoring."""
    return tree_map(
        lambda leaf: (
            leaf.to(torch.promote_types(leaf.dtype, torch.float32))
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
        ),
        batch,
    )
