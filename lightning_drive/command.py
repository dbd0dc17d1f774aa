"""The command ``lightning-drive``: what is in a checkpoint, and how to make it small and whole again.

Nothing here imports more than the standard library before it is needed.
"""

import argparse
import ast
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_drive import __version__

if TYPE_CHECKING:
    from lightning_drive.report.pruning_report import PruningReport

_VERSION = "pytorch-lightning_version"

_CALLBACKS = {
    "drive": "DRIVEPruningCallback",
    "snip": "SNIPPruningCallback",
    "synflow": "SynFlowPruningCallback",
    "imp": "IMPPruningCallback",
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

`lightning-drive COMMAND --help` says more about one of them.
"""

_ABOUT_PLAN = """\
Print what a callback would prune of a module, when, and what that would cost.
Nothing is trained or changed.

Prunable are the weights of all layers that multiply by them: linear,
convolutional, attention and recurrent ones. Biases, norms and embeddings are
not. The table lists all parameters, and which stay dense.
"""

_ABOUT_REPORT = """\
Print what was pruned: which fraction of every layer is left, what the network
costs now, and where the time went. Needs neither the model nor its data.

Where the file has no report, the zeros in its tensors are counted instead.
"""

_ABOUT_COMPRESS = """\
Write the weights of a checkpoint as a sparse file: one bit for each weight,
which says whether it is 0, and the values of the others, exactly as they are.
It is a safetensors file, and loading it runs no code. Needs safetensors.

Kept beside the weights: the report of the pruning, hyper-parameters, and what
`on_save_checkpoint` added, as far as JSON can hold it. What it cannot is named.
Left out is what only training needs: optimizers, learning-rate schedulers,
loops and callbacks. Keep the checkpoint if its run is to go on.
"""

_ABOUT_EXPAND = """\
Write a sparse file as a checkpoint again, with every zero in it. It is made for
`load_from_checkpoint`, and for `ckpt_path` of `trainer.test` and `predict`.
Training cannot go on from it.

In Python, `lightning_drive.load_sparse(PATH)` gives the weights directly.
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
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (`{self.prog} --help` says more)\n")


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
        help="PACKAGE.MODULE:NAME of a torch module, or of a class or function that gives one without arguments, such"
        " as torchvision.models:resnet18; also from the current folder",
    )
    plan.add_argument(
        "--sparsity",
        metavar="FRACTION",
        type=float,
        required=True,
        help="fraction of the prunable weights to remove, from 0 to less than 1; 0.98 keeps 2%% of them",
    )
    plan.add_argument(
        "--method", choices=_CALLBACKS, default="drive", help="which callback (default: drive, DRIVEPruningCallback)"
    )
    plan.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="NAME=VALUE",
        help="another argument of the callback, such as rounds=50 or \"exclude=['fc.*']\"; may be repeated",
    )
    plan.add_argument(
        "--max-epochs", metavar="N", type=int, help="epochs of the whole run, to say which part of it pruning takes"
    )
    plan.add_argument("--steps-per-epoch", metavar="N", type=int, help="training steps in each epoch, for the same")

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
            " FROM THE FILE: give it only for files from a source that you trust. Without it, no code is run, and such"
            " a file is refused",
        )
    for command in (compress, expand):
        command.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    return parser


def _compress(checkpoint: Path, out: Path, overwrite: bool, trust_pickle: bool) -> None:
    from lightning_drive.export import checkpoint_metadata, checkpoints, sparse_writer

    _check_free(out, checkpoint, overwrite)
    content = _loaded(checkpoint, trust_pickle)
    state_dict = checkpoints.state_dict_of(content, checkpoint)
    rest = checkpoint_metadata.packed(content)
    sparse_writer.save_sparse(state_dict, out, metadata=rest.metadata)

    weights = sum({tensor.data_ptr(): tensor.nbytes for tensor in state_dict.values()}.values())
    size = out.stat().st_size
    before = checkpoint.stat().st_size
    print(f"{checkpoint}: {before:,} bytes, of which {weights:,} are weights and buffers")
    print(
        f"{out}: {size:,} bytes, {size / max(1, weights):.2%} of the weights and {size / before:.2%} of the checkpoint"
    )
    if size - sum(map(len, rest.metadata.values())) >= weights:
        print("Nothing was gained: no tensor has enough zeros. Was the checkpoint saved after pruning?")
    if rest.hyper_parameters_left_out:
        print(
            f"Hyper-parameters that JSON cannot hold are left out: {', '.join(rest.hyper_parameters_left_out)}. Give"
            " them to `load_from_checkpoint` again."
        )
    if rest.entries_left_out:
        print(
            f"Entries that JSON cannot hold are left out: {', '.join(rest.entries_left_out)}. If your"
            " `on_load_checkpoint` reads them, it must do without."
        )


def _expand(sparse: Path, out: Path, overwrite: bool) -> None:
    import torch

    from lightning_drive.export import checkpoint_metadata, files, sparse_reader

    _check_free(out, sparse, overwrite)
    state_dict, metadata = sparse_reader.load_with_metadata(sparse)
    checkpoint = checkpoint_metadata.unpacked(metadata, sparse)
    checkpoint[_VERSION] = _current(checkpoint.get(_VERSION))
    with files.replacing(out) as temporary:
        torch.save({**checkpoint, "state_dict": state_dict}, temporary)

    hyper_parameters = checkpoint.get("hyper_parameters")
    names = ", ".join(hyper_parameters if isinstance(hyper_parameters, dict) else ()) or "none"
    print(f"{out}: {out.stat().st_size:,} bytes, {len(state_dict)} tensors, hyper-parameters: {names}")


def _report(checkpoint: Path, as_json: bool, trust_pickle: bool) -> None:
    from lightning_drive.export import checkpoint_metadata, checkpoints, sparse_reader

    is_sparse = checkpoints.is_safetensors(checkpoint)
    if is_sparse:
        content = checkpoint_metadata.unpacked(sparse_reader.read_metadata(checkpoint), checkpoint)
    else:
        content = _loaded(checkpoint, trust_pickle, needs_weights=False)
    callback, values = checkpoints.pruning_in(content)
    report = _report_of(values, checkpoint)
    zeros: list[dict[str, Any]] = []
    if not report:
        whole = _loaded(checkpoint, trust_pickle) if checkpoint.is_dir() else content  # or say that it is in parts
        zeros = _zeros(
            sparse_reader.load_sparse(checkpoint) if is_sparse else checkpoints.state_dict_of(whole, checkpoint)
        )
    if as_json:
        found = {"callback": callback or None, "report": report.to_dict() if report else None}
        print(json.dumps(found if report else {**found, "tensors": zeros}, indent=2))
    elif report:
        print(report)
    else:
        reason = f"{callback} had not pruned yet" if callback else "no pruning callback was saved in it"
        print(f"No report in {checkpoint}: {reason}. These are the zeros in all parameters and buffers:")
        print("\n".join(_table(zeros)))


def _loaded(checkpoint: Path, trust_pickle: bool, *, needs_weights: bool = True) -> dict[str, Any]:
    from lightning_drive.export import checkpoints

    if not trust_pickle:
        return checkpoints.load(checkpoint, needs_weights=needs_weights)
    with _current_folder():
        return checkpoints.load(checkpoint, needs_weights=needs_weights, weights_only=False)


def _plan(
    module: str,
    method: str,
    sparsity: float,
    settings: Sequence[str],
    max_epochs: int | None,
    steps_per_epoch: int | None,
) -> None:
    import lightning_drive

    make: Any = getattr(lightning_drive, _CALLBACKS[method])
    others = [name for name in inspect.signature(make).parameters if name != "sparsity"]
    callback = make(sparsity=sparsity, **dict(_setting(text, _CALLBACKS[method], others) for text in settings))
    print(callback.plan(_module(module), max_epochs=max_epochs, steps_per_epoch=steps_per_epoch))


def _setting(text: str, callback: str, known: Sequence[str]) -> tuple[str, Any]:
    name, is_given, value = text.partition("=")
    if not is_given or not name.isidentifier():
        raise ValueError(f"`--set` takes NAME=VALUE, such as rounds=50, got {text!r}.")
    if name not in known:
        raise ValueError(f"`--set {text}`: {callback} has no such argument. Beside the sparsity: {', '.join(known)}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word, such as layerwise


def _module(path: str) -> Any:
    """Import a torch module, or call what returns one, also from the current folder."""
    from torch import nn

    package, _, name = path.partition(":")
    if not package or not name:
        raise ValueError(f"MODULE must be PACKAGE.MODULE:NAME, such as torchvision.models:resnet18, got {path!r}.")
    try:
        with _current_folder():
            found: Any = importlib.import_module(package)
            for part in name.split("."):
                found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}.") from error
    if not isinstance(found, nn.Module) and callable(found):
        _check_call(found, path)
        found = found()
    if not isinstance(found, nn.Module):
        raise TypeError(f"{path!r} must be a torch module or return one, got {type(found).__name__}.")
    return found


@contextmanager
def _current_folder() -> Iterator[None]:
    """Import modules also from the current folder."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _check_call(make: Callable[..., Any], path: str) -> None:
    """Refuse what cannot be called without arguments."""
    try:
        signature = inspect.signature(make)
    except ValueError:  # of something written in C
        return
    try:
        signature.bind()
    except TypeError as error:
        raise TypeError(
            f"{path!r} needs arguments ({error}). Name a module that is made already, or a function without arguments"
            " that returns one."
        ) from error


# What is said of it.


def _report_of(values: Any, path: Path) -> "PruningReport | None":
    from lightning_drive.report.pruning_report import PruningReport

    if values is None:
        return None
    try:
        return PruningReport.from_dict(values)
    except ValueError as error:
        raise ValueError(f"The report in {str(path)!r} cannot be read. {error}") from error


def _zeros(state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "shape": list(tensor.shape),
            "numbers": tensor.numel(),
            "zeros": _num_zeros(name, tensor),
        }
        for name, tensor in state_dict.items()
    ]


def _num_zeros(name: str, tensor: Any) -> int | None:
    """Count the zeros of a tensor; ``None`` for one of which torch cannot say it."""
    import torch

    from lightning_drive.core import bits, saved_values

    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        return None
    repeated = [dim for dim, stride in enumerate(tensor.stride()) if stride == 0 and tensor.shape[dim] > 1]
    stored = tensor  # without what only repeats it
    for dim in repeated:
        stored = stored.narrow(dim, 0, 1)
    if not saved_values.has_memory(stored):
        raise ValueError(f"{name!r} claims {tensor.numel():,} numbers, far more than it has in memory.")
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        stored = stored.view(bits.INTEGERS[tensor.itemsize])
    elif tensor.is_floating_point() and tensor.itemsize == 1:
        stored = stored.float()
    try:
        zeros = stored.numel() - int(stored.count_nonzero())
    except RuntimeError:  # of a kind of number that is newer than this
        return None
    return int(zeros * (tensor.numel() // max(1, stored.numel())))


def _table(zeros: Sequence[Mapping[str, Any]]) -> list[str]:
    from lightning_drive.report import tables

    rows = [(each["name"], "x".join(map(str, each["shape"])), each["numbers"], each["zeros"]) for each in zeros]
    counts = [row[3] for row in rows]
    rows.append(("all", "", sum(row[2] for row in rows), None if None in counts else sum(counts)))
    texts = (
        (name, shape, f"{numbers:,}", *(("-", "-") if zero is None else (f"{zero:,}", f"{zero / max(1, numbers):.2%}")))
        for name, shape, numbers, zero in rows
    )
    return tables.plain([("tensor", "shape", "numbers", "zeros", "share"), *texts])


def _current(version: object) -> str:
    """Give the version of Lightning to say a checkpoint is of; ``load_from_checkpoint`` needs one."""
    from importlib.metadata import version as version_of

    # Older ones would be brought up to date first, in parts that a file of weights does not have.
    is_usable = isinstance(version, str) and re.match(r"(\d{1,3})\.", version) and int(version.split(".")[0]) >= 2
    return str(version) if is_usable else version_of("lightning")


def _check_free(out: Path, source: Path, overwrite: bool) -> None:
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"OUT must be another file than {str(source)!r}.")
    if out.exists() and not overwrite:
        raise ValueError(f"{str(out)!r} is there already. Give another name, or `--overwrite` to replace it.")


if __name__ == "__main__":
    sys.exit(main())
