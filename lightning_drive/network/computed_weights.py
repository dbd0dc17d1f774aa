"""Weights that are computed anew for every forward pass, as by weight norm, and how they are made plain parameters."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_drive.core.messages import listed

_ENDINGS = {"bar", "g", "orig", "raw", "v"}
"""What is added to a weight's name for the parameters that it is computed from."""

_MOST = 8


class Computed(NamedTuple):
    """A weight that is not stored."""

    sources: tuple[nn.Parameter, ...]
    """The parameters that it is computed from, as far as they are known."""
    is_trained: bool
    plain: str
    """The call that makes it a plain parameter; empty if that is not known."""


def of_layer(layer: nn.Module) -> dict[str, Computed]:
    """Find the weights of a layer that are computed from other parameters.

    Known are parametrizations of torch, its older hooks (``weight_norm``, ``spectral_norm``), masks of
    ``torch.nn.utils.prune``, and what other libraries do in the same way (weight drop).

    Args:
        layer: Any module; modules within it do not count.

    Returns:
        The weight's name within the layer to what it is computed from.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> of_layer(layer)["weight"].plain
        'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")'

    """
    found = {}
    if parametrize.is_parametrized(layer):
        for name, each in layer.parametrizations.items():  # type: ignore[union-attr,operator]
            call = f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{name}")'
            found[name] = _computed(each.parameters(), call)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor) and _sources(layer, name):
            found[name] = of_sources(layer, name)
    return found


def of_sources(layer: nn.Module, name: str) -> Computed:
    """Describe a weight that is not stored by the parameters of the layer that are named after it, as far as there are.

    Args:
        layer: The layer.
        name: The weight's name within it.

    """
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
    """Return the name of the weight that a parameter of this name would be a source of; empty if of none.

    Args:
        name: A parameter's name within its layer.

    Example:
        >>> base_name("weight_hh_l0_orig"), base_name("weight_hh_l0")
        ('weight_hh_l0', '')

    """
    base, _, ending = name.rpartition("_")
    return base if ending in _ENDINGS else ""


def error(names: Mapping[str, Computed], others: Iterable[str]) -> ValueError:
    """Return the error about computed weights that were to be pruned: all of them, and how each kind is made plain.

    Args:
        names: Full name to the weight.
        others: The names of what can be pruned.

    """
    kinds: dict[str, list[str]] = {}
    for name, each in names.items():
        kinds.setdefault(each.plain or "what the layer that computes it offers for that", []).append(repr(name))
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
    return Computed(known, any(each.requires_grad for each in known), plain)


def _sources(layer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Find the stored parameters that a weight of this name is computed from."""
    stored = layer._parameters
    return {own: each for own, each in stored.items() if each is not None and base_name(own) == name}


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
