"""The network as a method sees it: masked weights, and gradients on demand."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.core import containers, function_modes, scores, shards
from lightning_drive.core.messages import listed, shown_error
from lightning_drive.core.processes import ALONE, Ranks
from lightning_drive.network import forward_calls, gradients, synflow
from lightning_drive.network.forward_calls import Passage
from lightning_drive.network.gradients import LossFunction
from lightning_drive.network.random_state import preserved_rng
from lightning_drive.network.repeated_batches import Passes, endless
from lightning_drive.network.without_dropout import in_mode

_MOST_IN_A_ROW = 10_000
"""How many batches to skip one after another before that is an error, where the end of the data is not known."""
_MOST_OF_ZERO = 100
"""How often to take other batches where all gradients are 0: the network may also be cut off."""


class Network:
    """The network as a method sees it in one round: masked weights, and gradients on demand.

    Args:
        module: The network.
        parameters: Parameter name to live prunable parameter, pruned entries already 0.
        batches: A finite or endless iterable, or ``None`` where there is no data.
        loss_fn: ``loss_fn(module, batch)`` returns a scalar tensor or, for a batch to skip, ``None``. ``None`` where
            there is no data.
        example_input: What ``forward`` takes: a tensor, a tuple of arguments or a mapping of keyword arguments; by
            default what the loss calls the module with.
        ranks: Processes that hold the same network, each with batches of its own.

    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batches: Iterable[Any] | None,
        loss_fn: LossFunction | None,
        example_input: Any,
        ranks: Ranks = ALONE,
    ) -> None:
        self.module = module
        self._parameters = parameters
        self._ranks = ranks
        self.is_sharded = any(map(shards.is_sharded, parameters.values()))
        self._passes = batches if batches is None or isinstance(batches, Passes) else Passes(batches)
        self._batches = None if self._passes is None else self._watched(endless(self._passes))
        self._skipped_in_a_row = 0
        self._reason = ""  # why the last batch was skipped
        self.num_skipped = 0
        """How many batches gave nothing to score by."""
        self.reached: set[str] = set()
        """Names of the parameters that had a gradient in any round so far, be it zero."""
        self._loss_fn = loss_fn
        self._example_input = self._on_device(example_input)
        self._first: Any = None
        self._passage: Passage | None = None
        self._recorded: list[Passage] = []
        self.warnings: list[str] = []
        self._flow: synflow.SynapticFlow | None = None

    def _on_device(self, given: Any) -> Any:
        device = next(iter(self._parameters.values())).device
        return containers.mapped(lambda tensor: tensor.to(device), given)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Parameter name to live weights: the parameter, or this rank's part of it."""
        if not self.is_sharded:
            return self._parameters
        return {name: shards.local(parameter) for name, parameter in self._parameters.items()}

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Cut this rank's part out of a tensor in a parameter's full shape.

        Args:
            name: The parameter's name.
            whole: The tensor.

        """
        return shards.part(whole, of=self._parameters[name])

    def shape(self, name: str) -> torch.Size:
        """Give a parameter's full shape.

        Args:
            name: The parameter's name.

        """
        return self._parameters[name].shape

    def loss_gradients(self, num_batches: int) -> dict[str, Tensor]:
        """Sum the loss gradients over the next batches, and average them over the ranks.

        The result is that of one large batch which joins those of all ranks. A batch that gives no gradient is
        skipped, and the next one is taken in its place.

        Args:
            num_batches: How many batches to take, at least 1.

        Returns:
            Parameter name to gradient, in float32 or float64; the caller owns it.

        Raises:
            ValueError: If no batch of a whole pass over the data gives a gradient.

        """
        if self._batches is None or self._loss_fn is None:
            missing = "batches" if self._batches is None else "loss_fn"
            raise ValueError(f"This method scores by the gradient of a loss, so it needs `{missing}`, got None.")
        with self._ranks.together():
            found = self._own_gradients(num_batches)
        self.reached.update(found)
        found = {
            name: found[name] if name in found else torch.zeros_like(weight) for name, weight in self.weights.items()
        }
        if not self.is_sharded:  # else FSDP2 has averaged them
            self._ranks.mean_(found.values())
        with function_modes.set_aside():
            return {name: scores.in_full(gradient) for name, gradient in found.items()}

    def _own_gradients(self, num_batches: int) -> dict[str, Tensor]:
        """Sum the gradients over the next batches of this rank that have any."""
        assert self._passes is not None
        skip = gradients.refuse if self.is_sharded else self._skip  # ranks that share weights run the same batches
        for number in range(_MOST_OF_ZERO):
            taken = self._taken(num_batches)
            found = gradients.loss_gradients(self.module, self._parameters, self._loss, taken, skip)
            with function_modes.set_aside():
                is_enough = self.is_sharded or any(gradient.any() for gradient in found.values())
            if is_enough:
                self.num_skipped += number * num_batches
                break
            if self._passes.length is not None and number * num_batches >= self._passes.length:
                break
        return found

    def _taken(self, num_batches: int) -> Iterator[Any]:
        """Give batches until so many of them were not skipped."""
        assert self._batches is not None
        assert self._passes is not None
        while num_batches:
            batch = next(self._batches)
            if self._skipped_in_a_row >= (self._passes.length or _MOST_IN_A_ROW):
                where = ", a whole pass over the data" if self._passes.length else ""
                raise ValueError(
                    f"{self._reason} This was so for {self._skipped_in_a_row:,} batches in a row{where}: there is"
                    " nothing to score by."
                )
            before = self.num_skipped
            yield batch
            if self.num_skipped == before:
                num_batches -= 1
                self._skipped_in_a_row = 0

    def _skip(self, reason: str) -> None:
        self._reason = reason
        self._skipped_in_a_row += 1
        self.num_skipped += 1

    def join_ranks(self) -> None:
        """Put together what ranks know of skipped batches and of parameters that had a gradient."""
        names = list(self._parameters)
        counts = torch.tensor([self.num_skipped, *(name in self.reached for name in names)])
        self.num_skipped, *reached = self._ranks.sum(counts).tolist()
        self.reached = {name for name, count in zip(names, reached, strict=True) if count}

    def stand_still(self) -> None:
        """Use the next batch again and again from here on, so that scores can be compared."""
        if self._batches is not None:
            self._batches = repeat(next(self._batches))

    def synaptic_flow(self) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        """Compute the synaptic flow, see :class:`lightning_drive.network.synflow.SynapticFlow`.

        Returns:
            Parameter name to absolute weights and to the gradients of the flow, which the caller owns; and the flow.

        Raises:
            ValueError: If the flow is not defined for much of the network. For a few layers it is a warning.

        """
        if self.is_sharded:
            raise ValueError(
                "SynFlow runs the network with absolute weights, which cannot be put in while they are sharded over"
                " ranks. Use DRIVE or SNIP, or find the masks before `fully_shard`."
            )
        if self._flow is None:
            self._check_flow()
            self._flow = synflow.SynapticFlow(self.module, self._parameters)
        found, total = self._flow.gradients(self.passage())
        self.reached |= self._flow.reached
        return self._flow.weights, found, total

    def _check_flow(self) -> None:
        way = self.passage()
        try:
            layers = synflow.layers_without_flow(self.module, way)
        except Exception as error:  # the module's own `forward`, called in a way it may not be made for
            reason = shown_error(error)
            raise ValueError(
                f"SynFlow could not run the network on {way.source}: {reason}. {self._remedy()}"
            ) from error
        named = listed([each.layer for each in layers], most=3)
        text = (
            f"SynFlow is not defined for {named}: saturating activations stop the flow and normalisation mixes its"
            " signs."
        )
        taken = {id(weight) for each in layers for weight in each.weights}
        sizes = {id(parameter): parameter.numel() for parameter in self._parameters.values()}
        share = sum(size for key, size in sizes.items() if key in taken) / sum(sizes.values())
        if share > 1 / 3 or len(layers) * 3 > len(self.weights):
            raise ValueError(f"{text} That is too much of this network; use another method, such as DRIVE.")
        if layers:
            self.warnings.append(f"{text} Their neighbours' scores mean little.")

    def example_input(self) -> Any:
        """Return what ``forward`` takes: the example that was given, or the first tensor of the first batch.

        Raises:
            ValueError: If there is neither.

        """
        if self._example_input is not None:
            return self._example_input
        tensors = containers.leaves(self._first_batch())
        if not tensors:
            raise self._unknown_input()
        return tensors[0]

    def passage(self) -> Passage:
        """Return the way of data through the network, found once.

        It is that of the example that was given, unless ``forward`` does not use all prunable parameters on it and the
        loss is known: then it is what the loss calls. Without either it is ``forward`` on a batch or a part of it.

        Raises:
            ValueError: If nothing is known that could be sent through the network.

        """
        if self._passage is None:
            with preserved_rng(), in_mode(self.module, "eval"):
                self._passage = self._find_passage()
        return self._passage

    def _find_passage(self) -> Passage:
        found = None
        if self._example_input is not None:
            candidates = [Passage.of(self._example_input, whole=whole) for whole in (False, True)]
            found = forward_calls.chosen(self.module, candidates)
            assert found is not None
            if self._loss_fn is None or self._batches is None or self._is_enough(found):
                return found
        batch = gradients.batch_in_float32(self._first_batch())
        if self._loss_fn is not None:
            try:
                if not self._recorded:
                    self._loss(self.module, batch)
            except Exception:  # of a training step that cannot be called in this mode, say: detectors give no loss
                self._recorded = [way for way in self._recorded if forward_calls.uses(self.module, way)]
            found = forward_calls.chosen(self.module, self._recorded) or found
        found = found or forward_calls.chosen(self.module, Passage.guessed(self.module, batch))
        if found is None:
            raise self._unknown_input()
        return found

    def _unknown_input(self) -> ValueError:
        return ValueError(f"The input of the network is not known. {self._remedy()}")

    def _remedy(self) -> str:
        """Say how to tell what the network takes."""
        is_lightning = hasattr(self.module, "example_input_array")
        name = "`example_input_array`" if is_lightning else "`example_input`"
        what = "what `forward` takes, a tuple of arguments or a dict of keyword arguments"
        if self._example_input is not None:
            return f"Let {name} be {what}."
        given = f"Set {name} on the module to {what}" if is_lightning else f"Give {name}: {what}"
        return f"{given}; or use batches with a tensor that `forward` takes in them."

    def _is_enough(self, found: Passage) -> bool:
        return forward_calls.uses(self.module, found).issuperset(self._parameters.values())

    def _loss(self, module: Any, batch: Any) -> Tensor | None:
        """Compute the loss, and see the first time what it calls."""
        assert self._loss_fn is not None
        if self._recorded:
            return self._loss_fn(module, batch)
        with forward_calls.recording(module) as calls:
            try:
                return self._loss_fn(module, batch)
            finally:
                self._recorded = Passage.recorded(calls, self._loss_fn, batch)

    def _first_batch(self) -> Any:
        if self._batches is not None and self._first is None:
            next(self._batches)
        return self._first

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if self._first is None:
                self._first = batch
            yield batch
