"""Prune a PyTorch Lightning model early in training with one line: DRIVE, SNIP, SynFlow and IMP as callbacks."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = [
    "DRIVE",
    "SNIP",
    "DRIVEPruningCallback",
    "GradualPruningCallback",
    "IMPPruningCallback",
    "KeepZerosCallback",
    "Magnitude",
    "Masks",
    "PruningReport",
    "Random",
    "SNIPPruningCallback",
    "SynFlow",
    "SynFlowPruningCallback",
    "accelerate",
    "compact",
    "find_masks",
    "load_sparse",
    "save_sparse",
]

if TYPE_CHECKING:
    from lightning_drive.acceleration.accelerate import accelerate
    from lightning_drive.callbacks.drive import DRIVEPruningCallback
    from lightning_drive.callbacks.gradual import GradualPruningCallback
    from lightning_drive.callbacks.imp import IMPPruningCallback
    from lightning_drive.callbacks.keep_zeros import KeepZerosCallback
    from lightning_drive.callbacks.snip import SNIPPruningCallback
    from lightning_drive.callbacks.synflow import SynFlowPruningCallback
    from lightning_drive.compaction.compact import compact
    from lightning_drive.export.sparse_reader import load_sparse
    from lightning_drive.export.sparse_writer import save_sparse
    from lightning_drive.network.masks import Masks
    from lightning_drive.report.pruning_report import PruningReport
    from lightning_drive.search.find import find_masks
    from lightning_drive.search.methods import DRIVE, SNIP, Magnitude, Random, SynFlow

_HOMES = {
    "acceleration.accelerate": ("accelerate",),
    "callbacks.drive": ("DRIVEPruningCallback",),
    "callbacks.gradual": ("GradualPruningCallback",),
    "callbacks.imp": ("IMPPruningCallback",),
    "callbacks.keep_zeros": ("KeepZerosCallback",),
    "callbacks.snip": ("SNIPPruningCallback",),
    "callbacks.synflow": ("SynFlowPruningCallback",),
    "compaction.compact": ("compact",),
    "network.masks": ("Masks",),
    "export.sparse_reader": ("load_sparse",),
    "export.sparse_writer": ("save_sparse",),
    "report.pruning_report": ("PruningReport",),
    "search.find": ("find_masks",),
    "search.methods": ("DRIVE", "SNIP", "Magnitude", "Random", "SynFlow"),
}
"""Modules and the public names in them."""

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: importing torch takes seconds, and Lightning longer."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = public = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    return public


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Where Lightning is imported already, its command line needs the callbacks to find them by their short names.
if "lightning.pytorch" in sys.modules:
    for _name, _home in _HOME_OF.items():
        if _home.startswith("callbacks."):
            __getattr__(_name)
