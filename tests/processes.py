"""Processes of their own for training that is interrupted: new ones, but without the seconds that imports take.

They are forked off a server that has imported Lightning and done nothing else, so no state of a test, nor of a run
before, can reach them but through files.
"""

import inspect
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lightning.pytorch", "torchmetrics.classification"])


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


def run(main: Callable[[list[str]], None], *arguments: object, log: Path) -> None:
    """Start, wait, and fail with the output if the process does."""
    code = exit_code(start(main, *arguments, log=log))
    assert code == 0, f"exit code {code}:\n{log.read_text(encoding='utf-8')}"


def _lead(main: Callable[[list[str]], None], arguments: list[str], log: Path) -> None:
    os.setsid()
    sys.argv = [inspect.getfile(main), *arguments]  # with which Lightning starts other ranks
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    main(arguments)
