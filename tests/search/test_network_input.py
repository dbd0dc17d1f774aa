"""What the network takes is found once: the loss is watched the first time, and never again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import models
import pytest
import torch

from lightning_drive import DRIVE, SNIP, find_masks
from lightning_drive.network import outermost_calls


@pytest.mark.parametrize("method", [DRIVE(rounds=5), SNIP(batches_per_round=3)])
def test_loss_is_recorded_once(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recording, times = outermost_calls.recording, []

    @contextmanager
    def counted(module: Any) -> Iterator[Any]:
        times.append(module)
        with recording(module) as calls:
            yield calls

    monkeypatch.setattr(outermost_calls, "recording", counted)
    torch.manual_seed(0)
    find_masks(
        models.randomised(models.ConvNet()),
        method,
        sparsity=0.5,
        batches=models.make_batches(2, 6, 6),
        loss_fn=models.loss_fn,
    )
    assert len(times) == 1
