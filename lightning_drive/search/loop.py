"""From scores to masks: the rounds that all methods share, and what there is to say about their outcome."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.core import counting, function_modes, schedules, selection, shards, zeroing
from lightning_drive.core.arguments import Mode, Schedule, Scope, check_choice
from lightning_drive.core.history import Round, ScoreHistogram, removed_by_round, score_histogram
from lightning_drive.core.masks import Masks, collapsed_layers
from lightning_drive.core.messages import listed, shown_error
from lightning_drive.core.processes import ALONE, Ranks
from lightning_drive.network import synflow
from lightning_drive.network.costs import Costs, measure
from lightning_drive.network.forward_calls import Passage
from lightning_drive.network.gradients import LossFunction
from lightning_drive.network.undisturbed import in_mode
from lightning_drive.search import vanishing_scores
from lightning_drive.search.methods import Method
from lightning_drive.search.scored_network import Network
from lightning_drive.search.vanishing_scores import Causes

_MODES: tuple[Mode, ...] = ("eval", "train")
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Found:
    """The outcome of a search: masks, and what there is to know about them."""

    masks: Masks
    active: Masks | None
    """The kept weights on an input-output path; ``None`` if paths could not be followed."""
    path_error: str | None
    """Why paths could not be followed; ``None`` if they could, or if the weights are sharded over ranks."""
    warnings: list[str]
    rounds: tuple[Round, ...]
    scores: ScoreHistogram | None
    """How the scores of the last round lay; ``None`` if they were all zero."""
    costs: Costs
    """What the network computes in one forward pass."""
    unreached: tuple[str, ...] = ()
    """Names of the parameters that had no gradient in any round: masks are to be found without them."""


def of_reached(
    once: Callable[[Sequence[str], Mapping[str, Tensor] | None], Found],
    method: Method,
    names: Sequence[str],
    masks: Mapping[str, Tensor] | None,
) -> Found:
    """Find masks, and once more without the parameters that had no gradient in any round.

    The masks are then those that excluding these parameters gives: counts refer to what is trained.

    Args:
        once: Finds masks of named parameters, from masks to start from; on the same batches each time.
        method: The method.
        names: Names of all prunable parameters.
        masks: The masks to start from.

    """
    found, left_out = once(names, masks), set[str]()
    while found.unreached:
        left_out.update(found.unreached)
        reached = [name for name in names if name not in left_out]
        found = once(reached, masks and {name: mask for name, mask in masks.items() if name not in left_out})
    if left_out:
        in_order = [name for name in names if name in left_out]
        found.warnings.insert(0, vanishing_scores.unreached(in_order, names, _reads_batches(method)))
    return found


def _reads_batches(method: Method) -> bool:
    return hasattr(method, "batches_per_round")


def search(
    module: nn.Module,
    method: Method,
    *,
    sparsity: float,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    masks: Mapping[str, Tensor] | None = None,
    schedule: Schedule = "exponential",
    scope: Scope = "global",
    example_input: Any = None,
    others: Sequence[str] = (),
    on_round: Callable[[int, Masks], None] | None = None,
    only_round: int | None = None,
    shuffle: torch.Generator | None = None,
    ranks: Ranks = ALONE,
) -> Found:
    """Find masks and tell what happened: :func:`find_masks` for a caller that warns and reports in its own way.

    The module is masked and run: give it what :func:`~lightning_drive.network.undisturbed.undisturbed` yields. The
    arguments
    are those of :func:`find_masks`, with its prunable ``parameters`` by name in place of ``include`` and ``exclude``,
    and four more: ``others`` names matrices that are trained and stay dense, ``only_round`` does a single one of the
    method's rounds, from the masks that those before it left, ``shuffle`` gives the outcome in a random order within
    each parameter, and ``ranks`` are processes that each score their own batches: gradients are averaged over them,
    and all get the masks of the first.

    Parameters may be split over ranks (FSDP2). Every rank then scores and masks its own part, and only histograms of
    scores are exchanged; masks are put together at the end. ``on_round`` is given this rank's part.
    """
    reads_batches = _reads_batches(method)
    holders = shards.holders(parameters)
    current = _starting_masks(module, parameters, masks, sparsity)
    start = min(Masks(masks).sparsity, sparsity)  # rounding may have taken one weight more
    indices = range(1, method.rounds + 1)
    if only_round is not None:
        start, indices = 0.0, range(only_round, only_round + 1)
    network = Network(module, parameters, batches, loss_fn, example_input, ranks)
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    history, silent = _History(), set[str]()
    last_scores: ScoreHistogram | None = None
    with function_modes.set_aside():
        small = _small(network, current)
        zeros = [name for name, size in small.items() if not size]
        _mask_(network.weights, current)
    for index in indices:
        density = schedules.SCHEDULES[schedule](index, method.rounds, sparsity, start)
        scores = method.score(network)
        with function_modes.set_aside():
            if index == indices[0] and not network.is_sharded:
                silent = {name for name, each in scores.items() if current[name].any() and not each.any()}
            before = current
            current, rankings, alive = _prune(scores, current, sizes, density, scope, holders, zeros=zeros)
            if index == indices[-1]:
                thresholds = [ranking.threshold for ranking in rankings.values()]
                last_scores = score_histogram(scores, before, current, thresholds, holders)
            del scores, before  # or they would be there beside the next gradients
            _mask_(network.weights, current)
            history.add(rankings, alive.values(), list(_cuts_in_zeros(rankings, index, reads_batches)))
        if on_round is not None:
            on_round(index, current)
    joined = Masks({name: shards.joined(mask, of=parameters[name]).clone() for name, mask in current.items()})
    found, disagreements = _agreed(joined if shuffle is None else joined.shuffled(shuffle), ranks)
    network.join_ranks()
    if network.num_skipped:
        network.warnings.append(
            f"Scoring skipped {network.num_skipped:,} batch{'es' * (network.num_skipped > 1)} without a loss, or with"
            " one that no prunable parameter has a gradient of."
        )
    unreached = tuple(name for name in parameters if name not in network.reached)
    causes = Causes()
    if network.reached and not network.is_sharded and not disagreements:
        lost = collapsed_layers(found) or (list(found) if ranks.broadcast(bool(history.remarks)) else [])
        causes = _causes(network, method, small, lost)
        if not _silent_norms(network.module):
            causes = vanishing_scores.with_silent(
                causes, [name for name in lost if name in silent - small.keys()], parameters
            )
    remedy = _remedy(scope, None if only_round is not None else bool(network.reached))
    described = _described(
        network, parameters, found, history, indices[0], disagreements, causes, zeros, others, remedy, last_scores
    )
    return replace(described, unreached=unreached if network.reached and only_round is None else ())


def _small(network: Network, masks: Masks) -> dict[str, float]:
    """Name the parameters that are near or exactly 0 throughout though they are not pruned, with their largest."""
    if network.is_sharded:
        return {}
    largest = {name: torch.linalg.vector_norm(weight, torch.inf).item() for name, weight in network.weights.items()}
    return {name: size for name, size in largest.items() if size <= vanishing_scores.TINY and masks[name].any()}


def _causes(network: Network, method: Method, small: Mapping[str, float], lost: Sequence[str]) -> Causes:
    """Find factors near 0 that took the scores of lost parameters away."""
    if not lost:
        return Causes()
    known = _silent_norms(network.module)
    try:
        network.stand_still()
        return vanishing_scores.causes(
            network.module, network.weights, small, lost, known, lambda: method.score(network)
        )
    except (ValueError, RuntimeError):  # of a loss with 1 in place of 1e-6, which may be infinite: the masks are there
        return Causes()


@dataclass
class _History:
    """What is noted of every round."""

    rankings: Mapping[str, selection.Ranking] = field(default_factory=dict)
    """Those of the last round."""
    thresholds: list[float | None] = field(default_factory=list)
    """The lowest score that each round kept; ``None`` where there were several rankings."""
    counts: list[Iterable[int]] = field(default_factory=list)
    """How many weights every parameter had before each round."""
    cuts: list[list[str]] = field(default_factory=list)
    """Where the cut of each round fell inside exact zeros."""
    zeros_stay: bool = True
    """Whether no score that was zero is known to have been higher with a later batch."""

    def add(self, rankings: Mapping[str, selection.Ranking], alive: Iterable[int], cuts: list[str]) -> None:
        for name, before in self.rankings.items():
            if before.threshold == 0 and name in rankings:
                now = rankings[name]
                self.zeros_stay &= now.num_above + now.num_tied * (now.threshold > 0) <= before.num_above
        self.rankings = rankings
        self.thresholds.append(rankings[""].threshold if "" in rankings else None)
        self.counts.append(alive)
        self.cuts.append(cuts)

    @property
    def remarks(self) -> list[str]:
        """The cuts that position decided, in one text; a zero that stays one goes before all others in later rounds."""
        cuts = [text for texts in (self.cuts[-1:] if self.zeros_stay else self.cuts) for text in texts]
        more = f" This happened {len(cuts)} times." if len(cuts) > 1 else ""
        return [f"{text}{more}" for text in cuts[:1]]


def _described(
    network: Network,
    parameters: Mapping[str, nn.Parameter],
    masks: Masks,
    history: _History,
    first_round: int,
    disagreements: Sequence[str],
    causes: Causes,
    zeros: Collection[str],
    others: Sequence[str],
    remedy: str,
    last_scores: ScoreHistogram | None,
) -> Found:
    """Say what there is to know about the masks that were found."""
    way, path_error = _passage(network)
    active, unknown, path_error = (None, [], path_error) if way is None else _active(network.module, masks, way)
    measured = measure(network.module, parameters, way, masks)
    troubles = [*history.remarks, *_collapses(masks, active, causes.explained, remedy)]
    if troubles and network.reached and not network.is_sharded:
        troubles.extend(_silence(_silent_norms(network.module)))
    troubles.extend([*causes.remarks, *vanishing_scores.dead_pairs(masks, zeros), *_unknown_paths(unknown)])
    with function_modes.set_aside():
        counts = [*history.counts, counting.count_each(masks.values())]
    return Found(
        masks,
        active,
        path_error,
        [*network.warnings, *disagreements, *troubles, *_dense_parts(network.module, masks, others, measured)],
        removed_by_round(first_round, history.thresholds, counts),
        last_scores,
        measured,
    )


def check_settings(sparsity: float, schedule: str, scope: str) -> tuple[float, Schedule, Scope]:
    """Return settings in plain types, and raise for those that no module could be pruned with.

    Args:
        sparsity: Fraction removed, in ``[0, 1)``.
        schedule: ``"exponential"`` or ``"linear"``.
        scope: ``"global"`` or ``"layerwise"``.

    Raises:
        TypeError: If ``sparsity`` is not a number.
        ValueError: If it is out of range, or a choice is not one.

    """
    fraction = schedules.check_sparsity(sparsity)
    return fraction, check_choice("schedule", schedule, Schedule), check_choice("scope", scope, Scope)


def _starting_masks(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor] | None, sparsity: float
) -> Masks:
    """Give the masks to start from: this rank's part of each."""
    if not masks:
        return Masks(
            {name: torch.ones_like(shards.local(value), dtype=torch.bool) for name, value in parameters.items()}
        )
    if masks.keys() != parameters.keys():
        different = listed(sorted(masks.keys() ^ parameters.keys()))
        raise ValueError(
            f"`masks` must cover exactly the prunable parameters, but {different} is in only one of the two:"
            " check `include`, `exclude` and what is frozen. What an earlier search left out, since nothing depends on"
            " it, goes in `exclude`."
        )
    start = Masks(masks)
    start.parameters_of(module)  # or an error that names the shape that differs
    if start.num_kept < schedules.num_kept(start.num_prunable, 1 - sparsity):
        raise ValueError(
            f"`masks` already have sparsity {start.sparsity:g}, more than the `sparsity` of {sparsity:g} asked for, and"
            " a pruned weight never returns."
        )
    return Masks({name: shards.part(masks[name], of=value).to(value.device) for name, value in parameters.items()})


def _mask_(weights: Mapping[str, Tensor], masks: Masks) -> None:
    zeroing.zero_(weights, masks)


def _prune(
    scores: dict[str, Tensor],
    masks: Masks,
    sizes: Mapping[str, int],
    density: float,
    scope: str,
    holders: Ranks,
    *,
    zeros: Sequence[str],
) -> tuple[Masks, dict[str, selection.Ranking], dict[str, int]]:
    """Do one cut: keep the highest of the survivors, counted from all prunable weights; say how many there were."""
    alive = dict(zip(masks, counting.count_each(masks.values(), holders), strict=True))
    own = alive if holders.size == 1 else None
    if scope == "global":
        num_kept = min(schedules.num_kept(sum(sizes.values()), density), sum(alive.values()))
        rankings = {"": selection.keep_highest(scores, num_kept, masks, holders, num_alive=own)}
    else:
        counts = {name: min(schedules.num_kept(sizes[name], density), left) for name, left in alive.items() if left}
        ranked = {name: scores[name] for name in counts}
        rankings = selection.keep_highest_each(ranked, counts, masks, holders, num_alive=own)
    found = Masks({**masks, **{name: mask for each in rankings.values() for name, mask in each.masks.items()}})
    prunes = sum(each.num_kept for each in rankings.values()) < sum(alive.values())
    if prunes and all(each.num_above == 0 and each.threshold == 0 for each in rankings.values()):
        raise ValueError(
            "Every score is zero, so there is nothing to rank: the weights or all their gradients are zero."
            f" {_why_zero(masks, zeros)}"
        )
    return found, rankings, alive


def _why_zero(masks: Masks, zeros: Collection[str]) -> str:
    """Name what makes all scores zero, as far as it is known."""
    names = [name for name in masks if name in zeros]
    if not names:
        return "Check that the loss depends on the weights and that no layer is initialised with zeros."
    pairs = " ".join(vanishing_scores.dead_pairs(masks, zeros))
    return (
        f"The weights of {listed(map(repr, names), most=3)} are 0 throughout, so those in front of them have no"
        f" gradient. Initialise them with other values, or prune after a warm-up. {pairs}".rstrip()
    )


def _agreed(masks: Masks, ranks: Ranks) -> tuple[Masks, list[str]]:
    """Give all ranks the masks of the first, and say so if they were not the same anyway."""
    if ranks.size == 1:
        return masks, []
    first = Masks.from_state_dict(ranks.broadcast(masks.state_dict() if ranks.index == 0 else {}))
    agreed = Masks({name: mask.to(masks[name].device) for name, mask in first.items()})
    differ = ranks.gather(torch.tensor(agreed.digest() != masks.digest())).nonzero().flatten().tolist()
    if not differ:
        return agreed, []
    return agreed, [
        f"Rank {listed(differ)} found other masks than rank 0, whose masks all of them have now: the weights differ"
        " between ranks. Something changes them on one rank alone, such as a random initialisation after `setup`."
    ]


def _cuts_in_zeros(rankings: Mapping[str, selection.Ranking], round_index: int, reads_batches: bool) -> Iterator[str]:
    always = "Layers that start at zero, and kernel taps that only ever see padding, have such scores."
    fewer = "Larger batches, more `batches_per_round` or a longer warm-up give fewer zeros."
    hint = f"{always} {fewer}" if reads_batches else always
    for name, each in rankings.items():
        if each.threshold == 0 and each.num_above + each.num_tied > each.num_kept:
            where = f" in {name!r}" if name else ""
            yield (
                f"In round {round_index} only {each.num_above:,} weights{where} had a score above zero, fewer than the"
                f" {each.num_kept:,} to keep: the cut fell inside exact zeros, and the rest was kept by position."
                f" {hint}"
            )


def _silent_norms(module: nn.Module) -> list[str]:
    """Name the scales of norms that let nothing through, since they are 0."""
    return [
        f"{name}.weight" if name else "weight"
        for name, layer in module.named_modules()
        if isinstance(layer, _NORMS) and layer.weight is not None and not layer.weight.any()
    ]


def _silence(scales: Sequence[str]) -> Iterator[str]:
    """Say what norms that let nothing through do to scores."""
    if scales:
        yield (
            f"The scale of {listed(map(repr, scales), most=3)} is 0 throughout, as some libraries initialise residual"
            " branches: all weights in front of it score 0. Initialise it with 1 (timm: `zero_init_last=False`), or"
            " prune after a warm-up."
        )


def _passage(network: Network) -> tuple[Passage | None, str | None]:
    """Find the way of data through the network, or say why there is none."""
    try:
        return (None if network.is_sharded else network.passage()), None
    except Exception as error:  # the user's own batches, or a lack of them
        return None, str(error)


def _active(module: nn.Module, masks: Masks, way: Passage) -> tuple[Masks | None, list[str], str | None]:
    """Find the weights on input-output paths and name parameters of which nothing is known; or say why there are none.

    In eval mode, unless there is more on paths in train mode: detection models choose among boxes then.
    """
    found: list[tuple[list[str], Masks]] = []
    errors = []
    for mode in _MODES:
        try:
            with in_mode(module, mode):
                active, unknown = _followed(module, masks, way)
        except Exception as error:  # the module's own `forward`, called in a way it may not be made for
            could_help = way.is_guess and "cannot be followed" not in str(error)
            remedy = " Set `example_input_array` on the module to what `forward` takes." if could_help else ""
            errors.append(f"{way.source}: {shown_error(error)}.{remedy}")
            continue
        found.append((unknown, active))
        if not unknown:
            break
    if not found:
        return None, [], errors[0]
    unknown, active = min(found, key=lambda each: len(each[0]))
    return active, unknown, None


def _followed(module: nn.Module, masks: Masks, way: Passage) -> tuple[Masks, list[str]]:
    """Find the weights on paths; all that are kept count where not even the dense network has a path."""
    active = synflow.active_masks(module, masks, way)
    lost = [name for name, mask in masks.items() if mask.any() and not active[name].any()]
    if not lost:
        return Masks(active), []
    dense = synflow.active_masks(module, {name: torch.ones_like(mask) for name, mask in masks.items()}, way)
    if not any(mask.any() for mask in dense.values()):
        raise ValueError("Nothing that is sent into the network arrives at what it returns, not even without masks.")
    unknown = [name for name in lost if not dense[name].any()]
    return Masks({**active, **{name: masks[name] for name in unknown}}), unknown


def _unknown_paths(names: Sequence[str]) -> Iterator[str]:
    if names:
        yield (
            f"No path through {listed(map(repr, names), most=4)} was found even without masks: what is sent through the"
            " network to find paths does not arrive there, or not from there at the end. All that is kept there counts"
            " as active in the effective sparsity."
        )


def _dense_parts(module: nn.Module, masks: Masks, others: Sequence[str], measured: Costs) -> Iterator[str]:
    """Warn of zeros that do not stay zeros, and of a sparsity that is that of a small part."""
    if measured.dense_again:
        names = measured.dense_again
        yield (
            f"{listed(map(repr, names))} {'is' if len(names) == 1 else 'are'} not what the network multiplies with: it"
            " computes other weights from them (standardised or centred ones, or with something added, say), which are"
            f" not 0 where the masks prune. Leave them out with `exclude={[*names]}`, or let the layer compute with a"
            " weight whose zeros stay zeros."
        )
    matrices = {name: parameter for name, parameter in module.named_parameters() if name in others}
    sizes = {name: parameter.numel() for name, parameter in matrices.items()}
    dense = sum(sizes.values())
    if dense <= masks.num_prunable:
        return
    share = masks.num_prunable / (masks.num_prunable + dense)
    largest = sorted(sizes, key=lambda name: -sizes[name])  # stable
    inclusion = _inclusion(masks, largest, [name for name in largest if matrices[name].is_complex()], measured)
    yield (
        f"Only {share:.1%} of the weights in matrices are prunable, so a sparsity of {masks.sparsity:.1%} is"
        f" {masks.sparsity * share:.1%} of all of them. The largest that stay dense are"
        f" {listed((f'{name!r} ({sizes[name]:,})' for name in largest), most=3)}.{inclusion}"
    )


def _inclusion(masks: Masks, dense: Sequence[str], complex_: Sequence[str], measured: Costs) -> str:
    """Say how to prune the matrices that a network multiplies with."""
    multiplied = [name for name in dense if name in measured.in_products and name not in complex_]
    looked_up = [name for name in dense if name not in multiplied]
    if complex_ and not multiplied:
        return " Complex weights cannot be pruned: scores are defined for real ones."
    if not measured.in_products:
        return " Name those that are to be pruned with `include`."
    if not multiplied:
        return " The network does not multiply with them: it looks them up or adds them."
    if not looked_up:
        return ' Prune them, too, with `include=["*"]`.'
    if len(looked_up) <= len(multiplied) + len(masks):
        return f' Prune what the network multiplies with by `include=["*"], exclude={looked_up}`.'
    return f" Prune what the network multiplies with by `include={[*masks, *multiplied]}`."


def _remedy(scope: str, follows_masks: bool | None) -> str:
    """Say what commonly helps against a collapse.

    Args:
        scope: As for :func:`search`.
        follows_masks: Whether scores change with what is pruned, so that more rounds help; ``None``: rounds are cycles
            of training.

    """
    more = "More cycles" if follows_masks is None else "More rounds" if follows_masks else ""
    if scope == "layerwise":
        return f" {more} or a lower `sparsity` commonly help." if more else " A lower `sparsity` commonly helps."
    return f" {f'{more}, a' if more else 'A'} lower `sparsity` or `scope='layerwise'` commonly help."


def _collapses(masks: Masks, active: Masks | None, explained: Collection[str], remedy: str) -> Iterator[str]:
    """Say where nothing is left, and what commonly helps, unless that is explained otherwise."""
    empty = collapsed_layers(masks)
    is_explained = bool(empty) and set(empty) <= set(explained)
    helps = "" if is_explained else remedy
    if empty:
        yield f"Layer collapse: no weight is left in {listed(map(repr, empty))}.{helps}"
    if active is not None and not active.num_kept:
        yield f"The network is cut off: no path from its input to its output is left, so it cannot learn.{helps}"
