"""The options and help of the command ``lightning-drive``, and the errors for words that are no options of it.

Nothing is imported here but the standard library: torch takes seconds, and the help must not wait for it. What the
commands do is in ``command_plan`` and ``command_files``, which are imported when a command runs.
"""

import argparse
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
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

_SHELLS = ("bash", "zsh", "fish", "tcsh")

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


def run(words: Sequence[str]) -> int:
    """Run the command line, and return the exit status; exit after help, and for wrong arguments."""
    parser = _parser()
    _check_options(parser, words)
    known, rest = parser.parse_known_args(words)
    settings = vars(known)
    command = settings.pop("command", None)
    if rest:
        (command or parser).error(f"unrecognized arguments: {' '.join(rest)}")
    if command is None:
        parser.print_help(sys.stderr)
        return 2
    settings.pop("run")(**settings)
    return 0


class _Parser(argparse.ArgumentParser):
    """Prints errors in one line, and knows its options and commands."""

    def __init__(self, **settings: Any) -> None:
        self.options: list[str] = []
        self.paths: list[argparse.Action] = []
        self.commands: dict[str, _Parser] = {}
        super().__init__(**settings, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Add an argument, and note its names, and whether it is a path."""
        argument = super().add_argument(*names, **settings)
        self.options += argument.option_strings
        self.paths += [argument] if argument.type is Path else []
        return argument

    def knows(self, option: str) -> bool:
        """Whether an option, which may be cut short or have a value, is one of this parser."""
        name = option.partition("=")[0]
        return any(known == name or (name[:2] == "--" and known.startswith(name)) for known in self.options)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit."""
        self.exit(2, f"{self.prog}: error: {message} (`{self.prog} --help` has more)\n")


class _PrintCompletion(argparse.Action):
    """Prints what makes a shell complete the command, and exits."""

    def __call__(self, parser: Any, namespace: object, shell: Any, option: str | None = None) -> None:
        """Print the script for a shell."""
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error(f"`{option}` needs shtab: `pip install shtab`.")
        for command in parser.commands.values():
            for argument in command.paths:
                argument.complete = shtab.FILE
        print(shtab.complete(parser, shell))
        parser.exit()


def _check_options(parser: _Parser, words: Sequence[str]) -> None:
    """Exit with an error for an option that does not belong where it stands, and name the place or the option meant."""
    place = next((index for index, word in enumerate(words) if word in parser.commands), len(words))
    before, after = words[:place], words[place + 1 :]
    command = parser.commands[words[place]] if place < len(words) else parser
    for option in _unknown(before, parser):
        if command is not parser and command.knows(option):
            line = shlex.join(["lightning-drive", words[place], *after, *before])
            parser.error(f"`{option}` is an option of `{words[place]}` and comes after it: `{line}`.")
        parser.error(f"unrecognized arguments: {option}.{_hint(option, parser, parser)}")
    if unknown := _unknown(after, command):
        hints = "".join(_hint(option, command, parser) for option in unknown)
        command.error(f"unrecognized arguments: {' '.join(unknown)}.{hints}")


def _unknown(words: Sequence[str], parser: _Parser) -> list[str]:
    """List the options among words that a parser does not know, without their values; ``--`` ends the options."""
    options = itertools.takewhile(lambda word: word != "--", words)
    names = [word.partition("=")[0] for word in options if re.match("--?[a-zA-Z]", word)]
    return [name for name in names if not parser.knows(name)]


def _hint(option: str, parser: _Parser, top: _Parser) -> str:
    """Name the commands that have an option, or else the option of a parser that is most like it."""
    homes = [f"`{name}`" for name, command in top.commands.items() if command.knows(option)]
    if homes:
        return f" `{option}` is an option of {' and '.join(homes)}, and comes after that word."
    if top.knows(option):
        return f" `lightning-drive {option}` stands alone."
    meant = "".join(f" Did you mean `{close}`?" for close in get_close_matches(option, parser.options, n=1))
    if "--set" in parser.options:
        meant += f" Arguments of the callback are given as `--set {option.lstrip('-').replace('-', '_')}=VALUE`."
    return meant


def _parser() -> _Parser:
    """Return the parser of the whole command line."""
    parser = _Parser(prog="lightning-drive", description=_ABOUT, epilog=_EXAMPLES)
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        choices=_SHELLS,
        help="print a script with which a shell completes this command; needs shtab",
    )
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    def add(name: str, run: Callable[..., None], about: str, summary: str) -> _Parser:
        parser.commands[name] = command = commands.add_parser(name, help=summary, description=about)
        command.set_defaults(run=run, command=command)
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
