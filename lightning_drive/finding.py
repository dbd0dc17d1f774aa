"""From scores to masks: the rounds that all methods share, and what there is to say about their outcome."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_drive import flow, gradients, masking, modes, prunable, ranking, rounds, schedules, shards
from lightning_drive import sparsity as measures
from lightning_drive.gradients import LossFunction
from lightning_drive.masking import Masks
from lightning_drive.messages import listed
from lightning_drive.methods import Magnitude, Method, Network, Random, check_choice
from lightning_drive.ranks import ALONE, Ranks
from lightning_drive.rounds import Round, ScoreHistogram
from lightning_drive.schedules import Schedule
from lightning_drive.undisturbed import in_mode, undisturbed

Scope: TypeAlias = Literal["global", "layerwise"]

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
    example_input: Tensor | None
    """An input of the right shape; ``None`` if none is known, or if the weights are sharded over ranks."""


def find_masks(
    module: nn.Module,
    method: Method,
    *,
    sparsity: float,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    masks: Mapping[str, Tensor] | None = None,
    schedule: Schedule = "exponential",
    scope: Scope = "global",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    example_input: Tensor | None = None,
    on_round: Callable[[int, Masks], None] | None = None,
) -> Masks:
    """Find which weights of any torch module to keep. The module is left exactly as it was; nothing is pruned yet.

    After round ``n`` of ``N`` exactly ``round(P * density_n)`` of the ``P`` prunable weights are kept (at least 1), a
    pruned weight never returns, and the module's weights stand still: Algorithm 1 of DRIVE and of SynFlow. Weights,
    gradients, buffers, modes and random state are bit for bit as before, also after an error or an interrupt.

    Args:
        module: The network.
        method: ``DRIVE``, ``SNIP``, ``SynFlow``, ``Magnitude`` or ``Random``.
        sparsity: Fraction of the prunable weights to remove, in ``[0, 1)``.
        batches: What ``loss_fn`` takes, read in order, ``method.batches_per_round`` in each round; a finite iterable
            is cycled. ``DRIVE`` and ``SNIP`` need it.
        loss_fn: ``loss_fn(module, batch)`` returns a scalar tensor. ``DRIVE`` and ``SNIP`` need it.
        masks: Continue from these masks, at their sparsity, instead of from the dense network.
        schedule: ``"exponential"`` removes the same fraction of the survivors in every round, ``"linear"`` the same
            number of weights.
        scope: ``"global"``: one ranking for all parameters. ``"layerwise"``: every parameter keeps the same fraction.
        include: Glob patterns over parameter names, see
            :func:`lightning_drive.prunable.prunable_parameters`; default: linear and convolutional weights.
        exclude: Glob patterns over parameter names that stay dense.
        example_input: An input of the right shape, for ``SynFlow`` and for finding input-output paths; by default the
            first tensor of the first batch.
        on_round: Called after every round with its index, from 1, and the masks so far.

    Returns:
        The masks, on the devices of their parameters. ``masks.apply_(module)`` prunes.

    Raises:
        ValueError: If an argument is out of range, nothing is prunable, there is nothing to score on, the loss or a
            score is not finite, every score is zero, or ``masks`` do not fit.
        TypeError: If an argument has the wrong type.

    Warns:
        UserWarning: If the cut falls inside exact zeros, a layer or every input-output path is lost, paths cannot be
            followed, or SynFlow is not defined for a few layers.

    Example:
        >>> from lightning_drive.methods import DRIVE
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
        >>> def loss(module, batch):
        ...     return nn.functional.cross_entropy(module(batch[0]), batch[1])
        >>> masks = find_masks(net, DRIVE(rounds=10), sparsity=0.75, batches=[batch], loss_fn=loss)
        >>> masks.num_kept, masks.num_prunable
        (14, 56)

    """
    check_method(method)
    check_settings(sparsity, schedule, scope)
    shards.reshard_(module)
    names = prunable.prunable_parameters(module, include, exclude)
    with undisturbed(module, method.mode) as scored:
        found = search(
            scored.module,
            method,
            sparsity=sparsity,
            batches=batches,
            loss_fn=loss_fn and gradients.on_replica_only(scored.of(loss_fn), module),
            masks=masks,
            schedule=schedule,
            scope=scope,
            parameters=parameters_by_name(scored.module, names),
            example_input=example_input,
            on_round=on_round,
        )
    if found.path_error and example_input is not None:
        found.warnings.append(f"Input-output paths could not be followed from `example_input`: {found.path_error}")
    for text in found.warnings:
        warnings.warn(text, stacklevel=2)
    return found.masks


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
    example_input: Tensor | None = None,
    on_round: Callable[[int, Masks], None] | None = None,
    only_round: int | None = None,
    shuffle: torch.Generator | None = None,
    ranks: Ranks = ALONE,
) -> Found:
    """Find masks and tell what happened: :func:`find_masks` for a caller that warns and reports in its own way.

    The module is masked and run: give it what :func:`~lightning_drive.undisturbed.undisturbed` yields. The arguments
    are those of :func:`find_masks`, with its prunable ``parameters`` by name in place of ``include`` and ``exclude``,
    and three more: ``only_round`` does a single one of the method's rounds, from the masks
    that those before it left, ``shuffle`` gives the outcome in a random order within each parameter, and ``ranks`` are
    processes that each score their own batches: gradients are averaged over them, and all get the masks of the first.

    Parameters may be split over ranks (FSDP2). Every rank then scores and masks its own part, and only histograms of
    scores are exchanged; masks are put together at the end. ``on_round`` is given this rank's part.
    """
    reads_batches = hasattr(method, "batches_per_round")
    holders = shards.holders(parameters)
    current = _starting_masks(module, parameters, masks, sparsity)
    start = min(Masks(masks).sparsity, sparsity)  # rounding may have taken one weight more
    indices = range(1, method.rounds + 1)
    if only_round is not None:
        start, indices = 0.0, range(only_round, only_round + 1)
    network = Network(module, parameters, batches, loss_fn, example_input, ranks)
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    history = _History()
    with modes.set_aside():
        _mask_(network.weights, current)
    for index in indices:
        density = schedules.SCHEDULES[schedule](index, method.rounds, sparsity, start)
        scores = method.score(network)
        with modes.set_aside():
            current, rankings, alive = _prune(scores, current, sizes, density, scope, holders)
            _mask_(network.weights, current)
            history.add(rankings, alive.values(), list(_cuts_in_zeros(rankings, index, reads_batches)))
        if on_round is not None:
            on_round(index, current)
    joined = Masks({name: shards.joined(mask, of=parameters[name]).clone() for name, mask in current.items()})
    found, disagreements = _agreed(joined if shuffle is None else joined.shuffled(shuffle), ranks)
    reads_gradients = not isinstance(method, (Magnitude, Random))
    return _described(network, found, history, indices[0], disagreements, reads_gradients)


@dataclass
class _History:
    """What is noted of every round."""

    rankings: Mapping[str, ranking.Ranking] = field(default_factory=dict)
    """Those of the last round."""
    thresholds: list[float | None] = field(default_factory=list)
    """The lowest score that each round kept; ``None`` where there were several rankings."""
    counts: list[Iterable[int]] = field(default_factory=list)
    """How many weights every parameter had before each round."""
    cuts: list[list[str]] = field(default_factory=list)
    """Where the cut of each round fell inside exact zeros."""
    zeros_stay: bool = True
    """Whether no score that was zero is known to have been higher with a later batch."""

    def add(self, rankings: Mapping[str, ranking.Ranking], alive: Iterable[int], cuts: list[str]) -> None:
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
    masks: Masks,
    history: _History,
    first_round: int,
    disagreements: Sequence[str],
    reads_gradients: bool,
) -> Found:
    """Say what there is to know about the masks that were found."""
    active, path_error = (None, None) if network.is_sharded else _active(network, masks)
    troubles = [*history.remarks, *_collapses(masks, active)]
    if troubles and reads_gradients and not network.is_sharded:
        troubles.extend(_silent_norms(network.module))
    with modes.set_aside():
        counts = [*history.counts, ranking.count_each(masks.values())]
    return Found(
        masks,
        active,
        path_error,
        [*network.warnings, *disagreements, *troubles],
        rounds.removed_by_round(first_round, history.thresholds, counts),
        rounds.score_histogram(history.rankings.values()),
        None if network.is_sharded else network.known_input,
    )


def parameters_by_name(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Select parameters of a module.

    Args:
        module: The module.
        names: Names as in ``module.named_parameters()``.

    """
    parameters = dict(module.named_parameters())
    return {name: parameters[name] for name in names}


def check_method(method: Method) -> None:
    """Refuse what is not a method.

    Args:
        method: An instance of a method.

    Raises:
        TypeError: If it is not, for example the class itself, or lacks something that a method has (named).

    """
    given: Any = method
    if isinstance(given, type) or not isinstance(given, Method):
        lacks = [repr(name) for name in ("rounds", "mode", "score") if not hasattr(given, name)]
        reason = f", which has no {' and no '.join(lacks)}" if 0 < len(lacks) < 3 else ""
        raise TypeError(
            f"`method` must be an instance of a method, such as `DRIVE(rounds=100)`, got {given!r}{reason}."
        )


def check_settings(sparsity: float, schedule: str, scope: str) -> None:
    """Refuse settings that no module could be pruned with.

    Args:
        sparsity: Fraction removed, in ``[0, 1)``.
        schedule: ``"exponential"`` or ``"linear"``.
        scope: ``"global"`` or ``"layerwise"``.

    Raises:
        TypeError: If ``sparsity`` is not a number.
        ValueError: If it is out of range, or a choice is not one.

    """
    schedules.check_sparsity(sparsity)
    check_choice("schedule", schedule, Schedule)
    check_choice("scope", scope, Scope)


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
            " check `include`, `exclude` and what is frozen."
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
    masking.zero_each_([weights[name] for name in masks], [*masks.values()])


def _prune(
    scores: dict[str, Tensor], masks: Masks, sizes: Mapping[str, int], density: float, scope: str, holders: Ranks
) -> tuple[Masks, dict[str, ranking.Ranking], dict[str, int]]:
    """Do one cut: keep the highest of the survivors, counted from all prunable weights; say how many there were."""
    alive = dict(zip(masks, ranking.count_each(masks.values(), holders), strict=True))
    if scope == "global":
        num_kept = min(schedules.num_kept(sum(sizes.values()), density), sum(alive.values()))
        rankings = {"": ranking.keep_highest(scores, num_kept, masks, holders)}
    else:
        counts = {name: min(schedules.num_kept(sizes[name], density), left) for name, left in alive.items() if left}
        rankings = ranking.keep_highest_each({name: scores[name] for name in counts}, counts, masks, holders)
    found = Masks({**masks, **{name: mask for each in rankings.values() for name, mask in each.masks.items()}})
    prunes = sum(each.num_kept for each in rankings.values()) < sum(alive.values())
    if prunes and all(each.num_above == 0 and each.threshold == 0 for each in rankings.values()):
        raise ValueError(
            "Every score is zero, so there is nothing to rank: the weights or all their gradients are zero. Check that"
            " the loss depends on the weights and that no layer is initialised with zeros."
        )
    return found, rankings, alive


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


def _cuts_in_zeros(rankings: Mapping[str, ranking.Ranking], round_index: int, reads_batches: bool) -> Iterator[str]:
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


def _silent_norms(module: nn.Module) -> Iterator[str]:
    """Name the norms that let nothing through, since their scale is 0, and say what that does to scores."""
    silent = [
        f"'{name}.weight'"
        for name, layer in module.named_modules()
        if isinstance(layer, _NORMS) and layer.weight is not None and not layer.weight.any()
    ]
    if silent:
        yield (
            f"The scale of {listed(silent, most=3)} is 0 throughout, as some libraries initialise residual branches:"
            " all weights in front of it score 0. Initialise it with 1 (timm: `zero_init_last=False`), or prune after"
            " a warm-up."
        )


def _active(network: Network, masks: Masks) -> tuple[Masks | None, str | None]:
    """Find the weights on input-output paths, or say why that could not be done."""
    try:
        with in_mode(network.module, "eval"):
            return Masks(flow.active_masks(network.module, masks, network.example_input())), None
    except Exception as error:  # the module's own `forward`, called in a way it may not be made for
        return None, f"{type(error).__name__}: {error}"


def _collapses(masks: Masks, active: Masks | None) -> Iterator[str]:
    """Say where nothing is left, and what commonly helps."""
    helps = "More rounds, a lower `sparsity` or `scope='layerwise'` commonly help."
    empty = measures.collapsed_layers(masks)
    if empty:
        yield f"Layer collapse: no weight is left in {listed(map(repr, empty))}. {helps}"
    if active is not None and not active.num_kept:
        yield f"The network is cut off: no path from its input to its output is left, so it cannot learn. {helps}"
