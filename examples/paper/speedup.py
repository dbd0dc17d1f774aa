r"""Measure how much sooner DRIVE finds its masks than IMP, under the paper's protocol, on this machine.

    python examples/paper/speedup.py --experiments alexnet_cifar10 resnet18_cifar10 --results speedup.jsonl

IMP's 1,000 epochs are not run. For each experiment, one process times training steps in Lightning's Trainer, with data
and optimizer; DRIVE's pruning, from the start of its epoch to the first step after it, with the estimation of
BatchNorm's statistics; and one of IMP's cuts with its rewinding. These times are multiplied by the numbers of steps in
the paper's epochs, with the paper's number of images:

    DRIVE   warmup_epochs * steps * seconds per step + seconds of pruning
    IMP     cycles * (epochs_per_cycle * steps * seconds per step + seconds per cut)

The median dense step is used for both; IMP's masked steps are a little slower, which would favour DRIVE. With
`--rounds` below 100 the median time between rounds is multiplied, too. The limit is the speed-up of the protocol if a
round costs as much as a step, and everything else nothing.

Without `--data.root` the images are noise, since their content does not change the times.
"""

import argparse
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import results
import tables
import torch
from images import Batch, Images, Split
from protocol import PaperCLI, one_line_errors
from results import PAPER_ROUNDS, Speedup
from run import Wanted, be_quiet, build, circumstances, divided
from typing_extensions import override

TRAIN_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "tinyimagenet": 100_000, "imagenet32": 1_281_167}


class Noise(Images):
    """Images of noise."""

    name = "noise"

    def __init__(self, like: Images, size: int, count: int) -> None:
        super().__init__("", batch_size=like.batch_size, padding=like.padding)
        self.size = size
        self.count = count

    @override
    def read(self, split: Split) -> Batch:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (self.count, 3, self.size, self.size), dtype=torch.uint8, generator=generator)
        return images, torch.randint(10, (self.count,), generator=generator)


class Begin(pl.Callback):
    """The first callback: records when epochs, steps and forward passes begin, before pruning does."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.epochs: list[float] = []
        self.dense_steps: list[float] = []
        self.rounds: list[float] = []  # forward passes between the beginning of an epoch and its first step
        self._prunes = False
        network.register_forward_pre_hook(lambda *_: self.rounds.append(now()) if self._prunes else None)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._prunes = trainer.current_epoch == 1
        self.epochs.append(now())

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._prunes = False
        if trainer.current_epoch == 0:
            self.dense_steps.append(now())


class End(pl.Callback):
    """The last callback: records when pruning at the beginning of an epoch is over."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append(now())


def now() -> float:
    """Return the time after the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def differences(times: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def time_fit(cli: PaperCLI, data: Images) -> tuple[list[float], list[float], float]:
    """Train, prune, train another epoch; return the seconds of dense steps, of rounds and of the whole pruning."""
    begin, end = Begin(cli.model.network), End()
    cli.trainer.callbacks.insert(0, begin)
    cli.trainer.callbacks.append(end)
    cli.trainer.fit(cli.model, datamodule=data)
    return differences(begin.dense_steps)[1:], differences(begin.rounds), end.epochs[1] - begin.epochs[1]


def measure(experiment: str, steps: int, rounds: int, overrides: Sequence[str]) -> Speedup:
    """Time DRIVE and IMP one after the other, both with their own dense steps."""
    protocol = dict(vars(build(Wanted(experiment, "dense", "none", 0.0, 0), overrides).config.protocol))
    short = ["--protocol.epochs=2", "--protocol.warmup_epochs=1", f"--trainer.limit_train_batches={steps}"]
    short += [f"--trainer.max_steps={steps + 1}"]  # a single step after pruning
    drive = build(Wanted(experiment, "drive", "none", 0.98, 0), [*overrides, *short, f"--pruning.rounds={rounds}"])
    cycle = ["--protocol.cycles=1", "--protocol.epochs_per_cycle=1", "--protocol.epochs=1"]
    first_cut = 1 - (1 - 0.98) ** (1 / protocol["cycles"])
    imp = build(Wanted(experiment, "imp", "none", first_cut, 0), [*overrides, *short, *cycle])
    data = drive.datamodule
    if not any(argument.startswith(("--data=", "--data.root=")) for argument in overrides):
        size = 64 if experiment.endswith("tinyimagenet") else 32
        data = Noise(data, size, count=max(steps, min(rounds, 10)) * data.batch_size)
    drive_steps, between_rounds, pruning = time_fit(drive, data)
    imp_steps, _, cut = time_fit(imp, data)
    num_images = TRAIN_IMAGES[experiment.rpartition("_")[2]]
    return Speedup(
        experiment=experiment,
        data=data.name,
        batch_size=data.batch_size,
        steps_per_epoch=math.ceil(num_images / data.batch_size),
        protocol=protocol,
        timed_steps=len(drive_steps + imp_steps),
        timed_rounds=rounds,
        seconds_per_step=median(drive_steps + imp_steps),
        seconds_per_round=median(between_rounds[: rounds - 1]),  # later passes are for BatchNorm's statistics
        seconds_of_pruning=pruning,
        seconds_per_cut=cut,
        **circumstances(),
    )


def main(argv: Sequence[str] | None = None) -> None:
    own, overrides = divided(argv)
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--experiments", metavar="NAME", nargs="+", required=True, help="experiments of the paper, as for `main.py`")
    add("--steps", metavar="N", type=int, default=10, help="training steps to time for either method (default: 10)")
    add("--rounds", metavar="N", type=int, default=PAPER_ROUNDS, help="rounds of DRIVE to time (default: 100)")
    add("--results", metavar="FILE", type=Path, help="file to append a line of JSON to for each experiment")
    options = parser.parse_args(own)
    if unknown := [name for name in options.experiments if name.rpartition("_")[2] not in TRAIN_IMAGES]:
        parser.error(f"argument --experiments: {unknown[0]} is not one of the paper's")
    if options.steps < 3 or not 3 <= options.rounds <= PAPER_ROUNDS:
        parser.error("at least 3 steps and between 3 and 100 rounds have to be timed")
    be_quiet()
    with one_line_errors():
        for experiment in options.experiments:
            speedup = measure(experiment, options.steps, options.rounds, overrides)
            tables.speedup_table([speedup]).print()
            if options.results:
                results.append(options.results, speedup)


if __name__ == "__main__":
    main()
