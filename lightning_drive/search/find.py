"""Find masks for any torch module, without Lightning."""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_drive.core import shards
from lightning_drive.core.arguments import Schedule, Scope, check_patterns
from lightning_drive.core.masks import Masks
from lightning_drive.network import gradients, prunable, prunable_checks
from lightning_drive.network.gradients import LossFunction
from lightning_drive.network.prunable import dense_matrices, parameters_by_name
from lightning_drive.network.repeated_batches import Passes
from lightning_drive.network.undisturbed import undisturbed
from lightning_drive.search.loop import Found, check_settings, of_reached, search
from lightning_drive.search.methods import Method, check_method


def find_masks(
    module: nn.Module,
    method: Method,
    *,
    sparsity: float,
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
    """Find which weights of any torch module to keep. The module is left exactly as it was; nothing is pruned yet.

    After round ``n`` of ``N`` exactly ``round(P * density_n)`` of the ``P`` prunable weights are kept (at least 1), a
    pruned weight never returns, and the module's weights stand still: Algorithm 1 of DRIVE and of SynFlow. Weights,
    gradients, buffers, modes and random state are bit for bit as before, also after an error or an interrupt.

    Args:
        module: The network.
        method: ``DRIVE``, ``SNIP``, ``SynFlow``, ``Magnitude`` or ``Random``.
        sparsity: Fraction of the prunable weights to remove, in ``[0, 1)``.
        batches: What ``loss_fn`` takes, read in order, ``method.batches_per_round`` in each round; a finite iterable
            is cycled. ``DRIVE`` and ``SNIP`` need it.
        loss_fn: ``loss_fn(module, batch)`` returns a scalar tensor. ``DRIVE`` and ``SNIP`` need it. A batch for which
            it returns ``None``, or a loss that no prunable parameter has a gradient of, is skipped: the next one is
            taken in its place.
        masks: Continue from these masks, at their sparsity, instead of from the dense network.
        schedule: ``"exponential"`` removes the same fraction of the survivors in every round, ``"linear"`` the same
            number of weights.
        scope: ``"global"``: one ranking for all parameters. ``"layerwise"``: every parameter keeps the same fraction.
        include: Glob patterns over parameter names, see
            :func:`lightning_drive.network.prunable.prunable_parameters`; default: the weights of all layers that
            multiply by them.
        exclude: Glob patterns over parameter names that stay dense.
        example_input: What ``forward`` takes, batch dimension first: a tensor, a tuple of arguments or a mapping of
            keyword arguments. ``SynFlow`` and input-output paths need it. Default: a LightningModule's
            ``example_input_array``, what ``loss_fn`` calls the module with, or the first tensor of the first batch.
        on_round: Called after every round with its index, from 1, and the masks so far.

    Returns:
        The masks, on the devices of their parameters. ``masks.apply_(module)`` prunes. Parameters that the loss has
        no gradient for in any round have none: they stay dense, and masks are found a second time without them.

    Raises:
        ValueError: If an argument is out of range, nothing is prunable, there is nothing to score on in a whole pass
            over ``batches``, the loss or a score is not finite, every score is zero, or ``masks`` do not fit.
        TypeError: If an argument has the wrong type.

    Warns:
        UserWarning: If the cut falls inside exact zeros, a layer or every input-output path is lost, paths cannot be
            followed, SynFlow is not defined for a few layers, batches were skipped, or parameters were left out since
            the loss does not depend on them.

    Example:
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

    """
    check_method(method)
    sparsity, schedule, scope = check_settings(sparsity, schedule, scope)
    shards.reshard_(module)
    include, exclude = check_patterns("include", include), check_patterns("exclude", exclude)
    names = prunable.prunable_parameters(module, include, exclude)
    prunable_checks.check_numbers(names)
    passes = None if batches is None else Passes(batches)
    others = dense_matrices(module, names, exclude) if include is None else ()

    def once(names: Collection[str], masks: Mapping[str, Tensor] | None) -> Found:
        with undisturbed(module, method.mode) as scored:
            return search(
                scored.module,
                method,
                sparsity=sparsity,
                batches=passes,
                loss_fn=loss_fn and gradients.on_replica_only(scored.of(loss_fn), module),
                masks=masks,
                schedule=schedule,
                scope=scope,
                parameters=parameters_by_name(scored.module, names),
                example_input=getattr(module, "example_input_array", None) if example_input is None else example_input,
                others=others,
                on_round=on_round,
            )

    found = of_reached(once, method, list(names), masks)
    if found.path_error and example_input is not None:
        found.warnings.append(f"Input-output paths could not be followed from {found.path_error}")
    for text in found.warnings:
        warnings.warn(text, stacklevel=2)
    return found.masks
