r"""Compare pruning methods fairly: from the same start, on the same data, with the same number of epochs at the end.

    python examples/methods.py                                                          # scikit-learn's digits
    python examples/methods.py --data DIR --train-images 10000 --test-images 5000 --batch-size 128 --epochs 10 \
        --warmup-epochs 2 --rounds 20 --epochs-per-cycle 5 --sparsity 0.98 0.993 --results runs.jsonl    # CIFAR-10

Every network that is tested has trained for `--epochs` epochs under one learning-rate schedule. DRIVE's dense epochs
are among them; the cycles in which IMP looks for its masks are not, but the column "epochs" counts them, too.
"magnitude" keeps the largest initial weights, SNIP takes one round on one batch, and SynFlow 100 without data. The
networks are small: that of `digits.py`, and for CIFAR-10, stored as `cifar10.py` wants it, four convolutions with
390,496 weights that can be pruned. All settings are ours, not those of the papers, which train for much longer.
"""

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from cifar10 import DEVICE, ImageClassifier, batches, load_images
from comparison import GREY, STYLES
from digits import DigitClassifier, load_data
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset

import lightning_drive
from lightning_drive.pruning import PruningCallback
from lightning_drive.warmup import WarmupPruningCallback


def prune_by_magnitude(**settings: Any) -> PruningCallback:
    """Keep the largest initial weights: what DRIVE's and SNIP's callbacks are made of takes any method."""
    rest = {"include": None, "exclude": None, "loss_fn": None, "bn_batches": 20, "reset_best": True}
    rest |= {"warmup_epochs": 0, "schedule": "exponential", "scope": "global"}
    return WarmupPruningCallback(lightning_drive.Magnitude(), **settings, **rest)


CALLBACKS: dict[str, Callable[..., PruningCallback]] = {
    "magnitude": prune_by_magnitude,
    "SNIP": lightning_drive.SNIPPruningCallback,
    "SynFlow": lightning_drive.SynFlowPruningCallback,
    "DRIVE": lightning_drive.DRIVEPruningCallback,
    "IMP": lightning_drive.IMPPruningCallback,
}
METHODS = ("dense", *CALLBACKS)


def load(options: argparse.Namespace) -> tuple[TensorDataset, TensorDataset]:
    if options.data:
        train_data = load_images(options.data, "train", options.download, options.train_images)
        test_data = load_images(options.data, "test", options.download, options.test_images)
    else:
        torch.set_num_threads(1)  # layers this small gain nothing from more
        train_data, test_data = load_data()
        train_data = TensorDataset(*train_data[: options.train_images])
        test_data = TensorDataset(*test_data[: options.test_images])
    if len(train_data) < options.batch_size:
        sys.exit(f"--batch-size {options.batch_size} is more than the {len(train_data):,} images to train on.")
    return train_data, test_data


def small_image_classifier() -> ImageClassifier:
    """Build the classifier of `cifar10.py`, with four convolutions in place of its ResNet-18."""
    classifier, layers = ImageClassifier(width=1), []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if outputs < 256 else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    classifier.network = nn.Sequential(*layers)
    return classifier


@dataclass(frozen=True)
class Run:
    """A network, trained and tested: one line of the results file."""

    settings: dict[str, Any]  # all that the run depends on; "pruning" holds the arguments of the callback
    accuracy: float
    epochs: int  # all of them, IMP's cycles included
    seconds: float  # for all of `trainer.fit`
    pruning_seconds: float | None  # for finding masks, in IMP those of the last cycle; None if dense
    num_kept: int | None  # None if dense
    effective_sparsity: float | None  # None if dense, or if it could not be measured


def all_settings(options: argparse.Namespace) -> list[dict[str, Any]]:
    """List the settings of all runs, seed by seed, so that half a comparison is a whole one with fewer seeds."""
    names = ("train_images", "test_images", "batch_size", "epochs")
    common = {"data": "CIFAR-10" if options.data else "digits", **{name: getattr(options, name) for name in names}}
    found = []
    for seed, method, sparsity in product(options.seeds, options.methods, options.sparsity):
        pruning = {"sparsity": sparsity, "control": options.control}
        if method == "DRIVE":
            pruning |= {"warmup_epochs": options.warmup_epochs, "rounds": options.rounds}
        if method == "IMP":
            cycles = options.cycles or max(1, round(-math.log(1 - sparsity)))  # each keeps about 1/e = 37 %
            pruning |= {"cycles": cycles, "epochs_per_cycle": options.epochs_per_cycle}
        settings = {**common, "seed": seed, "method": method, "pruning": pruning if method != "dense" else {}}
        if settings not in found:  # dense is dense, whatever the sparsity
            found.append(settings)
    return found


def train(settings: dict[str, Any], train_data: TensorDataset, test_data: TensorDataset) -> Run:
    pl.seed_everything(settings["seed"], verbose=False)
    own = settings["pruning"]
    pruning = CALLBACKS[settings["method"]](**own) if own else None
    epochs = settings["epochs"] + own.get("cycles", 0) * own.get("epochs_per_cycle", 0)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[pruning] if pruning else [],
        accelerator=DEVICE.type,
        devices=1,
        precision="bf16-mixed" if DEVICE.type == "cuda" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = DigitClassifier() if settings["data"] == "digits" else small_image_classifier()
    start = time.perf_counter()
    trainer.fit(model, batches(train_data, settings["batch_size"], shuffle=True))
    seconds = time.perf_counter() - start
    report = pruning.report if pruning else None
    metrics = trainer.test(model, batches(test_data, batch_size=1000, shuffle=False), verbose=False)
    return Run(
        settings=settings,
        accuracy=metrics[0]["test_accuracy"],
        epochs=epochs,
        seconds=seconds,
        pruning_seconds=report.seconds if report else None,
        num_kept=report.num_kept if report else None,
        effective_sparsity=report.effective_sparsity if report else None,
    )


def read_runs(path: Path) -> list[Run]:
    try:
        return [Run(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []  # the first run will create it
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"{path} does not hold results of this script: {error}")


def complete(runs: list[Run], wanted: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Do the wanted runs that are not among these yet, and add them."""
    missing = [settings for settings in wanted if settings not in [run.settings for run in runs]]
    data = load(options) if missing else ()
    for number, settings in enumerate(missing, start=1):
        at = f" at {100 * settings['pruning']['sparsity']:g}%" if settings["pruning"] else ""
        print(f"[{number} of {len(missing)}] {settings['method']}{at}, seed {settings['seed']}", flush=True)
        run = train(settings, *data)
        print(f"    {run.accuracy:.1%} after {run.seconds:.0f} s", flush=True)
        runs.append(run)
        if options.results:
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(run)) + "\n")


def grouped(runs: Sequence[Run]) -> dict[tuple[float, int], list[Run]]:
    """Put runs together that differ only in their seed, in the order of sparsity and of METHODS: dense first."""
    groups: dict[tuple[float, int], list[Run]] = {}
    for run in runs:
        sparsity = run.settings["pruning"].get("sparsity", 0.0)
        groups.setdefault((sparsity, METHODS.index(run.settings["method"])), []).append(run)
    return dict(sorted(groups.items()))


def print_table(runs: Sequence[Run]) -> None:
    table = Table("sparsity", "method", box=box.HORIZONTALS, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("test\naccuracy", "lowest,\nhighest", "effective\nsparsity", "pruning", "total", "epochs"):
        table.add_column(heading, justify="right")
    last = None
    for (sparsity, method), group in grouped(runs).items():
        if sparsity != last:
            table.add_section()
        accuracies = [100 * run.accuracy for run in group]
        effective = [run.effective_sparsity for run in group if run.effective_sparsity is not None]
        table.add_row(
            f"{100 * sparsity:g}%" if sparsity != last else "",
            METHODS[method],
            f"{mean(accuracies):.1f}%",
            f"{min(accuracies):.1f} {max(accuracies):.1f}",
            f"{mean(effective):.2%}" if effective else "-",
            f"{mean(run.pruning_seconds for run in group):.1f} s" if sparsity else "-",
            f"{mean(run.seconds for run in group):.0f} s",
            str(group[0].epochs),
        )
        last = sparsity
    Console().print(table)


def save_figure(runs: Sequence[Run], title: str, path: Path) -> None:
    """Draw a line through the mean accuracies of each method, with whiskers from the worst seed to the best."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    groups = grouped(runs)
    counts = {100 * (1 - sparsity): group[0].num_kept for (sparsity, _), group in groups.items() if sparsity}
    apart = max(1.02, (max(counts) / min(counts)) ** 0.018) if counts else 1.0  # so that no whisker hides another
    for place, (colour, marker) in enumerate(STYLES[: len(CALLBACKS)], start=1):
        own = {sparsity: group for (sparsity, method), group in groups.items() if method == place}
        percents = [[100 * run.accuracy for run in group] for group in own.values()]
        below = [mean(values) - min(values) for values in percents]
        above = [max(values) - mean(values) for values in percents]
        if own:
            kept = [100 * (1 - sparsity) * apart ** (place - 3) for sparsity in own]
            style = {"color": colour, "marker": marker, "capsize": 3, "label": METHODS[place]}
            axes.errorbar(kept, [mean(values) for values in percents], (below, above), **style)
    if dense := groups.get((0.0, 0)):
        axes.axhline(100 * mean(run.accuracy for run in dense), color=GREY, linestyle="--", label="dense", zorder=0)
    axes.set(xscale="log", xlabel="weights kept", ylabel="test accuracy (%)", title=title)
    axes.set_xticks(list(counts), [f"{percent:.3g}%\n{count:,}" for percent, count in counts.items()])
    axes.set_xticks([], minor=True)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=200)


def count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--data DIR] [options]",
        description="Compare dense training with pruning by magnitude, SNIP, SynFlow, DRIVE and IMP.",
    )
    add = parser.add_argument
    add("--data", metavar="DIR", type=Path, help="folder that holds CIFAR-10 (default: scikit-learn's digits)")
    add("--download", action="store_true", help="fetch CIFAR-10 into that folder if it is not there")
    add("--train-images", metavar="N", type=count, help="train on so many images only")
    add("--test-images", metavar="N", type=count, help="test on so many images only")
    add("--methods", metavar="NAME", nargs="+", choices=METHODS, default=METHODS, help=", ".join(METHODS))
    add("--sparsity", metavar="S", type=float, nargs="+", default=[0.9, 0.95, 0.98], help="fractions to remove")
    add("--seeds", metavar="N", type=int, nargs="+", default=[0, 1], help="one run for each (default: 0 1)")
    add("--epochs", metavar="N", type=count, default=20, help="of every network that is tested (default: 20)")
    add("--batch-size", metavar="N", type=count, default=64, help="images in a step (default: 64)")
    add("--warmup-epochs", metavar="N", type=int, default=3, help="DRIVE's dense epochs (default: 3)")
    add("--rounds", metavar="N", type=count, default=100, help="DRIVE's pruning rounds (default: 100)")
    add("--cycles", metavar="N", type=count, help="IMP's cycles (default: as many as keep about 37%% each)")
    add("--epochs-per-cycle", metavar="N", type=count, default=10, help="epochs of each of them (default: 10)")
    add("--control", choices=("none", "shuffle", "reinit"), default="none", help="shuffle masks, or redraw weights")
    add("--results", metavar="FILE", type=Path, help="file that finished runs go to; what it has is not done again")
    add("--show", action="store_true", help="only show what --results has")
    add("--output", metavar="FIGURE", type=Path, help="file for a figure, such as methods.png")
    options = parser.parse_args(argv)
    if not all(0 < sparsity < 1 for sparsity in options.sparsity):
        parser.error("argument --sparsity: these are fractions to remove, between 0 and 1")
    if "DRIVE" in options.methods and not 0 <= options.warmup_epochs < options.epochs:
        parser.error("argument --warmup-epochs: must be at least 0 and less than --epochs")
    if min(options.seeds) < 0:
        parser.error("argument --seeds: must be at least 0")
    if options.output and options.output.suffix not in (".png", ".svg", ".pdf"):
        parser.error("argument --output: must end in .png, .svg or .pdf")
    for path in (options.results, options.output):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"there is no folder {path.parent} for {path.name}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of devices
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # Lightning 2.6 with torch 2.15
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the images are in memory

    wanted = all_settings(options)
    runs = read_runs(options.results) if options.results else []
    if not options.show:
        complete(runs, wanted, options)
    runs = [run for run in runs if run.settings in wanted]
    if not runs:
        sys.exit("There is no finished run with these settings to show; name their file by --results.")
    print_table(runs)
    if options.output:
        control = "" if options.control == "none" else f" (control: {options.control})"
        save_figure(runs, f"Pruning methods on {'CIFAR-10' if options.data else 'digits'}{control}", options.output)


if __name__ == "__main__":
    main()
