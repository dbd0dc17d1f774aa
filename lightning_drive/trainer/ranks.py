"""The processes of a Trainer's run, and random numbers that are the same in all of them."""

import lightning.pytorch as pl
import torch

from lightning_drive.core.processes import ALONE, Ranks


def ranks_of(trainer: pl.Trainer) -> Ranks:
    """Return the processes of a run, once they are connected."""
    return Ranks.of(None, trainer.strategy.root_device) if trainer.world_size > 1 else ALONE


def random_numbers(trainer: pl.Trainer) -> torch.Generator:
    """Return a generator seeded by the first rank's seed, which neither repeats nor uses up the numbers of training."""
    return torch.Generator().manual_seed(ranks_of(trainer).broadcast(torch.initial_seed()) ^ 0x5EED)
