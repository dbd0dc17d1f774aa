"""Paths through recurrent layers and cells: from the input and the state one step earlier to each hidden unit.

A layer is followed for as many steps as it takes until nothing more is reached, however short the example is. All
steps are taken together: a path that arrives at one of them arrives at all.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_drive.network.path_marks import is_mark, zeros_and_ones

Step: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Returns the state after a step, given the input and the state before it."""


def _gated(value: Tensor, gate: Tensor, is_biased: bool) -> Tensor:
    """Return the product with a gate, which stands half open by itself; with a bias, the value is not 0, either."""
    return value * (1 + gate) + (gate if is_biased else 0)


def _rnn(from_input: Tensor, from_state: Tensor, state: Tensor, is_biased: bool, projection: Tensor | None) -> Tensor:
    return from_input + from_state


def _gru(from_input: Tensor, from_state: Tensor, state: Tensor, is_biased: bool, projection: Tensor | None) -> Tensor:
    reset, update, _ = (from_input + from_state).chunk(3, -1)
    new = from_input.chunk(3, -1)[2] + _gated(from_state.chunk(3, -1)[2], reset, is_biased)
    return _gated(new, update, is_biased) + _gated(state, update, is_biased)


def _lstm(from_input: Tensor, from_state: Tensor, state: Tensor, is_biased: bool, projection: Tensor | None) -> Tensor:
    """Return the next state: the hidden units, followed by the cells."""
    gate, forget, new, output = (from_input + from_state).chunk(4, -1)
    cell = state[..., -new.shape[-1] :]
    cell = zeros_and_ones(_gated(new, gate, is_biased) + _gated(cell, forget, is_biased))
    hidden = zeros_and_ones(_gated(cell, output, is_biased))
    return torch.cat([hidden if projection is None else zeros_and_ones(F.linear(hidden, projection)), cell], -1)


def _step(kind: Callable[..., Tensor], weights: Sequence[Tensor], is_biased: bool) -> Step:
    """Return a function that takes one step of a layer, or of a cell."""
    to_input, to_state = weights[:2]
    projection = weights[-1] if len(weights) % 2 else None

    def step(mark: Tensor, state: Tensor) -> Tensor:
        from_state = zeros_and_ones(F.linear(state[..., : to_state.shape[1]], to_state))
        return zeros_and_ones(kind(zeros_and_ones(F.linear(mark, to_input)), from_state, state, is_biased, projection))

    return step


def _settled(step: Step, mark: Tensor, initial: Tensor) -> Tensor:
    """Return the state after as many steps as change it; gradients go back through as many."""
    with torch.no_grad():
        state = initial.detach()
        while not torch.equal(state, following := ((step(mark, state) + initial) > 0).to(state.dtype)):
            state = following
    before = state.clone().requires_grad_()
    after = step(mark.detach(), before)
    result = zeros_and_ones(step(mark, state) + initial)
    if not result.requires_grad:
        return result

    def carried_back(gradient: Tensor) -> Tensor:
        total = gradient
        while True:
            (earlier,) = torch.autograd.grad(after, before, total, retain_graph=True)
            if torch.equal(total, more := ((gradient + earlier) > 0).to(gradient.dtype)):
                return total
            total = more

    result.register_hook(carried_back)  # type: ignore[no-untyped-call]
    return result


def _joined(states: Sequence[Tensor], like: Tensor) -> Tensor:
    """Join the parts of a state; no path starts at constants."""
    parts = [state if is_mark(state) else torch.zeros_like(state) for state in states]
    return torch.cat(parts, -1).to(like.dtype)


def _layer(kind: Callable[..., Tensor], input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the marks of a call of ``torch.lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``; sequences may be packed."""
    is_packed = isinstance(arguments[2], list | tuple)
    states, weights, is_biased, num_layers, _, _, both_ways, *rest = arguments[is_packed:]
    states = states if isinstance(states, list | tuple) else (states,)
    time = int(rest == [True])
    mark = input.sum(time, keepdim=is_packed)
    calls = num_layers * (1 + both_ways)
    num_weights = len(weights) // calls
    ends: list[Tensor] = []
    for layer in range(num_layers):
        outputs = []
        for i in range(layer * (1 + both_ways), (layer + 1) * (1 + both_ways)):
            own = weights[i * num_weights : (i + 1) * num_weights]
            parts = [state[i].sum(0, keepdim=True) if is_packed else state[i] for state in states]
            ends.append(_settled(_step(kind, own, is_biased), mark, _joined(parts, mark)))
            outputs.append(ends[-1][..., : own[1].shape[1]])
        mark = torch.cat(outputs, -1)
    result = mark if is_packed else mark.unsqueeze(time)
    whole = torch.stack(ends).expand(-1, states[0].shape[1], -1)
    sizes = [state.shape[-1] for state in states]
    return result.expand(*input.shape[:-1], -1), *torch.split(whole, sizes, -1)


def _cell(
    kind: Callable[..., Tensor],
    input: Tensor,
    states: Any,
    to_input: Tensor,
    to_state: Tensor,
    bias: Tensor | None = None,
    _: Tensor | None = None,
) -> Any:
    """Return the marks of a call of ``torch.lstm_cell``, ``gru_cell``, ``rnn_tanh_cell`` or ``rnn_relu_cell``."""
    is_pair = isinstance(states, list | tuple)
    parts = states if is_pair else (states,)
    step = _step(kind, (to_input, to_state), bias is not None)
    result = _settled(step, input, _joined(parts, input))
    return torch.split(result, [part.shape[-1] for part in parts], -1) if is_pair else result


_KINDS = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn, "rnn_relu": _rnn}
RULES: dict[str, Callable[..., Any]] = {
    **{name: partial(_layer, kind) for name, kind in _KINDS.items()},
    **{f"{name}_cell": partial(_cell, kind) for name, kind in _KINDS.items()},
}
"""Functions of torch to what takes their place."""
