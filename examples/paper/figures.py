"""The paper's figures 2, 3, 5 and 6, drawn from our runs, with the paper's values next to ours."""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published
import results
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from results import EXPERIMENTS, METHODS, Run, Summary

GREY = "#555555"
# Okabe and Ito's colours, which colour-blind readers can tell apart, each with a marker of its own.
STYLES = {
    "snip": ("#E69F00", "s"),
    "synflow": ("#0072B2", "^"),
    "drive": ("#D55E00", "D"),
    "gradual_exponential": ("#CC79A7", "P"),
    "imp": ("#009E73", "v"),
}
SPARE = (("black", "o"), ("#882255", "X"), ("#999933", "*"))  # for methods of one's own
COLOURS = {"dense": GREY} | {method: colour for method, (colour, _) in STYLES.items()}
SIZE, DPI = (8.0, 4.8), 200  # inches, dots in one
OURS = "ours, mean ± standard deviation"
PAPER: dict[str, Any] = {"linestyle": "--", "marker": "o", "markerfacecolor": "white", "linewidth": 1}
HOLLOW: dict[str, Any] = {"facecolor": "none", "linestyle": "--"}
OPAQUE: dict[str, Any] = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
APART = 1.02  # factor between neighbours on the logarithmic axis, so that no whisker hides another
LOG_FROM = 30  # times that differ by more than this factor need a logarithmic axis

Curves = Mapping[str, Mapping[float, Summary]]  # method to sparsity to accuracy in percent


@dataclass(frozen=True)
class Comparison:
    """The runs of an experiment that its figures show, and the paper's values."""

    experiment: str
    runs: Sequence[Run]
    left_out: Sequence[str] = ()
    """The methods that have runs, but no style."""

    @property
    def styles(self) -> dict[str, tuple[str, str]]:
        return styles_of(self.runs)

    @property
    def curves(self) -> Curves:
        curves: dict[str, dict[float, Summary]] = {}
        for (method, _, sparsity), summary in results.accuracies(self.runs).items():
            if sparsity:
                curves.setdefault(method, {})[sparsity] = summary
        return curves

    @property
    def dense(self) -> Summary | None:
        return results.accuracies(self.runs).get(("dense", "none", 0.0))

    @property
    def paper(self) -> published.Accuracies:
        return published.ACCURACIES.get(self.experiment, {})

    @property
    def paper_dense(self) -> float | None:
        return published.UNPRUNED.get(self.experiment)

    @property
    def subtitle(self) -> str:
        """The data, epochs, seeds and hardware of the runs."""
        counts = {summary.count for summary in results.accuracies(self.runs).values()}
        seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
        images = results.listed(f"{run.data}, {run.train_images:,} training images" for run in self.runs)
        epochs = results.listed(run.epochs for run in self.runs)
        hardware = results.listed(run.hardware for run in self.runs)
        return f"{images}, {epochs} epochs, {seeds} seed{'' if seeds == '1' else 's'}\n{hardware}"


def select(runs: Iterable[Run]) -> list[Comparison]:
    """Group the runs that figures show by experiment: the paper's methods and one's own, without controls."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.control == "none":
            groups.setdefault(run.experiment, []).append(run)
    comparisons = [compare(experiment, groups[experiment]) for experiment in EXPERIMENTS.of(groups)]
    return [comparison for comparison in comparisons if any(run.sparsity for run in comparison.runs)]


def compare(experiment: str, runs: Sequence[Run]) -> Comparison:
    shown = {"dense", *styles_of(runs)}
    left_out = METHODS.of(run.method for run in runs if run.method not in shown)
    return Comparison(experiment, [run for run in runs if run.method in shown], left_out)


def styles_of(runs: Iterable[Run]) -> dict[str, tuple[str, str]]:
    """Return the colours and markers of the paper's methods, and of the first ones that have no title here."""
    own = [method for method in METHODS.of(run.method for run in runs) if method not in METHODS]
    return STYLES | dict(zip(own, SPARE, strict=False))


def save_all(runs: Iterable[Run], folder: Path) -> list[Path]:
    """Draw every figure that has runs, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for comparison in select(runs):
        for number, draw in FIGURES.items():
            if figure := draw(comparison):
                paths.append(folder / f"{comparison.experiment}_figure{number}.png")
                figure.savefig(paths[-1], dpi=DPI)
    return paths


def draw_bars(comparison: Comparison) -> Figure:
    """Draw the accuracies at the highest sparsity: the paper's Figure 2."""
    sparsity = max(run.sparsity for run in comparison.runs)
    ours = {method: curve[sparsity] for method, curve in comparison.curves.items() if sparsity in curve}
    theirs = {method: curve[sparsity] for method, curve in comparison.paper.items() if sparsity in curve}
    methods = [method for method in comparison.styles if method in ours or method in theirs]
    figure, axes = new_figure(comparison, f"Test accuracy at {100 * sparsity:.10g}% sparsity")
    width = 0.4 if theirs else 0.6
    for place, method in enumerate(methods):
        colour, _ = comparison.styles[method]
        if method in ours:
            left = place - width / 2 if method in theirs else place
            bar = axes.bar(left, ours[method].mean, width, yerr=ours[method].deviation, capsize=4, color=colour)
            axes.bar_label(bar, fmt="%.1f", padding=3, **OPAQUE)
        if method in theirs:
            bar = axes.bar(place + width / 2, theirs[method], width * 0.94, edgecolor=colour, **HOLLOW)
            axes.bar_label(bar, fmt="%.1f", padding=3, color=GREY, **OPAQUE)
    axes.set_xticks(range(len(methods)), [METHODS[method] for method in methods])
    axes.set_ylabel("test accuracy (%)")
    handles: list[Artist] = [Patch(color=GREY, label=OURS)]
    if theirs:
        handles.append(Patch(edgecolor=GREY, label="paper", **HOLLOW))
    finish(figure, [*handles, *draw_dense(axes, comparison)])
    return figure


def draw_differences(comparison: Comparison) -> Figure | None:
    """Draw the difference of every method's accuracy to that of IMP: the paper's Figure 3."""
    imp, paper_imp = comparison.curves.get("imp", {}), comparison.paper.get("imp", {})
    ours = {
        method: {sparsity: minus(summary, imp[sparsity]) for sparsity, summary in curve.items() if sparsity in imp}
        for method, curve in comparison.curves.items()
        if method != "imp" and imp.keys() & curve.keys()
    }
    theirs = {
        method: {sparsity: value - paper_imp[sparsity] for sparsity, value in curve.items()}
        for method, curve in comparison.paper.items()
        if method != "imp"
    }
    if not ours:
        return None
    figure, axes = new_figure(comparison, "Test accuracy above (+) or below (-) that of IMP, ± standard deviation")
    handles = draw_curves(axes, comparison.styles, ours, theirs)
    axes.axhline(0, color=COLOURS["imp"], zorder=0)
    axes.set_ylabel("difference to IMP (percentage points)")
    finish(figure, [*handles, Line2D([], [], color=COLOURS["imp"], label="IMP"), *paper_handle(theirs)])
    return figure


def draw_accuracies(comparison: Comparison) -> Figure | None:
    """Draw accuracy over sparsity, with that of the dense network: the paper's Figure 5; nothing of one sparsity."""
    if len({sparsity for curve in (*comparison.curves.values(), *comparison.paper.values()) for sparsity in curve}) < 2:
        return None
    figure, axes = new_figure(comparison, "Test accuracy over sparsity, mean ± standard deviation")
    handles = draw_curves(axes, comparison.styles, comparison.curves, comparison.paper)
    axes.set_ylabel("test accuracy (%)")
    left_out = "; ".join(METHODS[method] for method in comparison.left_out)
    note = textwrap.fill(f"Not shown: {left_out}", 120) if left_out else ""
    finish(figure, [*handles, *paper_handle(comparison.paper), *draw_dense(axes, comparison)], note)
    return figure


def draw_times(comparison: Comparison) -> Figure:
    """Draw the time to the masks, and that of training with them: the paper's Figure 6."""
    runs = results.timed_together(comparison.runs)
    to_masks = results.seconds(runs, lambda run: run.seconds_to_masks)
    training = results.seconds(runs, lambda run: run.seconds["training"])
    theirs = published.PRUNING_SECONDS.get(comparison.experiment, {})
    figure, axes = new_figure(comparison, "Time per network, mean over all sparsities and seeds")
    lengths = []
    for place, method in enumerate(to_masks):
        colour = GREY if method == "dense" else comparison.styles[method][0]
        bars: list[tuple[float, dict[str, Any]]] = [
            (to_masks[method].mean, {"color": colour}),
            (training[method].mean, {"color": colour, "alpha": 0.4}),
        ]
        if method in theirs:
            bars.append((theirs[method], {"edgecolor": colour, **HOLLOW}))
        shown = [(seconds, style) for seconds, style in bars if seconds]
        for row, (seconds, style) in enumerate(shown):
            bar = axes.barh(place + 0.28 * (row - (len(shown) - 1) / 2), seconds, 0.25, **style)
            axes.bar_label(bar, [results.duration(seconds)], padding=3, fontsize="small")
            lengths.append(seconds)
    totals = [
        f"{METHODS[method]}\n{results.duration(to_masks[method].mean + training[method].mean)}" for method in to_masks
    ]
    axes.set_yticks(range(len(totals)), totals)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    if max(lengths) > LOG_FROM * min(lengths):
        axes.set_xscale("log")
        axes.set_xlim(left=min(lengths) / 2)
        axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("seconds; below the names: in all")
    handles = [
        Patch(color=GREY, label="to masks: warm-up and pruning, in IMP all cycles"),
        Patch(color=GREY, alpha=0.4, label="training with them"),
    ]
    if theirs:
        handles.append(Patch(edgecolor=GREY, label=f"paper, to masks, on an {published.PRUNING_HARDWARE}", **HOLLOW))
    finish(figure, handles)
    return figure


FIGURES: dict[int, Callable[[Comparison], Figure | None]] = {
    2: draw_bars,
    3: draw_differences,
    5: draw_accuracies,
    6: draw_times,
}


def new_figure(comparison: Comparison, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    figure.suptitle(f"{EXPERIMENTS[comparison.experiment]}\n{title}", fontsize="medium")
    axes = figure.subplots()
    axes.set_title(comparison.subtitle, fontsize="small", color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def finish(figure: Figure, handles: Sequence[Artist], note: str = "") -> None:
    legend = {"ncols": 5, "frameon": False, "fontsize": "small", "title": note or None, "title_fontsize": "small"}
    figure.legend(handles=handles, loc="outside lower center", **legend)


def draw_curves(
    axes: Axes, styles: Mapping[str, tuple[str, str]], ours: Curves, theirs: published.Accuracies
) -> list[Line2D]:
    """Draw values over sparsity, on an axis logarithmic in the kept fraction, and return handles for the legend."""
    handles = []
    for place, (method, (colour, marker)) in enumerate(styles.items()):
        if method in theirs:
            kept = [100 * (1 - sparsity) for sparsity in theirs[method]]
            axes.plot(kept, list(theirs[method].values()), color=colour, **{**PAPER, "marker": marker})
        if method in ours:
            kept = [100 * (1 - sparsity) * APART ** (1.5 - place) for sparsity in ours[method]]
            means = [summary.mean for summary in ours[method].values()]
            spread = [math.nan if summary.deviation is None else summary.deviation for summary in ours[method].values()]
            axes.errorbar(kept, means, spread, color=colour, marker=marker, capsize=3)
        if method in ours or method in theirs:
            handles.append(Line2D([], [], color=colour, marker=marker, label=METHODS[method]))
    label_sparsities(axes, {sparsity for curves in (ours, theirs) for curve in curves.values() for sparsity in curve})
    return handles


def paper_handle(theirs: published.Accuracies) -> list[Line2D]:
    return [Line2D([], [], color=GREY, label="paper", **PAPER)] if theirs else []


def label_sparsities(axes: Axes, sparsities: Iterable[float]) -> None:
    ordered = sorted(sparsities)
    axes.set_xscale("log")
    axes.set_xticks([100 * (1 - sparsity) for sparsity in ordered], [f"{100 * sparsity:.10g}" for sparsity in ordered])
    axes.set_xticks([], minor=True)
    axes.invert_xaxis()
    axes.set_xlabel("sparsity (% of the weights removed)")


def draw_dense(axes: Axes, comparison: Comparison) -> list[Line2D]:
    """Draw lines for the dense network, and return handles for the legend."""
    lines = []
    if comparison.dense:
        lines.append(axes.axhline(comparison.dense.mean, color=GREY, zorder=0, label="dense"))
    if comparison.paper_dense is not None:
        lines.append(axes.axhline(comparison.paper_dense, color=GREY, zorder=0, linestyle="--", label="dense, paper"))
    return lines


def minus(summary: Summary, other: Summary) -> Summary:
    """Subtract; independent deviations add up as squares."""
    spread = None
    if summary.deviation is not None and other.deviation is not None:
        spread = math.hypot(summary.deviation, other.deviation)
    return Summary(summary.mean - other.mean, spread, min(summary.count, other.count))
