"""Every container that Lightning enters is entered, and comes back as what it was."""

import threading
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_drive.core import containers

ONE = torch.ones(2)


@dataclass
class Plain:
    x: Any
    name: str = "a"
    note: Any = field(default=None, init=False)


@dataclass(frozen=True)
class Frozen:
    x: Any


class Features(UserDict[str, Any]):
    """As feature extractors give them."""

    def to(self, device: Any) -> "Features":
        return Features({name: value.to(device) for name, value in self.items()})


class ReadOnly(Mapping[str, Any]):
    """A mapping that is made in a way of its own."""

    def __init__(self, x: Any, *, made_by: str) -> None:
        self.x, self.made_by = x, made_by

    def __getitem__(self, name: str) -> Any:
        return {"x": self.x}[name]

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


class Boxes(list[Any]):
    pass


class Pair(NamedTuple):
    x: Any
    y: int


class Encoding(UserDict[str, Any]):
    """Looks for its attributes among its entries, so that an empty one, as a copy begins, looks for ever."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Locked:
    """Moves to a device, and has what cannot be copied."""

    def __init__(self, x: Any) -> None:
        self.x, self.lock = x, threading.Lock()

    def to(self, device: Any) -> "Locked":
        return Locked(self.x.to(device))


class Held:
    """Has tensors, and nothing that Lightning looks for: `training_step` moves it."""

    def __init__(self, x: Any) -> None:
        self.x = x


class ByDot(dict[str, Any]):
    """Looks for all attributes among its entries, `__deepcopy__` as well."""

    __getattr__ = dict.__getitem__


class Unchanging(OrderedDict[str, Any]):
    """Is filled once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.is_full = False
        super().__init__(*args, **kwargs)
        self.is_full = True

    def __setitem__(self, name: str, value: Any) -> None:
        if self.is_full:
            raise TypeError("read only")
        super().__setitem__(name, value)


@dataclass(slots=True)
class Slots:
    x: Any
    lock: Any = field(default_factory=threading.Lock)


class Tied(NamedTuple):
    x: Any
    lock: Any


class Columns(Mapping[str, Any]):
    """Copies in a way of its own, as TensorDict does."""

    def __init__(self, **columns: Any) -> None:
        self.columns = columns

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def __deepcopy__(self, memo: Any) -> "Columns":
        return Columns(**{name: value.clone() for name, value in self.columns.items()})


class Graphs(SimpleNamespace):
    """A batch that is no container, but moves to a device."""

    def to(self, device: Any) -> "Graphs":
        return self


CONTAINERS = [
    (ONE, "y"),
    ["y", [ONE]],
    {"x": {"y": ONE}},
    OrderedDict(x=ONE),
    defaultdict(list, x=[ONE]),
    UserDict(x=ONE),
    Features(x=ONE),
    ReadOnly(ONE, made_by="hand"),
    Plain(ONE),
    Frozen({"x": ONE}),
    Boxes([ONE]),
    Pair(ONE, 3),
    Graphs(x=ONE, edges=None),
    Encoding(x=ONE),
    Locked([ONE]),
    Held(ONE),
    pack_sequence([ONE]),
    ByDot(x=ONE),
    Unchanging(x=ONE),
    Slots(ONE),
    Tied(ONE, threading.Lock()),
    defaultdict(list, x=ONE, lock=threading.Lock()),
    Columns(x=ONE),
    [Plain(Features(x=ONE))],
]


@pytest.mark.parametrize("tree", CONTAINERS, ids=lambda tree: type(tree).__name__)
def test_mapped(tree: Any) -> None:
    """The same container with other tensors in it; what was given stays as it is."""
    found = containers.mapped(lambda tensor: tensor * 2 if tensor.is_floating_point() else tensor, tree)
    assert type(found) is type(tree)
    assert containers.leaves(found)[0].tolist() == [2.0, 2.0]
    assert containers.leaves(tree)[0].tolist() == [1.0, 1.0]


def test_mapped__keeps_what_is_beside() -> None:
    twin = containers.mapped(torch.neg, ReadOnly(ONE, made_by="hand"))
    assert (twin.made_by, twin["x"].tolist()) == ("hand", [-1.0, -1.0])
    thing = object()
    assert containers.mapped(torch.neg, {"thing": thing, "name": "a"}) == {"thing": thing, "name": "a"}
    assert containers.mapped(torch.neg, Plain(ONE, "b")).name == "b"


@pytest.mark.parametrize(
    "tree", [None, "text", b"bytes", 3, (), {"a": 1}, torch.nn.Linear(2, 2), torch.float32], ids=str
)
def test_leaves__none(tree: Any) -> None:
    assert containers.leaves(tree) == []


def test_leaves__in_order() -> None:
    tensors = [torch.full((1,), float(index)) for index in range(4)]
    found = containers.leaves(({"b": tensors[0], "a": [tensors[1]]}, Plain(tensors[2]), tensors[3]))
    assert [tensor.item() for tensor in found] == [0.0, 1.0, 2.0, 3.0]


def test_mapped__cannot_be_copied() -> None:
    """It is shared: whatever Lightning does with it works on."""

    class Handle:
        __slots__ = ("x",)

        def __init__(self) -> None:
            self.x = ONE

        def to(self, device: Any) -> "Handle":
            return self

        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copies")

    handle = Handle()
    assert containers.mapped(torch.neg, [handle])[0] is handle


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (ONE, ((ONE,), {})),
        ((ONE, 2), ((ONE, 2), {})),
        ([ONE], (([ONE],), {})),
        ({"x": ONE}, ((), {"x": ONE})),
        (UserDict(x=ONE), ((), {"x": ONE})),
    ],
    ids=["tensor", "tuple", "list", "dict", "mapping"],
)
def test_arguments(given: Any, expected: Any) -> None:
    """As Lightning reads an ``example_input_array``; a list is one argument."""
    assert repr(containers.arguments(given)) == repr(expected)


def test_packed_sequence_stays_one() -> None:
    found = containers.mapped(
        lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, pack_sequence([ONE])
    )
    assert isinstance(found, PackedSequence)
    assert isinstance(found.data, Tensor)
    assert found.data.dtype == torch.float64
