"""The state of a pruning callback during one ``fit``: made in ``setup``, dropped in ``teardown``, never saved."""

from dataclasses import dataclass

import lightning.pytorch as pl

from lightning_drive.core.masks import Masks
from lightning_drive.trainer.averages import Averages
from lightning_drive.trainer.dense_copies import UnmaskedWeights
from lightning_drive.trainer.enforcement import Enforcement


@dataclass
class Fit:
    """One ``fit``."""

    max_epochs: int = -1
    """Epochs of the whole run, as they were before other callbacks changed them; -1: without end."""
    has_begun: bool = False
    """Whether ``on_fit_start`` was reached."""
    thread: int = 0
    """The thread that trains."""
    is_probing: bool = False
    """Whether a search for a learning rate or batch size saved before training, and returns to that."""
    is_restored: bool = False
    """Whether the state of the callback was restored."""
    is_resuming_epoch: bool = False
    """Whether no epoch or batch has begun yet: a run may go on in the middle of an epoch."""
    phase_start: float | None = None
    """When training, or its current cycle, began, by ``time.monotonic()``; ``None``: only a part of it is known."""
    enforcement: Enforcement | None = None
    """What keeps the masks on the module, once it is pruned."""
    unmasked: UnmaskedWeights | None = None
    """What warns of weights that the masks do not reach."""

    def enforce(
        self,
        pruning: pl.Callback,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        masks: Masks,
        averages: Averages,
    ) -> None:
        """Put masks on a module and its averages, in place of those that were on them; a warning is not repeated."""
        warned = self.enforcement is not None and self.enforcement.warned
        self.release()
        self.enforcement = Enforcement(pl_module, masks, averages, warned=warned)
        self.enforcement.begin(pruning, trainer, pl_module)

    def release(self) -> None:
        """Let go of the module and its optimizers."""
        if self.enforcement is not None:
            self.enforcement.end()
        self.enforcement = None
