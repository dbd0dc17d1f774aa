"""The input of the network: the given example, what the loss calls it with, or a guess from the first batch."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_drive.core import containers
from lightning_drive.network import forward_passes, gradients, outermost_calls
from lightning_drive.network.forward_passes import ForwardPass
from lightning_drive.network.gradients import LossFunction
from lightning_drive.network.random_state import preserved_rng
from lightning_drive.network.without_dropout import in_mode
from lightning_drive.search.scoring_batches import ScoringBatches


class NetworkInput:
    """The input of a network, determined once.

    Args:
        module: The network.
        parameters: Parameter name to prunable parameter.
        batches: The batches to score on; ``None`` where there is no data.
        loss_fn: ``loss_fn(module, batch)``; ``None`` where there is no loss.
        example_input: What ``forward`` takes: a tensor, a tuple of arguments or a mapping of keyword arguments.

    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batches: ScoringBatches | None,
        loss_fn: LossFunction | None,
        example_input: Any,
    ) -> None:
        self._module = module
        self._parameters = parameters
        self._batches = batches
        self._loss_fn = loss_fn
        device = next(iter(parameters.values())).device
        self._example = containers.mapped(lambda tensor: tensor.to(device), example_input)
        self._recorded: list[ForwardPass] = []
        self._forward_pass: ForwardPass | None = None

    def loss(self, module: Any, batch: Any) -> Tensor | None:
        """Compute the loss of a batch; the first time, record what it calls the network with."""
        assert self._loss_fn is not None
        if self._recorded:
            return self._loss_fn(module, batch)
        with outermost_calls.recording(module) as calls:
            try:
                return self._loss_fn(module, batch)
            finally:
                self._recorded = ForwardPass.recorded(calls, self._loss_fn, batch)

    def example(self) -> Any:
        """Return the given example, or the first tensor of the first batch; raise ValueError if there is neither."""
        if self._example is not None:
            return self._example
        tensors = containers.leaves(self._first_batch())
        if not tensors:
            raise self._unknown()
        return tensors[0]

    def forward_pass(self) -> ForwardPass:
        """Return a forward pass of the network, determined once; raise ValueError if none runs.

        It is ``forward`` on the given example. If there is none, or ``forward`` does not use all prunable parameters
        on it, it is what the loss calls; without a loss it is ``forward`` on a batch or a part of one.
        """
        if self._forward_pass is None:
            with preserved_rng(), in_mode(self._module, "eval"):
                self._forward_pass = self._find_forward_pass()
        return self._forward_pass

    def remedy(self) -> str:
        """Return how the user can provide the input of the network."""
        is_lightning = hasattr(self._module, "example_input_array")
        name = "`example_input_array`" if is_lightning else "`example_input`"
        what = "what `forward` takes, a tuple of arguments or a dict of keyword arguments"
        if self._example is not None:
            return f"Set {name} to {what}."
        given = f"Set {name} on the module to {what}" if is_lightning else f"Pass {name}: {what}"
        return f"{given}; or use batches that contain a tensor `forward` takes."

    def _find_forward_pass(self) -> ForwardPass:
        forward_pass = None
        if self._example is not None:
            candidates = [ForwardPass.of(self._example, whole=whole) for whole in (False, True)]
            forward_pass = forward_passes.first_that_runs(self._module, candidates)
            assert forward_pass is not None
            if self._loss_fn is None or self._batches is None or self._uses_all(forward_pass):
                return forward_pass
        batch = gradients.batch_in_float32(self._first_batch())
        if self._loss_fn is not None:
            try:
                if not self._recorded:
                    self.loss(self._module, batch)
            except Exception:  # from a training step that cannot run in this mode, say: detectors return no loss then
                self._recorded = [call for call in self._recorded if forward_passes.parameters_used(self._module, call)]
            forward_pass = forward_passes.first_that_runs(self._module, self._recorded) or forward_pass
        if forward_pass is None:
            forward_pass = forward_passes.first_that_runs(self._module, ForwardPass.guessed(self._module, batch))
        if forward_pass is None:
            raise self._unknown()
        return forward_pass

    def _uses_all(self, forward_pass: ForwardPass) -> bool:
        return forward_passes.parameters_used(self._module, forward_pass).issuperset(self._parameters.values())

    def _first_batch(self) -> Any:
        return None if self._batches is None else self._batches.first()

    def _unknown(self) -> ValueError:
        return ValueError(f"The input of the network is not known. {self.remedy()}")
