"""What was pruned, per layer and in all: a table to read, a dictionary to store, a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning_drive.masking import Masks

Control: TypeAlias = Literal["none", "shuffle", "reinit"]

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

    """

    name: str
    shape: tuple[int, ...]
    num_weights: int
    num_kept: int
    num_active: int | None

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept, in ``[0, 1]``."""
        return self.num_kept / self.num_weights


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

        """
        layers = tuple(
            LayerReport(
                name,
                tuple(mask.shape),
                mask.numel(),
                int(mask.count_nonzero()),
                None if active is None else int(active[name].count_nonzero()),
            )
            for name, mask in masks.items()
        )
        return cls(method, layers, seconds, epoch, step, masks.digest(), tuple(warnings), control, cycle)

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
        active = [layer.num_active for layer in self.layers if layer.num_active is not None]
        if len(active) < len(self.layers):
            return None
        return (self.num_weights - sum(active)) / self.num_weights

    @property
    def _after_cycle(self) -> str:
        return "" if self.cycle is None else f", cycle {self.cycle},"

    def to_dict(self) -> dict[str, Any]:
        """Give everything in plain types that JSON and ``torch.load(weights_only=True)`` know."""
        values = asdict(self)
        for layer in values["layers"]:
            layer["shape"] = list(layer["shape"])
        return {**values, "layers": list(values["layers"]), "warnings": list(self.warnings)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PruningReport":
        """Read what :meth:`to_dict` gave.

        Args:
            values: The dictionary.

        """
        layers = tuple(LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in values["layers"])
        return cls(**{**values, "layers": layers, "warnings": tuple(values["warnings"])})

    def __str__(self) -> str:
        rows = [("parameter", "shape", "weights", "kept", "density", "active")]
        rows += [
            (layer.name, "x".join(map(str, layer.shape)), *_counts(layer.num_weights, layer.num_kept, layer.num_active))
            for layer in self.layers
        ]
        measured = [layer.num_active for layer in self.layers if layer.num_active is not None]
        active = sum(measured) if len(measured) == len(self.layers) else None
        rows.append(("all", "", *_counts(self.num_weights, self.num_kept, active)))
        effective = self.effective_sparsity
        return "\n".join(
            [
                f"Pruned by {self.method}{self._after_cycle} at the start of epoch {self.epoch} (step {self.step})"
                f" in {self.seconds:.1f} s",
                *([f"control: {_CONTROLS[self.control]}"] if self.control != "none" else []),
                *_aligned(rows),
                f"sparsity {self.sparsity:.2%}, effective sparsity "
                + ("not measured" if effective is None else f"{effective:.2%}")
                + " (active: kept and on a path from input to output)",
                *(f"! {warning}" for warning in self.warnings),
            ]
        )

    def plot(self, path: str | Path) -> None:
        """Draw the density of every layer against the whole, and save the picture. Needs matplotlib.

        Args:
            path: Where to; the ending decides the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.

        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("`PruningReport.plot` needs matplotlib: `pip install matplotlib`.") from error
        figure = Figure(figsize=(8, 1.8 + 0.25 * len(self.layers)), layout="constrained")
        axes = figure.add_subplot()
        percent = [100 * layer.density for layer in self.layers]
        axes.axvline(
            100 * self.density, color="#D55E00", linestyle="--", label=f"all layers together: {self.density:.2%}"
        )
        axes.plot(percent, range(len(percent)), "o", color="#0072B2", label="one layer, and how many weights it keeps")
        lowest = min([value for value in percent if value] + [100 * self.density]) / 2
        for row, layer in enumerate(self.layers):
            text = f"{layer.num_kept:,}" if layer.num_kept else "nothing left"
            axes.annotate(
                text, (max(percent[row], lowest), row), (7, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_xscale("log")
        axes.set_xlim(lowest, 250)
        ticks = [value for value in (0.001, 0.01, 0.1, 1, 3, 10, 30, 100) if value >= lowest]
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.set_xticks([], minor=True)
        axes.set_yticks(range(len(self.layers)), [layer.name for layer in self.layers])
        axes.set_ylim(len(self.layers) - 0.5, -0.5)
        axes.grid(axis="both", color="0.9")
        axes.set_axisbelow(True)
        axes.set_xlabel("weights kept (%)")
        axes.set_title(f"Density by layer after {self.method.split('(')[0]} at {self.sparsity:.2%} sparsity")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(Path(path), dpi=150)


def _counts(num_weights: int, num_kept: int, num_active: int | None) -> tuple[str, str, str, str]:
    share = "-" if not num_kept else "?" if num_active is None else f"{num_active / num_kept:.2%}"
    return f"{num_weights:,}", f"{num_kept:,}", f"{num_kept / num_weights:.2%}", share


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names and shapes to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
