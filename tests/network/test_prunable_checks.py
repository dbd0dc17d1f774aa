"""Parameters that cannot be pruned weight by weight are named before anything runs, with a way out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_drive import DRIVEPruningCallback, Magnitude, Random, find_masks
from lightning_drive.network import prunable


def pair(first: torch.Tensor, second: torch.Tensor) -> nn.ModuleDict:
    layers = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    layers["first"].weight.data, layers["second"].weight.data = first, second
    return layers


class Embedded(nn.Module):
    """A head over the memory of an embedding, which is not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.embedding, self.other = nn.Linear(4, 5, bias=False), nn.Embedding(5, 4), nn.Linear(4, 4)
        self.head.weight.data = self.embedding.weight.data


FLAT, GRID = torch.arange(40.0), torch.arange(32.0).view(4, 8)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        pytest.param(pair(FLAT[:16].view(4, 4), FLAT[:16].view(4, 4)), "first second", id="tied_by_data"),
        pytest.param(pair(FLAT[:16].view(4, 4), FLAT[:16].view(4, 4).T), "first second", id="transposed"),
        pytest.param(pair(FLAT[:16].view(4, 4), FLAT[15:31].view(4, 4)), "first second", id="overlapping_slices"),
        pytest.param(pair(GRID[:, :4], GRID[:, 3:7]), "first second", id="overlapping_columns"),
        pytest.param(
            pair(FLAT[:16].view(4, 4), FLAT.view(torch.bfloat16)[2:18].view(4, 4)), "first second", id="types"
        ),
        pytest.param(Embedded(), "embedding head", id="unselected_embedding"),
        pytest.param(nn.ModuleList([pair(GRID[:, :4], GRID[:, 3:7].T)]), "first second", id="nested"),
    ],
)
def test_check_memory__shared_error(module: nn.Module, names: str) -> None:
    """A mask of one would prune the other: both are named, and what can be done."""
    one, two = names.split()
    with pytest.raises(ValueError, match=rf"{one}\.weight' and '.*{two}\.weight' are two parameters over one memory"):
        prunable.prunable_parameters(module)


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(FLAT[:4].expand(4, 4), id="rows"),
        pytest.param(FLAT[:4].view(4, 1).expand(4, 4), id="columns"),
        pytest.param(FLAT.as_strided((4, 4), (1, 1)), id="windows"),
    ],
)
def test_check_memory__expanded_error(weight: torch.Tensor) -> None:
    """Weights that are one number cannot be pruned one by one."""
    with pytest.raises(ValueError, match=r"Several weights of 'first\.weight' are one number in memory"):
        prunable.prunable_parameters(pair(weight, torch.ones(4, 4)))
    assert list(prunable.prunable_parameters(pair(weight, torch.ones(4, 4)), exclude=["first.*"])) == ["second.weight"]


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(pair(FLAT[:16].view(4, 4), FLAT[16:32].view(4, 4)), id="slices_of_a_flat_buffer"),
        pytest.param(pair(FLAT[20:36].view(4, 4).T, FLAT[:16].view(4, 4)), id="slices_transposed"),
        pytest.param(pair(GRID[:, :4], GRID[:, 4:]), id="columns_side_by_side"),
        pytest.param(pair(FLAT[:32:2].view(4, 4), FLAT[1:33:2].view(4, 4)), id="interleaved"),
    ],
)
def test_check_memory__one_storage(module: nn.Module) -> None:
    """Parameters may share a storage as long as no number is in both."""
    assert list(prunable.prunable_parameters(module)) == ["first.weight", "second.weight"]


def test_check_memory__unselected_overlap() -> None:
    """Who shares memory does not matter where none of them is pruned; a tie of the parameter itself is one weight."""
    module = Embedded()
    assert list(prunable.prunable_parameters(module, exclude=["head.weight"])) == ["other.weight"]
    module.head.weight = module.embedding.weight
    assert "other.weight" in prunable.prunable_parameters(module)


def test_check_kinds__lazy_error() -> None:
    with pytest.raises(ValueError, match=r"'0\.weight' is not initialised yet"):
        prunable.prunable_parameters(nn.Sequential(nn.LazyLinear(3)))


def test_check_kinds__complex_error() -> None:
    module = nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"'0\.weight' is complex \(torch\.complex64\).*`exclude=\['0\.weight'\]`"):
        prunable.prunable_parameters(module)
    assert list(prunable.prunable_parameters(module, exclude=["0.weight"])) == ["1.weight"]


class Uncopied(torch.Tensor):
    """Has no `new_empty` of its own, without which torch does not copy it."""


def odd_linear(change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[0].weight = nn.Parameter(change(module[0].weight.detach()))
    return module


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Linear(4, 4))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize(
    ("make", "text"),
    [
        pytest.param(lambda: odd_linear(lambda w: w.to("meta")), "is on the meta device.*to_empty", id="meta"),
        pytest.param(lambda: odd_linear(lambda w: w.to(torch.float8_e5m2)), "is in torch.float8_e5m2", id="float8"),
        pytest.param(
            lambda: odd_linear(lambda w: w.to_sparse_csr()), r"is stored as torch.sparse_csr.*to_dense", id="csr"
        ),
        pytest.param(lambda: odd_linear(lambda w: w.to_sparse()), r"is stored as torch.sparse_coo.*to_dense", id="coo"),
        pytest.param(
            lambda: odd_linear(lambda w: w.as_subclass(Uncopied)), "is a Uncopied, which cannot be copied", id="class"
        ),
        pytest.param(made_in_inference_mode, r"was made in `torch.inference_mode\(\)`", id="inference"),
    ],
)
@pytest.mark.parametrize("method", [Magnitude(), Random()], ids=["magnitude", "random"])
def test_check_numbers(make: Callable[[], nn.Module], text: str, method: Any) -> None:
    """What cannot be pruned is named before anything runs, with what to do; without it the rest can be."""
    with pytest.raises(ValueError, match=rf"'0\.weight' {text}.*`exclude=\['0\.weight'\]`"):
        find_masks(make(), method, sparsity=0.5)
    assert list(prunable.prunable_parameters(make(), exclude=["0.weight"])) == ["1.weight"]


def test_check_numbers__plan_of_meta() -> None:
    """A plan needs shapes only."""
    plan = DRIVEPruningCallback(sparsity=0.5).plan(nn.Linear(4, 4, device="meta"))
    assert (plan.kept[-1], plan.num_weights, plan.overall_sparsity) == (8, 20, 0.4)
