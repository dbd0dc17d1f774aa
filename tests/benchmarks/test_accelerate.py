"""Inference of accelerated networks against dense torch, `torch.compile`, onnxruntime and `compact`."""

import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from benchmarks import images, measure, networks
from benchmarks.page import Figure
from benchmarks.pruned import MLP, RECIPES, RESNET, SPARSITIES, TRANSFORMER, VGG, pruned
from torch import Tensor, nn

from lightning_drive import accelerate, compact

Work = Callable[[], object]

DENSE, COMPILED, ONNX, COMPACT = "dense torch", "`torch.compile`, dense", "onnxruntime, dense", "`compact`"
CASES = [
    (name, batch_size, threads)
    for name in RECIPES
    for batch_size in (1, 16, 64, 128)
    for threads in (1, 2)
    if (batch_size <= 16 or name not in networks.LARGE_IMAGES) and (batch_size != 64 or name == MLP)
]
GOALS = {(VGG, 1): 4.0, (VGG, 16): 2.2, (RESNET, 1): 2.5, (RESNET, 16): 1.8, (MLP, 64): 5.0, (TRANSFORMER, 16): 2.5}
"""How many times as fast as dense, at 98 % and on one thread, by network and batch size."""
WITH_PEERS = (0.98, 0.993)
SECONDS = 0.05
"""How long one measurement of the dense network takes at least."""
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@cache
def measured(name: str, batch_size: int, threads: int, folder: Path) -> dict[str, list[float]]:
    """Time a network at every sparsity, and all its peers, in turn."""
    modules = {sparsity: pruned(name, sparsity, folder) for sparsity in SPARSITIES}
    [(inputs, _)] = images.load().batches(batch_size, networks.pixels_of(name), count=1, seed=2)
    with measure.threads(threads), torch.no_grad():
        dense: Work = partial(modules[0.98], inputs)
        works: dict[str, Work] = {str(each): partial(accelerate(modules[each], inputs), inputs) for each in SPARSITIES}
        if has_peers(batch_size, threads):
            works |= peers(modules[0.98], inputs, threads)
            works |= {f"{COMPACT} {each}": partial(compact(modules[each], inputs), inputs) for each in WITH_PEERS}
        dense()
        seconds = measure.seconds(dense)()
        times = max(1, round(SECONDS / seconds))
        measures = {label: measure.repeatedly(work, times) for label, work in works.items()}
        dense_seconds, others = measure.in_turn(
            measure.repeatedly(dense, times), measures, repeats=9 if seconds < 0.2 else 5
        )
    torch.compiler.reset()
    return {DENSE: dense_seconds, **others}


def has_peers(batch_size: int, threads: int) -> bool:
    return batch_size in (1, 16) and threads == 1


def peers(module: nn.Module, inputs: Tensor, threads: int) -> dict[str, Work]:
    """Return the dense network in the other ways of running it."""
    return {
        **({COMPILED: partial(torch.compile(module), inputs)} if HAS_COMPILER else {}),
        ONNX: in_onnxruntime(module, inputs, threads),
    }


def in_onnxruntime(module: nn.Module, inputs: Tensor, threads: int) -> Work:
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        torch.onnx.export(module, (inputs,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    [argument] = session.get_inputs()
    return partial(session.run, None, {argument.name: inputs.numpy()})


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize(("name", "batch_size", "threads"), CASES)
def test_inference(
    figure: Callable[..., Figure],
    pytestconfig: pytest.Config,
    name: str,
    batch_size: int,
    threads: int,
    sparsity: float,
) -> None:
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("pruned")

    def take() -> tuple[list[float], dict[str, list[float]]]:
        columns = measured(name, batch_size, threads, folder)
        labels = {DENSE: DENSE}
        if sparsity in WITH_PEERS:
            labels |= {COMPILED: COMPILED, ONNX: ONNX, COMPACT: f"{COMPACT} {sparsity}"}
        return columns[str(sparsity)], {peer: columns[label] for peer, label in labels.items() if label in columns}

    speed = GOALS.get((name, batch_size)) if (sparsity, threads) == (0.98, 1) else None
    figure(
        "inference",
        f"{name}, batch {batch_size}, {threads} thread{'s' if threads > 1 else ''}",
        "s",
        take,
        goal=speed and 1 / speed,
        note=note(),
        column=f"{100 * sparsity:g} %",
    )


def note() -> str:
    compiler = "" if HAS_COMPILER else " (not measured here: no C++ compiler was found)"
    return (
        f"Trained briefly on {images.load().name} and pruned by DRIVE, seed 0; `torch.compile` with its"
        f" defaults{compiler}, onnxruntime {version('onnxruntime')}, `compact` (torch-pruning"
        f" {version('torch-pruning')}) in dense torch."
    )
