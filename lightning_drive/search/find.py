"""Find masks for any torch module, without Lightning."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_drive.core import shards
from lightning_drive.core.arguments import Schedule, Scope, Sparsity, check_patterns
from lightning_drive.core.goal import Goal
from lightning_drive.network import prunable, prunable_checks, sparsity_groups
from lightning_drive.network.gradients import LossFunction
from lightning_drive.network.masks import Masks
from lightning_drive.network.repeated_batches import Passes
from lightning_drive.search import unscored_parameters
from lightning_drive.search.diagnosis import Diagnosis, diagnose
from lightning_drive.search.loop import Found, search
from lightning_drive.search.methods import Method, check_method
from lightning_drive.search.scored_network import Network


def find_masks(
    module: nn.Module,
    method: Method,
    *,
    sparsity: Sparsity,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    masks: Mapping[str, Tensor] | None = None,
    schedule: Schedule = "exponential",
    scope: Scope = "global",
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    example_input: Any = None,
    on_round: Callable[[int, Masks], None] | None = None,
) -> Masks:
    """Find which weights of a torch module to keep; the module stays exactly as it was, and nothing is pruned yet.

    After round ``n`` of ``N`` exactly ``round(P * density_n)`` of the ``P`` prunable weights are kept (at least 1), a
    pruned weight never returns, and the module's weights do not change: Algorithm 1 of DRIVE and of SynFlow. Of equal
    scores, those of weights that are 0 already go first, so that a network that is sparse keeps its zeros. Weights,
    gradients, buffers, modes and random state are bit for bit as before, even after an error or an interrupt.

    Args:
        module: The network.
        method: ``DRIVE``, ``SNIP``, ``SynFlow``, ``Magnitude``, ``Random`` or a
            :class:`~lightning_drive.search.methods.Method` of your own.
        sparsity: Fraction of the prunable weights to remove, in ``[0, 1)``. Or a mapping from glob patterns over
            parameter names to such fractions, ``"*"`` for the rest: the first pattern that matches a parameter decides,
            and ``scope`` applies among those of each pattern.
        batches: What ``loss_fn`` takes, read in order, ``method.batches_per_round`` in each round; a finite iterable
            is cycled. ``DRIVE`` and ``SNIP`` need it.
        loss_fn: ``loss_fn(module, batch)`` returns a scalar tensor. ``DRIVE`` and ``SNIP`` need it. A batch is skipped
            for the next one if the function returns ``None`` for it, or a loss that depends on no prunable parameter.
        masks: Continue from these masks, at their sparsity, instead of from the dense network.
        schedule: ``"exponential"`` removes the same fraction of the survivors in every round, ``"linear"`` the same
            number of weights, ``"cubic"`` many in the first rounds and few in the last. Or a function from the
            fraction of the rounds that are done, above 0 and up to 1, to the fraction of ``sparsity`` that is reached;
            it never falls, and ends at 1.
        scope: ``"global"``: one ranking for all parameters. ``"layerwise"``: every parameter keeps the same fraction.
            ``"erk"``: as many in all as ``"global"``, of every parameter in proportion to the sum of its dimensions,
            so that small ones stay denser (Erdos-Renyi kernel, Evci et al., 2020).
        include: Glob patterns over parameter names, see
            :func:`lightning_drive.network.prunable.prunable_parameters`; default: the weights of all layers that
            multiply by them.
        exclude: Glob patterns over parameter names that stay dense.
        example_input: What ``forward`` takes, batch dimension first: a tensor, a tuple of arguments or a mapping of
            keyword arguments. ``SynFlow`` and input-output paths need it. Default: a LightningModule's
            ``example_input_array``, what ``loss_fn`` calls the module with, or the first tensor of the first batch.
        on_round: Called after every round with its index, from 1, and the masks so far.

    Returns:
        The masks, on the devices of their parameters; ``masks.apply_(module)`` prunes. Parameters that have no
        gradient in any round have no mask either: they stay dense, and masks are found once more without them.

    Raises:
        ValueError: If an argument is out of range, nothing is prunable, a pattern matches nothing, ``sparsity`` has no
            pattern for a prunable parameter, ``schedule`` is a function that falls or does not end at 1, all of a whole
            pass over ``batches`` is skipped, the loss or a score is not finite, every score is zero, a method's scores
            are not those of the prunable parameters, or ``masks`` do not fit.
        TypeError: If an argument has the wrong type.

    Warns:
        UserWarning: If the cut falls inside exact zeros, a layer or every input-output path is lost, paths cannot be
            followed, SynFlow is not defined for a few layers, batches were skipped, or parameters were left out since
            the loss does not depend on them.

    Examples:
        >>> import torch
        >>> from lightning_drive import DRIVE, find_masks
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
        >>> def loss(module, batch):
        ...     return nn.functional.cross_entropy(module(batch[0]), batch[1])
        >>> masks = find_masks(net, DRIVE(rounds=10), sparsity=0.75, batches=[batch], loss_fn=loss)
        >>> masks.num_kept, masks.num_prunable
        (14, 56)

        Half of the first layer, and nine tenths of the rest:

        >>> masks = find_masks(net, DRIVE(), sparsity={"0.*": 0.5, "*": 0.9}, batches=[batch], loss_fn=loss)
        >>> [int(mask.sum()) for mask in masks.values()]
        [16, 2]

    """
    check_method(method)
    goal = Goal(sparsity, schedule, scope)
    goal.check_schedule(method.rounds)
    shards.reshard_(module)
    include, exclude = check_patterns("include", include), check_patterns("exclude", exclude)
    names = prunable.prunable_parameters(module, include, exclude)
    prunable_checks.check_numbers(names)
    sparsity_groups.check(goal, module, names, partial(prunable.prunable_parameters, include=include, exclude=exclude))
    others = prunable.dense_matrices(module, names, exclude) if include is None else ()
    passes = None if batches is None else Passes(batches)
    example = getattr(module, "example_input_array", None) if example_input is None else example_input

    def opened(names: Sequence[str]) -> AbstractContextManager[Network]:
        return Network.of(module, names, method.mode, batches=passes, loss_fn=loss_fn, example_input=example)

    outcome, diagnosis = search_reached(opened, method, goal, [*names], masks=masks, others=others, on_round=on_round)
    texts = [*outcome.warnings, *diagnosis.warnings]
    if diagnosis.path_error and example_input is not None:
        texts.append(f"Input-output paths could not be followed from {diagnosis.path_error}")
    for text in texts:
        warnings.warn(text, stacklevel=2)
    return outcome.masks


def search_reached(
    opened: Callable[[Sequence[str]], AbstractContextManager[Network]],
    method: Method,
    goal: Goal,
    names: Sequence[str],
    *,
    masks: Mapping[str, Tensor] | None = None,
    others: Sequence[str] = (),
    on_round: Callable[[int, Masks], None] | None = None,
    only_round: int | None = None,
    shuffle: Callable[[Masks], Masks] | None = None,
) -> tuple[Found, Diagnosis]:
    """Search, once more without the parameters that had no gradient in any round, and diagnose the outcome.

    The masks are the same as if these parameters had been excluded, so counts refer to what is trained. ``opened``
    returns the network with the named parameters, always on the same batches. ``others`` names matrices that are
    trained and stay dense. ``shuffle`` returns other masks, with the same counts. For the rest see :func:`search`.
    """
    left_out: set[str] = set()
    while True:
        reached = [name for name in names if name not in left_out]
        start = masks and {name: mask for name, mask in masks.items() if name not in left_out}
        with opened(reached) as network:
            outcome = search(network, method, goal, masks=start, on_round=on_round, only_round=only_round)
            if not outcome.history.unreached:
                if shuffle is not None:
                    outcome = replace(outcome, masks=shuffle(outcome.masks))
                diagnosis = diagnose(network, method, goal, outcome, others)
                break
        left_out.update(outcome.history.unreached)
    if left_out:
        in_order = [name for name in names if name in left_out]
        outcome.warnings.insert(0, unscored_parameters.unreached(in_order, names, method))
    return outcome, diagnosis
