"""The notebooks run from top to bottom and give the outputs that are committed, and the site shows these."""

import base64
import json
from pathlib import Path, PurePosixPath
from typing import Any

import nbformat
import notebook_pages
import notebooks
import outputs
import pytest

PICTURE = "image/png"
CELLS: list[dict[str, Any]] = [
    {"cell_type": "markdown", "source": ["# Title\n", "\n", "Go [on](next.ipynb)."]},
    {
        "cell_type": "code",
        "source": ["print(1)"],
        "outputs": [{"output_type": "stream", "name": "stdout", "text": ["1\n"]}],
    },
    {
        "cell_type": "code",
        "source": ["report"],
        "outputs": [{"data": {"text/html": ["<b>1</b>"], "text/plain": ["1"]}}],
    },
    {
        "cell_type": "code",
        "source": ["figure"],
        "metadata": {"alt": "A picture"},
        "outputs": [{"data": {PICTURE: base64.b64encode(b"png").decode() + "\n", "text/plain": ["<Figure>"]}}],
    },
]


def shown(cell: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """Return the outputs of a cell by their kinds: what is printed, and the richest form of what is displayed."""
    kinds = []
    for output in cell.outputs:
        data = output.get("data", {output.get("name", "error"): output.get("text", "")})
        kind = next(kind for kind in (PICTURE, "text/html", *data) if kind in data)
        kinds.append((kind, data.get("text/plain", data[kind]) if kind == PICTURE else data[kind]))
    return kinds


@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, tmp_path: Path) -> None:
    committed = nbformat.read(path, as_version=4)
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    run = [cell for cell in notebooks.run(path, tmp_path).cells if cell.cell_type == "code"]
    for cell, again in zip(cells, run, strict=True):
        printed = [output for output in shown(again) if output[0] != "stderr"]  # warnings of other versions
        assert [kind for kind, _ in shown(cell)] == [kind for kind, _ in printed], cell.source
        for (_, before), (_, now) in zip(shown(cell), printed, strict=True):
            outputs.check(before, now, cell.metadata.get("tags", []))


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_committed(path: Path) -> None:
    """Whoever only reads a notebook sees one whole run, with words for its pictures, and loads little."""
    committed = nbformat.read(path, as_version=4)
    nbformat.validate(committed)
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    kinds = [(kind, "alt" in cell.metadata) for cell in cells for kind, _ in shown(cell)]
    assert {kind for kind, _ in kinds} <= {"stdout", "text/plain", "text/html", PICTURE}
    assert [described for kind, described in kinds if kind == PICTURE] == [True]
    assert path.stat().st_size < 150_000


def test_there_are_three() -> None:
    assert len(notebooks.NOTEBOOKS) == 3


def test_converted() -> None:
    """A page has text, code and outputs in their order, the notebook to download, and pictures beside it."""
    files = notebook_pages.converted({"cells": CELLS}, PurePosixPath("notebooks/first.ipynb"))
    assert files["notebooks/first-1.png"] == b"png"
    assert files["notebooks/first.md"] == (
        "# Title\n\nGo [on](next.md).\n\n[Download this notebook](first.ipynb), to run and change it.\n\n"
        "```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\nreport\n```\n\n<b>1</b>\n\n"
        "```python\nfigure\n```\n\n![A picture](first-1.png)"
    )


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_site_leads_to_it(path: Path) -> None:
    navigation = (notebooks.ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    assert f": notebooks/{path.stem}.md\n" in navigation
    title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).partition("\n")[0]
    assert f"{title.removeprefix('# ')}: notebooks/{path.stem}.md" in navigation
