"""Glob patterns over parameter names: what `include` and `exclude` match, and the errors where they match nothing."""

from collections.abc import Container, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from lightning_drive.core.messages import listed


def matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return the names that match one of the patterns."""
    names = list(names)
    return {name for pattern in patterns for name in names if fnmatchcase(name, pattern)}


def has_wildcard(pattern: str) -> bool:
    """Whether a pattern may match more than one name."""
    return any(sign in pattern for sign in "*?[")


def check_matches(argument: str, patterns: Iterable[str], known: Sequence[str], default: Sequence[str]) -> None:
    """Raise a ``ValueError`` if a pattern matches none of the known names; it lists them, the likely one first."""
    for pattern in patterns:
        if not matching([pattern], known):
            raise ValueError(f"`{argument}` pattern {pattern!r} matches no parameter. {_hint(pattern, known, default)}")


def included(pattern: str, default: Container[str], matrices: Mapping[str, bool], known: Sequence[str]) -> set[str]:
    """Return the names that a pattern of ``include`` selects.

    ``"*"`` selects the default and all matrices; another pattern the default names that it matches, or else the
    matrices, or else the vectors that its last part names.
    """
    if not pattern.strip("*"):
        return {name for name in known if name in default or matrices.get(name)}
    matched = matching([pattern], known)
    chosen = {name for name in matched if name in default} or {name for name in matched if name in matrices}
    if not chosen and has_wildcard(pattern.rpartition(".")[2]):
        vectors = [name for name in known if name in matched]
        raise ValueError(
            f"`include` pattern {pattern!r} matches only norms, biases and other vectors ({listed(vectors)}), which are"
            f" pruned only where the last part of a pattern names them, as in {vectors[0]!r}."
        )
    return chosen or matched


def _hint(pattern: str, known: Sequence[str], default: Sequence[str]) -> str:
    """List the known names, and ask whether the one that is most like the pattern is meant."""
    names = sorted(known, key=lambda name: name not in default)  # stable
    parts = [name.split(".") for name in names]
    layers = dict.fromkeys(".".join([*path[:depth], "*"]) for path in parts for depth in range(len(path) - 1, 0, -1))
    hint = "".join(f"Did you mean {close!r}? " for close in get_close_matches(pattern, [*names, *layers], n=1))
    return f"{hint}The parameters are, prunable ones first (a tied one by its first name): {listed(names, most=30)}."
