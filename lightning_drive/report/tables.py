"""Tables of text, in four forms: aligned lines, Markdown, HTML, and for a terminal.

The first row is the header, the last one the sum of those between. The first two columns are text, the others numbers.
"""

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.console import Group, JustifyMethod


Rows: TypeAlias = Sequence[Sequence[str]]

_NUM_TEXTS = 2


def plain(rows: Rows) -> list[str]:
    """Return the lines of a table with aligned columns.

    Examples:
        >>> plain([("name", "shape", "kept"), ("a", "2x4", "5"), ("all", "", "5")])
        ['name  shape  kept', 'a     2x4       5', 'all             5']

    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < _NUM_TEXTS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def markdown(rows: Rows) -> list[str]:
    r"""Return the lines of a table in the Markdown that GitHub, GitLab and Jupyter know; names are set as code.

    Examples:
        >>> markdown([("name", "shape", "kept"), ("a|b", "2x4", "5"), ("all", "", "5")])
        ['| name | shape | kept |', '| :-- | :-- | --: |', '| `a\\|b` | 2x4 | 5 |', '| **all** |  | **5** |']

    """
    header, *body, total = rows
    ruler = [":--" if column < _NUM_TEXTS else "--:" for column in range(len(header))]
    names = ((f"`{row[0]}`", *row[1:]) for row in body)
    bold = [f"**{cell}**" if cell else "" for cell in total]
    every = ([cell.replace("|", "\\|") for cell in row] for row in (header, ruler, *names, bold))
    return [f"| {' | '.join(row)} |" for row in every]


def to_html(rows: Rows, above: Iterable[str], below: Iterable[str]) -> str:
    """Return a table between lines of text as a fragment of HTML that needs nothing else and has no colours."""
    header, *body, total = ([html.escape(cell) for cell in row] for row in rows)
    bold = [f"<b>{cell}</b>" for cell in total]
    return "\n".join(
        [
            '<div style="overflow-x: auto">',
            *(f"<p>{html.escape(line)}</p>" for line in above),
            '<table style="border-collapse: collapse; font-variant-numeric: tabular-nums">',
            f"<thead>{_html_row('th', header)}</thead>",
            "<tbody>",
            *(_html_row("td", row) for row in body),
            "</tbody>",
            f'<tfoot style="border-top: 1px solid">{_html_row("td", bold)}</tfoot>',
            "</table>",
            *(f"<p>{html.escape(line)}</p>" for line in below),
            "</div>",
        ]
    )


def for_terminal(
    rows: Rows, above: Iterable[str], below: Iterable[str], width: int, dispensable: Iterable[str] = ()
) -> "Group":
    """Return a table between lines of text for a terminal with ``width`` characters in a line. Needs rich.

    Of a table that is too wide, the columns with ``dispensable`` titles are left out, one after the other; in what is
    then still too wide, names go over several lines.

    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    texts = rows[0][:_NUM_TEXTS]
    for title in dispensable:
        if len(plain(rows)[0]) + 2 > width and title in rows[0]:  # 2: at the edges
            place = rows[0].index(title)
            rows = [(*row[:place], *row[place + 1 :]) for row in rows]
    header, *body, total = ([Text(cell) for cell in row] for row in rows)  # as it is: names may look like markup
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_footer=True)
    for column, (head, foot) in enumerate(zip(header, total, strict=True)):
        side: JustifyMethod = "left" if head.plain in texts else "right"
        table.add_column(head, foot, justify=side, overflow="fold", no_wrap=column > 0)
    for row in body:
        table.add_row(*row)
    return Group(*map(Text, above), table, *map(Text, below))


def count(number: int | None) -> str:
    """Return a number with three digits and the letter of its thousands; ``None`` is not known.

    Examples:
        >>> count(999), count(1_234), count(44_696_000), count(None)
        ('999', '1.23k', '44.7M', '?')

    """
    if number is None:
        return "?"
    value, letters = float(number), iter(("", "k", "M", "G", "T", "P", "E"))
    letter = next(letters)
    while value >= 999.5 and (following := next(letters, None)):
        value, letter = value / 1000, following
    return f"{value:.3g}{letter}"


def shape(sizes: Sequence[int]) -> str:
    """Return the shape of a parameter.

    Examples:
        >>> shape((8, 4, 3, 3)), shape(())
        ('8x4x3x3', '')

    """
    return "x".join(map(str, sizes))


def _html_row(kind: str, cells: Sequence[str]) -> str:
    sides = ("left" if column < _NUM_TEXTS else "right" for column in range(len(cells)))
    styled = (f"padding: 2px 8px; text-align: {side}" for side in sides)
    parts = (f'<{kind} style="{style}">{cell}</{kind}>' for style, cell in zip(styled, cells, strict=True))
    return f"<tr>{''.join(parts)}</tr>"
