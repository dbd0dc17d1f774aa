"""One forward pass of a network, as training makes it, which can be repeated with other numbers for its inputs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.core import containers
from lightning_drive.core.function_modes import FunctionMode
from lightning_drive.core.messages import listed
from lightning_drive.network import gradients
from lightning_drive.network.batch_samples import batch_size, first_sample, parts_of
from lightning_drive.network.gradients import LossFunction
from lightning_drive.network.outermost_calls import Arguments, hooked


class ForwardPass:
    """A forward pass of a network that can be repeated, with other numbers in place of its inputs.

    What counts are the *outermost calls* of submodules that have parameters: those that no other one makes, and that
    are not made under ``no_grad``, as those of a teacher are. Their floating-point arguments are the inputs of the
    network, unless they come out of such a call. What they return and no later call uses is its outputs.

    Args:
        step: Takes the network and makes the calls.
        counts: Which of the calls that no other one makes count; after the last of these no loss is computed.
        num_samples: How many samples are sent together; ``None`` if they cannot be told apart.
        source: What is sent, for messages.

    Attributes:
        is_guess: Whether nobody has said that the network takes this.

    """

    def __init__(
        self, step: Callable[[nn.Module], object], counts: Sequence[bool], num_samples: int | None, source: str
    ) -> None:
        self._step = step
        self._counts = counts
        self.num_samples = num_samples
        self.source = source
        self.is_guess = False

    @classmethod
    def of(cls, given: Any, source: str = "the example input", *, whole: bool = False) -> "ForwardPass":
        """Return a forward pass that calls the network with given arguments.

        Args:
            given: A forward pass, which is returned; or the argument, a tuple of arguments or a mapping of keyword
                arguments, batch dimension first.
            source: What they are, for messages.
            whole: Whether to send the whole batch, and not only its first sample.

        """
        return given if isinstance(given, ForwardPass) else cls._calling("", containers.arguments(given), source, whole)

    @classmethod
    def _calling(cls, name: str, arguments: Arguments, source: str, whole: bool) -> "ForwardPass":
        args, kwargs = arguments
        size = batch_size([*args, *kwargs.values()])
        if size is not None and not whole:
            args = tuple(map(first_sample, args))
            kwargs, size = {key: first_sample(value) for key, value in kwargs.items()}, 1
        return cls(lambda module: module.get_submodule(name)(*args, **kwargs), [True], size, source)

    @classmethod
    def recorded(
        cls, calls: Sequence[tuple[str, Arguments | None]], loss_fn: LossFunction, batch: Any
    ) -> list["ForwardPass"]:
        """Return forward passes that call the network as a loss does, cheapest first; none if it calls no submodule.

        ``calls`` are what :func:`lightning_drive.network.outermost_calls.recording` saw of ``loss_fn(module, batch)``.
        """
        source = "what training calls the network with"
        counting = [(name, arguments) for name, arguments in calls if arguments is not None]
        if len({name for name, _ in counting}) == 1:  # the same network on several inputs counts as one
            return [cls._calling(*counting[0], source, whole) for whole in (False, True)]
        counts, size = [arguments is not None for _, arguments in calls], batch_size(parts_of(batch))
        return [cls(lambda module: loss_fn(module, batch), counts, size, source)] if counting else []

    @classmethod
    def guessed(cls, module: nn.Module, batch: Any) -> list["ForwardPass"]:
        """Return forward passes that call the network with a batch or a part of it, the likeliest first.

        Entries of a mapping go by name where ``forward`` has arguments of these names; else the first tensor of the
        batch is the input, by the field's convention; else all of it.
        """
        guesses = []
        if isinstance(batch, Mapping) and (named := _by_name(module, batch)):
            guesses = [cls.of(named, "the entries of a batch", whole=whole) for whole in (False, True)]
        tensors = containers.leaves(batch)
        if tensors:
            guesses += [cls.of(tensors[0], "the first tensor of a batch"), cls.of((batch,), "a batch", whole=True)]
        for guess in guesses:
            guess.is_guess = True
        return guesses

    def run(self, module: nn.Module, stand_in: Callable[[Tensor], Tensor], *, first_only: bool = False) -> list[Tensor]:
        """Send data through a network.

        Args:
            module: The network, or a copy of it.
            stand_in: Returns what stands for a floating-point input.
            first_only: Whether only the first argument of a call is an input, by the field's convention, and others,
                such as targets, stay as they are.

        Returns:
            The floating-point outputs. Those without a dimension, such as a loss that ``forward`` computes itself,
            come only where there is no other.

        Raises:
            ValueError: If there is none.

        """
        returned: list[Any] = []

        def started(tensor: Tensor) -> Tensor:
            if tensor.layout != torch.strided:  # such as which nodes of a graph are neighbours
                return tensor.to(stand_in(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype)
            return stand_in(tensor.detach()) if tensor.is_floating_point() and not tensor.requires_grad else tensor

        def start(_: str, arguments: Arguments) -> Arguments:
            args, kwargs = arguments
            if not first_only:
                return containers.mapped(started, arguments)  # type: ignore[no-any-return]
            if args:
                return (containers.mapped(started, args[0]), *args[1:]), kwargs
            first = next(iter(kwargs))
            return (), {**kwargs, first: containers.mapped(started, kwargs[first])}

        def note(output: Any) -> None:
            returned.append(output)
            if len(returned) == sum(self._counts):
                raise _Enough

        with suppress(_Enough), hooked(module, start, note, iter(self._counts)), _KeepsAll():
            self._step(module)
        return _outputs(returned)


def first_that_runs(module: nn.Module, passes: Sequence[ForwardPass]) -> ForwardPass | None:
    """Return the first forward pass that a network can run, or the very first if it can run none."""
    for forward_pass in passes:
        with suppress(Exception):  # the module's own `forward`, called in a way it may not be made for
            forward_pass.run(module, as_input_of(module))
            return forward_pass
    return next(iter(passes), None)


def parameters_used(module: nn.Module, forward_pass: ForwardPass) -> set[nn.Parameter]:
    """Return the parameters that the outputs depend on; none if the network cannot run the forward pass."""
    with suppress(Exception):  # as above
        outputs = forward_pass.run(module, as_input_of(module))
        return {leaf for output in outputs for leaf in gradients.leaves_of(output) if isinstance(leaf, nn.Parameter)}
    return set()


def as_input_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that brings inputs to the device of a network, and to its precision if theirs is lower."""
    device, precision = next(module.parameters()).device, precision_of(module)
    return lambda tensor: tensor.to(device, torch.promote_types(tensor.dtype, precision))


def precision_of(module: nn.Module) -> torch.dtype:
    """Return the type of the numbers that a network computes with: of its first parameter of real numbers."""
    kinds = (
        parameter.dtype
        for parameter in module.parameters()
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1
    )
    return next(kinds, torch.float32)


def summed(outputs: Sequence[Tensor]) -> Tensor:
    """Return the sum of outputs, to differentiate by; raise if parts of the network ran without gradients."""
    total = torch.stack([output.sum() for output in outputs]).sum()
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in gradients.add_history(total, set())):
        raise ValueError(
            "`torch.utils.checkpoint` with `use_reentrant=True` runs parts of the network without gradients, so nothing"
            " can be followed through them. Set `use_reentrant=False`."
        )
    return total


class _KeepsAll(FunctionMode):
    """Keeps what operations save for the backward pass, so that checkpointed parts need not run again in it.

    They would do so without the other inputs, and without what stands for functions of torch.
    """

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            return func(*args, **kwargs)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Enough(BaseException):
    """Ends a step after its last call."""


def _outputs(returned: Sequence[Any]) -> list[Tensor]:
    """Return the floating-point outputs among what calls returned."""
    numbers = [[leaf for leaf in containers.leaves(value) if leaf.is_floating_point()] for value in returned]
    outputs = _not_used_again(numbers)
    if not outputs:
        kinds = listed(type(value).__name__ for value in returned)
        raise ValueError(f"`forward` must return at least one floating-point tensor, got {kinds or 'none'}.")
    return [output for output in outputs if output.ndim] or outputs


def _not_used_again(calls: list[list[Tensor]]) -> list[Tensor]:
    """Return what calls returned without what later ones were given."""
    outputs: list[Tensor] = []
    used: set[Any] = set()
    for index, tensors in enumerate(reversed(calls)):
        outputs = [tensor for tensor in tensors if tensor.grad_fn is None or tensor.grad_fn not in used] + outputs
        if index < len(calls) - 1:
            for tensor in tensors:
                gradients.add_history(tensor, used)
    return outputs


def _by_name(module: nn.Module, batch: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Return the entries of a batch that are arguments of ``forward``, if all that it must have are among them."""
    arguments = inspect.signature(module.forward).parameters.values()
    named = {
        argument.name: argument
        for argument in arguments
        if argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
    }
    if any(argument.default is argument.empty and name not in batch for name, argument in named.items()):
        return None
    takes_all = any(argument.kind is argument.VAR_KEYWORD for argument in arguments)
    return {name: value for name, value in batch.items() if name in named or takes_all} or None
