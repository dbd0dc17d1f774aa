"""Schedules: how dense the network is after each pruning round.

Every schedule with a name is a pure function ``(round_index, num_rounds, sparsity) -> density`` that falls to exactly
``1 - sparsity`` at ``round_index == num_rounds``. Densities are fractions of *all* prunable weights, never of
the survivors, so rounding does not drift from round to round. One of a user is a function of the fraction of the
rounds that are done.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from lightning_drive.core.arguments import Schedule, check_count, check_number
from lightning_drive.core.messages import shown_error

_SLACK = 1e-9
"""By how much a user's own schedule may miss 1, or fall, for its arithmetic is rounded."""


def exponential(round_index: int, num_rounds: int, sparsity: float, start: float = 0.0) -> float:
    r"""Remove the same fraction of the survivors in every round.

    .. math:: d_k = (1 - s_0) \left(\frac{1 - s}{1 - s_0}\right)^{k/n}

    With :math:`s_0 = 0` this is :math:`(1 - s)^{k/n}`, the schedule of SynFlow (Tanaka et al., 2020, Algorithm 1).
    It is also what DRIVE's Eq. 1, :math:`\rho = \kappa^{1/N}`, says when :math:`\kappa` and :math:`\rho` are read as
    fractions *kept*; read as fractions removed, 90 % sparsity in 100 rounds would prune 99.9 % in the first one.

    Args:
        round_index: The round just reached, :math:`k`, counted from 1.
        num_rounds: The number of rounds, :math:`n`, at least 1.
        sparsity: Fraction of all prunable weights removed after the last round, :math:`s`, in ``[start, 1)``.
        start: Fraction already removed before the first round, :math:`s_0`, in ``[0, 1)``.

    Returns:
        Fraction of all prunable weights to keep after this round, in ``(0, 1]``.

    Raises:
        ValueError: If an argument is outside its range.

    Examples:
        >>> [round(exponential(k, 3, 0.999), 3) for k in (1, 2, 3)]
        [0.1, 0.01, 0.001]

        A network that is half sparse already goes on from there:

        >>> [round(exponential(k, 2, 0.98, start=0.5), 3) for k in (1, 2)]
        [0.1, 0.02]

    """
    round_index, num_rounds, sparsity, start = _checked(round_index, num_rounds, sparsity, start)
    if round_index == num_rounds:  # the quotient below is not exact, the promise is
        return 1 - sparsity
    return (1 - start) * math.pow((1 - sparsity) / (1 - start), round_index / num_rounds)


def linear(round_index: int, num_rounds: int, sparsity: float, start: float = 0.0) -> float:
    r"""Remove the same number of weights in every round.

    .. math:: d_k = 1 - s_0 - (s - s_0) \frac{k}{n}

    Args:
        round_index: The round just reached, :math:`k`, counted from 1.
        num_rounds: The number of rounds, :math:`n`, at least 1.
        sparsity: Fraction of all prunable weights removed after the last round, :math:`s`, in ``[start, 1)``.
        start: Fraction already removed before the first round, :math:`s_0`, in ``[0, 1)``.

    Returns:
        Fraction of all prunable weights to keep after this round, in ``(0, 1]``.

    Raises:
        ValueError: If an argument is outside its range.

    Examples:
        >>> [round(linear(k, 3, 0.9), 3) for k in (1, 2, 3)]
        [0.7, 0.4, 0.1]

    """
    round_index, num_rounds, sparsity, start = _checked(round_index, num_rounds, sparsity, start)
    if round_index == num_rounds:
        return 1 - sparsity
    return 1 - start - (sparsity - start) * (round_index / num_rounds)


def cubic(round_index: int, num_rounds: int, sparsity: float, start: float = 0.0) -> float:
    r"""Remove many weights in the first rounds, and fewer and fewer towards the last.

    .. math:: d_k = 1 - s + (s - s_0) \left(1 - \frac{k}{n}\right)^3

    The schedule of gradual pruning (Zhu & Gupta, 2018, Eq. 1), :math:`s_k = s + (s_0 - s) (1 - k/n)^3`: a network
    that has many weights to spare loses them early, and has the later rounds to recover from each cut.

    Args:
        round_index: The round just reached, :math:`k`, counted from 1.
        num_rounds: The number of rounds, :math:`n`, at least 1.
        sparsity: Fraction of all prunable weights removed after the last round, :math:`s`, in ``[start, 1)``.
        start: Fraction already removed before the first round, :math:`s_0`, in ``[0, 1)``.

    Returns:
        Fraction of all prunable weights to keep after this round, in ``(0, 1]``.

    Raises:
        ValueError: If an argument is outside its range.

    Examples:
        >>> [round(cubic(k, 4, 0.9), 3) for k in (1, 2, 3, 4)]
        [0.48, 0.212, 0.114, 0.1]

    """
    round_index, num_rounds, sparsity, start = _checked(round_index, num_rounds, sparsity, start)
    return 1 - sparsity + (sparsity - start) * (1 - round_index / num_rounds) ** 3


SCHEDULES: dict[str, Callable[[int, int, float, float], float]] = {
    "exponential": exponential,
    "linear": linear,
    "cubic": cubic,
}


def density(schedule: Schedule, round_index: int, num_rounds: int, sparsity: float, start: float = 0.0) -> float:
    """Return the fraction of all prunable weights to keep after a round, by the name of a schedule or by a function.

    A function :math:`f` reaches :math:`s_0 + (s - s_0) f(k / n)`, see :func:`linear`, whose function is the identity.

    Examples:
        >>> [round(density(lambda done: done**0.5, k, 4, 0.8), 3) for k in (1, 2, 3, 4)]
        [0.6, 0.434, 0.307, 0.2]

    """
    if isinstance(schedule, str):
        return SCHEDULES[schedule](round_index, num_rounds, sparsity, start)
    round_index, num_rounds, sparsity, start = _checked(round_index, num_rounds, sparsity, start)
    if round_index == num_rounds:
        return 1 - sparsity
    return 1 - start - (sparsity - start) * _reached(schedule, round_index / num_rounds)


def fractions_reached(schedule: Callable[[float], float], num_rounds: int) -> list[float]:
    """Return what a function reaches after each round.

    Raise a ``ValueError`` if that is no number in ``[0, 1]``, falls, or does not end at 1.
    """
    reached = [_reached(schedule, index / num_rounds) for index in range(1, num_rounds + 1)]
    for index, (before, after) in enumerate(pairwise([0.0, *reached])):
        if after < before - _SLACK:
            places = f"{before} at {index / num_rounds:g} and {after} at {(index + 1) / num_rounds:g}"
            raise _bad_function(schedule, f"must never fall, got {places}")
    if reached[-1] < 1 - _SLACK:
        raise _bad_function(schedule, f"must end at 1, got {reached[-1]} at 1")
    return reached


def num_kept(num_weights: int, density: float) -> int:
    """Return the exact count behind a density: ``round(num_weights * density)``, and at least one.

    Args:
        num_weights: How many weights there are, dense.
        density: Fraction to keep, in ``[0, 1]``.

    Examples:
        >>> num_kept(1000, 0.02), num_kept(10, 0.001)
        (20, 1)

    """
    return max(1, round(num_weights * density))


def check_sparsity(sparsity: object, argument: str = "sparsity", otherwise: str = "") -> float:
    """Return a fraction removed as a ``float``; raise a ``TypeError`` or ``ValueError`` if it is not in ``[0, 1)``.

    ``otherwise`` says there what else the argument could be.
    """
    fraction = check_number(argument, sparsity, f"is the fraction removed and must be a number in [0, 1){otherwise}")
    if not 0 <= fraction < 1:
        hint = f" For {fraction:g} % pass {fraction / 100:g}." if 1 < fraction < 100 else ""
        raise ValueError(f"`{argument}` is the fraction removed and must be in [0, 1), got {sparsity}.{hint}")
    return fraction


def _reached(schedule: Callable[[float], float], done: float) -> float:
    """Return what a user's function reaches when this fraction of the rounds is done; raise ValueError if it fails."""
    try:
        value: object = schedule(done)
    except Exception as error:
        raise _bad_function(schedule, f"must take it, but raised {shown_error(error)} at {done:g}") from error
    reached = check_number("schedule", value, "must be a function that returns a number from 0 to 1")
    if not -_SLACK <= reached <= 1 + _SLACK:
        raise _bad_function(schedule, f"must return a number from 0 to 1, got {reached} at {done:g}")
    return min(max(reached, 0.0), 1.0)


def _bad_function(schedule: object, complaint: str) -> ValueError:
    name = getattr(schedule, "__qualname__", type(schedule).__name__)
    return ValueError(
        f"`schedule` is a function, {name!r}, of the fraction of the rounds that are done, and returns the fraction of"
        f" `sparsity` that is reached: it {complaint}."
    )


def _checked(round_index: int, num_rounds: int, sparsity: float, start: float) -> tuple[int, int, float, float]:
    round_index, num_rounds = (
        check_count(argument, value, least=None)
        for argument, value in (("round_index", round_index), ("num_rounds", num_rounds))
    )
    if not 1 <= round_index <= num_rounds:
        raise ValueError(f"`round_index` must be in 1..{num_rounds} (`num_rounds`), got {round_index}.")
    sparsity, start = check_sparsity(sparsity), check_number("start", start, "must be a number")
    if not 0 <= start <= sparsity:
        raise ValueError(f"`start` is the fraction already removed and must be in [0, {sparsity}], got {start}.")
    return round_index, num_rounds, sparsity, start
