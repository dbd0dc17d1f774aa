"""What compact uses of torch-pruning is there, one test a name: what fails was dropped or changed there."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning
from compacted import assert_same, numbers, sizes
from models import MLP, randomised
from torch import Tensor, nn

from lightning_drive import compact
from lightning_drive.compaction.dependency_graph import DependencyGraph, library

SEEN_IN = "torch-pruning 1.6.0 has it; `compaction/dependency_graph.py` uses it"


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten()),
        nn.Linear(48, 2),
    )


def forward(module: nn.Module, given: Any) -> Any:
    return module(given)


@pytest.fixture
def module() -> nn.Sequential:
    return network().eval()


@pytest.fixture
def graph(module: nn.Sequential) -> Any:
    """torch-pruning's own graph, built as we build it."""
    graph = torch_pruning.DependencyGraph()
    graph.build_dependency(module, torch.ones(1, 2, 4, 4), forward_fn=forward, ignored_layers=[], verbose=False)
    return graph


def group(graph: Any, layer: nn.Module, channels: list[int]) -> Any:
    return graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, channels)


def test_build_dependency(module: nn.Sequential) -> None:
    """With a forward of our own, which is given the module and the input, and layers to enter."""
    calls: list[Any] = []

    def noted(module: nn.Module, given: Any) -> Any:
        calls.append(given)
        return module(given)

    graph, given = torch_pruning.DependencyGraph(), torch.ones(1, 2, 4, 4)
    graph.build_dependency(module, given, forward_fn=noted, ignored_layers=[module], verbose=False)
    assert len(calls) == 1, SEEN_IN
    assert calls[0] is given, SEEN_IN


def test_module2node(graph: Any, module: nn.Sequential) -> None:
    """Nodes by layer, and by what stands for an operation that is no layer; another mapping can be put in its place."""
    assert {module[0], module[1], module[3], module[5]} <= graph.module2node.keys(), SEEN_IN
    assert len(graph.module2node) > 4, SEEN_IN
    graph.module2node = {module[0]: graph.module2node[module[0]]}
    assert len(group(graph, module[0], [0]).items) > 2, SEEN_IN


@pytest.mark.parametrize("name", ["module", "grad_fn", "inputs", "outputs", "dependencies", "type"])
def test_node(name: str, graph: Any) -> None:
    assert all(hasattr(node, name) for node in graph.module2node.values()), SEEN_IN


def test_node__links(graph: Any, module: nn.Sequential) -> None:
    """A node has a dependency on each of its neighbours, once it is linked."""
    node = graph.module2node[module[1]]
    assert [source.module for source in node.inputs] == [module[0]], SEEN_IN
    assert len(node.dependencies) >= len(node.inputs) + len(node.outputs) == 2, SEEN_IN


@pytest.mark.parametrize("name", ["target", "handler", "index_mapping"])
def test_dependency(name: str, graph: Any) -> None:
    every = [dependency for node in graph.module2node.values() for dependency in node.dependencies]
    assert every
    assert all(hasattr(dependency, name) for dependency in every), SEEN_IN


def test_index_mapping(graph: Any, module: nn.Sequential) -> None:
    """A list of functions of indices, to which one can be added that ends the search."""

    def stop(indices: Any) -> Any:
        raise ValueError("stopped")

    for dependency in graph.module2node[module[0]].dependencies:
        dependency.index_mapping.append(stop)
    with pytest.raises(ValueError, match="stopped"):
        group(graph, module[0], [0])


def test_pruning_group(graph: Any, module: nn.Sequential) -> None:
    """Its items have the target and the handler of a dependency, and indices with the root's channels beside them."""
    items = group(graph, module[3], [1]).items
    [reader] = [item for item in items if item.dep.target.module is module[5]]
    assert reader.dep.handler == graph.get_pruner_of_module(module[5]).prune_in_channels, SEEN_IN
    assert list(reader.idxs) == list(range(16, 32)), SEEN_IN
    assert list(reader.root_idxs) == [1] * 16, SEEN_IN


def test_pruner(graph: Any, module: nn.Sequential) -> None:
    """It takes channels out of one layer, in place, and tells inputs from outputs."""
    pruner = graph.get_pruner_of_module(module[0])
    pruner.prune_out_channels(module[0], [1, 2])
    pruner.prune_in_channels(module[0], [0])
    assert tuple(module[0].weight.shape) == (2, 1, 3, 3), SEEN_IN
    assert module[0].out_channels == 2, SEEN_IN
    assert tuple(module[3].weight.shape) == (3, 4, 1, 1), SEEN_IN


def test_optype() -> None:
    assert torch_pruning.ops.OPTYPE.ELEMENTWISE in torch_pruning.ops.OPTYPE, SEEN_IN


def test_type(graph: Any) -> None:
    """A node of another type is taken for elementwise, and passes channels on as they are."""
    views = [node for node in graph.module2node.values() if node.type == torch_pruning.ops.OPTYPE.RESHAPE]
    assert len(views) == 1, SEEN_IN
    views[0].type = torch_pruning.ops.OPTYPE.ELEMENTWISE


# Our own graph.


@pytest.fixture
def own(module: nn.Sequential) -> DependencyGraph:
    graph = DependencyGraph()
    graph.build(module, torch.ones(1, 2, 4, 4), forward, [module])
    return graph


def test_parts(own: DependencyGraph, module: nn.Sequential) -> None:
    parts = own.parts(module[3], [1])
    assert parts is not None
    found = {(part.node.module, part.reads): (part.indices, part.roots) for part in parts}
    assert found[module[3], False] == ([1], [1])
    assert found[module[5], True] == ([*range(16, 32)], [1] * 16)
    assert own.parts(module[3], [1]) is not None  # the graph is as it was


def test_stop_at(own: DependencyGraph, module: nn.Sequential) -> None:
    """Groups that reach the operation are given up, others are not."""
    own.stop_at(lambda node: node.module is module[5])
    assert own.parts(module[3], [1]) is None
    assert own.parts(module[0], [1]) is not None


def test_remove(own: DependencyGraph, module: nn.Sequential) -> None:
    own.remove_(module[0], {3, 1}, reads=False)
    own.remove_(module[3], {3, 1}, reads=True)
    assert tuple(module[0].weight.shape) == (2, 2, 3, 3)
    assert tuple(module[3].weight.shape) == (3, 2, 1, 1)


def test_library() -> None:
    assert library() is torch_pruning


# Parts that torch-pruning stumbles over.


class Between(nn.Module):
    """A convolution, and then anything that keeps the shape."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(8, 8, 1), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.conv(x))


class Unit(nn.Module):
    """Half of the channels goes through a branch, then the halves are shuffled, as in ShuffleNet."""

    def __init__(self, halves: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1, 1, 4))
        self.halves = halves

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.halves(x)
        joined = torch.cat((left, self.branch(right)), 1)
        return joined.view(-1, 2, 4, *x.shape[2:]).transpose(1, 2).contiguous().view(x.shape)


class Answer(nn.Linear):
    """A layer that returns something else than a tensor."""

    def forward(self, x: Tensor) -> Any:
        return {"answer": super().forward(x.movedim(1, -1)).movedim(-1, 1).contiguous()}


class Asked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Answer(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)["answer"]  # type: ignore[no-any-return]


class Cat(torch.autograd.Function):
    """Has the name of an operation of torch, and does something else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(1)


STUMBLING: dict[str, Callable[[], list[nn.Module]]] = {
    "chunks": lambda: [Unit(lambda x: x.chunk(2, 1)) for _ in range(3)],
    "splits": lambda: [Unit(lambda x: x.split([4, 4], 1)) for _ in range(4)],
    "slices": lambda: [Unit(lambda x: (x[:, :4], x[:, 4:])) for _ in range(5)],  # took a minute
    "unbound": lambda: [Unit(lambda x: x.unflatten(1, (2, 4)).unbind(1)) for _ in range(2)],
    "nested_splits": lambda: [
        Between(lambda x: torch.cat([torch.cat(half.split(1, 1), 1) for half in x.chunk(2, 1)], 1)) for _ in range(3)
    ],
    "flattened_halves": lambda: [
        Between(lambda x: torch.cat([half.flatten(1) for half in x.chunk(2, 1)], 1).view(x.shape)) for _ in range(3)
    ],
    "layer_that_returns_a_dictionary": lambda: [Asked()],
    "function_with_a_known_name": lambda: [Between(Cat.apply), Between(Cat.apply)],  # type: ignore[list-item]
}


@pytest.mark.parametrize("kind", STUMBLING)
def test_compact__part_that_torch_pruning_stumbles_over(kind: str) -> None:
    """Is left alone, and all before and after it is compacted."""
    middle = STUMBLING[kind]()
    before = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU()
    after = nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 9), nn.Linear(9, 4)
    given = nn.Sequential(*before, *middle, *after)
    randomised(given)
    with torch.no_grad():
        for layer in (before[0], after[0]):
            layer.weight[::2] = layer.bias[::2] = 0  # type: ignore[index]
    small = compact(given, numbers(2, 3, 6, 6))
    assert_same(given, small, (3, 6, 6))
    assert small[2].in_channels == small[-2].in_features == 8  # type: ignore[index]
    left = [sizes(layer) for layer in nn.Sequential(*middle).modules() if isinstance(layer, nn.Conv2d)]
    kept = small[len(before) : -len(after)]  # type: ignore[index]
    assert [sizes(layer) for layer in kept.modules() if isinstance(layer, nn.Conv2d)] == left


def test_compact__not_followed_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("torch_pruning")
    monkeypatch.setattr(library.DependencyGraph, "_build_dependency", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"torch-pruning cannot follow this module: ZeroDivisionError"):
        compact(MLP(4, 3), numbers(2, 4))


def test_compact__library_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-drive\[compact\]'"):
        compact(MLP(4, 3), numbers(2, 4))
