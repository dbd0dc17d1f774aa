"""Settings of users: the closed choices, and checks that return them as plain Python or raise.

Numbers of numpy and torch and lists of configuration libraries are accepted; checkpoints hold no trace of them.
"""

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor, nn

from lightning_drive.core.messages import shown

Sparsity: TypeAlias = float | Mapping[str, float]
"""The fraction of the weights to remove, or such a fraction for each glob pattern over names of parameters."""

NamedSchedule: TypeAlias = Literal["exponential", "linear", "cubic"]
"""How the number of weights falls from round to round, by name.

``"exponential"``: by the same fraction of the survivors. ``"linear"``: by the same number. ``"cubic"``: by many in the
first rounds and few in the last.
"""

Schedule: TypeAlias = NamedSchedule | Callable[[float], float]
"""The same, or a function from the fraction of the rounds that are done to the fraction of the sparsity reached."""

Scope: TypeAlias = Literal["global", "layerwise", "erk"]
"""Which weights are ranked together, and how many are kept of each parameter.

``"global"``: all, so that layers end with different densities. ``"layerwise"``: those of each parameter by themselves,
so that each keeps the same fraction. ``"erk"``: the same, but each keeps its own fraction, more of small parameters.
"""

Mode: TypeAlias = Literal["train", "eval"]
"""The mode of the module while it is scored: BatchNorm uses the statistics of the batch, or its running ones.

Dropout is off in both.
"""

Control: TypeAlias = Literal["none", "shuffle", "reinit"]
"""A control experiment, see Frankle et al., 2021.

``"shuffle"``: masks are shuffled within each parameter, which keeps its number of weights. ``"reinit"``: the masks are
kept, and their weights get new initial values.
"""

Criterion: TypeAlias = Literal["magnitude", "drive"]
"""What gradual pruning removes: weights of the smallest magnitude, or of the lowest DRIVE score."""


def check_count(argument: str, value: object, *, least: int | None = 1) -> int:
    """Return a whole number of at least ``least`` (``None``: any) as an ``int``; raise a ``ValueError`` otherwise.

    Examples:
        >>> import numpy as np
        >>> check_count("rounds", np.int64(3))
        3

    """
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, Integral) or (least is not None and number < least):
        limit = "" if least is None else f" of at least {least}"
        raise ValueError(f"`{argument}` must be a whole number{limit}, got {_shown(value)}.")
    return int(number)


def check_number(argument: str, value: object, condition: str = "must be a number") -> float:
    """Return a real number as a ``float``; raise a ``TypeError`` that states the condition otherwise."""
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"`{argument}` {condition}, got {_shown(value)}.")
    return float(number)


def check_flag(argument: str, value: object) -> bool:
    """Return ``True`` or ``False`` as a ``bool``; raise a ``TypeError`` otherwise."""
    flag = _plain(value)
    if not isinstance(flag, bool):
        raise TypeError(f"`{argument}` must be True or False, got {_shown(value)}.")
    return flag


def check_loss_fn(value: Any) -> Any:
    """Return a function or ``None``; raise a ``TypeError`` otherwise."""
    if value is not None and not callable(value):
        raise TypeError(f"`loss_fn` must be a function `loss_fn(pl_module, batch)` or None, got {value!r}.")
    return value


def check_choice(argument: str, value: object, choices: Any, otherwise: str = "") -> Any:
    """Return the choice of a ``Literal`` type that equals a value; raise a ``ValueError`` if there is none.

    ``otherwise`` says there what else the argument could be, such as ``", or a function"``.
    """
    text = _plain(value)
    for choice in get_args(choices):
        if isinstance(text, str) and text == choice:
            return choice
    known = ", ".join(map(repr, get_args(choices)))
    raise ValueError(f"`{argument}` must be one of {known}{otherwise}, got {_shown(value)}.")


def check_patterns(argument: str, patterns: object) -> list[str] | None:
    """Return glob patterns, in any iterable but a string, as a list of ``str``; those of a set are sorted.

    A single string would be read letter by letter. For it, as for all else but ``None``, raise a ``TypeError`` that
    names the type: tensors and modules are too long to print.

    Examples:
        >>> check_patterns("include", {"encoder.*": 1}.keys()), check_patterns("include", {"b", "a"})
        (['encoder.*'], ['a', 'b'])

    """
    if patterns is None:
        return None
    if isinstance(patterns, (str, bytes, Mapping, nn.Module, Tensor)):
        raise _not_patterns(argument, patterns)
    try:
        texts = list(patterns)  # type: ignore[call-overload]
    except TypeError:  # nothing to iterate over
        raise _not_patterns(argument, patterns) from None
    for text in texts:
        if not isinstance(text, str):
            raise _not_patterns(argument, patterns, f" with {shown(text)} in it")
    names = map(str.__str__, texts)  # of numpy's strings and of enumerations, too
    return sorted(names) if isinstance(patterns, (set, frozenset)) else list(names)


def _not_patterns(argument: str, given: object, within: str = "") -> TypeError:
    kind = " (a module)" if isinstance(given, nn.Module) else ""
    remedy = "" if isinstance(given, (str, bytes)) else " Use names as in `module.named_parameters()`."
    return TypeError(
        f"`{argument}` must be a list of glob patterns over parameter names, such as ['encoder.*'], got"
        f" {shown(given)}{kind}{within}.{remedy}"
    )


def _shown(value: object) -> str:
    """Return a short text: a single number as it prints, the type of anything that may be long."""
    return repr(value) if getattr(value, "ndim", None) == 0 else shown(value)


def _plain(value: Any) -> Any:
    """Return the Python scalar that a scalar of numpy, or an array or tensor without dimensions, holds."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value
