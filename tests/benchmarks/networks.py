"""The networks that are measured, each with a loss and batches of noise in the shape of its data."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from paper import networks as paper
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Sequential:
    """3072-300-100-10, for images of 32x32 in color."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def wide_mlp() -> nn.Sequential:
    """3072-1024-1024-10, for images of 32x32 in color."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def small_vit() -> nn.Module:
    """ViT-S/16: torchvision's VisionTransformer in the size that DeiT-small has, for images of 224x224 in color."""
    return torchvision.models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536, num_classes=10
    )


class Transformer(nn.Module):
    """Twelve pre-norm blocks of width 128 with four heads, and a mean over the positions; 64 tokens in, classes out."""

    def __init__(self, width: int = 128, heads: int = 4, depth: int = 12, num_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Linear(48, width)  # 4x4 pixels in three colors
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(F.unfold(images, kernel_size=4, stride=4).transpose(1, 2))
        return self.head(self.blocks(tokens).mean(1))


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a LayerNorm and around a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](tokens)).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3)
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(attended)
        return tokens + self.feed_forward(self.norms[1](tokens))


class Recurrent(nn.Module):
    """Two layers of LSTM over 32 tokens, and a class for the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(1000, 128), nn.LSTM(128, 256, 2, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


def chain(depth: int) -> nn.Sequential:
    """Many small layers."""
    return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(16, 16), nn.ReLU())))


def deep_q() -> nn.Sequential:
    """As for reinforcement learning on a few numbers: a pass takes less than a millisecond."""
    return nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP 3072-300-100-10": mlp,
    "ResNet-18": lambda: paper.resnet18(10),
    "AlexNet": lambda: paper.alexnet(10),
    "VGG-16-BN": lambda: paper.vgg16(10),
    "ResNet-50": lambda: torchvision.models.resnet50(num_classes=10),
    "Transformer": Transformer,
    "MLP 3072-1024-1024-10": wide_mlp,
    "Transformer of width 384": lambda: Transformer(width=384, heads=6, depth=6),
    "ViT-small": small_vit,
}
LARGE_IMAGES = ("ResNet-50", "ViT-small")


def pixels_of(name: str) -> int:
    """Return the height and width of the images that a network is for."""
    return 224 if name in LARGE_IMAGES else 32


def batches(batch_size: int, pixels: int = 32, count: int = 4) -> list[Batch]:
    return [(torch.randn(batch_size, 3, pixels, pixels), torch.randint(10, (batch_size,))) for _ in range(count)]


def loss(module: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(module(images), labels)
