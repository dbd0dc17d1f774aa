"""Which parameters may be pruned: by name, each once, in the order of ``named_parameters()``."""

import glob
from collections.abc import Callable, Collection, Container, Generator, Iterable
from contextlib import contextmanager, suppress

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_drive.core.arguments import check_patterns
from lightning_drive.core.messages import listed
from lightning_drive.network import computed_weights, name_patterns, prunable_checks, prunable_layers


def register(layer: type[nn.Module] | str, *names: str) -> Callable[[], None]:
    """Prune the weights of a kind of layer by default, as those of linear layers are.

    Call it where the layer is defined, so that processes which Lightning starts know it, too.

    Args:
        layer: The class of the layer, or its qualified name (``"package.module.Class"``), so that it need not be
            imported. Subclasses count.
        names: Names of its own parameters that it multiplies by, or glob patterns over them; default: ``"weight"``.

    Returns:
        A function that takes this back.

    Raises:
        TypeError: If ``layer`` is neither a class of modules nor a name, or one of ``names`` is no string.

    Examples:
        >>> import torch
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
    prunable_layers.LAYERS.append(entry)

    def forget() -> None:
        with suppress(ValueError):  # it has been taken back already
            prunable_layers.LAYERS.remove(entry)

    return forget


def prunable_parameters(
    module: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
) -> dict[str, nn.Parameter]:
    """Select the parameters that masks will cover.

    By default: the weights of every layer that multiplies by them: linear, bilinear and convolutional layers (the last
    layer and 1x1 shortcuts included), the projections of ``nn.MultiheadAttention``, recurrent layers, linear layers of
    transformers and torch_geometric, and layers given to :func:`register`. Not biases, norms or embeddings. A tied
    weight comes once, under its first name; one that is an embedding's table and a linear layer's weight at once is an
    embedding, and pruned only if ``include`` names it. Parameters that do not require a gradient are left out: they
    are frozen, not trained. So are those without numbers.

    Args:
        module: The module whose parameters are selected.
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

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> list(prunable_parameters(net)), list(prunable_parameters(net, exclude=["3.*"]))
        (['0.weight', '3.weight'], ['0.weight'])

    """
    include, exclude = check_patterns("include", include), check_patterns("exclude", exclude)
    parameters = dict(module.named_parameters())
    default, computed = prunable_layers.default_names(module), prunable_layers.computed_in(module)
    known = [*parameters, *computed]
    name_patterns.check_matches("include", include or (), known, default)
    name_patterns.check_matches("exclude", exclude or (), known, default)
    names = set(default)
    if include is not None:
        matrices = prunable_layers.matrices(module, computed)
        names = set().union(*(name_patterns.included(pattern, names, matrices, known) for pattern in include))
    names -= name_patterns.matching(exclude or (), known)
    trained = {name: parameter for name, parameter in parameters.items() if name in names and parameter.requires_grad}
    not_stored = {name: weight for name, weight in computed.items() if name in names and weight.is_trained}
    if not_stored:
        raise computed_weights.error(not_stored, trained)
    selected = {name: parameter for name, parameter in trained.items() if not _is_empty(parameter)}
    prunable_checks.check_kinds(selected)
    prunable_checks.check_memory(selected, parameters)
    if not selected:
        raise _nothing_error([name for name in known if name in names and name not in trained])
    return selected


def _is_empty(parameter: nn.Parameter) -> bool:
    return not isinstance(parameter, UninitializedParameter) and not parameter.numel()


def _nothing_error(frozen: Collection[str]) -> ValueError:
    reason = f" ({listed(frozen)} matched, but `requires_grad` is False)" if frozen else ""
    return ValueError(
        f"There is no trainable parameter to prune{reason}. Linear and convolutional weights are prunable, and"
        " those of attention, recurrent layers and layers given to `lightning_drive.network.prunable.register`;"
        " check `include` (`['*']` takes all of two dimensions or more), `exclude` and which parameters require a"
        " gradient."
    )


def parameters_by_name(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of these names, which are as in ``module.named_parameters()``."""
    parameters = dict(module.named_parameters())
    return {name: parameters[name] for name in names}


def dense_matrices(module: nn.Module, selected: Container[str], exclude: Iterable[str] | None) -> list[str]:
    """Return the names of trained parameters of two dimensions or more that stay dense unasked."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    complex_ = {name for name, parameter in trained.items() if parameter.is_complex() and parameter.ndim > 1}
    complex_ -= name_patterns.matching(exclude or (), complex_)
    try:
        matrices = {*prunable_parameters(module, ["*"], [*(exclude or ()), *map(glob.escape, complex_)])}
    except ValueError:  # the others cannot be pruned
        matrices = set()
    return [name for name in trained if name in matrices | complex_ and name not in selected]


def count_all(module: nn.Module) -> int:
    """Return how many numbers all parameters of a module hold, each parameter once, prunable or not.

    Examples:
        >>> count_all(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))
        14

    """
    stored = (parameter for parameter in module.parameters() if not isinstance(parameter, UninitializedParameter))
    return sum(parameter.numel() for parameter in stored)


@contextmanager
def unfrozen(module: nn.Module) -> Generator[None]:
    """Let every parameter require a gradient inside, to see which could be pruned were they not frozen."""
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad = parameter.is_floating_point()
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = False
