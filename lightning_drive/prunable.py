"""Which parameters may be pruned: by name, each once, in the order of ``named_parameters()``."""

from collections.abc import Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from lightning_drive.messages import listed

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prunable_parameters(
    module: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """Select the parameters that masks will cover.

    By default: the ``weight`` of every linear and convolutional layer (the last layer and 1x1 shortcuts included) and
    the input projections of ``nn.MultiheadAttention``. Not biases, norms or embeddings. A tied weight comes once,
    under its first name; one that is an embedding's table and a linear layer's weight at once is an embedding, and
    pruned only if ``include`` names it. Parameters that do not require a gradient are left out: they are frozen, not
    trained.

    Args:
        module: The module to look through.
        include: Glob patterns (``"encoder.*"``) over parameter names; only what matches one of them is selected. A
            pattern selects the default parameters it matches. Where it matches none of these it selects what it does
            match, so that ``"embedding.weight"`` can be asked for by name.
        exclude: Glob patterns over parameter names; what matches one of them is not selected.

    Returns:
        Parameter name, as in ``module.named_parameters()``, to the live parameter, in that order.

    Raises:
        TypeError: If ``include`` or ``exclude`` is a string and not a list of strings.
        ValueError: If a pattern matches nothing, nothing is left to prune, or a selected weight is complex, not yet
            initialised, computed (by weight norm, say) rather than stored, or in the memory of another.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> list(prunable_parameters(net)), list(prunable_parameters(net, exclude=["3.*"]))
        (['0.weight', '3.weight'], ['0.weight'])

    """
    parameters = dict(module.named_parameters())
    default, computed = _default_names(module), _computed_names(module)
    known = [*parameters, *computed]
    for argument, patterns in (("include", include), ("exclude", exclude)):
        check_patterns(argument, patterns)
        for pattern in patterns or ():
            if not _matching(pattern, known):
                raise ValueError(
                    f"`{argument}` pattern {pattern!r} matches no parameter. {_named(pattern, known, default)}"
                )
    names = {*default, *computed}
    if include is not None:
        names = set().union(*(_matching(pattern, names) or _matching(pattern, parameters) for pattern in include))
    names -= set().union(*(_matching(pattern, known) for pattern in exclude or ()))
    for name in names.intersection(computed):
        raise ValueError(
            f"{name!r} is computed anew for every pass (by weight norm, spectral norm or a mask of"
            " `torch.nn.utils.prune`, say), so zeros written into it would not stay. Make it a plain parameter first,"
            f" or leave it out with `exclude=[{name!r}]`."
        )
    frozen = [name for name in parameters if name in names and not parameters[name].requires_grad]
    selected = {name: parameters[name] for name in parameters if name in names and name not in frozen}
    for name, parameter in selected.items():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name!r} is not initialised yet: run one batch through the lazy module before pruning.")
        if parameter.is_complex():
            raise ValueError(
                f"{name!r} is complex ({parameter.dtype}), and scores are defined for real weights. Leave it out with"
                f" `exclude=[{name!r}]`."
            )
    _check_memory(selected, parameters)
    if not selected:
        reason = f" ({listed(frozen)} matched, but `requires_grad` is False)" if frozen else ""
        raise ValueError(
            f"There is no trainable parameter to prune{reason}. Linear and convolutional weights are prunable;"
            " check `include`, `exclude` and which parameters require a gradient."
        )
    return selected


def _check_memory(selected: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Refuse weights that lie in the memory of another parameter, or over each other: a mask of one prunes both."""
    storages: dict[tuple[torch.device, int], list[str]] = {}
    for name, parameter in parameters.items():
        if type(parameter) is nn.Parameter and parameter.layout == torch.strided and parameter.device.type != "meta":
            storage = parameter.untyped_storage()
            if storage.data_ptr():  # what is fake, or empty, has none
                storages.setdefault((parameter.device, storage.data_ptr()), []).append(name)
    for names in storages.values():
        if any(name in selected for name in names) and not _are_apart([parameters[name] for name in names]):
            _check_places({name: parameters[name] for name in names}, selected)


def _check_places(sharing: Mapping[str, Tensor], selected: Container[str]) -> None:
    """Refuse weights of one storage, of which some are selected, that have a number in common."""
    unit = min(each.itemsize for each in sharing.values())
    owners = torch.full((next(iter(sharing.values())).untyped_storage().nbytes() // unit,), -1, dtype=torch.int32)
    names = sorted(sharing, key=lambda name: name in selected)  # stable; who comes later is the one that minds
    for index, name in enumerate(names):
        weights, scale = sharing[name], sharing[name].itemsize // unit
        shape = [size if stride else 1 for size, stride in zip(weights.shape, weights.stride(), strict=True)]
        strides = [scale * stride for stride in weights.stride()]
        places = owners.as_strided(shape, strides, scale * weights.storage_offset())
        other = int(places.max()) if places.numel() else -1
        places.fill_(index)
        if name in selected and other >= 0:
            raise ValueError(
                f"{names[other]!r} and {name!r} are two parameters over one memory, so a mask of one would prune both."
                " Tie them by assigning the parameter itself (`second.weight = first.weight`, not its `.data`), give"
                f" each its own memory (`.clone()`), or leave both out with `exclude=[{names[other]!r}, {name!r}]`."
            )
        if name in selected and int((owners == index).sum()) < weights.numel():
            raise ValueError(
                f"Several weights of {name!r} are one number in memory (it was expanded, say), so a mask of one would"
                f" prune them all. Give it its own memory (`.clone()`), or use `exclude=[{name!r}]`."
            )


def _are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one storage plainly lie one behind the other there, as slices of a flat buffer do."""
    spans = sorted(
        (start := each.storage_offset() * each.itemsize, start + each.numel() * each.itemsize) for each in tensors
    )
    return all(map(_is_dense, tensors)) and all(one[1] <= two[0] for one, two in pairwise(spans))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor lie one after the other, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


@contextmanager
def unfrozen(module: nn.Module) -> Generator[None]:
    """Let every parameter require a gradient inside, to see which could be pruned were they not frozen.

    Args:
        module: The module.

    """
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad = parameter.is_floating_point()
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = False


def check_patterns(argument: str, patterns: Sequence[str] | None) -> None:
    """Refuse what is not a list of patterns; a single string would be read letter by letter.

    Args:
        argument: The argument's name, for the message.
        patterns: What was given.

    Raises:
        TypeError: If it is neither ``None`` nor a list of strings.

    """
    if patterns is None:
        return
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"`{argument}` must be a list of glob patterns over parameter names, got {patterns!r}.")


def _named(pattern: str, known: Sequence[str], default: Sequence[str]) -> str:
    """Say which names there are, those that are likely to be meant first."""
    names = sorted(known, key=lambda name: name not in default)  # stable
    layers = dict.fromkeys(f"{name.rpartition('.')[0]}.*" for name in names if "." in name)
    hint = "".join(f"Did you mean {close!r}? " for close in get_close_matches(pattern, [*names, *layers], n=1))
    return f"{hint}The parameters are, prunable ones first (a tied one by its first name): {listed(names, most=30)}."


def _default_names(module: nn.Module) -> list[str]:
    weights = {layer._parameters.get(name) for _, layer, name in _prunable_places(module)}
    for layer in module.modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            weights.discard(layer._parameters.get("weight"))
    return [name for name, parameter in module.named_parameters() if parameter in weights]


def _computed_names(module: nn.Module) -> list[str]:
    """Name the weights that would be prunable, were they parameters and not computed from others."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, layer, name in _prunable_places(module)
        if name not in layer._parameters  # what a layer does not use is there as `None`
    ]


def _prunable_places(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Give the path of every prunable layer, the layer, and the names of its weights."""
    for path, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, _ConvNd)):
            yield path, layer, "weight"
        elif isinstance(layer, nn.MultiheadAttention):
            for name in _ATTENTION_WEIGHTS:
                yield path, layer, name


def _matching(pattern: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if fnmatchcase(name, pattern)}
