"""Have a method score the network, check what it returns, and average it over processes that scored by themselves."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_drive.core import function_modes, tensor_kinds
from lightning_drive.core.messages import listed, shown
from lightning_drive.search.methods import Method
from lightning_drive.search.scored_network import Network

_MOST_EXACT = 1 << 53
"""The size below which float64 holds all integers."""

_FULL = {torch.float32, torch.float64}
_LONG = {torch.int64, torch.uint64}


def scores_of(network: Network, method: Method) -> dict[str, Tensor]:
    """Return the scores of all prunable parameters, in their order, in float32 or float64 and without a graph.

    All that is not float64 becomes what holds it exactly. An error of one rank is one of all.
    """
    network.reads.clear()
    with network.ranks.together():
        given: object = method.score(network)
        with function_modes.set_aside():
            _check_reads(network, method)
            scores = _checked(network.weights, given, f"`{type(method).__name__}.score`")
            if "loss" in network.reads:
                network.drop_gradients()
                scores = dict(zip(scores, network.mean(scores.values()), strict=True))
    if "loss" in network.reads:  # reentrant checkpoints hide parameters from the graph of a loss
        with function_modes.set_aside():
            network.reached.update(name for name in scores if name not in network.reached and scores[name].any())
    return scores


def _check_reads(network: Network, method: Method) -> None:
    """Raise if a method says that it reads no loss, and has read one."""
    declared = getattr(method, "reads", None)
    if network.reads and declared not in (None, "loss"):
        raise ValueError(
            f"`{type(method).__name__}.reads` is {declared!r}, but its `score` has read the loss. Set `reads = 'loss'`:"
            " data and loss are then checked before training, and the plan has their costs."
        )


def _checked(weights: Mapping[str, Tensor], given: object, what: str) -> dict[str, Tensor]:
    """Return the scores that ``what`` returned if there is one for every weight and for nothing else."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{what} must return a dictionary from the name of every prunable parameter ({listed(weights, most=3)}) to"
            f" its scores, got {shown(given)}."
        )
    missing, unknown = [name for name in weights if name not in given], [name for name in given if name not in weights]
    if missing or unknown:
        wrong = [f"left out {listed(map(repr, missing))}"] if missing else []
        wrong += [f"returned {listed(map(repr, unknown))} as well"] if unknown else []
        raise ValueError(
            f"{what} must return scores for exactly the prunable parameters, the names in `network.weights`, but it"
            f" {' and '.join(wrong)}. Which parameters these are is chosen by `include` and `exclude`."
        )
    scores = {}
    for name, weight in weights.items():
        score = given[name]
        is_usual = type(score) is Tensor and score.dtype in _FULL and not (score.requires_grad or score.is_nested)
        if is_usual and (score.layout, score.device, score.shape) == (torch.strided, weight.device, weight.shape):
            scores[name] = score  # as nearly all are, and there may be many
        else:
            scores[name] = _checked_score(name, weight, score, what)
    return scores


def _checked_score(name: str, weight: Tensor, score: Any, what: str) -> Tensor:
    """Return a score in float32 or float64; raise if it is not one number for every weight of the parameter."""
    start = f"The scores of {name!r} from {what} must be"
    if not isinstance(score, Tensor):
        raise TypeError(f"{start} a tensor of the shape {tuple(weight.shape)}, got {shown(score)}.")
    if score.device != weight.device:
        raise ValueError(f"{start} on the device of the weights, {weight.device}, got {score.device}.")
    if not tensor_kinds.is_plain(score):
        raise TypeError(f"{start} a dense tensor of plain numbers, got {tensor_kinds.described(score)}.")
    if score.shape != weight.shape:
        raise ValueError(
            f"{start} one for every weight, in the shape {tuple(weight.shape)}, got the shape {tuple(score.shape)}."
        )
    if score.is_complex():
        raise TypeError(f"{start} real numbers, got {score.dtype}. Return their `abs()`, or another order of them.")
    exact = score.detach()
    if score.dtype not in _FULL:
        exact = exact.to(torch.float32 if score.itemsize <= 2 else torch.float64)
    if score.dtype in _LONG and exact.abs().ge(_MOST_EXACT).any():
        raise ValueError(f"{start} floating-point numbers or integers below 2**53 in size, got larger {score.dtype}.")
    return exact
