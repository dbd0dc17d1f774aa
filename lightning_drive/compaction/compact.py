"""Make a smaller dense network of the same function: take out the channels that pruning has cut off."""

import copy
from typing import Any

from torch import nn

from lightning_drive.compaction import dependency_graph
from lightning_drive.compaction.removal import shrunk
from lightning_drive.network import comparison, given_modules


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

    Examples:
        >>> import torch
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
    dependency_graph.library()
    given_modules.check(module, example_input, "Compact")
    with given_modules.undisturbed_run(example_input):
        given = given_modules.copied(module).eval()
        example = comparison.example_of(given, example_input)
        small = shrunk(*(comparison.in_float64(given, example.inputs) or (copy.deepcopy(given), example)))
        _restore_(small, module)
        if not example._replace(is_rough=True).agrees(small.eval()):
            raise RuntimeError(
                "The compacted module must give the outputs of the given one, and does not in its own precision. It is"
                " a mistake of ours, or its outputs hang on rounding: compact it in float64, with `module.double()`."
            )
    _restore_modes_(small, module)
    return small


def _restore_(small: nn.Module, module: nn.Module) -> None:
    """Restore the precision and the ``requires_grad`` of the given module's parameters and buffers."""
    given = dict(module.named_modules())
    for name, layer in small.named_modules():
        like = next(given[name].parameters(recurse=False), None)
        for kind in ("_parameters", "_buffers"):
            for key, value in getattr(layer, kind).items():
                former = getattr(given[name], kind)[key]
                former = like if former is None else former
                if value is not None and former is not None:
                    value.data = value.data.to(former.dtype)
                    if kind == "_parameters":
                        value.requires_grad_(former.requires_grad)
                        value.grad = None


def _restore_modes_(small: nn.Module, module: nn.Module) -> None:
    """Restore train and eval mode, part by part."""
    for part, given in zip(small.modules(), module.modules(), strict=True):
        part.training = given.training
