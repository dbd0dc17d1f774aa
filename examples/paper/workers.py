"""Processes that do the runs, for as long as the one that started them lives."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait as wait_for_end
from types import TracebackType
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt also if asked to end (SIGTERM) or if the terminal is closed (SIGHUP, not under nohup)."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Workers(Generic[Item]):
    """Processes of their own for calls, each for one call at a time.

    They end with this process, whatever ended it, and with the block of `with` that is left by an error. A process that
    is killed loses its call, and the next call has a new one.

    Args:
        number: How many calls there are at once.
        prepare: What every process does first.

    """

    def __init__(self, number: int, prepare: Callable[[], None]) -> None:
        self._prepare = prepare
        self._idle = [self._new_process() for _ in range(number)]
        self._busy: dict[Future[Any], tuple[Item, ProcessPoolExecutor]] = {}

    def __enter__(self) -> "Workers[Item]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:  # or it would wait for the calls
            for process in multiprocessing.active_children():
                process.kill()
        for process_of_one in (*self._idle, *(pool for _, pool in self._busy.values())):
            process_of_one.shutdown(cancel_futures=True)

    def call(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Future[Result]]]:
        """Call a function with every item, and yield the items with their results in the order in which they end."""
        waiting = iter(items)
        while True:
            for item in islice(waiting, len(self._idle)):
                pool = self._idle.pop()
                self._busy[pool.submit(function, item)] = item, pool
            if not self._busy:
                return
            ended, _ = wait(self._busy, return_when=FIRST_COMPLETED)
            for future in ended:
                item, pool = self._busy.pop(future)
                self._idle.append(self._new_process() if was_killed(future) else pool)
                yield item, future

    def _new_process(self) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")  # CUDA cannot be used in forked processes
        return ProcessPoolExecutor(1, spawn, _begin, (self._prepare,))


def was_killed(future: Future[Any]) -> bool:
    """Whether the process that did a call was ended from outside."""
    return isinstance(future.exception(), BrokenProcessPool)


def _begin(prepare: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_end([parent.sentinel])
    os._exit(1)  # at once, wherever the other threads are
