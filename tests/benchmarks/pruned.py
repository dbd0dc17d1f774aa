"""Networks that were trained briefly on real images and pruned by DRIVE, kept in a folder for the next run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks import images, networks
from benchmarks.images import Images
from benchmarks.networks import Batch
from torch import nn

from lightning_drive import DRIVE, find_masks, load_sparse, save_sparse

SPARSITIES = (0.9, 0.95, 0.98, 0.993)
MLP, TRANSFORMER, VGG, RESNET = "MLP 3072-1024-1024-10", "Transformer of width 384", "VGG-16-BN", "ResNet-18"


@dataclass(frozen=True)
class Recipe:
    """How a network is trained before it is pruned, and pruned.

    Args:
        batch_size: Images in each batch, of training and of pruning.
        steps: Steps of training.
        rounds: Rounds of DRIVE.
        learning_rate: Of SGD with momentum 0.9 and weight decay 5e-4, or of Adam.
        is_adam: Whether the optimizer is Adam.

    """

    batch_size: int
    steps: int
    rounds: int
    learning_rate: float
    is_adam: bool = False

    def __str__(self) -> str:
        return "-".join(map(str, (self.batch_size, self.steps, self.rounds, self.learning_rate)))

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        if self.is_adam:
            return torch.optim.Adam(module.parameters(), self.learning_rate)
        return torch.optim.SGD(module.parameters(), self.learning_rate, momentum=0.9, weight_decay=5e-4)


RECIPES = {
    MLP: Recipe(128, 200, 20, 0.05),
    TRANSFORMER: Recipe(32, 100, 20, 3e-4, is_adam=True),
    VGG: Recipe(128, 100, 20, 0.02),
    RESNET: Recipe(64, 100, 20, 0.05),
    "ResNet-50": Recipe(16, 40, 8, 0.02),
    "ViT-small": Recipe(16, 40, 8, 3e-4, is_adam=True),
}


def pruned(name: str, sparsity: float, folder: Path) -> nn.Module:
    """Return a pruned network in eval mode, from the folder if it is there."""
    path = _path(name, folder, f"_{sparsity}")
    if not path.exists():
        save_sparse(_pruned(trained(name, folder), name, sparsity, images.load()), path)
    return _restored(name, path).eval()


def trained(name: str, folder: Path) -> nn.Module:
    """Return a trained dense network, from the folder if it is there."""
    path = _path(name, folder)
    if not path.exists():
        save_sparse(_trained(name, images.load()), path)
    return _restored(name, path)


def _path(name: str, folder: Path, suffix: str = "") -> Path:
    data = images.load()
    key = f"{name} {RECIPES[name]} {len(data.train[1])} {data.name}".replace(" ", "_")
    return folder / f"{key}{suffix}.safetensors"


def _restored(name: str, path: Path) -> nn.Module:
    module = networks.NETWORKS[name]()
    module.load_state_dict(load_sparse(path))
    return module


def _trained(name: str, data: Images) -> nn.Module:
    torch.manual_seed(0)
    module, recipe = networks.NETWORKS[name]().train(), RECIPES[name]
    optimizer = recipe.optimizer(module)
    for batch in _batches(name, recipe.steps, data, seed=0):
        optimizer.zero_grad()
        networks.loss(module, batch).backward()
        optimizer.step()
    return module


def _pruned(module: nn.Module, name: str, sparsity: float, data: Images) -> nn.Module:
    """Return the module with the zeros of DRIVE, and with statistics of BatchNorm that fit."""
    recipe = RECIPES[name]
    batches = _batches(name, recipe.rounds, data, seed=1)
    masks = find_masks(module, DRIVE(rounds=recipe.rounds), sparsity=sparsity, batches=batches, loss_fn=networks.loss)
    masks.apply_(module)
    if any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules()):
        with torch.no_grad():
            for inputs, _ in batches:
                module.train()(inputs)
    return module


def _batches(name: str, count: int, data: Images, seed: int) -> list[Batch]:
    recipe = RECIPES[name]
    return data.batches(recipe.batch_size, networks.pixels_of(name), count, seed)
