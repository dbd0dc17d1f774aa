"""Texts for people: long lists made short."""

from collections.abc import Iterable


def listed(items: Iterable[object], most: int = 8) -> str:
    """Join what there is with commas, and count what would be too much to read.

    Args:
        items: What to list.
        most: How many of them to show, at least 1.

    Example:
        >>> listed(["a", "b", "c"]), listed(["a", "b", "c", "d"], most=2), listed([])
        ('a, b, c', 'a, b and 2 more', 'none')

    """
    texts = [str(item) for item in items]
    if len(texts) <= most:
        return ", ".join(texts) or "none"
    return f"{', '.join(texts[:most])} and {len(texts) - most} more"


def shown_error(error: BaseException, most: int = 300) -> str:
    r"""Say what an error is in one line of at most so many letters: those of torch may list every backend there is.

    Args:
        error: The error.
        most: How many letters of its first line to show.

    Example:
        >>> shown_error(ValueError("It is wrong.\nHere is more about it")), shown_error(ValueError("wrong"), most=3)
        ('ValueError: It is wrong', 'ValueError: wro...')

    """
    line = next(iter(str(error).splitlines()), "").rstrip(".")
    return f"{type(error).__name__}: {line if len(line) <= most else line[:most] + '...'}"
