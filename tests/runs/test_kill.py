"""A run that is killed at random moments, over and over, can always go on, and ends as it should."""

import itertools
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import fits
import killable
import processes
import pytest
import resumable
import torch
from fits import NUM_PRUNABLE, PRUNABLE
from torch import Tensor

from lightning_drive import Masks

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("KILL_SEED", "0"))  # of the moments; to try others: `KILL_SEED=1 python -m pytest ...`
KINDS = ("time", *killable.PHASES)  # of moments: any time, and any event in each phase of a run
EPOCHS = {"drive": resumable.EPOCHS, "imp": resumable.IMP_EPOCHS}
CUTS = {"drive": 1, "imp": resumable.CYCLES}
DENSITY = 0.2
DEVICES = (1, 2)


class Run:
    """A run in a folder of its own, started as often as it takes."""

    def __init__(self, folder: Path, method: str, every: str, devices: int) -> None:
        folder.mkdir()
        self.folder, self.method, self.every, self.devices = folder, method, every, devices

    def start(self, *kill: object, seconds: float | None = None) -> bool:
        """Start it, or let it go on, until it is killed at an event or after a time; say whether it ended before."""
        log = self.folder / "log.txt"
        settings = ["--method", self.method, "--every", self.every, "--devices", self.devices]
        settings += ["--strategy", "ddp_fork"] if self.devices > 1 else []
        process = processes.start(killable.main, self.folder, *settings, *kill, log=log)
        if seconds is not None:
            time.sleep(seconds)
            processes.kill(process)
        code = processes.exit_code(process)
        assert code in (0, -signal.SIGKILL), log.read_text(encoding="utf-8")
        return code == 0

    def start_and_kill(self, rng: random.Random, kind: str, whole: "Run") -> bool:
        """Draw the moment; say whether the run ended before it came."""
        rank = rng.randrange(self.devices)
        end = whole.end(rank)
        if kind == "time":
            seconds = rng.uniform(0, end["seconds"])
            print(f"{self.folder.name}: SIGKILL after {seconds:.3f} seconds")
            return self.start(seconds=seconds)
        event = rng.randint(1, end["counts"][kind])
        print(f"{self.folder.name}: SIGKILL at event {event} of the {kind}, rank {rank}")
        return self.start("--kill", kind, event, "--kill-rank", rank)

    def end(self, rank: int = 0) -> Any:
        return torch.load(self.folder / f"final-{rank}.pt", weights_only=True)

    def check_checkpoints(self) -> None:
        """Every one loads, and is dense or wholly sparse; those after the same number of cuts have the same masks."""
        digests: dict[int, set[str]] = {}
        for path in self.folder.glob("*.ckpt"):
            checkpoint = torch.load(path, weights_only=True)
            [state] = [state for key, state in checkpoint["callbacks"].items() if key.endswith("PruningCallback")]
            cuts = state["report"]["cycle"] or 1 if state["report"] else 0
            masks = Masks.from_state_dict(state["masks"])
            check_pruned(checkpoint["state_dict"], masks, DENSITY ** (cuts / CUTS[self.method]))
            digests.setdefault(cuts, set()).add(masks.digest())
        assert {cuts: len(found) for cuts, found in digests.items()} == dict.fromkeys(range(CUTS[self.method] + 1), 1)

    def check_end(self, whole: "Run") -> None:
        """All epochs, pruned to the exact count on every rank alike, and if it can be: what no kill would have left."""
        end, expected = self.end(), whole.end()
        assert end["epoch"] == EPOCHS[self.method]
        for rank in range(self.devices):
            other = self.end(rank)
            check_pruned(other["state"], Masks.from_state_dict(other["masks"]), DENSITY)
            assert fits.equal_states(other["masks"], end["masks"])
            assert fits.equal_states(parameters_in(other["state"]), parameters_in(end["state"]))
        if self.every == "epoch":  # in the middle of an epoch a DataLoader would begin at its first batch again
            for what in ("step", "state", "optimizer", "masks"):
                assert fits.equal_states(end[what], expected[what])


def check_pruned(state: dict[str, Tensor], masks: Masks, density: float) -> None:
    """So many weights are left, and these are what the masks keep."""
    assert sum(int((state[name] != 0).sum()) for name in PRUNABLE) == round(NUM_PRUNABLE * density)
    assert list(masks) == ([] if density == 1 else list(PRUNABLE))
    assert all(torch.equal(state[name] != 0, mask) for name, mask in masks.items())


def parameters_in(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out BatchNorm's statistics, which are those of a rank's own batches."""
    return {name: value for name, value in state.items() if name.endswith(("weight", "bias"))}


IN_EVERY_RUN = [("drive", "epoch", 1), ("drive", "step", 2), ("imp", "epoch", 2), ("imp", "step", 1)]
"""Any two of a method, a frequency of checkpoints and a number of devices are once together."""


def marks_of(chosen: tuple[str, str, int]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.ddp] * (chosen[2] > 1) + [pytest.mark.extended] * (chosen not in IN_EVERY_RUN)


@pytest.mark.parametrize(
    ("method", "every", "devices"),
    [pytest.param(*chosen, marks=marks_of(chosen)) for chosen in itertools.product(EPOCHS, ("epoch", "step"), DEVICES)],
)
def test_kill(tmp_path: Path, method: str, every: str, devices: int) -> None:
    """After a kill of each kind, a run that saves a checkpoint with every epoch or every step goes on to its end.

    A run that ends before its time to be killed has come is checked, too, and the next one begins.
    """
    runs = (Run(tmp_path / name, method, every, devices) for name in ("whole", *map(str, range(100))))
    whole = next(runs)
    assert whole.start()
    rng = random.Random(f"{SEED} {method} {every} {devices}")
    run = next(runs)
    for kind in rng.sample(KINDS, len(KINDS)):
        while run.start_and_kill(rng, kind, whole):
            run.check_checkpoints()
            run.check_end(whole)
            run = next(runs)
    assert run.start()
    run.check_checkpoints()
    run.check_end(whole)
