"""The command ``lightning-drive``: its options and help, and how errors are printed.

Nothing is imported here but the standard library: torch takes seconds, and the help must not wait for it. What the
commands do is in ``command_plan`` and ``command_files``, which are imported when a command runs.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_drive import __version__

_CALLBACKS = {
    "drive": "DRIVEPruningCallback",
    "snip": "SNIPPruningCallback",
    "synflow": "SynFlowPruningCallback",
    "imp": "IMPPruningCallback",
    "gradual": "GradualPruningCallback",
}

_ABOUT = """\
For checkpoints of PyTorch Lightning that were pruned by lightning_drive.

Pruning sets most weights of a network to exactly 0. A checkpoint stores each
of these zeros like any other number; a sparse file stores one bit for it.
"""

_EXAMPLES = """\
examples:
  lightning-drive plan mymodels:ResNet --sparsity 0.98
  lightning-drive report last.ckpt
  lightning-drive compress last.ckpt model.safetensors
  lightning-drive expand model.safetensors dense.ckpt

`lightning-drive COMMAND --help` describes a command.
"""

_ABOUT_PLAN = """\
Print what a callback would prune of a module, when, and at what cost.
Nothing is trained or changed.

Prunable are the weights of all layers that multiply by them: linear,
convolutional, attention and recurrent ones. Biases, norms and embeddings are
not. The table lists all parameters, and which stay dense.
"""

_ABOUT_REPORT = """\
Print what was pruned: the fraction of every layer that is left, the cost of the
network now, and the time that pruning took. Needs neither model nor data.

If the file has no report, the zeros in its tensors are counted instead. What
torch.nn.utils.prune stored as NAME_orig and NAME_mask counts as one weight.
"""

_ABOUT_COMPRESS = """\
Write the weights of a checkpoint as a sparse file: one bit for each weight,
which is 0 if the weight is 0, and the exact values of all other weights.
It is a safetensors file, and loading it runs no code. Needs safetensors.

What torch.nn.utils.prune stored as NAME_orig and NAME_mask is written as NAME,
with its zeros: it loads into the network without masks.

Kept besides the weights: the report of the pruning, hyper-parameters, and what
`on_save_checkpoint` added, as far as JSON can hold it; the rest is named.
Left out is the state of training: optimizers, learning-rate schedulers, loops
and callbacks. Keep the checkpoint to continue its run.
"""

_ABOUT_EXPAND = """\
Write a sparse file as a checkpoint again, with every zero in it. It is made for
`load_from_checkpoint`, and for `ckpt_path` of `trainer.test` and `predict`.
Training cannot continue from it.

In Python, `lightning_drive.load_sparse(PATH)` returns the weights directly.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after ``lightning-drive``; by default those of this process.

    Returns:
        The exit status: 0, or 2 for an error, which is one line on the error stream; without arguments it is the help.

    """
    parser = _parser()
    known, unknown = parser.parse_known_args(arguments)
    settings = vars(known)
    command = settings.pop("parser", parser)
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    run: Callable[..., None] | None = settings.pop("run", None)
    if run is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        run(**settings)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = None
    except (OSError, ValueError, TypeError, ModuleNotFoundError, RuntimeError) as error:  # torch raises the last one
        print(f"lightning-drive: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Prints errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (`{self.prog} --help` has more)\n")


def _parser() -> argparse.ArgumentParser:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="lightning-drive", description=_ABOUT, epilog=_EXAMPLES, formatter_class=keep_lines)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    def add(name: str, run: Callable[..., None], about: str, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=about, formatter_class=keep_lines)
        command.set_defaults(run=run, parser=command)
        return command

    plan = add("plan", _plan, _ABOUT_PLAN, "before training: what would be pruned, when, and at what cost")
    plan.add_argument(
        "module",
        metavar="MODULE",
        help="PACKAGE.MODULE:NAME of a torch module, or of a class or function that returns one without arguments, such"
        " as torchvision.models:resnet18; also from the current folder",
    )
    plan.add_argument(
        "--sparsity",
        metavar="FRACTION",
        action="append",
        required=True,
        help="fraction of the prunable weights to remove, from 0 to less than 1; 0.98 keeps 2%% of them. Or"
        ' PATTERN=FRACTION, such as "encoder.*=0.9", for the parameters that a glob pattern matches; may then be'
        ' repeated: the first pattern that matches decides, and "*=FRACTION" is for the rest',
    )
    plan.add_argument(
        "--method",
        choices=_CALLBACKS,
        default="drive",
        help="method to prune by (default: drive, DRIVEPruningCallback)",
    )
    plan.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="NAME=VALUE",
        help="another argument of the callback, such as rounds=50 or \"exclude=['fc.*']\"; a function is"
        " PACKAGE.MODULE:NAME; may be repeated",
    )
    plan.add_argument("--max-epochs", metavar="N", type=int, help="epochs of the whole run, to compare pruning with it")
    plan.add_argument(
        "--steps-per-epoch", metavar="N", type=int, help="training steps in an epoch, for the same comparison"
    )

    a_checkpoint = "a checkpoint of Lightning, or a saved state_dict"
    report = add("report", _report, _ABOUT_REPORT, "after training: what was pruned")
    report.add_argument(
        "checkpoint",
        metavar="CKPT",
        type=Path,
        help=f"{a_checkpoint}; or a sparse file",
    )
    report.add_argument("--json", action="store_true", dest="as_json", help="print JSON")

    compress = add("compress", _compress, _ABOUT_COMPRESS, "write a checkpoint's weights as a sparse file")
    compress.add_argument("checkpoint", metavar="CKPT", type=Path, help=a_checkpoint)
    compress.add_argument("out", metavar="OUT", type=Path, help="the sparse file to write")

    expand = add("expand", _expand, _ABOUT_EXPAND, "write a sparse file as a checkpoint again")
    expand.add_argument("sparse", metavar="SPARSE", type=Path, help="a sparse file, of `compress` or of `save_sparse`")
    expand.add_argument("out", metavar="OUT", type=Path, help="the checkpoint to write")

    for command in (report, compress):
        command.add_argument(
            "--trust-pickle",
            action="store_true",
            help="load CKPT with all that was pickled into it, such as hyper-parameters of any class. This RUNS CODE"
            " FROM THE FILE: set it only for files from a source that you trust. Without it, no code is run, and such"
            " a file is an error",
        )
    for command in (compress, expand):
        command.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    return parser


def _plan(method: str, **settings: Any) -> None:
    from lightning_drive import command_plan

    command_plan.plan(callback=_CALLBACKS[method], **settings)


def _report(**settings: Any) -> None:
    from lightning_drive import command_files

    command_files.report(**settings)


def _compress(**settings: Any) -> None:
    from lightning_drive import command_files

    command_files.compress(**settings)


def _expand(**settings: Any) -> None:
    from lightning_drive import command_files

    command_files.expand(**settings)


if __name__ == "__main__":
    sys.exit(main())
