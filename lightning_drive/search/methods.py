"""Methods that score weights: one frozen dataclass per paper."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from lightning_drive.core import function_modes, scores
from lightning_drive.core.arguments import Mode, check_choice, check_count
from lightning_drive.core.messages import listed, shown
from lightning_drive.network.masks import Masks
from lightning_drive.search.scored_network import Network

Reads: TypeAlias = Literal["loss", "shape", "weights"]
"""What a method scores by: gradients of a loss on batches, the shape of the input, or the weights alone."""


@runtime_checkable
class Method(Protocol):
    """A pruning method: any object with a number of rounds, a mode for the module, and a score.

    A method may also have an attribute ``reads``, which says what it needs: ``"loss"`` if it scores by a loss on
    batches, ``"shape"`` if by the shape of the input, ``"weights"`` if by the weights alone. What is missing is then
    found before training, and the plan has the costs. Without it, a method with ``batches_per_round``, the number of
    batches that it takes in each round, is taken for one that reads a loss, and any other for one that reads the
    weights alone.
    """

    @property
    def rounds(self) -> int:
        """The number of rounds of score, cut and mask, at least 1."""

    @property
    def mode(self) -> Mode:
        """The mode of the module while it is scored, ``"train"`` or ``"eval"``; Dropout is off in both."""

    def score(self, network: Network) -> dict[str, Tensor]:
        """Score every prunable weight; the highest scores are kept.

        Args:
            network: The network, with the masks of earlier rounds on it.

        Returns:
            The scores of each parameter in ``network.weights`` by its name: a tensor in the shape of the weights and
                on their device. Its numbers are finite and have any sign; -0 equals 0. They are compared exactly, in
                float64 if any are float64, ``int32`` or ``int64`` (below 2**53 in size), else in float32. Pruned
                weights may have any score: they do not return.

        """


@dataclass(frozen=True, kw_only=True)
class DRIVE:
    """DRIVE, "Dual Gradient-Based Rapid Iterative Pruning" (Saikumar & Varghese, 2024, Algorithm 1).

    Meant for a network that has trained densely for a few epochs. See :func:`lightning_drive.core.scores.drive`.

    Args:
        rounds: Number of rounds :math:`N`, at least 1.
        batches_per_round: Batches whose gradients are summed in each round, at least 1.
        mode: ``"train"``: BatchNorm uses batch statistics while scoring; ``"eval"``: running statistics.

    """

    rounds: int = 100
    batches_per_round: int = 1
    mode: Mode = "train"
    reads: ClassVar[Reads] = "loss"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds", check_count("rounds", self.rounds))
        object.__setattr__(self, "batches_per_round", check_count("batches_per_round", self.batches_per_round))
        object.__setattr__(self, "mode", check_choice("mode", self.mode, Mode))

    def score(self, network: Network) -> dict[str, Tensor]:
        """Score by :func:`lightning_drive.core.scores.drive` on the next batches."""
        gradients = network.loss_gradients(self.batches_per_round)
        scores.snip_each_([*network.weights.values()], [*gradients.values()])  # written over the gradients
        return gradients


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
    reads: ClassVar[Reads] = "loss"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds", check_count("rounds", self.rounds))
        object.__setattr__(self, "batches_per_round", check_count("batches_per_round", self.batches_per_round))
        object.__setattr__(self, "mode", check_choice("mode", self.mode, Mode))

    def score(self, network: Network) -> dict[str, Tensor]:
        """Score by :func:`lightning_drive.core.scores.snip` on the next batches."""
        gradients = network.loss_gradients(self.batches_per_round)
        scores.snip_each_([*network.weights.values()], [*gradients.values()])  # written over the gradients
        return gradients


@dataclass(frozen=True, kw_only=True)
class SynFlow:
    """SynFlow, iterative synaptic flow pruning (Tanaka et al., 2020, Algorithm 1): no data, only the input's shape.

    Args:
        rounds: Number of rounds, at least 1.

    """

    rounds: int = 100
    mode: ClassVar[Mode] = "eval"
    reads: ClassVar[Reads] = "shape"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds", check_count("rounds", self.rounds))

    def score(self, network: Network) -> dict[str, Tensor]:
        """Score by :func:`lightning_drive.core.scores.synflow` in float64."""
        weights, flows, total = network.synaptic_flow()
        if total == 0 or not any(flow.any() for flow in flows.values()):
            cause = " ".join(network.warnings) or (
                "A layer is zero-initialised or empty, or the input is integer-valued; start from weights that are not"
                " zero, for example after a warm-up."
            )
            where = "no signal reaches the output" if total == 0 else "but it does not depend on any weight"
            raise ValueError(f"The synaptic flow R is {total:g}: {where}. {cause}")
        with function_modes.set_aside():
            return {name: scores.synflow(weight, flows[name], out=flows[name]) for name, weight in weights.items()}


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Magnitude pruning, the criterion of IMP (Frankle & Carbin, 2019): no data.

    Args:
        rounds: Number of rounds, at least 1. The weights do not change between rounds, so only rounding depends on it.

    """

    rounds: int = 1
    mode: ClassVar[Mode] = "eval"
    reads: ClassVar[Reads] = "weights"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds", check_count("rounds", self.rounds))

    def score(self, network: Network) -> dict[str, Tensor]:
        """Score by :func:`lightning_drive.core.scores.magnitude`."""
        return {name: scores.magnitude(weight) for name, weight in network.weights.items()}


@dataclass(frozen=True, kw_only=True)
class Random:
    """Random pruning, the control that every method must beat: no data, and the same masks on every device.

    Args:
        rounds: Number of rounds, at least 1. Scores are the same in each.
        seed: Seed of the scores; the global random state is neither used nor changed.
        like: Masks; keep as many weights of every parameter as they do, if ``sparsity`` and scope are theirs as well:
            the same as :meth:`Masks.shuffled`. Default: all weights have the same chance.

    """

    rounds: int = 1
    seed: int = 0
    like: Masks | None = field(default=None, repr=False, hash=False)
    mode: ClassVar[Mode] = "eval"
    reads: ClassVar[Reads] = "weights"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds", check_count("rounds", self.rounds))
        object.__setattr__(self, "seed", check_count("seed", self.seed, least=None))

    def score(self, network: Network) -> dict[str, Tensor]:
        """Score by uniform random numbers drawn on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        uniform = {
            name: network.part(name, torch.rand(network.shape(name), generator=generator)).to(weight.device)
            for name, weight in network.weights.items()
        }
        if self.like is None:
            return uniform
        if self.like.keys() != network.weights.keys():
            different = listed(sorted(self.like.keys() ^ network.weights.keys()))
            raise ValueError(
                f"`like` must cover exactly the prunable parameters, but {different} is in only one of the two."
            )
        self.like.parameters_of(network.module)  # raises an error that names a shape that differs
        preferred = self.like.shuffled(generator)
        return {name: score + network.part(name, preferred[name]).to(score.device) for name, score in uniform.items()}


def check_method(method: Method) -> None:
    """Raise TypeError if something is no method, or ValueError if an attribute of it has a wrong value."""
    given: Any = method
    if isinstance(given, type) or not isinstance(given, Method):
        lacks = [repr(name) for name in ("rounds", "mode", "score") if not hasattr(given, name)]
        reason = f", which has no {' and no '.join(lacks)}" if 0 < len(lacks) < 3 else ""
        raise TypeError(
            f"`method` must be an instance of a method, such as `DRIVE(rounds=100)`, got {given!r}{reason}."
        )
    if not callable(given.score):
        raise TypeError(f"`score` must be a function `score(network)`, got {shown(given.score)}.")
    check_count("rounds", given.rounds)
    check_choice("mode", given.mode, Mode)
    if hasattr(given, "batches_per_round"):
        check_count("batches_per_round", given.batches_per_round)
    reads(method)


def reads(method: Method) -> Reads:
    """Return what a method scores by; raise ValueError if its ``reads`` is not one of the choices."""
    declared = getattr(method, "reads", None)
    if declared is None:
        return "loss" if hasattr(method, "batches_per_round") else "weights"
    choice: Reads = check_choice("reads", declared, Reads)
    return choice


def described(method: Method) -> str:
    """Return a method as it prints; the name of its class if that would be an address in memory."""
    return type(method).__name__ if type(method).__repr__ is object.__repr__ else str(method)


def num_passes(method: Method) -> int:
    """Return the number of forward and backward passes in which a method scores."""
    return 0 if reads(method) == "weights" else method.rounds * getattr(method, "batches_per_round", 1)


def with_fewer_rounds(method: Method, most: int) -> Method:
    """Return the method with at most ``most`` rounds if it is a dataclass with this setting, or else unchanged."""
    settings: Any = method
    if is_dataclass(settings) and any(setting.name == "rounds" and setting.init for setting in fields(settings)):
        return replace(settings, rounds=min(method.rounds, most))  # type: ignore[return-value, type-var]
    return method
