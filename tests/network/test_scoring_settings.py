"""Settings of the process come back when the last of several searches has ended, whichever that is."""

import threading
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from lightning_drive import SNIP, find_masks


def compiles() -> bool:
    count: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        count.append(1)
        return graph

    torch.compile(lambda x: x * 2 + 1, backend=backend)(torch.ones(3))
    return bool(count)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_find_masks__threads(order: tuple[int, ...]) -> None:
    """Searches in several threads at once, whichever ends first, leave torch.compile on."""
    entered = [threading.Event() for _ in order]
    leave = [threading.Event() for _ in order]
    found: dict[int, Any] = {}

    def search(index: int) -> None:
        def loss_fn(module: nn.Module, batch: models.Batch) -> Tensor:
            entered[index].set()
            leave[index].wait(60)
            return models.loss_fn(module, batch)

        net = models.MLP(4, 5, 3)
        net.load_state_dict(start)
        found[index] = find_masks(net, SNIP(), sparsity=0.5, batches=models.make_batches(4), loss_fn=loss_fn)

    start = models.MLP(4, 5, 3).state_dict()
    assert compiles()
    threads = [threading.Thread(target=search, args=(index,)) for index in range(3)]
    for thread, event in zip(threads, entered, strict=True):
        thread.start()
        assert event.wait(60)
    for index in order:
        leave[index].set()
        threads[index].join(60)
    assert compiles()
    assert found[0] == found[1] == found[2]
