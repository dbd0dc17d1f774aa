"""Smaller dense networks: what pruning has cut off from the input or the output is taken out of the tensors.

torch-pruning's dependency graph says which channels of which layers belong together. What may go is decided here: of
that graph only what is known to treat every channel by itself is followed, and every change is compared.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from lightning_drive.compaction import channels
from lightning_drive.core import containers, shards, tensor_kinds
from lightning_drive.core.messages import listed
from lightning_drive.network.random_state import preserved_rng

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far outputs may be apart, as a part of the largest of them. Rounding is all that may tell them apart."""

_ROUGH = {**_TOLERANCE, torch.float32: 0.01}
"""The same for what agrees in float64 already: other shapes are computed in another order, and maybe in TF32."""


def compact(module: nn.Module, example_input: Any) -> nn.Module:
    """Make a smaller module of the same function, without the channels that pruning has cut off. Needs torch-pruning.

    What no later weight reads is removed. What no weight writes to is constant: it is added to the next layer's bias
    where that is exact, and joined with the layer's other constants into one channel where it is not (a convolution
    that pads with zeros sees no constant at the borders). This goes on until nothing more can go. The zeros that are
    left stay zeros in a dense tensor.

    In eval mode the outputs are those of ``module`` for any input of that kind, batches of other sizes included, up to
    rounding. It is compared on ``example_input``, on random numbers of its shape, and on both in one batch, in float64
    where the module can run in it. Only Linear, convolutions, BatchNorm and PReLU lose channels, and only where all
    between them treats each channel by itself. All else is left as it is: attention, LayerNorm, grouped (but not
    depthwise) convolutions, channels that are shuffled or split, shared or parametrised weights, layers with hooks,
    subclasses of layers. At least one channel of each layer is left, and inputs and outputs keep their shapes.

    The module itself is only read. A LightningModule is copied without its Trainer; where ``forward`` does not do all
    that is to stay the same, compact the network in it. Shapes change, so a ``state_dict`` of the one does not load
    into the other: save the whole module by ``torch.save``, or export it.

    Args:
        module: A pruned network, its zeros written into its weights. On any device, in any mode, which the result
            shares; of any floating-point precision.
        example_input: What ``forward`` takes, on the module's device: a tensor, a tuple of arguments or a dict of
            keyword arguments, as in ``LightningModule.example_input_array``. Batch dimension first. Its numbers do not
            matter, unless they steer the computation; integers are only shuffled to make another input.

    Returns:
        A new module of the same class, with new parameters that have no gradients. A layer without bias may have got
        one. Hooks are copied, and run while the copy is looked at.

    Raises:
        ModuleNotFoundError: If torch-pruning is not installed.
        TypeError: If ``module`` is no module, or is compiled, scripted or wrapped for several devices.
        ValueError: If its weights are not all there (lazy, sharded, on the meta device), some are not used, its
            outputs are not finite or not the same for the same input, or it cannot be copied or followed.
        RuntimeError: If the smaller module does not agree with the given one in its own precision.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = net[2].weight[:, 1].zero_()  # nothing reads the second neuron
        >>> compact(net, torch.randn(1, 4))
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )

    """
    library = _library()
    _check(module, example_input)
    with preserved_rng(), _no_autocast(example_input):
        given = _copied(module).eval()
        inputs = _inputs(given, example_input)
        outputs = _reference(given, inputs)
        small = _shrunk(library, *(_in_float64(given, inputs) or (copy.deepcopy(given), _Example(inputs, outputs))))
        _restore_(small, module)
        if not _Example(inputs, outputs, rough=True).agrees(small.eval()):
            raise RuntimeError(
                "The compacted module must give the outputs of the given one, and does not in its own precision. It is"
                " a mistake of ours, or its outputs hang on rounding: compact it in float64, with `module.double()`."
            )
    _modes_(small, module)
    return small


class _Example(NamedTuple):
    """Inputs, and for each the outputs that a module must give."""

    inputs: list[Any]
    outputs: list[list[Tensor]]
    rough: bool = False
    """Whether rounding may show, and decide where whole numbers hang on it."""

    def agrees(self, module: nn.Module) -> bool:
        """Whether a module gives these outputs, up to rounding; one that cannot run does not."""
        try:
            return all(
                _close(_outputs(module, given), expected, self.rough)
                for given, expected in zip(self.inputs, self.outputs, strict=True)
            )
        except Exception:  # whatever a size that is written down in `forward` leads to
            return False


# Rounds of looking and removing.


def _shrunk(library: Any, module: nn.Module, example: _Example) -> nn.Module:
    """Remove what can go until nothing can, and leave alone what would not give the same outputs."""
    left: set[str] = set()
    while True:
        attempt = copy.deepcopy(module)
        step = _step(library, attempt, example, left)
        if not step.changed:
            return module
        if step.is_sound and example.agrees(attempt):
            module = attempt
            continue
        for name in step.changed:  # find out which of them it was
            attempt = copy.deepcopy(module)
            step = _step(library, attempt, example, left, only=name)
            if step.changed and step.is_sound and example.agrees(attempt):
                module = attempt
            else:
                left.add(name)


class _Step(NamedTuple):
    """What a round did."""

    changed: list[str]
    """The groups in which something was folded or removed."""
    is_sound: bool
    """Whether what seemed unread is unread."""


def _step(library: Any, module: nn.Module, example: _Example, left: set[str], *, only: str | None = None) -> _Step:
    """Fold constants and remove unread channels once, in place."""
    graph, traced = channels.trace(library, module, example.inputs)
    groups = [
        group
        for group in channels.groups(graph, traced)
        if group.name not in left and (only is None or group.name == only)
    ]
    with torch.no_grad():
        changed = {group.name for group in groups if _fold_(group, traced)}
        unread = {group.name: _unread_(group) for group in reversed(groups)}
        if not _is_unread(module, example, groups, unread):
            return _Step([group.name for group in groups], is_sound=False)
        gone: dict[tuple[nn.Module, bool], set[int]] = {}
        for group in groups:
            roots = unread[group.name].nonzero().flatten().tolist()
            removed = roots[1:] if len(roots) == group.size else roots
            if not removed:
                continue
            again = channels.group_of(graph, traced, group.root, [group.channels[root] for root in removed])
            # Channels that hang together only in one direction of the graph would come along: leave them.
            if again is None or any(item.columns().any() for item in again.readers):
                continue
            changed.add(group.name)
            for item in (*again.writers, *again.channelwise, *again.readers):
                gone.setdefault((item.layer, item.reads), set()).update(item.index.tolist())
        for (layer, reads), index in gone.items():
            pruner = graph.get_pruner_of_module(layer)
            (pruner.prune_in_channels if reads else pruner.prune_out_channels)(layer, sorted(index))
    return _Step([group.name for group in groups if group.name in changed], is_sound=True)


def _fold_(group: channels.Group, traced: channels.Traced) -> bool:
    """Move constants from where they are read into biases, or into one channel; say whether there were any."""
    constant = _constant(group, traced)
    values = []
    for item in group.readers:
        value, uniform = traced.constants(item)
        constant[item.root[~uniform & item.columns()]] = False
        values.append(value)
    done = False
    for item, value in zip(group.readers, values, strict=True):
        chosen = constant[item.root] & item.columns()
        index, weights = item.index[chosen], channels.by_input(item.layer)
        sums = (weights[index].transpose(0, -1) * value[chosen]).transpose(0, -1)
        if _adds_the_same_everywhere(item.layer) or not value[chosen].any():
            if value[chosen].any():
                _add_to_bias_(item.layer, sums.sum(0))
            weights[index] = 0
            done |= len(index) > 0
        elif len(index) > 1:
            carrier = int(value[chosen].abs().argmax())
            joined = sums.sum(0) / value[chosen][carrier]
            weights[index] = 0
            weights[index[carrier]] = joined
            done = True
    return done


def _constant(group: channels.Group, traced: channels.Traced) -> Tensor:
    """Find the channels that do not hang on the input, wherever they are read: the ones that no weight writes to."""
    known: dict[Any, Tensor] = {}

    def at(node: Any) -> Tensor:
        if node not in known:
            item = group.items[node, False]
            silent = item.root.new_zeros(group.size, dtype=torch.bool)
            if isinstance(item.layer, (nn.Linear, _ConvNd, _BatchNorm)):
                silent = group.everywhere(item, ~item.rows())
            inputs = [source for source in node.inputs if (source, False) in group.items]
            if inputs and not group.is_writer(node) and (node.module in traced.plain or not channels.is_mixed(node)):
                silent = silent | torch.stack([at(source) | ~group.has(source) for source in inputs]).all(0)
            known[node] = silent & group.has(node)
        return known[node]

    result = torch.ones(group.size, dtype=torch.bool, device=group.device)
    for item in group.readers:
        for source in item.node.inputs:
            result &= at(source) | ~group.has(source)
    return result


def _unread_(group: channels.Group) -> Tensor:
    """Find the channels that nothing reads, and let nothing write to them, so that more is unread before them."""
    unread = torch.ones(group.size, dtype=torch.bool, device=group.device)
    for item in group.readers:
        unread[item.root[item.columns()]] = False
    for item in group.writers:
        channels.by_output(item.layer)[item.index[unread[item.root]]] = 0
    return unread


def _is_unread(
    module: nn.Module, example: _Example, groups: Sequence[channels.Group], unread: Mapping[str, Tensor]
) -> bool:
    """Whether outputs stay the same with anything at all in the channels that nothing reads.

    What the graph does not show would be seen here, such as a channel that is read without its gradient.
    """
    generator = torch.Generator().manual_seed(0)
    places = []
    for group in groups:
        for item in group.writers:
            index = item.index[unread[group.name][item.root]]
            if len(index):
                bias = item.layer._parameters["bias"]
                places.append((channels.by_output(item.layer), index, 10.0))
                places += [] if bias is None else [(bias, index, 100.0)]
    before = [values[index] for values, index, _ in places]
    noise = [scale * torch.randn(values[index].shape, generator=generator) for values, index, scale in places]
    agrees = True
    for sign in (1, -1) if places else ():  # what an activation stops of the one, it lets through of the other
        for (values, index, _), each in zip(places, noise, strict=True):
            values[index] = (sign * each).to(values)
        agrees = agrees and example.agrees(module)
    for (values, index, _), each in zip(places, before, strict=True):
        values[index] = each
    return agrees


def _adds_the_same_everywhere(layer: nn.Module) -> bool:
    """Whether a constant input adds a constant to the output, at the borders, too."""
    if isinstance(layer, nn.Linear):
        return True
    if not isinstance(layer, _ConvNd) or isinstance(layer, _ConvTransposeNd):
        return False
    return layer.padding_mode != "zeros" or layer.padding == "valid" or not any(_numbers(layer.padding))


def _numbers(padding: Any) -> tuple[Any, ...]:
    return padding if isinstance(padding, tuple) else (padding,)


def _add_to_bias_(layer: nn.Module, sums: Tensor) -> None:
    """Add what constants give to the bias, one number for each output, summed over a kernel's places."""
    amount = sums.flatten(1).sum(1) if sums.ndim > 1 else sums
    bias = layer._parameters["bias"]
    if bias is None:
        layer.bias = nn.Parameter(amount.clone())
    else:
        bias.add_(amount)


# Copies, inputs and outputs.


def _library() -> Any:
    """Import torch-pruning, which not everybody needs."""
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("`compact` needs torch-pruning: `pip install 'lightning-drive[compact]'`.") from error
    return torch_pruning


def _check(module: nn.Module, example_input: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a torch module, got {type(module).__name__}.")
    for name, each in module.named_modules():
        place = f"`module.{name}`" if name else "`module`"
        if hasattr(each, "_orig_mod"):
            raise TypeError(f"{place} is compiled. Compact what was compiled, its `_orig_mod`, and compile the result.")
        if isinstance(each, torch.jit.ScriptModule):
            raise TypeError(f"{place} is scripted, which cannot be changed. Compact it first, and script the result.")
        if isinstance(each, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise TypeError(f"{place} is wrapped for several devices. Compact what it wraps, its `module`.")
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(value):
            raise ValueError(f"{name!r} has no shape yet. Let the module see a batch first.")
        if shards.is_sharded(value):
            raise ValueError(
                f"{name!r} is split over ranks. Load the joined weights into a plain module and compact that."
            )
        if value.is_meta:
            raise ValueError(f"{name!r} is on the meta device and has no values. Load the weights first.")
        if tensor_kinds.is_own_kind(value):
            raise TypeError(
                f"{name!r} is {tensor_kinds.described(value)}, whose rows and columns cannot be taken out. Compact the"
                " module before its weights are quantised or converted."
            )
    if not any(parameter.is_floating_point() for parameter in module.parameters()):
        raise ValueError("`module` must have parameters, and has none.")
    tensors = containers.leaves(example_input)
    if not tensors:
        raise ValueError(f"`example_input` must hold a tensor, got {type(example_input).__name__}.")
    devices = {parameter.device for parameter in module.parameters()}
    apart = {tensor.device for tensor in tensors} - devices
    if apart:
        raise ValueError(
            f"`example_input` must be on the module's device, {listed(sorted(map(str, devices)))}, got"
            f" {listed(sorted(map(str, apart)))}. Move one of them with `to`."
        )


def _copied(module: nn.Module) -> nn.Module:
    """Copy a module, without the Trainer that a LightningModule may be attached to."""
    memo: dict[int, Any] = {}
    for each in module.modules():
        for name in ("_trainer", "_fabric"):
            attached = vars(each).get(name)
            if attached is not None:
                memo[id(attached)] = None
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ValueError(
            f"The module must be one that `copy.deepcopy` can copy, and is not: {error} Take such attributes off first."
        ) from error


def _in_float64(module: nn.Module, inputs: Sequence[Any]) -> tuple[nn.Module, _Example] | None:
    """Copy a module into float64, and run it there; nothing if it cannot compute in that."""
    try:
        precise, given = copy.deepcopy(module).double(), [_as_float64(each) for each in inputs]
        outputs = [_outputs(precise, each) for each in given]
    except Exception:  # a precision that is written down in `forward`, or a device that has no float64
        return None
    return (precise, _Example(given, outputs)) if all(map(_finite, outputs)) else None


def _as_float64(value: Any) -> Any:
    return containers.mapped(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, value)


def _restore_(small: nn.Module, module: nn.Module) -> None:
    """Give back the precision and the ``requires_grad`` that the given module has."""
    given = dict(module.named_modules())
    for name, layer in small.named_modules():
        like = next(given[name].parameters(recurse=False), None)
        for kind in ("_parameters", "_buffers"):
            for key, value in getattr(layer, kind).items():
                of = getattr(given[name], kind)[key]
                of = like if of is None else of
                if value is not None and of is not None:
                    value.data = value.data.to(of.dtype)
                    if kind == "_parameters":
                        value.requires_grad_(of.requires_grad)
                        value.grad = None


def _modes_(small: nn.Module, module: nn.Module) -> None:
    for each, given in zip(small.modules(), module.modules(), strict=True):
        each.training = given.training


def _inputs(module: nn.Module, example_input: Any) -> list[Any]:
    """Give the example, and another input with random numbers of its shape, if the module takes that.

    The other one holds the example, too, where the module takes larger batches.
    """
    generator = torch.Generator().manual_seed(0)
    example = containers.mapped(Tensor.detach, example_input)
    other = containers.mapped(lambda leaf: _random_like(leaf, generator), example)
    candidates = [other]
    if all(leaf.ndim for leaf in containers.leaves(example)):
        others = iter(containers.leaves(other))
        both = containers.mapped(lambda leaf: torch.cat([leaf, next(others)]), example)
        candidates = [both, other]
    return [example, *[each for each in candidates if _is_taken(module, each)][:1]]


def _is_taken(module: nn.Module, given: Any) -> bool:
    try:
        return _finite(_outputs(module, given))
    except Exception:  # such as lengths that do not fit, or a size of the batch that is written down
        return False


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.is_floating_point():
        deviation, mean = torch.std_mean(tensor.double().cpu(), correction=0)
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return (noise * deviation.clamp(min=1e-3) + mean).to(tensor)
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.flatten()[order].view(tensor.shape)


def _reference(module: nn.Module, inputs: Sequence[Any]) -> list[list[Tensor]]:
    outputs = [_outputs(module, given) for given in inputs]
    if not all(map(_finite, outputs)):
        raise ValueError("The outputs must be finite to be compared, but some are NaN or infinite.")
    if not all(_close(_outputs(module, given), expected) for given, expected in zip(inputs, outputs, strict=True)):
        raise ValueError(
            "In eval mode, outputs must be the same for the same input, but they change from call to call. Take out"
            " what draws random numbers, or keeps a state."
        )
    return outputs


def _outputs(module: nn.Module, given: Any) -> list[Tensor]:
    with torch.no_grad():
        return [leaf.detach().clone() for leaf in containers.leaves(channels.call(module, given))]


def _finite(outputs: Iterable[Tensor]) -> bool:
    return all(bool(output.isfinite().all()) for output in outputs)


def _close(found: Sequence[Tensor], expected: Sequence[Tensor], rough: bool = False) -> bool:
    pairs = zip(found, expected, strict=False)
    return len(found) == len(expected) and all(_close_pair(*pair, rough) for pair in pairs)


def _close_pair(found: Tensor, expected: Tensor, rough: bool) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return rough or bool(torch.equal(found, expected))
    largest = max(float(expected.abs().max()), 1e-3)
    difference = float((found.double() - expected.double()).abs().max())
    tolerance = (_ROUGH if rough else _TOLERANCE).get(expected.dtype, 0.1)
    return math.isfinite(difference) and difference <= tolerance * largest


@contextmanager
def _no_autocast(example_input: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for device in {leaf.device.type for leaf in containers.leaves(example_input)} | {"cpu"}:
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
