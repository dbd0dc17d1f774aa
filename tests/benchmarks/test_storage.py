"""What masks add to a checkpoint, and what the package adds to the start of a program."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from benchmarks import trainers
from benchmarks.measure import in_turn, seconds
from benchmarks.page import Figure
from benchmarks.trainers import Module

from lightning_drive.network import prunable


def fitted(*callbacks: pl.Callback) -> pl.Trainer:
    trainer = trainers.trainer(*callbacks, max_epochs=2)
    trainer.fit(Module("ResNet-18", batch_size=4, steps=1))
    return trainer


def test_checkpoint(figure: Callable[..., Figure], tmp_path: Path) -> None:
    """Of ResNet-18 with momentum: size, time to save, time to load."""
    sparse, dense = fitted(trainers.ours()), fitted()
    ours, peer = tmp_path / "ours.ckpt", tmp_path / "dense.ckpt"
    sparse.save_checkpoint(ours)
    dense.save_checkpoint(peer)
    assert sparse.lightning_module is not None
    prunables = prunable.prunable_parameters(sparse.lightning_module).values()
    bits = sum(parameter.numel() for parameter in prunables)
    more = 8 * (ours.stat().st_size - peer.stat().st_size)
    figure(
        "storage",
        "checkpoint of ResNet-18: what masks and report add",
        "bits per weight",
        lambda: ([more / bits], {"one bit": [1.0]}),
        goal=1.02,
    )


def test_save(figure: Callable[..., Figure], tmp_path: Path) -> None:
    sparse, dense = fitted(trainers.ours()), fitted()
    figure(
        "storage",
        "checkpoint of ResNet-18: to save it",
        "s",
        lambda: in_turn(
            seconds(lambda: sparse.save_checkpoint(tmp_path / "ours.ckpt")),
            {"a dense checkpoint": seconds(lambda: dense.save_checkpoint(tmp_path / "dense.ckpt"))},
            repeats=9,
        ),
    )


def test_load(figure: Callable[..., Figure], tmp_path: Path) -> None:
    """To read the file, and to unpack the masks from it."""
    fitted(trainers.ours()).save_checkpoint(tmp_path / "ours.ckpt")
    fitted().save_checkpoint(tmp_path / "dense.ckpt")

    def ours() -> None:
        states = torch.load(tmp_path / "ours.ckpt", weights_only=True)["callbacks"]
        trainers.ours().load_state_dict(states["SNIPPruningCallback"])

    figure(
        "storage",
        "checkpoint of ResNet-18: to load it",
        "s",
        lambda: in_turn(
            seconds(ours),
            {"a dense checkpoint": seconds(lambda: torch.load(tmp_path / "dense.ckpt", weights_only=True))},
            repeats=9,
        ),
    )


@pytest.mark.parametrize(
    ("what", "ours", "peer", "statement"),
    [
        (
            "the callbacks",
            "import lightning.pytorch; from lightning_drive import DRIVEPruningCallback",
            "one that imports Lightning",
            "import lightning.pytorch",
        ),
        (
            "`find_masks`",
            "import torch; from lightning_drive import DRIVE, find_masks",
            "one that imports torch",
            "import torch",
        ),
    ],
    ids=["callbacks", "find_masks"],
)
def test_import(figure: Callable[..., Figure], what: str, ours: str, peer: str, statement: str) -> None:
    figure(
        "storage",
        f"start of a program that imports {what}",
        "s",
        lambda: in_turn(importing(ours), {peer: importing(statement)}, repeats=5),
        goal=1.05,
    )


def importing(statement: str) -> Callable[[], float]:
    return seconds(lambda: subprocess.run([sys.executable, "-c", statement], check=True))
