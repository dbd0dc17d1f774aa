"""Compare an output that a page shows with what its code prints, up to what may vary.

Words and numbers are compared, spaces and empty lines are not. Marks name what may vary, in a comment above a block of
a page (``<!-- output: trained; varies: [0-9.]+ s -->``) or as tags of a notebook's cell:

- ``trained``: numbers that depend on how a machine rounds, since a network was trained. They may differ by 5 %, or by
  three units of the last digit that is shown.
- ``varies: PATTERN``: what matches is not compared. There may be several patterns, each behind a ``varies:``.
"""

import re
from collections.abc import Sequence

TRAINED = "trained"
VARIES = "varies:"
NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)(?=[kMG%]?(?:\W|$))")  # not those in shapes and names
RELATIVE, UNITS = 0.05, 3


def check(shown: str, printed: str, marks: Sequence[str]) -> None:
    """Check that the lines shown are among those printed, one after the other.

    Raises:
        ValueError: If a mark is not known.
        AssertionError: If they are not.

    """
    trained = TRAINED in marks
    patterns = [mark.removeprefix(VARIES).strip() for mark in marks if mark.startswith(VARIES)]
    if unknown := [mark for mark in marks if mark != TRAINED and not mark.startswith(VARIES)]:
        raise ValueError(f"An output is marked by `{TRAINED}` or `{VARIES} PATTERN`, got {unknown}.")
    wanted, given = lines(shown, patterns), lines(printed, patterns)
    starts = range(len(given) - len(wanted) + 1)
    found = any(all(map(same, wanted, given[start:], [trained] * len(wanted))) for start in starts)
    assert wanted, "The output that is shown is empty."
    assert found, f"The page shows\n{shown}\nbut its code prints\n{printed}"


def lines(text: str, patterns: Sequence[str]) -> list[list[str]]:
    """Return the words of each line that is not empty, with what varies replaced by a mark."""
    for pattern in patterns:
        text = re.sub(pattern, "(varies)", text)
    return [words for line in text.splitlines() if (words := line.split())]


def same(shown: Sequence[str], printed: Sequence[str], trained: bool) -> bool:
    """Whether two lines have the same words, and numbers that are as near to each other as they have to be."""
    if not trained:
        return list(shown) == list(printed)
    first, second = (NUMBER.split(" ".join(words)) for words in (shown, printed))
    return first[::2] == second[::2] and all(map(near, first[1::2], second[1::2]))


def near(shown: str, printed: str) -> bool:
    """Whether two numbers differ by no more than rounding on another machine makes of a trained network.

    Example:
        >>> near("1,000", "1,049"), near("1,000", "1,051"), near("2", "5"), near("2", "6"), near("0.50", "0.54")
        (True, False, True, False, False)

    """
    first, second = (float(number.replace(",", "")) for number in (shown, printed))
    unit = 10.0 ** -len(shown.partition(".")[2])
    return abs(first - second) <= max(RELATIVE * abs(first), UNITS * unit) * (1 + 1e-9)
