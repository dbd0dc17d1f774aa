"""Copies of the network that training keeps: named where they stay dense, pruned along where `averages` has them."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_drive import DRIVEPruningCallback, IMPPruningCallback, SNIPPruningCallback
from lightning_drive.callbacks.base import PruningCallback


def mlp(width: int = 24) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, fits.NUM_CLASSES)
    )


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))  # type: ignore[no-any-return]


@torch.no_grad()
def move(means: Iterable[Tensor], now: Iterable[Tensor]) -> None:
    for mean, each in zip(means, now, strict=True):
        mean.lerp_(each, 0.1)


class Student(pl.LightningModule):
    """Trains `student`; what else it keeps, it says itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = mlp()

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), 0.05)


class MeanTeacher(Student):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.student)

    def on_train_batch_end(self, *_: Any) -> None:
        move(self.teacher.parameters(), self.student.parameters())


class FrozenTeacher(MeanTeacher):
    def __init__(self) -> None:
        super().__init__()
        self.teacher.requires_grad_(False)


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


class Averaged(Student):
    """With torch's average of it."""

    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.student)

    def on_train_batch_end(self, *_: Any) -> None:
        self.average.update_parameters(self.student)


class AveragedApart(Student):
    """The average is no submodule."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)["average"] = [AveragedModel(self.student)]

    def on_train_batch_end(self, *_: Any) -> None:
        vars(self)["average"][0].update_parameters(self.student)


class Ema(pl.Callback):
    """Keeps a copy of the module, made when training starts."""

    def __init__(self) -> None:
        self.average: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average = self.copied(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        move(self.values(), pl_module.parameters())

    def copied(self, pl_module: pl.LightningModule) -> Any:
        return copy.deepcopy(pl_module)

    def values(self) -> Any:
        return self.average.parameters()


class EmaOfTensors(Ema):
    def copied(self, pl_module: pl.LightningModule) -> Any:
        return {name: each.detach().clone() for name, each in pl_module.named_parameters()}

    def values(self) -> Any:
        return self.average.values()


class Shadow:
    """As `torch_ema` keeps them."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.shadow_params = [each.detach().clone() for each in parameters]
        self.collected_params = None


class EmaInAnObject(Ema):
    def copied(self, pl_module: pl.LightningModule) -> Any:
        return Shadow(pl_module.parameters())

    def values(self) -> Any:
        return self.average.shadow_params


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


METHODS: dict[str, Callable[..., PruningCallback]] = {
    "DRIVE": lambda kind=DRIVEPruningCallback: kind(sparsity=0.8, warmup_epochs=1, rounds=4),
    "IMP": lambda kind=IMPPruningCallback: kind(sparsity=0.8, cycles=2, epochs_per_cycle=1),
}
each_method = pytest.mark.parametrize("method", METHODS)


def fit(folder: Path, module: Any, *callbacks: pl.Callback, **kwargs: Any) -> list[str]:
    """Train for three epochs; return what was said of copies."""
    ckpt_path = kwargs.pop("ckpt_path", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fits.trainer(folder, *callbacks, **{"max_epochs": 3, **kwargs}).fit(module, fits.loader(), ckpt_path=ckpt_path)
    return [str(each.message) for each in caught if "has the same names and shapes as" in str(each.message)]


INSIDE = [
    (MeanTeacher, "'teacher' has the same names and shapes as 'student'", "student.{name}"),
    (FrozenTeacher, "'teacher' has the same names and shapes as 'student'", "pl_module.teacher.named_parameters()"),
    (Averaged, "'average.module' has the same names and shapes as 'student'", "pl_module.average.module.named"),
]


@each_method
@pytest.mark.parametrize(("kind", "text", "remedy"), INSIDE)
def test_copies_in_the_module(tmp_path: Path, kind: Any, text: str, remedy: str, method: str) -> None:
    [said] = fit(tmp_path, kind(), pruning := METHODS[method]())
    assert said.startswith(text)
    assert f"override `averages(pl_module)` of {type(pruning).__name__}" in said
    assert remedy in said


@each_method
def test_copies_in_the_module__of_parts(tmp_path: Path, method: str) -> None:
    """Parts that hold half of what is pruned together."""
    said = fit(tmp_path, Byol(), METHODS[method]())
    assert [text.partition(" ")[0] for text in said] == ["'student_momentum'", "'projector_momentum'"]


def test_copies_in_the_module__apart(tmp_path: Path) -> None:
    [said] = fit(tmp_path, AveragedApart(), METHODS["DRIVE"]())
    assert said.startswith("`average` of AveragedApart has the same names and shapes as 'student'")


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


# What is no copy.


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


def last_of_four(pl_module: Any) -> None:
    pl_module.configure_optimizers = lambda: torch.optim.SGD(
        [p for p in pl_module.parameters() if p.requires_grad], 0.05
    )


@pytest.mark.parametrize(
    "make",
    [Student, Towers, lambda: HalfFrozen(1), lambda: HalfFrozen(2), Numbered, OneProjection, LargerTeacher],
    ids=["student", "towers", "last_block", "last_blocks", "numbered", "projection", "teacher"],
)
def test_no_copies(tmp_path: Path, make: Any) -> None:
    module = make()
    if isinstance(module, HalfFrozen):
        last_of_four(module)
    assert not fit(tmp_path, module, METHODS["DRIVE"](), Bystander())


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_no_copies__of_lightning(tmp_path: Path, name: str) -> None:
    kind = getattr(pl.callbacks, name, None)
    settings = {"swa_lrs": 0.01, "swa_epoch_start": 1} if name == "StochasticWeightAveraging" else {}
    others = [] if kind is None else [kind(**settings)]
    assert not fit(tmp_path, Student(), METHODS["DRIVE"](), *others)


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
@each_method
def test_copies_in_buffers(tmp_path: Path, kind: Any, place: str, method: str) -> None:
    module = kind()
    [said] = fit(tmp_path, module, METHODS[method]())
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


def test_copies_returned_as_views(tmp_path: Path) -> None:
    """A `state_dict` has other tensors over the same memory."""

    class Along(DRIVEPruningCallback):
        def averages(self, pl_module: Any) -> Any:
            return [{f"student.{name}": each for name, each in pl_module.teacher.state_dict().items()}]

    assert not fit(tmp_path, MeanTeacher(), METHODS["DRIVE"](Along))


def test_copies_in_lists_are_told_by_their_values(tmp_path: Path) -> None:
    """Of networks in one list, only one that begins as the trained one does is a copy."""

    class Ensemble(Student):
        def __init__(self, equal: bool) -> None:
            super().__init__()
            student = self.student
            del self.student
            self.members = nn.ModuleList([student, copy.deepcopy(student) if equal else mlp()])

        def forward(self, images: Tensor) -> Tensor:
            return self.members[0](images)  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.members[0].parameters(), 0.05)

    [said] = fit(tmp_path, Ensemble(equal=True), METHODS["DRIVE"]())
    assert said.startswith("'members.1'")
    assert not fit(tmp_path, Ensemble(equal=False), METHODS["DRIVE"]())


# Pruned along.


def of_teacher(pl_module: Any, trainer: Any) -> Any:
    teacher = pl_module.teacher
    tensors = (*teacher.named_parameters(), *teacher.named_buffers())
    return [{f"student.{name}": each for name, each in tensors}]


def of_average(pl_module: Any, trainer: Any) -> Any:
    return [{f"student.{name}": each for name, each in pl_module.average.module.named_parameters()}]


def of_callback(pl_module: Any, trainer: Any) -> Any:
    return [each.average for each in trainer.callbacks if getattr(each, "average", None) is not None]


def of_shadow(pl_module: Any, trainer: Any) -> Any:
    names = [name for name, _ in pl_module.named_parameters()]
    shadows = [each.average for each in trainer.callbacks if getattr(each, "average", None) is not None]
    return [dict(zip(names, each.shadow_params, strict=True)) for each in shadows]


def along(method: str, of: Any) -> PruningCallback:
    base: Any = DRIVEPruningCallback if method == "DRIVE" else IMPPruningCallback

    class Along(base):  # type: ignore[misc]
        def averages(self, pl_module: pl.LightningModule) -> Iterable[nn.Module | Mapping[str, Tensor]]:
            return of(pl_module, pl_module.trainer)  # type: ignore[no-any-return]

    return METHODS[method](Along)


ALONG = [
    (MeanTeacher, None, of_teacher),
    (Averaged, None, of_average),
    (Student, Ema, of_callback),
    (Student, EmaOfTensors, of_callback),
    (Student, EmaInAnObject, of_shadow),
]


@each_method
@pytest.mark.parametrize(("kind", "other", "of"), ALONG)
def test_pruned_along(tmp_path: Path, kind: Any, other: Any, of: Any, method: str) -> None:
    """A copy is sparse where the network is, and nothing is said of it."""
    module, pruning = kind(), along(method, of)
    others = [other()] if other else []
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = fits.trainer(tmp_path, pruning, *others, checkpoints, max_epochs=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, fits.loader())
    assert not [each for each in caught if "the same names and shapes" in str(each.message)]
    assert pruning.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    [average] = of(module, trainer)
    tensors = dict(average.named_parameters()) if isinstance(average, nn.Module) else average
    for name, mask in pruning.masks.items():
        assert not tensors[name][~mask].any()
        assert tensors[name].count_nonzero() > 0
        assert not torch.equal(tensors[name], module.get_parameter(name))
    if other is None:
        saved = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["state_dict"]
        path = "teacher" if kind is MeanTeacher else "average.module"
        for name, mask in pruning.masks.items():
            assert not saved[name.replace("student", path)][~mask].any()


class Notes(pl.Callback):
    """Notes a copy and the network at the start of the first batch after pruning."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            norms = pl_module.student[2], pl_module.teacher[2]
            self.seen.append((norms[0].running_var.clone(), norms[1].running_var.clone()))


def test_statistics_go_along(tmp_path: Path) -> None:
    """BatchNorm is measured anew for the sparse network; an average of the statistics before would not do."""
    fit(tmp_path, MeanTeacher(), along("DRIVE", of_teacher), notes := Notes())
    student, teacher = notes.seen[1]
    assert torch.equal(student, teacher)


def test_restarted_in_every_cycle(tmp_path: Path) -> None:
    fit(tmp_path, module := MeanTeacher(), pruning := along("IMP", of_teacher), notes := Notes())
    student, teacher = notes.seen[1]
    assert torch.equal(student, teacher)
    assert pruning.masks.hold_for(module)


@each_method
def test_resume(tmp_path: Path, method: str) -> None:
    """To the same network and the same copy as without an interruption."""
    whole, saves = MeanTeacher(), pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, whole, along(method, of_teacher), saves)
    for epoch in range(2):
        module, path = MeanTeacher(), tmp_path / f"epoch={epoch}.ckpt"
        assert not fit(tmp_path, module, along(method, of_teacher), ckpt_path=path)
        assert fits.equal_states(fits.state_of(module), fits.state_of(whole))


@pytest.mark.parametrize(
    ("of", "error", "text"),
    [
        (
            lambda module, _: [module.teacher],
            ValueError,
            r"with '1.weight', .* but MeanTeacher has no parameter",
        ),
        (
            lambda module, _: [{"student.1.weight": torch.zeros(2, 3)}],
            ValueError,
            r"'student.1.weight' with shape \(2, 3\), but it has shape \(24, 64\) in MeanTeacher",
        ),
        (
            lambda module, _: {"student.1.weight": torch.zeros(2, 3)},
            TypeError,
            r"must return a list, with every copy .* got dict",
        ),
        (lambda module, _: None, TypeError, r"must return a list, with every copy in it, got NoneType"),
        (lambda module, _: module.teacher, TypeError, r"must return a list, with every copy in it, got Sequential"),
        (lambda module, _: [[torch.zeros(2)]], TypeError, r"must return a list of modules, or of mappings .* got list"),
    ],
)
@each_method
def test_averages__error(tmp_path: Path, of: Any, error: type[Exception], text: str, method: str) -> None:
    """Before training starts."""
    module = MeanTeacher()
    before = fits.state_of(module)
    with pytest.raises(error, match=text):
        fit(tmp_path, module, along(method, of))
    assert fits.equal_states(fits.state_of(module), before)


# Averages that are written into the module.


class Swaps(EmaOfTensors):
    """Brings its average into the module, in one of the hooks."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        setattr(self, hook, self.swap)

    def swap(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.load_state_dict(self.average, strict=False)


also_named = pytest.mark.filterwarnings("ignore:.*has the same names and shapes as:UserWarning")


@also_named
@pytest.mark.parametrize("first", [True, False], ids=["before_the_pruning_callback", "after_it"])
@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end", "on_validation_start", "on_train_epoch_end"])
def test_swapped_in_by_a_callback(tmp_path: Path, hook: str, first: bool) -> None:
    """The module is sparse in the end, also without `averages`."""
    module, pruning, other = fits.ConvModule(), METHODS["DRIVE"](), Swaps(hook)
    callbacks = [other, pruning] if first else [pruning, other]
    with pytest.warns(UserWarning, match="Pruned weights were no longer 0"):
        fits.trainer(tmp_path, *callbacks, max_epochs=3).fit(module, fits.loader())
    assert pruning.masks.hold_for(module)


class SwapsItself(Student):
    """An average that the module keeps and brings in itself, when it is asked to."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        vars(self)["ema"] = {name: each.detach().clone() for name, each in self.student.named_parameters()}
        setattr(self, hook, self.swap)

    def on_train_batch_end(self, *_: Any) -> None:
        move(self.ema.values(), self.student.parameters())

    def swap(self) -> None:
        self.student.load_state_dict(self.ema, strict=False)


@also_named
@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_swapped_in_by_the_module(tmp_path: Path, hook: str) -> None:
    module, pruning = SwapsItself(hook), METHODS["DRIVE"]()
    with pytest.warns(UserWarning, match="Pruned weights were no longer 0"):
        fits.trainer(tmp_path, pruning, max_epochs=3).fit(module, fits.loader())
    assert pruning.masks.hold_for(module)


def test_averages_of_a_data_free_method(tmp_path: Path) -> None:
    """The default has none, and `SNIP` at once prunes a teacher along as well."""

    class Along(SNIPPruningCallback):
        def averages(self, pl_module: Any) -> Any:
            return of_teacher(pl_module, None)

    pruning = Along(sparsity=0.8)
    assert list(SNIPPruningCallback(sparsity=0.8).averages(MeanTeacher())) == []
    assert not fit(tmp_path, module := MeanTeacher(), pruning)
    for name, mask in pruning.masks.items():
        assert not module.teacher.get_parameter(name.removeprefix("student."))[~mask].any()


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
@each_method
def test_copies_in_other_forms(tmp_path: Path, kind: Any, method: str) -> None:
    others = [kind()] if issubclass(kind, pl.Callback) else []
    module = Student() if others else kind()
    [said] = fit(tmp_path, module, METHODS[method](), *others)
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


class Moments(Flat):
    """A vector as long as all parameters, that is none of them: of gradients, say."""

    def now(self) -> list[Any]:
        return [torch.randn(self.mean.shape, generator=torch.Generator().manual_seed(self.global_step))]

    def __init__(self) -> None:
        super().__init__()
        self.mean.zero_()


def test_vectors_as_long_by_chance(tmp_path: Path) -> None:
    assert not fit(tmp_path, Moments(), METHODS["DRIVE"]())


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


@each_method
def test_copies_are_named_once(tmp_path: Path, method: str) -> None:
    [said] = fit(tmp_path, OfRecurrentLayers(), METHODS[method]())
    assert said.startswith("'nets.teacher' has the same names and shapes as 'nets.student'")
