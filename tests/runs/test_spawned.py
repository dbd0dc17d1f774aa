"""A callback gets back what processes of its own ``fit`` found, and nothing from any other process."""

import copy
import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import fits
import joblib
import lightning.pytorch as pl
import processes
import pytest
import torch
from torch import nn

from lightning_drive import DRIVEPruningCallback, SNIPPruningCallback
from lightning_drive.trainer.spawned import Handover, Parcel

CONTEXT = multiprocessing.get_context("fork")


class Tiny(pl.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, fits.NUM_CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def job(callback: Any, seed: int, folder: Path, strategy: str = "auto") -> tuple[Any, str]:
    """Train in this process or, under a strategy with a launcher, below it; return the callback and its masks."""
    torch.set_num_threads(1)
    module = Tiny(seed)
    fits.trainer(folder, callback, max_epochs=1, strategy=strategy, devices=1).fit(module, fits.loader())
    assert callback.masks.hold_for(module)
    return callback, callback.masks.digest()


def job_of_pickle(pickled: bytes, folder: Path, temporary: Path) -> tuple[bytes, str]:
    """Train where the folder for temporary files is another one."""
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    callback, digest = job(pickle.loads(pickled), 0, folder)
    return pickle.dumps(callback), digest


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a folder for temporary files of the test and what it starts, and fail if something of ours stays there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    assert [path.name for path in folder.iterdir() if "lightning_drive" in path.name] == []


class Launcher:
    """What of Lightning's launcher a handover reads."""

    def get_extra_results(self, trainer: object) -> dict[str, Any]:
        return {"callback_metrics_bytes": b""}


def results_of(handover: Handover, state: dict[str, Any]) -> dict[str, Any]:
    launcher = Launcher()
    handover.send(launcher, lambda: state)
    return launcher.get_extra_results(None)


def put_results(queue: Any, handover: Handover) -> None:
    queue.put(results_of(handover, {"masks": torch.arange(100_000)}))


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.extended), "fork"])
def test_handover(method: Any) -> None:
    """More than a pipe holds comes back from a process that is over."""
    handover = Handover()
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    sent = handover.of_copy() if method == "spawn" else handover  # what pickling a callback puts in its place
    process = context.Process(target=put_results, args=(queue, sent))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    queue.get()
    received = handover.take()
    assert received is not None
    assert torch.equal(received["masks"], torch.arange(100_000))
    assert handover.take() is None


def send_to_parent(handover: Handover, pickled: Path) -> None:
    pickled.write_bytes(pickle.dumps(results_of(handover, {"epoch": 1})))


def returned(handover: Handover, pickled: Path) -> Path:
    """Let a forked process write its results, which nobody has read yet."""
    process = CONTEXT.Process(target=send_to_parent, args=(handover, pickled))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return pickled


def test_handover__receiver_is_gone(tmp_path: Path, temporary: Path) -> None:
    handover = Handover()
    results = returned(handover, tmp_path / "results")
    assert len(list(temporary.iterdir())) == 1
    del handover
    gc.collect()
    pickle.loads(results.read_bytes())
    assert not list(temporary.iterdir())


def test_handover__failure_after_sending(tmp_path: Path, temporary: Path) -> None:
    """If another rank fails when one has sent its results, Lightning reads none and calls ``on_exception``."""
    callback, module = fits.drive(), Tiny()
    returned(callback._handover, tmp_path / "results")
    assert len(list(temporary.iterdir())) == 1
    callback.on_exception(fits.trainer(tmp_path, callback), module, RuntimeError())
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_handover__copies(tmp_path: Path, copied: Callable[[Any], Any]) -> None:
    """What is sent to one of several copies in a process does not reach the others."""
    original = fits.drive()
    others = [copied(original), copied(copied(original))]
    state = {**job(fits.drive(warmup_epochs=0), 0, tmp_path)[0].state_dict(), "start": None}
    for callback in (others[1], others[0], original):
        assert not callback.pruned
        pickle.loads(pickle.dumps(Parcel(callback._handover.address, state)))
        assert callback.pruned
        launched = pickle.loads(pickle.dumps(callback))
        assert launched._handover.origin == callback._handover.address


def test_handover__other_launchers() -> None:
    """Without a launcher that returns results nothing is sent, nor from the process that ``fit`` was called in."""
    for launcher in (None, object()):
        Handover("address").send(launcher, dict)
    assert results_of(Handover(), {}) == {"callback_metrics_bytes": b""}


# Callbacks that travel by other means.


def with_pool(jobs: list[tuple[Any, ...]], method: str) -> list[tuple[Any, str]]:
    with multiprocessing.get_context(method).Pool(2) as pool:
        return pool.starmap(job, jobs, chunksize=1)


def with_executor(jobs: list[tuple[Any, ...]]) -> list[tuple[Any, str]]:
    with ProcessPoolExecutor(2, mp_context=CONTEXT) as executor:
        return [future.result() for future in [executor.submit(job, *arguments) for arguments in jobs]]


def with_joblib(jobs: list[tuple[Any, ...]]) -> list[tuple[Any, str]]:
    return joblib.Parallel(n_jobs=2, backend="multiprocessing")(joblib.delayed(job)(*arguments) for arguments in jobs)


WAYS: dict[str, Callable[[list[tuple[Any, ...]]], list[tuple[Any, str]]]] = {
    "fork": lambda jobs: with_pool(jobs, "fork"),
    "forkserver": lambda jobs: with_pool(jobs, "forkserver"),
    "executor": with_executor,
    "joblib": with_joblib,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_jobs(tmp_path: Path, way: str) -> None:
    """Four jobs from one callback each bring back their own masks, and the original stays as it was."""
    original = SNIPPruningCallback(sparsity=0.8)
    results = WAYS[way]([(original, seed, tmp_path) for seed in range(4)])
    assert not original.pruned
    assert len({digest for _, digest in results}) == 4
    assert [callback.masks.digest() for callback, _ in results] == [digest for _, digest in results]


def fit_below(arguments: list[str]) -> None:
    """Fit with ``ddp_spawn`` or ``ddp_fork`` in the jobs of a pool that leaves its workers their own children."""
    folder, strategy = arguments
    original = SNIPPruningCallback(sparsity=0.8)
    with ProcessPoolExecutor(2, mp_context=CONTEXT) as executor:
        futures = [executor.submit(job, original, seed, Path(folder), strategy) for seed in range(2)]
        results = [future.result() for future in futures]
    assert not original.pruned
    assert len({digest for _, digest in results}) == 2
    assert [callback.masks.digest() for callback, _ in results] == [digest for _, digest in results]


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("strategy", [pytest.param("ddp_spawn", marks=pytest.mark.extended), "ddp_fork"])
def test_jobs__with_processes_of_their_own(tmp_path: Path, strategy: str) -> None:
    processes.run(fit_below, tmp_path, strategy, log=tmp_path / "log.txt")


def test_pickle_elsewhere(tmp_path: Path, temporary: Path) -> None:
    """A saved pickle is trained in another process, with another folder for temporary files, and comes back."""
    callback = fits.drive(warmup_epochs=0)
    pickled, there = pickle.dumps(callback), tmp_path / "there"
    there.mkdir()
    temporary.rmdir()  # as on another machine
    with CONTEXT.Pool(1) as pool:
        back, digest = pool.apply(job_of_pickle, (pickled, tmp_path, there))
    temporary.mkdir()
    assert pickle.loads(back).masks.digest() == digest
    assert not callback.pruned
    assert not pickle.loads(pickled).pruned
    assert not [path for path in there.iterdir() if "lightning_drive" in path.name]


# Nothing stays behind.


def test_fits_leave_nothing_behind(tmp_path: Path, temporary: Path) -> None:
    """Neither file, thread, module, process-wide hook nor handover stays after many fits."""

    def left() -> dict[str, Any]:
        gc.collect()
        objects = gc.get_objects()
        return {
            "files": sorted(temporary.iterdir()),
            "threads": threading.active_count(),
            "modules": sum(type(thing) is Tiny for thing in objects),
            "callbacks": sum(type(thing) is DRIVEPruningCallback for thing in objects),
            "handovers": sum(type(thing) is Handover for thing in objects),
            "hooks": len(nn.modules.module._global_forward_hooks),
            "imported": len(sys.modules),
        }

    def fit() -> None:
        job(fits.drive(warmup_epochs=0, rounds=2, bn_batches=0), 0, tmp_path)

    fit()
    before = left()
    for _ in range(10):
        fit()
    assert left() == before
