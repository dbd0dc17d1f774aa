"""AccelerationReport, the record of which form every layer computes in, and of the times that decided it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lightning_drive.core.messages import listed
from lightning_drive.report import tables

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

DENSE = "dense"
"""The name of the form in which torch computes."""


@dataclass(frozen=True)
class LayerForm:
    """The form of one layer, and what decided it.

    Args:
        name: The layer, or its weight, by its name in the module.
        sparsity: Fraction of its weights that are zero, in ``[0, 1]``.
        form: ``"dense"``, or the sparse form that was the fastest.
        dense_seconds: The time of the dense form; ``None`` if it was not measured.
        sparse_seconds: The time of the fastest sparse form; ``None`` if it was not measured.
        reason: Why it was not measured; empty if it was.

    """

    name: str
    sparsity: float
    form: str = DENSE
    dense_seconds: float | None = None
    sparse_seconds: float | None = None
    reason: str = ""

    @property
    def is_sparse(self) -> bool:
        """Whether the layer computes in a sparse form."""
        return self.form != DENSE

    @property
    def is_faster_alone(self) -> bool:
        """Whether a sparse form of the layer was faster by a tenth, and more, when it was measured by itself."""
        return bool(self.sparse_seconds and self.dense_seconds and self.sparse_seconds < 0.9 * self.dense_seconds)


def all_dense(layers: Iterable[LayerForm]) -> tuple[LayerForm, ...]:
    """Return the same layers, measured as they are, in their dense form."""
    return tuple(replace(layer, form=DENSE) for layer in layers)


@dataclass(frozen=True)
class AccelerationReport:
    """Which layers compute in a sparse form, since that was faster on this machine.

    Args:
        work: What was timed, such as ``"inference"`` or ``"training step"``.
        layers: One entry for each layer with zeros.
        threads: How many threads torch computed with.
        dense_seconds: The time of the whole with all layers dense; ``None`` if it was not measured.
        seconds: The time of the whole with these forms; ``None`` if it was not measured.

    Examples:
        >>> layer = LayerForm("fc", 0.98, "tokens", dense_seconds=0.004, sparse_seconds=0.0005)
        >>> print(AccelerationReport("inference", (layer,), threads=1, dense_seconds=0.005, seconds=0.001))
        inference: 1 of 1 layers with zeros in a sparse form, 5.00 times as fast as dense (1 thread)
        layer  form    sparsity  dense ms  sparse ms
        fc     tokens    98.00%     4.000      0.500
        all                         5.000      1.000

    """

    work: str
    layers: tuple[LayerForm, ...]
    threads: int
    dense_seconds: float | None = None
    seconds: float | None = None

    @property
    def num_sparse(self) -> int:
        """How many layers compute in a sparse form."""
        return len(self.sparse_names)

    @property
    def sparse_names(self) -> list[str]:
        """The names of the layers that compute in a sparse form."""
        return [layer.name for layer in self.layers if layer.is_sparse]

    @property
    def speedup(self) -> float | None:
        """The dense time of the whole over that with these forms; ``None`` if they were not measured."""
        if self.dense_seconds is None or not self.seconds:
            return None
        return self.dense_seconds / self.seconds

    @property
    def headline(self) -> str:
        """The result in one line."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        faster = "" if self.speedup is None else f", {self.speedup:.2f} times as fast as dense"
        layers = f"{self.num_sparse} of {len(self.layers)} layers with zeros in a sparse form"
        return f"{self.work}: {layers}{faster} ({threads})"

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each reason for which layers were not measured, or stay dense though they were faster alone."""
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.reason:
                reasons.setdefault(layer.reason, []).append(layer.name)
        notes = [f"not measured: {listed(names)}: {reason}" for reason, names in reasons.items()]
        if not self.num_sparse and any(layer.is_faster_alone for layer in self.layers):
            notes.append("all layers stay dense: all together are no faster with the forms that are faster one by one")
        return tuple(notes)

    def __str__(self) -> str:
        return "\n".join([self.headline, *tables.plain(self._rows()), *self.notes])

    def to_markdown(self) -> str:
        """Return the table, with the lines above and below it, in Markdown."""
        notes = [f"- {line}".replace("<", "\\<") for line in self.notes]
        return "\n".join([self.headline, "", *tables.markdown(self._rows()), *([""] if notes else []), *notes])

    def to_html(self) -> str:
        """Return the table, with the lines above and below it, as a fragment of HTML that needs nothing else."""
        return tables.to_html(self._rows(), [self.headline], self.notes)

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return self.to_html()

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Yield what ``rich.print`` and a rich console show."""
        yield tables.for_terminal(self._rows(), [self.headline], self.notes, options.max_width)

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            ("layer", "form", "sparsity", "dense ms", "sparse ms"),
            *(
                (layer.name, layer.form, f"{layer.sparsity:.2%}", _ms(layer.dense_seconds), _ms(layer.sparse_seconds))
                for layer in self.layers
            ),
            ("all", "", "", _ms(self.dense_seconds), _ms(self.seconds)),
        ]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"
