"""What a thread writes later is a copy: it shares no memory with what goes on to train."""

import torch
from torch import nn

from lightning_drive.trainer import saved_state


def test_copied() -> None:
    """What is copied shares no memory, and keeps versions of modules, which ``load_state_dict`` reads."""
    module = nn.BatchNorm1d(2)
    state = {"weights": module.state_dict(), "list": [torch.ones(2)], "epoch": 3}
    twin = saved_state._copied(state)
    assert twin["weights"]._metadata == module.state_dict()._metadata
    assert twin["epoch"] == 3
    with torch.no_grad():
        module.weight.zero_()
        state["list"][0].zero_()
    assert twin["weights"]["weight"].tolist() == twin["list"][0].tolist() == [1, 1]
