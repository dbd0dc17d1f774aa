"""The results file: a JSON line for every finished run, which `run.py` appends and `tables.py` reads."""

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import IO, Any, Literal, TypeVar, get_args, get_type_hints

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

Control = Literal["none", "shuffle", "reinit"]
Key = tuple[str, str, str, float, int]


class Titles(dict[str, str]):
    """Titles by name; one without a title, such as the name of a file of one's own, is its own title."""

    def __missing__(self, name: str) -> str:
        return name

    def of(self, names: Iterable[str]) -> list[str]:
        """Return the different names: those with a title in the order of titles, then the others as they come."""
        given = dict.fromkeys(names)
        return [*(name for name in self if name in given), *(name for name in given if name not in self)]


EXPERIMENTS = Titles(
    {
        "alexnet_cifar10": "AlexNet, CIFAR-10",
        "vgg16_cifar10": "VGG-16, CIFAR-10",
        "resnet18_cifar10": "ResNet-18, CIFAR-10",
        "vgg16_cifar100": "VGG-16, CIFAR-100",
        "resnet18_cifar100": "ResNet-18, CIFAR-100",
        "vgg16_tinyimagenet": "VGG-16, Tiny ImageNet",
        "resnet18_tinyimagenet": "ResNet-18, Tiny ImageNet",
        "resnet18_imagenet32": "ResNet-18, ImageNet at 32x32",
        "convnet_cifar10": "Small ConvNet, CIFAR-10 (our own protocol)",
        "convnet_cifar10_full": "Small ConvNet, all of CIFAR-10 (our own protocol)",
        "digits": "Small network, digits (our own protocol)",
    }
)
METHODS = Titles(
    {
        "dense": "dense",
        "magnitude": "Magnitude",
        "snip": "SNIP",
        "synflow": "SynFlow",
        "drive": "DRIVE",
        "imp": "IMP",
        "iterative_snip": "iterative SNIP",
        "warmup_snip": "warm-up + SNIP",
        "warmup_synflow": "warm-up + SynFlow",
        "drive_long": "DRIVE, as long as IMP",
        "gradual": "gradual",
        "gradual_exponential": "gradual, exponential",
        "gradual_drive": "gradual by DRIVE's score",
        "gradual_drive_exponential": "gradual by DRIVE's score, exponential",
        "gradual_exponential_half": "gradual, exponential, until 50% of the run",
        "gradual_exponential_late": "gradual, exponential, until 80% of the run",
        "gradual_long": "gradual, as long as IMP",
        "gradual_exponential_long": "gradual, exponential, as long as IMP",
    }
)
CONTROLS = get_args(Control)
PAPER_ROUNDS = 100  # of DRIVE
SECONDS = ("warmup", "pruning", "training")
KINDS: dict[Any, Any] = {  # annotation of a field to its types in JSON
    str: str,
    int: int,
    float: float | int,
    float | None: float | int | None,
    Control: str,
    dict[str, float]: dict,
    dict[str, str]: dict,
    list[str]: list,
}


@dataclass(frozen=True)
class Run:
    """The result of one network, as in its line.

    Args:
        experiment: A key of `EXPERIMENTS`, or the name of a file of one's own.
        method: A key of `METHODS`, or likewise.
        control: What was changed in masks or weights before training, to see whether they matter.
        sparsity: Fraction of the weights to remove; 0 for a dense network.
        seed: Seed of the run.
        data: Name of the images.
        train_images: Number of images to train on.
        test_images: Number of images to test on.
        batch_size: Images in a step.
        epochs: Epochs of the network that is tested, with DRIVE's dense ones.
        total_epochs: The same with IMP's cycles.
        accuracy: Fraction of the test images that it recognises after the last epoch.
        num_weights: Number of weights that pruning may remove.
        num_kept: Number of weights that it left.
        effective_sparsity: Fraction of the weights without effect; `None` if it was not measured.
        seconds: Durations of "warmup", "pruning" (with IMP's cycles) and "training" (after the masks).
        digest: Fingerprint of the masks.
        warnings: The warnings in the report.
        overrides: Arguments that override the configuration files.
        versions: Name of a library to its version.
        hardware: Name of the processor or GPU.
        revision: Git's name for the code.
        date: Day of the run, as in 2026-11-25.

    """

    experiment: str
    method: str
    control: Control
    sparsity: float
    seed: int
    data: str
    train_images: int
    test_images: int
    batch_size: int
    epochs: int
    total_epochs: int
    accuracy: float
    num_weights: int
    num_kept: int
    effective_sparsity: float | None
    seconds: dict[str, float]
    digest: str
    warnings: list[str]
    overrides: list[str]
    versions: dict[str, str]
    hardware: str
    revision: str
    date: str

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Run).items():
            if not isinstance(getattr(self, name), KINDS[hint]):
                raise ValueError(f"`{name}` must be {getattr(hint, '__name__', hint)}, got {getattr(self, name)!r}")
        if self.control not in CONTROLS:
            raise ValueError(f"`control` must be one of {', '.join(CONTROLS)}, got {self.control!r}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"`sparsity` is the fraction removed and must be in [0, 1), got {self.sparsity}")
        if (self.method == "dense") != (self.sparsity == 0):
            raise ValueError(f"`sparsity` must be 0 for a dense run and for no other, got {self.sparsity}")
        if not 0 <= self.accuracy <= 1:
            raise ValueError(f"`accuracy` is a fraction and must be in [0, 1], got {self.accuracy}")
        if set(self.seconds) != set(SECONDS):
            raise ValueError(f"`seconds` must have {', '.join(SECONDS)}, got {', '.join(self.seconds) or 'nothing'}")
        if not all(isinstance(seconds, float | int) and 0 <= seconds < math.inf for seconds in self.seconds.values()):
            raise ValueError(f"`seconds` must be finite numbers of at least 0, got {self.seconds}")

    @property
    def key(self) -> Key:
        """The identity of a run in its file."""
        return self.experiment, self.method, self.control, self.sparsity, self.seed

    @property
    def seconds_to_masks(self) -> float:
        return self.seconds["warmup"] + self.seconds["pruning"]

    @property
    def total_seconds(self) -> float:
        return self.seconds_to_masks + self.seconds["training"]


@dataclass(frozen=True)
class Collapse:
    """A network after a method pruned it at initialisation."""

    experiment: str
    method: str
    sparsity: float
    seed: int
    data: str
    batch_size: int
    num_kept: int
    effective_sparsity: float | None
    empty_layers: list[str]
    overrides: list[str]
    versions: dict[str, str]
    hardware: str
    revision: str
    date: str

    @property
    def is_cut_off(self) -> bool:
        return self.effective_sparsity == 1


@dataclass(frozen=True)
class Speedup:
    """The times measured for an experiment, in seconds, and the speed-up that follows from them."""

    experiment: str
    data: str
    batch_size: int
    steps_per_epoch: int  # with all of the paper's images
    protocol: dict[str, int]
    timed_steps: int
    timed_rounds: int
    seconds_per_step: float
    seconds_per_round: float
    seconds_of_pruning: float  # with as many rounds as were timed
    seconds_per_cut: float
    versions: dict[str, str]
    hardware: str
    revision: str
    date: str

    @property
    def drive(self) -> float:
        """Seconds until DRIVE has its masks."""
        warmup = self.protocol["warmup_epochs"] * self.steps_per_epoch * self.seconds_per_step
        return warmup + self.seconds_of_pruning + (PAPER_ROUNDS - self.timed_rounds) * self.seconds_per_round

    @property
    def imp(self) -> float:
        """Seconds until IMP has its masks."""
        cycle = self.protocol["epochs_per_cycle"] * self.steps_per_epoch * self.seconds_per_step
        return self.protocol["cycles"] * (cycle + self.seconds_per_cut)

    @property
    def limit(self) -> float:
        """IMP's time over DRIVE's if a round cost a step, and everything else nothing."""
        cycles = self.protocol["cycles"] * self.protocol["epochs_per_cycle"] * self.steps_per_epoch
        return cycles / (self.protocol["warmup_epochs"] * self.steps_per_epoch + PAPER_ROUNDS)


Line = TypeVar("Line", Run, Collapse, Speedup)


@dataclass(frozen=True)
class Summary:
    """The mean of runs that differ only in their seed, in percent or seconds."""

    mean: float
    deviation: float | None  # of a sample; None if there is one run
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values))


def accuracies(runs: Sequence[Run]) -> dict[tuple[str, Control, float], Summary]:
    """Summarise the accuracies in percent by method, control and sparsity, in the order of tables and figures."""
    groups: dict[tuple[str, Control, float], list[float]] = {}
    order = METHODS.of(run.method for run in runs)
    for run in sorted(runs, key=lambda run: (order.index(run.method), CONTROLS.index(run.control), run.sparsity)):
        groups.setdefault((run.method, run.control, run.sparsity), []).append(100 * run.accuracy)
    return {key: Summary.of(values) for key, values in groups.items()}


def timed_together(runs: Sequence[Run]) -> list[Run]:
    """Return the runs whose times can be compared: those on the hardware and with the versions that most runs have."""
    circumstances = [(run.hardware, *run.versions.items()) for run in runs]
    [(most, _)] = Counter(circumstances).most_common(1)
    return [run for run, own in zip(runs, circumstances, strict=True) if own == most]


def seconds(runs: Sequence[Run], measure: Callable[[Run], float]) -> dict[str, Summary]:
    """Summarise a time by method; it hardly depends on the sparsity."""
    methods = METHODS.of(run.method for run in runs)
    return {method: Summary.of([measure(run) for run in runs if run.method == method]) for method in methods}


def listed(values: Iterable[object]) -> str:
    """Join the different values in the order of their first appearance."""
    return " or ".join(dict.fromkeys(map(str, values)))


def duration(mean: float, deviation: float | None = None) -> str:
    digits = 0 if mean >= 100 else 1 if mean >= 1 else 2
    spread = "" if deviation is None else f" ± {deviation:,.{digits}f}"
    return f"{mean:,.{digits}f}{spread} s"


def read(paths: Sequence[Path], kind: type[Line]) -> list[Line]:
    """Read every line of some files, in their order."""
    return [line for path in paths for line in read_file(path, kind)]


def append(path: Path, run: Run | Collapse | Speedup) -> None:
    """Append a whole line, even if several processes write to the same file."""
    line = json.dumps(asdict(run), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with path.open("a+b") as file, locked(file):
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) and file.read() != b"\n":
            line = b"\n" + line  # a process was stopped within a line, which must not spoil this one
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def duplicates(runs: Sequence[Run]) -> list[Key]:
    """Return the keys of runs that occur more than once."""
    return [key for key, count in Counter(run.key for run in runs).items() if count > 1]


def read_file(path: Path, kind: type[Line]) -> list[Line]:
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            raise ValueError(f"{path}, line {number}: is incomplete, since its process was stopped: delete this line")
        try:
            lines.append(parse(line, kind))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return lines


def parse(line: bytes, kind: type[Line]) -> Line:
    """Parse a line."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError("is not JSON") from error
    if not isinstance(values, dict):
        raise ValueError("is not a JSON object")
    names = [field.name for field in fields(kind)]
    missing = [name for name in names if name not in values]
    if missing or len(values) > len(names):
        unknown = [name for name in values if name not in names]
        raise ValueError(f"lacks {', '.join(missing) or 'nothing'}, and has unknown {', '.join(unknown) or 'nothing'}")
    return kind(**values)


@contextlib.contextmanager
def locked(file: IO[Any]) -> Iterator[None]:
    """Keep other processes from writing; they wait."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)  # closing the file releases it
    yield
