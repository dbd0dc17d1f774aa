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
