"""Labels of the axes of pictures: few enough to stand side by side, and numbers as one says them."""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_INCHES_PER_LETTER = 0.09


def row_height(names: Sequence[str]) -> float:
    """Return the inches from the name of one layer to that of the next."""
    return 0.25 if len(names) <= 25 else 0.19


def name_layers(axes: "Axes", names: Sequence[str]) -> None:
    """Name the rows from the top down; what all names begin with is named once, where there is room for it."""
    prefix = _shared_prefix(names)
    label = f"parameter ({prefix}*)" if prefix else "parameter"
    if len(label) * _INCHES_PER_LETTER > row_height(names) * len(names):
        prefix, label = "", "parameter"
    axes.set_yticks(range(len(names)), [name[len(prefix) :] for name in names], fontsize=9 if len(names) <= 25 else 8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_ylabel(label)


def count_at_the_right(axes: "Axes", counts: Sequence[int], title: str) -> None:
    """Write a number at the right of every row, under what :func:`name_layers` did at the left."""
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(counts)), [f"{count:,}" for count in counts], fontsize=9 if len(counts) <= 25 else 8)
    right.tick_params(length=0, pad=8)  # points may lie on the edge
    right.set_ylabel(title)


def label_powers(axis: "Axis", low: float, high: float, most: int = 9) -> None:
    """Label a logarithmic axis from ``low`` to ``high`` by at most about ``most`` numbers."""
    ticks = _ticks(low, high, most)
    write = _writer(low, high)
    axis.set_ticks(ticks, labels=[write(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def label_both_signs(axis: "Axis", low: float, high: float, width: float) -> None:
    """Label 0, and round numbers to both sides of it from where they no longer stand on top of it."""
    first, last = math.ceil(math.log10(width)), math.floor(math.log10(max(high, -low)))
    powers, factors = range(first, last + 1, max(1, (last - first) // 5)), (1, 3) if last - first < 2 else (1,)
    sizes = [float(f"{factor}e{power}") for power in powers for factor in factors]
    ticks = [tick for tick in (*(-size for size in sizes[::-1]), 0.0, *sizes) if low <= tick <= high]
    write = _writer(min(sizes, default=1), max(sizes, default=1))
    axis.set_ticks(ticks, labels=[write(tick) if tick else "0" for tick in ticks])
    axis.set_ticks([], minor=True)


def label_plainly(axis: "Axis") -> None:
    """Label a linear axis by the numbers themselves, without a term or factor that all have in common."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    axis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(ScalarFormatter(useOffset=False))


def in_lines(name: str, width: int) -> str:
    """Break a long name after some of its marks.

    Examples:
        >>> print(in_lines("validation/accuracy_of_the_top_five", 16))
        validation/
        accuracy_of_the_
        top_five

    """
    lines = [""]
    for part in re.findall(r"[^/_.]*[/_.]?", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _shared_prefix(names: Sequence[str]) -> str:
    parts = [name.split(".") for name in names]
    shared = 0
    while len(parts) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return "".join(f"{part}." for part in parts[0][:shared])


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers on a logarithmic axis.

    Examples:
        >>> _ticks(0.05, 100, most=9)
        [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
        >>> _ticks(61, 100, most=9)
        [65.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0, 100.0]

    """
    from matplotlib.ticker import MaxNLocator

    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for factors in ((1, 2, 5), (1, 3), (1,)):
        rounded = [float(f"{factor}e{power}") for power in powers for factor in factors]
        ticks = [tick for tick in rounded if low <= tick <= high]
        if len(ticks) <= most:
            break
    if high < 10 * low and len(ticks) < 3:
        even = map(float, MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high))
        return [tick for tick in even if low <= tick <= high]
    every = math.ceil(len(ticks) / most)
    return ticks[::-every][::-1]


def _writer(low: float, high: float) -> Callable[[float], str]:
    """Return how to write numbers of sizes from ``low`` to ``high``."""
    return "{:,g}".format if low >= 1e-3 and high < 1e6 else _scientific


def _scientific(number: float) -> str:
    r"""Write a number as a factor and a power of ten.

    Examples:
        >>> print(_scientific(3e-07), _scientific(1e-07), _scientific(-1e-07))
        $3\times10^{-7}$ $10^{-7}$ $-10^{-7}$

    """
    factor, power = f"{number:.3e}".split("e")
    before = {1.0: "", -1.0: "-"}.get(float(factor), rf"{float(factor):g}\times")
    return f"${before}10^{{{int(power)}}}$"
