"""Measure in one process and in turn, so that what disturbs the machine disturbs both sides of a ratio."""

import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_drive.core.goal import Goal
from lightning_drive.network import prunable
from lightning_drive.search.diagnosis import diagnose
from lightning_drive.search.loop import search
from lightning_drive.search.methods import Method
from lightning_drive.search.scored_network import Network

Measure = Callable[[], float]


def in_turn(ours: Measure, peers: Mapping[str, Measure], repeats: int) -> tuple[list[float], dict[str, list[float]]]:
    """Take measurements of ours and of every peer, in turn, after one of each that does not count."""
    everything = {"": ours, **peers}
    found = [{name: measure() for name, measure in everything.items()} for _ in range(repeats + 1)][1:]
    columns = {name: [row[name] for row in found] for name in everything}
    return columns.pop(""), columns


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Measure:
    """Make a measure of the time that work takes."""

    def measure() -> float:
        begin = clock()
        work()
        return clock() - begin

    return measure


def repeatedly(work: Callable[[], object], times: int) -> Measure:
    """Make a measure of the time that work takes on average, over several times in a row."""

    def measure() -> float:
        begin = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - begin) / times

    return measure


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rounds_and_passes(
    module: nn.Module,
    method: Method,
    bare_pass: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
    **settings: Any,
) -> tuple[list[float], list[float], float]:
    """Time the rounds of a search, with a bare pass after every one.

    Returns:
        Seconds of every round, seconds of every pass, and seconds of what the search does once, before and after.

    """
    passes: list[float] = []
    rounds: list[float] = []
    seconds(bare_pass)()
    begin = mark = clock()

    def on_round(*_: Any) -> None:
        nonlocal mark
        rounds.append(clock() - mark)
        passes.append(seconds(bare_pass, clock)())
        mark = clock()

    network, goal = Network(module, prunable.prunable_parameters(module), **settings), Goal(0.98)
    diagnose(network, method, goal, search(network, method, goal, on_round=on_round))
    return rounds, passes, clock() - begin - sum(rounds) - sum(passes)


def with_once(rounds: list[float], once: float) -> list[float]:
    """Spread what is done once evenly over the rounds."""
    return [one_round + once / len(rounds) for one_round in rounds]


def forward_backward(module: nn.Module, run: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    """Make a bare forward and backward pass of a module, with nothing around it."""

    def work() -> None:
        run(module).backward()
        module.zero_grad()

    return work


def scores(size: int) -> Tensor:
    """Draw scores that are distributed as those of SNIP and DRIVE often are: products of normal numbers."""
    found = torch.randn(size)
    for chunk in found.split(1 << 22):
        chunk.mul_(torch.randn(len(chunk))).abs_()
    return found


def peak_growth(work: Callable[[], object]) -> int:
    """Measure by how many bytes this process grows at most while work is done (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    result = work()
    after = _status("VmHWM")
    del result
    return after - before


@contextmanager
def peak_of_tensors() -> Iterator[list[int]]:
    """Return a list that holds, in the end, how many bytes of tensors were at most there beyond those at the beginning.

    This asks torch's own allocator, which is exact where the size of a process is not: freed memory may stay with it.
    """
    found: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    found.append(max(accumulate(change for _, change in changes)))


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    kibibytes = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    assert kibibytes is not None
    return 1024 * int(kibibytes[1])
