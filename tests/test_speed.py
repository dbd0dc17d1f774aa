"""What must not become slow or large: ratios to peers in the same process; seconds are of the processor, not the clock.

Other work on the machine only ever adds time (shared caches, shared memory bandwidth), so the least of several
measurements counts, on both sides. The bounds are 1.2 to 1.8 times those measured on 2026-11-27 (torch 2.14.1, one
thread of an AMD EPYC); `tests/benchmarks` measures the rest, and `docs/performance.md` has the results.
"""

import copy
import random
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from benchmarks.measure import in_turn, peak_of_tensors, rounds_and_passes, scores, seconds
from torch import Tensor, nn

from lightning_drive import DRIVE, Magnitude, Masks, accelerate
from lightning_drive.network import paths
from lightning_drive.network.masked_parameters import MaskedParameters

SIZES = (2048, 384, 384, 10)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(*sizes) for sizes in pairwise(SIZES)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def least(measured: list[list[float]]) -> float:
    """Return the seconds of a whole search from the least that each of its rounds took in several such searches."""
    return sum(min(times) for times in zip(*measured, strict=True))


def test_round() -> None:
    """To score, rank and mask 937,728 weights takes about as long as to find one threshold by torch's own function."""
    module = network()
    values = scores(sum(layer.weight.numel() for layer in module if isinstance(layer, nn.Linear)))

    def search() -> tuple[list[float], list[float], float]:
        return rounds_and_passes(
            copy.deepcopy(module), Magnitude(rounds=12), lambda: values.kthvalue(len(values) // 20), time.process_time
        )

    rounds, thresholds, _ = zip(*(search() for _ in range(8)), strict=True)
    assert least([*rounds]) <= 1.5 * least([*thresholds])


def test_pass() -> None:
    """Where a pass takes long, as they do, a round of DRIVE takes little longer."""
    module, plain = network(), network()
    batches = [(torch.randn(1024, SIZES[0]), torch.randint(SIZES[-1], (1024,)))]

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    def bare_pass() -> None:
        loss(plain, batches[0]).backward()
        plain.zero_grad()

    def search() -> tuple[list[float], list[float], float]:
        return rounds_and_passes(
            copy.deepcopy(module), DRIVE(rounds=8), bare_pass, time.process_time, batches=batches, loss_fn=loss
        )

    rounds, passes, _ = zip(*(search() for _ in range(3)), strict=True)
    assert least([*rounds]) <= 1.45 * least([*passes])


@pytest.mark.parametrize("density", [0.02, 0.5])
def test_mask(density: float) -> None:
    """Masking weights, as after every step, costs what multiplying them by a float mask costs."""
    module = network()
    masks = Masks(
        {name: torch.rand_like(weight) < density for name, weight in module.named_parameters() if weight.ndim > 1}
    )
    covered = MaskedParameters(module, masks)
    weights = [weight.detach().clone() for weight in masks.parameters_of(module).values()]
    factors = [mask.float() for mask in masks.values()]
    ours, peers = in_turn(
        seconds(covered.zero_weights_, time.process_time),
        {"multiplication": seconds(lambda: torch._foreach_mul_(weights, factors), time.process_time)},
        repeats=100,
    )
    assert min(ours) <= 1.75 * min(peers["multiplication"])


def test_memory() -> None:
    """Following paths takes the memory of the weights once, for the masks as floats, and little more."""
    module = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(12)))
    masks = {name: torch.rand_like(weight) < 0.5 for name, weight in module.named_parameters()}
    with peak_of_tensors() as found:
        paths.active_masks(module, masks, torch.zeros(1, 128))
    assert found[0] <= 1.5 * sum(weight.nbytes for weight in module.parameters())


def random_layers(count: int) -> Iterator[tuple[nn.Module, Tensor]]:
    """Draw layers, sparsities and inputs of which some gain much by a sparse form and others would lose."""
    draw = random.Random(0)
    for index in range(count):
        sparsity, batch_size = draw.choice((0.3, 0.7, 0.9, 0.98)), draw.choice((1, 8, 64))
        if index % 2:
            inputs, outputs = draw.choice((256, 1024)), draw.choice((64, 1024))
            layer, example = nn.Linear(inputs, outputs), torch.randn(batch_size, inputs)
        else:
            channels, kernel, size = draw.choice((16, 128)), draw.choice((1, 3)), draw.choice((4, 16))
            layer = nn.Conv2d(channels, 2 * channels, kernel, stride=draw.choice((1, 2)), padding=kernel // 2)
            example = torch.randn(batch_size, channels, size, size)
        layer.weight.data[torch.rand_like(layer.weight) < sparsity] = 0
        yield layer.eval(), example


def test_accelerate__choice_is_right() -> None:
    """No layer is slower in the form that was chosen for it than as a dense layer."""
    torch.manual_seed(0)
    for layer, example in random_layers(12):
        fast = accelerate(layer, example)
        with torch.inference_mode():
            runs = {
                "": lambda fast=fast, x=example: [fast(x) for _ in range(20)],
                "dense": lambda layer=layer, x=example: [layer(x) for _ in range(20)],
            }
            measures = {name: seconds(run, time.process_time) for name, run in runs.items()}
            ours, peers = in_turn(measures.pop(""), measures, 5)
        assert min(ours) <= 1.4 * min(peers["dense"]), f"{layer}, {fast.report}"
