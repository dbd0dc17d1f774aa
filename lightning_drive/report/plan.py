"""What pruning will do to a module and what it will cost, said before anything is trained."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_drive.core import schedules
from lightning_drive.core.arguments import Schedule, check_count, check_patterns
from lightning_drive.report import tables

_SHOWN_ROUNDS = 8

_SMALL = "a bias or norm"


@dataclass(frozen=True)
class PlannedParameter:
    """One parameter before pruning.

    Args:
        name: The parameter's name, as in ``module.named_parameters()``.
        shape: Its shape.
        num_weights: How many weights it has.
        stays_dense: Why it is not pruned; empty if it is.

    """

    name: str
    shape: tuple[int, ...]
    num_weights: int
    stays_dense: str = ""


class Intent(NamedTuple):
    """When and how a callback will prune, whatever the module; see :class:`PruningPlan`."""

    method: str
    rounds: int
    passes: int
    pass_over: str
    first_epoch: int
    last_epoch: int
    step: int | None = None
    """Before which global step it will prune; the epochs say nothing then."""

    @property
    def when(self) -> str:
        """When it will prune last, to be put into a sentence."""
        if self.step is not None:
            return f"before step {self.step}"
        return f"at the start of epoch {self.last_epoch} (counted from 0)"


@dataclass(frozen=True)
class PruningPlan:
    """What a callback is going to do.

    Args:
        method: The method's settings.
        parameters: All parameters of the module, prunable or not.
        kept: How many prunable weights are left after each round; in iterative magnitude pruning every cycle has one.
        passes: Forward and backward passes that scoring takes.
        pass_over: What one such pass is over, such as ``"a training batch"``.
        first_epoch: At the start of which epoch the first round is done, or, with a ``first_step``, in which epoch;
            ``None`` if that is not known.
        last_epoch: The same for the last round.
        steps: Training steps of the whole run; ``None`` if that is not known.
        max_epochs: Epochs of the whole run; ``None`` if that is not known.
        first_step: Before which global step all rounds are done; ``None``: at the start of an epoch.

    Example:
        >>> parameters = PlannedParameter("0.weight", (3, 4), 12), PlannedParameter("0.bias", (3,), 3, "a bias or norm")
        >>> print(PruningPlan("SNIP()", parameters, kept=(6,), passes=1, pass_over="a training batch"))
        SNIP() keeps 6 of 12 prunable weights, a sparsity of 50.00%
        of all 15 weights 80.00% are prunable, an overall sparsity of 40.00%
        when: at the start of epoch 0, in 1 round
        weights left after round 1: 6
        parameter  shape  weights              pruned
        0.weight   3x4         12                 yes
        0.bias     3            3  no: a bias or norm
        prunable               12                   -
        costs: 1 forward and backward pass over a training batch

    """

    method: str
    parameters: tuple[PlannedParameter, ...]
    kept: tuple[int, ...]
    passes: int
    pass_over: str
    first_epoch: int | None = 0
    last_epoch: int | None = 0
    steps: int | None = None
    max_epochs: int | None = None
    first_step: int | None = None

    @property
    def num_prunable(self) -> int:
        """How many prunable weights there are."""
        return sum(each.num_weights for each in self.parameters if not each.stays_dense)

    @property
    def num_weights(self) -> int:
        """How many weights there are in all, prunable or not."""
        return sum(each.num_weights for each in self.parameters)

    @property
    def overall_sparsity(self) -> float:
        """Fraction of all weights, prunable or not, that will be removed."""
        return (self.num_prunable - self.kept[-1]) / self.num_weights

    @property
    def share(self) -> float | None:
        """Passes of scoring per training step, of the whole run; ``None`` if its length is not known."""
        return None if self.steps is None else self.passes / self.steps

    def __str__(self) -> str:
        return "\n".join([*self._what(), *tables.plain(list(self._rows())), self._costs()])

    def _what(self) -> Iterator[str]:
        yield (
            f"{self.method} keeps {self.kept[-1]:,} of {self.num_prunable:,} prunable weights, a sparsity of"
            f" {1 - self.kept[-1] / self.num_prunable:.2%}"
        )
        yield (
            f"of all {self.num_weights:,} weights {self.num_prunable / self.num_weights:.2%} are prunable, an overall"
            f" sparsity of {self.overall_sparsity:.2%}"
        )
        rounds = f"{len(self.kept)} round{'s' * (len(self.kept) != 1)}"
        if self.first_step is not None:
            yield f"when: before step {self.first_step}, in {rounds}"
        elif self.last_epoch != self.first_epoch:
            yield f"when: from the start of epoch {self.first_epoch} to that of epoch {self.last_epoch}, in {rounds}"
        else:
            yield f"when: at the start of epoch {self.first_epoch}, in {rounds}"
        places = sorted(
            {round(1 + place * (len(self.kept) - 1) / (_SHOWN_ROUNDS - 1)) for place in range(_SHOWN_ROUNDS)}
        )
        shown = "; ".join(f"{place}: {self.kept[place - 1]:,}" for place in places)
        yield f"weights left after round {shown}"

    def _rows(self) -> Iterator[Sequence[str]]:
        yield "parameter", "shape", "weights", "pruned"
        small = [each for each in self.parameters if each.stays_dense == _SMALL]
        for each in self.parameters:
            if each not in small or len(small) == 1:
                answer = f"no: {each.stays_dense}" if each.stays_dense else "yes"
                yield each.name, "x".join(map(str, each.shape)), f"{each.num_weights:,}", answer
        if len(small) > 1:
            yield f"{len(small)} biases and norms", "", f"{sum(each.num_weights for each in small):,}", "no"
        yield "prunable", "", f"{self.num_prunable:,}", "-"

    def _costs(self) -> str:
        parts = []
        if self.passes:
            parts.append(f"{self.passes:,} forward and backward pass{'es' * (self.passes != 1)} over {self.pass_over}")
        if self.share is not None and self.passes:
            parts[-1] += f", beside {self.steps:,} training steps"
        if self.last_epoch != self.first_epoch:
            of = "" if self.max_epochs is None else f" of {self.max_epochs:,}"
            parts.append(f"{self.last_epoch:,}{of} epochs of training before the last cut")
        return f"costs: {'; '.join(parts) or 'next to nothing'}"


def plan(
    module: nn.Module,
    selected: Mapping[str, nn.Parameter],
    intent: Intent,
    *,
    sparsity: float,
    schedule: Schedule,
    scope: str,
    exclude: Iterable[str] | None,
    max_epochs: int | None,
    steps_per_epoch: int | None,
    untrained: Container[str] = (),
) -> PruningPlan:
    """Work out what a callback is going to do to a module.

    Args:
        module: The module.
        selected: The prunable parameters, by name.
        intent: When and how.
        sparsity: Fraction of the prunable weights to remove.
        schedule: ``"exponential"`` or ``"linear"``.
        scope: ``"global"`` or ``"layerwise"``.
        exclude: Glob patterns over parameter names that stay dense.
        max_epochs: Epochs of the whole run; ``None`` if that is not known.
        steps_per_epoch: Training steps in each; ``None`` if that is not known.
        untrained: Parameters that no optimizer holds.

    Raises:
        ValueError: If one of the last two is not a whole number of at least 1.

    """
    max_epochs = None if max_epochs is None else check_count("max_epochs", max_epochs)
    steps_per_epoch = None if steps_per_epoch is None else check_count("steps_per_epoch", steps_per_epoch)
    sizes = [parameter.numel() for parameter in selected.values()]
    epochs: tuple[int | None, int | None] = intent.first_epoch, intent.last_epoch
    if intent.step is not None:
        epochs = (None if steps_per_epoch is None else intent.step // steps_per_epoch,) * 2
    return PruningPlan(
        intent.method,
        planned_parameters(module, selected, exclude, untrained),
        counts(sizes, intent.rounds, sparsity, schedule, scope),
        intent.passes,
        intent.pass_over,
        *epochs,
        None if max_epochs is None or steps_per_epoch is None else max_epochs * steps_per_epoch,
        max_epochs,
        intent.step,
    )


def planned_parameters(
    module: nn.Module,
    selected: Mapping[str, nn.Parameter],
    exclude: Iterable[str] | None,
    untrained: Container[str] = (),
) -> tuple[PlannedParameter, ...]:
    """Say of every parameter whether it will be pruned, and why not.

    Args:
        module: The module.
        selected: The prunable parameters, by name.
        exclude: Glob patterns over parameter names that stay dense.
        untrained: Parameters that no optimizer holds.

    """
    exclude = check_patterns("exclude", exclude)

    def reason(name: str, parameter: nn.Parameter) -> str:
        if name in selected:
            return ""
        if any(fnmatchcase(name, pattern) for pattern in exclude or ()):
            return "excluded"
        if not parameter.requires_grad:
            return "frozen"
        if parameter.ndim < 2:
            return _SMALL
        return "in no optimizer" if name in untrained else "not selected"

    return tuple(
        PlannedParameter(name, tuple(parameter.shape), parameter.numel(), reason(name, parameter))
        for name, parameter in module.named_parameters()
        if not isinstance(parameter, UninitializedParameter)  # whose shape nobody knows
    )


def counts(sizes: Sequence[int], rounds: int, sparsity: float, schedule: Schedule, scope: str) -> tuple[int, ...]:
    """Say how many prunable weights are left after each round.

    Args:
        sizes: How many weights each prunable parameter has.
        rounds: The number of rounds.
        sparsity: Fraction to remove in all.
        schedule: ``"exponential"`` or ``"linear"``.
        scope: ``"global"`` or ``"layerwise"``.

    Example:
        >>> counts([100, 900], 2, 0.99, "exponential", "global"), counts([2, 8], 1, 0.9, "linear", "layerwise")
        ((100, 10), (2,))

    """
    densities = [schedules.SCHEDULES[schedule](index, rounds, sparsity, 0.0) for index in range(1, rounds + 1)]
    groups = [sum(sizes)] if scope == "global" else sizes
    return tuple(sum(schedules.num_kept(size, density) for size in groups) for density in densities)
