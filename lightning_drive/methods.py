"""Methods that score weights: one frozen dataclass per paper, and the network as they see it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_drive import flow, gradients, modes, scores, shards
from lightning_drive.gradients import LossFunction
from lightning_drive.masking import Masks
from lightning_drive.messages import listed
from lightning_drive.ranks import ALONE, Ranks
from lightning_drive.undisturbed import Mode


class Network:
    """The network as a method sees it in one round: masked weights, and gradients on demand.

    Args:
        module: The network.
        parameters: Parameter name to live prunable parameter, pruned entries already 0.
        batches: An endless iterator, or ``None`` where there is no data.
        loss_fn: ``loss_fn(module, batch)`` returns a scalar tensor, or ``None`` where there is no data.
        example_input: An input of the right shape; by default the first tensor of the first batch.
        ranks: Processes that hold the same network, each with batches of its own.

    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batches: Iterable[Any] | None,
        loss_fn: LossFunction | None,
        example_input: Tensor | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.module = module
        self._parameters = parameters
        self._ranks = ranks
        self.is_sharded = any(map(shards.is_sharded, parameters.values()))
        self._batches = None if batches is None else self._watched(gradients.endless(batches))
        self._loss_fn = loss_fn
        self._example_input = example_input
        self.warnings: list[str] = []
        self._flow: flow.SynapticFlow | None = None

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Parameter name to live weights: the parameter, or this rank's part of it."""
        if not self.is_sharded:
            return self._parameters
        return {name: shards.local(parameter) for name, parameter in self._parameters.items()}

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Cut this rank's part out of a tensor in a parameter's full shape.

        Args:
            name: The parameter's name.
            whole: The tensor.

        """
        return shards.part(whole, of=self._parameters[name])

    def shape(self, name: str) -> torch.Size:
        """Give a parameter's full shape.

        Args:
            name: The parameter's name.

        """
        return self._parameters[name].shape

    def loss_gradients(self, num_batches: int) -> dict[str, Tensor]:
        """Sum the loss gradients over the next batches, and average them over the ranks.

        The result is that of one large batch which joins those of all ranks.

        Args:
            num_batches: How many batches to take, at least 1.

        Returns:
            Parameter name to gradient, in float32 or float64; the caller owns it.

        """
        if self._batches is None or self._loss_fn is None:
            missing = "batches" if self._batches is None else "loss_fn"
            raise ValueError(f"This method scores by the gradient of a loss, so it needs `{missing}`, got None.")
        with self._ranks.together():
            batches = islice(self._batches, num_batches)
            found = gradients.loss_gradients(self.module, self._parameters, self._loss_fn, batches)
        if not self.is_sharded:  # else FSDP2 has averaged them
            self._ranks.mean_(found.values())
        with modes.set_aside():
            return {name: scores.in_full(gradient) for name, gradient in found.items()}

    def synaptic_flow(self) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        """Compute the synaptic flow, see :class:`lightning_drive.flow.SynapticFlow`.

        Returns:
            Parameter name to absolute weights and to the gradients of the flow, which the caller owns; and the flow.

        Raises:
            ValueError: If the flow is not defined for much of the network. For a few layers it is a warning.

        """
        if self.is_sharded:
            raise ValueError(
                "SynFlow runs the network with absolute weights, which cannot be put in while they are sharded over"
                " ranks. Use DRIVE or SNIP, or find the masks before `fully_shard`."
            )
        if self._flow is None:
            self._check_flow()
            self._flow = flow.SynapticFlow(self.module, self._parameters)
        found, total = self._flow.gradients(self.example_input())
        return self._flow.weights, found, total

    def _check_flow(self) -> None:
        layers = flow.layers_without_flow(self.module, self.example_input())
        text = (
            f"SynFlow is not defined for {listed(layers, most=3)}: saturating activations stop the flow and"
            " normalisation mixes its signs."
        )
        if len(layers) * 3 > len(self.weights):
            raise ValueError(f"{text} That is too much of this network; use another method, such as DRIVE.")
        if layers:
            self.warnings.append(f"{text} Their neighbours' scores mean little.")

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

    @property
    def known_input(self) -> Tensor | None:
        """An input of the right shape, if one was given or a batch with one was read."""
        return self._example_input

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
        scores.snip_each_([*network.weights.values()], [*found.values()])
        return found


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
        scores.snip_each_([*network.weights.values()], [*found.values()])
        return found


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
        weights, found, total = network.synaptic_flow()
        if total == 0 or not any(gradient.any() for gradient in found.values()):
            cause = " ".join(network.warnings) or (
                "A layer is zero-initialised or empty, or the input is integer-valued; start from weights that are not"
                " zero, for example after a warm-up."
            )
            where = "no signal reaches the output" if total == 0 else "but it does not depend on any weight"
            raise ValueError(f"The synaptic flow R is {total:g}: {where}. {cause}")
        with modes.set_aside():
            return {name: scores.synflow(weight, found[name], out=found[name]) for name, weight in weights.items()}


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
        like: Keep as many weights of every parameter as these masks do, where ``sparsity`` and scope are theirs, too;
            the same as :meth:`Masks.shuffled`. By default all weights have the same chance.

    """

    rounds: int = 1
    seed: int = 0
    like: Masks | None = field(default=None, repr=False, hash=False)
    mode: ClassVar[Mode] = "eval"

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)

    def score(self, network: Network) -> dict[str, Tensor]:
        """Score by uniform random numbers drawn on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        found = {
            name: network.part(name, torch.rand(network.shape(name), generator=generator)).to(weight.device)
            for name, weight in network.weights.items()
        }
        if self.like is None:
            return found
        if self.like.keys() != network.weights.keys():
            different = listed(sorted(self.like.keys() ^ network.weights.keys()))
            raise ValueError(
                f"`like` must cover exactly the prunable parameters, but {different} is in only one of the two."
            )
        self.like.parameters_of(network.module)  # or an error that names the shape that differs
        preferred = self.like.shuffled(generator)
        return {name: score + network.part(name, preferred[name]).to(score.device) for name, score in found.items()}


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
