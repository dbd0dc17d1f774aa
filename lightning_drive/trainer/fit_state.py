"""The state of a pruning callback during one ``fit``: made in ``setup``, dropped in ``teardown``, never saved."""

from dataclasses import dataclass, field

import lightning.pytorch as pl

from lightning_drive.network.masks import Masks
from lightning_drive.trainer.averages import Averages
from lightning_drive.trainer.dense_copies import UnmaskedWeights
from lightning_drive.trainer.enforcement import Enforcement
from lightning_drive.trainer.sparse_training import SparseTraining


@dataclass
class Fit:
    """The state of one ``fit``."""

    max_epochs: int = -1
    """Epochs of the whole run, before other callbacks changed them; -1: without end."""
    has_begun: bool = False
    """Whether ``on_fit_start`` was reached."""
    thread: int = 0
    """The thread that trains."""
    is_probing: bool = False
    """Whether a search for a learning rate or batch size saved a checkpoint before training, to return to it."""
    is_restored: bool = False
    """Whether the state of the callback was restored."""
    is_resuming_epoch: bool = False
    """Whether no epoch or batch has begun yet, as at a resume, which may be in the middle of an epoch."""
    phase_start: float | None = None
    """When training, or its current cycle, began, by ``time.monotonic()``; ``None`` after a resume."""
    announced: set[str] = field(default_factory=set)
    """The warnings of pruning that were printed."""
    enforcement: Enforcement | None = None
    """Keeps pruned weights at zero; ``None`` before pruning."""
    unmasked: UnmaskedWeights | None = None
    """Warns of weights that the masks do not reach."""
    sparse: SparseTraining = field(default_factory=SparseTraining, compare=False)
    """Trains in sparse forms, where the callback is to accelerate."""

    def enforce(
        self,
        pruning: pl.Callback,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        masks: Masks,
        averages: Averages,
    ) -> None:
        """Put masks on a module and its averages, in place of earlier ones; no warning is repeated."""
        warned = self.enforcement is not None and self.enforcement.warned
        self._end_enforcement()
        self.enforcement = Enforcement(
            pl_module, masks, averages, warned=warned, masked_gradients=lambda: self.sparse.masked_gradients
        )
        self.enforcement.begin(pruning, trainer, pl_module)

    def release(self) -> None:
        """Release the module, its Trainer and its optimizers."""
        self.sparse.end()
        self._end_enforcement()
        self.unmasked = None

    def _end_enforcement(self) -> None:
        if self.enforcement is not None:
            self.enforcement.end()
        self.enforcement = None
