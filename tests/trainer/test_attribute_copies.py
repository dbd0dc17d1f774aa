"""Copies of the network in attributes, buffers and frozen parameters are named, in any form, while training goes on."""

import copy
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
from copies import METHODS, Ema, EmaInAnObject, EmaOfTensors, Student, fit, move
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_drive import DRIVEPruningCallback


class ModelEma(nn.Module):
    """As timm has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval()


class EmaOfStudent(Ema):
    def copied(self, pl_module: pl.LightningModule) -> Any:
        return ModelEma(pl_module.student)  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        move(self.average.parameters(), pl_module.student.parameters())


@pytest.mark.parametrize("first", [True, False], ids=["before_the_pruning_callback", "after_it"])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Ema, "`average` of Ema has the same names and shapes as Student"),
        (EmaOfTensors, "`average` of EmaOfTensors has the same names and shapes as Student"),
        (EmaInAnObject, "`average.shadow_params` of EmaInAnObject has the same names and shapes as Student"),
        (EmaOfStudent, "`average` of EmaOfStudent has the same names and shapes as 'student'"),
    ],
)
def test_copies_in_callbacks(tmp_path: Path, kind: Any, text: str, first: bool) -> None:
    callbacks = [kind(), METHODS["DRIVE"]()] if first else [METHODS["DRIVE"](), kind()]
    [said] = fit(tmp_path, Student(), *callbacks)
    assert said.startswith(text)


class AveragedApart(Student):
    """The average is no submodule."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)["average"] = [AveragedModel(self.student)]

    def on_train_batch_end(self, *_: Any) -> None:
        vars(self)["average"][0].update_parameters(self.student)


def test_copies_in_the_module(tmp_path: Path) -> None:
    """In a list that is no list of submodules."""
    [said] = fit(tmp_path, AveragedApart(), METHODS["DRIVE"]())
    assert said.startswith("`average` of AveragedApart has the same names and shapes as 'student'")


class LitEma(nn.Module):
    """Averages in buffers, as networks of diffusion keep them: names of buffers have no dots."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names = {name: name.replace(".", "") for name, _ in module.named_parameters()}
        self.register_buffer("num_updates", torch.tensor(0))
        for name, each in module.named_parameters():
            self.register_buffer(self.names[name], each.detach().clone())


class InBuffers(Student):
    def __init__(self) -> None:
        super().__init__()
        self.model_ema = LitEma(self.student)

    def means(self) -> list[Any]:
        return [getattr(self.model_ema, name) for name in self.model_ema.names.values()]

    def on_train_batch_end(self, *_: Any) -> None:
        move(self.means(), self.student.parameters())


class InOwnBuffers(InBuffers):
    def __init__(self) -> None:
        super().__init__()
        del self.model_ema
        for index, each in enumerate(self.student.parameters()):
            self.register_buffer(f"mean{index}", each.detach().clone())

    def means(self) -> list[Any]:
        return list(self._buffers.values())


class InFrozenParameters(InBuffers):
    def __init__(self) -> None:
        super().__init__()
        del self.model_ema
        copies = [nn.Parameter(each.detach().clone(), requires_grad=False) for each in self.student.parameters()]
        self.copies = nn.ParameterList(copies)

    def means(self) -> list[Any]:
        return list(self.copies)


@pytest.mark.parametrize(
    ("kind", "place"),
    [(InBuffers, "'model_ema'"), (InOwnBuffers, "InOwnBuffers"), (InFrozenParameters, "'copies'")],
)
def test_copies_in_buffers(tmp_path: Path, kind: Any, place: str) -> None:
    module = kind()
    [said] = fit(tmp_path, module, METHODS["DRIVE"]())
    assert said.startswith(f"What {place} keeps in buffers or frozen parameters has the same names and shapes as ")
    assert all(each.all() for each in module.means() if each.ndim > 1)

    class Along(DRIVEPruningCallback):
        def averages(self, pl_module: Any) -> Any:
            names = [f"student.{name}" for name, _ in pl_module.student.named_parameters()]
            return [dict(zip(names, pl_module.means(), strict=True))]

    module = kind()
    assert not fit(tmp_path, module, METHODS["DRIVE"](Along))
    pairs = zip(module.means(), module.student.parameters(), strict=True)
    assert all(torch.equal(mean == 0, each == 0) for mean, each in pairs if each.ndim > 1)


class Flat(Student):
    """The average is one vector, as `parameters_to_vector` makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.utils.parameters_to_vector(self.student.parameters()).detach().clone()

    def means(self) -> list[Any]:
        return [self.mean]

    def now(self) -> list[Any]:
        return [nn.utils.parameters_to_vector(self.student.parameters()).detach()]

    def on_train_batch_end(self, *_: Any) -> None:
        move(self.means(), self.now())


class FlatInABuffer(Flat):
    def __init__(self) -> None:
        super().__init__()
        mean = self.mean
        del self.mean
        self.register_buffer("mean", mean)


class Pairs(Flat):
    """Names and tensors in pairs, as `named_parameters()` gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = [(name, each.detach().clone()) for name, each in self.student.named_parameters()]  # type: ignore[assignment]

    def means(self) -> list[Any]:
        return [each for _, each in self.mean]  # type: ignore[misc]

    def now(self) -> list[Any]:
        return list(self.student.parameters())


class ByParameter(Pairs):
    """Parameter to average."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = {each: each.detach().clone() for each in self.student.parameters()}  # type: ignore[assignment]

    def means(self) -> list[Any]:
        return list(self.mean.values())  # type: ignore[operator]


class FlatCallback(pl.Callback):
    average: Tensor | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        now = nn.utils.parameters_to_vector(pl_module.student.parameters()).detach()
        self.average = now.clone() if self.average is None else self.average.lerp(now, 0.1)


@pytest.mark.parametrize("kind", [Flat, FlatInABuffer, Pairs, ByParameter, FlatCallback])
def test_copies_in_other_forms(tmp_path: Path, kind: Any) -> None:
    others = [kind()] if issubclass(kind, pl.Callback) else []
    module = Student() if others else kind()
    [said] = fit(tmp_path, module, METHODS["DRIVE"](), *others)
    place = "What FlatInABuffer keeps in buffers" if kind is FlatInABuffer else "`average`" if others else "`mean` of "
    assert said.startswith(place)


def test_copies_in_other_forms__pruned_along(tmp_path: Path) -> None:
    """As views of the vector."""

    class Along(DRIVEPruningCallback):
        def averages(self, pl_module: Any) -> Any:
            named = list(pl_module.student.named_parameters())
            parts = pl_module.mean.split([each.numel() for _, each in named])
            return [{f"student.{name}": part.view_as(each) for (name, each), part in zip(named, parts, strict=True)}]

    module = Flat()
    assert not fit(tmp_path, module, METHODS["DRIVE"](Along))
    assert int((module.mean == 0).sum()) == sum(int((each == 0).sum()) for each in module.student.parameters())


# What is no copy.


class Bystander(pl.Callback):
    """Holds the module, its optimizers, other tensors, and what the weights were."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        self.first: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.weights = torch.ones(4)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.held = [trainer, pl_module, pl_module.student, trainer.optimizers, list(pl_module.parameters()), {"x": 1}]
        self.first = fits.state_of(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last = fits.state_of(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.newest = fits.state_of(pl_module)


def test_no_copies(tmp_path: Path) -> None:
    """Live parameters, and records of the weights that stay as they are or are made anew."""
    assert not fit(tmp_path, Student(), METHODS["DRIVE"](), Bystander())


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_no_copies__of_lightning(tmp_path: Path, name: str) -> None:
    kind = getattr(pl.callbacks, name, None)
    settings = {"swa_lrs": 0.01, "swa_epoch_start": 1} if name == "StochasticWeightAveraging" else {}
    others = [] if kind is None else [kind(**settings)]
    assert not fit(tmp_path, Student(), METHODS["DRIVE"](), *others)


class Moments(Flat):
    """A vector as long as all parameters, that is none of them: of gradients, say."""

    def now(self) -> list[Any]:
        return [torch.randn(self.mean.shape, generator=torch.Generator().manual_seed(self.global_step))]

    def __init__(self) -> None:
        super().__init__()
        self.mean.zero_()


def test_vectors_as_long_by_chance(tmp_path: Path) -> None:
    assert not fit(tmp_path, Moments(), METHODS["DRIVE"]())
