"""What both examples end with: a table and a figure that compare networks of different sparsity."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_drive import PruningReport

GREY = "#555555"
# Okabe and Ito's colours, which colour-blind readers can tell apart, each with a marker of its own.
STYLES = (("#56B4E9", "o"), ("#E69F00", "s"), ("#0072B2", "^"), ("#D55E00", "D"), ("#009E73", "v"), ("#CC79A7", "P"))


@dataclass(frozen=True)
class Result:
    """What became of one network.

    Args:
        network: What to call it.
        accuracy: Fraction of the test images that it recognises.
        num_weights: Number of weights that pruning may remove.
        seconds: Duration of ``trainer.fit_state``, pruning included.
        report: What was pruned; ``None`` for a dense network.

    """

    network: str
    accuracy: float
    num_weights: int
    seconds: float
    report: PruningReport | None

    @property
    def num_kept(self) -> int:
        return self.report.num_kept if self.report else self.num_weights

    @property
    def percent_kept(self) -> float:
        return 100 * self.num_kept / self.num_weights

    @property
    def pruning_seconds(self) -> float:
        return self.report.seconds if self.report else 0.0


def print_table(results: Sequence[Result]) -> None:
    table = Table("network", box=box.HORIZONTALS)
    for heading in ("test accuracy", "weights kept", "", "pruning", "training"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.network,
            f"{result.accuracy:.2%}",
            f"{result.num_kept:,}",
            f"{result.percent_kept:.3g}%",
            f"{result.pruning_seconds:.1f} s" if result.report else "-",
            f"{result.seconds - result.pruning_seconds:.1f} s",
        )
    Console().print(table)


def save_figure(results: Sequence[Result], title: str, path: Path) -> None:
    """Draw what sparsity costs, and where in the network weights are left."""
    pruned = [(result, result.report) for result in results if result.report]
    pruned.sort(key=lambda pair: pair[0].num_kept, reverse=True)
    num_layers = max((len(report.layers) for _, report in pruned), default=0)

    figure = Figure(figsize=(8, 3.4 + 0.08 * num_layers), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for result in results:
        if not result.report:
            draw_dense_accuracy(left, result)
    draw_accuracies(left, [result for result, _ in pruned])
    draw_densities(right, pruned)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=200)


def save_pictures(results: Sequence[Result], path: Path) -> list[Path]:
    """Draw what the report of the sparsest network has, in files beside the comparison's figure."""
    report = min((result.report for result in results if result.report), key=lambda report: report.density)
    paths = {kind: path.with_stem(f"{path.stem}-{kind}") for kind in report.pictures}
    for kind, picture in paths.items():
        report.plot(picture, kind)
    return list(paths.values())


def draw_dense_accuracy(axes: Axes, dense: Result) -> None:
    percent = 100 * dense.accuracy
    axes.axhline(percent, color=GREY, linestyle="--", zorder=0)
    axes.annotate(
        f"{dense.network}: {dense.num_weights:,} weights",
        xy=(0, percent),
        xycoords=("axes fraction", "data"),
        xytext=(5, 4),
        textcoords="offset points",
        color=GREY,
    )


def draw_accuracies(axes: Axes, results: Sequence[Result]) -> None:
    kept = [result.percent_kept for result in results]
    axes.plot(kept, [100 * result.accuracy for result in results], color=GREY, linewidth=1, zorder=0)
    for result, (colour, marker) in zip(results, cycle(STYLES)):
        axes.plot(result.percent_kept, 100 * result.accuracy, marker, color=colour, markersize=9)
    axes.set_xscale("log")
    axes.set_xticks(kept, [f"{result.percent_kept:.3g}%\n{result.num_kept:,}" for result in results])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.2, y=0.2)
    axes.set_xlabel("weights kept")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("What sparsity costs", fontsize="medium")


def draw_densities(axes: Axes, pruned: Sequence[tuple[Result, PruningReport]]) -> None:
    for (result, report), (colour, marker) in zip(pruned, cycle(STYLES)):
        names = [layer.name.removeprefix("network.").removesuffix(".weight") for layer in report.layers]
        rows = [f"{name} ({layer.num_weights:,})" for name, layer in zip(names, report.layers, strict=True)]
        percents = [100 * layer.density for layer in report.layers]
        axes.plot(percents, rows, marker, color=colour, label=result.network)
    axes.set_xscale("log")
    axes.set_xlim(right=120)
    axes.xaxis.set_major_formatter("{x:g}%")
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("weights kept, of those in brackets")
    axes.set_title("Where weights are left", fontsize="medium")
