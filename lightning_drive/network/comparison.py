"""Compare a module's outputs with those of another one for the same inputs."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_drive.core import containers

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far outputs may be apart, as a part of the largest of them. Rounding is all that may tell them apart."""

_ROUGH = {**_TOLERANCE, torch.float32: 0.01}
"""The same for what agrees in float64 already: other shapes are computed in another order, and maybe in TF32."""


def call(module: nn.Module, given: Any) -> Any:
    """Run a module as Lightning does with its ``example_input_array``: an argument, a tuple or a mapping of them."""
    args, kwargs = containers.arguments(given)
    return module(*args, **kwargs)


class Example(NamedTuple):
    """Inputs, and for each the outputs that a module must return."""

    inputs: list[Any]
    outputs: list[list[Tensor]]
    is_rough: bool = False
    """Whether rounding may show, and decide where whole numbers hang on it."""

    def agrees(self, module: nn.Module) -> bool:
        """Whether a module returns these outputs, up to rounding; one that cannot run does not."""
        try:
            return all(
                are_close(_outputs(module, given), expected, self.is_rough)
                for given, expected in zip(self.inputs, self.outputs, strict=True)
            )
        except Exception:  # whatever a size that is written down in `forward` leads to
            return False


def example_of(module: nn.Module, example_input: Any) -> Example:
    """Run a module on an example and on random numbers of its shape.

    Raise if its outputs are not finite, or not the same for the same input.
    """
    inputs = _inputs(module, example_input)
    outputs = [_outputs(module, given) for given in inputs]
    if not all(map(_finite, outputs)):
        raise ValueError("The outputs must be finite to be compared, but some are NaN or infinite.")
    if not all(are_close(_outputs(module, given), expected) for given, expected in zip(inputs, outputs, strict=True)):
        raise ValueError(
            "In eval mode, outputs must be the same for the same input, but they change from call to call. Take out"
            " what draws random numbers, or keeps a state."
        )
    return Example(inputs, outputs)


def in_float64(module: nn.Module, inputs: Sequence[Any]) -> tuple[nn.Module, Example] | None:
    """Copy a module to float64 and run it there; return nothing if it cannot compute in float64."""
    try:
        precise, given = copy.deepcopy(module).double(), [_as_float64(value) for value in inputs]
        outputs = [_outputs(precise, value) for value in given]
    except Exception:  # a precision that is written down in `forward`, or a device that has no float64
        return None
    return (precise, Example(given, outputs)) if all(map(_finite, outputs)) else None


def _as_float64(value: Any) -> Any:
    return containers.mapped(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, value)


def _inputs(module: nn.Module, example_input: Any) -> list[Any]:
    """Return the example, and another input with random numbers of its shape, if the module takes that.

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
    return [example, *[given for given in candidates if _is_taken(module, given)][:1]]


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


def _outputs(module: nn.Module, given: Any) -> list[Tensor]:
    with torch.no_grad():
        return [leaf.detach().clone() for leaf in containers.leaves(call(module, given))]


def _finite(outputs: Iterable[Tensor]) -> bool:
    return all(bool(output.isfinite().all()) for output in outputs)


def are_close(outputs: Sequence[Tensor], expected: Sequence[Tensor], is_rough: bool = False) -> bool:
    """Whether tensors equal others, one by one, up to rounding."""
    pairs = zip(outputs, expected, strict=False)
    return len(outputs) == len(expected) and all(_is_close(*pair, is_rough) for pair in pairs)


def _is_close(output: Tensor, expected: Tensor, is_rough: bool) -> bool:
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return is_rough or bool(torch.equal(output, expected))
    largest = max(float(expected.abs().max()), 1e-3)
    difference = float((output.double() - expected.double()).abs().max())
    tolerance = (_ROUGH if is_rough else _TOLERANCE).get(expected.dtype, 0.1)
    return math.isfinite(difference) and difference <= tolerance * largest
