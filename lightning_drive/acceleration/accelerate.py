"""Make a faster network of the same function: layers compute with their nonzero weights only, where that is faster."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_drive.acceleration import batch_norm_folding, timing, trials
from lightning_drive.acceleration.operations import TYPES
from lightning_drive.core.messages import listed
from lightning_drive.network import comparison, given_modules
from lightning_drive.network.comparison import Example
from lightning_drive.report.acceleration_report import AccelerationReport, LayerForm, all_dense


def accelerate(module: nn.Module, example_input: Any) -> nn.Module:
    """Make a copy of a pruned module for inference that skips the zeros of its weights, where that is faster here.

    Every linear layer and every convolution in one or two dimensions is timed on its input in a run on the example: as
    it is, and in sparse forms that compute with the weights that are not zero. The fastest form is taken. So the result
    depends on this machine, on its number of threads (``torch.get_num_threads()``) and on the example's batch size.
    BatchNorm that follows a layer is folded into it, and images have their channels last in memory if the network is
    faster so. If nothing makes the whole faster, all layers stay as they are.

    The copy takes batches of any size, and its outputs are those of ``module`` in eval mode up to rounding. They are
    compared on ``example_input``, on random numbers of its shape, and on both in one batch. The projections of
    ``nn.MultiheadAttention`` count as linear layers. Grouped, transposed and three-dimensional convolutions and
    recurrent layers stay dense, and so do layers with hooks or parametrisations, layers with a ``forward`` of their
    own, and layers that do not run on the example.

    The copy is for inference: it has no gradients and no ``state_dict`` (asking for one is an error), and is saved
    whole, by ``torch.save``, copied or pickled. The module itself is only read. A LightningModule is copied without its
    Trainer.

    Args:
        module: A pruned network, its zeros written into its weights; on the CPU, in float32 or float64, in any mode.
        example_input: What ``forward`` takes: a tensor, a tuple of arguments or a dict of keyword arguments, as in
            ``LightningModule.example_input_array``. Batch dimension first, and as many samples as batches will have.

    Returns:
        A new module of the same class in eval mode. Its attribute ``report`` (an ``AccelerationReport``) has a table of
        all layers with zeros: the form of each, and the times that decided it.

    Raises:
        TypeError: If ``module`` is no module, or is compiled, scripted, quantised or wrapped for several devices.
        ValueError: If no weight is zero, a parameter is not on the CPU or of another precision, or the module cannot be
            copied, or its outputs are not finite or not the same for the same input.

    Examples:
        >>> net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[torch.rand(512, 512) < 0.98] = 0
        >>> images = torch.randn(64, 512)
        >>> fast = accelerate(net, images)
        >>> torch.allclose(fast(images), net(images), atol=1e-4)
        True
        >>> len(fast.report.layers)
        1

    """
    _check(module, example_input)
    with given_modules.undisturbed_run(example_input), torch.no_grad():
        dense = given_modules.copied(module).eval().requires_grad_(False)
        example = comparison.example_of(dense, example_input)
        folded = batch_norm_folding.folded(dense, example)
        tried = [trials.with_sparse_layers(folded, form, example) for form in _memory_formats(folded)]
        candidates = [(dense, all_dense(tried[0][1])), *(variant for variant in tried if _is_right(*variant, example))]
        works = [partial(comparison.call, variant, example.inputs[0]) for variant, _ in candidates]
        seconds = timing.least_seconds(dict(enumerate(works)))
    fastest = min(seconds, key=lambda index: seconds[index])
    chosen = fastest if timing.is_faster(seconds[fastest], seconds[0]) else 0
    result, forms = candidates[chosen]
    report = AccelerationReport("inference", forms, torch.get_num_threads(), seconds[0], seconds[chosen])
    return _finished(result, report)


def _check(module: nn.Module, example_input: Any) -> None:
    """Raise if a module is not one that can be accelerated."""
    given_modules.check(module, example_input, "Accelerate")
    for name, parameter in module.named_parameters():
        if parameter.device.type != "cpu":
            raise ValueError(
                f"{name!r} is on {parameter.device}, but whether zeros pay was measured on CPUs only. Accelerate the"
                " module on the CPU, with `module.cpu()`, or leave it dense."
            )
        if parameter.is_floating_point() and parameter.dtype not in TYPES:
            raise ValueError(
                f"{name!r} is in {parameter.dtype}, but sparse forms compute in float32 or float64. Accelerate"
                " `module.float()`."
            )
    layers = trials.layers_of(module)
    if not layers:
        raise ValueError("`module` must have linear layers or convolutions, and has none.")
    if not any(sparsity for _, sparsity in layers.values()):
        names = listed(map(repr, layers))
        raise ValueError(
            f"Some weights must be 0, but those of {names} have no zeros: there is nothing to skip. Apply the masks"
            " first (`masks.apply_(module)`), or load a checkpoint of the pruned network."
        )


def _is_right(variant: nn.Module, forms: Iterable[LayerForm], example: Example) -> bool:
    """Whether a variant has a sparse layer, and returns what it must."""
    return any(form.is_sparse for form in forms) and example.agrees(variant)


def _memory_formats(module: nn.Module) -> Iterator[torch.memory_format]:
    """Yield the memory formats to try."""
    yield torch.contiguous_format
    if any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
        yield torch.channels_last


def _finished(module: nn.Module, report: AccelerationReport) -> nn.Module:
    """Attach the report to a result, which has no ``state_dict`` from then on."""
    result: Any = module
    result.report = report
    result.register_state_dict_pre_hook(_refuse_state_dict)
    result.register_load_state_dict_pre_hook(_refuse_load)
    return module


def _refuse_state_dict(*_: Any) -> None:
    raise RuntimeError(
        "An accelerated module has no `state_dict`, since it has other weights than the module that it was made from."
        " Save it whole, with `torch.save(module, path)`, or save the `state_dict` of that module."
    )


def _refuse_load(*_: Any) -> None:
    raise RuntimeError(
        "An accelerated module cannot load a `state_dict`. Load it into the module that it was made from, and"
        " accelerate that again."
    )
