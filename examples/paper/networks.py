"""The networks of the paper, for images of 32x32 pixels and more, and two small ones for computers without a GPU.

ResNet-18 and VGG-16 are torchvision's with the usual changes for small images, and keep its names of parameters; only
VGG-16's three linear layers have become one, `classifier`. The paper does not say which AlexNet it trains, and
torchvision's needs images of 63 pixels: see `alexnet` for our guess.

| network | parameters (10 classes) | prunable weights |
| --- | --- | --- |
| alexnet | 23,468,874 | 23,459,520 |
| vgg16 | 14,728,266 | 14,715,584 |
| resnet18 | 11,173,962 | 11,164,352 |
| convnet | 391,466 | 390,496 |
| digitnet | 24,058 | 23,824 |
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, TypeAlias

import torchvision
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

Network: TypeAlias = Literal["alexnet", "vgg16", "resnet18", "convnet", "digitnet"]


def build(network: Network, num_classes: int) -> nn.Module:
    """Build a network, with initial weights drawn from torch's global random state."""
    return NETWORKS[network](num_classes)


def alexnet(num_classes: int) -> nn.Sequential:
    """Build a guess at the paper's AlexNet, for 32x32 pixels; larger images end in the same 2x2 places by averaging.

    These are the five convolutions and three linear layers of torchvision's AlexNet, with a first convolution of 3x3
    and stride 2 in place of 11x11 and stride 4, and pooling over 2x2. We chose it since it keeps AlexNet's widths, and
    most weights in the linear layers; other AlexNets for CIFAR-10 have 2.5 to 8.5 million weights. Initial
    weights are torch's own (uniform, Kaiming with a = sqrt(5)), as in torchvision's AlexNet.
    """
    return nn.Sequential(
        nn.Sequential(
            *(nn.Conv2d(3, 64, kernel_size=3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 192, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(192, 384, kernel_size=3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, kernel_size=3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        ),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Sequential(
            *(nn.Dropout(), nn.Linear(256 * 2 * 2, 4096), nn.ReLU()),
            *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()),
            nn.Linear(4096, num_classes),
        ),
    )


def vgg16(num_classes: int) -> nn.Sequential:
    """Build VGG-16 with BatchNorm and a single linear layer, as is usual for small images.

    The convolutions reduce 32x32 pixels to one place; more places (2x2 for 64x64 pixels) are averaged. Initial
    weights are torchvision's VGG's: convolutions normal (Kaiming, fan-out), the linear layer normal with 0.01.
    """
    features = make_layers(cfgs["D"], batch_norm=True)
    classifier = nn.Linear(512, num_classes)
    kaiming_(features)
    nn.init.normal_(classifier.weight, 0, 0.01)
    nn.init.zeros_(classifier.bias)
    return nn.Sequential(
        OrderedDict(features=features, avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), classifier=classifier)
    )


def resnet18(num_classes: int) -> nn.Module:
    """Build torchvision's ResNet-18 with a first convolution of 3x3 and stride 1, and without max-pooling.

    Initial weights are torchvision's ResNet's: convolutions normal (Kaiming, fan-out), the linear layer torch's own.
    """
    network = torchvision.models.resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    kaiming_(network.conv1)
    return network


def convnet(num_classes: int) -> nn.Sequential:
    """Build four convolutions with BatchNorm, the first with stride 2: quick enough for a CPU. Not in the paper.

    Initial weights are torch's own.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 256)):
        stride = 2 if inputs == 3 else 1
        layers += [nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2) if outputs < 256 else nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, num_classes))


def digitnet(num_classes: int) -> nn.Sequential:
    """Build three convolutions with BatchNorm for grey images of 8x8 pixels. Not in the paper.

    Initial weights are torch's own.
    """
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def kaiming_(module: nn.Module) -> None:
    """Draw the weights of convolutions as torchvision does for ResNet and VGG (He et al., 2015), and zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


NETWORKS: dict[Network, Callable[[int], nn.Module]] = {
    "alexnet": alexnet,
    "vgg16": vgg16,
    "resnet18": resnet18,
    "convnet": convnet,
    "digitnet": digitnet,
}
