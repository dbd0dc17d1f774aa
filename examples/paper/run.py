r"""Run experiments by methods, sparsities, controls and seeds, and keep a line of results for each run that is done.

    python examples/paper/run.py --experiments alexnet_cifar10 --results alexnet.jsonl          # the paper's sparsities
    python examples/paper/run.py --experiments convnet_cifar10 --methods dense drive imp --sparsities 0.98 0.993 \
        --seeds 0 1 2 --controls none shuffle --jobs 2 --results convnet.jsonl -- --data=ImageTree --data.root=DIR

What follows `--` goes to every run as to `main.py`, and is kept with its results. Stop at any time: runs that are done
are not done again, and those that were under way go on from the start of the epoch they were in, from checkpoints that
lie in a folder next to the results until the run is done. Several jobs share the processor's cores or the GPU. Runs
come seed by seed, so that half of them are the whole comparison with fewer seeds.

Accuracy is that on the test images after the last epoch; nothing is selected. Seconds are those of training epochs,
without validation, checkpoints and start-up: "warmup" are the dense epochs before pruning, "pruning" is the search for
masks (with IMP all its cycles), "training" the rest.
"""

import argparse
import logging
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import results
import torch
import torchvision
from classifier import ImageClassifier
from images import Images
from lightning.pytorch.callbacks import ModelCheckpoint
from protocol import CONFIGS, PaperCLI
from results import Control, Run
from torch import Tensor

import lightning_drive
from lightning_drive import PruningReport
from lightning_drive.callbacks.base import PruningCallback
from lightning_drive.network.prunable import prunable_parameters

QUIET = (
    *("--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"),
    *("--trainer.enable_model_summary=false", "--trainer.limit_val_batches=0"),
)
SPARSITIES, IMAGENET_SPARSITIES = (0.9, 0.95, 0.98, 0.993), (0.7, 0.8, 0.9, 0.95)  # of the paper's tables
LIBRARIES = (torch, torchvision, lightning, lightning_drive)


@dataclass(frozen=True)
class Wanted:
    """A run that is to be done."""

    experiment: str
    method: str
    control: Control
    sparsity: float
    seed: int

    @property
    def key(self) -> results.Key:
        return self.experiment, self.method, self.control, self.sparsity, self.seed

    @property
    def folder(self) -> str:
        return "_".join(map(str, self.key))

    def __str__(self) -> str:
        parts = [self.experiment, self.method, f"{100 * self.sparsity:g}%", f"seed {self.seed}"]
        return ", ".join(parts if self.control == "none" else [*parts, self.control])


class Stopwatch(pl.Callback):
    """Measure epochs: the first callback to see them begin, and ahead of checkpoints when they end.

    What checkpoints lack for going on as if nothing had happened is kept here, too: the state of torch's generators,
    by which images are shuffled and augmented.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0
        self._random: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if "cpu" in self._random:
            torch.set_rng_state(self._random["cpu"])
            if getattr(trainer.fit_loop, "is_resuming", False):  # Lightning 2.6 has this epoch's iterator already,
                torch.empty((), dtype=torch.int64).random_()  # which draws a number where it is made
        if "cuda" in self._random:
            torch.cuda.set_rng_state(self._random["cuda"])
        self._random = {}
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    def state_dict(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        return {"seconds": list(self.seconds), "random": random}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self._random = list(state_dict["seconds"]), state_dict["random"]

    def phases(self, report: PruningReport | None) -> dict[str, float]:
        """Divide what was measured into what came before the masks, the search for them, and what came after."""
        if report is None:
            return {"warmup": 0.0, "pruning": 0.0, "training": sum(self.seconds)}
        before, after = sum(self.seconds[: report.epoch]), sum(self.seconds[report.epoch :]) - report.seconds
        if report.cycle is not None:
            return {"warmup": 0.0, "pruning": before + report.seconds, "training": after}
        return {"warmup": before, "pruning": report.seconds, "training": after}


# One run.


def do(wanted: Wanted, overrides: Sequence[str], checkpoints: Path) -> Run:
    """Train and test a network, from the beginning or from where an earlier process left it."""
    cli, stopwatch = build(wanted, overrides), Stopwatch()
    cli.trainer.callbacks.insert(0, stopwatch)
    cli.trainer.callbacks.append(ModelCheckpoint(checkpoints, filename="{epoch}"))  # the last epoch's alone
    saved = sorted(checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=saved[-1] if saved else None)
    metrics = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    return describe(cli, wanted, overrides, metrics[0]["test_accuracy"], stopwatch)


def build(wanted: Wanted, overrides: Sequence[str]) -> PaperCLI:
    """Make what a run is made of, as `main.py` does."""
    names = [wanted.experiment] if wanted.method == "dense" else [wanted.experiment, wanted.method]
    args = [f"--config={CONFIGS / name}.yaml" for name in names]
    if wanted.method != "dense":
        args += [f"--pruning.sparsity={wanted.sparsity}", f"--pruning.control={wanted.control}"]
    args += [f"--seed_everything={wanted.seed}", *QUIET, *overrides]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # meant for the other command line
        return PaperCLI(
            ImageClassifier, Images, subclass_mode_data=True, save_config_callback=None, run=False, args=args
        )


def describe(cli: PaperCLI, wanted: Wanted, overrides: Sequence[str], accuracy: float, stopwatch: Stopwatch) -> Run:
    pruning = next((each for each in cli.trainer.callbacks if isinstance(each, PruningCallback)), None)
    report = pruning.report if pruning else None
    num_weights = sum(weight.numel() for weight in prunable_parameters(cli.model).values())
    data = cli.datamodule
    return Run(
        **asdict(wanted),
        data=data.name,
        train_images=len(data.splits["train"]),
        test_images=len(data.splits["test"]),
        batch_size=data.batch_size,
        epochs=cli.config.protocol.epochs,
        total_epochs=len(stopwatch.seconds),
        accuracy=accuracy,
        num_weights=num_weights,
        num_kept=report.num_kept if report else num_weights,
        effective_sparsity=report.effective_sparsity if report else None,
        seconds=stopwatch.phases(report),
        digest=report.digest if report else "",
        warnings=list(report.warnings) if report else [],
        overrides=kept(overrides),
        **circumstances(),
    )


def kept(overrides: Iterable[str]) -> list[str]:
    """Leave out what says only where the data is on this machine."""
    return [each for each in overrides if not each.startswith("--data.root=")]


def circumstances() -> dict[str, Any]:
    """Say under what circumstances a result came about."""
    versions = {"python": platform.python_version(), **{each.__name__: str(each.__version__) for each in LIBRARIES}}
    today = date.today().isoformat()
    return {"versions": versions, "hardware": hardware(), "revision": revision(), "date": today}


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def revision() -> str:
    """Name the commit of this checkout, with a plus where files have changed since."""
    git = ["git", "-C", str(CONFIGS), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# Many runs.


def all_wanted(options: argparse.Namespace) -> list[Wanted]:
    """List all runs; dense is dense, whatever the sparsity and the control."""
    found: dict[Wanted, None] = {}  # as an ordered set
    for seed, experiment in product(options.seeds, options.experiments):
        papers = IMAGENET_SPARSITIES if experiment == "resnet18_imagenet32" else SPARSITIES
        for sparsity, control, method in product(options.sparsities or papers, options.controls, options.methods):
            if method == "dense":
                found[Wanted(experiment, method, "none", 0.0, seed)] = None
            else:
                found[Wanted(experiment, method, control, sparsity, seed)] = None
    return list(found)


def missing(wanted: Sequence[Wanted], path: Path, overrides: Sequence[str]) -> list[Wanted]:
    """Leave out what is in the results; refuse to go on where that was made by other settings."""
    done = {run.key: run for run in results.read_file(path, Run)} if path.is_file() else {}
    given = kept(overrides)
    for each in wanted:
        if each.key in done and done[each.key].overrides != given:
            then, now = (" ".join(settings) or "nothing" for settings in (done[each.key].overrides, given))
            sys.exit(f"{path} has {each} with {then} after `--`, not {now}. Give the same, or another --results.")
    return [each for each in wanted if each.key not in done]


def start_worker(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    be_quiet()


def be_quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")  # what a callback warns of is in its report


def do_all(wanted: Sequence[Wanted], options: argparse.Namespace) -> int:
    """Do runs, several at once, and say what became of each; return how many failed."""
    folder = options.results.with_name(f"{options.results.name}.checkpoints")
    start, failed = time.monotonic(), 0
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    spawn = multiprocessing.get_context("spawn")  # CUDA cannot be used in forked processes
    with ProcessPoolExecutor(options.jobs, spawn, start_worker, (threads,)) as pool:
        jobs = {pool.submit(do, each, options.overrides, folder / each.folder): each for each in wanted}
        try:
            for number, job in enumerate(as_completed(jobs), start=1):
                head = f"[{number} of {len(jobs)}, {time.monotonic() - start:.0f} s] {jobs[job]}:"
                if error := job.exception():
                    failed += 1
                    print(f"{head} failed", *traceback.format_exception(error), sep="\n", flush=True)
                else:
                    run = job.result()
                    results.append(options.results, run)
                    shutil.rmtree(folder / jobs[job].folder)  # not before the line is there
                    seconds = f"{run.seconds_to_masks:.1f} s to the masks, {run.total_seconds:.0f} s in all"
                    print(f"{head} {run.accuracy:.2%}, {seconds}", flush=True)
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.kill()  # or else it would go on with what waits for its turn
            sys.exit("Stopped. The same command goes on from here.")
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return failed


def divided(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Divide the command line into what stands before `--` and what every run is given."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    return argv[:split], argv[split + 1 :]


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__
    own, overrides = divided(argv)
    parser = argparse.ArgumentParser(
        usage="%(prog)s --experiments NAME [NAME ...] --results FILE [options] [-- what every run is given]",
        description=__doc__.splitlines()[0],
    )
    add, names = parser.add_argument, ", ".join
    usual = ["dense", "snip", "synflow", "drive", "imp"]
    known = results.EXPERIMENTS
    add("--experiments", metavar="NAME", nargs="+", required=True, choices=known, help=names(known))
    explained = f"{names(results.METHODS)} (default: {names(usual)})"
    add("--methods", metavar="NAME", nargs="+", choices=results.METHODS, default=usual, help=explained)
    explained = "fractions to remove (default: the paper's, 0.9 0.95 0.98 0.993; for ImageNet 0.7 0.8 0.9 0.95)"
    add("--sparsities", metavar="S", nargs="+", type=float, default=[], help=explained)
    add("--seeds", metavar="N", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    explained = f"{names(results.CONTROLS)} (default: none)"
    add("--controls", metavar="NAME", nargs="+", choices=results.CONTROLS, default=["none"], help=explained)
    add("--jobs", metavar="N", type=int, default=1, help="how many runs at once (default: 1)")
    add("--results", metavar="FILE", type=Path, required=True, help="file that gets a line for each run that is done")
    options = parser.parse_args(own)
    options.overrides = overrides
    if not all(0 < sparsity < 1 for sparsity in options.sparsities):
        parser.error(f"argument --sparsities: these are fractions to remove, between 0 and 1, got {options.sparsities}")
    if options.jobs < 1:
        parser.error(f"argument --jobs: must be at least 1, got {options.jobs}")
    if not options.results.absolute().parent.is_dir():
        parser.error(f"argument --results: there is no folder {options.results.parent}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(argv)
    try:
        wanted = missing(all_wanted(options), options.results, options.overrides)
    except ValueError as error:
        sys.exit(f"{error}")
    print(f"{len(wanted)} runs to do", flush=True)
    if wanted:
        be_quiet()
        build(wanted[0], options.overrides).datamodule.prepare_data()  # once, and not in every process
    if failed := do_all(wanted, options):
        sys.exit(f"{failed} runs failed.")


if __name__ == "__main__":
    main()
