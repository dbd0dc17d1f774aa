r"""Let docstrings say ``:class:`Masks``` and ``:math:`N```, as `help` shows them, and still be Markdown in the site."""

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod):`~?(?P<target>[\w.]+)`")
FORMULA = re.compile(r":math:`(?P<formula>[^`]+)`|^(?P<indent> *)\.\. math:: *(?P<block>.+)$", flags=re.MULTILINE)
REFERENCE = Path(__file__).parents[1] / "reference"
PUBLIC = {
    name.rpartition(".")[2]: name
    for page in REFERENCE.glob("*.md")
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
}


class Roles(griffe.Extension):
    """Write Sphinx's roles as Markdown before a docstring is read."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = FORMULA.sub(_code, ROLE.sub(_link, obj.docstring.value))


def _link(role: re.Match[str]) -> str:
    """Link to what the reference pages show, and to other libraries; anything else is only named."""
    name = role["target"].rpartition(".")[2]
    address = PUBLIC.get(name) or ("" if _is_ours(role["target"]) else role["target"])
    return f"[`{name}`][{address}]" if address else f"`{name}`"


def _is_ours(target: str) -> bool:
    """Whether a role names something of this package, by its path or as seen from where it stands."""
    return "." not in target or target.startswith("lightning_drive.") or target[0].isupper()


def _code(math: re.Match[str]) -> str:
    """Show a formula as it is written: the site loads no program that could set it."""
    return f"`{math['formula']}`" if math["formula"] else f"{math['indent']}`{math['block']}`"
