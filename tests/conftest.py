"""What every test can rely on: one thread, so that sums are the same everywhere, and no leftovers."""

from collections.abc import Iterator

import pytest
import torch


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
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
