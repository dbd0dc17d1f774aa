"""Outermost calls are recorded as training makes them, which notices nothing of it."""

from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from lightning_drive import DRIVE, find_masks
from lightning_drive.network.outermost_calls import recording

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def test_calls_that_no_other_one_makes_are_recorded() -> None:
    """Those of parts without parameters are not; those under ``no_grad`` are, without what they are given."""
    module = nn.Sequential(models.MLP(4, 5, 3), nn.ReLU())
    with recording(module) as calls:
        module(X)
        module[0](input=X)
        module[1](X)
        with torch.no_grad():
            module[0][0](X)
    assert [name for name, _ in calls] == ["", "0", "0.0"]
    assert calls[0][1] is not None
    assert calls[0][1][0][0].equal(X)
    assert calls[1][1] is not None
    assert calls[1][1][1]["input"].equal(X)
    assert calls[2][1] is None


def test_no_hook_is_left_behind() -> None:
    module = models.MLP(4, 5, 3)

    def fail() -> None:
        with recording(module):
            raise KeyboardInterrupt

    before = models.fingerprint(module)
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert models.changes(module, before) == []
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_recording_adds_no_call() -> None:
    """Who counts calls of the loss counts those of scoring, whatever paths and multiply-adds are found from."""
    calls = []

    def loss_fn(module: Any, batch: Any) -> Tensor:
        calls.append(module.training)
        return (module(batch) - module(batch.flip(0))).square().mean()  # type: ignore[no-any-return]

    find_masks(models.MLP(4, 3), DRIVE(rounds=4), sparsity=0.5, batches=[X], loss_fn=loss_fn)
    assert calls == [True] * 4
