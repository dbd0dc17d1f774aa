"""Prune a PyTorch Lightning model early in training with one line: DRIVE and its siblings as callbacks."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "DRIVE",
    "SNIP",
    "DRIVEPruningCallback",
    "IMPPruningCallback",
    "Magnitude",
    "Masks",
    "PruningReport",
    "Random",
    "SNIPPruningCallback",
    "SynFlow",
    "SynFlowPruningCallback",
    "compact",
    "find_masks",
    "load_sparse",
    "save_sparse",
]

if TYPE_CHECKING:
    from lightning_drive.callbacks import DRIVEPruningCallback, SNIPPruningCallback, SynFlowPruningCallback
    from lightning_drive.compaction import compact
    from lightning_drive.files import load_sparse, save_sparse
    from lightning_drive.finding import find_masks
    from lightning_drive.lottery import IMPPruningCallback
    from lightning_drive.masking import Masks
    from lightning_drive.methods import DRIVE, SNIP, Magnitude, Random, SynFlow
    from lightning_drive.report import PruningReport

_HOMES = {
    "callbacks": ("DRIVEPruningCallback", "SNIPPruningCallback", "SynFlowPruningCallback"),
    "compaction": ("compact",),
    "files": ("load_sparse", "save_sparse"),
    "finding": ("find_masks",),
    "lottery": ("IMPPruningCallback",),
    "masking": ("Masks",),
    "methods": ("DRIVE", "SNIP", "Magnitude", "Random", "SynFlow"),
    "report": ("PruningReport",),
}
"""Module to the public names that are in it."""

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what is public when it is first asked for: torch takes seconds to import, and Lightning more."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Where Lightning is there already, its command line can find the callbacks by their short names.
if "lightning.pytorch" in sys.modules:
    for _name in (*_HOMES["callbacks"], *_HOMES["lottery"]):
        __getattr__(_name)
