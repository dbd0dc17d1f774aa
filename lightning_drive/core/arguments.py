"""Check settings as they come from users and other tools, and return them as plain Python.

What numpy, torch or a configuration library gives is taken; checkpoints hold no trace of it.
"""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor, nn

from lightning_drive.core import saved_values


def check_count(argument: str, value: object, *, least: int | None = 1) -> int:
    """Return a whole number of at least ``least`` as an ``int``.

    Args:
        argument: The argument's name, for the message.
        value: What was given.
        least: The lowest value allowed; ``None``: any.

    Raises:
        ValueError: If it is no such number.

    Example:
        >>> import numpy as np
        >>> check_count("rounds", np.int64(3))
        3

    """
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, Integral) or (least is not None and number < least):
        limit = "" if least is None else f" of at least {least}"
        raise ValueError(f"`{argument}` must be a whole number{limit}, got {_shown(value)}.")
    return int(number)


def check_number(argument: str, value: object, what: str = "must be a number") -> float:
    """Return a real number as a ``float``.

    Args:
        argument: The argument's name, for the message.
        value: What was given.
        what: What must hold, for the message.

    Raises:
        TypeError: If it is no number.

    """
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"`{argument}` {what}, got {_shown(value)}.")
    return float(number)


def check_flag(argument: str, value: object) -> bool:
    """Return ``True`` or ``False`` as a ``bool``.

    Args:
        argument: The argument's name, for the message.
        value: What was given.

    Raises:
        TypeError: If it is neither.

    """
    flag = _plain(value)
    if not isinstance(flag, bool):
        raise TypeError(f"`{argument}` must be True or False, got {_shown(value)}.")
    return flag


def check_choice(argument: str, value: object, choices: Any) -> Any:
    """Return one of the choices of a ``Literal`` as the ``Literal`` has it.

    Args:
        argument: The argument's name, for the message.
        value: What was given.
        choices: The ``Literal`` type.

    Raises:
        ValueError: If it is none of them.

    """
    text = _plain(value)
    for choice in get_args(choices):
        if isinstance(text, str) and text == choice:
            return choice
    raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, get_args(choices)))}, got {_shown(value)}.")


def check_patterns(argument: str, patterns: object) -> list[str] | None:
    """Return glob patterns as a list of ``str``; a single string is refused, since it would be read letter by letter.

    Args:
        argument: The argument's name, for the message.
        patterns: Any iterable of strings, or ``None``.

    Raises:
        TypeError: If it is neither (its type is named; tensors and modules are not printed).

    Example:
        >>> check_patterns("include", {"encoder.*": 1}.keys()), check_patterns("include", {"b", "a"})
        (['encoder.*'], ['a', 'b'])

    """
    if patterns is None:
        return None
    if isinstance(patterns, (str, bytes, Mapping, nn.Module, Tensor)):
        raise _not_patterns(argument, patterns)
    try:
        found = list(patterns)  # type: ignore[call-overload]
    except TypeError:  # nothing to iterate over
        raise _not_patterns(argument, patterns) from None
    for pattern in found:
        if not isinstance(pattern, str):
            raise _not_patterns(argument, patterns, f" with {saved_values.shown(pattern)} in it")
    names = map(str.__str__, found)  # of numpy's strings and of enumerations, too
    return sorted(names) if isinstance(patterns, (set, frozenset)) else list(names)


def _not_patterns(argument: str, given: object, within: str = "") -> TypeError:
    kind = " (a module)" if isinstance(given, nn.Module) else ""
    remedy = "" if isinstance(given, (str, bytes)) else " Give names as `module.named_parameters()` has them."
    return TypeError(
        f"`{argument}` must be a list of glob patterns over parameter names, such as ['encoder.*'], got"
        f" {saved_values.shown(given)}{kind}{within}.{remedy}"
    )


def _shown(value: object) -> str:
    """Return a value of one number or less as it prints, and the type of anything that may be long."""
    return repr(value) if getattr(value, "ndim", None) == 0 else saved_values.shown(value)


def _plain(value: Any) -> Any:
    """Return the Python scalar that a scalar of numpy, or an array or tensor without dimensions, holds."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value


Schedule: TypeAlias = Literal["exponential", "linear"]

Mode: TypeAlias = Literal["train", "eval"]

Scope: TypeAlias = Literal["global", "layerwise"]

Control: TypeAlias = Literal["none", "shuffle", "reinit"]
