"""What every test can rely on: one thread, so that sums are the same everywhere, and no leftovers."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    """Take Ctrl+C seriously in tests that send it: a shell lets what it starts in the background ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Share the whole suite among a few processes; what is asked for by file or name starts sooner in this one."""
    whole = config.args_source is config.ArgsSource.TESTPATHS
    return min(os.cpu_count() or 1, 4) if whole else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that have slow tests, so that in the end no process has to wait long for another."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _clean_torch() -> Iterator[None]:
    """Fail a test that leaves global switches of torch behind."""
    yield
    torch.set_flush_denormal(False)  # code that inductor compiles in torch 2.5 turns it on
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
