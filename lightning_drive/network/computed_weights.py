"""Weights that are computed anew for every forward pass (weight norm, say), and the calls that make them plain."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_drive.core.messages import listed

_ENDINGS = {"bar", "g", "orig", "raw", "v"}
"""Endings that the parameters have, in addition to the weight's name, that a weight is computed from."""

_MOST = 8
"""Names that a message lists."""


class Computed(NamedTuple):
    """A weight that is not stored."""

    sources: tuple[nn.Parameter, ...]
    """The parameters that it is computed from, as far as they are known."""
    is_trained: bool
    plain: str
    """The call that makes it a plain parameter; empty if that is not known."""


def of_layer(layer: nn.Module) -> dict[str, Computed]:
    """Return the weights of a layer that are computed from other parameters, by name within the layer.

    Known are parametrizations of torch, its older hooks (``weight_norm``, ``spectral_norm``), masks of
    ``torch.nn.utils.prune``, and those of other libraries that work in the same way (weight drop). Modules within the
    layer do not count.

    Examples:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> of_layer(layer)["weight"].plain
        'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")'

    """
    weights = {}
    if parametrize.is_parametrized(layer):
        for name, parametrization in layer.parametrizations.items():  # type: ignore[union-attr,operator]
            call = f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{name}")'
            weights[name] = _computed(parametrization.parameters(), call)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor) and _sources(layer, name):
            weights[name] = of_sources(layer, name)
    return weights


def of_sources(layer: nn.Module, name: str) -> Computed:
    """Return a computed weight with the parameters of the layer that are named after it, or else all of them."""
    sources = _sources(layer, name)
    argument = "" if name == "weight" else f', "{name}"'
    if f"{name}_g" in sources:
        plain = f"torch.nn.utils.remove_weight_norm(layer{argument})"
    elif f"{name}_mask" in layer._buffers:
        plain = f'torch.nn.utils.prune.remove(layer, "{name}")'
    elif f"{name}_orig" in sources and f"{name}_u" in layer._buffers:
        plain = f"torch.nn.utils.remove_spectral_norm(layer{argument})"
    else:
        plain = ""
    value = vars(layer).get(name)
    if not sources and isinstance(value, Tensor):  # written there by another module, which has the sources
        return Computed((), value.requires_grad, "")
    return _computed(sources.values() or layer.parameters(recurse=False), plain)


def base_name(name: str) -> str:
    """Return the name of the weight that a parameter of this name is a source of by its ending; empty if of none.

    Examples:
        >>> base_name("weight_hh_l0_orig"), base_name("weight_hh_l0")
        ('weight_hh_l0', '')

    """
    base, _, ending = name.rpartition("_")
    return base if ending in _ENDINGS else ""


def error(names: Mapping[str, Computed], others: Iterable[str]) -> ValueError:
    """Return the error about computed weights that were to be pruned: all of them, and how each kind is made plain.

    ``names`` are full names, ``others`` the names of parameters that can be pruned, which no pattern it shows matches.
    """
    kinds: dict[str, list[str]] = {}
    for name, weight in names.items():
        kinds.setdefault(weight.plain or "what the layer that computes it offers for that", []).append(repr(name))
    calls = "; ".join(
        f"{f'`{call}`' if '(' in call else call} for {listed(which, _MOST)}" for call, which in kinds.items()
    )
    verb = "is" if len(names) == 1 else "are"
    return ValueError(
        f"{listed(map(repr, names), _MOST)} {verb} computed anew for every pass (by weight norm, spectral norm or a"
        f" mask of `torch.nn.utils.prune`, say), so zeros written there would not stay. Make plain parameters first, by"
        f" {calls}; or leave out with `exclude={_patterns(list(names), list(others))!r}`."
    )


def _computed(sources: Iterable[nn.Parameter], plain: str) -> Computed:
    known = tuple(sources)
    return Computed(known, any(parameter.requires_grad for parameter in known), plain)


def _sources(layer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the stored parameters that a weight of this name is computed from."""
    stored = {own: parameter for own, parameter in layer._parameters.items() if parameter is not None}
    return {own: parameter for own, parameter in stored.items() if base_name(own) == name}


def _patterns(names: list[str], others: list[str]) -> list[str]:
    """Return names, or where they are many, the shortest patterns that match them and none of the others."""
    if len(names) <= _MOST:
        return names

    def pattern(name: str) -> str:
        parts = name.split(".")
        starts = [".".join(parts[:length]) + "." for length in range(1, len(parts))]
        own = (start for start in starts if not any(other.startswith(start) for other in others))
        return next((f"{start}*" for start in own), name)

    return list(dict.fromkeys(map(pattern, names)))
