"""The built site: what is public is in the reference, examples are code, nothing is loaded from elsewhere."""

import json
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import lightning_drive

ROOT = Path(__file__).parents[2]
BESIDES = {
    "lightning_drive.callbacks.hooks.PruningCallback",
    "lightning_drive.callbacks.hooks.PruningCallback.averages",
    "lightning_drive.callbacks.hooks.PruningCallback.masks",
    "lightning_drive.callbacks.hooks.PruningCallback.plan",
    "lightning_drive.callbacks.hooks.PruningCallback.prunable_parameters",
    "lightning_drive.callbacks.hooks.PruningCallback.report",
    "lightning_drive.cli.OneLineErrorsCLI",
    "lightning_drive.core.arguments.Control",
    "lightning_drive.core.arguments.Mode",
    "lightning_drive.core.arguments.Schedule",
    "lightning_drive.core.arguments.Scope",
    "lightning_drive.export.sparse_reader.read_metadata",
    "lightning_drive.network.prunable.register",
    "lightning_drive.report.acceleration_report.AccelerationReport",
    "lightning_drive.report.plan.PruningPlan",
    "lightning_drive.search.methods.Method",
    "lightning_drive.search.scored_network.Network",
    "lightning_drive.search.scored_network.Network.loss_gradients",
    "lightning_drive.warmup.WarmupPruningCallback",
}
"""What users can reach besides the names of the package itself."""
OF_OTHERS = ("torch", "lightning", "collections", "typing", "pathlib", "os")
SEARCHED = {
    "GPU": "faq.html#does-it-run-on-a-gpu",
    "bfloat16": "faq.html#does-it-work-in-half-precision-bfloat16-float16",
    "faster": "faq.html#why-is-my-network-not-faster",
    "structured": "faq.html#is-there-structured-pruning-channels-heads-or-24-patterns",
    "quantize": "faq.html#can-i-quantize-a-pruned-network",
    "LoRA": "recipes/finetuning.html#adapters-lora",
    "ONNX": "recipes/export.html#onnx",
    "Gradual": "methods.html#gradual-pruning",
    "Install": "index.html#install",
    "Cite": "index.html#cite",
}
"""What people try, to the section that answers, in whose title it stands."""


class Words(HTMLParser):
    """The text of a page outside code, its identifiers, and its headings of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.text: list[str] = []
        self.ids: set[str] = set()
        self.columns: list[str] = []
        self.in_heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.depth += tag in ("code", "script", "style")
        self.ids |= {value for name, value in attrs if name == "id" and value}
        if tag == "th":
            self.columns.append("")
            self.in_heading = True

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in ("code", "script", "style")
        self.in_heading = self.in_heading and tag != "th"

    def handle_data(self, data: str) -> None:
        if self.in_heading:
            self.columns[-1] += data
        if not self.depth:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "-f",
        "docs/site/mkdocs.yml",
        "-d",
        str(folder),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, str]:
    return {
        page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in sorted(site.rglob("*.html"))
    }


@pytest.fixture(scope="module")
def words(pages: dict[str, str]) -> dict[str, Words]:
    found = {name: Words() for name in pages}
    for name, page in pages.items():
        found[name].feed(page)
    return found


def test_reference_is_whole(words: dict[str, Words]) -> None:
    """Every public name has its place in the reference, and so has every name of ours that the reference shows."""
    ids = {name for page, found in words.items() if page.startswith("reference/") for name in found.ids}
    public = BESIDES | {f"lightning_drive.{name}" for name in lightning_drive.__all__}
    assert sorted(public - ids) == []


def test_types_are_links(pages: dict[str, str]) -> None:
    """Types in signatures and tables lead to the documentation of their library, or to our own."""
    shown = "\n".join(page for name, page in pages.items() if name.startswith("reference/"))
    without_link = set(re.findall(r'<span title="([^"]+)">', shown))
    attributes = {name for name in without_link if name.rpartition(".")[0].endswith("Callback")}
    assert {
        name for name in without_link - attributes if name.startswith("lightning_drive.") and "(" not in name
    } == set()
    assert {name for name in without_link if name.split(".")[0] in OF_OTHERS or "." not in name} == set()


def test_examples_are_code(words: dict[str, Words], pages: dict[str, str]) -> None:
    """No example is text, and no docstring has a section that the parser does not know."""
    assert [name for name, found in words.items() if ">>>" in "".join(found.text)] == []
    shown = "\n".join(page for name, page in pages.items() if name.startswith("reference/"))
    assert "<blockquote" not in shown  # what Markdown makes of `>>>`
    assert shown.count('<span class="gp">&gt;&gt;&gt;') > 50
    unknown = re.findall(r"^ +(\w+):$", docstrings(), flags=re.MULTILINE)
    assert set(unknown) <= {"Args", "Returns", "Raises", "Warns", "Yields", "Examples", "Attributes"}


def docstrings() -> str:
    """Return the parts of the package's docstrings that could be headings of sections."""
    files = (path.read_text(encoding="utf-8") for path in (ROOT / "lightning_drive").rglob("*.py"))
    return "\n".join(text for file in files for text in re.findall(r'"""(.*?)"""', file, flags=re.DOTALL))


def test_options_of_the_command(words: dict[str, Words], pages: dict[str, str]) -> None:
    """The page of the command has every option of its source."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "lightning_drive").glob("command*.py"))
    options = set(re.findall(r'"(--[a-z][a-z-]*)"', source))
    assert len(options) > 5
    assert {option for option in options if option not in pages["reference/command.html"]} == set()


def test_inventory(site: Path) -> None:
    """Other projects find our names, of the right version."""
    first, project, number, _, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    assert (first, project) == (b"# Sphinx inventory version 2", b"# Project: lightning_drive")
    assert number == f"# Version: {lightning_drive.__version__}".encode()
    names = {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
    assert {f"lightning_drive.{name}" for name in lightning_drive.__all__} <= names


@pytest.mark.parametrize(("word", "answer"), SEARCHED.items())
def test_search(site: Path, word: str, answer: str) -> None:
    """The words that people try are in the title of a section that answers, also where the site is read from files."""
    text = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    entries: list[dict[str, Any]] = json.loads(text.removeprefix("var __index = "))["docs"]
    [title] = [entry["title"] for entry in entries if entry["location"] == answer]
    assert word in re.sub(r"<[^>]+>", "", title)


def test_nothing_from_elsewhere(site: Path, pages: dict[str, str]) -> None:
    """Pages load no script, style, font or picture that is not in the site, and what they load is there."""
    for name, page in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe)\b[^>]*\bsrc="?([^" >]+)', page)
        loaded += re.findall(r'<link\b[^>]*\brel="?(?:stylesheet|icon|preconnect)"?[^>]*\bhref="?([^" >]+)', page)
        for address in loaded:
            assert not re.match(r"https?:|//", address), f"{name} loads {address}"
            path = site / address if address.startswith("/") else (site / name).parent / address
            assert name == "404.html" or path.exists(), f"{name} loads {address}"


def test_links_to_the_repository(pages: dict[str, str]) -> None:
    """Links to files beside the documentation lead to the repository, where they are."""
    [repository] = set(re.findall(r'<a href="([^"]+)" title="[^"]+" class="md-source"', "".join(pages.values())))
    linked = set(re.findall(rf'href="{re.escape(repository)}/(?:blob|tree)/main/([^"#]+)', "".join(pages.values())))
    assert {"examples", "examples/paper", "examples/paper/run.py"} <= linked
    assert {name for name in linked if not (ROOT / name).exists()} == set()


def test_links_to_notebooks(pages: dict[str, str]) -> None:
    """Links to notebooks, which are files in the repository, lead to their pages here; only one is for download."""
    assert 'href="notebooks/first_pruning.html"' in pages["quickstart.html"]
    assert 'href="notebooks/first_pruning.html"' in pages["index.html"]
    assert {name for name, page in pages.items() if '.ipynb"' in page} == {
        f"notebooks/{name}.html" for name in ("comparing_methods", "first_pruning", "sparse_to_fast")
    }


def test_columns_have_headings(words: dict[str, Words]) -> None:
    empty = {name for name, found in words.items() if any(not column.strip() for column in found.columns)}
    assert empty == set()


def test_every_page_leads_on(pages: dict[str, str]) -> None:
    """A page has its neighbours, the repository, a search, and a switch of colours."""
    for name, page in pages.items():
        assert 'class="md-source"' in page
        assert 'data-md-component="search"' in page
        assert page.count('name="__palette"') == 3
        assert name == "404.html" or 'class="md-footer__link' in page, name
