"""The search loop shared by all methods: score, cut, mask."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lightning_drive.core import counting, function_modes, selection
from lightning_drive.core.goal import Goal
from lightning_drive.core.quotas import Quota
from lightning_drive.core.rounds import Round, ScoreHistogram, removed_by_round, score_histogram
from lightning_drive.core.selection import Ranking
from lightning_drive.network.masks import Masks
from lightning_drive.search import method_scores, unscored_parameters, vanishing_scores, zeros_first
from lightning_drive.search.methods import Method
from lightning_drive.search.scored_network import Network


@dataclass(frozen=True)
class ZeroCut:
    """A cut that fell inside exact zeros, so that position decided which of them to keep."""

    round_index: int
    parameter: str
    """Its name, or the pattern of those that are ranked together; empty where all are."""
    num_above: int
    """How many weights scored above zero."""
    num_kept: int


@dataclass(frozen=True)
class History:
    """What happened in the rounds of a search, or nothing where masks were given."""

    rounds: tuple[Round, ...] = ()
    scores: ScoreHistogram | None = None
    """The distribution of the scores in the last round; ``None`` if they were all zero."""
    zero_cuts: tuple[ZeroCut, ...] = ()
    """The cuts that decided which weights are kept in the end."""
    near_zero: Mapping[str, float] = field(default_factory=dict)
    """Parameters that were near or exactly 0 throughout though they were not pruned, with their largest value."""
    silent: frozenset[str] = frozenset()
    """Names of parameters that had weights and scored 0 throughout in the first round."""
    unreached: tuple[str, ...] = ()
    """Names of the parameters that had no gradient in any round: the search has to run again without them."""
    is_cycle: bool = False
    """Whether the search did one of the method's rounds only, with training before the next."""


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    masks: Masks
    history: History
    warnings: list[str]


def search(
    network: Network,
    method: Method,
    goal: Goal,
    *,
    masks: Mapping[str, Tensor] | None = None,
    on_round: Callable[[int, Masks], None] | None = None,
    only_round: int | None = None,
) -> Found:
    """Find masks by Algorithm 1 of DRIVE and of SynFlow, and leave the network masked with them.

    ``masks`` are the masks to start from. ``on_round`` is called after every round with its index, from 1, and this
    rank's part of the masks. ``only_round`` is the one round to do, from the masks of the rounds before it.
    """
    current, start = _started(network, goal, masks)
    indices = range(1, method.rounds + 1)
    if only_round is not None:
        start, indices = None, range(only_round, only_round + 1)
    with function_modes.set_aside():
        recorder = _Recorder(vanishing_scores.near_zero(network, current))
        network.mask_(current)
    for index in indices:
        quotas = partial(goal.quotas, network.shapes, index, method.rounds, start=start)
        scores = method_scores.scores_of(network, method)
        with function_modes.set_aside():
            if index == indices[0] and not network.is_sharded:
                recorder.silent = frozenset(
                    name for name, score in scores.items() if current[name].any() and not score.any()
                )
            cut = _cut(network, scores, current, quotas, recorder.near_zero)
            if index == indices[-1]:
                thresholds = [ranking.threshold for ranking in cut.rankings.values()]
                recorder.scores = score_histogram(scores, current, cut.masks, thresholds, network.holders)
            del scores  # or they would take memory beside the next gradients
            current = cut.masks
            network.mask_(current)
            recorder.add(index, cut)
        if on_round is not None:
            on_round(index, current)
    whole = network.whole(current)
    network.join_ranks()
    is_cycle = only_round is not None
    knows_reach = bool(network.reached) and not is_cycle
    unreached = [name for name in network.weights if name not in network.reached] if knows_reach else []
    return Found(whole, recorder.history(whole, unreached, is_cycle=is_cycle), [*network.warnings])


def cut_once(network: Network, method: Method, goal: Goal, round_index: int, masks: Mapping[str, Tensor]) -> Found:
    """Do one of the method's rounds, from the masks of the rounds before it, and leave the network as it is.

    There is nothing in its history but the round.
    """
    current, _ = _started(network, goal, masks)
    scores = method.score(network)
    with function_modes.set_aside():
        cut = _cut(network, scores, current, partial(goal.quotas, network.shapes, round_index, method.rounds), {})
        whole = network.whole(cut.masks)
        recorder = _Recorder({})
        recorder.add(round_index, cut)
        return Found(whole, recorder.history(whole, (), is_cycle=True), [*network.warnings])


def _started(
    network: Network, goal: Goal, masks: Mapping[str, Tensor] | None
) -> tuple[Masks, Mapping[str, int] | None]:
    """Return this rank's part of the masks to start from, and how many weights of every parameter they keep.

    Raise ValueError if they do not fit, or prune more than the goal.
    """
    current = network.starting_masks(masks)
    if not masks:
        return current, None
    start = dict(zip(masks, counting.count_each(masks.values()), strict=True))
    goal.check_start(network.shapes, start)
    return current, start


@dataclass(frozen=True)
class _Cut:
    """One cut."""

    masks: Masks
    rankings: dict[str, Ranking]
    """By the names of quotas; one under the name ``""`` where all parameters are ranked together."""
    num_alive: dict[str, int]
    """How many weights every parameter had before the cut."""

    def zero_cuts(self, round_index: int) -> Iterator[ZeroCut]:
        for name, ranking in self.rankings.items():
            if ranking.threshold == 0 and ranking.num_above + ranking.num_tied > ranking.num_kept:
                yield ZeroCut(round_index, name, ranking.num_above, ranking.num_kept)


def _cut(
    network: Network,
    scores: dict[str, Tensor],
    masks: Masks,
    quotas: Callable[..., list[Quota]],
    near_zero: Mapping[str, float],
) -> _Cut:
    """Keep the survivors with the highest scores; ``quotas(alive=...)`` says how many of those that are ``alive``."""
    holders = network.holders
    alive = dict(zip(masks, counting.count_each(masks.values(), holders), strict=True))
    own = alive if holders.size == 1 else None
    rankings = {
        quota.name: selection.keep_highest(
            {name: scores[name] for name in quota.parameters},
            quota.num_kept,
            {name: masks[name] for name in quota.parameters},
            holders,
            num_alive=own,
        )
        for quota in quotas(alive=alive)
    }
    prunes = sum(ranking.num_kept for ranking in rankings.values()) < sum(alive.values())
    num_zero = sum(ranking.num_tied for ranking in rankings.values() if ranking.threshold == 0)
    if prunes and num_zero == sum(alive.values()):
        raise ValueError(unscored_parameters.nothing_to_rank(masks, near_zero))
    rankings = {
        name: zeros_first.decided(ranking, scores, network.weights, masks, alive, holders)
        for name, ranking in rankings.items()
    }
    kept = {name: mask for ranking in rankings.values() for name, mask in ranking.masks.items()}
    whole = {name: kept[name] if name in kept else torch.zeros_like(mask) for name, mask in masks.items()}
    return _Cut(Masks(whole), rankings, alive)


class _Recorder:
    """Records the rounds of a search."""

    def __init__(self, near_zero: Mapping[str, float]) -> None:
        self.near_zero = near_zero
        self.silent: frozenset[str] = frozenset()
        self.scores: ScoreHistogram | None = None
        self._rankings: Mapping[str, Ranking] = {}  # of the last round
        self._thresholds: list[float | None] = []
        self._counts: list[Iterable[int]] = []
        self._zero_cuts: list[ZeroCut] = []
        self._first_round = 0
        self._last_round = 0
        self._zeros_stay = True
        """Whether no weight that scored zero in one round is known to have scored higher in a later one."""

    def add(self, round_index: int, cut: _Cut) -> None:
        for name, before in self._rankings.items():
            if before.threshold == 0 and name in cut.rankings:
                now = cut.rankings[name]
                above = now.num_above + now.num_tied * (now.threshold > 0)
                self._zeros_stay &= now.threshold >= 0 and above <= before.num_above
        self._rankings = cut.rankings
        self._thresholds.append(cut.rankings[""].threshold if "" in cut.rankings else None)
        self._counts.append(cut.num_alive.values())
        self._zero_cuts.extend(cut.zero_cuts(round_index))
        self._first_round, self._last_round = self._first_round or round_index, round_index

    def history(self, masks: Masks, unreached: Iterable[str], *, is_cycle: bool) -> History:
        """Return the history. If zeros stayed zeros, they go first, so only a zero cut in the last round matters."""
        with function_modes.set_aside():
            counts = [*self._counts, counting.count_each(masks.values())]
        last = [cut for cut in self._zero_cuts if cut.round_index == self._last_round]
        return History(
            removed_by_round(self._first_round, self._thresholds, counts),
            self.scores,
            tuple(last if self._zeros_stay else self._zero_cuts),
            self.near_zero,
            self.silent,
            tuple(unreached),
            is_cycle,
        )
