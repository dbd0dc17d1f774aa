"""Measure, while a loss is computed, in which form each pruned weight is the fastest in training."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_drive.acceleration import choice, timing
from lightning_drive.acceleration.operations import Operation
from lightning_drive.acceleration.sparse_calls import SparseCalls, SparseWeight, product
from lightning_drive.acceleration.weight_calls import Call, WeightCalls
from lightning_drive.report.acceleration_report import DENSE, AccelerationReport, LayerForm, all_dense

LEAST_SPARSITY = 0.5
"""Fraction of zeros. With fewer no form won wherever we measured it, and measuring takes long then."""

UNSEEN = "no linear layer or convolution of torch computes with it"


class Pruned(NamedTuple):
    """A parameter, and the places of its kept weights when it is flattened."""

    name: str
    parameter: nn.Parameter
    places: Tensor

    @property
    def sparsity(self) -> float:
        """Fraction of its weights that is pruned, in ``[0, 1)``."""
        return 1 - len(self.places) / self.parameter.numel()


class Choice(NamedTuple):
    """What was measured: plain data, for all processes of a run."""

    report: AccelerationReport
    operations: dict[str, Operation]
    """The operation of each parameter that a sparse form was measured for."""

    def sparse_calls(self, pruned: Iterable[Pruned]) -> SparseCalls | None:
        """Return the mode that computes in the forms that were chosen; ``None`` if all are dense."""
        forms = {layer.name: layer.form for layer in self.report.layers if layer.is_sparse}
        weights = [
            SparseWeight(each.parameter, each.places, self.operations[each.name], forms[each.name])
            for each in pruned
            if each.name in forms
        ]
        return SparseCalls(weights) if weights else None


def measure(pruned: Iterable[Pruned], step: Callable[[], bool], runs: int | None = None) -> Choice | None:
    """Choose a form for each parameter, and keep these forms only if a whole step is faster with them.

    Args:
        pruned: The parameters of the module that ``step`` computes with.
        step: Computes a loss and its gradients. Returns whether there was a loss.
        runs: How often the whole is run each way; see :func:`lightning_drive.acceleration.timing.least_seconds`.

    Returns:
        The choice; ``None`` if there was no loss.

    """
    pruned = list(pruned)
    with _Measuring(pruned) as measuring:
        if not step():
            return None
    layers = tuple(
        measuring.forms.get(each.name) or LayerForm(each.name, each.sparsity, reason=UNSEEN) for each in pruned
    )
    choice = Choice(AccelerationReport("training step", layers, torch.get_num_threads()), measuring.operations)
    calls = choice.sparse_calls(pruned)
    if calls is None:
        return choice

    def sparse() -> None:
        with calls:
            step()

    seconds = timing.least_seconds({DENSE: step, "sparse": sparse}, runs)
    if timing.is_faster(seconds["sparse"], seconds[DENSE]):
        report = replace(choice.report, dense_seconds=seconds[DENSE], seconds=seconds["sparse"])
    else:
        report = replace(choice.report, layers=all_dense(layers), dense_seconds=seconds[DENSE], seconds=seconds[DENSE])
    return choice._replace(report=report)


class _Measuring(WeightCalls):
    """Times the first call with each parameter, forward and backward, in all of its forms."""

    def __init__(self, pruned: Iterable[Pruned]) -> None:
        super().__init__({id(each.parameter): each for each in pruned})
        self.forms: dict[str, LayerForm] = {}
        self.operations: dict[str, Operation] = {}

    def compute(self, known: Pruned, call: Call) -> Tensor:
        """Return the result of a call, dense, and measure it if it is the first one."""
        if known.name not in self.forms:
            self.forms[known.name] = self._form(known, call)
        return call.dense(call.input, call.weight, call.bias)

    def _form(self, known: Pruned, call: Call) -> LayerForm:
        operation, obstacle = call.operation, call.obstacle
        if not obstacle and known.sparsity < LEAST_SPARSITY:
            obstacle = f"less than {LEAST_SPARSITY:.0%} of it is zero"
        if obstacle or operation is None:
            return LayerForm(known.name, known.sparsity, reason=obstacle)
        self.operations[known.name] = operation
        needs_input = call.input.requires_grad or not torch.is_grad_enabled()  # a checkpoint, which comes to it later
        own = call._replace(
            input=call.input.detach().requires_grad_(needs_input),
            bias=None if call.bias is None else call.bias.detach().requires_grad_(call.bias.requires_grad),
        )
        names = operation.layouts(operation.batch(own.input))
        weights = {name: SparseWeight(call.weight, known.places, operation, name) for name in names}
        forms = {name: _step(own, _in_form(weight, own)) for name, weight in weights.items() if weight.fits(own)}
        dense = _step(own, lambda: own.dense(own.input, own.weight, own.bias))
        with torch.enable_grad(), saved_tensors_hooks(_same, _same):  # else a checkpoint takes these for its own
            return choice.fastest(known.name, known.sparsity, dense, forms)


def _in_form(weight: SparseWeight, call: Call) -> Callable[[], Tensor]:
    return lambda: product(weight, call)


def _step(call: Call, forward: Callable[[], Tensor]) -> Callable[[], object]:
    """Return the forward and the backward pass, as far as there is one."""
    tensors = [tensor for tensor in (call.input, call.weight, call.bias) if tensor is not None and tensor.requires_grad]
    if not tensors:
        return forward

    def step() -> object:
        output = forward()
        return torch.autograd.grad(output, tensors, torch.ones_like(output))

    return step


def _same(tensor: Tensor) -> Tensor:
    return tensor
