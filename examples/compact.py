r"""Remove channels that pruning has cut off, and measure the gain: parameters, bytes, time on the CPU.

    python examples/compact.py                                             # scikit-learn's digits: under a minute
    python examples/compact.py --data DIR --network vgg16 --sparsity 0.98 0.993 --output results.jsonl

`DIR` is a tree of images, `DIR/train/<class>/*` and `DIR/test/<class>/*`; networks and data are those of `paper/`. A
network trains densely for a short time, is pruned by each method, trains on for a short time with its masks, and is
compacted. The settings are our own: training is only long enough for BatchNorm and biases to leave their initial
values. The values of a cut-off channel depend on them; which channels are cut off does not.

Times are processor times of forward passes without gradients, on one thread: medians of the masked network and the
compacted one, run in turn in the same process. `docs/compact.md` has results, and what to expect.
"""

import argparse
import copy
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from paper.images import Digits, Images, ImageTree
from paper.networks import NETWORKS, build
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_drive
from lightning_drive import DRIVE, SNIP, Magnitude, Masks, SynFlow, compact, find_masks, save_sparse

METHODS: Mapping[str, Callable[[int], Any]] = {
    "drive": lambda rounds: DRIVE(rounds=rounds),
    "snip": lambda rounds: SNIP(),
    "synflow": lambda rounds: SynFlow(rounds=rounds),
    "magnitude": lambda rounds: Magnitude(),
}
BATCH_SIZES = (1, 128)


@dataclass(frozen=True)
class Result:
    """One network, pruned and compacted; `before` is the masked network, `after` the compacted one."""

    network: str
    data: str
    method: str
    sparsity: float
    seed: int
    weights_kept: int
    warnings: int
    accuracy: tuple[float, float]  # of the dense network before pruning, and of the masked one
    channels: tuple[int, int]
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    dense_bytes: tuple[int, int]
    sparse_bytes: tuple[int, int]
    milliseconds: dict[str, tuple[float, float]]
    time_ratio: dict[str, float]
    difference: float
    settings: dict[str, Any]
    machine: dict[str, Any]


def loss_fn(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


def batches_of(data: Images, generator: torch.Generator, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the training images in a random order, normalised, in full batches."""
    images, labels = data.splits["train"].images, data.splits["train"].labels
    order = torch.randperm(len(images), generator=generator).split(size)
    return [(normalised(images[index], data), labels[index]) for index in order if len(index) == size]


def normalised(images: Tensor, data: Images) -> Tensor:
    """Normalise pixels from 0 to 255 to mean 0 and deviation 1 over the training images, by channel."""
    return (images - data.mean) / data.std


def train(
    network: nn.Module, data: Images, epochs: int, options: argparse.Namespace, masks: Masks | None = None
) -> None:
    """Train by SGD with momentum and weight decay; pruned weights stay zero."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=options.learning_rate, momentum=0.9, weight_decay=options.weight_decay
    )
    network.train()
    for _ in range(epochs):
        for batch in batches_of(data, generator, options.batch_size):
            optimizer.zero_grad()
            loss_fn(network, batch).backward()
            optimizer.step()
            if masks:
                masks.apply_(network)


def estimate_statistics(network: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Estimate BatchNorm's running statistics again, since those from before pruning no longer fit."""
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
    with torch.no_grad():
        for images, _ in batches:
            network.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def accuracy(network: nn.Module, data: Images, count: int = 200) -> float:
    """Return the fraction of ``count`` random test images that are recognised."""
    images, labels = data.splits["test"].images, data.splits["test"].labels
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    with torch.inference_mode():
        return float((network.eval()(normalised(images[some], data)).argmax(1) == labels[some]).float().mean())


def num_channels(network: nn.Module) -> int:
    """Count the output channels and neurons of all layers."""
    return sum(len(weight) for weight in network.parameters() if weight.ndim > 1)


def multiply_adds(network: nn.Module, images: Tensor) -> int:
    """Count dense multiply-adds for one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images[:1])
    return counter.get_total_flops() // 2


def sparse_bytes(network: nn.Module) -> int:
    """Return the size of the network's sparse file in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        save_sparse(network, path)
        return path.stat().st_size


def milliseconds(networks: Sequence[nn.Module], images: Tensor, repeats: int) -> list[list[float]]:
    """Return the processor times of forward passes of all networks in turn, without the first pass of each.

    Unlike wall-clock time, processor time stands still while other processes have the core.
    """
    times: list[list[float]] = [[] for _ in networks]
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for network, own_times in zip(networks, times, strict=True):
                start = time.process_time()
                network(images)
                own_times.append(1000 * (time.process_time() - start))
    return [own_times[1:] for own_times in times]


def measure(masked: nn.Module, small: nn.Module, images: Tensor, repeats: int) -> dict[str, Any]:
    """Compare two networks in eval mode."""
    networks = (masked.eval(), small.eval())
    timed: dict[str, Any] = {"milliseconds": {}, "time_ratio": {}}
    for size in BATCH_SIZES:
        batch = images.repeat(-(-size // len(images)), 1, 1, 1)[:size]
        times = milliseconds(networks, batch, repeats if size > 1 else 10 * repeats)
        timed["milliseconds"][str(size)] = tuple(round(statistics.median(own_times), 3) for own_times in times)
        ratios = [after / before for before, after in zip(*times, strict=True)]
        timed["time_ratio"][str(size)] = round(statistics.median(ratios), 3)
    with torch.inference_mode():
        expected, given = (network(images) for network in networks)
    return {
        **timed,
        "channels": tuple(map(num_channels, networks)),
        "parameters": tuple(sum(weight.numel() for weight in network.parameters()) for network in networks),
        "multiply_adds": tuple(multiply_adds(network, images) for network in networks),
        "dense_bytes": tuple(sum(tensor.nbytes for tensor in network.state_dict().values()) for network in networks),
        "sparse_bytes": tuple(map(sparse_bytes, networks)),
        "difference": float((expected - given).abs().max() / expected.abs().max()),
    }


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_pruning": version("torch-pruning"),
        "lightning_drive": lightning_drive.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def run(options: argparse.Namespace, data: Images) -> Iterator[Result]:
    torch.manual_seed(options.seed)
    dense = build(options.network, num_classes=10)
    train(dense, data, options.epochs, options)
    dense_accuracy = accuracy(dense, data)
    images = normalised(data.splits["test"].images[:128], data)
    generator = torch.Generator().manual_seed(options.seed + 1)
    for method, sparsity in itertools.product(options.method, options.sparsity):
        print(f"Pruning and compacting: {method}, {100 * sparsity:g}% sparse", file=sys.stderr)
        masked = copy.deepcopy(dense)
        batches = batches_of(data, generator, options.batch_size)
        with warnings.catch_warnings(record=True) as caught:
            masks = find_masks(
                masked, METHODS[method](options.rounds), sparsity=sparsity, batches=batches, loss_fn=loss_fn
            )
        masks.apply_(masked)
        estimate_statistics(masked, batches[:5])
        train(masked, data, options.sparse_epochs, options, masks)
        small = compact(masked, images[:2])
        yield Result(
            network=options.network,
            data=data.name,
            method=method,
            sparsity=sparsity,
            seed=options.seed,
            weights_kept=masks.num_kept,
            warnings=len(caught),
            accuracy=(dense_accuracy, accuracy(masked, data)),
            settings={
                name: getattr(options, name)
                for name in ("epochs", "sparse_epochs", "rounds", "batch_size", "learning_rate", "weight_decay")
            }
            | {"train_images": len(data.splits["train"])},
            machine=machine(),
            **measure(masked, small, images, options.repeats),
        )


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return two tables of the results in Markdown: of what is left, and of bytes and times."""
    times = [f"time, batch of {size}" for size in BATCH_SIZES]
    left = [["accuracy", "channels", "parameters", "multiply-adds"], *map(_left, results)]
    costs = [["dense kB", "sparse kB", *times], *map(_costs, results)]
    names = [["network", "pruned by", "sparsity"]]
    names += [[row["network"], row["method"], f"{100 * row['sparsity']:g}%"] for row in results]
    return "\n\n".join(
        _markdown([[*name, *cells] for name, cells in zip(names, part, strict=True)]) for part in (left, costs)
    )


def _left(row: Mapping[str, Any]) -> list[str]:
    channels, channels_left = row["channels"]
    parameters, left = row["parameters"]
    adds, adds_left = row["multiply_adds"]
    return [
        " → ".join(f"{fraction:.0%}" for fraction in row["accuracy"]),
        f"{channels:,} → {channels_left:,}",
        f"{parameters:,} → {left:,} ({left / parameters:.0%})",
        f"{adds / 1e6:,.1f} M → {adds_left / 1e6:,.1f} M ({adds_left / adds:.0%})",
    ]


def _costs(row: Mapping[str, Any]) -> list[str]:
    """Return kilobytes, and ratios of times beside the time of the masked network: they are medians of pairs."""
    sizes = [" → ".join(f"{size / 1000:,.0f}" for size in row[key]) for key in ("dense_bytes", "sparse_bytes")]
    times = [
        f"{row['time_ratio'][size]:.2f} of {row['milliseconds'][size][0]:,.1f} ms" for size in map(str, BATCH_SIZES)
    ]
    return [*sizes, *times]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    sides = ["---", "---", *["---:"] * (len(head) - 2)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, sides, *others])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the gain of removing cut-off channels.")
    parser.add_argument("--data", help="folder with train/ and test/ (default: scikit-learn's digits)")
    parser.add_argument("--data-name", help="name of the data (default: that of the folder)")
    parser.add_argument("--network", choices=list(NETWORKS), help="default: convnet with --data, or else digitnet")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=["drive", "synflow", "magnitude"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.98, 0.993], help="fraction to remove")
    parser.add_argument("--rounds", type=int, default=100, help="rounds of DRIVE and SynFlow (default: 100)")
    parser.add_argument("--epochs", type=int, default=2, help="dense epochs before pruning (default: 2)")
    parser.add_argument("--sparse-epochs", type=int, default=1, help="epochs after pruning (default: 1)")
    parser.add_argument("--train-images", type=int, help="number of images to train on (default: all)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed passes of large batches; single images have ten times as many"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file of JSON lines to append the results to")
    parser.add_argument("--table", type=Path, nargs="+", help="only print the table of these files")
    options = parser.parse_args(argv)

    if options.table:
        print(table([json.loads(line) for path in options.table for line in path.read_text().splitlines()]))
        return
    options.network = options.network or ("convnet" if options.data else "digitnet")
    limit = {"train_images": options.train_images}
    data: Images = ImageTree(options.data, name=options.data_name, **limit) if options.data else Digits(**limit)
    if (options.network == "digitnet") != (not options.data):
        parser.error("digitnet is for the digits; the other networks are for colour images, given by `--data`")
    torch.set_num_threads(1)  # so that ratios of times do not depend on how many cores are free
    try:
        data.prepare_data()
        data.setup("fit")
    except MisconfigurationException as error:
        sys.exit(str(error))
    results = []
    for result in run(options, data):
        results.append(asdict(result))
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
