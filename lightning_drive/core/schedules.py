"""Schedules: how dense the network is after each pruning round.

Every schedule is a pure function ``(round_index, num_rounds, sparsity) -> density`` that falls to exactly
``1 - sparsity`` at ``round_index == num_rounds``. Densities are fractions of *all* prunable weights, never of
the survivors, so rounding does not drift from round to round.
"""

import math
from collections.abc import Callable

from lightning_drive.core.arguments import check_count, check_number


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


def check_sparsity(sparsity: object) -> float:
    """Return a fraction removed as a ``float``; raise a ``TypeError`` or ``ValueError`` if it is not in ``[0, 1)``."""
    fraction = check_number("sparsity", sparsity, "is the fraction removed and must be a number in [0, 1)")
    if not 0 <= fraction < 1:
        hint = f" For {fraction:g} % pass {fraction / 100:g}." if 1 < fraction < 100 else ""
        raise ValueError(f"`sparsity` is the fraction removed and must be in [0, 1), got {sparsity}.{hint}")
    return fraction


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
