"""A pruned model, and a compacted one, say the same in ONNX Runtime as in torch, and are as sparse there."""

from pathlib import Path
from typing import Any

import fits
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import ResidualNet, randomised
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_drive import Magnitude, compact, find_masks

# Of torch's exporter and what it imports, with torch 2.14, Python 3.11.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

BATCH = torch.export.Dim("batch")
"""As large as it comes."""


def vgg() -> nn.Sequential:
    """Convolutions with BatchNorm, pooling, one linear layer; for 2-channel images of 8x8 pixels."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((2, 12), (12, 16), (16, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    layers.insert(3, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


def images(size: int, channels: int = 2) -> Tensor:
    return torch.randn(size, channels, 8, 8, generator=torch.Generator().manual_seed(size))


def pruned(module: nn.Module, sparsity: float) -> nn.Module:
    randomised(module)
    find_masks(module, Magnitude(), sparsity=sparsity, example_input=images(1)).apply_(module)
    return module.eval()


def run_onnx(path: Path, x: Tensor) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [name] = [each.name for each in session.get_inputs()]
    [output] = session.run(None, {name: x.numpy()})
    return output  # type: ignore[no-any-return]


def zeros_in(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name of each matrix and kernel in the file to its shape and its number of zeros."""
    tensors = [numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    names = [each.name for each in onnx.load(path).graph.initializer]
    return {
        name: (tensor.shape, int((tensor == 0).sum()))
        for name, tensor in zip(names, tensors, strict=True)
        if tensor.ndim > 1 and tensor.dtype.kind == "f"
    }


def assert_exported(module: nn.Module, path: Path, channels: int) -> None:
    """Outputs agree for batches of any size, and kernels have the zeros that the module has."""
    onnx.checker.check_model(path)
    for size in (1, 2, 7):
        x = images(size, channels)
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(run_onnx(path, x), expected, rtol=1e-4, atol=1e-5)
    weights = [weight for weight in module.parameters() if weight.ndim > 1]
    found = sorted((sorted(shape), zeros) for shape, zeros in zeros_in(path).values())
    assert found == sorted((sorted(weight.shape), int((weight == 0).sum())) for weight in weights)
    assert sum(zeros for _, zeros in found) > 0


def test_export__pruned(tmp_path: Path) -> None:
    module, path = pruned(vgg(), sparsity=0.9), tmp_path / "model.onnx"
    torch.onnx.export(module, (images(2),), path, dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False)
    assert_exported(module, path, channels=2)


def test_export__compacted(tmp_path: Path) -> None:
    given, path = pruned(ResidualNet(), sparsity=0.96), tmp_path / "model.onnx"
    small = compact(given, images(2))
    assert sum(each.numel() for each in small.parameters()) < sum(each.numel() for each in given.parameters())
    torch.onnx.export(small, (images(2),), path, dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False)
    assert_exported(small, path, channels=2)


def test_to_onnx(tmp_path: Path) -> None:
    """Pruned by a callback in a fit, and exported by Lightning: the zeros are those of the masks."""
    module, path = fits.ConvModule(), tmp_path / "model.onnx"
    callback = fits.drive(sparsity=0.9)
    fits.trainer(tmp_path, callback).fit(module, fits.loader())
    module.eval().to_onnx(path, images(2, 1), dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False)
    assert_exported(module, path, channels=1)
    zeros = dict(zeros_in(path).values())
    for name, mask in callback.masks.items():
        assert zeros[tuple(mask.shape)] == int((~mask).sum()), name
