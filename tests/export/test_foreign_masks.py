"""Values and masks of other tools become the weights that the network multiplies by; all else stays as it is."""

from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_drive.export import foreign_masks


class Masked(nn.Module):
    """A parametrization with a mask, as tools write them themselves."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def pruned(form: str = "prune") -> nn.Module:
    torch.manual_seed(0)
    net = models.MLP(6, 8, 5, 3)
    for layer in (net[0], net[4]):
        mask = torch.rand(layer.weight.shape) > 0.5  # type: ignore[arg-type]
        if form == "prune":
            prune.custom_from_mask(layer, "weight", mask)
        elif form == "parametrization":
            parametrize.register_parametrization(layer, "weight", Masked(mask.float()))  # type: ignore[arg-type]
        else:
            layer.register_buffer(form, mask)
    return net


def test_joined__loads_into_the_plain_network() -> None:
    """Strictly, and it computes the same."""
    net, plain = pruned(), models.MLP(6, 8, 5, 3)
    weights = foreign_masks.joined(net.state_dict())
    assert list(weights.parts) == ["0.weight", "4.weight"]
    assert weights.others == {}
    plain.load_state_dict(dict(weights.state_dict))
    x = torch.randn(7, 6)
    assert torch.equal(plain(x), net(x))
    for index in (0, 4):
        prune.remove(net[index], "weight")  # type: ignore[index]
    assert net.state_dict().keys() == weights.state_dict.keys()
    assert all(torch.equal(weights.state_dict[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("form", "value", "mask"),
    [
        ("parametrization", "parametrizations.weight.original", "parametrizations.weight.0.mask"),
        ("mask", "weight", "mask"),
        ("weight_mask", "weight", "weight_mask"),
    ],
)
def test_joined__names_other_masks(form: str, value: str, mask: str) -> None:
    """What they prune, only their modules know: zeros may mark what is kept. Nothing is changed."""
    stored = pruned(form).state_dict()
    weights = foreign_masks.joined(stored)
    assert weights.state_dict is stored
    assert weights.parts == {}
    assert weights.others == {f"{index}.{value}": f"{index}.{mask}" for index in (0, 4)}


def test_joined__other_names() -> None:
    """Of recurrent layers, biases, and a module that is a layer itself."""
    cell, conv = nn.GRUCell(3, 4), nn.Conv2d(1, 2, 3)
    prune.l1_unstructured(cell, "weight_hh", amount=0.5)
    prune.l1_unstructured(conv, "bias", amount=1)
    assert foreign_masks.joined(cell.state_dict()).parts == {"weight_hh": ("weight_hh_orig", "weight_hh_mask")}
    assert foreign_masks.joined(conv.state_dict()).parts == {"bias": ("bias_orig", "bias_mask")}


def test_joined__fills_zeros_in() -> None:
    """Never multiplies: no NaN is left where the mask prunes, and no -0.0."""
    stored = {"w_orig": torch.tensor([float("nan"), -1.0, float("nan")]), "w_mask": torch.tensor([0, 0, 1])}
    weight = foreign_masks.joined(stored).state_dict["w"]
    assert torch.signbit(weight[:2]).tolist() == [False, False]
    assert (weight[:2] == 0).all()
    assert weight[2].isnan()
    assert list(stored) == ["w_orig", "w_mask"]


@pytest.mark.parametrize(
    "stored",
    [
        {"w_orig": torch.ones(2)},
        {"w_mask": torch.ones(2)},
        {"w_orig": torch.ones(2), "w_mask": torch.ones(3)},
        {"w_orig": torch.ones(2), "w_mask": torch.tensor([0.5, 1.0])},
        {"w_orig": torch.ones(2), "w_mask": torch.tensor([float("nan"), 1.0])},
        {"w_orig": torch.ones(2, dtype=torch.int64), "w_mask": torch.ones(2)},
        {"w_orig": torch.ones(2), "w_mask": torch.ones(2), "w": torch.ones(2)},
        {"w_orig": torch.ones(2, device="meta"), "w_mask": torch.ones(2)},
        {"w_orig": torch.ones(1).expand(10**12), "w_mask": torch.ones(1).expand(10**12)},
        {"_orig": torch.ones(2), "_mask": torch.ones(2)},
        {"parametrizations.w.original": torch.ones(2), "parametrizations.w.0.scale": torch.ones(2)},
        parametrizations.weight_norm(nn.Linear(2, 2)).state_dict(),
        nn.utils.spectral_norm(nn.Linear(2, 2)).state_dict(),
        {},
    ],
)
def test_joined__leaves_others_as_they_are(stored: Any) -> None:
    assert foreign_masks.joined(stored) == (stored, {}, {})
    assert foreign_masks.joined(stored).state_dict is stored


def test_joined__keeps_the_versions_of_modules() -> None:
    net = pruned()
    assert foreign_masks.joined(net.state_dict()).state_dict._metadata == net.state_dict()._metadata  # type: ignore[attr-defined]
