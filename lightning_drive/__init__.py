"""Prune a PyTorch Lightning model early in training with one line: DRIVE and its siblings as callbacks."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_drive.compaction import compact as compact
from lightning_drive.files import load_sparse as load_sparse
from lightning_drive.files import save_sparse as save_sparse
from lightning_drive.finding import find_masks as find_masks
from lightning_drive.masking import Masks as Masks
from lightning_drive.methods import DRIVE as DRIVE
from lightning_drive.methods import SNIP as SNIP
from lightning_drive.methods import Magnitude as Magnitude
from lightning_drive.methods import Random as Random
from lightning_drive.methods import SynFlow as SynFlow
from lightning_drive.report import PruningReport as PruningReport

# Where Lightning is there already, its command line can find the callbacks by their short names.
if TYPE_CHECKING or "lightning.pytorch" in sys.modules:
    from lightning_drive.callbacks import DRIVEPruningCallback as DRIVEPruningCallback
    from lightning_drive.callbacks import SNIPPruningCallback as SNIPPruningCallback
    from lightning_drive.callbacks import SynFlowPruningCallback as SynFlowPruningCallback
    from lightning_drive.lottery import IMPPruningCallback as IMPPruningCallback

__version__ = "0.1.0"

_NEEDS_LIGHTNING = {
    "DRIVEPruningCallback": "callbacks",
    "SNIPPruningCallback": "callbacks",
    "SynFlowPruningCallback": "callbacks",
    "IMPPruningCallback": "lottery",
}

__all__ = [
    *("DRIVE", "SNIP", "DRIVEPruningCallback", "IMPPruningCallback", "Magnitude", "Masks", "PruningReport", "Random"),
    *(
        "SNIPPruningCallback",
        "SynFlow",
        "SynFlowPruningCallback",
        "compact",
        "find_masks",
        "load_sparse",
        "save_sparse",
    ),
]


def __getattr__(name: str) -> Any:
    """Import the callbacks when they are first asked for: Lightning takes longer to import than torch."""
    if name in _NEEDS_LIGHTNING:
        return getattr(import_module(f"lightning_drive.{_NEEDS_LIGHTNING[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
