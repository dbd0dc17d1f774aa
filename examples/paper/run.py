r"""Run experiments by methods, sparsities, controls and seeds, and append a line of results for each finished run.

    python examples/paper/run.py --experiments alexnet_cifar10 --results alexnet.jsonl          # the paper's sparsities
    python examples/paper/run.py --experiments convnet_cifar10 --methods dense drive imp --sparsities 0.98 0.993 \
        --seeds 0 1 2 --controls none shuffle --jobs 2 --results convnet.jsonl -- --data=ImageTree --data.root=DIR
    PYTHONPATH=. python examples/paper/run.py --experiments my/experiment.yaml --methods drive my/method.yaml \
        --results mine.jsonl                                     # your own, whose classes are in files of this folder

Arguments after `--` are passed to every run, as to `main.py`, and stored with its results. Stop at any time: finished
runs are not repeated, and interrupted ones continue from the start of their epoch, from checkpoints that stay in a
folder next to the results until the run is finished. Several jobs share the processor's cores or the GPU. Runs are
ordered by seed, so that half of them are a whole comparison with fewer seeds.

Accuracy is measured on the test images after the last epoch; nothing is selected. Seconds are those of training epochs,
without validation, checkpoints and start-up: "warmup" has the epochs before the masks are final, "pruning" the search
for them (with IMP all its cycles), "training" the rest.
"""

import argparse
import logging
import platform
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning
import results
import torch
import torchvision
from classifier import ImageClassifier
from images import Images
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from protocol import CONFIGS, PaperCLI, config_file, config_name, experiment, method, one_line_errors
from results import Control, Run
from stopwatch import Stopwatch
from workers import Workers, interrupted_by_signals, was_killed

import lightning_drive
from lightning_drive.callbacks.hooks import PruningCallback
from lightning_drive.network.prunable import prunable_parameters

QUIET = (
    *("--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"),
    *("--trainer.enable_model_summary=false", "--trainer.limit_val_batches=0"),
)
SPARSITIES, IMAGENET_SPARSITIES = (0.9, 0.95, 0.98, 0.993), (0.7, 0.8, 0.9, 0.95)  # of the paper's tables
LIBRARIES = (torch, torchvision, lightning, lightning_drive)


@dataclass(frozen=True)
class Wanted:
    """A run to do; the experiment and the method are names or paths of their files."""

    experiment: str
    method: str
    control: Control
    sparsity: float
    seed: int

    @property
    def key(self) -> results.Key:
        return config_name(self.experiment), config_name(self.method), self.control, self.sparsity, self.seed

    @property
    def folder(self) -> str:
        return "_".join(map(str, self.key))

    def __str__(self) -> str:
        parts = [*self.key[:2], f"{100 * self.sparsity:g}%", f"seed {self.seed}"]
        return ", ".join(parts if self.control == "none" else [*parts, self.control])


# One run.


def do(wanted: Wanted, overrides: Sequence[str], folder: Path) -> Run:
    """Train and test a network, from the beginning or from the last checkpoint of an earlier process."""
    cli, stopwatch, checkpoints = build(wanted, overrides), Stopwatch(), folder / wanted.folder
    cli.trainer.callbacks.insert(0, stopwatch)
    cli.trainer.callbacks.append(ModelCheckpoint(checkpoints, filename="{epoch}"))  # of the last epoch only
    saved = sorted(checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=saved[-1] if saved else None)
    metrics = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    return describe(cli, wanted, overrides, metrics[0]["test_accuracy"], stopwatch)


def build(wanted: Wanted, overrides: Sequence[str]) -> PaperCLI:
    """Build the model, data and Trainer of a run, as `main.py` does."""
    names = [wanted.experiment] if wanted.method == "dense" else [wanted.experiment, wanted.method]
    args = [f"--config={config_file(name)}" for name in names]
    if wanted.method != "dense":
        args += [f"--pruning.sparsity={wanted.sparsity}", f"--pruning.control={wanted.control}"]
    args += [f"--seed_everything={wanted.seed}", *QUIET, *overrides]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # meant for another use
        return PaperCLI(
            ImageClassifier, Images, subclass_mode_data=True, save_config_callback=None, run=False, args=args
        )


def describe(cli: PaperCLI, wanted: Wanted, overrides: Sequence[str], accuracy: float, stopwatch: Stopwatch) -> Run:
    callbacks = cli.trainer.callbacks
    pruning = next((callback for callback in callbacks if isinstance(callback, PruningCallback)), None)
    report = pruning.report if pruning else None
    num_weights = sum(weight.numel() for weight in prunable_parameters(cli.model).values())
    data = cli.datamodule
    return Run(
        **dict(zip(("experiment", "method", "control", "sparsity", "seed"), wanted.key, strict=True)),
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
    """Return the arguments without the place of the data on this machine."""
    return [argument for argument in overrides if not argument.startswith("--data.root=")]


def circumstances() -> dict[str, Any]:
    """Return the circumstances of a result: versions, hardware, revision and date."""
    versions = {
        "python": platform.python_version(),
        **{library.__name__: str(library.__version__) for library in LIBRARIES},
    }
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
    """Return the commit of this checkout, with a plus if files have changed since."""
    git = ["git", "-C", str(CONFIGS), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# Many runs.


def all_wanted(options: argparse.Namespace) -> list[Wanted]:
    """Return all runs; a dense run is one and the same for every sparsity and control."""
    runs: dict[Wanted, None] = {}  # an ordered set
    for seed, what in product(options.seeds, options.experiments):
        papers = IMAGENET_SPARSITIES if what == "resnet18_imagenet32" else SPARSITIES
        for sparsity, control, how in product(options.sparsities or papers, options.controls, options.methods):
            if how == "dense":
                runs[Wanted(what, how, "none", 0.0, seed)] = None
            else:
                runs[Wanted(what, how, control, sparsity, seed)] = None
    return list(runs)


def missing(wanted: Sequence[Wanted], path: Path, overrides: Sequence[str]) -> list[Wanted]:
    """Return the runs that are not in the results yet; exit if results are from other settings."""
    done = {run.key: run for run in results.read_file(path, Run)} if path.is_file() else {}
    given = kept(overrides)
    for run in wanted:
        if run.key in done and done[run.key].overrides != given:
            then, now = (" ".join(settings) or "nothing" for settings in (done[run.key].overrides, given))
            sys.exit(f"{path} has {run} with {then} after `--`, not {now}. Use the same, or another --results.")
    return [run for run in wanted if run.key not in done]


def prepare(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    be_quiet()


def be_quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")  # warnings of a callback are in its report


def do_all(wanted: Sequence[Wanted], options: argparse.Namespace) -> int:
    """Do runs, several at once, print the result of each, and return how many failed."""
    folder = options.results.with_name(f"{options.results.name}.checkpoints")
    start, failed = time.monotonic(), 0
    threads = max(1, torch.get_num_threads() // options.jobs)  # follows OMP_NUM_THREADS and the affinity
    with Workers[Wanted](options.jobs, partial(prepare, threads)) as workers:
        ended = workers.call(partial(do, overrides=options.overrides, folder=folder), wanted)
        for number, (one, future) in enumerate(ended, start=1):
            head = f"[{number} of {len(wanted)}, {time.monotonic() - start:.0f} s] {one}:"
            if future.exception():
                failed += 1
                print(f"{head} failed", why_it_failed(future), sep="\n", flush=True)
            else:
                run = future.result()
                results.append(options.results, run)
                shutil.rmtree(folder / one.folder)  # only after the line is written
                seconds = f"{run.seconds_to_masks:.1f} s to the masks, {run.total_seconds:.0f} s in all"
                print(f"{head} {run.accuracy:.2%}, {seconds}", flush=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return failed


def why_it_failed(future: Future[Run]) -> str:
    """Return a line for what the user can mend, and a traceback for everything else."""
    error = future.exception()
    if was_killed(future) or (isinstance(error, SystemExit) and not error.code):  # Lightning's answer to SIGTERM
        return "Its process was killed. The same command continues from its last whole epoch."
    if isinstance(error, SystemExit):
        return "The error is above."
    if isinstance(error, MisconfigurationException):
        return f"{error}"
    return "".join(traceback.format_exception(error))


def divided(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Divide the command line into the arguments before `--` and those for every run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    return argv[:split], argv[split + 1 :]


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__
    own, overrides = divided(argv)
    parser = argparse.ArgumentParser(
        usage="%(prog)s --experiments NAME [NAME ...] --results FILE [options] [-- arguments of every run]",
        description=__doc__.splitlines()[0],
    )
    add, names = parser.add_argument, ", ".join
    usual = ["dense", "snip", "synflow", "drive", "imp"]
    explained = f"{names(results.EXPERIMENTS)}, or the path of another YAML file"
    add("--experiments", metavar="NAME", nargs="+", required=True, type=experiment, help=explained)
    explained = f"{names(results.METHODS)}, or the path of another YAML file (default: {names(usual)})"
    add("--methods", metavar="NAME", nargs="+", default=usual, type=method, help=explained)
    explained = "fractions to remove (default: the paper's, 0.9 0.95 0.98 0.993; for ImageNet 0.7 0.8 0.9 0.95)"
    add("--sparsities", metavar="S", nargs="+", type=float, default=[], help=explained)
    add("--seeds", metavar="N", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    explained = f"{names(results.CONTROLS)} (default: none)"
    add("--controls", metavar="NAME", nargs="+", choices=results.CONTROLS, default=["none"], help=explained)
    add("--jobs", metavar="N", type=int, default=1, help="number of runs at once (default: 1)")
    add("--results", metavar="FILE", type=Path, required=True, help="file to append a line to for each finished run")
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
    try:
        with interrupted_by_signals(), one_line_errors():
            if wanted:
                be_quiet()
                build(wanted[0], options.overrides).datamodule.prepare_data()  # once, not in every process
            failed = do_all(wanted, options)
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command continues from here.")
    if failed:
        sys.exit(f"{failed} runs failed.")


if __name__ == "__main__":
    main()
