"""Modes that change every call of a function of torch, safe under interrupts."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import _make_grads
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import Self


class FunctionMode(TorchFunctionMode):
    """A mode that an interrupt cannot leave behind; subclasses change calls in :meth:`run`.

    torch takes a mode off its stack while it runs, and an interrupt then keeps it off, or brings it back only after the
    interrupt was handled. So leaving a mode that is not on the stack raises nothing (an error would hide the
    interrupt), and a mode that comes back after it was left does nothing.
    """

    _is_on = False

    def __enter__(self) -> Self:
        self._depth = torch._C._len_torch_function_stack()
        self._is_on = True
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._is_on = False
        if torch._C._len_torch_function_stack() > self._depth:
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {}) if self._is_on else func(*args, **(kwargs or {}))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of torch with its positional and keyword arguments."""
        return func(*args, **kwargs)


class InPrecision(FunctionMode):
    """Keeps floating-point numbers in one type, whatever types ``forward`` creates others in or converts them to.

    Calls without a number of that type stay as they are: a signal handler may save or load a checkpoint.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of torch on numbers of one type, and convert its results."""
        kinds = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if kinds and self._dtype not in kinds:
            return func(*args, **kwargs)
        if any(kind.is_floating_point for kind in kinds - {self._dtype}):
            args, kwargs = (
                converted(args, self._dtype),
                {key: converted(value, self._dtype) for key, value in kwargs.items()},
            )
        return converted(func(*args, **kwargs), self._dtype)


def converted(result: Any, dtype: torch.dtype) -> Any:
    """Return a result of a function of torch, or a tuple or list of them, with floating-point numbers in one type."""

    def convert(value: Any) -> Any:
        is_other = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype
        is_other = is_other and value.numel() > 0  # an empty one may be what `torch.load` is going to fill
        return value.to(dtype).as_subclass(type(value)) if is_other else value

    return tree_map(convert, result) if isinstance(result, tuple | list) else convert(result)


@contextmanager
def set_aside() -> Generator[None]:
    """Take the innermost mode off the stack, if it is a :class:`FunctionMode`, during calls that it is not for."""
    mode = _get_current_function_mode()  # type: ignore[no-untyped-call]
    if not isinstance(mode, FunctionMode):
        yield
        return
    torch._C._pop_torch_function_stack()
    try:
        yield
    finally:
        if mode._is_on:  # else an interrupt made it leave before
            torch._C._push_on_torch_function_stack(mode)


@contextmanager
def on_again(mode: FunctionMode) -> Generator[None]:
    """Put a mode on the stack again while it runs a function, so that it sees what this calls, too."""
    depth = torch._C._len_torch_function_stack()
    torch._C._push_on_torch_function_stack(mode)
    try:
        yield
    finally:
        if torch._C._len_torch_function_stack() > depth:
            torch._C._pop_torch_function_stack()


BACKWARD = frozenset({Tensor.backward, torch.autograd.backward, torch.autograd.grad})
"""The functions that run a backward pass."""


def run_backward(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function of :data:`BACKWARD` under the modes that are on.

    Like any function of torch, ``loss.backward()`` runs without the innermost mode, so a checkpoint
    (``torch.utils.checkpoint``) would compute something else in it than in the forward pass.
    """
    is_grad = func is torch.autograd.grad
    given = dict(zip(_GRAD if is_grad else _BACKWARD, args, strict=False)) | kwargs
    given = {("tensors" if name == "self" else name): value for name, value in given.items()}
    outputs = _together(given.pop("outputs" if is_grad else "tensors"))
    gradients = given.pop("grad_outputs", given.pop("grad_tensors", given.pop("gradient", None)))
    create_graph, retain_graph = given.pop("create_graph", False), given.pop("retain_graph", None)
    inputs, may_be_unused = _together(given.pop("inputs", None)), given.pop("allow_unused", None)
    given.pop("only_inputs", None)
    plain = (*outputs, *inputs)
    is_odd = any(given.values()) or len(args) > len(_GRAD if is_grad else _BACKWARD)
    if is_odd or not all(type(tensor) in (Tensor, nn.Parameter) for tensor in plain):
        with set_aside():  # something unusual, such as batches of gradients
            return func(*args, **kwargs)
    gradients = (None,) * len(outputs) if gradients is None else _together(gradients)
    with set_aside():
        ones = _make_grads(outputs, gradients, is_grads_batched=False)
    retain_graph = create_graph if retain_graph is None else retain_graph
    return _engine_run_backward(
        outputs,
        ones,
        retain_graph,
        create_graph,
        inputs,
        allow_unreachable=bool(may_be_unused) if is_grad else True,
        accumulate_grad=not is_grad,
    )


_BACKWARD = ("tensors", "grad_tensors", "retain_graph", "create_graph")
_GRAD = ("outputs", "inputs", "grad_outputs", "retain_graph", "create_graph")


def _together(tensors: Any) -> tuple[Any, ...]:
    if tensors is None:
        return ()
    return tuple(tensors) if isinstance(tensors, list | tuple) else (tensors,)


def backward(loss: Tensor) -> None:
    """Run the backward pass of a loss, a tensor of one number, under the modes that are on."""
    if type(loss) in (Tensor, nn.Parameter):
        run_backward(Tensor.backward, (loss,), {})
    else:
        loss.backward()  # type: ignore[no-untyped-call]
