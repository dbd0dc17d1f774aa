"""A run that is interrupted and resumed in a new process ends as if nothing had happened."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import resumable
import torch

from lightning_drive import Masks

pytestmark = pytest.mark.slow

MOMENTS = ("middle", "last_batch", "validation_end", "epoch_end")


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, resumable.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def masks_in(checkpoint: Path) -> Masks:
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["DRIVEPruningCallback"]
    return Masks.from_state_dict(state["masks"])


def is_equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"]) and all(
        torch.equal(*pair) for pair in zip(first["optimizer"], second["optimizer"], strict=True)
    )


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One uninterrupted run, and all runs resumed from its checkpoints by a second process."""
    folder = tmp_path_factory.mktemp(request.param)
    whole = start(folder, "--optimizer", request.param)
    assert whole.returncode == 0, whole.stderr
    checkpoints = sorted(folder.glob("*.ckpt"))
    assert len(checkpoints) == resumable.EPOCHS * len(MOMENTS)
    resumed = start(folder, "--optimizer", request.param, "--resume", *checkpoints)
    assert resumed.returncode == 0, resumed.stderr
    return torch.load(folder / "final.pt", weights_only=True), torch.load(folder / "resumed.pt", weights_only=True)


@pytest.mark.parametrize("moment", MOMENTS[1:])
@pytest.mark.parametrize("epoch", range(resumable.EPOCHS))
def test_resume__bitwise(runs: Any, epoch: int, moment: str) -> None:
    """At every epoch boundary, also between the last dense batch and the pruning: the same weights and momenta."""
    whole, resumed = runs
    assert is_equal(whole, resumed[f"{epoch}-{moment}"])
    assert resumed[f"{epoch}-{moment}"]["digest"] == whole["digest"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("epoch", range(resumable.EPOCHS))
def test_resume__prunes_once(runs: Any, epoch: int, moment: str) -> None:
    """From every checkpoint there is one set of masks; a sparse one brings its own."""
    whole, resumed = runs
    result = resumed[f"{epoch}-{moment}"]
    trains_on = f"{epoch}-{moment}" not in ("3-last_batch", "3-validation_end", "3-epoch_end")
    assert result["changes"] == trains_on
    assert result["pruned_in_epoch"] == resumable.WARMUP
    if epoch >= resumable.WARMUP:
        assert result["digest"] == whole["digest"]


def test_killed_in_the_sparse_phase(tmp_path: Path) -> None:
    """After a SIGKILL in the first sparse epoch, the last checkpoint resumes with the same masks to the same end."""
    killed = start(tmp_path, "--kill", resumable.WARMUP + 1)
    assert killed.returncode == -signal.SIGKILL
    last = tmp_path / f"{resumable.WARMUP}-epoch_end.ckpt"
    before = masks_in(last)
    assert before.num_kept == round(before.num_prunable * 0.2)

    resumed = start(tmp_path, "--resume", last)
    assert resumed.returncode == 0, resumed.stderr
    result = torch.load(tmp_path / "resumed.pt", weights_only=True)[last.stem]
    assert result["digest"] == before.digest()
    for name, mask in before.items():
        assert torch.equal(result["state"][name] != 0, mask)

    (tmp_path / "whole").mkdir()
    assert start(tmp_path / "whole").returncode == 0
    assert is_equal(torch.load(tmp_path / "whole" / "final.pt", weights_only=True), result)
