"""Prune a PyTorch Lightning model early in training with one line: DRIVE and its siblings as callbacks."""

from lightning_drive.callbacks import DRIVEPruningCallback as DRIVEPruningCallback
from lightning_drive.callbacks import SNIPPruningCallback as SNIPPruningCallback
from lightning_drive.callbacks import SynFlowPruningCallback as SynFlowPruningCallback
from lightning_drive.files import load_sparse as load_sparse
from lightning_drive.files import save_sparse as save_sparse
from lightning_drive.finding import find_masks as find_masks
from lightning_drive.lottery import IMPPruningCallback as IMPPruningCallback
from lightning_drive.masking import Masks as Masks
from lightning_drive.methods import DRIVE as DRIVE
from lightning_drive.methods import SNIP as SNIP
from lightning_drive.methods import Magnitude as Magnitude
from lightning_drive.methods import Random as Random
from lightning_drive.methods import SynFlow as SynFlow
from lightning_drive.report import PruningReport as PruningReport

__version__ = "0.1.0"
