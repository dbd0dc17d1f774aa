"""How data pass through a network, from its inputs to its outputs, as training sends them."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_drive.core import containers
from lightning_drive.core.function_modes import FunctionMode
from lightning_drive.core.messages import listed
from lightning_drive.network import gradients
from lightning_drive.network.gradients import LossFunction

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


class Passage:
    """A way to send data through a network once more, with other numbers in place of its inputs.

    What counts are the *outermost calls* of submodules that have parameters: those that no other one makes, and that
    are not made under ``no_grad``, as those of a teacher are. Their floating-point arguments are the inputs of the
    network, unless they come out of such a call. What they return and no later call uses is its outputs.

    Args:
        step: Takes the network and makes the calls.
        counts: Which of the calls that no other one makes count; after the last of these no loss is computed.
        batch_size: How many samples are sent together; ``None`` if they cannot be told apart.
        source: What is sent, for messages.

    Attributes:
        is_guess: Whether nobody has said that the network takes this.

    """

    def __init__(
        self, step: Callable[[nn.Module], object], counts: Sequence[bool], batch_size: int | None, source: str
    ) -> None:
        self._step = step
        self._counts = counts
        self.batch_size = batch_size
        self.source = source
        self.is_guess = False

    @classmethod
    def of(cls, given: Any, source: str = "the example input", *, whole: bool = False) -> "Passage":
        """Make one that calls the network with given arguments.

        Args:
            given: A passage, which is returned; or the argument, a tuple of arguments or a mapping of keyword
                arguments, batch dimension first.
            source: What they are, for messages.
            whole: Whether to send the whole batch, and not only its first sample.

        """
        return given if isinstance(given, Passage) else cls._calling("", containers.arguments(given), source, whole)

    @classmethod
    def _calling(cls, name: str, arguments: Arguments, source: str, whole: bool) -> "Passage":
        args, kwargs = arguments
        size = _batch_size([*args, *kwargs.values()])
        if size is not None and not whole:
            args = tuple(map(_first_sample, args))
            kwargs, size = {key: _first_sample(value) for key, value in kwargs.items()}, 1
        return cls(lambda module: module.get_submodule(name)(*args, **kwargs), [True], size, source)

    @classmethod
    def recorded(
        cls, calls: Sequence[tuple[str, Arguments | None]], loss_fn: LossFunction, batch: Any
    ) -> list["Passage"]:
        """Make some that call the network as a loss does, the cheapest first; none if it called no submodule.

        Args:
            calls: What :func:`recording` saw of it.
            loss_fn: ``loss_fn(module, batch)``; what it returns does not matter.
            batch: The batch that it was called with.

        """
        source = "what training calls the network with"
        counting = [(name, arguments) for name, arguments in calls if arguments is not None]
        if len({name for name, _ in counting}) == 1:  # the same network on several inputs counts as one
            return [cls._calling(*counting[0], source, whole) for whole in (False, True)]
        counts, size = [arguments is not None for _, arguments in calls], _batch_size(_parts(batch))
        return [cls(lambda module: loss_fn(module, batch), counts, size, source)] if counting else []

    @classmethod
    def guessed(cls, module: nn.Module, batch: Any) -> list["Passage"]:
        """Make some that call the network with a batch, or with a part of it, the likeliest first.

        Args:
            module: The network.
            batch: A batch: its entries go by name where ``forward`` has arguments of these names; or else its first
                tensor is the input, by the field's convention; or else all of it.

        """
        found = []
        if isinstance(batch, Mapping) and (named := _by_name(module, batch)):
            found = [cls.of(named, "the entries of a batch", whole=whole) for whole in (False, True)]
        tensors = containers.leaves(batch)
        if tensors:
            found += [cls.of(tensors[0], "the first tensor of a batch"), cls.of((batch,), "a batch", whole=True)]
        for passage in found:
            passage.is_guess = True
        return found

    def run(self, module: nn.Module, begin: Callable[[Tensor], Tensor], *, first_only: bool = False) -> list[Tensor]:
        """Send data through a network.

        Args:
            module: The network, or a copy of it.
            begin: Returns what stands for a floating-point input.
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
                return tensor.to(begin(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype)
            return begin(tensor.detach()) if tensor.is_floating_point() and not tensor.requires_grad else tensor

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

        with suppress(_Enough), _outermost_calls(module, start, note, iter(self._counts)), _KeepsAll():
            self._step(module)
        numbers = [[each for each in containers.leaves(output) if each.is_floating_point()] for output in returned]
        outputs = _not_used_again(numbers)
        if not outputs:
            kinds = listed(type(output).__name__ for output in returned)
            raise ValueError(f"`forward` must return at least one floating-point tensor, got {kinds or 'none'}.")
        return [output for output in outputs if output.ndim] or outputs


@contextmanager
def recording(module: nn.Module) -> Iterator[list[tuple[str, Arguments | None]]]:
    """Note the calls that are made inside: names of submodules, and what they are given (``None`` under ``no_grad``).

    Args:
        module: The network.

    """
    calls: list[tuple[str, Arguments | None]] = []

    def note(name: str, arguments: Arguments) -> Arguments:
        counts = torch.is_grad_enabled()
        calls.append((name, containers.mapped(Tensor.detach, arguments) if counts else None))
        return arguments

    with _outermost_calls(module, note, lambda _: None):
        yield calls


def chosen(module: nn.Module, passages: Sequence[Passage]) -> Passage | None:
    """Choose the first passage that a network can run, or the very first if it can run none.

    Args:
        module: The network, which is run.
        passages: Some passages, the likeliest first.

    """
    for passage in passages:
        with suppress(Exception):  # the module's own `forward`, called in a way it may not be made for
            passage.run(module, as_input_of(module))
            return passage
    return next(iter(passages), None)


def uses(module: nn.Module, passage: Passage) -> set[nn.Parameter]:
    """Return the parameters that the outputs depend on; none if the network cannot be run so.

    Args:
        module: The network, which is run.
        passage: How.

    """
    with suppress(Exception):  # as above
        outputs = passage.run(module, as_input_of(module))
        return {leaf for output in outputs for leaf in gradients.leaves_of(output) if isinstance(leaf, nn.Parameter)}
    return set()


def as_input_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that brings inputs to the device of a network, and to its precision if theirs is lower.

    Args:
        module: The network.

    """
    device, precision = next(module.parameters()).device, precision_of(module)
    return lambda tensor: tensor.to(device, torch.promote_types(tensor.dtype, precision))


def precision_of(module: nn.Module) -> torch.dtype:
    """Return the type of the numbers that a network computes with: of its first parameter of real numbers.

    Args:
        module: The network.

    """
    kinds = (each.dtype for each in module.parameters() if each.is_floating_point() and each.dtype.itemsize > 1)
    return next(kinds, torch.float32)


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


@contextmanager
def _outermost_calls(
    module: nn.Module,
    before: Callable[[str, Arguments], Arguments],
    after: Callable[[Any], None],
    counts: Iterator[bool] | None = None,
) -> Iterator[None]:
    """Have outermost calls, those of them that count, take other arguments, and see what they return."""
    running: list[bool] = []  # whether the calls that are under way count

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        running.append(not running and (counts is None or next(counts, False)))
        return before(name, (args, kwargs)) if running[-1] else None

    def leave(output: Any) -> None:
        if running and running.pop():
            after(output)

    handles = []
    for name, submodule in module.named_modules():
        if next(submodule.parameters(), None) is not None and not isinstance(submodule, torch.jit.ScriptModule):
            handles.append(
                submodule.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True
                )
            )
            handles.append(submodule.register_forward_hook(lambda _, args, output: leave(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _not_used_again(calls: list[list[Tensor]]) -> list[Tensor]:
    """Leave out what later calls were given."""
    outputs: list[Tensor] = []
    used: set[Any] = set()
    for index, tensors in enumerate(reversed(calls)):
        outputs = [tensor for tensor in tensors if tensor.grad_fn is None or tensor.grad_fn not in used] + outputs
        if index < len(calls) - 1:
            for tensor in tensors:
                gradients.add_history(tensor, used)
    return outputs


def _parts(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, list | tuple) else [batch]


def _batch_size(parts: list[Any]) -> int | None:
    """Return the number of samples that all parts of a batch have."""
    sizes = {size for part in parts for size in _sizes(part)}
    return next(iter(sizes))[0] if len(sizes) == 1 and () not in sizes else None


def _sizes(part: Any) -> set[tuple[int, ...]]:
    """Return the length of a list of samples, or the first dimensions of all tensors."""
    if _is_list_of_samples(part):
        return {(len(part),)}
    return {tuple(each.shape[:1]) if each.layout == torch.strided else () for each in containers.leaves(part)}


def _first_sample(part: Any) -> Any:
    return part[:1] if _is_list_of_samples(part) else containers.mapped(lambda tensor: tensor[:1], part)


def _is_list_of_samples(part: Any) -> bool:
    """Whether entries are samples, as images of several sizes and their boxes are, and not what all samples share."""
    if not isinstance(part, list | tuple) or not part:
        return False
    if all(isinstance(each, Tensor) and each.ndim == 3 and len(each) in (1, 3) for each in part):  # images
        return True
    is_like = len({each.ndim if isinstance(each, Tensor) else isinstance(each, Mapping) or None for each in part}) == 1
    return is_like and len({each.shape[:1] for each in containers.leaves(part)}) > 1


def _by_name(module: nn.Module, batch: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Select the entries of a batch that are arguments of ``forward``, if all that it must have are among them."""
    arguments = inspect.signature(module.forward).parameters.values()
    named = {each.name: each for each in arguments if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    if any(each.default is each.empty and name not in batch for name, each in named.items()):
        return None
    takes_all = any(each.kind is each.VAR_KEYWORD for each in arguments)
    found = {name: value for name, value in batch.items() if name in named or takes_all}
    return found or None
