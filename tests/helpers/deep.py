"""Deep networks for small images, as the papers use them."""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg16() -> nn.Sequential:
    """VGG-16 with BatchNorm for 32x32 pixels and ten classes: 14,715,584 weights."""
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG16:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
    return initialised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)))


def resnet110() -> nn.Sequential:
    """ResNet-110 for 32x32 pixels and ten classes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for width in (16, 32, 64):
        for _ in range(18):
            shortcut = None
            if width != channels:
                shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
            layers.append(BasicBlock(channels, width, stride=1 if shortcut is None else 2, downsample=shortcut))
            channels = width
    return initialised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)))


def initialised(network: nn.Sequential) -> nn.Sequential:
    """Kaiming-normal weights."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return network


def images(count: int, size: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of random images, 32x32, with random labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]
