"""Markdown, HTML and a terminal show the same table, in which names and warnings are text."""

import io
import re
from html.parser import HTMLParser

import pytest
from reports import STRANGE, strange_report


def test_to_markdown() -> None:
    lines = strange_report().to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table == [
        "| parameter | shape | weights | kept | density | active | MACs | non-zero MACs | bytes | non-zero bytes |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: |",
        r'| `blocks[red]\|<b>&"quoted".weight` | 8x4x3x3 | 288 | 36 | 12.50% | 66.67% | 18.4k | 2.3k | 1.15k | 180 |',
        "| `fc.weight` | 10x130 | 1,300 | 0 | 0.00% | - | 1.3k | 0 | 2.6k | 163 |",
        "| **all** |  | **1,588** | **36** | **2.27%** | **66.67%** | **19.7k** | **2.3k** | **3.75k** | **343** |",
    ]
    assert lines[lines.index(table[0]) - 1] == lines[lines.index(table[-1]) + 1] == ""
    assert lines[-1] == r"- ! [bold]\<script>alert(1)\</script> next line"


class Cells(HTMLParser):
    """Reads tags and the text of cells back; fails at tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.seen.add(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1].append(data)


def test_to_html() -> None:
    """A fragment that a parser reads back, in which names and warnings are text."""
    text = strange_report().to_html()
    cells = Cells()
    cells.feed(text)
    assert cells.open == []
    assert cells.seen == {"div", "p", "table", "thead", "tbody", "tfoot", "tr", "th", "td", "b"}
    assert cells.rows[1][:3] == [STRANGE, "8x4x3x3", "288"]
    assert cells.rows[-1][-2:] == ["3.75k", "343"]
    assert "&lt;script&gt;" in text
    assert not re.search(r"https?:|<link|<style|<script", text)
    assert strange_report()._repr_html_() == text


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (120, ["parameter", "shape", "weights", "kept", "density", "active", "MACs", "non-zero MACs"]),
        (80, ["parameter", "kept", "density", "active", "MACs", "non-zero MACs"]),
        (58, ["parameter", "kept", "density", "active"]),
    ],
)
def test_rich(width: int, columns: list[str]) -> None:
    """A table that fits, every cell in one piece, and no name taken for markup."""
    console_module = pytest.importorskip("rich.console")
    console = console_module.Console(file=io.StringIO(), width=width, color_system=None)
    console.print(strange_report())
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    cells = [line.split() for line in lines]
    assert " ".join(columns).split() in cells
    numbers = {"kept": "36", "density": "12.50%", "active": "66.67%", "MACs": "18.4k", "non-zero MACs": "2.3k"}
    wide = ["8x4x3x3", "288"] if "shape" in columns else []
    assert [STRANGE, *wide, *(numbers[title] for title in columns if title in numbers)] in cells
    [total] = [row for row in cells if row[:1] == ["all"]]
    assert total[: 4 + bool(wide)] == ["all", *(["1,588"] if wide else []), "36", "2.27%", "66.67%"]
    assert any("[bold]<script>" in line for line in lines)
