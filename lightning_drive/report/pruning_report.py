"""PruningReport, the record of a pruning, with its numbers; its texts and pictures are in the modules next to it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lightning_drive.core import saved_values
from lightning_drive.core.arguments import Control
from lightning_drive.core.messages import listed
from lightning_drive.core.rounds import Round, ScoreHistogram, Unit
from lightning_drive.network.masks import Masks
from lightning_drive.report import columns, figures, parts, saved_reports, sentences, tables
from lightning_drive.report.acceleration_report import AccelerationReport
from lightning_drive.report.figures import Picture
from lightning_drive.report.parts import CutReport, CycleReport, LayerReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class PruningReport:
    """The result of a pruning: layers, costs, warnings, and where in training it happened.

    Args:
        method: The method's settings, such as ``"DRIVE(rounds=100, batches_per_round=1, mode='train')"``.
        layers: One entry for each prunable parameter.
        seconds: How long finding the masks took.
        epoch: The epoch at whose start the network was pruned, from 0.
        step: ``trainer.global_step`` at that moment.
        digest: :meth:`Masks.digest` of the masks.
        warnings: Texts about results that need attention.
        control: What was changed afterwards for comparison: ``"none"``, ``"shuffle"`` (the masks, within each
            parameter) or ``"reinit"`` (the values of the survivors).
        cycle: The number of finished cycles of iterative magnitude pruning; ``None`` with other methods.
        phases: Seconds by phase, as far as they are known: ``warmup`` (with IMP ``training``: all since the start of
            training or the last cut), ``rounds``, ``measuring`` (of paths and multiply-adds), ``batch_norm``
            (estimating its statistics again) and ``commit`` (putting the masks on). ``seconds`` is the sum of
            ``rounds``, ``measuring`` and ``batch_norm``.
        rounds: What every round removed from every layer; empty if that is not known.
        scores: The distribution of the scores in the last round; ``None`` if that is not known.
        cycles: One entry for each cycle of iterative magnitude pruning.
        other_multiply_adds: Multiply-adds for one sample in which no prunable weight takes part, such as those of
            attention and of layers that were left out; ``None`` if they could not be counted.
        num_parameters: How many weights the module has in all, prunable or not: biases, norms, embeddings and frozen
            ones, too; ``None`` in reports of earlier versions.
        acceleration: Which layers train in a sparse form, measured last; ``None`` if that was not asked for. It stands
            in no text of this report: ``print(report.acceleration)``.
        cuts: One for each cut of gradual pruning, where ``seconds`` and ``phases`` are those of all cuts together.

    Examples:
        >>> layer = LayerReport("fc.weight", (2, 4), num_weights=8, num_kept=2, num_active=1)
        >>> report = PruningReport("SNIP()", (layer,), seconds=0.25, epoch=0, step=0, digest="", warnings=())
        >>> report.sparsity, report.effective_sparsity
        (0.75, 0.875)
        >>> PruningReport.from_dict(report.to_dict()) == report
        True
        >>> print(report)
        Pruned by SNIP() in epoch 0, before step 0 (0.2 s)
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
    acceleration: AccelerationReport | None = None
    cuts: tuple[CutReport, ...] = field(default=(), hash=False)

    @classmethod
    def of(
        cls,
        masks: Masks,
        active: Masks | None,
        *,
        warnings: Sequence[str],
        itemsizes: Mapping[str, int] | None = None,
        multiply_adds: Mapping[str, int | None] | None = None,
        **others: Any,
    ) -> "PruningReport":
        """Return the report of masks.

        Args:
            masks: The kept weights.
            active: The kept weights that lie on an input-output path; ``None`` if they are not known.
            warnings: Texts about results that need attention.
            itemsizes: Parameter name to the bytes of one weight.
            multiply_adds: Parameter name to its multiply-adds for one sample, or ``None``.
            others: All other fields of the report but ``layers`` and ``digest``.

        """
        layers = parts.layers_of(masks, active, itemsizes or {}, multiply_adds or {})
        return cls(layers=layers, digest=masks.digest(), warnings=tuple(warnings), **others)

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
        active = parts.total(layer.num_active for layer in self.layers)
        return None if active is None else (self.num_weights - active) / self.num_weights

    @property
    def overall_sparsity(self) -> float | None:
        """Removed weights as a fraction of all that the module has, prunable or not; ``None`` if that is not known."""
        return None if self.num_parameters is None else (self.num_weights - self.num_kept) / self.num_parameters

    @property
    def multiply_adds(self) -> int | None:
        """How many multiply-adds the prunable weights do for one sample in a dense network."""
        return parts.total(layer.multiply_adds for layer in self.layers)

    @property
    def nonzero_multiply_adds(self) -> int | None:
        """How many of them are by weights that are kept."""
        return parts.total(layer.nonzero_multiply_adds for layer in self.layers)

    @property
    def dense_bytes(self) -> int | None:
        """The memory of all prunable weights."""
        return parts.total(layer.dense_bytes for layer in self.layers)

    @property
    def nonzero_bytes(self) -> int | None:
        """The memory of the kept ones, and of a mask of one bit per prunable weight."""
        return parts.total(layer.nonzero_bytes for layer in self.layers)

    # Storing.

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain types that JSON and ``torch.load(weights_only=True)`` know."""
        values: dict[str, Any] = saved_reports.plain(asdict(self))
        for name in ("acceleration", "cuts"):  # which earlier versions do not know
            if not values[name]:
                del values[name]
        if self.scores is not None and self.scores.width is None:
            del values["scores"]["width"]  # likewise
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PruningReport":
        """Return the report that :meth:`to_dict` of this or an earlier version made a dictionary of.

        Args:
            values: The dictionary.

        Raises:
            ValueError: If a field is missing, is one that this version does not know, or has another form; or if
                two of them contradict each other.

        """
        report = saved_values.read(cls, values)
        for text in saved_reports.contradictions(report.layers, report.rounds, report.scores, report.num_parameters):
            raise ValueError(f"The PruningReport contradicts itself: {text}. {saved_values.REMEDY}")
        return report

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "PruningReport":
        """Return the report in a Lightning checkpoint, without the model and without running code from the file.

        Args:
            path: The checkpoint: a file, the folder that sharded training writes, or the sparse file that
                ``lightning-drive compress`` made of a checkpoint.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no checkpoint, cannot be read safely, or holds no report.
            ModuleNotFoundError: If it is a sparse file and safetensors is not installed.

        """
        return cls.from_dict(saved_reports.values_in(Path(path)))

    # Texts.

    def __str__(self) -> str:
        return "\n".join([*self._above(), *tables.plain(columns.rows(self.layers, in_text=True)), *self._below()])

    def to_markdown(self) -> str:
        """Return the table, with the lines above and below it, in Markdown."""
        first, *rest = self._above()
        table = tables.markdown(columns.rows(self.layers, in_text=False))
        notes = [" ".join(f"- {line}".split()).replace("<", "\\<") for line in self._below()]
        return "\n".join([first, *(f"\n{line}" for line in rest), "", *table, "", *notes])

    def to_html(self) -> str:
        """Return the table, with the lines above and below it, as a fragment of HTML that needs nothing else."""
        return tables.to_html(columns.rows(self.layers, in_text=False), self._above(), self._below())

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return self.to_html()

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Yield what ``rich.print`` and a rich console show; a narrow one leaves columns out."""
        rows = columns.rows(self.layers, in_text=True)
        yield tables.for_terminal(rows, self._above(), self._below(), options.max_width, columns.DISPENSABLE)

    def _above(self) -> list[str]:
        headline = sentences.headline(self.method, self.cycle, self.epoch, self.step, self.seconds)
        return [headline, *([sentences.changed_afterwards(self.control)] if self.control != "none" else [])]

    def _below(self) -> Iterator[str]:
        yield sentences.sparsities(self.sparsity, self.effective_sparsity)
        if self.num_parameters is not None and self.overall_sparsity is not None:
            yield sentences.overall_sparsity(self.overall_sparsity, self.num_weights, self.num_parameters)
        if self.multiply_adds is not None:
            yield sentences.multiply_adds(self.multiply_adds, self.nonzero_multiply_adds, self.other_multiply_adds)
        if self.dense_bytes is not None:
            yield sentences.memory(self.dense_bytes, self.nonzero_bytes)
        if self.phases:
            yield sentences.seconds_by_phase(self.phases)
        yield from (f"! {warning}" for warning in self.warnings)

    # Pictures.

    @property
    def pictures(self) -> list[Picture]:
        """The kinds of pictures that the report has the data for."""
        has: dict[Picture, object] = {
            "density": self.layers,
            "rounds": len(self.rounds) > 1,
            "scores": self.scores,
            "cycles": sum(bool(cycle.metrics) for cycle in self.cycles) > 1,
            "cuts": len(self.cuts) > 1,
        }
        return [kind for kind, data in has.items() if data]

    def figure(self, kind: Picture = "density", *, metric: str | None = None) -> "Figure":
        """Draw a picture. Needs matplotlib.

        Args:
            kind: ``"density"``: which fraction of every layer is left, against the whole. ``"rounds"``: how many
                weights each round (or cycle, or cut) removed, and what it left of every layer. ``"scores"``: how the
                scores of the last round lay, and the threshold. ``"cycles"``: a metric at the end of every IMP cycle.
                ``"cuts"``: the sparsity over the epochs of gradual pruning, and a metric at the start of each.
            metric: The metric for ``"cycles"`` and ``"cuts"``; by default the one that ModelCheckpoint or EarlyStopping
                monitor, or else the first one that was logged.

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
                " it comes from an earlier version or from another method, has a single round, cycle or cut, all scores"
                " were zero, or nothing was logged."
            )
        kept, sizes = [layer.num_kept for layer in self.layers], [layer.num_weights for layer in self.layers]
        names, method = [layer.name for layer in self.layers], self.method.split("(")[0]
        if kind == "density":
            return figures.density(names, kept, sizes, method)
        if kind == "rounds":
            return figures.rounds(names, sizes, self.rounds, method, self._unit)
        if kind == "scores":
            assert self.scores is not None
            return figures.scores(self.scores, self.rounds, method, self._unit)
        return self._cuts(metric) if kind == "cuts" else self._cycles(metric)

    def plot(self, path: str | Path, kind: Picture = "density", *, metric: str | None = None) -> None:
        """Draw a picture and save it. Needs matplotlib.

        Args:
            path: Where to; the ending decides the format (``.png``, ``.svg``, ``.pdf``).
            kind: As in :meth:`figure`, which also raises what this does.
            metric: As in :meth:`figure`.

        """
        self.figure(kind, metric=metric).savefig(Path(path), dpi=150)

    @property
    def _unit(self) -> Unit:
        return "cycle" if self.cycle is not None else "cut" if self.cuts else "round"

    def _cuts(self, metric: str | None) -> "Figure":
        sparsities = [(cut.epoch, 1 - cut.num_kept / self.num_weights) for cut in self.cuts]
        name = _metric_to_draw(metric, self.cuts)
        known = [(cut.epoch, cut.metrics[name]) for cut in self.cuts if name in cut.metrics] if name else []
        return figures.cuts(sparsities, known, name)

    def _cycles(self, metric: str | None) -> "Figure":
        name = _metric_to_draw(metric, self.cycles)
        before = [self.num_weights, *(cycle.num_kept for cycle in self.cycles)]
        known = [
            (cycle.cycle, left / self.num_weights, cycle.metrics[name])
            for cycle, left in zip(self.cycles, before, strict=False)
            if name in cycle.metrics
        ]
        return figures.cycles(known, name)


def _metric_to_draw(metric: str | None, parts_with_metrics: Sequence[CycleReport | CutReport]) -> str:
    """Return the metric that was asked for, or the first one; empty if none was logged."""
    names = list(dict.fromkeys(name for part in parts_with_metrics for name in part.metrics))
    if metric is not None and metric not in names:
        raise ValueError(f"`metric` must be one that was logged ({listed(names)}), got {metric!r}.")
    return metric or next(iter(names), "")
