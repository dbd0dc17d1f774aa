"""Pictures of a report, drawn by matplotlib, which is imported only then.

Colours are those of Okabe and Ito and the maps "cividis" and "viridis", which colour-blind people can tell apart.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from lightning_drive.core.rounds import Round, ScoreHistogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture: TypeAlias = Literal["density", "rounds", "scores", "cycles", "cuts"]
"""The pictures that a report draws."""

_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "#999999"
_WIDTH = 8.0
"""Inches; a picture is read at about 900 pixels."""

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
    axes.axvline(whole, color=_RED, linestyle="--", label=f"all layers together: {whole:.3g}%")
    lowest = min([value for value in percent if value] + [whole]) / 2
    filled = [row for row, value in enumerate(percent) if value]
    axes.plot(
        [percent[row] for row in filled], filled, "o", color=_BLUE, label="one layer, and how many weights it keeps"
    )
    for row, left in enumerate(kept):
        text, place = (f"{left:,}", percent[row]) if left else ("nothing left", lowest)
        axes.annotate(
            text,
            (place, row),
            (7, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.set_xscale("log")
    axes.set_xlim(lowest, 100 * (100 / lowest) ** 0.16)  # room for the text at the right
    _label_powers(axes, lowest)
    _label_layers(axes, names)
    axes.grid(axis="both", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("weights kept (%)")
    sparsity = 1 - sum(kept) / sum(sizes)
    axes.set_title(f"Density by layer after {method} at {sparsity:.2%} sparsity")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def rounds(names: Sequence[str], sizes: Sequence[int], history: Sequence[Round], method: str) -> "Figure":
    """Draw how many weights each round removed in all, and what it left of each layer's ``sizes``."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    left, table = list(sizes), []
    for pruning_round in history:
        left = [had - gone for had, gone in zip(left, pruning_round.removed, strict=True)]
        table.append([100 * has / size for has, size in zip(left, sizes, strict=True)])
    indices = [pruning_round.index for pruning_round in history]
    height = max(1.3, _height(names))
    figure = _figure(3.2 + height)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, height])
    figure.suptitle(f"What {method} removed, and what it left of each layer", fontsize="large")
    removed = [sum(pruning_round.removed) for pruning_round in history]
    top.plot(indices, removed, "o-", color=_BLUE, markersize=3)
    top.set_yscale("log" if any(removed) else "linear")
    top.set_ylabel("weights removed\nin the round")
    top.grid(axis="y", color="0.9")
    top.set_axisbelow(True)
    lowest = min((value for row in table for value in row if value), default=1.0)
    colours = bottom.imshow(
        [[row[layer] or math.nan for row in table] for layer in range(len(names))],
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        norm=LogNorm(min(lowest, 99.0), 100),
        extent=(indices[0] - 0.5, indices[-1] + 0.5, len(names) - 0.5, -0.5),
    )
    bottom.set_facecolor(_RED)
    _label_layers(bottom, names)
    bottom.set_xlabel("round")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    empty = ", red: nothing" if any(not value for row in table for value in row) else ""
    label = f"weights left in the layer (%){empty}"
    inch = 1 / height
    bar = figure.colorbar(
        colours, ax=bottom, location="bottom", aspect=30, fraction=0.3 * inch, pad=0.3 * inch, label=label
    )
    _label_powers(bar.ax, lowest)
    return figure


def scores(histogram: ScoreHistogram, threshold: float | None, method: str) -> "Figure":
    """Draw the distribution of the scores in the last round, and the threshold, ``None`` if there are many."""
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
        color=_RED,
        label=f"pruned in this round: {sum(histogram.pruned) + histogram.pruned_below:,}",
    )
    if threshold is not None and edges[0] <= threshold <= edges[-1]:
        axes.axvline(threshold, color="black", linestyle="--", label=f"threshold: {threshold:.3g}")
    if histogram.width is None:
        axes.set_xscale("log")
    else:
        axes.set_xscale("asinh", linear_width=histogram.width)
        _label_both_signs(axes, edges, histogram.width)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.08 * max(both))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    below = histogram.kept_below + histogram.pruned_below
    lower = f"; {below:,} are lower (or 0)" if below else ""
    axes.set_xlabel(f"score: {_SCORES.get(method, 'as the method defines it')}{lower}")
    axes.set_ylabel("weights")
    own = "" if threshold is not None else "\nEvery layer or group of layers has its own threshold."
    axes.set_title(f"Scores of the weights that were left for the last round of {method}{own}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def cycles(known: Sequence[tuple[int, float, float]], metric: str) -> "Figure":
    """Draw a metric at the end of each cycle: ``known`` has cycle, fraction of the weights left in it, and metric."""
    figure = _figure(4.2)
    axes = figure.add_subplot()
    percents = [100 * left for _, left, _ in known]
    axes.plot(percents, [value for _, _, value in known], "o-", color=_BLUE)
    axes.set_xscale("log")
    axes.set_xlim(max(percents) * 1.15, min(percents) / 1.15)
    _label_powers(axes, min(percents))
    axes.margins(y=0.12)
    every = -(-len(known) // 12)
    for cycle, left, value in known[::every]:
        axes.annotate(f"{cycle}", (100 * left, value), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("weights left during the cycle (%)")
    axes.set_ylabel(f"{metric}, at the end of the cycle")
    axes.set_title("Iterative magnitude pruning: what each cycle, by its number, reached before its cut")
    return figure


def cuts(sparsities: Sequence[tuple[float, float]], known: Sequence[tuple[float, float]], metric: str) -> "Figure":
    """Draw the sparsity after each cut, and a metric where it is known, both over the epoch."""
    figure = _figure(4.2)
    axes = figure.add_subplot()
    epochs = [0.0, *(epoch for epoch, _ in sparsities)]
    percents = [0.0, *(100 * sparsity for _, sparsity in sparsities)]
    axes.step(epochs, percents, "-", where="post", color=_BLUE, label="sparsity after each cut")
    axes.plot(epochs[1:], percents[1:], "o", color=_BLUE, markersize=3)
    axes.set_ylim(0, 105)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("epoch")
    axes.set_ylabel("weights removed (%)")
    axes.set_title("Gradual pruning: the sparsity, and what training reached with it")
    if known:
        other = axes.twinx()
        other.plot(*zip(*known, strict=True), "s-", color=_RED, markersize=4, label=f"{metric}, at the end of an epoch")
        other.set_ylabel(metric)
        other.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _figure(height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("`PruningReport.plot` needs matplotlib: `pip install matplotlib`.") from error
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _height(names: Sequence[str]) -> float:
    return len(names) * (0.25 if len(names) <= 25 else 0.19)


def _label_layers(axes: "Axes", names: Sequence[str]) -> None:
    """Name the rows from the top down, without what all names begin with."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(parts) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    prefix = "".join(f"{part}." for part in parts[0][:shared])
    axes.set_yticks(range(len(names)), [name[len(prefix) :] for name in names], fontsize=9 if len(names) <= 25 else 8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_ylabel(f"parameter ({prefix}*)" if prefix else "parameter")


def _label_both_signs(axes: "Axes", edges: Sequence[float], width: float) -> None:
    """Label 0, and powers of ten to both sides of it from where they no longer stand on top of it."""
    first, last = math.ceil(math.log10(width)), math.floor(math.log10(max(edges[-1], -edges[0])))
    powers = range(first, last + 1, max(1, (last - first) // 5))
    ticks = {0.0: "0"}
    for power in powers:
        ticks |= {10.0**power: f"$10^{{{power}}}$", -(10.0**power): f"$-10^{{{power}}}$"}
    shown = {tick: text for tick, text in ticks.items() if edges[0] <= tick <= edges[-1]}
    axes.set_xticks([*shown], [*shown.values()])
    axes.minorticks_off()


def _label_powers(axes: "Axes", lowest: float) -> None:
    """Put plain numbers on a logarithmic axis of percents, few enough to stand side by side."""
    decades = 2 - math.floor(math.log10(lowest))
    ticks = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(lowest)), 3)
        for factor in ((1, 2, 5) if decades <= 2 else (1, 3) if decades <= 4 else (1,))
    ]
    ticks = [tick for tick in ticks if lowest * 0.999 <= tick <= 100]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
