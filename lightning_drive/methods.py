"""Methods that find masks: one frozen dataclass per paper, and the loop over rounds that they share."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_drive import flow, gradients, prunable, ranking, schedules, scores
from lightning_drive import sparsity as measures
from lightning_drive.gradients import LossFunction, Mode
from lightning_drive.masking import Masks
from lightning_drive.schedules import Schedule

Scope: TypeAlias = Literal["global", "layerwise"]


class Network:
    """The network as a method sees it in one round: masked weights, and gradients on demand.

    Args:
        module: The network.
        weights: Parameter name to live prunable parameter, pruned entries already 0.
        batches: An endless iterator, or ``None`` where there is no data.
        loss_fn: ``loss_fn(module, batch)`` returns a scalar tensor, or ``None`` where there is no data.
        example_input: An input of the right shape; by default the first tensor of the first batch.

    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, nn.Parameter],
        batches: Iterable[Any] | None,
        loss_fn: LossFunction | None,
        example_input: Tensor | None,
    ) -> None:
        self.module = module
        self.weights = weights
        self._batches = None if batches is None else self._watched(gradients.endless(batches))
        self._loss_fn = loss_fn
        self._example_input = example_input
        self.warnings: list[str] = []
        self._flow_is_defined: bool | None = None

    def loss_gradients(self, num_batches: int) -> dict[str, Tensor]:
        """Sum the loss gradients over the next batches.

        Args:
            num_batches: How many batches to take, at least 1.

        Returns:
            Parameter name to gradient; the caller owns it.

        """
        if self._batches is None or self._loss_fn is None:
            missing = "batches" if self._batches is None else "loss_fn"
            raise ValueError(f"This method scores by the gradient of a loss, so it needs `{missing}`, got None.")
        batches = islice(self._batches, num_batches)
        return gradients.loss_gradients(self.module, self.weights, self._loss_fn, batches)

    def synaptic_flow(self) -> tuple[dict[str, Tensor], float]:
        """Compute the gradients of the synaptic flow, and the flow; see :func:`lightning_drive.flow.synaptic_flow`.

        Raises:
            ValueError: If the flow is not defined for much of the network. For a few layers it is a warning.

        """
        if self._flow_is_defined is None:
            self._flow_is_defined = self._check_flow()
        return flow.synaptic_flow(self.module, self.weights, self.example_input())

    def _check_flow(self) -> bool:
        layers = flow.layers_without_flow(self.module, self.example_input())
        text = (
            f"SynFlow is not defined for {', '.join(layers)}: saturating activations stop the flow and normalisation"
            " mixes its signs."
        )
        if len(layers) * 3 > len(self.weights):
            raise ValueError(f"{text} That is too much of this network; use another method, such as DRIVE.")
        if layers:
            self.warnings.append(f"{text} Their neighbours' scores mean little.")
        return not layers

    def example_input(self) -> Tensor:
        """Give an input of the right shape, on the device of the weights.

        Raises:
            ValueError: If none was given and there is no batch with a tensor to take it from.

        """
        if self._example_input is None and self._batches is not None:
            next(self._batches)
        if self._example_input is None:
            raise ValueError("The shape of the input is not known: give `example_input` or `batches` with a tensor.")
        return self._example_input.to(next(iter(self.weights.values())).device)

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if self._example_input is None:
                self._example_input = flow.first_tensor(batch)
            yield batch


@runtime_checkable
class Method(Protocol):
    """What a pruning method is: a number of rounds, a mode for the module, and a score."""

    @property
    def rounds(self) -> int:
        """How many score-and-mask rounds, at least 1."""

    @property
    def mode(self) -> Mode:
        """The mode of the module while it is scored."""

    def score(self, network: Network) -> dict[str, Tensor]:
        """Score every prunable weight once, higher is kept.

        Args:
            network: The network with what is pruned so far.

        Returns:
            Parameter name to non-negative finite scores in the parameter's shape.

        """


@dataclass(frozen=True, kw_only=True)
class DRIVE:
    """DRIVE, "Dual Gradient-Based Rapid Iterative Pruning" (Saikumar & Varghese, 2024, Algorithm 1).

    Meant for a network that has trained densely for a few epochs. See :func:`lightning_drive.scores.drive`.

    Args:
        rounds: Number of rounds :math:`N`, at least 1.
        batches_per_round: Batches whose gradients are summed in each round, at least 1.
        mode: ``"train"``: BatchNorm uses batch statistics while scoring; ``"eval"``: running statistics.

    """

    rounds: int = 100
    batches_per_round: int = 1
    mode: Mode = "train"

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)
        check_count("batches_per_round", self.batches_per_round)
        check_choice("mode", self.mode, Mode)

    def score(self, network: Network) -> dict[str, Tensor]:
        """Score by :func:`lightning_drive.scores.drive` on the next batches."""
        found = network.loss_gradients(self.batches_per_round)
        return {name: scores.drive(weight, found.pop(name)) for name, weight in network.weights.items()}


@dataclass(frozen=True, kw_only=True)
class SNIP:
    """SNIP, single-shot network pruning by connection sensitivity (Lee et al., 2019).

    Args:
        rounds: Number of rounds: 1 is the paper's single shot, more is iterative SNIP.
        batches_per_round: Batches whose gradients are summed in each round, at least 1.
        mode: ``"train"``: BatchNorm uses batch statistics while scoring; ``"eval"``: running statistics.

    """

    rounds: int = 1
    batches_per_round: int = 1
    mode: Mode = "train"

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)
        check_count("batches_per_round", self.batches_per_round)
        check_choice("mode", self.mode, Mode)

    def score(self, network: Network) -> dict[str, Tensor]:
        """Score by :func:`lightning_drive.scores.snip` on the next batches."""
        found = network.loss_gradients(self.batches_per_round)
        return {name: scores.snip(weight, found.pop(name)) for name, weight in network.weights.items()}


@dataclass(frozen=True, kw_only=True)
class SynFlow:
    """SynFlow, iterative synaptic flow pruning (Tanaka et al., 2020, Algorithm 1): no data, only the input's shape.

    Args:
        rounds: Number of rounds, at least 1.

    """

    rounds: int = 100
    mode: ClassVar[Mode] = "eval"

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)

    def score(self, network: Network) -> dict[str, Tensor]:
        """Score by :func:`lightning_drive.scores.synflow` in float64."""
        found, total = network.synaptic_flow()
        if total == 0:
            raise ValueError(
                "The synaptic flow R is 0: no signal reaches the output. A layer is zero-initialised or empty, or the"
                " input is integer-valued; start from weights that are not zero, for example after a warm-up."
            )
        return {name: scores.synflow(weight.detach(), found.pop(name)) for name, weight in network.weights.items()}


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Magnitude pruning, the criterion of IMP (Frankle & Carbin, 2019): no data.

    Args:
        rounds: Number of rounds, at least 1. Weights stand still, so more than one changes nothing but rounding.

    """

    rounds: int = 1
    mode: ClassVar[Mode] = "eval"

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)

    def score(self, network: Network) -> dict[str, Tensor]:
        """Score by :func:`lightning_drive.scores.magnitude`."""
        return {name: scores.magnitude(weight) for name, weight in network.weights.items()}


@dataclass(frozen=True, kw_only=True)
class Random:
    """Random pruning, the control every method must beat: no data, the same masks on every device.

    Args:
        rounds: Number of rounds, at least 1. Scores are the same in each.
        seed: Seed of the scores; the global random state is neither used nor changed.

    """

    rounds: int = 1
    seed: int = 0
    mode: ClassVar[Mode] = "eval"

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)

    def score(self, network: Network) -> dict[str, Tensor]:
        """Score by uniform random numbers drawn on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: torch.rand(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
            for name, weight in network.weights.items()
        }


@dataclass(frozen=True)
class Found:
    """The outcome of a search: masks, and what there is to know about them."""

    masks: Masks
    active: Masks | None
    """The kept weights on an input-output path; ``None`` if paths could not be followed."""
    path_error: str | None
    """Why paths could not be followed; ``None`` if they could."""
    warnings: list[str]


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
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
        >>> def loss(module, batch):
        ...     return nn.functional.cross_entropy(module(batch[0]), batch[1])
        >>> masks = find_masks(net, DRIVE(rounds=10), sparsity=0.75, batches=[batch], loss_fn=loss)
        >>> masks.num_kept, masks.num_prunable
        (14, 56)

    """
    found = search(
        module,
        method,
        sparsity=sparsity,
        batches=batches,
        loss_fn=loss_fn,
        masks=masks,
        schedule=schedule,
        scope=scope,
        parameters=prunable.prunable_parameters(module, include, exclude),
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
) -> Found:
    """Find masks and tell what happened: :func:`find_masks` for a caller that warns and reports in its own way.

    The arguments are those of :func:`find_masks`, with the live prunable ``parameters`` by name in place of
    ``include`` and ``exclude``.
    """
    check_settings(method, sparsity, schedule, scope)
    current = _starting_masks(parameters, masks, sparsity)
    start = min(current.sparsity, sparsity)  # rounding may have taken one weight more
    network = Network(module, parameters, batches, loss_fn, example_input)
    cuts: list[str] = []
    with gradients.undisturbed(module, method.mode):
        current.apply_(module)
        for index in range(1, method.rounds + 1):
            density = schedules.SCHEDULES[schedule](index, method.rounds, sparsity, start)
            current, rankings = _prune(method.score(network), current, density, scope)
            current.apply_(module)
            cuts.extend(_cuts_in_zeros(rankings, index))
            if on_round is not None:
                on_round(index, current)
    if len(cuts) > 1:
        cuts[:] = [f"{cuts[0]} This happened {len(cuts)} times."]
    active, path_error = _active(network, current)
    return Found(current, active, path_error, [*network.warnings, *cuts, *_collapses(current, active)])


def check_settings(method: Method, sparsity: float, schedule: str, scope: str) -> None:
    """Refuse settings that no module could be pruned with.

    Args:
        method: An instance of a method.
        sparsity: Fraction removed, in ``[0, 1)``.
        schedule: ``"exponential"`` or ``"linear"``.
        scope: ``"global"`` or ``"layerwise"``.

    Raises:
        TypeError: If the method is not an instance of a method, or ``sparsity`` not a number.
        ValueError: If ``sparsity`` is out of range or a choice is not one.

    """
    if isinstance(method, type) or not isinstance(method, Method):
        raise TypeError(f"`method` must be an instance of a method, such as `DRIVE(rounds=100)`, got {method!r}.")
    schedules.check_sparsity(sparsity)
    check_choice("schedule", schedule, Schedule)
    check_choice("scope", scope, Scope)


def with_fewer_rounds(method: Method, most: int) -> Method:
    """Give the method with at most so many rounds.

    Args:
        method: A dataclass of settings.
        most: The most rounds, at least 1.

    """
    return replace(method, rounds=min(method.rounds, most))  # type: ignore[type-var]


def check_choice(argument: str, value: object, choices: Any) -> None:
    """Refuse a value that is not one of a ``Literal``'s choices.

    Args:
        argument: The argument's name, for the message.
        value: What was given.
        choices: The ``Literal`` type.

    Raises:
        ValueError: If it is none of them.

    """
    if value not in get_args(choices):
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}.")


def check_count(argument: str, value: object, *, least: int = 1) -> None:
    """Refuse what is not a whole number of at least ``least``.

    Args:
        argument: The argument's name, for the message.
        value: What was given.
        least: The lowest value allowed.

    Raises:
        ValueError: If it is not.

    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{argument}` must be a whole number of at least {least}, got {value!r}.")


def _starting_masks(
    parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor] | None, sparsity: float
) -> Masks:
    if not masks:
        return Masks({name: torch.ones_like(value, dtype=torch.bool) for name, value in parameters.items()})
    if masks.keys() != parameters.keys():
        different = ", ".join(sorted(masks.keys() ^ parameters.keys()))
        raise ValueError(
            f"`masks` must cover exactly the prunable parameters, but {different} is in only one of the two:"
            " check `include` and `exclude`."
        )
    start = Masks({name: masks[name].to(value.device) for name, value in parameters.items()})
    if start.num_kept < schedules.num_kept(start.num_prunable, 1 - sparsity):
        raise ValueError(
            f"`masks` already have sparsity {start.sparsity:g}, more than the `sparsity` of {sparsity:g} asked for, and"
            " a pruned weight never returns."
        )
    return start


def _prune(
    scores: dict[str, Tensor], masks: Masks, density: float, scope: Scope
) -> tuple[Masks, dict[str, ranking.Ranking]]:
    """Do one cut: keep the highest of the survivors, counted from all prunable weights."""
    if scope == "global":
        num_kept = min(schedules.num_kept(masks.num_prunable, density), masks.num_kept)
        rankings = {"": ranking.keep_highest(scores, num_kept, masks)}
    else:
        alive = {name: mask for name, mask in masks.items() if mask.any()}
        counts = {
            name: min(schedules.num_kept(mask.numel(), density), int(mask.count_nonzero()))
            for name, mask in alive.items()
        }
        rankings = ranking.keep_highest_each({name: scores[name] for name in alive}, counts, alive)
    found = Masks({**masks, **{name: mask for each in rankings.values() for name, mask in each.masks.items()}})
    if all(each.num_above == 0 and each.threshold == 0 for each in rankings.values()) and found != masks:
        raise ValueError(
            "Every score is zero, so there is nothing to rank: the weights or all their gradients are zero. Check that"
            " the loss depends on the weights and that no layer is initialised with zeros."
        )
    return found, rankings


def _cuts_in_zeros(rankings: Mapping[str, ranking.Ranking], round_index: int) -> Iterator[str]:
    for name, each in rankings.items():
        kept = measures.num_kept(each.masks)
        if each.threshold == 0 and each.num_above + each.num_tied > kept:
            where = f" in {name!r}" if name else ""
            yield (
                f"In round {round_index} only {each.num_above:,} weights{where} had a score above zero, fewer than the"
                f" {kept:,} to keep: the cut fell inside exact zeros, and the rest was kept by position."
            )


def _active(network: Network, masks: Masks) -> tuple[Masks | None, str | None]:
    """Find the weights on input-output paths, or say why that could not be done."""
    try:
        with gradients.undisturbed(network.module, "eval"):
            return Masks(flow.active_masks(network.module, masks, network.example_input())), None
    except Exception as error:  # the module's own `forward`, called in a way it may not be made for
        return None, f"{type(error).__name__}: {error}"


def _collapses(masks: Masks, active: Masks | None) -> Iterator[str]:
    """Say where nothing is left, and what commonly helps."""
    helps = "More rounds, a lower `sparsity` or `scope='layerwise'` commonly help."
    empty = measures.collapsed_layers(masks)
    if empty:
        yield f"Layer collapse: no weight is left in {', '.join(map(repr, empty))}. {helps}"
    if active is not None and not active.num_kept:
        yield f"The network is cut off: no path from its input to its output is left, so it cannot learn. {helps}"
