"""A run that is saved or interrupted at any call has a network that is dense, or pruned as a whole.

The plain test run tries some calls, spread evenly; `-m extended` tries four times as many.
"""

import copy
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import disturbed
import fits
import lightning.pytorch as pl
import models
import pytest
import torch
from disturbed import CALLBACKS, EPOCHS, PACKAGE, Calls, Hook, Interrupt, Net, Run, Unhook, interrupt, loader, places
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

import lightning_drive
from lightning_drive import DRIVE, SNIP, DRIVEPruningCallback, Magnitude, SynFlow, find_masks


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield
    sys.setprofile(None)


@pytest.fixture(scope="module", params=CALLBACKS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run]:
    """A run that nobody disturbs; its calls are where the others are disturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in each test
    Run(CALLBACKS[request.param](), tmp_path_factory.mktemp("first"), Calls())  # what is imported or cached only once
    run = Run(CALLBACKS[request.param](), tmp_path_factory.mktemp("whole"), Calls())
    torch.set_num_threads(threads)
    return request.param, run


def by_call(save: Callable[[], None]) -> None:
    save()


def by_thread(save: Callable[[], None]) -> None:
    thread = threading.Thread(target=save)
    thread.start()
    thread.join()


def by_signal(save: Callable[[], None]) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: save())
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


extended = pytest.mark.extended


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("way", "number"),
    [
        *((by_call, 6), (by_thread, 3), (by_signal, 3)),
        *(pytest.param(way, 24, marks=extended) for way in (by_call, by_thread, by_signal)),
    ],
)
def test_saves(whole: tuple[str, Run], way: Callable[[Callable[[], None]], None], number: int, tmp_path: Path) -> None:
    """A run that goes on from a checkpoint that was saved at any call ends as the one that nobody disturbed."""
    name, expected = whole
    wrong = []
    for place in places(expected.calls, number):
        path = tmp_path / f"{place}.ckpt"

        def save(trainer: pl.Trainer, path: Path = path) -> None:
            way(lambda: trainer.save_checkpoint(path))

        saving = Run(CALLBACKS[name](), tmp_path, Calls(place, save))
        resumed = Run(CALLBACKS[name](), tmp_path, Calls(), path)
        for run in (saving, resumed):
            wrong.append((place, expected.calls.names[place], run.differences(expected)))
    assert [failure for failure in wrong if failure[2]] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [10, pytest.param(40, marks=extended)])
def test_interrupts(whole: tuple[str, Run], number: int, tmp_path: Path) -> None:
    """After an interrupt at any call, the module is dense or pruned as a whole, and the run can be gone on with."""
    name, expected = whole
    wrong = []
    for place in places(expected.calls, number):
        folder = tmp_path / str(place)
        try:
            run = Run(CALLBACKS[name](), folder, Calls(place, interrupt))
        except Interrupt:
            pass
        else:  # Python ignores errors in what a generator does when it is let go of
            wrong.append((place, expected.calls.names[place], run.differences(expected)))
            continue
        saved = torch.load(folder / "exception.ckpt", weights_only=True)
        state = next(state for key, state in saved["callbacks"].items() if key.endswith("Callback"))
        zeros = sum(int((saved["state_dict"][key] == 0).sum()) for key in ("net.0.weight", "net.3.weight"))
        masks = lightning_drive.Masks.from_state_dict(state["masks"])
        if zeros != masks.num_prunable - masks.num_kept:
            wrong.append((place, expected.calls.names[place], [f"{zeros} zeros under {masks}"]))
        again = Run(CALLBACKS[name](), folder, Calls(), folder / "exception.ckpt")
        wrong.append((place, expected.calls.names[place], again.differences(expected)))
    assert [failure for failure in wrong if failure[2]] == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [30, pytest.param(240, marks=extended)])
@pytest.mark.parametrize(
    "method", [DRIVE(rounds=2), SNIP(), SynFlow(rounds=2), Magnitude()], ids=lambda m: type(m).__name__
)
def test_find_masks__interrupts(method: Any, number: int) -> None:
    """An interrupt at any call leaves the module, its modes and gradients, and all random states as they were."""
    module = models.randomised(models.Restless())
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    module.alias = module.last
    batches = models.make_batches(4)

    def search(calls: Calls) -> Calls:
        sys.setprofile(calls)
        try:
            find_masks(module, method, sparsity=0.5, batches=batches, loss_fn=models.loss_fn)
        finally:
            sys.setprofile(None)
        return calls

    search(Calls())  # what is imported or cached only once
    calls = search(Calls())
    before, modes = models.fingerprint(module), torch._C._len_torch_function_stack()
    assert len(calls.names) > 50
    for place in places(calls, number):
        with suppress(Interrupt):  # as Python does where a generator is let go of
            search(Calls(place, interrupt))
        assert (place, calls.names[place], models.changes(module, before)) == (place, calls.names[place], [])
        assert torch._C._len_torch_function_stack() == modes
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
@pytest.mark.parametrize("name", ["DRIVE", "SynFlow"])
def test_reads_while_scoring(name: str, precision: Any, tmp_path: Path) -> None:
    """Whoever copies or reads the module in the rounds, in whatever way, finds what was there before them."""
    states: list[Any] = []

    class Before(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Net) -> None:
            states.append(state_of(pl_module))

    class Reading(Net):
        def forward(self, x: Tensor) -> Tensor:
            by_signal(read)
            return super().forward(x)

    def read() -> None:
        if trainer.current_epoch == 1 and trainer.fit_loop.epoch_progress.total.started < 2:
            module: Any = trainer.lightning_module
            states.extend(state_of(seen) for seen in (module, copy.deepcopy(module)))
            torch.save(module, tmp_path / "module.pt")
            states.append(state_of(torch.load(tmp_path / "module.pt", weights_only=False)))

    def state_of(module: Net) -> list[Any]:
        tensors = [value.clone() for value in module.state_dict().values()]
        return [*tensors, module.training, module.steps, len(module.losses), module.head is module.net[-1]]

    globals()["Reading"] = Reading  # where pickle finds it
    Reading.__qualname__ = "Reading"
    trainer = fits.trainer(tmp_path, Before(), CALLBACKS[name](), max_epochs=2, precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Reading(), loader())
    before, inside = states[1], states[2:]
    assert len(inside) >= 9
    for seen in inside:
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(seen, before, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["DRIVE", "SynFlow", "IMP"])
def test_slurm_requeue(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's signal before the time limit, in the rounds: the requeued job ends as one that was never stopped."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", "")  # there is no `scontrol` to requeue with

    def fit(at: int | None, folder: Path) -> tuple[Net, Calls]:
        calls = Calls(at, lambda _: signal.raise_signal(signal.SIGUSR1))
        environment = SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR1)
        monkeypatch.setattr(SLURMEnvironment, "world_size", lambda self: 1)
        callbacks = [Hook(calls), CALLBACKS[name](), Unhook()]
        trainer = fits.trainer(folder, *callbacks, max_epochs=EPOCHS, plugins=[environment])
        module = Net()
        trainer.fit(module, loader())
        return module, calls

    before = signal.getsignal(signal.SIGUSR1)
    try:
        expected, calls = fit(None, tmp_path / "whole")
        for index, place in enumerate(places(calls, 4)[:-1]):  # the first run makes some calls more
            folder = tmp_path / str(index)
            fit(place, folder)
            assert (folder / "hpc_ckpt_1.ckpt").is_file()
            requeued, _ = fit(None, folder)  # which Lightning resumes from there
            for (key, found), wanted in zip(requeued.state_dict().items(), expected.state_dict().values(), strict=True):
                assert torch.equal(found, wanted), (place, calls.names[place], key)
    finally:
        signal.signal(signal.SIGUSR1, before)


class Plateau(Net):
    """Lowers its learning rate where the score is no better: always, after pruning."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "score"}}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["DRIVE", "SynFlow", "IMP"])
def test_plateau(name: str, tmp_path: Path) -> None:
    """An epoch that was stopped or saved in while it pruned counts as a whole one for a learning rate that waits."""
    Run = partial(disturbed.Run, make=Plateau)  # noqa: N806
    Run(CALLBACKS[name](), tmp_path, Calls())
    expected = Run(CALLBACKS[name](), tmp_path, Calls())
    assert expected.end["rate"] < 0.1
    begin, end = (expected.calls.names.index(name) for name in ("_prune", "_commit"))
    for place in [begin + round((end - begin) * part / 3) for part in range(1, 3)]:
        saved = tmp_path / f"{place}.ckpt"
        Run(CALLBACKS[name](), tmp_path, Calls(place, lambda trainer, path=saved: trainer.save_checkpoint(path)))
        assert Run(CALLBACKS[name](), tmp_path, Calls(), saved).differences(expected) == []
        folder = tmp_path / str(place)
        with suppress(Interrupt):
            Run(CALLBACKS[name](), folder, Calls(place, interrupt))
            continue
        assert Run(CALLBACKS[name](), folder, Calls(), folder / "exception.ckpt").differences(expected) == []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["DRIVE", "SynFlow", "IMP"])
def test_fit_again(name: str, tmp_path: Path) -> None:
    """After an interrupt, the same Trainer goes on, counts every epoch once, and saves in the middle of epochs.

    Lightning makes the optimizers and schedules of a second `fit` anew, so the weights are others.
    """
    expected = Run(CALLBACKS[name](), tmp_path, Calls())
    batches: list[int] = []

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "middle.ckpt")
            saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)["loops"]["fit_loop"]
            batches.append(saved["epoch_loop.batch_progress"]["current"]["ready"])

    calls, module, pruning = Calls(len(expected.calls.names) // 2, interrupt), Net(), CALLBACKS[name]()
    trainer = fits.trainer(tmp_path, Hook(calls), pruning, Unhook(), max_epochs=EPOCHS)
    with pytest.raises(Interrupt):
        trainer.fit(module, loader(), loader())
    sys.setprofile(None)
    trainer.callbacks.append(Save())  # type: ignore[attr-defined]
    trainer.fit(module, loader(), loader())
    sys.setprofile(None)
    assert pruning.masks.sparsity == pytest.approx(0.8, abs=0.02)
    assert pruning.masks.hold_for(module)
    assert trainer.fit_loop.epoch_progress.total.ready == EPOCHS  # type: ignore[attr-defined]
    assert batches == [1, 2] * (len(batches) // 2)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("error", [KeyError("log"), StopIteration("no more"), BrokenPipeError("gone")], ids=repr)
@pytest.mark.parametrize("hook", ["training_step", "on_train_epoch_start", "on_train_batch_start", "loss_fn"])
def test_true_error(error: Exception, hook: str, tmp_path: Path) -> None:
    """What the module raises in the rounds is what is raised, also where it would say that training is over."""

    class Failing(Net):
        pass

    def fail(*_: Any) -> None:
        raise error

    setattr(Failing, hook, fail)
    loss_fn = fail if hook == "loss_fn" else None
    pruning = DRIVEPruningCallback(sparsity=0.8, warmup_epochs=0, rounds=2, loss_fn=loss_fn)
    with pytest.raises((type(error), RuntimeError)) as raised:
        fits.trainer(tmp_path, pruning, max_epochs=1).fit(Failing(), loader())
    assert error in (raised.value, raised.value.__cause__)
    assert not pruning.pruned


class FailingLogger(CSVLogger):
    """Loses its connection when the network is pruned."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "pruning/density" in metrics:
            raise ConnectionError("no route to host")
        super().log_metrics(metrics, step)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["DRIVE", "SynFlow", "IMP"])
def test_failing_logger(name: str, tmp_path: Path) -> None:
    """An error of a logger after the masks are put down is what is raised, and the pruning is complete by then."""
    pruning, best = CALLBACKS[name](), ModelCheckpoint(tmp_path, monitor="score", mode="min")
    callbacks = [pruning, best, OnExceptionCheckpoint(tmp_path, "exception")]
    with pytest.raises(ConnectionError, match="no route to host"):
        fits.trainer(tmp_path, *callbacks, logger=FailingLogger(tmp_path)).fit(Net(), loader(), loader())
    saved = torch.load(tmp_path / "exception.ckpt", weights_only=True)
    state = next(state for key, state in saved["callbacks"].items() if key.endswith("Callback"))
    weights = Net()
    weights.load_state_dict(saved["state_dict"])
    assert lightning_drive.Masks.from_state_dict(state["masks"]).hold_for(weights)
    assert state["unfinished"] is None
    if name != "IMP":  # whose first cut is not its last
        assert best.best_model_path == ""
        assert int(saved["state_dict"]["net.1.num_batches_tracked"]) == 2  # `bn_batches`


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["DRIVE", "SynFlow", "IMP"])
def test_slow_writes(name: str, tmp_path: Path) -> None:
    """A thread that begins to save in the rounds, and writes when the network is pruned, writes what it began with."""
    pruned, threads = threading.Event(), list[threading.Thread]()

    class SlowIO(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            if threading.current_thread() is not threading.main_thread():
                began.set()
                assert pruned.wait(60)
            super().save_checkpoint(checkpoint, path, storage_options)

    class Begin(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                before.update({key: value.clone() for key, value in pl_module.state_dict().items()})
                threads.append(threading.Thread(target=trainer.save_checkpoint, args=[tmp_path / "slow.ckpt"]))
                threads[0].start()
                assert began.wait(60)

    class End(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 1:
                pruned.set()
                threads[0].join()

    began, before = threading.Event(), dict[str, Tensor]()
    callbacks = [Begin(), CALLBACKS[name](), End()]
    fits.trainer(tmp_path, *callbacks, plugins=[SlowIO()]).fit(Net(), loader())
    saved = torch.load(tmp_path / "slow.ckpt", weights_only=True)
    state = next(state for key, state in saved["callbacks"].items() if key.endswith("Callback"))
    assert state["masks"]["masks"] == {}
    assert all(torch.equal(saved["state_dict"][key], value) for key, value in before.items())


class AtRewinding(Calls):
    """Acts while weights are rewound for the second time: one has its whole start again, and is about to be masked."""

    rewinds, is_done = 0, False

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        super().__call__(frame, event, arg)
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE) and not self.is_done:
            self.rewinds += frame.f_code.co_name == "rewind_"
            if self.rewinds == 2 and frame.f_code.co_name == "zero_":
                self.is_done = True
                self.act(self.trainer)


def test_saves__while_weights_are_rewound(tmp_path: Path) -> None:
    """What is not masked yet is no reason to warn of somebody who writes into weights."""
    calls = AtRewinding(act=lambda trainer: trainer.save_checkpoint(tmp_path / "a.ckpt"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = Run(CALLBACKS["IMP"](), tmp_path, Calls())
        saving = Run(CALLBACKS["IMP"](), tmp_path, calls)
        resumed = Run(CALLBACKS["IMP"](), tmp_path, Calls(), tmp_path / "a.ckpt")
    assert calls.is_done
    assert not [warning for warning in caught if "no longer 0" in str(warning.message)]
    assert saving.differences(expected) == resumed.differences(expected) == []
