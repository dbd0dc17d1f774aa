"""Short texts for messages: of lists, of errors and of values of any size. It imports no torch."""

from collections.abc import Iterable


def listed(items: Iterable[object], most: int = 8) -> str:
    """Join items with commas, and count those after the first ``most``.

    Examples:
        >>> listed(["a", "b", "c"]), listed(["a", "b", "c", "d"], most=2), listed([])
        ('a, b, c', 'a, b and 2 more', 'none')

    """
    texts = [str(item) for item in items]
    if len(texts) <= most:
        return ", ".join(texts) or "none"
    return f"{', '.join(texts[:most])} and {len(texts) - most} more"


def shown_error(error: BaseException, most: int = 300) -> str:
    r"""Return the type of an error and the first ``most`` letters of its first line; those of torch may be very long.

    Examples:
        >>> shown_error(ValueError("It is wrong.\nHere is more about it")), shown_error(ValueError("wrong"), most=3)
        ('ValueError: It is wrong', 'ValueError: wro...')
        >>> shown_error(ValueError())
        'ValueError'

    """
    kind, line = type(error).__name__, next(iter(str(error).splitlines()), "").rstrip(".")
    return f"{kind}: {line if len(line) <= most else line[:most] + '...'}" if line else kind


def shown(value: object) -> str:
    """Return a short text for a value of any type and size.

    Examples:
        >>> shown("a"), shown(-1), shown([1, 2]), shown(1 << 20_000)
        ("'a'", '-1', 'a list', 'an integer of 20,001 bits')

    """
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() < 200 else f"an integer of {value.bit_length():,} bits"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:60]}...")
    if isinstance(value, tuple) and len(value) <= 4 and all(isinstance(part, (str, int)) for part in value):
        return f"({', '.join(map(shown, value))})"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
