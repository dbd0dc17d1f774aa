"""The callback that prunes by SynFlow."""

from lightning_drive.callbacks.warmup_base import WarmupPruningCallback
from lightning_drive.core.arguments import Control, Schedule, Scope, Sparsity
from lightning_drive.search.methods import SynFlow


class SynFlowPruningCallback(WarmupPruningCallback):
    """Prune by SynFlow before training, without data, and train the sparse network.

    SynFlow is iterative synaptic flow pruning (Tanaka et al., 2020, Algorithm 1). It reads nothing but the shape of
    the input: that of the module's ``example_input_array`` if ``forward`` uses all prunable weights on it, or else that
    of the input with which ``training_step`` calls the network. It always scores in float64 and in eval mode. It is not
    defined for transformers. Exactly ``round(P * (1 - sparsity))`` of the ``P`` prunable weights are kept.

    Args:
        sparsity: Fraction of the prunable weights to remove, in ``[0, 1)``; 0.98 keeps 2 %. Or a mapping
            from glob patterns over parameter names to such fractions, see :func:`lightning_drive.find_masks`.
        warmup_epochs: Dense epochs before pruning, at least 0; 0 prunes at initialisation, as the paper does.
        warmup_steps: Dense optimizer steps before pruning, at least 0, in place of ``warmup_epochs``, which must then
            be left out. For endless streams. Steps are counted as by ``trainer.global_step``.
        rounds: Pruning rounds, at least 1. Each costs a forward and backward pass on one image of ones.
        schedule: ``exponential`` removes the same fraction of the survivors in every round, ``linear`` the same
            number of weights, ``cubic`` many in the first rounds and few in the last. Or a function, see
            :func:`lightning_drive.find_masks`.
        scope: ``global`` ranks all weights together; with ``layerwise`` every parameter keeps the same fraction, with
            ``erk`` (Evci et al., 2020) a larger one the smaller it is.
        include: Glob patterns over parameter names; only what matches is pruned. Default: the weights of all
            layers that multiply by them. ``["*"]``: everything of two dimensions or more.
        exclude: Glob patterns over parameter names that stay dense.
        bn_batches: Training batches for re-estimating BatchNorm's running statistics after pruning, at least 0;
            0 leaves them as they are.
        reset_best: Whether ModelCheckpoint and EarlyStopping forget the dense epochs when the network is pruned; until
            then, EarlyStopping is held off.
        control: For comparison: ``shuffle`` shuffles the masks within each parameter; ``reinit`` keeps the masks, and
            trains from new initial values of the survivors. Default: neither.
        accelerate: Whether the pruned network trains in sparse forms: layers whose forward and backward pass is faster
            so on this machine, measured at the first batch after pruning (on a CPU). Sums come in another order, so
            weights agree with those of a dense run, or of a run that is resumed, within rounding, not bit for bit.

    Attributes:
        masks: The masks (:class:`lightning_drive.Masks`), on the CPU; empty before pruning.
        pruned: Whether the network has been pruned.
        report: The report (:class:`lightning_drive.PruningReport`); ``None`` before pruning.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import lightning.pytorch as pl
        >>> callback = SynFlowPruningCallback(sparsity=0.98)
        >>> trainer = pl.Trainer(max_epochs=50, callbacks=[callback], logger=False)

    """

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        warmup_epochs: int = 0,
        warmup_steps: int | None = None,
        rounds: int = 100,
        schedule: Schedule = "exponential",
        scope: Scope = "global",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        bn_batches: int = 20,
        reset_best: bool = True,
        control: Control = "none",
        accelerate: bool = False,
    ) -> None:
        super().__init__(
            SynFlow(rounds=rounds),
            sparsity=sparsity,
            warmup_epochs=warmup_epochs,
            warmup_steps=warmup_steps,
            schedule=schedule,
            scope=scope,
            include=include,
            exclude=exclude,
            loss_fn=None,
            bn_batches=bn_batches,
            reset_best=reset_best,
            control=control,
            accelerate=accelerate,
        )
