"""Rounds of scoring and masking against as many bare forward-backward passes of the same network."""

import copy
from collections.abc import Callable

import pytest
import torch
from benchmarks import networks
from benchmarks.measure import forward_backward, rounds_and_passes, with_once
from benchmarks.page import Figure
from torch import Tensor, nn

from lightning_drive import DRIVE, SNIP, SynFlow

CASES = [("ResNet-18", 128, 32, 10), ("ResNet-18", 64, 32, 10), ("VGG-16-BN", 128, 32, 10), ("ResNet-50", 16, 224, 5)]


@pytest.mark.parametrize("method", [DRIVE, SNIP])
@pytest.mark.parametrize(("name", "batch_size", "pixels", "rounds"), CASES)
def test_rounds(
    figure: Callable[..., Figure], method: type, name: str, batch_size: int, pixels: int, rounds: int
) -> None:
    batches = networks.batches(batch_size, pixels)
    module = networks.NETWORKS[name]().train()
    plain = copy.deepcopy(module)
    bare_pass = forward_backward(plain, lambda module: networks.loss(module, batches[0]))

    def take() -> tuple[list[float], dict[str, list[float]]]:
        found, passes, once = rounds_and_passes(
            module, method(rounds=rounds), bare_pass, batches=batches, loss_fn=networks.loss
        )
        return with_once(found, once), {"a bare forward-backward pass": passes}

    case = f"{method.__name__}, {name} at {pixels} pixels, batches of {batch_size}"
    goal = 1.15 if batch_size == 64 else 1.10
    figure("rounds", case, "s", take, goal=goal, note=f"{rounds} rounds, {parameters(module):.1f} M parameters")


def labels(batch_size: int, classes: int) -> Tensor:
    return torch.randint(classes, (batch_size,))


OTHERS: dict[str, Callable[[], tuple[nn.Module, networks.Batch]]] = {
    "100 linear layers of 16, batches of 64": lambda: (networks.chain(100), (torch.randn(64, 16), labels(64, 16))),
    "400 linear layers of 16, batches of 64": lambda: (networks.chain(400), (torch.randn(64, 16), labels(64, 16))),
    "Transformer, batches of 32": lambda: (networks.Transformer(), networks.batches(32)[0]),
    "LSTM of 256, batches of 64": lambda: (networks.Recurrent(), (torch.randint(1000, (64, 32)), labels(64, 10))),
    "DQN of 17,920 weights, batches of 128": lambda: (networks.deep_q(), (torch.randn(128, 8), labels(128, 4))),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_rounds__many_or_small_layers(figure: Callable[..., Figure], name: str) -> None:
    """Rounds after the first alone: what such a search does once takes as long as many of its rounds."""
    torch.manual_seed(0)
    module, batch = OTHERS[name]()
    plain = copy.deepcopy(module)
    bare_pass = forward_backward(plain, lambda module: networks.loss(module, batch))
    rounds, passes, once = rounds_and_passes(
        module, DRIVE(rounds=20), bare_pass, batches=[batch], loss_fn=networks.loss
    )
    figure(
        "rounds",
        f"DRIVE, {name}",
        "s",
        lambda: (rounds[1:], {"a bare forward-backward pass": passes[1:]}),
        goal=1.20,
        note=f"20 rounds, and {once:.2g} s once",
    )


@pytest.mark.parametrize(("name", "pixels"), [("ResNet-18", 32), ("VGG-16-BN", 32), ("ResNet-50", 224)])
def test_rounds__synflow(figure: Callable[..., Figure], name: str, pixels: int) -> None:
    ones = torch.ones(1, 3, pixels, pixels)
    module = networks.NETWORKS[name]().eval()
    plain = copy.deepcopy(module).double()
    bare_pass = forward_backward(plain, lambda module: module(ones.double()).sum())

    def take() -> tuple[list[float], dict[str, list[float]]]:
        found, passes, once = rounds_and_passes(module, SynFlow(rounds=20), bare_pass, example_input=ones)
        return with_once(found, once), {"a bare pass of one image in float64": passes}

    figure(
        "rounds",
        f"SynFlow, {name} at {pixels} pixels, one image",
        "s",
        take,
        goal=1.10,
        note=f"20 rounds, {parameters(module):.1f} M parameters",
    )


def parameters(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
