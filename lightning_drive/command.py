"""The command ``lightning-drive``: what is in a checkpoint, and how to make it small and whole again.

Nothing here imports more than the standard library before it is needed.
"""

import argparse
import ast
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from lightning_drive.report import PruningReport

_KEY = "checkpoint"
"""What the metadata of a sparse file calls the rest of a checkpoint."""

_HYPER_PARAMETERS, _VERSION = "hyper_parameters", "pytorch-lightning_version"

_KEPT = ("epoch", "global_step", _VERSION, "hparams_name", _HYPER_PARAMETERS)
"""What is kept of a checkpoint beside its weights: what ``load_from_checkpoint`` reads."""

_CALLBACKS = {
    "drive": "DRIVEPruningCallback",
    "snip": "SNIPPruningCallback",
    "synflow": "SynFlowPruningCallback",
    "imp": "IMPPruningCallback",
}

_TUPLE = "__tuple__"
"""Marks a tuple, which JSON does not know."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after ``lightning-drive``; by default those of this process.

    Returns:
        The exit status: 0, or 2 for an error, which is one line on the error stream.

    """
    settings = vars(_parser().parse_args(arguments))
    run: Callable[..., None] = settings.pop("run")
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
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lightning-drive", description="Sparse files and reports of pruned Lightning checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compress = commands.add_parser("compress", help="write the weights of a checkpoint as a sparse file")
    compress.add_argument("checkpoint", metavar="CKPT", type=Path, help="a checkpoint of Lightning, or a state_dict")
    compress.add_argument("out", metavar="OUT", type=Path, help="the sparse file to write")
    compress.set_defaults(run=_compress)

    expand = commands.add_parser("expand", help="write a sparse file as a dense checkpoint, for load_from_checkpoint")
    expand.add_argument("sparse", metavar="SPARSE", type=Path, help="a sparse file")
    expand.add_argument("out", metavar="OUT", type=Path, help="the checkpoint to write")
    expand.set_defaults(run=_expand)

    report = commands.add_parser("report", help="print what was pruned, or count the zeros where no report is stored")
    report.add_argument("checkpoint", metavar="CKPT", type=Path, help="a checkpoint of Lightning, or a state_dict")
    report.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    report.set_defaults(run=_report)

    plan = commands.add_parser(
        "plan", help="print what a callback would prune of a module, when, and what it would cost"
    )
    plan.add_argument(
        "module",
        metavar="MODULE",
        help="PACKAGE.MODULE:NAME of a torch module, or of what returns one, such as torchvision.models:resnet18",
    )
    plan.add_argument("--method", choices=_CALLBACKS, default="drive", help="which callback; default: drive")
    plan.add_argument("--sparsity", type=float, required=True, help="fraction of the prunable weights to remove")
    plan.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="NAME=VALUE",
        help="another argument of the callback, such as rounds=50 or \"exclude=['fc.*']\"; may be repeated",
    )
    plan.add_argument("--max-epochs", type=int, help="epochs of the whole run, to say what share of it pruning takes")
    plan.add_argument("--steps-per-epoch", type=int, help="training steps in each of them")
    plan.set_defaults(run=_plan)

    for command in (compress, expand):
        command.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    return parser


def _compress(checkpoint: Path, out: Path, overwrite: bool) -> None:
    from lightning_drive import files

    _check_free(out, checkpoint, overwrite)
    content = _load(checkpoint)
    state_dict = _state_dict(content, checkpoint)
    kept, left_out = _plain_part(content)
    files.save_sparse(state_dict, out, metadata={_KEY: json.dumps(kept)})

    weights = sum({tensor.data_ptr(): tensor.nbytes for tensor in state_dict.values()}.values())
    size = out.stat().st_size
    before = checkpoint.stat().st_size
    print(f"{checkpoint}: {before:,} bytes, of which {weights:,} are weights and buffers")
    print(
        f"{out}: {size:,} bytes, {size / max(1, weights):.2%} of the weights and {size / before:.2%} of the checkpoint"
    )
    if size >= weights:
        print("Nothing was gained: no tensor has enough zeros. Was the checkpoint saved after pruning?")
    if left_out:
        print(
            f"Hyper-parameters that JSON cannot hold are left out: {', '.join(left_out)}. Give them to"
            " `load_from_checkpoint` again."
        )


def _expand(sparse: Path, out: Path, overwrite: bool) -> None:
    import torch

    from lightning_drive import files

    _check_free(out, sparse, overwrite)
    state_dict = files.load_sparse(sparse)
    checkpoint = _rest(files.read_metadata(sparse).get(_KEY, "{}"), sparse)
    checkpoint[_VERSION] = _current(checkpoint.get(_VERSION))
    with files.replacing(out) as temporary:
        torch.save({**checkpoint, "state_dict": state_dict}, temporary)

    names = ", ".join(map(str, checkpoint.get(_HYPER_PARAMETERS, {}))) or "none"
    print(f"{out}: {out.stat().st_size:,} bytes, {len(state_dict)} tensors, hyper-parameters: {names}")


def _report(checkpoint: Path, as_json: bool) -> None:
    content = _load(checkpoint)
    callback, state = next(_states(content), ("", {}))
    report = _report_of(state, checkpoint)
    zeros = [] if report else _zeros(_state_dict(content, checkpoint))
    if as_json:
        found = {"callback": callback or None, "report": report.to_dict() if report else None}
        print(json.dumps(found if report else {**found, "tensors": zeros}, indent=2))
    elif report:
        print(report)
    else:
        reason = f"{callback} has not pruned yet" if callback else "it has no state of a pruning callback"
        print(f"No report in {checkpoint}: {reason}. Zeros were counted instead, in all parameters and buffers:")
        print("\n".join(_table(zeros)))


def _plan(
    module: str,
    method: str,
    sparsity: float,
    settings: Sequence[str],
    max_epochs: int | None,
    steps_per_epoch: int | None,
) -> None:
    from lightning_drive import callbacks, lottery

    arguments = dict(_setting(text) for text in settings)
    make: Any = getattr(lottery if method == "imp" else callbacks, _CALLBACKS[method])
    callback = make(sparsity=sparsity, **arguments)
    print(callback.plan(_module(module), max_epochs=max_epochs, steps_per_epoch=steps_per_epoch))


def _setting(text: str) -> tuple[str, Any]:
    name, is_given, value = text.partition("=")
    if not is_given or not name.isidentifier():
        raise ValueError(f"`--set` takes NAME=VALUE, such as rounds=50, got {text!r}.")
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
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(package)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}.") from error
    finally:
        sys.path.remove(here)
    if not isinstance(found, nn.Module) and callable(found):
        found = found()
    if not isinstance(found, nn.Module):
        raise TypeError(f"{path!r} must be a torch module or return one, got {type(found).__name__}.")
    return found


# What is in a checkpoint.


def _load(path: Path) -> dict[str, Any]:
    """Load a checkpoint without running any code that is in it."""
    import pickle

    import torch

    if path.is_dir():
        raise ValueError(
            f"{str(path)!r} is a folder. If it is a sharded checkpoint, join it to one file first:"
            " `python -m lightning.pytorch.utilities.consolidate_checkpoint`."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {str(path)!r}.") from None
    except pickle.UnpicklingError as error:
        if not (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise ValueError(_no_checkpoint(path)) from error
        raise ValueError(
            f"{str(path)!r} holds a {found[1]}, and loading that can run any code. If you trust the file, use Python:"
            f" `lightning_drive.save_sparse(torch.load({str(path)!r}, weights_only=False)['state_dict'], OUT)`."
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(_no_checkpoint(path)) from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is not a checkpoint: it holds a {type(content).__name__}, not a dictionary.")
    return content


def _no_checkpoint(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(9)[8:] == b"{":
            return f"{str(path)!r} seems to be a safetensors file. If it is a sparse file, `expand` it first."
    return f"{str(path)!r} is not a file that `torch.save` wrote, or it is damaged or cut off."


def _state_dict(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Find the weights in a checkpoint, which may be nothing else."""
    import torch

    from lightning_drive.messages import listed

    state_dict = content.get("state_dict", content)
    if not isinstance(state_dict, dict):
        raise ValueError(f"The 'state_dict' in {str(path)!r} must be a dictionary, got a {type(state_dict).__name__}.")
    others = [repr(name) for name, each in state_dict.items() if not isinstance(each, torch.Tensor)]
    if others:
        place = "its 'state_dict'" if "state_dict" in content else "it"
        raise ValueError(
            f"{str(path)!r} must have a 'state_dict' of nothing but tensors, or be one, but in {place} are"
            f" {listed(others)}, which are no tensors."
        )
    return state_dict


def _states(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Find the states of our callbacks, which subclasses may store under names of their own."""
    callbacks = content.get("callbacks")
    for name, state in callbacks.items() if isinstance(callbacks, dict) else ():
        if isinstance(state, dict) and {"version", "masks", "report"} <= state.keys():
            yield str(name).partition("{")[0], state


def _report_of(state: Mapping[str, Any], path: Path) -> "PruningReport | None":
    from lightning_drive.report import PruningReport

    if state.get("report") is None:
        return None
    try:
        return PruningReport.from_dict(state["report"])
    except ValueError as error:
        raise ValueError(f"The report in {str(path)!r} cannot be read. {error}") from error


def _zeros(state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "shape": list(tensor.shape),
            "numbers": tensor.numel(),
            "zeros": tensor.numel() - int(tensor.count_nonzero()),
        }
        for name, tensor in state_dict.items()
    ]


def _table(zeros: Sequence[Mapping[str, Any]]) -> list[str]:
    from lightning_drive import tables

    rows = [(each["name"], "x".join(map(str, each["shape"])), each["numbers"], each["zeros"]) for each in zeros]
    rows.append(("all", "", sum(row[2] for row in rows), sum(row[3] for row in rows)))
    texts = (
        (name, shape, f"{numbers:,}", f"{zero:,}", f"{zero / max(1, numbers):.2%}")
        for name, shape, numbers, zero in rows
    )
    return tables.plain([("tensor", "shape", "numbers", "zeros", "share"), *texts])


# What goes from a checkpoint into the metadata of a sparse file, and back.


def _plain_part(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Give what JSON can hold of a checkpoint beside its weights, and name the hyper-parameters that it cannot."""
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    if "state_dict" not in content:
        return kept, left_out
    for key in _KEPT:
        value = content.get(key)
        if key == _HYPER_PARAMETERS and isinstance(value, dict):
            kept[key] = {}
            for name, each in value.items():
                if _is_plain({name: each}):
                    kept[key][name] = _tagged(each)
                else:
                    left_out.append(f"{name} ({type(each).__name__})")
        elif value is not None and _is_plain(value):
            kept[key] = _tagged(value)
    return kept, left_out


def _is_plain(value: object) -> bool:
    """Whether a value comes back from JSON as it was, with tuples marked."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    if type(value) is dict:
        return all(type(key) is str and key != _TUPLE and _is_plain(each) for key, each in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _tagged(value: Any) -> Any:
    if isinstance(value, tuple):
        return {_TUPLE: [_tagged(each) for each in value]}
    if isinstance(value, list):
        return [_tagged(each) for each in value]
    return {key: _tagged(each) for key, each in value.items()} if isinstance(value, dict) else value


def _rest(text: str, path: Path) -> dict[str, Any]:
    """Read what :func:`_plain_part` kept."""
    try:
        rest = json.loads(text, object_hook=lambda value: tuple(value[_TUPLE]) if _TUPLE in value else value)
    except (ValueError, RecursionError):
        rest = None
    if not isinstance(rest, dict):
        raise ValueError(f"{str(path)!r} has metadata under {_KEY!r} that `lightning-drive compress` did not write.")
    return {key: value for key, value in rest.items() if key in _KEPT}


def _current(version: object) -> str:
    """Give the version of Lightning to say a checkpoint is of; ``load_from_checkpoint`` needs one."""
    from importlib.metadata import version as version_of

    # Older ones would be brought up to date first, in parts that a file of weights does not have.
    is_usable = isinstance(version, str) and re.match(r"(\d+)\.", version) and int(version.split(".")[0]) >= 2
    return str(version) if is_usable else version_of("lightning")


def _check_free(out: Path, source: Path, overwrite: bool) -> None:
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"OUT must be another file than {str(source)!r}.")
    if out.exists() and not overwrite:
        raise ValueError(f"{str(out)!r} is there already. Give another name, or `--overwrite` to replace it.")


if __name__ == "__main__":
    sys.exit(main())
