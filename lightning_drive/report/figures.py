"""Pictures of a report, drawn by matplotlib, which is imported only then.

Colours are those of Okabe and Ito and the map "cividis", which colour-blind people can tell apart; red is hatched.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from lightning_drive.core.rounds import Round, ScoreHistogram, Unit
from lightning_drive.report import axis_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture: TypeAlias = Literal["density", "rounds", "scores", "cycles", "cuts"]
"""The pictures that a report draws."""

_BLUE, _ORANGE, _RED = "#0072B2", "#D55E00", "#CC0000"
_WIDTH = 8.0
"""Inches; a picture is read at about 900 pixels."""

_ROW = ("axes fraction", "data")
"""Where the left end of a row is at 0."""

_DRIVE = r"$|\theta g|$, which ranks as $|\theta \cdot \partial L/\partial m \cdot \partial L/\partial\theta|$"
_MAGNITUDE = r"$|\theta|$, the magnitude of a weight"
_SCORES = {
    "DRIVE": _DRIVE,
    "SNIP": r"$|\theta \cdot \partial L / \partial \theta|$",
    "SynFlow": r"$|\theta \cdot \partial R / \partial \theta|$",
    "IMP": _MAGNITUDE,
    "Magnitude": _MAGNITUDE,
    "GradualMagnitude": _MAGNITUDE,
    "GradualDRIVE": _DRIVE,
}


def density(names: Sequence[str], kept: Sequence[int], sizes: Sequence[int], method: str) -> "Figure":
    """Draw which fraction of each layer's ``sizes`` is kept, against the whole."""
    figure = _figure(1.8 + _height(names))
    axes = figure.add_subplot()
    percent = [100 * left / size for left, size in zip(kept, sizes, strict=True)]
    whole = 100 * sum(kept) / sum(sizes)
    lowest = min([value for value in percent if value] + [whole]) / 2
    filled = [row for row, value in enumerate(percent) if value]
    axes.axvline(whole, color=_ORANGE, linestyle="--", label=f"all layers together: {whole:.3g}%")
    axes.plot([percent[row] for row in filled], filled, "o", color=_BLUE, label="one layer", clip_on=False, zorder=3)
    for row in set(range(len(names))).difference(filled):
        axes.annotate("nothing left", (0, row), (5, 0), _ROW, "offset points", va="center_baseline", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(lowest, 100)
    axis_labels.label_powers(axes.xaxis, lowest, 100)
    axis_labels.name_layers(axes, names)
    axis_labels.count_at_the_right(axes, kept, "weights kept")
    axes.grid(axis="both", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("weights kept (%)")
    sparsity = 1 - sum(kept) / sum(sizes)
    axes.set_title(f"Density by layer after {method} at {sparsity:.2%} sparsity")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def rounds(names: Sequence[str], sizes: Sequence[int], history: Sequence[Round], method: str, unit: Unit) -> "Figure":
    """Draw how many weights each round removed in all, and what it left of each layer's ``sizes``."""
    height = _height(names)
    figure = _figure(3.2 + height)
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    left, table = list(sizes), []
    for pruning_round in history:
        left = [had - gone for had, gone in zip(left, pruning_round.removed, strict=True)]
        table.append([100 * has / size for has, size in zip(left, sizes, strict=True)])
    indices = [pruning_round.index for pruning_round in history]
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, height])
    figure.suptitle(f"What {method} removed, and what it left of each layer", fontsize="large")
    _draw_removed(top, indices, [sum(pruning_round.removed) for pruning_round in history])
    top.set_ylabel(f"weights removed\nin the {unit}")
    lowest = min(min((value for row in table for value in row if value), default=100.0), 99.0)
    colours = bottom.imshow(
        [[row[layer] or math.nan for row in table] for layer in range(len(names))],
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        norm=LogNorm(lowest, 100),
        extent=(indices[0] - 0.5, indices[-1] + 0.5, len(names) - 0.5, -0.5),
    )
    bottom.patch.set(facecolor=_RED, edgecolor="white", hatch="///", linewidth=0)
    axis_labels.name_layers(bottom, names)
    bottom.set_xlabel(unit)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    empty = ", red: nothing" if any(not value for row in table for value in row) else ""
    label = f"weights left in the layer (%){empty}"
    inch = 1 / height
    bar = figure.colorbar(
        colours, ax=bottom, location="bottom", aspect=30, fraction=0.3 * inch, pad=0.3 * inch, label=label
    )
    axis_labels.label_powers(bar.ax.xaxis, lowest, 100)
    return figure


def scores(histogram: ScoreHistogram, history: Sequence[Round], method: str, unit: Unit) -> "Figure":
    """Draw the distribution of the scores in the last round, and the threshold, if there is only one."""
    figure = _figure(4.2)
    axes = figure.add_subplot()
    edges = histogram.edges
    both = [kept + pruned for kept, pruned in zip(histogram.kept, histogram.pruned, strict=True)]
    axes.stairs(
        histogram.kept, edges, fill=True, color=_BLUE, label=f"kept: {sum(histogram.kept) + histogram.kept_below:,}"
    )
    axes.stairs(
        both,
        edges,
        baseline=histogram.kept,
        fill=True,
        color=_ORANGE,
        label=f"pruned in this {unit}: {sum(histogram.pruned) + histogram.pruned_below:,}",
    )
    threshold = history[-1].threshold if history else None
    if threshold is not None and edges[0] <= threshold <= edges[-1]:
        axes.axvline(threshold, color="black", linestyle="--", label=f"threshold: {threshold:.3g}")
    if histogram.width is None:
        axes.set_xscale("log")
        axis_labels.label_powers(axes.xaxis, edges[0], edges[-1])
    else:
        axes.set_xscale("asinh", linear_width=histogram.width)
        axis_labels.label_both_signs(axes.xaxis, edges[0], edges[-1], histogram.width)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.08 * max(both))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    below = histogram.kept_below + histogram.pruned_below
    lower = f"; {below:,} are lower (or 0)" if below else ""
    axes.set_xlabel(f"score: {_SCORES.get(method, 'as the method defines it')}{lower}")
    axes.set_ylabel("weights")
    which = "of all weights in the only" if len(history) == 1 else "of the weights that were left for the last"
    own = "" if threshold is not None else "\nEvery layer or group of layers has its own threshold."
    axes.set_title(f"Scores {which} {unit} of {method}{own}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def cycles(known: Sequence[tuple[int, float, float]], metric: str) -> "Figure":
    """Draw a metric at the end of each cycle: ``known`` has cycle, fraction of the weights left in it, and metric."""
    figure = _figure(4.2)
    from matplotlib.patheffects import withStroke

    axes = figure.add_subplot()
    percents = [100 * left for _, left, _ in known]
    axes.plot(percents, [value for _, _, value in known], "o-", color=_BLUE, clip_on=False, zorder=3)
    axes.set_xscale("log")
    axes.set_xlim(100, min(percents) / 1.1)
    axis_labels.label_powers(axes.xaxis, min(percents), 100)
    axis_labels.label_plainly(axes.yaxis)
    axes.margins(y=0.12)
    for cycle, left, value in known[:: -(-len(known) // 12)]:
        number = axes.annotate(f"{cycle}", (100 * left, value), (3, 6), textcoords="offset points", fontsize=8)
        number.set_path_effects([withStroke(linewidth=2, foreground="white")])
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("weights left during the cycle (%)")
    axes.set_ylabel(axis_labels.in_lines(metric, 36))
    axes.set_title("Iterative magnitude pruning: what each cycle reached before its cut")
    return figure


def cuts(sparsities: Sequence[tuple[float, float]], known: Sequence[tuple[float, float]], metric: str) -> "Figure":
    """Draw the sparsity after each cut, and below it a metric where it is known, both over the epoch."""
    figure = _figure(4.8 if known else 3.2)
    from matplotlib.ticker import MaxNLocator

    top, *others = figure.subplots(2 if known else 1, 1, sharex=True, squeeze=False)[:, 0]
    epochs = [0.0, *(epoch for epoch, _ in sparsities)]
    percents = [0.0, *(100 * sparsity for _, sparsity in sparsities)]
    top.step(epochs, percents, "-", where="post", color=_BLUE)
    top.plot(epochs[1:], percents[1:], "o", color=_BLUE, markersize=3, clip_on=False, zorder=3)
    top.set_xlim(0, epochs[-1])
    top.set_ylim(0, 100)
    top.set_ylabel("weights removed (%)")
    for other in others:
        other.plot(*zip(*known, strict=True), "o-", color=_ORANGE, markersize=4, clip_on=False, zorder=3)
        other.set_ylabel(axis_labels.in_lines(metric, 18))
        other.margins(y=0.12)
        axis_labels.label_plainly(other.yaxis)
    for axes in (top, *others):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    reached = ", and what training had reached" if known else ""
    figure.suptitle(f"Gradual pruning to its last cut: sparsity after each one{reached}", fontsize="large")
    return figure


def _draw_removed(axes: "Axes", indices: Sequence[int], removed: Sequence[int]) -> None:
    """Draw how many weights each round removed, on a logarithmic axis, which has no place for 0."""
    axes.plot(indices, [number or math.nan for number in removed], "o-", color=_BLUE, markersize=3, clip_on=False)
    some = [number for number in removed if number]
    if some:
        low, high = min(some) / 1.3, max(some) * 1.3
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axis_labels.label_powers(axes.yaxis, low, high, most=5)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _figure(height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("`PruningReport.plot` needs matplotlib: `pip install matplotlib`.") from error
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _height(names: Sequence[str]) -> float:
    return max(1.3, len(names) * axis_labels.row_height(names))
