"""Submodules that are copies of others are told from equal layers of one network."""

import copy
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from copies import Averaged, Block, MeanTeacher, Student, mlp, move
from torch import Tensor, nn

from lightning_drive.trainer.network_copies import Copy
from lightning_drive.trainer.submodule_copies import copies_in_submodules


def found(module: Any) -> list[Copy]:
    """Find the copies of what the module's optimizer holds."""
    held = {each for group in module.configure_optimizers().param_groups for each in group["params"]}
    trained = {name: each for name, each in module.named_parameters() if each.requires_grad and each in held}
    return copies_in_submodules(
        module, [name for name, each in trained.items() if each.ndim > 1], set(trained.values())
    )


class FrozenTeacher(MeanTeacher):
    def __init__(self) -> None:
        super().__init__()
        self.teacher.requires_grad_(False)


@pytest.mark.parametrize(
    ("kind", "name"), [(MeanTeacher, "teacher"), (FrozenTeacher, "teacher"), (Averaged, "average.module")]
)
def test_copies_in_submodules(kind: Any, name: str) -> None:
    """Named with what they are copies of, the tensors of both, and how to return them from `averages`."""
    module = kind()
    [copied] = found(module)
    assert (copied.name, copied.of) == (repr(name), "'student'")
    assert copied.mapping == f'{{f"student.{{name}}": tensor for name, tensor in pl_module.{name}.named_parameters()}}'
    assert list(copied.tensors) == ["student.1.weight", "student.4.weight"]
    assert copied.tensors["student.1.weight"] is module.get_submodule(name)[1].weight


class Byol(Student):
    """Two parts of the network, each with a copy that follows it, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.projector, self.predictor = Block(24), Block(fits.NUM_CLASSES)
        self.student[-1] = nn.Linear(24, 24)
        self.last = nn.Linear(24, fits.NUM_CLASSES)
        self.student_momentum, self.projector_momentum = copy.deepcopy(self.student), copy.deepcopy(self.projector)

    def forward(self, images: Tensor) -> Tensor:
        return self.predictor(self.last(self.projector(self.student(images))))  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        parts = self.student, self.projector, self.last, self.predictor
        return torch.optim.SGD([each for part in parts for each in part.parameters()], 0.05)

    def on_train_batch_end(self, *_: Any) -> None:
        move(self.student_momentum.parameters(), self.student.parameters())
        move(self.projector_momentum.parameters(), self.projector.parameters())


def test_copies_in_submodules__of_parts() -> None:
    """Parts that hold half of what is pruned together."""
    assert [copied.name for copied in found(Byol())] == ["'student_momentum'", "'projector_momentum'"]


class CopyOfAll(pl.LightningModule):
    """A network whose layers are attributes of the module itself, and a copy of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 24), nn.Linear(24, fits.NUM_CLASSES)
        self.mean = nn.ModuleDict({"first": copy.deepcopy(self.first), "last": copy.deepcopy(self.last)})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.first.parameters(), *self.last.parameters()], 0.05)


def test_copies_in_submodules__of_all_that_is_around() -> None:
    [copied] = found(CopyOfAll())
    assert (copied.name, copied.of) == ("'mean'", "CopyOfAll")
    assert copied.mapping == '{f"{name}": tensor for name, tensor in pl_module.mean.named_parameters()}'


class OfRecurrentLayers(Student):
    """A copy in a ModuleDict, whose own submodules are not named once more."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({"student": self.net(), "teacher": self.net().requires_grad_(False)})
        del self.student

    def net(self) -> nn.ModuleDict:
        layers = {"rnn": nn.GRU(8, 12, batch_first=True), "head": nn.Linear(12, fits.NUM_CLASSES)}
        return nn.ModuleDict(layers)

    def forward(self, images: Tensor) -> Tensor:
        parts = self.nets["student"]
        return parts["head"](parts["rnn"](images[:, 0])[0][:, -1])  # type: ignore[index,no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.nets["student"].parameters(), 0.05)

    def on_train_start(self) -> None:
        self.nets["teacher"].load_state_dict(self.nets["student"].state_dict())

    def on_train_batch_end(self, *_: Any) -> None:
        move(self.nets["teacher"].parameters(), self.nets["student"].parameters())


def test_copies_in_submodules__outermost() -> None:
    """Submodules of a copy are not named once more."""
    [copied] = found(OfRecurrentLayers())
    assert (copied.name, copied.of) == ("'nets.teacher'", "'nets.student'")


class Ensemble(Student):
    """Two networks in one list, one of which is trained."""

    def __init__(self, equal: bool) -> None:
        super().__init__()
        student = self.student
        del self.student
        self.members = nn.ModuleList([student, copy.deepcopy(student) if equal else mlp()])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.members[0].parameters(), 0.05)


def test_copies_in_submodules__in_a_list() -> None:
    """Only one that begins as the trained one does is a copy."""
    assert [copied.name for copied in found(Ensemble(equal=True))] == ["'members.1'"]
    assert found(Ensemble(equal=False)) == []


# Submodules that are no copies.


class Towers(Student):
    """Two towers of one structure, both trained."""

    def __init__(self) -> None:
        super().__init__()
        self.other = copy.deepcopy(self.student)

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images) + self.other(images)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


class HalfFrozen(Student):
    """Of equal blocks, the last ones are trained."""

    def __init__(self, trained: int) -> None:
        super().__init__()
        blocks = [Block() for _ in range(4)]
        self.student = nn.Sequential(nn.Flatten(), *blocks, nn.Linear(64, fits.NUM_CLASSES))
        self.student[: 5 - trained].requires_grad_(False)


class Numbered(Student):
    """The same with names of their own, of which only the last is in the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2 = Block(), Block()

    def forward(self, images: Tensor) -> Tensor:
        return self.block2(self.block1(images.flatten(1)))  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.block2.parameters(), 0.05)


class OneProjection(Student):
    """One of some layers of one shape is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, images: Tensor) -> Tensor:
        return self.query(images.flatten(1)) * self.key(images.flatten(1))  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.query.parameters(), 0.05)


class LargerTeacher(Student):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = mlp(48).requires_grad_(False)


@pytest.mark.parametrize(
    "make",
    [Student, Towers, lambda: HalfFrozen(1), lambda: HalfFrozen(2), Numbered, OneProjection, LargerTeacher],
    ids=["student", "towers", "last_block", "last_blocks", "numbered", "projection", "teacher"],
)
def test_copies_in_submodules__none(make: Any) -> None:
    assert found(make()) == []
