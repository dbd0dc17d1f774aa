"""PruningPlan: what a callback will prune of a module, when, and at what cost, known before training."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_drive.core.arguments import check_patterns
from lightning_drive.core.goal import Goal
from lightning_drive.core.rounds import Unit
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
        num_kept: How many of its weights are left in the end; ``None`` if it is ranked together with others, which
            decides that, or not pruned.

    """

    name: str
    shape: tuple[int, ...]
    num_weights: int
    stays_dense: str = ""
    num_kept: int | None = None


@dataclass(frozen=True)
class PlannedGroup:
    """The parameters of one pattern of ``sparsity`` before pruning.

    Args:
        pattern: The pattern.
        num_weights: How many weights they have.
        num_kept: How many of them are left in the end.

    """

    pattern: str
    num_weights: int
    num_kept: int

    def __str__(self) -> str:
        share = 1 - self.num_kept / self.num_weights
        return f"{self.pattern!r} keeps {self.num_kept:,} of {self.num_weights:,} weights, a sparsity of {share:.2%}"


@dataclass(frozen=True)
class PruningPlan:
    """What a callback will do.

    Args:
        method: The method's settings.
        parameters: All parameters of the module, prunable or not.
        kept: How many prunable weights are left after each round; in iterative magnitude pruning every cycle has one.
        passes: Forward and backward passes that scoring takes; 0 for a method that reads no loss.
        pass_over: What one such pass is over, such as ``"a training batch"``.
        first_epoch: The epoch at whose start the first round is done, or, with a ``first_step``, in which it is;
            ``None`` if that is not known.
        last_epoch: The same for the last round.
        steps: Training steps of the whole run; ``None`` if that is not known.
        max_epochs: Epochs of the whole run; ``None`` if that is not known.
        first_step: Before which global step all rounds are done; ``None``: at the start of an epoch.
        groups: The parameters of every pattern of ``sparsity``, in its order, if there is more than one.
        unit: What the method calls its rounds.

    Examples:
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
    groups: tuple[PlannedGroup, ...] = ()
    unit: Unit = "round"

    @property
    def when(self) -> str:
        """The time of the last round, in words for a sentence."""
        if self.first_step is not None:
            return f"before step {self.first_step}"
        return f"at the start of epoch {self.last_epoch} (counted from 0)"

    @property
    def num_prunable(self) -> int:
        """How many prunable weights the module has."""
        return sum(parameter.num_weights for parameter in self.parameters if not parameter.stays_dense)

    @property
    def num_weights(self) -> int:
        """How many weights the module has in all, prunable or not."""
        return sum(parameter.num_weights for parameter in self.parameters)

    @property
    def overall_sparsity(self) -> float:
        """Fraction of all weights, prunable or not, that will be removed."""
        return (self.num_prunable - self.kept[-1]) / self.num_weights

    @property
    def share(self) -> float | None:
        """Passes of scoring per training step, of the whole run; ``None`` if its length is not known."""
        return None if self.steps is None else self.passes / self.steps

    def __str__(self) -> str:
        return "\n".join([*self._sentences(), *tables.plain(list(self._rows())), self._costs()])

    def _sentences(self) -> Iterator[str]:
        yield (
            f"{self.method} keeps {self.kept[-1]:,} of {self.num_prunable:,} prunable weights, a sparsity of"
            f" {1 - self.kept[-1] / self.num_prunable:.2%}"
        )
        yield (
            f"of all {self.num_weights:,} weights {self.num_prunable / self.num_weights:.2%} are prunable, an overall"
            f" sparsity of {self.overall_sparsity:.2%}"
        )
        yield from map(str, self.groups)
        rounds = f"{len(self.kept)} {self.unit}{'s' * (len(self.kept) != 1)}"
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
        yield f"weights left after {self.unit} {shown}"

    def _rows(self) -> Iterator[Sequence[str]]:
        knows_kept = any(parameter.num_kept is not None for parameter in self.parameters)

        def row(*columns: str, kept: int | None = None) -> Sequence[str]:
            return (*columns, "-" if kept is None else f"{kept:,}") if knows_kept else columns

        yield ("parameter", "shape", "weights", "pruned", *["kept"] * knows_kept)
        small = [parameter for parameter in self.parameters if parameter.stays_dense == _SMALL]
        for parameter in self.parameters:
            if parameter not in small or len(small) == 1:
                answer = f"no: {parameter.stays_dense}" if parameter.stays_dense else "yes"
                shape = tables.shape(parameter.shape)
                yield row(parameter.name, shape, f"{parameter.num_weights:,}", answer, kept=parameter.num_kept)
        if len(small) > 1:
            yield row(f"{len(small)} biases and norms", "", f"{sum(one.num_weights for one in small):,}", "no")
        yield row("prunable", "", f"{self.num_prunable:,}", "-", kept=self.kept[-1])

    def _costs(self) -> str:
        parts = []
        if self.passes:
            parts.append(f"{self.passes:,} forward and backward pass{'es' * (self.passes != 1)} over {self.pass_over}")
        if self.share is not None and self.passes:
            parts[-1] += f", in addition to {self.steps:,} training steps"
        if self.last_epoch != self.first_epoch:
            of = "" if self.max_epochs is None else f" of {self.max_epochs:,}"
            parts.append(f"{self.last_epoch:,}{of} epochs of training before the last cut")
        return f"costs: {'; '.join(parts) or 'next to nothing'}"


def plan(
    module: nn.Module,
    selected: Container[str],
    *,
    method: str,
    kept: Sequence[int],
    passes: int,
    pass_over: str,
    first_epoch: int | None,
    last_epoch: int | None,
    first_step: int | None = None,
    exclude: Iterable[str] | None = None,
    max_epochs: int | None = None,
    steps_per_epoch: int | None = None,
    untrained: Container[str] = (),
    groups: Sequence[PlannedGroup] = (),
    of_parameters: Mapping[str, int] | None = None,
    unit: Unit = "round",
) -> PruningPlan:
    """Return the plan for a module of which the ``selected`` parameters are prunable.

    For ``kept``, ``groups`` and ``of_parameters`` see :func:`counts`. ``exclude`` (glob patterns) and ``untrained``
    (names in no optimizer) are why others stay dense. The epoch of a ``first_step`` follows from ``steps_per_epoch``,
    where that is given.
    """
    if first_step is not None:
        first_epoch = last_epoch = None if steps_per_epoch is None else first_step // steps_per_epoch
    known = of_parameters or {}
    planned = planned_parameters(module, selected, exclude, untrained)
    return PruningPlan(
        method,
        tuple(replace(parameter, num_kept=known.get(parameter.name)) for parameter in planned),
        tuple(kept),
        passes,
        pass_over,
        first_epoch,
        last_epoch,
        None if max_epochs is None or steps_per_epoch is None else max_epochs * steps_per_epoch,
        max_epochs,
        first_step,
        tuple(groups),
        unit,
    )


def counts(goal: Goal, selected: Mapping[str, Tensor], num_rounds: int) -> dict[str, Any]:
    """Return how many weights of the selected parameters a goal leaves, as arguments of :func:`plan`.

    They are ``kept``, after each round; and in the end, those of the ``groups`` that patterns of ``sparsity`` make, and
    ``of_parameters``, by name, where none is ranked together with others. Raise ``ValueError`` if the schedule is a
    function that is none for this number of rounds.
    """
    goal.check_schedule(num_rounds)
    shapes = {name: parameter.shape for name, parameter in selected.items()}
    quotas = goal.quotas(shapes, num_rounds, num_rounds)
    groups = [
        PlannedGroup(
            group.name,
            sum(shapes[name].numel() for name in group.parameters),
            sum(quota.num_kept for quota in quotas if quota.parameters[0] in group.parameters),
        )
        for group in goal.groups(shapes)
        if group.name
    ]
    shared = [name for quota in quotas if not quota.name or len(quota.parameters) > 1 for name in quota.parameters]
    own = {quota.parameters[0]: quota.num_kept for quota in quotas}
    of_parameters = {name: own.get(name, 0) for name in shapes if name not in shared}
    return {"kept": goal.kept(shapes, num_rounds), "groups": groups, "of_parameters": of_parameters}


def planned_parameters(
    module: nn.Module, selected: Container[str], exclude: Iterable[str] | None, untrained: Container[str] = ()
) -> tuple[PlannedParameter, ...]:
    """List all parameters of a module, with the reason why one is not pruned; the arguments are those of `plan`."""
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
        if not isinstance(parameter, UninitializedParameter)  # its shape is unknown
    )
