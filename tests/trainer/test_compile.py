"""What `torch.compile` compiled trains as before, and is scored as the plain Python that it was compiled from."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_drive import (
    DRIVE,
    DRIVEPruningCallback,
    IMPPruningCallback,
    Masks,
    SNIPPruningCallback,
    SynFlow,
    SynFlowPruningCallback,
    find_masks,
)
from lightning_drive.callbacks.hooks import PruningCallback

EPOCHS, STEPS_PER_EPOCH = 3, 3


class Backend:
    """Takes graphs as they are, as `torch.compile(backend="eager")` does, and counts them and their runs."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return graph(*arguments)

        return run


class Net(nn.Module):
    """Convolution, BatchNorm, Dropout as a function, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 16, fits.NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(F.relu(self.norm(self.conv(images))), 2).flatten(1)
        return self.head(F.dropout(features, 0.5, self.training))


class Module(pl.LightningModule):
    """A classifier around a network that may be compiled."""

    def __init__(self, log: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        self.log_loss = log

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.log_loss:
            self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def compile_submodule(module: Module, backend: Backend) -> Module:
    module.net = torch.compile(module.net, backend=backend)
    return module


def compile_submodule_in_place(module: Module, backend: Backend) -> Module:
    module.net.compile(backend=backend)
    return module


def compile_module_in_place(module: Module, backend: Backend) -> Module:
    module.compile(backend=backend)
    return module


COMPILED: dict[str, Callable[[Module, Backend], Any]] = {
    "module": lambda module, backend: torch.compile(module, backend=backend),
    "submodule": compile_submodule,
    "submodule_in_place": compile_submodule_in_place,
    "module_in_place": compile_module_in_place,
}
CALLBACKS: dict[str, Callable[[], PruningCallback]] = {
    "drive": lambda: DRIVEPruningCallback(sparsity=0.8, warmup_epochs=1, rounds=3),
    "synflow": lambda: SynFlowPruningCallback(sparsity=0.8, warmup_epochs=1, rounds=3),
    "imp": lambda: IMPPruningCallback(sparsity=0.8, cycles=2, epochs_per_cycle=1),
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def fit(tmp_path: Path, module: Any, *callbacks: pl.Callback, **kwargs: Any) -> None:
    torch.manual_seed(1)  # Dropout's
    ckpt_path = kwargs.pop("ckpt_path", None)
    fits.trainer(tmp_path, *callbacks, max_epochs=EPOCHS, **kwargs).fit(module, fits.loader(), ckpt_path=ckpt_path)


def plain(named: Any) -> dict[str, Tensor]:
    """Take out of the names what `self.net = torch.compile(self.net)` puts there."""
    return {name.replace("_orig_mod.", ""): value.detach().clone() for name, value in named.items()}


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Masks, dict[str, Tensor]]]:
    """Return masks and final weights of the run without `torch.compile`; each run once."""
    runs: dict[str, tuple[Masks, dict[str, Tensor]]] = {}

    def run(name: str) -> tuple[Masks, dict[str, Tensor]]:
        if name not in runs:
            module, callback = Module(), CALLBACKS[name]()
            fit(tmp_path_factory.mktemp(name), module, callback)
            runs[name] = callback.masks, fits.state_of(module)
        return runs[name]

    return run


@pytest.mark.parametrize(
    ("compiled", "name"), [*((kind, name) for kind in COMPILED for name in ("drive", "synflow")), ("submodule", "imp")]
)
def test_compiled(tmp_path: Path, uncompiled: Any, compiled: str, name: str) -> None:
    """The one graph of a dense run, without a break, is all there is; masks and weights are those without compile."""
    masks, state = uncompiled(name)
    backend, module, callback = Backend(), Module(), CALLBACKS[name]()
    fit(tmp_path, COMPILED[compiled](module, backend), callback)

    assert (backend.graphs, backend.runs, sum(counters["graph_break"].values())) == (1, EPOCHS * STEPS_PER_EPOCH, 0)
    assert Masks(plain(callback.masks)) == masks
    assert masks.num_kept == round(0.2 * masks.num_prunable)
    assert fits.equal_states(plain(module.state_dict()), state)
    assert callback.masks.hold_for(module)


@pytest.mark.parametrize("compiled", COMPILED)
def test_compiled__dense(tmp_path: Path, compiled: str) -> None:
    """What the test above compares with: a dense run compiles one graph and runs it in every step."""
    backend = Backend()
    fit(tmp_path, COMPILED[compiled](Module(), backend))
    assert (backend.graphs, backend.runs, sum(counters["graph_break"].values())) == (1, EPOCHS * STEPS_PER_EPOCH, 0)


class LogsOneValue(pl.Callback):
    """Logs as often as a pruning callback does."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch >= 1:
            pl_module.log_dict({"value": 1.0}, on_step=False, on_epoch=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of tracing `self.log`
def test_compiled__log(tmp_path: Path) -> None:
    """Lightning's `self.log` breaks a compiled `training_step`; pruning adds no more to that than one value logged."""
    seen = []
    for callback in (LogsOneValue(), CALLBACKS["drive"]()):
        torch._dynamo.reset()
        counters.clear()
        backend = Backend()
        fit(tmp_path, torch.compile(Module(log=True), backend=backend), callback)
        seen.append((backend.graphs, sum(counters["graph_break"].values())))
    assert seen[0] == seen[1]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")  # it misses ModelCheckpoint
def test_compiled__checkpoint(tmp_path: Path, uncompiled: Any) -> None:
    """A compiled module's checkpoint has plain keys: it loads into the plain module, and is resumed without compile."""
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(tmp_path, torch.compile(Module(), backend=Backend()), CALLBACKS["drive"](), checkpoints)
    masks, state = uncompiled("drive")
    path = tmp_path / f"epoch={EPOCHS - 1}.ckpt"
    assert fits.equal_states(fits.state_of(Module.load_from_checkpoint(path)), state)

    for compiled in (False, True):
        torch._dynamo.reset()
        module, backend, callback = Module(), Backend(), CALLBACKS["drive"]()
        fit(
            tmp_path,
            torch.compile(module, backend=backend) if compiled else module,
            callback,
            ckpt_path=tmp_path / "epoch=1.ckpt",
        )
        assert backend.runs == compiled * STEPS_PER_EPOCH
        assert callback.masks == masks
        assert callback.masks.hold_for(module)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")  # it misses ModelCheckpoint
def test_compiled_submodule__checkpoint(tmp_path: Path) -> None:
    """`torch.compile(self.net)` puts `_orig_mod.` into names: masks resume where the weights do, and patterns match."""
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callback = SNIPPruningCallback(sparsity=0.8, include=["net.*"], exclude=["net.*conv.weight"])
    fit(tmp_path, compile_submodule(Module(), Backend()), callback, checkpoints)
    assert list(callback.masks) == ["net._orig_mod.head.weight"]

    module, resumed, backend = compile_submodule(Module(), Backend()), SNIPPruningCallback(sparsity=0.8), Backend()
    with pytest.warns(UserWarning, match="would select other parameters"):
        fit(tmp_path, module, resumed, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.masks == callback.masks
    assert resumed.masks.hold_for(module)

    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"net.conv.weight\""):
        fit(tmp_path, Module(), SNIPPruningCallback(sparsity=0.8), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert backend.graphs == 0


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {}


class Squash(nn.Module):
    """Calls a function that may be compiled: one of its own, or one that only the code knows of."""

    def __init__(self, function: Callable[[Tensor], Tensor], is_own: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.functions = {"squash": function} if is_own else None
        FUNCTIONS["squash"] = function

    def forward(self, x: Tensor) -> Tensor:
        functions = FUNCTIONS if self.functions is None else self.functions
        return self.last(functions["squash"](self.first(x)))


def noisy(x: Tensor) -> Tensor:
    return F.dropout(F.relu(x), 0.5)


@pytest.mark.parametrize("is_own", [True, False], ids=["of_the_module", "of_the_code"])
@pytest.mark.parametrize("method", [DRIVE(rounds=3), SynFlow(rounds=3)], ids=["drive", "synflow"])
def test_compiled_function(method: Any, is_own: bool) -> None:
    """Dropout stays off inside a compiled function, and what was compiled stays so."""
    backend, batches = Backend(), models.make_batches(6)
    function = torch.compile(noisy, backend=backend)
    masks = []
    for called in (noisy, function):
        module = models.randomised(Squash(called, is_own))
        masks.append(find_masks(module, method, sparsity=0.5, batches=batches, loss_fn=models.loss_fn))
    assert masks[0] == masks[1]
    assert backend.graphs == 0
    function(torch.ones(2, 2))
    assert (backend.graphs, backend.runs) == (1, 1)


@pytest.mark.parametrize("method", [DRIVE(rounds=3), SynFlow(rounds=3)], ids=["drive", "synflow"])
def test_find_masks__compiled(method: Any) -> None:
    """A compiled module is scored as itself, also after it ran, and also when scoring fails it is compiled again."""
    backend, batches = Backend(), models.make_batches(2, 4, 4)
    module = models.randomised(models.ConvNet()).train()
    settings: dict[str, Any] = {"sparsity": 0.7, "batches": batches, "loss_fn": models.loss_fn}
    expected = find_masks(module, method, **settings)

    compiled = torch.compile(module, backend=backend)
    compiled(batches[0][0])
    assert (backend.graphs, backend.runs) == (1, 1)
    assert plain(find_masks(compiled, method, **settings)).keys() == expected.keys()
    assert Masks(plain(find_masks(compiled, method, **settings))) == expected
    with pytest.raises(ZeroDivisionError):
        find_masks(compiled, DRIVE(rounds=1), **{**settings, "loss_fn": lambda *_: 1 / 0})
    assert (backend.graphs, backend.runs) == (1, 1)
    compiled(batches[0][0])
    assert (backend.graphs, backend.runs) == (1, 2)


def test_compiled__aot_eager(tmp_path: Path, uncompiled: Any) -> None:
    """Bitwise the same also where the backward pass is compiled."""
    masks, state = uncompiled("drive")
    module, callback = Module(), CALLBACKS["drive"]()
    fit(tmp_path, torch.compile(module, backend="aot_eager"), callback)
    assert counters["stats"]["unique_graphs"] == 1
    assert callback.masks == masks
    assert fits.equal_states(fits.state_of(module), state)


@pytest.mark.extended
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a compiler")
def test_compiled__inductor(tmp_path: Path) -> None:
    """With the default backend too: exact zeros, the exact count, and no graph but that of the dense run."""
    graphs = []
    for callbacks in ([], [callback := CALLBACKS["drive"]()]):
        torch._dynamo.reset()
        counters.clear()
        module = Module()
        fit(tmp_path, torch.compile(module), *callbacks)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1]
    assert callback.masks.num_kept == round(0.2 * callback.masks.num_prunable)
    assert callback.masks.hold_for(module)
