"""Random numbers of pruning depend on the seed, and neither repeat nor use up those of training."""

from pathlib import Path

import fits
import torch

from lightning_drive.core.processes import ALONE
from lightning_drive.trainer import ranks


def test_ranks_of__one_process(tmp_path: Path) -> None:
    assert ranks.ranks_of(fits.trainer(tmp_path)) is ALONE


def test_random_numbers(tmp_path: Path) -> None:
    trainer = fits.trainer(tmp_path)
    numbers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        numbers.append(torch.rand(4, generator=ranks.random_numbers(trainer)).tolist())
        after = torch.rand(4).tolist()
        torch.manual_seed(seed)
        assert after == torch.rand(4).tolist() != numbers[-1]
    assert numbers[0] == numbers[1] != numbers[2]
