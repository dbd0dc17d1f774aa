"""The columns of the report's table: their titles, their order, and the text of their cells."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_drive.report import tables
from lightning_drive.report.parts import LayerReport, total


class Column(NamedTuple):
    """One column of numbers."""

    title: str
    cell: Callable[[Sequence[LayerReport]], str]
    """Returns the cell for some layers: for one in its own row, for all of them in the last row."""
    is_known: Callable[[LayerReport], bool] = lambda layer: True
    """Whether a layer has the number; a column that no layer has a number for is left out."""
    is_in_text: bool = True
    """Whether the column is also in the plain text and on a terminal, where a line must not be long."""
    may_go: bool = False
    """Whether a narrow terminal leaves the column out: other columns, or the lines below, tell enough."""


def _active(layers: Sequence[LayerReport]) -> str:
    active, kept = total(layer.num_active for layer in layers), sum(layer.num_kept for layer in layers)
    return "-" if not kept else "?" if active is None else f"{active / kept:.2%}"


def _density(layers: Sequence[LayerReport]) -> str:
    return f"{sum(layer.num_kept for layer in layers) / sum(layer.num_weights for layer in layers):.2%}"


COLUMNS = (
    Column("weights", lambda layers: f"{sum(layer.num_weights for layer in layers):,}", may_go=True),
    Column("kept", lambda layers: f"{sum(layer.num_kept for layer in layers):,}"),
    Column("density", _density),
    Column("active", _active),
    Column(
        "MACs",
        lambda layers: tables.count(total(layer.multiply_adds for layer in layers)),
        lambda layer: layer.multiply_adds is not None,
        may_go=True,
    ),
    Column(
        "non-zero MACs",
        lambda layers: tables.count(total(layer.nonzero_multiply_adds for layer in layers)),
        lambda layer: layer.multiply_adds is not None,
        may_go=True,
    ),
    Column(
        "bytes",
        lambda layers: tables.count(total(layer.dense_bytes for layer in layers)),
        lambda layer: layer.itemsize is not None,
        is_in_text=False,
    ),
    Column(
        "non-zero bytes",
        lambda layers: tables.count(total(layer.nonzero_bytes for layer in layers)),
        lambda layer: layer.itemsize is not None,
        is_in_text=False,
    ),
)
"""The columns from left to right, after the name and the shape of the parameter."""

DISPENSABLE = ("shape", *(column.title for column in COLUMNS if column.may_go))
"""The titles of the columns that a narrow terminal leaves out, in this order."""


def rows(layers: Sequence[LayerReport], *, in_text: bool) -> list[tuple[str, ...]]:
    """Return the table: the titles, a row for each layer, and one for all of them.

    Examples:
        >>> for row in rows([LayerReport("fc.weight", (2, 4), 8, num_kept=2, num_active=1)], in_text=True):
        ...     print(row)
        ('parameter', 'shape', 'weights', 'kept', 'density', 'active')
        ('fc.weight', '2x4', '8', '2', '25.00%', '50.00%')
        ('all', '', '8', '2', '25.00%', '50.00%')

    """
    columns = [column for column in COLUMNS if (column.is_in_text or not in_text) and any(map(column.is_known, layers))]
    return [
        ("parameter", "shape", *(column.title for column in columns)),
        *((layer.name, tables.shape(layer.shape), *(column.cell([layer]) for column in columns)) for layer in layers),
        ("all", "", *(column.cell(layers) for column in columns)),
    ]
