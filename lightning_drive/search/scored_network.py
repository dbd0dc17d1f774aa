"""The network as a method and the search loop see it: masked weights, gradients on demand, masks of all ranks."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.core import function_modes, scores, shards, zeroing
from lightning_drive.core.arguments import Mode, check_count
from lightning_drive.core.messages import listed, shown
from lightning_drive.core.processes import ALONE, Ranks
from lightning_drive.network import gradients, prunable, synflow
from lightning_drive.network.forward_passes import ForwardPass
from lightning_drive.network.gradients import LossFunction
from lightning_drive.network.masks import Masks
from lightning_drive.network.undisturbed import undisturbed
from lightning_drive.search import flow_check, rank_agreement
from lightning_drive.search.network_input import NetworkInput
from lightning_drive.search.scoring_batches import ScoringBatches

_MOST_OF_ZERO = 100
"""How often to try other batches where all gradients are 0: if the network is cut off, no batch helps."""


class Network:
    """The network as a method sees it in one round: masked weights, and gradients and losses on demand.

    A method gets it from the search. The module is a replica, as in :meth:`of`, which may be written to. Parameters may
    be split over ranks (FSDP2): every rank then scores and masks its own part, and only histograms of scores are
    exchanged.

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
        """The replica of the network that is scored."""
        self.warnings: list[str] = []
        """Warnings for the user and the report; a method may append to them."""
        self.reached: set[str] = set()
        """Names of the parameters that had a gradient, zero or not, in any round so far."""
        self.reads: set[str] = set()
        """What the method has read in this round: averaged ``"gradients"``, or this rank's own ``"loss"``."""
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
        """Parameter name to live weights: the parameter, or this rank's part of it. Pruned ones are 0."""
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
        if "loss" in self.reads:
            self.drop_gradients()
        self.reads.add("gradients")
        with self.ranks.together():
            own = self._own_gradients(self._scoring_batches(), num_batches)
        self.reached.update(own)
        whole = {name: own[name] if name in own else torch.zeros_like(weight) for name, weight in self.weights.items()}
        del own
        if not self.is_sharded:  # else FSDP2 has averaged them
            self.ranks.mean_(whole.values())
        with function_modes.set_aside():
            return {name: scores.in_full(gradient) for name, gradient in whole.items()}

    def batches(self, number: int | None = None) -> Iterator[Any]:
        """Take the next batches, in order; a finite iterable is cycled.

        Args:
            number: How many to take, at least 1. Default: one after the other without an end, for
                :func:`itertools.islice` and ``next``.

        Returns:
            An iterator over batches, for :meth:`loss`.

        Raises:
            ValueError: If there are no batches.

        """
        batches = self._scoring_batches(needs_loss=False)
        return batches.take(inf if number is None else check_count("number", number))

    def loss(self, batch: Any) -> Tensor:
        """Compute the loss of a batch or of a part of one, with the graph that derivatives of any order are taken from.

        It is the loss of this process, without an average over the others. What is to be averaged before something is
        computed from it that is not linear goes through :meth:`mean`; the scores of a method that calls this function
        are averaged at the end. What ``backward()`` leaves in ``.grad`` is dropped by :meth:`loss_gradients` and after
        each round.

        Args:
            batch: What the loss function takes, such as one of :meth:`batches`.

        Returns:
            A finite tensor without dimensions that depends on at least one of :attr:`weights`.

        Raises:
            ValueError: If there is no loss function, its result is no such loss (``None``, for one: only
                :meth:`loss_gradients` skips batches), or the weights are split over ranks (FSDP2).

        """
        self._check_whole("loss")
        self._scoring_batches()
        self.reads.add("loss")
        loss = self._input.loss(self.module, gradients.batch_in_float32(batch))
        reason = gradients.no_loss(loss)
        if loss is not None and not reason:
            reached, is_all = gradients.reached_by(loss, self.parameters)
            self.reached.update(reached)
            if is_all and not reached:
                reason = f"The loss does not depend on any prunable parameter ({listed(self.parameters)})."
        if loss is None or reason:
            raise ValueError(
                f"{reason} A method that calls `network.loss` cannot skip a batch: leave such batches out, or give them"
                " a loss by `loss_fn`."
            )
        gradients.check_finite([loss.item()])
        return loss.reshape(())

    def mean(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Average tensors over the processes, each of which has scored on batches of its own.

        All processes must call it, with as many tensors of the same shapes.

        Args:
            tensors: Any number of them, such as the gradients of :meth:`loss`.

        Returns:
            The averages, the same to the bit on all processes, in float32 or float64 and without a graph; of one
                process the tensors themselves.

        Raises:
            TypeError: If something else than tensors is given, such as a mapping to them.
            ValueError: If the weights are split over ranks (FSDP2).

        """
        self._check_whole("mean")
        with self.ranks.together(), function_modes.set_aside():
            given = [*tensors]
            for tensor in given:
                if not isinstance(tensor, Tensor):
                    raise TypeError(f"`network.mean` takes tensors, got {shown(tensor)} among them.")
            means = [scores.in_full(tensor) for tensor in given]
            if self.ranks.size > 1:
                means = [mean.clone(memory_format=torch.contiguous_format) for mean in means]
        self.ranks.mean_(means)
        return means

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
            self.warnings.extend(
                flow_check.warnings(self.module, self.parameters, self.forward_pass(), self._input.remedy())
            )
            self._flow = synflow.SynapticFlow(self.module, self.parameters)
        flow_gradients, total = self._flow.gradients(self.forward_pass())
        self.reached |= self._flow.reached
        return self._flow.weights, flow_gradients, total

    # For the search itself.

    def forward_pass(self) -> ForwardPass:
        """Return a forward pass of the network, determined once; raise ValueError if none is known."""
        return self._input.forward_pass()

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The full shape of every parameter, which may be split over ranks."""
        return {name: self.shape(name) for name in self.parameters}

    def starting_masks(self, masks: Mapping[str, Tensor] | None) -> Masks:
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
        Masks(masks).parameters_of(self.module)  # raises an error that names a shape that differs
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

    def drop_gradients(self) -> None:
        """Drop what backward passes of a method's own have left in the parameters."""
        for parameter in self.module.parameters():
            parameter.grad = None

    def stand_still(self) -> None:
        """Repeat the next batch from here on, so that scores can be compared."""
        if self._batches is not None:
            self._batches.stand_still()

    def _scoring_batches(self, *, needs_loss: bool = True) -> ScoringBatches:
        """Return the batches; raise a ``ValueError`` if there are none, or no loss though it is needed."""
        if self._batches is None or (needs_loss and not self._has_loss):
            missing = "batches" if self._batches is None else "loss_fn"
            raise ValueError(f"This method scores by a loss on batches, so it needs `{missing}`, got None.")
        return self._batches

    def _check_whole(self, name: str) -> None:
        if self.is_sharded:
            raise ValueError(
                f"`network.{name}` is not defined while the weights are sharded over ranks (FSDP2). Use"
                " `network.loss_gradients`, or find the masks before `fully_shard`."
            )

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
