"""Processes of their own, for training that is interrupted and for scripts, without the seconds that imports take.

They are forked off a server that has imported Lightning and done nothing else, so no state of a test, nor of a run
before, can reach them but through files.
"""

import atexit
import inspect
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess

import torch

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lightning.pytorch.cli", "torchmetrics.classification"])


def start(main: Callable[[list[str]], None], *arguments: object, log: Path) -> BaseProcess:
    """Call `main` with arguments as from the command line, in a process that leads a group; output goes to `log`."""
    process = _CONTEXT.Process(target=_lead, args=(main, [str(argument) for argument in arguments], log))
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """Send SIGKILL to a process and all that it has started."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it does not lead its group yet, or is over
        process.kill()


def exit_code(process: BaseProcess, timeout: float = 300) -> int:
    """Wait for the end; a negative code is the signal that made it."""
    process.join(timeout)
    if process.exitcode is None:
        kill(process)
        raise TimeoutError(f"The process was not over after {timeout} seconds.")
    return process.exitcode


class Script:
    """A file of Python that runs in a folder as ``python PATH ARGUMENTS`` does there: as `__main__`, on one thread.

    It finds the package of this checkout, and nothing of the tests but what lies beside it.
    """

    def __init__(self, path: str | Path, *arguments: object, folder: Path) -> None:
        self.words = [str(path), *(str(argument) for argument in arguments)]
        self.logs = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.logs.name) / name for name in ("stdout", "stderr")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        self.process = _CONTEXT.Process(target=_be_script, args=(self.words, folder, environment, self.outputs))
        self.process.start()

    def send(self, number: int) -> None:
        """Send a signal to the process and all that it has started, as a terminal does."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, number)

    def finish(self, timeout: float = 300) -> CompletedProcess[str]:
        """Wait for the end; kill what is not over in time."""
        code = exit_code(self.process, timeout)
        with self.logs:
            return CompletedProcess(self.words, code, *(path.read_text(encoding="utf-8") for path in self.outputs))


def script(path: str | Path, *arguments: object, folder: Path) -> CompletedProcess[str]:
    """Run a script to its end."""
    return Script(path, *arguments, folder=folder).finish()


def run(main: Callable[[list[str]], None], *arguments: object, log: Path) -> None:
    """Start, wait, and fail with the output if the process does."""
    code = exit_code(start(main, *arguments, log=log))
    assert code == 0, f"exit code {code}:\n{log.read_text(encoding='utf-8')}"


def _lead(main: Callable[[list[str]], None], arguments: list[str], log: Path) -> None:
    os.setsid()
    sys.argv = [inspect.getfile(main), *arguments]  # with which Lightning starts other ranks
    _write_to(log, log)
    main(arguments)


def _be_script(words: list[str], folder: Path, environment: Mapping[str, str], outputs: list[Path]) -> None:
    os.setsid()
    _write_to(*outputs)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    sys.path[:] = [str(Path(words[0]).resolve().parent), str(ROOT), *(p for p in sys.path if Path(p) != HELPERS)]
    torch.set_num_threads(1)
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which processes of `multiprocessing` leave out


def _write_to(output: Path, errors: Path) -> None:
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
