"""How many weights each ranking keeps: one ranking for all parameters, or one for each, by one of two rules."""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from math import floor, prod
from typing import NamedTuple, TypeAlias

from lightning_drive.core import schedules
from lightning_drive.core.arguments import Scope

Shapes: TypeAlias = Mapping[str, Sequence[int]]
"""Parameter name to shape."""


class Quota(NamedTuple):
    """Parameters that are ranked together, and how many of their weights are kept."""

    name: str
    """That of a group of parameters ranked together, empty if these are all; or of a parameter ranked by itself."""
    parameters: tuple[str, ...]
    num_kept: int


def num_weights(shapes: Shapes) -> dict[str, int]:
    """Return how many weights parameters of these shapes have."""
    return {name: prod(shape) for name, shape in shapes.items()}


def together(group: str, shapes: Shapes, density: float, alive: Mapping[str, int]) -> Iterator[Quota]:
    """Rank the weights of all parameters together, and keep a fraction of them, but never more than are alive."""
    yield Quota(group, tuple(shapes), _total(shapes, density, alive))


def same_density(group: str, shapes: Shapes, density: float, alive: Mapping[str, int]) -> Iterator[Quota]:
    """Keep the same fraction of every parameter, at least one weight where one is alive."""
    for name, size in num_weights(shapes).items():
        yield Quota(name, (name,), min(schedules.num_kept(size, density), alive[name]))


def erdos_renyi_kernel(group: str, shapes: Shapes, density: float, alive: Mapping[str, int]) -> Iterator[Quota]:
    r"""Keep as many weights as :func:`together`, at the densities of an Erdos-Renyi kernel (Evci et al., 2020).

    .. math:: d_i = \min\left(1, \varepsilon \frac{\sum_j n_{ij}}{\prod_j n_{ij}}\right)

    for a parameter of dimensions :math:`n_{i1}, n_{i2}, \dots`, those of a convolution's kernel included. As it has
    :math:`\prod_j n_{ij}` weights, it keeps a number in proportion to the sum of its dimensions. What is beyond its
    size, or beyond what is alive, goes to the others: that is what :math:`\varepsilon` is chosen for.
    """
    own = {name: alive[name] for name in shapes}
    counts = proportional({name: sum(shape) for name, shape in shapes.items()}, _total(shapes, density, alive), own)
    for name, count in counts.items():
        yield Quota(name, (name,), count)


def proportional(shares: Mapping[str, int], total: int, most: Mapping[str, int]) -> dict[str, int]:
    """Divide a total in proportion to shares, to exact whole numbers of which none is above its ``most``.

    Numbers are rounded by Webster's method: a smaller total never gives anyone more, so that masks nest. There is at
    least one for everyone, if the total is large enough. Of equal claims the earlier one is met.

    Examples:
        >>> proportional({"a": 10, "b": 20, "c": 30}, 13, most={"a": 100, "b": 100, "c": 5})
        {'a': 3, 'b': 5, 'c': 5}

    """
    claims = {name: max(1, share) for name, share in shares.items() if most[name]}
    total, counts = min(total, sum(most.values())), dict.fromkeys(shares, 0)
    if total >= len(claims):
        unit = _unit(claims, total - len(claims), most)  # too small, as each may round up
        counts |= {
            name: min(most[name], max(1, floor(unit * claim + Fraction(1, 2)))) for name, claim in claims.items()
        }
    order = {name: index for index, name in enumerate(claims)}

    def next_due(name: str) -> tuple[Fraction, int, str]:
        """Return the unit at which a claim rounds up to its next number, 0 for its first, to be sorted by."""
        return Fraction(counts[name] and 2 * counts[name] + 1, 2 * claims[name]), order[name], name

    waiting = [next_due(name) for name in claims if counts[name] < most[name]]
    heapq.heapify(waiting)
    for _ in range(total - sum(counts.values())):
        _, _, name = waiting[0]
        counts[name] += 1
        if counts[name] < most[name]:
            heapq.heapreplace(waiting, next_due(name))
        else:
            heapq.heappop(waiting)
    return counts


RULES: dict[Scope, Callable[[str, Shapes, float, Mapping[str, int]], Iterable[Quota]]] = {
    "global": together,
    "layerwise": same_density,
    "erk": erdos_renyi_kernel,
}
"""Every function returns the quotas of a group of parameters, by its name, from their shapes, the fraction to keep of
all their weights, and how many of these are alive."""


def _total(shapes: Shapes, density: float, alive: Mapping[str, int]) -> int:
    kept = schedules.num_kept(sum(num_weights(shapes).values()), density)
    return min(kept, sum(alive[name] for name in shapes))


def _unit(claims: Mapping[str, int], total: int, most: Mapping[str, int]) -> Fraction:
    """Return what a claim of 1 gets where a total is divided in proportion, and nobody takes more than the most."""
    unsettled, unit = dict(claims), Fraction(0)
    while unsettled:
        unit = Fraction(total, sum(unsettled.values()))
        full = [name for name, claim in unsettled.items() if unit * claim >= most[name]]
        if not full:
            break
        total -= sum(most[name] for name in full)
        for name in full:
            del unsettled[name]
    return unit
