"""The parts of a run, joined by LightningCLI: an experiment, a protocol and a callback that prunes."""

import sys
from argparse import ArgumentError, ArgumentTypeError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from lightning_drive import Magnitude
from lightning_drive.callbacks.hooks import PruningCallback
from lightning_drive.cli import OneLineErrorsCLI
from lightning_drive.core.arguments import Control
from lightning_drive.warmup import WarmupPruningCallback

CONFIGS = Path(__file__).parent / "configs"


@dataclass
class Protocol:
    """The epochs of an experiment in the paper.

    Args:
        epochs: Epochs of the network that is tested.
        warmup_epochs: The dense ones of these, before DRIVE prunes.
        cycles: IMP's cycles before all of these.
        epochs_per_cycle: Epochs in each cycle.

    """

    epochs: int
    warmup_epochs: int
    cycles: int
    epochs_per_cycle: int


class MagnitudePruningCallback(WarmupPruningCallback):
    """Keep the largest initial weights, an example of a callback for any method.

    Args:
        sparsity: Fraction of the prunable weights to remove, in [0, 1).
        warmup_epochs: Dense epochs before pruning.
        control: For comparison: shuffle the masks, or train from new initial values of the survivors.

    """

    def __init__(self, *, sparsity: float, warmup_epochs: int = 0, control: Control = "none") -> None:
        super().__init__(
            Magnitude(),
            sparsity=sparsity,
            warmup_epochs=warmup_epochs,
            schedule="exponential",
            scope="global",
            include=None,
            exclude=None,
            loss_fn=None,
            bn_batches=20,
            reset_best=True,
            control=control,
        )


class PaperCLI(OneLineErrorsCLI):
    """LightningCLI with a protocol, from which the pruning callback takes the numbers that it needs."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(Protocol, "protocol")
        parser.add_subclass_arguments(PruningCallback, "pruning", required=False, help="the callback that prunes")
        parser.add_argument("--dense_first", type=bool, default=False, help="prune after `protocol.warmup_epochs`")
        parser.add_argument("--as_long_as_imp", type=bool, default=False, help="add the epochs of IMP's cycles")
        explained = "the fraction of all epochs after which gradual pruning is over"
        parser.add_argument("--prune_until", type=float | None, default=None, help=explained)
        when = ("dense_first", "protocol.warmup_epochs")
        parser.link_arguments(when, "pruning.init_args.warmup_epochs", lambda dense_first, epochs: dense_first * epochs)
        parser.link_arguments("protocol.cycles", "pruning.init_args.cycles")
        parser.link_arguments("protocol.epochs_per_cycle", "pruning.init_args.epochs_per_cycle")
        end = ("protocol", "as_long_as_imp", "prune_until")
        parser.link_arguments(end, "pruning.init_args.end_epoch", last_cut)

    def before_instantiate_classes(self) -> None:
        """Set the number of epochs, which follows from the protocol."""
        config = self._own_config(self.config)
        epochs = all_epochs(config.protocol, config.pruning, config.as_long_as_imp)
        if config.trainer.max_epochs not in (None, epochs):
            raise ArgumentError(
                None,
                f"`trainer.max_epochs` must be {epochs}, which follows from the protocol, got"
                f" {config.trainer.max_epochs}. Set `--protocol.epochs`, to which those of IMP's cycles are added.",
            )
        config.trainer.max_epochs = epochs

    def instantiate_classes(self) -> None:
        """Raise what the class of the images raises, without what jsonargparse says about it."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if isinstance(error.__cause__, MisconfigurationException):
                raise error.__cause__ from None
            raise

    def after_instantiate_classes(self) -> None:
        """Prune first, before other callbacks."""
        config = self._own_config(self.config_init)
        if config.pruning is not None:
            self.trainer.callbacks.insert(0, config.pruning)

    def _own_config(self, config: Namespace) -> Namespace:
        return config.get(self.subcommand, config) if self.subcommand else config


def all_epochs(protocol: Namespace, pruning: Namespace | None, as_long_as_imp: bool) -> int:
    """Return the number of epochs of the tested network, with those of IMP's cycles before."""
    has_cycles = pruning is not None and "cycles" in pruning.init_args
    return protocol.epochs + protocol.cycles * protocol.epochs_per_cycle * (has_cycles or as_long_as_imp)


def last_cut(protocol: Namespace, as_long_as_imp: bool, prune_until: float | None) -> int | None:
    """Return the epoch of gradual pruning's last cut; ``None`` is the default of the callback."""
    return None if prune_until is None else round(prune_until * all_epochs(protocol, None, as_long_as_imp))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print one line and exit if a setting is wrong or images cannot be read."""
    try:
        yield
    except MisconfigurationException as error:
        sys.exit(f"error: {error}")


def config_file(name: str) -> Path:
    """Return the file of an experiment or a method, which is a path or a name in `configs/`."""
    return Path(name) if name.endswith(".yaml") else CONFIGS / f"{name}.yaml"


def config_name(name: str) -> str:
    """Return what results call an experiment or a method.

    Example:
        >>> config_name("drive"), config_name("my/method.yaml")
        ('drive', 'method')

    """
    return config_file(name).name.removesuffix(".yaml")


def experiment(name: str) -> str:
    """Return the name or path of a configuration; raise for argparse if there is none, or another one of its name."""
    file, known = config_file(name), config_file(config_name(name))
    if not file.is_file():
        raise ArgumentTypeError(f"invalid choice: {name!r} is neither the path of a YAML file nor one of {CONFIGS}")
    if config_name(name) == "dense" or (known.is_file() and not file.samefile(known)):
        raise ArgumentTypeError(f"{name!r} is called as another one, and results know it by its name: rename the file")
    return name


def method(name: str) -> str:
    """Return the name or path of a method, or ``dense``; raise for argparse as `experiment` does."""
    return name if name == "dense" else experiment(name)


def find_configs(args: Sequence[str]) -> list[str]:
    """Replace names of files that are in `configs/` and not in the current folder by their paths."""
    resolved = list(args)
    for place, name in enumerate(args):
        option, _, value = name.rpartition("=")
        is_config = option in ("--config", "-c") or (not option and place > 0 and args[place - 1] in ("--config", "-c"))
        if is_config and not Path(value).exists() and (CONFIGS / value).is_file():
            resolved[place] = f"{option}={CONFIGS / value}" if option else str(CONFIGS / value)
    return resolved
