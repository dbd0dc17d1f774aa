"""Where in a ``fit`` a pruning callback is: made in ``setup``, dropped in ``teardown``, never saved or copied."""

from dataclasses import dataclass

from lightning_drive.trainer.enforcement import Enforcement
from lightning_drive.trainer.unmasked_weights import UnmaskedWeights


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
