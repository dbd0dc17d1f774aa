"""A run that is interrupted and resumed in a new process ends as if nothing had happened."""

import signal
from pathlib import Path
from typing import Any

import fits
import processes
import pytest
import resumable
import torch

from lightning_drive import Masks

pytestmark = pytest.mark.slow

MOMENTS = ("middle", "last_batch", "validation_end", "epoch_end")


def run(folder: Path, *arguments: object) -> None:
    processes.run(resumable.main, folder, *arguments, log=folder / "log.txt")


def run_and_kill(folder: Path, *arguments: object) -> None:
    """Let a run kill itself in the middle of an epoch."""
    process = processes.start(resumable.main, folder, *arguments, log=folder / "log.txt")
    assert processes.exit_code(process) == -signal.SIGKILL


def pruning_state(checkpoint: Path) -> Any:
    [state] = [
        state
        for key, state in torch.load(checkpoint, weights_only=True)["callbacks"].items()
        if key.endswith("PruningCallback")
    ]
    return state


def masks_in(checkpoint: Path) -> Masks:
    return Masks.from_state_dict(pruning_state(checkpoint)["masks"])


def has_same_end(first: Any, second: Any) -> bool:
    return all(fits.equal_states(first[what], second[what]) for what in ("state", "optimizer", "digest"))


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One uninterrupted run, and all runs resumed from its checkpoints by a second process."""
    folder = tmp_path_factory.mktemp(request.param)
    run(folder, "--optimizer", request.param)
    checkpoints = sorted(folder.glob("*.ckpt"))
    assert len(checkpoints) == resumable.EPOCHS * len(MOMENTS)
    run(folder, "--optimizer", request.param, "--resume", *checkpoints)
    return torch.load(folder / "final.pt", weights_only=True), torch.load(folder / "resumed.pt", weights_only=True)


@pytest.mark.parametrize("moment", MOMENTS[1:])
@pytest.mark.parametrize("epoch", range(resumable.EPOCHS))
def test_resume__bitwise(runs: Any, epoch: int, moment: str) -> None:
    """At every epoch boundary, also between the last dense batch and the pruning: the same weights and momenta."""
    whole, resumed = runs
    assert has_same_end(whole, resumed[f"{epoch}-{moment}"])


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


@pytest.mark.parametrize("runs", ["sgd"], indirect=True)
def test_killed_in_the_sparse_phase(runs: Any, tmp_path: Path) -> None:
    """After a SIGKILL in the first sparse epoch, the last checkpoint resumes with the same masks to the same end."""
    whole, _ = runs
    run_and_kill(tmp_path, "--kill", resumable.WARMUP + 1)
    last = tmp_path / f"{resumable.WARMUP}-epoch_end.ckpt"
    before = masks_in(last)
    assert before.num_kept == round(before.num_prunable * 0.2)

    run(tmp_path, "--resume", last)
    result = torch.load(tmp_path / "resumed.pt", weights_only=True)[last.stem]
    assert result["digest"] == before.digest()
    for name, mask in before.items():
        assert torch.equal(result["state"][name] != 0, mask)
    assert has_same_end(whole, result)


IMP_RUNS = {
    "initial_weights": ("--optimizer", "sgd", "--scheduler", "onecycle", "--rewind-epoch", 0),
    "later_weights": ("--optimizer", "adamw", "--scheduler", "step", "--rewind-epoch", 1),
}


@pytest.fixture(scope="module", params=IMP_RUNS)
def imp_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One uninterrupted IMP run, and all runs resumed from its epoch boundaries by a second process."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = ("--method", "imp", *IMP_RUNS[request.param])
    run(folder, *settings)
    checkpoints = sorted(path for path in folder.glob("*.ckpt") if not path.stem.endswith("middle"))
    assert len(checkpoints) == resumable.IMP_EPOCHS * len(MOMENTS[1:])
    run(folder, *settings, "--resume", *checkpoints)
    return (
        folder,
        torch.load(folder / "final.pt", weights_only=True),
        torch.load(folder / "resumed.pt", weights_only=True),
    )


@pytest.mark.parametrize("moment", MOMENTS[1:])
@pytest.mark.parametrize("epoch", range(resumable.IMP_EPOCHS))
def test_resume__imp_bitwise(imp_runs: Any, epoch: int, moment: str) -> None:
    """From every epoch boundary of every cycle: the same weights, momenta, masks and learning rates.

    The second process starts from other random weights, so the rewind point is that of the checkpoint.
    """
    _, whole, resumed = imp_runs
    result = resumed[f"{epoch}-{moment}"]
    assert has_same_end(whole, result)
    assert result["pruned_in_epoch"] == whole["pruned_in_epoch"] == resumable.CYCLES * resumable.EPOCHS_PER_CYCLE
    steps = range(3 * (epoch + 1), 3 * resumable.IMP_EPOCHS)
    assert result["rates"] == {step: whole["rates"][step] for step in steps}


def test_resume__imp_rewind_point(imp_runs: Any, request: pytest.FixtureRequest) -> None:
    """Checkpoints hold the point to return to from then until the last cut; later ones are smaller by it."""
    folder, _, _ = imp_runs
    first = int("later_weights" in request.node.name)
    last_cut = resumable.CYCLES * resumable.EPOCHS_PER_CYCLE
    has_start = {
        epoch: pruning_state(folder / f"{epoch}-epoch_end.ckpt")["start"] is not None
        for epoch in range(resumable.IMP_EPOCHS)
    }
    assert has_start == {epoch: first <= epoch < last_cut for epoch in range(resumable.IMP_EPOCHS)}
    size = {epoch: (folder / f"{epoch}-epoch_end.ckpt").stat().st_size for epoch in (last_cut - 1, last_cut)}
    assert size[last_cut] < size[last_cut - 1] - 4 * masks_in(folder / "2-epoch_end.ckpt").num_prunable


@pytest.mark.parametrize("imp_runs", ["later_weights"], indirect=True)
def test_killed_in_a_cycle(imp_runs: Any, tmp_path: Path) -> None:
    """After a SIGKILL in the middle of the second cycle, the last checkpoint resumes to the same ticket."""
    _, whole, _ = imp_runs
    settings = ("--method", "imp", *IMP_RUNS["later_weights"])
    run_and_kill(tmp_path, *settings, "--kill", 3)
    last = max(tmp_path.glob("*epoch_end.ckpt"))
    assert last.stem == "2-epoch_end"
    before = masks_in(last)
    assert before.num_kept == round(before.num_prunable * 0.2**0.5)

    run(tmp_path, *settings, "--resume", last)
    result = torch.load(tmp_path / "resumed.pt", weights_only=True)[last.stem]
    assert has_same_end(whole, result)
