"""Diagnose the outcome of a search: collapsed layers, cuts by position, active weights, costs."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from lightning_drive.core.goal import Goal
from lightning_drive.core.messages import listed
from lightning_drive.network.costs import Costs, measure
from lightning_drive.network.forward_passes import ForwardPass
from lightning_drive.network.masks import Masks, collapsed_layers
from lightning_drive.search import active_weights, coverage_warnings, methods, unscored_parameters, vanishing_scores
from lightning_drive.search.active_weights import ActiveWeights
from lightning_drive.search.loop import Found, History
from lightning_drive.search.methods import Method
from lightning_drive.search.scored_network import Network
from lightning_drive.search.vanishing_scores import Causes


@dataclass(frozen=True)
class Diagnosis:
    """What masks mean for their network."""

    active: Masks | None
    """The kept weights on an input-output path; ``None`` if paths could not be followed."""
    path_error: str | None
    """Why paths could not be followed; ``None`` if they could, or if the weights are sharded over ranks."""
    costs: Costs
    """What the network computes in one forward pass."""
    warnings: list[str]


def diagnose(network: Network, method: Method, goal: Goal, found: Found, others: Sequence[str] = ()) -> Diagnosis:
    """Diagnose masks, which the network already has on; ``others`` names matrices that stay dense."""
    masks, history = found.masks, found.history
    causes = _causes(network, method, masks, history)
    active, costs = _measured(network, masks)
    remedy = _remedy(goal, "More cycles or cuts" if history.is_cycle else "More rounds" if network.reached else "")
    remarks = [*_zero_cuts(history, method), *_collapses(masks, active.masks, causes.explained, remedy)]
    if remarks and network.reached and not network.is_sharded:
        remarks.extend(unscored_parameters.behind_norms(network.module))
    zeros = [name for name, largest in history.near_zero.items() if not largest]
    remarks.extend([*causes.remarks, *unscored_parameters.dead_pairs(masks, zeros), *_unknown_paths(active.unknown)])
    remarks.extend(coverage_warnings.warnings(network.module, masks, others, costs))
    return Diagnosis(active.masks, active.error, costs, remarks)


def diagnose_given(network: Network, masks: Masks, remedy: str) -> Diagnosis:
    """Diagnose masks that no search found, which the network already has on; ``remedy`` is for lost layers."""
    active, costs = _measured(network, masks)
    remarks = [*_collapses(masks, active.masks, (), f" {remedy}"), *_unknown_paths(active.unknown)]
    remarks.extend(coverage_warnings.warnings(network.module, masks, (), costs))
    return Diagnosis(active.masks, active.error, costs, remarks)


def _measured(network: Network, masks: Masks) -> tuple[ActiveWeights, Costs]:
    """Find the weights on paths, and measure what the network computes."""
    forward_pass, path_error = _forward_pass(network)
    active = ActiveWeights(None, error=path_error)
    if forward_pass is not None:
        active = active_weights.find(network.module, masks, forward_pass)
    return active, measure(network.module, network.parameters, forward_pass, masks)


def _causes(network: Network, method: Method, masks: Masks, history: History) -> Causes:
    """Find why the scores of collapsed layers vanished, or those of any layer if the cut fell inside zeros."""
    if not network.reached or network.is_sharded or not network.ranks_agree:
        return Causes()
    all_suffer = network.ranks.broadcast(bool(history.zero_cuts))
    lost = collapsed_layers(masks) or (list(masks) if all_suffer else [])
    return vanishing_scores.explain(network, method, history.near_zero, history.silent, lost)


def _forward_pass(network: Network) -> tuple[ForwardPass | None, str | None]:
    """Return the forward pass to follow data along, or why it is not known; neither if weights are sharded."""
    try:
        return (None if network.is_sharded else network.forward_pass()), None
    except Exception as error:  # from the user's own batches, or the lack of them
        return None, str(error)


def _zero_cuts(history: History, method: Method) -> Iterator[str]:
    """Warn of cuts in which position decided."""
    if not history.zero_cuts:
        return
    hint = "Layers that start at zero, and kernel taps that only ever see padding, have such scores."
    if methods.reads(method) == "loss":
        hint += " Larger batches, more `batches_per_round` or a longer warm-up give fewer zeros."
    cut, times = history.zero_cuts[0], len(history.zero_cuts)
    where = f" in {cut.parameter!r}" if cut.parameter else ""
    more = f" This happened {times} times." if times > 1 else ""
    yield (
        f"In round {cut.round_index} only {cut.num_above:,} weights{where} had a score above zero, fewer than the"
        f" {cut.num_kept:,} to keep: the cut fell inside exact zeros, and the rest was kept by position. {hint}{more}"
    )


def _collapses(masks: Masks, active: Masks | None, explained: Collection[str], remedy: str) -> Iterator[str]:
    """Warn of layer collapse, with a remedy unless another warning explains it."""
    empty = collapsed_layers(masks)
    is_explained = bool(empty) and set(empty) <= set(explained)
    helps = "" if is_explained else remedy
    if empty:
        yield f"Layer collapse: no weight is left in {listed(map(repr, empty))}.{helps}"
    if active is not None and not active.num_kept:
        yield f"The network is cut off: no path from its input to its output is left, so it cannot learn.{helps}"


def _remedy(goal: Goal, more: str) -> str:
    """Return a remedy for a collapse; ``more`` is what improves the scores, such as "More rounds", or empty."""
    if goal.scope != "global":
        return f" {more} or a lower `sparsity` commonly help." if more else " A lower `sparsity` commonly helps."
    return f" {f'{more}, a' if more else 'A'} lower `sparsity` or `scope='layerwise'` commonly help."


def _unknown_paths(names: Sequence[str]) -> Iterator[str]:
    """Warn of parameters without a path even in the dense network."""
    if names:
        yield (
            f"No path through {listed(map(repr, names), most=4)} was found even without masks: the values sent through"
            " the network to find paths do not reach them, or do not get from them to the output. All that is kept in"
            " them counts as active in the effective sparsity."
        )
