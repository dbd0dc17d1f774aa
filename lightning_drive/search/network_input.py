"""What the network takes: the example that was given, what the loss calls it with, or a guess from the first batch."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_drive.core import containers
from lightning_drive.network import forward_calls, gradients
from lightning_drive.network.forward_calls import Passage
from lightning_drive.network.gradients import LossFunction
from lightning_drive.network.random_state import preserved_rng
from lightning_drive.network.without_dropout import in_mode
from lightning_drive.search.scoring_batches import ScoringBatches


class NetworkInput:
    """The input of a network, found once.

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
        self._recorded: list[Passage] = []
        self._passage: Passage | None = None

    def loss(self, module: Any, batch: Any) -> Tensor | None:
        """Compute the loss of a batch, and record the first time what it calls the network with."""
        assert self._loss_fn is not None
        if self._recorded:
            return self._loss_fn(module, batch)
        with forward_calls.recording(module) as calls:
            try:
                return self._loss_fn(module, batch)
            finally:
                self._recorded = Passage.recorded(calls, self._loss_fn, batch)

    def example(self) -> Any:
        """Return the example that was given, or the first tensor of the first batch; raise ValueError without both."""
        if self._example is not None:
            return self._example
        tensors = containers.leaves(self._first_batch())
        if not tensors:
            raise self._unknown()
        return tensors[0]

    def passage(self) -> Passage:
        """Return the way of data through the network, found once; raise ValueError if nothing could be sent through.

        It is that of the example that was given, unless ``forward`` does not use all prunable parameters on it and the
        loss is known: then it is what the loss calls. Without either it is ``forward`` on a batch or a part of it.
        """
        if self._passage is None:
            with preserved_rng(), in_mode(self._module, "eval"):
                self._passage = self._find_passage()
        return self._passage

    def remedy(self) -> str:
        """Return how the user can say what the network takes."""
        is_lightning = hasattr(self._module, "example_input_array")
        name = "`example_input_array`" if is_lightning else "`example_input`"
        what = "what `forward` takes, a tuple of arguments or a dict of keyword arguments"
        if self._example is not None:
            return f"Let {name} be {what}."
        given = f"Set {name} on the module to {what}" if is_lightning else f"Give {name}: {what}"
        return f"{given}; or use batches with a tensor that `forward` takes in them."

    def _find_passage(self) -> Passage:
        passage = None
        if self._example is not None:
            candidates = [Passage.of(self._example, whole=whole) for whole in (False, True)]
            passage = forward_calls.chosen(self._module, candidates)
            assert passage is not None
            if self._loss_fn is None or self._batches is None or self._uses_all(passage):
                return passage
        batch = gradients.batch_in_float32(self._first_batch())
        if self._loss_fn is not None:
            try:
                if not self._recorded:
                    self.loss(self._module, batch)
            except Exception:  # of a training step that cannot be called in this mode, say: detectors give no loss
                self._recorded = [way for way in self._recorded if forward_calls.uses(self._module, way)]
            passage = forward_calls.chosen(self._module, self._recorded) or passage
        passage = passage or forward_calls.chosen(self._module, Passage.guessed(self._module, batch))
        if passage is None:
            raise self._unknown()
        return passage

    def _uses_all(self, passage: Passage) -> bool:
        return forward_calls.uses(self._module, passage).issuperset(self._parameters.values())

    def _first_batch(self) -> Any:
        return None if self._batches is None else self._batches.first()

    def _unknown(self) -> ValueError:
        return ValueError(f"The input of the network is not known. {self.remedy()}")
