"""A round over two processes (gloo, one thread each) against one process, and against a bare pass under DDP."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.page import Figure

CASES = [("ResNet-18", 32), ("VGG-16-BN", 32)]


def run(world_size: int, name: str, batch_size: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(world_size):
        environment = {"MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("ranks.py")), name, str(batch_size)]
        ranks.append(subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True))
    outputs = [rank.communicate()[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks)
    return json.loads(outputs[0].splitlines()[-1])


@pytest.mark.parametrize(("name", "batch_size"), CASES)
def test_round(figure: Callable[..., Figure], name: str, batch_size: int) -> None:
    def take() -> tuple[list[float], dict[str, list[float]]]:
        two, one = run(2, name, batch_size), run(1, name, batch_size)
        return two["rounds"], {"a bare pass under DDP": two["passes"], "a round of one process": one["rounds"]}

    figure(
        "ranks",
        f"DRIVE over two processes, {name}, batches of {batch_size} each",
        "s",
        take,
        note="gloo, one thread per process",
    )


@pytest.mark.parametrize(("name", "batch_size"), CASES)
def test_bytes(figure: Callable[..., Figure], name: str, batch_size: int) -> None:
    """What a rank hands to collectives; a ring sends 2 (n - 1) / n times as much."""

    def take() -> tuple[list[float], dict[str, list[float]]]:
        found = run(2, name, batch_size)
        return [found["bytes_per_round"]], {"the gradients of a training step": [found["bytes_of_gradients"]]}

    figure("ranks", f"bytes per round, {name}", "bytes", take, goal=1.01, note="and one bit per weight in the end")
