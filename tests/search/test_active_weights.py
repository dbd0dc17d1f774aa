"""Paths are followed in the mode that has most of them, and what cannot be followed is said."""

from typing import Any

import pytest
import searches
import torch
from followed import Between
from searches import Searched
from torch import Tensor, nn

from lightning_drive import SNIP, Magnitude, find_masks
from lightning_drive.network.masks import Masks
from lightning_drive.network.prunable import prunable_parameters
from lightning_drive.search.methods import Method

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class BoxDetector(nn.Module):
    """Checks its boxes; returns losses in train mode, and what it finds, which says little of how, in eval mode."""

    def __init__(self, dead_end: str) -> None:
        super().__init__()
        self.body, self.head, self.dead_end = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 5, bias=False), dead_end

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Any:
        if any((target["boxes"][:, 2:] <= target["boxes"][:, :2]).any() for target in targets):
            raise AssertionError("All bounding boxes should have positive height and width.")
        boxes = self.head(torch.stack([self.body(image).mean((1, 2)) for image in images]))
        if self.training:
            goal = torch.stack([target["boxes"].mean(0) for target in targets])
            return {"classes": boxes[:, 4].square().mean(), "boxes": (boxes[:, :4] - goal).abs().mean()}
        if self.dead_end == "constants":
            return torch.zeros(len(boxes), 4)
        if self.dead_end == "no_boxes":
            return boxes[boxes[:, 0] < -1]
        raise RuntimeError("no boxes")


def of_boxes(module: Any, batch: Any) -> Tensor:
    return sum(module(*batch).values())  # type: ignore[no-any-return]


BOXES = torch.tensor([[1.0, 2.0, 5.0, 6.0], [0.0, 0.0, 3.0, 4.0]])
BOXED = [torch.randn(3, 8, 8), torch.randn(3, 6, 9)], [{"boxes": BOXES[:1]}, {"boxes": BOXES}]


def diagnosed(module: nn.Module, method: Method, sparsity: float = 0.5, **settings: Any) -> Searched:
    return searches.search(module, method, parameters=prunable_parameters(module), sparsity=sparsity, **settings)


@pytest.mark.parametrize("dead_end", ["constants", "no_boxes", "error"])
def test_detectors_are_followed_in_train_mode(dead_end: str) -> None:
    module = BoxDetector(dead_end)
    names = prunable_parameters(module)
    masks = Masks({name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in names.items()})
    masks["body.weight"][1] = False
    masks["head.weight"][:, 2] = False
    diagnosis = diagnosed(module, SNIP(), masks.sparsity, batches=[BOXED], loss_fn=of_boxes, masks=masks)
    assert diagnosis.path_error is None
    assert diagnosis.warnings == []
    assert diagnosis.active is not None
    assert diagnosis.active["body.weight"].any(3).any(2).any(1).tolist() == [True, False, False, True]
    assert diagnosis.active["head.weight"].any(0).tolist() == [True, False, False, True]


def test_nothing_arrives_even_without_masks() -> None:
    """That no path is diagnosis is said as such; it is no fault of the masks."""

    class Chooses(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1, keepdim=True) * torch.ones(3)

    diagnosis = diagnosed(Chooses(4, 3), Magnitude(), batches=[X])
    assert diagnosis.active is None
    assert diagnosis.path_error is not None
    assert "Nothing of the input reaches the output of the network." in diagnosis.path_error
    assert diagnosis.warnings == []


@pytest.mark.parametrize(
    "branch", [nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))], ids=["layer", "layers"]
)
def test_what_is_not_reached_even_without_masks_counts_as_active(branch: nn.Module) -> None:
    class Constant(nn.Module):
        """Has a branch that sees zeros, as the first self-attention of DETR's decoder does."""

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.branch = nn.Linear(4, 3), branch

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.branch(torch.zeros_like(x))  # type: ignore[no-any-return]

    module = Constant()
    masks = Masks({name: torch.rand_like(value) > 0.5 for name, value in prunable_parameters(module).items()})
    diagnosis = diagnosed(module, Magnitude(), masks.sparsity, batches=[X], masks=masks)
    assert diagnosis.path_error is None
    assert diagnosis.active is not None
    assert all(diagnosis.active[name].equal(mask) for name, mask in masks.items() if "branch" in name)
    (text,) = diagnosis.warnings
    assert text.startswith("No path through 'branch.")


def test_errors_of_torch_are_cut_short() -> None:
    """Torch lists all its backends where an operation has no kernel, on a hundred lines."""
    text = "Could not run 'aten::x'. " + "It is available for: [CPU]. " * 50 + "\nregistered at a.cpp\n" * 100

    def fail(x: Tensor) -> Tensor:
        raise NotImplementedError(text)

    module = Between(fail)
    with pytest.warns(UserWarning, match="paths could not be followed") as caught:
        find_masks(module, Magnitude(), sparsity=0.5, example_input=torch.zeros(1, 4))
    texts = [str(warning.message) for warning in caught]
    assert max(map(len, texts)) < 600
    assert "registered" not in " ".join(texts)
