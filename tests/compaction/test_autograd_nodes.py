"""What compact reads of autograd's nodes is there, one test a name: what fails was dropped or changed by torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_drive.compaction import autograd_nodes

SEEN_IN = "torch 2.14 has it; `compaction/autograd_nodes.py` reads it"


def node(function: Callable[[Tensor], Tensor], *shape: int) -> Any:
    result = function(torch.ones(shape or (2, 3, 4), requires_grad=True))
    return result.grad_fn


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


def test_name() -> None:
    """Without the namespace of some, the number behind it and the word ``Backward``."""
    names = [node(torch.relu).name(), node(lambda x: x.sum(1)).name(), node(lambda x: torch.cat([x, x])).name()]
    assert all("Backward" in name for name in names), SEEN_IN
    operations = [autograd_nodes.operation(node(function)) for function in (torch.relu, lambda x: x.sum(1))]
    assert operations == ["Relu", "Sum"]


def test_backward_c_function() -> None:
    """The type of nodes of custom functions, whatever these are called."""
    custom = node(Own.apply)
    assert isinstance(custom, torch.autograd.function.BackwardCFunction), SEEN_IN
    assert not isinstance(node(torch.relu), torch.autograd.function.BackwardCFunction), SEEN_IN
    assert autograd_nodes.operation(custom) == ""


def test_output_shape__custom() -> None:
    """It is not asked for where the output is gone: torch 2.6 crashes then."""
    assert autograd_nodes.is_custom(node(Own.apply))
    assert autograd_nodes.output_shape(node(Own.apply)) == ()


@pytest.mark.parametrize("function", [torch.relu, lambda x: x.sum(1, keepdim=True), lambda x: x.view(2, 12)])
def test_input_metadata(function: Callable[[Tensor], Tensor]) -> None:
    """Which has the shape of what comes out: it goes in on the way back."""
    assert hasattr(node(function), "_input_metadata"), SEEN_IN
    assert autograd_nodes.output_shape(node(function)) == tuple(function(torch.ones(2, 3, 4)).shape)


@pytest.mark.parametrize("dimension", [0, 1, 2, -1, -2])
def test_saved_dim__of_cat(dimension: int) -> None:
    joined = node(lambda x: torch.cat([x, x], dimension))
    assert hasattr(joined, "_saved_dim"), SEEN_IN
    assert autograd_nodes.concatenated_dimension(joined, 3) == dimension % 3


@pytest.mark.parametrize("reduction", [torch.sum, torch.mean, torch.amax, torch.amin])
@pytest.mark.parametrize("dimensions", [(1,), (-1,), (0, 2), (-2, -1)])
def test_saved_dim__of_reductions(reduction: Any, dimensions: tuple[int, ...]) -> None:
    reduced = node(lambda x: reduction(x, dimensions))
    assert hasattr(reduced, "_saved_dim"), SEEN_IN
    assert autograd_nodes.reduced_dimensions(reduced, 3) == {dimension % 3 for dimension in dimensions}


def test_saved_dim__of_all() -> None:
    """A sum over everything tells no dimensions."""
    assert autograd_nodes.reduced_dimensions(node(torch.sum), 3) == set()


@pytest.mark.parametrize("keeps", [True, False])
def test_saved_keepdim(keeps: bool) -> None:
    reduced = node(lambda x: x.mean(1, keepdim=keeps))
    assert hasattr(reduced, "_saved_keepdim"), SEEN_IN
    assert autograd_nodes.keeps_dimensions(reduced) == keeps


def test_next_functions() -> None:
    """Pairs of a node and a number, the node ``None`` for what has no gradient."""
    plain, masked = node(lambda x: x * x), node(lambda x: x * torch.ones(2, 3, 4))
    assert [len(pair) for pair in plain.next_functions] == [2, 2], SEEN_IN
    assert not autograd_nodes.takes_ungraded(plain)
    assert autograd_nodes.takes_ungraded(masked)


def test_variable() -> None:
    """The tensor of a node at which gradients gather."""
    x, y, apart = (torch.ones(3, requires_grad=True) for _ in range(3))
    assert (2 * x).grad_fn.next_functions[0][0].variable is x, SEEN_IN
    assert autograd_nodes.leaves_behind([(x * y).relu(), x.sum()]) == {x, y}
    assert apart not in autograd_nodes.leaves_behind([x * y])
