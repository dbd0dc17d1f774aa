"""What all tests of this repository rely on: how they share processes, one thread, and no switch of torch left behind.

The `conftest.py` of the tests, of the examples' tests and of the documentation's tests each take all of it.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_configure() -> None:
    """Take Ctrl+C seriously in tests that send it: a shell lets what it starts in the background ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Share folders among a few processes; files and tests that are named run in this one, which starts sooner."""
    return min(os.cpu_count() or 1, 4) if all(Path(argument).is_dir() for argument in config.args) else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that have slow tests, so that in the end no process has to wait long for another."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread, so that sums are the same everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def clean_torch() -> Iterator[None]:
    """Fail a test that leaves global switches of torch behind."""
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch._C._len_torch_function_stack() == 0
