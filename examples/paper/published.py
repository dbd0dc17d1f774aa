"""The values in the paper: Saikumar & Varghese, "DRIVE: Dual Gradient-Based Rapid Iterative Pruning", 2024.

Copied from arXiv:2404.03687: accuracies in percent of the test images, by experiment, method and fraction of the
weights removed, and the seconds that pruning took. They are single numbers, without a deviation. The paper doesn't say
which AlexNet it trained, nor with which momentum, weight decay and augmentation. Under Tiny ImageNet it prints the same
row for SNIP for both VGG-16 and ResNet-18: a copy error, so both are left out. Where another method is missing, we have
no value for it. VGG-16's 10.00 and 1.00 for SNIP are the accuracies of guessing.
"""

Accuracies = dict[str, dict[float, float]]  # method to sparsity to percent


def at(sparsities: tuple[float, ...], **rows: tuple[float, ...]) -> Accuracies:
    """Map the values of every method's row to their sparsities."""
    return {method: dict(zip(sparsities, row, strict=True)) for method, row in rows.items()}


HIGH = (0.9, 0.95, 0.98, 0.993)

UNPRUNED = {
    "alexnet_cifar10": 84.20,
    "vgg16_cifar10": 92.40,
    "resnet18_cifar10": 93.70,
    "vgg16_cifar100": 65.50,
    "resnet18_cifar100": 66.50,
    "vgg16_tinyimagenet": 48.74,
    "resnet18_tinyimagenet": 49.41,
    "resnet18_imagenet32": 54.11,
}
ACCURACIES: dict[str, Accuracies] = {
    "alexnet_cifar10": at(
        HIGH,
        snip=(83.09, 79.95, 72.95, 58.35),
        synflow=(86.37, 84.02, 78.61, 66.64),
        drive=(86.97, 87.21, 85.37, 74.49),
        imp=(85.76, 83.58, 80.57, 76.24),
    ),
    "vgg16_cifar10": at(
        HIGH,
        snip=(92.56, 92.01, 91.31, 10.00),
        synflow=(91.32, 90.44, 89.79, 87.63),
        drive=(92.80, 92.68, 91.36, 89.77),
        imp=(91.61, 90.20, 90.04, 88.35),
    ),
    "resnet18_cifar10": at(
        HIGH,
        snip=(93.56, 92.03, 89.66, 84.56),
        synflow=(91.05, 90.23, 88.74, 82.62),
        drive=(93.59, 92.14, 89.86, 85.90),
        imp=(91.79, 90.81, 90.71, 88.66),
    ),
    "vgg16_cifar100": at(
        HIGH,
        snip=(65.11, 64.06, 56.78, 1.00),
        synflow=(63.72, 63.02, 61.45, 54.24),
        drive=(65.05, 64.36, 61.58, 59.70),
        imp=(65.80, 65.50, 63.60, 61.20),
    ),
    "resnet18_cifar100": at(
        HIGH,
        snip=(64.05, 62.90, 58.38, 33.97),
        drive=(64.34, 63.01, 60.30, 57.44),
        imp=(64.44, 63.81, 61.94, 61.08),
    ),
    "vgg16_tinyimagenet": at(
        HIGH,
        synflow=(47.23, 43.03, 40.46, 30.86),
        drive=(48.29, 45.60, 42.25, 37.97),
        imp=(47.85, 46.79, 44.26, 36.26),
    ),
    "resnet18_tinyimagenet": at(
        HIGH,
        drive=(45.32, 43.89, 42.79, 33.01),
        imp=(46.01, 44.54, 42.35, 40.70),
    ),
    "resnet18_imagenet32": at(
        (0.7, 0.8, 0.9, 0.95),
        snip=(48.90, 45.51, 36.62, 21.83),
        synflow=(48.39, 45.74, 39.38, 31.27),
        drive=(49.33, 46.49, 40.97, 33.16),
        imp=(48.30, 45.58, 40.21, 33.94),
    ),
}
PRUNING_HARDWARE = "RTX A6000"
PRUNING_SECONDS = {
    "alexnet_cifar10": {"snip": 3, "synflow": 4, "drive": 220, "imp": 24_000},
    "resnet18_cifar10": {"snip": 2, "synflow": 3, "drive": 270, "imp": 21_000},
    "resnet18_imagenet32": {"drive": 493, "imp": 428_500},
}
