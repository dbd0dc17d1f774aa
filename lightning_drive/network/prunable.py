"""Which parameters may be pruned: by name, each once, in the order of ``named_parameters()``."""

import glob
import re
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from lightning_drive.core import shards
from lightning_drive.core.arguments import check_patterns
from lightning_drive.core.messages import listed
from lightning_drive.network import computed_weights
from lightning_drive.network.computed_weights import Computed

_LAYERS: list[tuple[type[nn.Module] | str, tuple[str, ...]]] = [
    (nn.Linear, ("weight",)),
    (nn.Bilinear, ("weight",)),
    (_ConvNd, ("weight",)),
    (nn.MultiheadAttention, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
    (nn.RNNBase, ("weight_ih_l*", "weight_hh_l*", "weight_hr_l*")),
    (nn.RNNCellBase, ("weight_ih", "weight_hh")),
    ("transformers.pytorch_utils.Conv1D", ("weight",)),
    ("transformers.modeling_utils.Conv1D", ("weight",)),
    ("torch_geometric.nn.dense.linear.Linear", ("weight",)),
    ("torch_geometric.nn.dense.linear.HeteroLinear", ("weight",)),
    ("torch_geometric.nn.conv.rgcn_conv.RGCNConv", ("weight", "root")),
    ("dgl.nn.pytorch.conv.graphconv.GraphConv", ("weight",)),
    ("torchvision.ops.deform_conv.DeformConv2d", ("weight",)),
]
"""Kinds of layers, or their qualified names, and which of their own parameters they multiply by."""

_NORM = re.compile(r"Norm(\dd)?$")
"""What the names of the classes of norms end in."""


def register(layer: type[nn.Module] | str, *names: str) -> Callable[[], None]:
    """Have the weights of a kind of layer be pruned by default, as those of linear layers are.

    Call it where the layer is defined, so that processes which Lightning starts know it, too.

    Args:
        layer: The class of the layer, or its qualified name (``"package.module.Class"``), so that it need not be
            imported. Subclasses count.
        names: Names of its own parameters that it multiplies by, or glob patterns over them; default: ``"weight"``.

    Returns:
        A function that takes this back.

    Raises:
        TypeError: If ``layer`` is neither a class of modules nor a name, or one of ``names`` is no string.

    Example:
        >>> class Mix(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kernel = nn.Parameter(torch.ones(4, 4))
        >>> net = nn.Sequential(Mix(), nn.Linear(4, 2))
        >>> forget = register(Mix, "kernel")
        >>> list(prunable_parameters(net))
        ['0.kernel', '1.weight']
        >>> forget()
        >>> list(prunable_parameters(net))
        ['1.weight']

    """
    if not (isinstance(layer, str) or (isinstance(layer, type) and issubclass(layer, nn.Module))):
        raise TypeError(f"`layer` must be a subclass of `nn.Module` or its qualified name, got {layer!r}.")
    patterns = check_patterns("names", names)
    entry = layer, tuple(patterns or ("weight",))
    _LAYERS.append(entry)

    def forget() -> None:
        with suppress(ValueError):  # it has been taken back already
            _LAYERS.remove(entry)

    return forget


def prunable_parameters(
    module: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
) -> dict[str, nn.Parameter]:
    """Select the parameters that masks will cover.

    By default: the weights of every layer that multiplies by them: linear, bilinear and convolutional layers (the last
    layer and 1x1 shortcuts included), the projections of ``nn.MultiheadAttention``, recurrent layers, linear layers of
    transformers and torch_geometric, and what was given to :func:`register`. Not biases, norms or embeddings. A tied
    weight comes once, under its first name; one that is an embedding's table and a linear layer's weight at once is an
    embedding, and pruned only if ``include`` names it. Parameters that do not require a gradient are left out: they
    are frozen, not trained. So are those without numbers.

    Args:
        module: The module to look through.
        include: Glob patterns (``"encoder.*"``) over parameter names; only what matches one of them is selected. A
            pattern selects the default parameters it matches; where it matches none of these it selects what it does
            match, of norms, biases and other vectors only those that its last part names (``"norm.weight"``,
            ``"*.bias"``). ``"*"`` selects everything of two dimensions or more: embeddings and raw parameters, too.
        exclude: Glob patterns over parameter names; what matches one of them is not selected.

    Returns:
        Parameter name, as in ``module.named_parameters()``, to the live parameter, in that order.

    Raises:
        TypeError: If ``include`` or ``exclude`` is a string, or no iterable of strings.
        ValueError: If a pattern matches nothing, nothing is left to prune, or a selected weight is complex, not yet
            initialised, computed (by weight norm, say) rather than stored, or in the memory of another.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> list(prunable_parameters(net)), list(prunable_parameters(net, exclude=["3.*"]))
        (['0.weight', '3.weight'], ['0.weight'])

    """
    include, exclude = check_patterns("include", include), check_patterns("exclude", exclude)
    parameters = dict(module.named_parameters())
    default, derived = _default_names(module), _computed_weights(module)
    known = [*parameters, *derived]
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not _matching(pattern, known):
                raise ValueError(
                    f"`{argument}` pattern {pattern!r} matches no parameter. {_named(pattern, known, default)}"
                )
    names = set(default)
    if include is not None:
        matrices = _matrices(module, parameters, derived)
        names = set().union(*(_included(pattern, names, matrices, known) for pattern in include))
    names -= set().union(*(_matching(pattern, known) for pattern in exclude or ()))
    selected = {name: each for name, each in parameters.items() if name in names and each.requires_grad}
    in_the_way = {name: each for name, each in derived.items() if name in names and each.is_trained}
    if in_the_way:
        raise computed_weights.error(in_the_way, selected)
    selected = {name: each for name, each in selected.items() if not _is_empty(each)}
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
        frozen = [name for name, each in parameters.items() if name in names and not each.requires_grad]
        frozen += [name for name in derived if name in names]
        reason = f" ({listed(frozen)} matched, but `requires_grad` is False)" if frozen else ""
        raise ValueError(
            f"There is no trainable parameter to prune{reason}. Linear and convolutional weights are prunable, and"
            " those of attention, recurrent layers and layers given to `lightning_drive.network.prunable.register`;"
            " check `include` (`['*']` takes all of two dimensions or more), `exclude` and which parameters require a"
            " gradient."
        )
    return selected


def check_numbers(parameters: Mapping[str, Tensor]) -> None:
    """Raise if the numbers of a parameter cannot be scored and set to 0 one by one, before anything is run.

    Args:
        parameters: Parameter name to live parameter.

    Raises:
        ValueError: If one is on the meta device, in float8, not a plain dense tensor, or not to be written to (named,
            with what to do).

    """
    for name, parameter in parameters.items():
        if trouble := _trouble(parameter):
            raise ValueError(f"{name!r} {trouble}, or leave it out with `exclude=[{name!r}]`.")


def count_all(module: nn.Module) -> int:
    """Count the numbers in all parameters of a module, each parameter once, prunable or not.

    Args:
        module: Any module.

    Example:
        >>> count_all(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))
        14

    """
    return sum(each.numel() for each in module.parameters() if not isinstance(each, UninitializedParameter))


def _trouble(parameter: Tensor) -> str:
    """Say why the numbers of a parameter cannot be pruned one by one, and what to do; empty if they can."""
    numbers = shards.local(parameter)
    if numbers.is_meta:
        return (
            "is on the meta device, so it has no values to score. Give the module memory and values first"
            " (`module.to_empty(device=...)`, then initialise or load it)"
        )
    if numbers.is_nested or numbers.layout != torch.strided:
        kind = "a nested tensor" if numbers.is_nested else f"stored as {numbers.layout}"
        return f"is {kind}, and only dense tensors can be pruned weight by weight. Make it dense (`.to_dense()`)"
    if numbers.is_inference():
        return "was made in `torch.inference_mode()`, so nothing can be written to it. Make the module outside of it"
    if numbers.is_floating_point() and numbers.itemsize == 1:
        return f"is in {numbers.dtype}, which torch cannot compute with. Prune it in torch.bfloat16, and convert after"
    if type(numbers) not in (Tensor, nn.Parameter) and not _can_be_zeroed(numbers):
        kind = type(numbers).__name__
        return f"is a {kind}, which cannot be copied and set to 0 weight by weight. Make it a plain tensor"
    return ""


def _can_be_zeroed(numbers: Tensor) -> bool:
    """Whether a tensor of a class of its own can be copied and takes zeros as plain ones do."""
    try:
        with torch.no_grad():
            twin = deepcopy(numbers.detach())
            twin.masked_fill_(torch.ones(twin.shape, dtype=torch.bool, device=twin.device), 0)
            return not bool(twin.any())
    except Exception:  # whatever such a class raises for what it does not know
        return False


def _is_empty(parameter: nn.Parameter) -> bool:
    return not isinstance(parameter, UninitializedParameter) and not parameter.numel()


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


def _named(pattern: str, known: Sequence[str], default: Sequence[str]) -> str:
    """Say which names there are, those that are likely to be meant first."""
    names = sorted(known, key=lambda name: name not in default)  # stable
    layers = dict.fromkeys(f"{name.rpartition('.')[0]}.*" for name in names if "." in name)
    hint = "".join(f"Did you mean {close!r}? " for close in get_close_matches(pattern, [*names, *layers], n=1))
    return f"{hint}The parameters are, prunable ones first (a tied one by its first name): {listed(names, most=30)}."


def _default_names(module: nn.Module) -> list[str]:
    """Name the weights that layers multiply by, those that are parameters first."""
    weights: set[Tensor | None] = set()
    absent: list[str] = []
    for path, layer in module.named_modules():
        names = _weight_names(layer)
        weights.update(layer._parameters[name] for name in names if name in layer._parameters)  # unused ones are `None`
        absent += [_joined(path, name) for name in names if name not in layer._parameters]
    for layer in module.modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            weights.discard(layer._parameters.get("weight"))
    return [*(name for name, parameter in module.named_parameters() if parameter in weights), *absent]


def _weight_names(layer: nn.Module) -> list[str]:
    """Name the weights of its own that a layer multiplies by, whether they are parameters or computed from some."""
    classes = {each for kind in type(layer).__mro__ for each in (kind, f"{kind.__module__}.{kind.__qualname__}")}
    patterns = [pattern for kind, names in _LAYERS if kind in classes for pattern in names]
    if not patterns:
        return []
    tensors = [name for name, value in vars(layer).items() if isinstance(value, Tensor)]
    bases = [
        base for base in map(computed_weights.base_name, layer._parameters) if base and base not in layer._parameters
    ]
    there = dict.fromkeys([*layer._parameters, *computed_weights.of_layer(layer), *tensors, *bases])
    fixed = [pattern for pattern in patterns if pattern not in there and not _has_wildcard(pattern)]
    found = [name for name in there if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [*(name for name in found if computed_weights.base_name(name) not in bases), *fixed]


def _computed_weights(module: nn.Module) -> dict[str, Computed]:
    """Name the weights that are not stored, in the order of the layers."""
    found = {}
    for path, layer in module.named_modules():
        known = computed_weights.of_layer(layer)
        for name in dict.fromkeys([*known, *_weight_names(layer)]):
            if name not in layer._parameters:
                found[_joined(path, name)] = known.get(name) or computed_weights.of_sources(layer, name)
    return found


def _matrices(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], derived: Mapping[str, Computed]
) -> dict[str, bool]:
    """Name what has two dimensions or more and is no norm or bias; say of each if no weight is computed from it."""
    norms = {
        parameter
        for layer in module.modules()
        if any(_NORM.search(kind.__name__) for kind in type(layer).__mro__)
        for parameter in layer.parameters(recurse=False)
    }
    sources = {parameter for each in derived.values() for parameter in each.sources}
    matrices = {
        name: parameter not in sources
        for name, parameter in parameters.items()
        if not (parameter in norms or name.rpartition(".")[2].startswith("bias"))
        and (isinstance(parameter, UninitializedParameter) or parameter.ndim >= 2)
    }
    of_matrices = {parameters[name] for name in matrices}
    return {**matrices, **{name: True for name, each in derived.items() if of_matrices.intersection(each.sources)}}


def _included(pattern: str, default: Container[str], matrices: Mapping[str, bool], known: Iterable[str]) -> set[str]:
    """Name what a pattern of ``include`` selects."""
    if not pattern.strip("*"):
        return {name for name in known if name in default or matrices.get(name)}
    matched = _matching(pattern, known)
    found = {name for name in matched if name in default} or {name for name in matched if name in matrices}
    if not found and _has_wildcard(pattern.rpartition(".")[2]):
        raise ValueError(
            f"`include` pattern {pattern!r} matches only norms, biases and other vectors"
            f" ({listed(name for name in known if name in matched)}), which are pruned only where the last part of a"
            f" pattern names them, as in {next(name for name in known if name in matched)!r}."
        )
    return found or matched


def _has_wildcard(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _matching(pattern: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if fnmatchcase(name, pattern)}


def parameters_by_name(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Select parameters of a module.

    Args:
        module: The module.
        names: Names as in ``module.named_parameters()``.

    """
    parameters = dict(module.named_parameters())
    return {name: parameters[name] for name in names}


def dense_matrices(module: nn.Module, selected: Container[str], exclude: Iterable[str] | None) -> list[str]:
    """Name the trainable parameters of two dimensions or more that nobody asked to leave out, and that stay dense.

    Args:
        module: The module.
        selected: The names of what is pruned.
        exclude: Glob patterns over the names of what is to stay dense.

    """
    parameters = dict(module.named_parameters())
    complex_ = {name for name, each in parameters.items() if each.is_complex() and each.requires_grad and each.ndim > 1}
    complex_ -= {name for name in complex_ for pattern in exclude or () if fnmatchcase(name, pattern)}
    try:
        matrices = {*prunable_parameters(module, ["*"], [*(exclude or ()), *map(glob.escape, complex_)])}
    except ValueError:  # what else there is cannot be pruned
        matrices = set()
    return [name for name in parameters if name in matrices | complex_ and name not in selected]
