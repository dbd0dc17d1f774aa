"""Show notebooks as pages like all others: text, code and outputs as Markdown, and the notebook to download.

A hook of MkDocs. It needs nothing but the notebooks, whose outputs are those that were committed.
"""

import base64
import json
import re
from pathlib import PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

OFFER = "[Download this notebook]({name}), to run and change it."
PICTURE = "image/png"
PLAIN_TABLE = ('<table style="', '<table class="output" style="font-size: .64rem; ')
"""Without a class, the theme makes columns wide and a report too wide for the page."""
LINK = re.compile(r"(\]\([\w./-]+)\.ipynb\b")
"""A link to a notebook, which here leads to its page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page and the pictures of each notebook."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        notebook = json.loads(file.content_string)
        for uri, content in converted(notebook, PurePosixPath(file.src_uri)).items():
            files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead from links to notebooks, which are right in the repository, to their pages, but for offers to download."""
    lines = markdown.split("\n")
    return "\n".join(line if line.startswith("[Download") else LINK.sub(r"\1.md", line) for line in lines)


def converted(notebook: dict[str, Any], path: PurePosixPath) -> dict[str, str | bytes]:
    """Return the page of a notebook and its pictures, by their places."""
    pictures: dict[str, str | bytes] = {}
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(LINK.sub(r"\1.md", source))
            continue
        parts.append(fenced("python", source))
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if PICTURE in data:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[str(path.with_name(name))] = base64.b64decode("".join(data[PICTURE]))
                parts.append(f"![{cell['metadata']['alt']}]({name})")
            elif "text/html" in data:
                parts.append("".join(data["text/html"]).replace(*PLAIN_TABLE))
            else:
                parts.append(fenced("text", "".join(data["text/plain"])))
    title, *rest = parts
    page = "\n\n".join([title, OFFER.format(name=path.name), *rest])
    return {str(path.with_suffix(".md")): page, **pictures}


def fenced(language: str, text: str) -> str:
    """Return a block of code or output."""
    return f"```{language}\n{text.rstrip()}\n```"
