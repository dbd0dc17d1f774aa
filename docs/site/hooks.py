"""Hooks of MkDocs: pages from outside `docs/`, links to other documentations, help of the command, the version."""

import os
import re
import subprocess
import sys
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
INVENTORIES = Path(__file__).parent / "inventories"
RESULTS = Path("examples/paper/results")
FROM_OUTSIDE = {
    "changelog.md": Path("CHANGELOG.md"),
    "experiments/index.md": RESULTS / "README.md",
    **{f"experiments/{path.name}": RESULTS / path.name for path in sorted((ROOT / RESULTS).glob("*.png"))},
}
"""Files of the site to the files of the repository that they are made of."""
LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
COMMAND = "reference/command.md"
WORD = re.compile(r"<code>([^<\s]{1,40})</code>")
PERCENT = re.compile(r"(?P<code><(pre|code)\b.*?</\2>)|(?<=\d) (?=%)", flags=re.DOTALL)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files from outside."""
    for name, path in FROM_OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Lead links that leave the folder to the site or the repository, and show the options of the command."""
    here = page.file.src_uri
    folder = dirname(str(FROM_OUTSIDE.get(here, Path("docs", here))))
    if here == COMMAND:
        markdown += options()
    return LINK.sub(lambda link: f"]({led(link['path'], folder, here, config)}{link['anchor'] or ''})", markdown)


def led(path: str, folder: str, here: str, config: MkDocsConfig) -> str:
    """Return where a link in a file of a folder of the repository leads from its page of the site."""
    target = normpath(join(folder, path))
    pages = {str(source): name for name, source in FROM_OUTSIDE.items()}
    if target.startswith("docs/"):
        pages[target] = target.removeprefix("docs/")
    if target in pages:
        return relpath(pages[target], dirname(here) or ".")
    if (ROOT / target).exists():
        return f"{config.repo_url}/{'tree' if (ROOT / target).is_dir() else 'blob'}/main/{target}"
    return path


def options() -> str:
    """Return the section of options: what the command prints about itself, and about each of its commands."""
    about = help_of()
    names = re.findall(r"^ {4}(\w+) {2,}", about.partition("commands:")[2], flags=re.MULTILINE)
    parts = [f"### {name}\n\n```text\n{help_of(name)}\n```" for name in names]
    return "\n\n".join(["\n\n## Options", f"```text\n{about}\n```", *parts])


def help_of(*words: str) -> str:
    """Return what the command prints about itself or one of its commands."""
    command = [sys.executable, "-m", "lightning_drive", *words, "--help"]
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def on_page_content(html: str, **_: Any) -> str:
    """Keep words of code in one line, and, outside code, a number and its percent sign."""
    return PERCENT.sub(lambda found: found["code"] or "\u00a0", WORD.sub(r'<code class="word">\1</code>', html))


def on_env(env: Any, *, config: MkDocsConfig, **_: Any) -> Any:
    """Make names of other libraries links, and write the version of the package into `objects.inv`."""
    for name, address in elsewhere().items():
        config.plugins["autorefs"].register_url(name, address)
    config.plugins["mkdocstrings"].handlers.inventory.version = version()
    return env


def elsewhere() -> dict[str, str]:
    """Return the names of other libraries and the addresses of their documentation.

    The inventories are those of these libraries, as text and cut down to the names that the reference shows: MkDocs
    would load them whole from the network, at every build. Their fourth line has the address.
    """
    addresses = {}
    for path in sorted(INVENTORIES.glob("*.txt")):
        *_, base, entries = path.read_text(encoding="utf-8").split("\n", 4)
        for entry in entries.splitlines():
            name, _, _, place, _ = entry.split()
            addresses[name] = base.removeprefix("# ") + place.replace("$", name)
    return addresses


def version() -> str:
    """Return the version of the package in this repository."""
    [number] = re.findall(r'^__version__ = "(.+)"$', (ROOT / "lightning_drive/__init__.py").read_text(), re.MULTILINE)
    return number
