"""The errors of jsonargparse in one line: where a setting is wrong, why, and what may have been meant."""

import inspect
import pydoc
import re
import textwrap
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_PLACE = re.compile(r"""\s*(?:Parser key "([^"]+)"|Problem with given class_path '([^']+)'):(?: *\n| )""")

_UNION = re.compile(
    r"^( *)Errors:\n(?P<errors>.*?)^\1Given value type: [^\n]*\n\1Given value: (?P<given>.*)", re.MULTILINE | re.DOTALL
)
"""What jsonargparse says of a value that is of none of several types: an error for each of them."""

_LAST = ("Not a valid subclass", "Expected a <class 'list'>", "Expected a <class 'NoneType'>")
"""The beginnings of the errors that say the least about a value which is of none of several types, the worst last."""

_MOST_LETTERS = 60


def one_line(text: str, classes: Iterable[str]) -> str:
    """Return where an error is and what it is, without the errors of types that were not meant.

    ``classes`` are the names of the classes that can be given without their module.

    Examples:
        >>> one_line('''Parser key "logger":
        ...   Does not validate against any of the Union subtypes
        ...   Subtypes: [list[Logger], <class 'Logger'>, <class 'NoneType'>]
        ...   Errors:
        ...     - Expected a <class 'list'>
        ...     - Expected a dot import path string: csvlogger
        ...     - Expected a <class 'NoneType'>
        ...   Given value type: <class 'str'>
        ...   Given value: csvlogger''', ["CSVLogger"])
        "logger: there is no class 'csvlogger'. Did you mean 'CSVLogger'?"

    """
    places: dict[str, None] = {}  # as an ordered set: jsonargparse repeats them
    given = ""
    while True:
        text = textwrap.dedent(text)
        if place := _PLACE.match(text):
            places[place[1] or place[2]] = None
            text = text[place.end() :]
        elif union := _UNION.search(text):
            errors = re.split(r"^- ", textwrap.dedent(union["errors"]), flags=re.MULTILINE)[1:]
            text, given = _bullet(min(errors, key=_rank)), union["given"]
        else:
            break
    return ": ".join([*places, _explained(" ".join(text.split()), " ".join(given.split()), list(places), classes)])


def _bullet(error: str) -> str:
    """Return an error with its further lines as far to the left as its first."""
    first, _, rest = error.partition("\n")
    return f"{first}\n{textwrap.dedent(rest)}"


def _rank(error: str) -> int:
    """Return 0 for the error of a class that was found or of a path to import, and more the less an error says."""
    if re.match("Problem with given class_path|Type .* expects a function", error):
        return 0
    return next((rank for rank, start in enumerate(_LAST, 2) if error.startswith(start)), 1)


def _explained(reason: str, given: str, places: Sequence[str], classes: Iterable[str]) -> str:
    """Return a reason with the value that was given, and with what may have been meant."""
    if no_path := re.match(r"Expected a dot import path string: (\S+)$", reason):
        return f"there is no class {no_path[1]!r}.{_meant(no_path[1], classes) or _NAME_A_CLASS}"
    if no_such := re.match(r"(?:module '.*' has no attribute '(\w+)'|No module named )", reason):
        return f"{reason}.{_meant(no_such[1] or places[-1].rpartition('.')[2], classes)}"
    if option := re.match(r"Option '(\w+)' is not accepted$", reason):
        return f"{reason}.{_meant(option[1], _arguments(places[-1]))}"
    if given and not re.search("Got value|required", reason):
        return f"{reason}. Got value: {given if len(given) <= _MOST_LETTERS else given[:_MOST_LETTERS] + '...'}"
    return reason


_NAME_A_CLASS = " Name one with its module, as in 'package.module.Class'."


def _meant(name: str, known: Iterable[str]) -> str:
    """Ask whether the known name that is most like another one is meant, whatever letters are capital."""
    by_lower = {each.lower(): each for each in known}
    return "".join(f" Did you mean {by_lower[close]!r}?" for close in get_close_matches(name.lower(), by_lower, n=1))


def _arguments(path: str) -> list[str]:
    """Name the arguments of a class that is given by its path; none if it is no class."""
    kind = pydoc.locate(path)
    return list(inspect.signature(kind).parameters) if inspect.isclass(kind) else []
