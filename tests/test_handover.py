"""What a copy in another process found out reaches the original, once, and leaves nothing behind."""

import copy
import gc
import multiprocessing
from pathlib import Path

import torch

from lightning_drive.handover import Handover


def leave(handover: Handover) -> None:
    assert handover.is_elsewhere
    handover.leave({"masks": torch.arange(3), "epoch": 2})


def test_handover() -> None:
    handover = Handover()
    assert not handover.is_elsewhere
    process = multiprocessing.get_context("spawn").Process(target=leave, args=(handover,))
    process.start()
    process.join()
    assert process.exitcode == 0
    state = handover.take()
    assert state is not None
    assert state["epoch"] == 2
    assert state["masks"].tolist() == [0, 1, 2]
    assert handover.take() is None


def test_handover__copies() -> None:
    """A copy in the same process is an original of its own."""
    handover = Handover()
    handover.leave({"epoch": 1})
    assert copy.deepcopy(handover).take() is None
    assert handover.take() == {"epoch": 1}


def test_handover__leaves_nothing_behind() -> None:
    handover = Handover()
    handover.leave({})
    path: Path = handover._path
    assert path.exists()
    del handover
    gc.collect()
    assert not path.exists()
