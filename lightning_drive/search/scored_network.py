"""The network as a method and the search loop see it: masked weights, gradients on demand, masks of all ranks."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.core import function_modes, schedules, scores, shards, zeroing
from lightning_drive.core.arguments import Mode
from lightning_drive.core.messages import listed, shown_error
from lightning_drive.core.processes import ALONE, Ranks
from lightning_drive.network import gradients, prunable, synflow, synflow_breakers
from lightning_drive.network.forward_passes import ForwardPass
from lightning_drive.network.gradients import LossFunction
from lightning_drive.network.masks import Masks
from lightning_drive.network.undisturbed import undisturbed
from lightning_drive.search import rank_agreement
from lightning_drive.search.network_input import NetworkInput
from lightning_drive.search.scoring_batches import ScoringBatches

_MOST_OF_ZERO = 100
"""How often to try other batches where all gradients are 0: if the network is cut off, no batch helps."""


class Network:
    """The network as a method sees it in one round: masked weights, and gradients on demand.

    A search masks and runs the module, so it must be a replica, as in :meth:`of`. Parameters may be split over ranks
    (FSDP2): every rank then scores and masks its own part, and only histograms of scores are exchanged.

    Args:
        module: The network.
        parameters: Parameter name to the live prunable parameter.
        batches: A finite or endless iterable, or ``None`` where there is no data.
        loss_fn: ``loss_fn(module, batch)`` returns a scalar tensor, or ``None`` for a batch to skip. ``None`` where
            there is no loss.
        example_input: What ``forward`` takes: a tensor, a tuple of arguments or a mapping of keyword arguments; by
            default what the loss calls the module with.
        ranks: The processes that hold the same network, each with its own batches: gradients are averaged over them,
            and all get the masks of rank 0.

    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batches: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        example_input: Any = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.module = module
        self.warnings: list[str] = []
        """Warnings for the user and the report; a method may append to them."""
        self.reached: set[str] = set()
        """Names of the parameters that had a gradient, zero or not, in any round so far."""
        self.ranks_agree = True
        """Whether all ranks arrived at the same masks."""
        self.ranks = ranks
        self.holders = shards.holders(parameters)
        self.is_sharded = any(map(shards.is_sharded, parameters.values()))
        self.parameters = parameters
        self._batches = None if batches is None else ScoringBatches(batches)
        self._has_loss = loss_fn is not None
        self._input = NetworkInput(module, parameters, self._batches, loss_fn, example_input)
        self._flow: synflow.SynapticFlow | None = None

    @classmethod
    @contextmanager
    def of(
        cls,
        module: nn.Module,
        names: Iterable[str],
        mode: Mode,
        *,
        batches: Iterable[Any] | None,
        loss_fn: LossFunction | None,
        example_input: Any,
    ) -> Iterator["Network"]:
        """Open a replica of a module that can be scored and masked; the module itself stays as it is."""
        with undisturbed(module, mode) as scored:
            parameters = prunable.parameters_by_name(scored.module, names)
            loss = loss_fn and gradients.on_replica_only(scored.of(loss_fn), module)
            yield cls(scored.module, parameters, batches, loss, example_input)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Parameter name to live weights: the parameter, or this rank's part of it."""
        if not self.is_sharded:
            return self.parameters
        return {name: shards.local(parameter) for name, parameter in self.parameters.items()}

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's part of ``whole``, a tensor in the full shape of the parameter ``name``."""
        return shards.part(whole, of=self.parameters[name])

    def shape(self, name: str) -> torch.Size:
        """Return the full shape of the parameter ``name``, which may be split over ranks."""
        return self.parameters[name].shape

    def example_input(self) -> Any:
        """Return the given example of what ``forward`` takes, or the first tensor of the first batch.

        Raises:
            ValueError: If there is neither.

        """
        return self._input.example()

    def loss_gradients(self, num_batches: int) -> dict[str, Tensor]:
        """Sum the loss gradients over the next batches, and average them over the ranks.

        The result is that of one large batch that joins the batches of all ranks. A batch without a gradient is
        skipped for the next one.

        Args:
            num_batches: Number of batches to take, at least 1.

        Returns:
            Parameter name to gradient, in float32 or float64; the caller owns it.

        Raises:
            ValueError: If there is no gradient in a whole pass over the data, or no data or loss at all.

        """
        if self._batches is None or not self._has_loss:
            missing = "batches" if self._batches is None else "loss_fn"
            raise ValueError(f"This method scores by the gradient of a loss, so it needs `{missing}`, got None.")
        with self.ranks.together():
            own = self._own_gradients(self._batches, num_batches)
        self.reached.update(own)
        whole = {name: own[name] if name in own else torch.zeros_like(weight) for name, weight in self.weights.items()}
        del own
        if not self.is_sharded:  # else FSDP2 has averaged them
            self.ranks.mean_(whole.values())
        with function_modes.set_aside():
            return {name: scores.in_full(gradient) for name, gradient in whole.items()}

    def synaptic_flow(self) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        """Compute the synaptic flow, see :class:`lightning_drive.network.synflow.SynapticFlow`.

        Returns:
            The absolute weights and the gradients of the flow, both by parameter name and owned by the caller; and
            the flow.

        Raises:
            ValueError: If the flow is not defined for a large part of the network; a few layers are a warning.

        """
        if self.is_sharded:
            raise ValueError(
                "SynFlow runs the network with absolute weights, which cannot be put in while they are sharded over"
                " ranks. Use DRIVE or SNIP, or find the masks before `fully_shard`."
            )
        if self._flow is None:
            self._check_flow()
            self._flow = synflow.SynapticFlow(self.module, self.parameters)
        flow_gradients, total = self._flow.gradients(self.forward_pass())
        self.reached |= self._flow.reached
        return self._flow.weights, flow_gradients, total

    # For the search itself.

    def forward_pass(self) -> ForwardPass:
        """Return a forward pass of the network, determined once; raise ValueError if none is known."""
        return self._input.forward_pass()

    def num_weights(self) -> dict[str, int]:
        """Return the number of weights of every parameter, on all ranks together."""
        return {name: parameter.numel() for name, parameter in self.parameters.items()}

    def starting_masks(self, masks: Mapping[str, Tensor] | None, sparsity: float) -> Masks:
        """Return this rank's part of the masks to start from; raise ValueError if they do not fit."""
        if not masks:
            return Masks({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()})
        if masks.keys() != self.parameters.keys():
            different = listed(sorted(masks.keys() ^ self.parameters.keys()))
            raise ValueError(
                f"`masks` must cover exactly the prunable parameters, but {different} is in only one of the two:"
                " check `include`, `exclude` and what is frozen. What an earlier search left out, since nothing depends"
                " on it, goes in `exclude`."
            )
        start = Masks(masks)
        start.parameters_of(self.module)  # raises an error that names a shape that differs
        if start.num_kept < schedules.num_kept(start.num_prunable, 1 - sparsity):
            raise ValueError(
                f"`masks` already have sparsity {start.sparsity:g}, more than the `sparsity` of {sparsity:g} asked for,"
                " and a pruned weight never returns."
            )
        parameters = self.parameters.items()
        return Masks({name: shards.part(masks[name], of=value).to(value.device) for name, value in parameters})

    def mask_(self, masks: Masks) -> None:
        """Set pruned weights to exactly 0."""
        zeroing.zero_(self.weights, masks)

    def whole(self, masks: Masks) -> Masks:
        """Join the parts of the masks from all ranks to full shape, and return the same masks on every rank."""
        own = Masks({name: shards.joined(mask, of=self.parameters[name]).clone() for name, mask in masks.items()})
        masks, warning = rank_agreement.agreed(own, self.ranks)
        if warning:
            self.ranks_agree = False
            self.warnings.append(warning)
        return masks

    def join_ranks(self) -> None:
        """Add up the skipped batches of all ranks, and join the names of the parameters that they reached."""
        names = list(self.parameters)
        num_skipped = 0 if self._batches is None else self._batches.num_skipped
        counts = self.ranks.sum(torch.tensor([num_skipped, *(name in self.reached for name in names)])).tolist()
        self.reached = {name for name, count in zip(names, counts[1:], strict=True) if count}
        if counts[0]:
            self.warnings.append(
                f"Scoring skipped {counts[0]:,} batch{'es' * (counts[0] > 1)} without a loss, or with a loss that"
                " depends on no prunable parameter."
            )

    def stand_still(self) -> None:
        """Repeat the next batch from here on, so that scores can be compared."""
        if self._batches is not None:
            self._batches.stand_still()

    def _own_gradients(self, batches: ScoringBatches, num_batches: int) -> dict[str, Tensor]:
        """Sum the gradients over the next batches of this rank that are not skipped."""
        skip = gradients.refuse if self.is_sharded else batches.skip  # ranks that share weights run the same batches
        for number in range(_MOST_OF_ZERO):
            taken = batches.take(num_batches)
            own = gradients.loss_gradients(self.module, self.parameters, self._input.loss, taken, skip)
            with function_modes.set_aside():
                is_enough = self.is_sharded or any(gradient.any() for gradient in own.values())
            if is_enough:
                batches.num_skipped += number * num_batches
                break
            if batches.num_in_pass is not None and number * num_batches >= batches.num_in_pass:
                break
        return own

    def _check_flow(self) -> None:
        """Raise or warn if synaptic flow is not defined for a part of the network."""
        forward_pass = self.forward_pass()
        try:
            layers = synflow_breakers.flow_breakers(self.module, forward_pass)
        except Exception as error:  # from the module's own `forward`, which may not be made for this call
            reason = f"{shown_error(error)}. {self._input.remedy()}"
            raise ValueError(f"SynFlow could not run the network on {forward_pass.source}: {reason}") from error
        named = listed([layer.layer for layer in layers], most=3)
        text = (
            f"SynFlow is not defined for {named}: saturating activations stop the flow and normalisation mixes its"
            " signs."
        )
        without = {id(weight) for layer in layers for weight in layer.weights}
        sizes = {id(parameter): parameter.numel() for parameter in self.parameters.values()}
        share = sum(size for key, size in sizes.items() if key in without) / sum(sizes.values())
        if share > 1 / 3 or len(layers) * 3 > len(self.parameters):
            raise ValueError(f"{text} That is too much of this network; use another method, such as DRIVE.")
        if layers:
            self.warnings.append(f"{text} Their neighbours' scores mean little.")
