"""What was pruned, per layer and in all: tables to read, a dictionary to store, pictures."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from lightning_drive.core import saved_values
from lightning_drive.core.arguments import Control
from lightning_drive.core.history import Round, ScoreHistogram
from lightning_drive.core.masks import Masks
from lightning_drive.core.messages import listed, shown
from lightning_drive.export import checkpoints, sparse_files
from lightning_drive.report import figures, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult

Picture: TypeAlias = Literal["density", "rounds", "scores", "cycles"]

_PHASES = {"batch_norm": "BatchNorm", "commit": "putting masks on"}
"""What to call phases whose names say too little."""

_CONTROLS = {
    "shuffle": "the masks were shuffled within each parameter",
    "reinit": "the survivors were re-initialised",
}


@dataclass(frozen=True)
class LayerReport:
    """One prunable parameter after pruning.

    Args:
        name: The parameter's name, as in ``module.named_parameters()``.
        shape: Its shape.
        num_weights: How many weights it has, pruned or not.
        num_kept: How many of them are kept.
        num_active: How many of the kept ones lie on an input-output path; ``None`` if that could not be found out.
        itemsize: The bytes of one weight; ``None`` if that is not known.
        multiply_adds: How many multiply-adds its weights do for one sample in a dense network; ``None`` if that could
            not be counted. One multiply-add is two floating-point operations.

    """

    name: str
    shape: tuple[int, ...]
    num_weights: int
    num_kept: int
    num_active: int | None
    itemsize: int | None = None
    multiply_adds: int | None = None

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept, in ``[0, 1]``."""
        return self.num_kept / self.num_weights

    @property
    def nonzero_multiply_adds(self) -> int | None:
        """How many of the multiply-adds are by weights that are kept: the others multiply by zero."""
        return None if self.multiply_adds is None else self.multiply_adds * self.num_kept // self.num_weights

    @property
    def dense_bytes(self) -> int | None:
        """The memory of all weights."""
        return None if self.itemsize is None else self.num_weights * self.itemsize

    @property
    def nonzero_bytes(self) -> int | None:
        """The memory of the kept weights, and of a mask of one bit per weight that says which ones they are."""
        return None if self.itemsize is None else self.num_kept * self.itemsize + (self.num_weights + 7) // 8


@dataclass(frozen=True)
class CycleReport:
    """One cycle of iterative magnitude pruning, up to its cut.

    Args:
        cycle: Which one, from 1.
        num_kept: How many weights are left after it.
        phases: Seconds by phase, as in :class:`PruningReport`.
        metrics: What was logged last before the cut, with the weights that were left by the cycle before; what
            ModelCheckpoint or EarlyStopping monitor comes first.

    """

    cycle: int
    num_kept: int
    phases: Mapping[str, float]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class PruningReport:
    """What a pruning callback did, and with what result.

    Args:
        method: The method's settings, such as ``"DRIVE(rounds=100, batches_per_round=1, mode='train')"``.
        layers: One entry for each prunable parameter.
        seconds: How long finding the masks took.
        epoch: The epoch at whose start the network was pruned, from 0.
        step: ``trainer.global_step`` at that moment.
        digest: :meth:`Masks.digest` of the masks.
        warnings: What went less than well.
        control: What was changed afterwards for comparison: ``"none"``, ``"shuffle"`` (the masks, within each
            parameter) or ``"reinit"`` (the values of the survivors).
        cycle: How many cycles of iterative magnitude pruning lie behind; ``None`` with other methods.
        phases: Seconds by phase, as far as they are known: ``warmup`` (or ``training``, of an IMP cycle; all since the
            start of training or the last cut), ``rounds``, ``measuring`` (of paths and multiply-adds), ``batch_norm``
            (re-estimating its statistics) and ``commit``. ``seconds`` are the second to fourth of them.
        rounds: What every round removed from every layer; empty if that is not known.
        scores: How the scores of the last round lay.
        cycles: What there is to know of every cycle of iterative magnitude pruning.
        other_multiply_adds: Multiply-adds for one sample in which no prunable weight takes part, such as those of
            attention and of layers that were left out; ``None`` if they could not be counted.
        num_parameters: How many weights the module has in all, prunable or not: biases, norms, embeddings and frozen
            ones, too; ``None`` in reports of earlier versions.

    Example:
        >>> layer = LayerReport("fc.weight", (2, 4), num_weights=8, num_kept=2, num_active=1)
        >>> report = PruningReport("SNIP()", (layer,), seconds=0.25, epoch=0, step=0, digest="", warnings=())
        >>> report.sparsity, report.effective_sparsity
        (0.75, 0.875)
        >>> PruningReport.from_dict(report.to_dict()) == report
        True
        >>> print(report)
        Pruned by SNIP() at the start of epoch 0 (step 0) in 0.2 s
        parameter  shape  weights  kept  density  active
        fc.weight  2x4          8     2   25.00%  50.00%
        all                     8     2   25.00%  50.00%
        sparsity 75.00%, effective sparsity 87.50% (active: kept and on a path from input to output)

    """

    method: str
    layers: tuple[LayerReport, ...]
    seconds: float
    epoch: int
    step: int
    digest: str
    warnings: tuple[str, ...]
    control: Control = "none"
    cycle: int | None = None
    phases: Mapping[str, float] = field(default_factory=dict, hash=False)
    rounds: tuple[Round, ...] = ()
    scores: ScoreHistogram | None = None
    cycles: tuple[CycleReport, ...] = field(default=(), hash=False)
    other_multiply_adds: int | None = None
    num_parameters: int | None = None

    @classmethod
    def of(
        cls,
        masks: Masks,
        active: Masks | None,
        *,
        method: str,
        seconds: float,
        epoch: int,
        step: int,
        warnings: Sequence[str],
        control: Control = "none",
        cycle: int | None = None,
        itemsizes: Mapping[str, int] | None = None,
        multiply_adds: Mapping[str, int | None] | None = None,
        **others: Any,
    ) -> "PruningReport":
        """Measure masks.

        Args:
            masks: What is kept.
            active: What of it lies on an input-output path, or ``None``.
            method: The method's settings.
            seconds: How long finding the masks took.
            epoch: The epoch at whose start the network was pruned.
            step: The global step at that moment.
            warnings: What went less than well.
            control: What was changed afterwards for comparison.
            cycle: How many cycles of iterative magnitude pruning lie behind.
            itemsizes: Parameter name to the bytes of one weight.
            multiply_adds: Parameter name to its multiply-adds for one sample, or ``None``.
            others: Further fields of the report.

        """
        layers = tuple(
            LayerReport(
                name,
                tuple(mask.shape),
                mask.numel(),
                int(mask.count_nonzero()),
                None if active is None else int(active[name].count_nonzero()),
                (itemsizes or {}).get(name),
                (multiply_adds or {}).get(name),
            )
            for name, mask in masks.items()
        )
        return cls(method, layers, seconds, epoch, step, masks.digest(), tuple(warnings), control, cycle, **others)

    @property
    def num_weights(self) -> int:
        """How many prunable weights there are, pruned or not."""
        return sum(layer.num_weights for layer in self.layers)

    @property
    def num_kept(self) -> int:
        """How many of them are kept."""
        return sum(layer.num_kept for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that is removed, in ``[0, 1)``."""
        return (self.num_weights - self.num_kept) / self.num_weights

    @property
    def density(self) -> float:
        """Fraction of the prunable weights that is kept, in ``(0, 1]``."""
        return self.num_kept / self.num_weights

    @property
    def effective_sparsity(self) -> float | None:
        """Fraction removed or cut off from input or output, or ``None`` if paths could not be followed."""
        active = self._num_active
        return None if active is None else (self.num_weights - active) / self.num_weights

    @property
    def overall_sparsity(self) -> float | None:
        """Removed weights as a fraction of all that the module has, prunable or not; ``None`` if that is not known."""
        return None if self.num_parameters is None else (self.num_weights - self.num_kept) / self.num_parameters

    @property
    def multiply_adds(self) -> int | None:
        """How many multiply-adds the prunable weights do for one sample in a dense network."""
        return _sum(layer.multiply_adds for layer in self.layers)

    @property
    def nonzero_multiply_adds(self) -> int | None:
        """How many of them are by weights that are kept."""
        return _sum(layer.nonzero_multiply_adds for layer in self.layers)

    @property
    def dense_bytes(self) -> int | None:
        """The memory of all prunable weights."""
        return _sum(layer.dense_bytes for layer in self.layers)

    @property
    def nonzero_bytes(self) -> int | None:
        """The memory of the kept ones, and of a mask of one bit per prunable weight."""
        return _sum(layer.nonzero_bytes for layer in self.layers)

    # To store.

    def to_dict(self) -> dict[str, Any]:
        """Give everything in plain types that JSON and ``torch.load(weights_only=True)`` know."""
        values: dict[str, Any] = _plain(asdict(self))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PruningReport":
        """Read what :meth:`to_dict` gave, now or in an earlier version.

        Args:
            values: The dictionary.

        Raises:
            ValueError: If a field is missing, is one that this version does not know, or has another form; or if
                two of them contradict each other.

        """
        report = saved_values.read(cls, values)
        for contradiction in _contradictions(report):
            raise ValueError(f"The PruningReport contradicts itself: {contradiction}. {saved_values.REMEDY}")
        return report

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "PruningReport":
        """Read the report out of a Lightning checkpoint, without the model and without running code from the file.

        Args:
            path: The checkpoint: a file, the folder that sharded training writes, or the sparse file that
                ``lightning-drive compress`` made of a checkpoint.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no checkpoint, cannot be read safely, or holds no report.
            ModuleNotFoundError: If it is a sparse file and safetensors is not installed.

        """
        path = Path(path)
        if checkpoints.is_safetensors(path):
            checkpoint = checkpoints.unpacked(sparse_files.read_metadata(path), path)
        else:
            checkpoint = checkpoints.load(path, needs_weights=False)
        callback, values = checkpoints.pruning_in(checkpoint)
        if values is not None:
            return cls.from_dict(values)
        epoch, step = (shown(checkpoint.get(key)) for key in ("epoch", "global_step"))
        where = f"{str(path)!r} (epoch {epoch}, step {step})"
        if callback:
            raise ValueError(f"{where} holds no report yet: {callback} had not pruned when it was saved.")
        states = checkpoint.get("callbacks")
        if not isinstance(states, dict):
            raise ValueError(
                f"{str(path)!r} is not a checkpoint of a Lightning Trainer that has callbacks in it. Give one that was"
                " saved by ModelCheckpoint or `trainer.save_checkpoint(path)`, without `weights_only`."
            )
        raise ValueError(
            f"{where} holds no report: it was saved without a pruning callback of lightning_drive. Its callbacks:"
            f" {listed(name if isinstance(name, str) else shown(name) for name in states)}."
        )

    # To read.

    def __str__(self) -> str:
        return "\n".join([*self._above(), *tables.plain(self._rows(with_bytes=False)), *self._below()])

    def to_markdown(self) -> str:
        """Give the table, with what is above and below it, in Markdown."""
        first, *rest = self._above()
        notes = [" ".join(f"- {line}".split()).replace("<", "\\<") for line in self._below()]
        return "\n".join([first, *(f"\n{line}" for line in rest), "", *tables.markdown(self._rows()), "", *notes])

    def to_html(self) -> str:
        """Give the table, with what is above and below it, as a fragment of HTML that needs nothing else."""
        return tables.to_html(self._rows(), self._above(), self._below())

    def _repr_html_(self) -> str:
        """Let a notebook show the table."""
        return self.to_html()

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Let ``rich.print`` and a rich console show the table; a narrow one leaves out what the rest says, too."""
        rows, dispensable = self._rows(with_bytes=False), ("shape", "weights", "MACs", "non-zero MACs")
        yield tables.for_terminal(rows, self._above(), self._below(), options.max_width, dispensable)

    # To see.

    @property
    def pictures(self) -> list[Picture]:
        """The kinds of pictures that there are the data for."""
        has: dict[Picture, object] = {
            "density": self.layers,
            "rounds": self.rounds,
            "scores": self.scores,
            "cycles": any(cycle.metrics for cycle in self.cycles),
        }
        return [kind for kind, data in has.items() if data]

    def figure(self, kind: Picture = "density", *, metric: str | None = None) -> "Figure":
        """Draw a picture. Needs matplotlib.

        Args:
            kind: ``"density"``: which fraction of every layer is left, against the whole. ``"rounds"``: how many
                weights each round removed, and what it left of every layer. ``"scores"``: how the scores of the last
                round lay, and the threshold. ``"cycles"``: a metric at the end of every IMP cycle.
            metric: The metric for ``"cycles"``; by default the one that ModelCheckpoint or EarlyStopping monitor, or
                else the first one that was logged.

        Returns:
            A ``matplotlib.figure.Figure`` that pyplot does not know of.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            ValueError: If there is no such picture, or the report does not have the data for it.

        """
        if kind not in get_args(Picture):
            raise ValueError(f"`kind` must be one of {', '.join(map(repr, get_args(Picture)))}, got {kind!r}.")
        if kind not in self.pictures:
            raise ValueError(
                f"This report does not have the data for the picture {kind!r}, only for {listed(self.pictures)}:"
                " it comes from an earlier version or from another method, all scores were zero, or nothing was logged."
            )
        kept, sizes = [layer.num_kept for layer in self.layers], [layer.num_weights for layer in self.layers]
        names, method = [layer.name for layer in self.layers], self.method.split("(")[0]
        if kind == "density":
            return figures.density(
                names, kept, sizes, f"Density by layer after {method} at {self.sparsity:.2%} sparsity"
            )
        if kind == "rounds":
            return figures.rounds(names, sizes, self.rounds, f"What {method} removed, and what it left of each layer")
        if kind == "scores":
            assert self.scores is not None
            return figures.scores(self.scores, self.rounds[-1].threshold if self.rounds else None, method)
        return self._cycles(metric)

    def plot(self, path: str | Path, kind: Picture = "density", *, metric: str | None = None) -> None:
        """Draw a picture and save it. Needs matplotlib.

        Args:
            path: Where to; the ending decides the format (``.png``, ``.svg``, ``.pdf``).
            kind: As in :meth:`figure`, which also raises what this does.
            metric: As in :meth:`figure`.

        """
        self.figure(kind, metric=metric).savefig(Path(path), dpi=150)

    def _cycles(self, metric: str | None) -> "Figure":
        names = list(dict.fromkeys(name for cycle in self.cycles for name in cycle.metrics))
        if metric is not None and metric not in names:
            raise ValueError(f"`metric` must be one that was logged ({listed(names)}), got {metric!r}.")
        name = metric or names[0]
        before = [self.num_weights, *(cycle.num_kept for cycle in self.cycles)]
        known = [
            (cycle.cycle, left / self.num_weights, cycle.metrics[name])
            for cycle, left in zip(self.cycles, before, strict=False)
            if name in cycle.metrics
        ]
        return figures.cycles(known, name)

    @property
    def _num_active(self) -> int | None:
        return _sum(layer.num_active for layer in self.layers)

    def _above(self) -> list[str]:
        after = "" if self.cycle is None else f", cycle {self.cycle},"
        return [
            f"Pruned by {self.method}{after} at the start of epoch {self.epoch} (step {self.step})"
            f" in {self.seconds:.1f} s",
            *([f"control: {_CONTROLS[self.control]}"] if self.control != "none" else []),
        ]

    def _rows(self, *, with_bytes: bool = True) -> list[tuple[str, ...]]:
        """Give the table; costs that are not known of any layer have no columns."""
        costs = [("MACs", "multiply_adds"), ("non-zero MACs", "nonzero_multiply_adds")]
        if with_bytes:
            costs += [("bytes", "dense_bytes"), ("non-zero bytes", "nonzero_bytes")]
        shown = [pair for pair in costs if any(getattr(each, pair[1]) is not None for each in self.layers)]

        def row(text: tuple[str, str], of: LayerReport | PruningReport, active: int | None) -> tuple[str, ...]:
            share = "-" if not of.num_kept else "?" if active is None else f"{active / of.num_kept:.2%}"
            numbers = f"{of.num_weights:,}", f"{of.num_kept:,}", f"{of.density:.2%}", share
            return *text, *numbers, *(tables.count(getattr(of, name)) for _, name in shown)

        return [
            ("parameter", "shape", "weights", "kept", "density", "active", *(title for title, _ in shown)),
            *(row((each.name, "x".join(map(str, each.shape))), each, each.num_active) for each in self.layers),
            row(("all", ""), self, self._num_active),
        ]

    def _below(self) -> Iterator[str]:
        effective = self.effective_sparsity
        yield (
            f"sparsity {self.sparsity:.2%}, effective sparsity "
            + ("not measured" if effective is None else f"{effective:.2%}")
            + " (active: kept and on a path from input to output)"
        )
        if self.overall_sparsity is not None:
            yield (
                f"overall sparsity {self.overall_sparsity:.2%}, of all {self.num_parameters:,} weights:"
                f" {self.num_weights / (self.num_parameters or 1):.2%} of them are prunable"
            )
        if self.multiply_adds is not None:
            others = ""
            if self.other_multiply_adds is None:
                others = "; how many there are without prunable weights is not known"
            elif self.other_multiply_adds:
                others = f", and {tables.count(self.other_multiply_adds)} without prunable weights"
            yield (
                f"multiply-adds of one sample (MACs; one is 2 FLOPs): {tables.count(self.multiply_adds)} dense,"
                f" {tables.count(self.nonzero_multiply_adds)} by non-zero weights"
                f"{others}"
            )
        if self.dense_bytes is not None:
            yield (
                f"prunable weights: {tables.count(self.dense_bytes)}B dense, as they are in memory;"
                f" {tables.count(self.nonzero_bytes)}B if stored as non-zero ones and a mask of 1 bit per weight"
            )
        if self.phases:
            yield "seconds: " + ", ".join(
                f"{_PHASES.get(name, name)} {seconds:.1f}" for name, seconds in self.phases.items()
            )
        yield from (f"! {warning}" for warning in self.warnings)


def _sum(numbers: Iterable[int | None]) -> int | None:
    """Add up what is known of every part; ``None`` if it is not known of one."""
    known = list(numbers)
    return None if None in known else sum(number for number in known if number is not None)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def _contradictions(report: PruningReport) -> Iterator[str]:
    """Say which numbers of a report cannot be of one pruning."""
    names = [layer.name for layer in report.layers]
    if not names or len(set(names)) < len(names):
        yield "it has no layers, or one of them twice"
    for layer in report.layers:
        if not layer.num_weights or layer.num_weights != prod(layer.shape):
            yield f"{layer.name!r} cannot have {layer.num_weights} weights in the shape {layer.shape}"
        elif layer.num_kept > layer.num_weights or (layer.num_active or 0) > layer.num_kept:
            yield f"{layer.name!r} has more kept weights than weights, or more active ones than kept ones"
    if report.num_parameters is not None and report.num_parameters < sum(each.num_weights for each in report.layers):
        yield "its module has fewer weights in all than prunable ones"
    if any(len(each.removed) != len(names) for each in report.rounds):
        yield f"its rounds are not of {len(names)} layers"
    if report.scores is not None and len(report.scores.kept) != len(report.scores.pruned):
        yield "its histogram of scores has more bins of kept ones than of pruned ones, or fewer"
