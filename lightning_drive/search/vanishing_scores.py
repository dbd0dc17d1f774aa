"""Explain why the scores of a layer vanish: factors near 0 in its branch, or scores of 0 from the first round."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_drive.core.messages import listed
from lightning_drive.network.masks import Masks
from lightning_drive.network.parameter_names import is_bias
from lightning_drive.search import method_scores, unscored_parameters
from lightning_drive.search.methods import Method
from lightning_drive.search.scored_network import Network
from lightning_drive.search.unscored_parameters import patterns

TINY = 5e-3
"""The largest value of a factor that counts as near 0. LayerScale begins with 1e-6 to 1e-4, ReZero and SkipInit with 0,
and a few steps of Adam raise them to some thousandths."""
_GROWTH = 100
"""How many times higher scores must be with 1 in place of a factor; for a factor of ``TINY`` one expects 200 times."""


class Causes(NamedTuple):
    """The causes of vanishing scores."""

    remarks: tuple[str, ...] = ()
    """Warnings for the user."""
    explained: frozenset[str] = frozenset()
    """Names of the parameters whose scores vanish for these causes."""


def near_zero(network: Network, masks: Masks) -> dict[str, float]:
    """Return the largest value of every parameter that is near or exactly 0 throughout though it is not pruned."""
    if network.is_sharded:
        return {}
    largest = {name: torch.linalg.vector_norm(weight, torch.inf).item() for name, weight in network.weights.items()}
    return {name: size for name, size in largest.items() if size <= TINY and masks[name].any()}


def explain(
    network: Network, method: Method, near_zero: Mapping[str, float], silent: Collection[str], lost: Sequence[str]
) -> Causes:
    """Explain why the scores of lost parameters vanished; ``silent`` names those that scored 0 in the first round."""
    if not lost:
        return Causes()
    known = unscored_parameters.silent_norms(network.module)
    try:
        network.stand_still()
        causes = factors(
            network.module, network.weights, near_zero, lost, known, lambda: method_scores.scores_of(network, method)
        )
    except (ValueError, RuntimeError):  # a loss may be infinite with 1 in place of 1e-6; masks are final already
        causes = Causes()
    if known:
        return causes
    return with_silent(causes, [name for name in lost if name in silent and name not in near_zero], network.weights)


def factors(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    small: Mapping[str, float],
    lost: Collection[str],
    known: Collection[str],
    score: Callable[[], Mapping[str, Tensor]],
) -> Causes:
    """Find factors near 0 without which the scores of the ``lost`` parameters would be over 100 times higher.

    Factors are recognised by their effect: their values are replaced by 1, and all parameters are scored again by
    ``score``, always on the same batch. Parameters whose names differ in numbers only are replaced together. The module
    is written to and restored. ``weights`` are the prunable ones, pruned; ``small`` has the largest value of those that
    were at most ``TINY`` before pruning; ``known`` names parameters that need no remark.
    """
    parameters = dict(module.named_parameters())
    groups: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        if name in small if name in weights else _is_tiny(name, parameter):
            groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    if not groups:
        return Causes()
    largest = {
        name: small[name] if name in weights else parameters[name].detach().abs().max().item()
        for group in groups.values()
        for name in group
    }
    empty = [name for name in lost if name not in small and not weights[name].any()]
    as_before = {name: size * _fan_in(parameters[name]) ** 0.5 for name, size in small.items()}

    def scored(names: Iterable[str], size: float = 1) -> dict[str, float]:
        filled = {name: parameters[name] for name in [*empty, *small, *names]}
        with _filled(filled, largest.keys() - weights.keys(), {**as_before, **dict.fromkeys(names, size)}):
            return {name: values.double().abs().sum().item() for name, values in score().items()}

    def raised(names: Iterable[str]) -> set[str]:
        after = scored(names)
        return {name for name in lost if after[name] > _GROWTH * before[name]}

    def behind(names: Sequence[str]) -> set[str]:
        """Return the parameters whose scores rise with these factors, as those of weights in a branch do."""
        once, twice = scored(names, TINY), scored(names, 2 * TINY)
        return {name for name in twice if twice[name] > 1.5 * once[name]}

    before = scored(())
    explained = raised(largest)
    if not explained:
        return Causes()
    harmful = list(groups.values())
    if len(groups) > 1:
        harmful = [names for names in groups.values() if raised(names)] or harmful
    names = [name for group in harmful for name in group]
    to_keep = [name for name in weights if name in {*names, *explained, *behind(names)}]
    return Causes(tuple(_remarks(names, to_keep, largest, weights, known)), frozenset(explained))


def with_silent(causes: Causes, silent: Iterable[str], among: Iterable[str]) -> Causes:
    """Add the ``silent`` parameters, which scored 0 before anything was pruned, unless they are explained already.

    ``among`` names all prunable parameters.
    """
    names = [name for name in silent if name not in causes.explained]
    if not names:
        return causes
    remark = (
        f"{listed(map(repr, names), most=4)} scored 0 throughout before anything was pruned, though the weights are not"
        " 0: what is scored does not change with them, for example because a term of the loss is multiplied by 0, or"
        " because the units behind them are never active. No number of rounds helps. Prune later, when it does change,"
        f" or leave them out with `exclude={patterns(names, among)}`."
    )
    return Causes((*causes.remarks, remark), causes.explained | set(names))


def _remarks(
    names: Iterable[str],
    to_keep: Collection[str],
    largest: Mapping[str, float],
    weights: Iterable[str],
    known: Collection[str],
) -> Iterator[str]:
    keep = f"together with all weights whose scores they lower, by `exclude={patterns(to_keep, weights)}`"
    factors = [name for name in names if name not in weights and name not in known]
    if factors:
        yield (
            f"{listed(map(repr, factors), most=3)} multiply a branch of the network by {_size(factors, largest)}, as"
            f" LayerScale, ReZero and SkipInit do at the beginning. The weights of such a branch score that much lower"
            " than others and are the first to go, in one round or in many. Initialise the factors with 1 (timm:"
            " `init_values` or `ls_init_value`; transformers: `layer_scale_init_value`), prune after a warm-up in which"
            f" they grow, or keep the branch dense {keep}."
        )
    tiny = [name for name in names if name in weights and largest[name]]
    if tiny:
        yield (
            f"The weights of {listed(map(repr, tiny), most=3)} are {_size(tiny, largest)} before pruning: all weights"
            " in front of them score that much lower than others and are the first to go. Initialise them with larger"
            f" values, prune after a warm-up in which they grow, or keep them dense, {keep}."
        )
    zeros = [name for name in names if name in weights and not largest[name]]
    if zeros:
        yield (
            f"The weights of {listed(map(repr, zeros), most=3)} are 0 throughout before pruning: they score 0, and so"
            f" do all weights in front of them. Initialise them with other values, prune after a warm-up, or keep them"
            f" dense, {keep}."
        )


def _size(names: Iterable[str], largest: Mapping[str, float]) -> str:
    most = max(largest[name] for name in names)
    return f"at most {most:g}" if most else "0"


def _is_tiny(name: str, parameter: Tensor) -> bool:
    """Whether a parameter may be a factor that begins near 0: small, and not a bias."""
    return (
        parameter.is_floating_point()
        and parameter.numel() > 0
        and not is_bias(name)
        and parameter.detach().abs().max().item() <= TINY
    )


def _fan_in(weight: Tensor) -> float:
    return weight.numel() / len(weight)


@contextmanager
def _filled(parameters: Mapping[str, Tensor], ones: Collection[str], sizes: Mapping[str, float]) -> Iterator[None]:
    """Fill parameters with ones (if in ``ones``) or usual initial values, times their size if given; restore them."""
    before = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name in ones:
                    parameter.fill_(1)
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / _fan_in(parameter) ** 0.5)
                parameter.mul_(sizes.get(name, 1))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
