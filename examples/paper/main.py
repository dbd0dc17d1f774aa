"""Run one of the paper's experiments, by one method, through LightningCLI.

    pip install -e '.[examples,cli]'
    python examples/paper/main.py fit --config resnet18_cifar10.yaml --config drive.yaml --data.download=true

The first file sets what to train and how, the second how to prune; without it the network stays dense. A file that does
not exist is looked for in `configs/`, next to this script:

    experiments     alexnet_cifar10, vgg16_cifar10, resnet18_cifar10, vgg16_cifar100, resnet18_cifar100,
                    vgg16_tinyimagenet, resnet18_tinyimagenet, resnet18_imagenet32; and two of our own
                    for a CPU: convnet_cifar10, convnet_cifar10_full, and digits (of scikit-learn)
    methods         drive, imp, snip, synflow, gradual; for comparison magnitude, iterative_snip, warmup_snip,
                    warmup_synflow, drive_long, gradual_exponential, gradual_drive,
                    gradual_drive_exponential, gradual_exponential_half, gradual_exponential_late,
                    gradual_long, gradual_exponential_long

The command line overrides the files:

    --pruning.sparsity=0.993                     fraction of the weights to remove
    --data.root=DIR                              where the images are
    --data=ImageTree --data.root=DIR             any images, DIR/train/<class>/* and DIR/test/<class>/*
    --protocol.epochs=10                         epochs of the tested network; IMP's cycles come before them
    --pruning.control=shuffle                    for comparison: shuffle the masks within each layer

Accuracy on the test images is measured after every epoch, and nothing is selected by it. `run.py` starts many runs, and
`tables.py` compares their results with the paper's.
"""

import sys
import warnings

from classifier import ImageClassifier
from images import Images
from protocol import PaperCLI, find_configs


def main() -> PaperCLI:
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # Lightning 2.6 with torch 2.15
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the images are in memory
    sys.argv[1:] = find_configs(sys.argv[1:])
    return PaperCLI(ImageClassifier, Images, subclass_mode_data=True)


if __name__ == "__main__":
    main()
