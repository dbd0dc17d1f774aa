"""Tiny networks and deterministic batches, small enough to reason about, and a way to see that one was left alone."""

import random
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Record(list[Any]):
    """A list that copies of a module share with it, to see what they do, too."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Record":
        return self


class InnerProduct(nn.Module):
    """One neuron without bias whose weights are 0, 1, ..., n-1: its output is mental arithmetic."""

    def __init__(self, n: int = 10) -> None:
        super().__init__()
        self.layer = nn.Linear(n, 1, bias=False)
        self.layer.weight.data = torch.arange(n, dtype=torch.float32).view(1, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class MLP(nn.Sequential):
    """Linear layers with ReLU between them; weights are `0.weight`, `2.weight`, ..."""

    def __init__(self, *sizes: int, bias: bool = True) -> None:
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
        super().__init__(*layers[:-1])


class ConvNet(nn.Module):
    """Conv, BatchNorm, ReLU, MaxPool, conv, BatchNorm, ReLU, mean over pixels, Linear; for 2-channel images."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(5)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm1(self.conv1(x))))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


class PlainConvNet(nn.Sequential):
    """Convolutions and ReLU only: a chain, so SynFlow is conserved at every layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 16, 3),
        )


class Block(nn.Module):
    """Two conv-BatchNorm layers beside a 1x1 shortcut with BatchNorm."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """A stem, two blocks and a linear classifier; for 2-channel images."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.block1 = Block(3, 4)
        self.block2 = Block(4, 5)
        self.fc = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.fc(self.block2(self.block1(x)).mean((2, 3)))


class Tied(nn.Module):
    """Two hidden layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.first(x))))


class Restless(nn.Module):
    """Changes all it can in every forward pass: statistics, buffers in place and by replacement, random states."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen_norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = x.detach().mean(0)  # a new tensor, not a new value
        self.count += 1
        self.absent = torch.ones(2)
        noise = 1e-3 * (torch.rand(()) + np.random.rand() + random.random())
        hidden = self.frozen_norm(F.relu(self.norm(self.first(x + noise.to(x.dtype)))))
        return self.last(self.dropout(hidden))


class Attention(nn.Module):
    """One self-attention layer over four tokens of four numbers, then a linear classifier."""

    def __init__(self, classes: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(len(x), 4, 4)
        mixed, _ = self.attention(tokens, tokens, tokens)
        return self.fc(mixed.mean(1))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and running statistic anew, from `seed` alone; norms stay positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            if "norm" in name and name.endswith("weight"):
                parameter.abs_().add_(0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module


def make_batches(
    *shape: int, count: int = 3, size: int = 6, classes: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Batch]:
    """Return `count` batches of `size` normal inputs of the given shape, with class labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, *shape, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Note everything that scoring must leave alone: objects, memory, bits, modes and random states."""
    seen: dict[str, Any] = {}
    for name, parameter in module.named_parameters():
        seen[f"parameter {name}"] = (id(parameter), parameter.data_ptr(), parameter.dtype, _bits(parameter))
        seen[f"gradient {name}"] = (id(parameter.grad), _bits(parameter.grad))
    for name, child in module.named_modules():
        seen[f"training {name}"] = child.training
        seen[f"dropout {name}"] = getattr(child, "dropout", None)
        for key, buffer in child._buffers.items():
            seen[f"buffer {name}.{key}"] = (id(buffer), _bits(buffer))
    seen["torch"] = _bits(torch.get_rng_state())
    _, keys, position, *_ = np.random.get_state()
    seen["numpy"] = (keys.tobytes(), position)
    seen["python"] = random.getstate()
    return seen


def changes(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Name what is no longer as in the fingerprint taken `before`."""
    after = fingerprint(module)
    return [key for key in before | after if key not in before or key not in after or before[key] != after[key]]


def _bits(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    inputs, labels = batch
    return F.cross_entropy(module(inputs), labels)
