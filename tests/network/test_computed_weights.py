"""Weights that are computed for every pass are found, named with the call that makes them plain, or left out."""

import re
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_drive import DRIVEPruningCallback, IMPPruningCallback, Magnitude, find_masks
from lightning_drive.network import prunable


def test_computed__attention_error() -> None:
    """The input projection is no layer of its own, and yet it is found."""
    module = models.Attention()
    nn.utils.parametrizations.weight_norm(module.attention, "in_proj_weight")
    with pytest.raises(ValueError, match=r"'attention\.in_proj_weight' is computed"):
        prunable.prunable_parameters(module)
    names = list(prunable.prunable_parameters(module, exclude=["attention.in_proj_weight"]))
    assert names == ["attention.out_proj.weight", "fc.weight"]


@pytest.mark.parametrize(
    "parametrize",
    [
        pytest.param(nn.utils.parametrizations.weight_norm, id="weight_norm"),
        pytest.param(nn.utils.parametrizations.orthogonal, id="orthogonal"),
        pytest.param(nn.utils.spectral_norm, id="spectral_norm_by_hook"),
        pytest.param(lambda layer: prune.l1_unstructured(layer, "weight", 0.5), id="torch_prune"),
    ],
)
def test_computed__error(parametrize: Callable[[nn.Module], object]) -> None:
    """A weight that is computed anew before every forward pass would not keep its zeros."""
    module = models.MLP(4, 5, 3)
    parametrize(module[0])
    with pytest.raises(ValueError, match=r"'0\.weight' is computed"):
        prunable.prunable_parameters(module)


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        pytest.param(None, ["0.weight"], id="exclude_as_the_error_names_it"),
        pytest.param(None, ["0.*"], id="exclude_the_layer"),
        pytest.param(["2.*"], None, id="include_others"),
    ],
)
def test_computed__elsewhere(include: list[str] | None, exclude: list[str] | None) -> None:
    """Only a weight that is selected must be stored."""
    module = models.MLP(4, 5, 3)
    nn.utils.parametrizations.weight_norm(module[0])
    assert list(prunable.prunable_parameters(module, include, exclude)) == ["2.weight"]


class WeightDrop(nn.Module):
    """As language models have it: dropout on recurrent weights, which are written into the layer for every pass."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm
        weight = lstm.weight_hh_l0
        del lstm.weight_hh_l0
        self.weight_hh_l0_raw = nn.Parameter(weight.data)
        lstm.weight_hh_l0 = self.weight_hh_l0_raw.clone()


def computed_layers() -> nn.Module:
    return nn.Sequential(
        nn.utils.weight_norm(nn.LSTM(3, 3), "weight_hh_l0"),
        nn.utils.spectral_norm(nn.Linear(3, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Conv1d(3, 3, 1)),
        prune.l1_unstructured(nn.GRUCell(3, 3), "weight_ih", 0.5),
        WeightDrop(nn.LSTM(3, 3)),
        nn.utils.weight_norm(nn.Linear(3, 3)),
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "select",
    [
        pytest.param(lambda module: find_masks(module, Magnitude(), sparsity=0.5), id="find_masks"),
        pytest.param(lambda module: DRIVEPruningCallback(sparsity=0.5).plan(module), id="plan"),
        pytest.param(lambda module: IMPPruningCallback(sparsity=0.5, include=["*"]).plan(module), id="everything"),
    ],
)
def test_computed__all_at_once(select: Callable[[nn.Module], object]) -> None:
    """All are named in the order of the module, each with the call that makes it plain, and the text can be pasted."""
    module = computed_layers()
    with pytest.raises(ValueError, match="are computed anew") as caught:
        select(module)
    text = str(caught.value)
    names = ["0.weight_hh_l0", "1.weight", "2.weight", "3.weight_ih", "4.lstm.weight_hh_l0", "5.weight"]
    assert text.startswith(", ".join(map(repr, names)))
    for call, place in (
        ('torch.nn.utils.remove_weight_norm(layer, "weight_hh_l0")', "0.weight_hh_l0"),
        ("torch.nn.utils.remove_spectral_norm(layer)", "1.weight"),
        ('torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")', "2.weight"),
        ('torch.nn.utils.prune.remove(layer, "weight_ih")', "3.weight_ih"),
        ("torch.nn.utils.remove_weight_norm(layer)", "5.weight"),
    ):
        assert f"`{call}` for '{place}'" in text
    [exclude] = re.findall(r"`exclude=(\[.*\])`", text)
    left = prunable.prunable_parameters(module, exclude=[*re.findall("'([^']+)'", exclude)])
    assert list(left) == ["0.weight_ih_l0", "3.weight_hh", "4.lstm.weight_ih_l0"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("include", [None, ["*"], ["*.weight*"]])
def test_computed__frozen(include: list[str] | None) -> None:
    """What they are computed from is not trained, so they are left out as other frozen weights are."""
    module = computed_layers()[:4].requires_grad_(False).append(nn.Linear(3, 3))
    assert list(prunable.prunable_parameters(module, include)) == ["4.weight"]
    with pytest.raises(ValueError, match=r"\(0\.weight_ih_l0, .*1\.weight.* matched, but `requires_grad` is False\)"):
        prunable.prunable_parameters(module[:4])


def test_computed__many() -> None:
    """Those too many to read are counted, and what to paste stays short."""
    vocoder = nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)) for _ in range(30)))
    module = nn.ModuleDict({"vocoder": vocoder, "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"'vocoder\.7\.weight' and 22 more are computed.*`exclude=\['vocoder\.\*'\]`"):
        prunable.prunable_parameters(module)


def test_computed__adapter() -> None:
    """A frozen weight to which something trained is added is not frozen."""

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(3, 1))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + self.a

    layer = nn.Linear(3, 3).requires_grad_(False)
    nn.utils.parametrize.register_parametrization(layer, "weight", Adapter())
    with pytest.raises(ValueError, match="'weight' is computed anew"):
        prunable.prunable_parameters(layer)


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
def test_computed__sources_are_excluded_too(compute: Any) -> None:
    """Then it is not named as dense either."""
    net = nn.Sequential(compute(nn.Linear(8, 8)), nn.Linear(8, 8), compute(nn.Conv1d(8, 8, 3)), nn.Linear(8, 2))
    exclude = ["0.weight", "2.weight"]
    selected = prunable.prunable_parameters(net, exclude=exclude)
    assert list(selected) == ["1.weight", "3.weight"]
    assert prunable.dense_matrices(net, selected, exclude) == []
