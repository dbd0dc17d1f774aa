"""Every phase of an IMP run has the learning rates of a training of its own, of the phase's own length."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_drive import IMPPruningCallback
from lightning_drive.trainer.phase_schedules import adapted, seen_as_whole

# torch 2.5's SequentialLR warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")

STEPS = 3  # per epoch
LR = 0.1


class Scheduled(pl.LightningModule):
    """One layer, and the learning-rate schedule under test."""

    def __init__(self, schedule: Callable[[Optimizer, pl.Trainer], Any], optimizer: Callable[..., Optimizer] = SGD):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 4)
        self.schedule = schedule
        self.optimizer = optimizer
        self.seen: list[int | None] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.lr_scheduler_configs and self.trainer.lr_scheduler_configs[0].monitor == "constant":
            self.log("constant", 1.0, on_epoch=True, on_step=False)
        return F.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self) -> Any:
        self.seen.append(self.trainer.max_epochs)
        settings = {"momentum": 0.9} if self.optimizer is SGD else {}
        optimizer = self.optimizer(self.parameters(), lr=LR, **settings)
        scheduler = self.schedule(optimizer, self.trainer)
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}


class Rates(pl.Callback):
    """Writes down learning rate and momentum of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.momenta: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        [group] = trainer.optimizers[0].param_groups
        self.rates.append(float(group["lr"]))
        self.momenta.append(group["momentum"] if "momentum" in group else group["betas"][0])

    def phases(self, values: list[float], *epochs: int) -> list[list[float]]:
        """Cut values into phases of so many epochs."""
        ends = [STEPS * sum(epochs[: index + 1]) for index in range(len(epochs))]
        assert ends[-1] == len(values)
        return [values[end - STEPS * length : end] for end, length in zip(ends, epochs, strict=True)]


def imp(**kwargs: Any) -> IMPPruningCallback:
    settings: dict[str, Any] = {"sparsity": 0.5, "cycles": 2, "epochs_per_cycle": 4}
    return IMPPruningCallback(**(settings | kwargs))


def rates_of(tmp_path: Path, module: pl.LightningModule, *callbacks: pl.Callback, **kwargs: Any) -> Rates:
    rates = Rates()
    ckpt_path = kwargs.pop("ckpt_path", None)
    running = fits.trainer(tmp_path, *callbacks, rates, **({"limit_val_batches": 0} | kwargs))
    running.fit(module, fits.loader(), ckpt_path=ckpt_path)
    return rates


def per_step(scheduler: LRScheduler) -> dict[str, Any]:
    return {"scheduler": scheduler, "interval": "step"}


SCHEDULES: dict[str, Callable[[Optimizer, pl.Trainer], Any]] = {
    "step": lambda optimizer, trainer: StepLR(optimizer, step_size=1, gamma=0.5),
    "step_per_step": lambda optimizer, trainer: per_step(StepLR(optimizer, step_size=5, gamma=0.5)),
    "step_every_two_epochs": lambda optimizer, trainer: {"scheduler": StepLR(optimizer, 1, 0.5), "frequency": 2},
    "step_every_two_steps": lambda optimizer, trainer: per_step(StepLR(optimizer, 1, 0.5)) | {"frequency": 2},
    "multi_step": lambda optimizer, trainer: MultiStepLR(optimizer, [1, 3], gamma=0.1),
    "exponential": lambda optimizer, trainer: per_step(ExponentialLR(optimizer, gamma=0.9)),
    "cosine": lambda optimizer, trainer: CosineAnnealingLR(optimizer, T_max=trainer.max_epochs or 0),
    "cosine_per_step": lambda optimizer, trainer: per_step(
        CosineAnnealingLR(optimizer, T_max=int(trainer.estimated_stepping_batches), eta_min=1e-3)
    ),
    "one_cycle": lambda optimizer, trainer: per_step(
        OneCycleLR(optimizer, LR, total_steps=int(trainer.estimated_stepping_batches))
    ),
    "one_cycle_three_phases": lambda optimizer, trainer: per_step(
        OneCycleLR(optimizer, LR, total_steps=int(trainer.estimated_stepping_batches), three_phase=True)
    ),
    "one_cycle_per_epoch": lambda optimizer, trainer: OneCycleLR(optimizer, LR, total_steps=trainer.max_epochs),
    "cyclic": lambda optimizer, trainer: per_step(CyclicLR(optimizer, LR / 10, LR, step_size_up=4)),
    "plateau": lambda optimizer, trainer: {
        "scheduler": ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
        "monitor": "constant",
    },
    "warm_up_cosine": lambda optimizer, trainer: SequentialLR(
        optimizer,
        [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, T_max=(trainer.max_epochs or 0) - 2)],
        milestones=[2],
    ),
    "chained": lambda optimizer, trainer: ChainedScheduler(
        [ConstantLR(optimizer, 0.1, total_iters=2), ExponentialLR(optimizer, 0.9)]
    ),
    "lambda": lambda optimizer, trainer: LambdaLR(optimizer, lambda epoch: 1 - epoch / (trainer.max_epochs or 1)),
    "lambda_of_length": lambda optimizer, trainer: _line(optimizer, trainer.max_epochs or 1),
    "polynomial": lambda optimizer, trainer: PolynomialLR(optimizer, total_iters=trainer.max_epochs or 0, power=2),
    "warm_restarts": lambda optimizer, trainer: per_step(CosineAnnealingWarmRestarts(optimizer, T_0=4)),
}
FOLLOWS_THE_TRAINER = (
    "cosine",
    "cosine_per_step",
    "one_cycle",
    "one_cycle_three_phases",
    "one_cycle_per_epoch",
    "warm_up_cosine",
    "lambda_of_length",
    "polynomial",
)


def _line(optimizer: Optimizer, length: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda epoch: 1 - epoch / length)


@functools.cache
def whole_training(name: str, epochs: int, optimizer: Any = SGD) -> Rates:
    """What the schedule does in a training of so many epochs without any pruning."""
    nowhere = Path(tempfile.gettempdir())  # nothing is written
    return rates_of(nowhere, Scheduled(SCHEDULES[name], optimizer), max_epochs=epochs)


# The cycles.


@pytest.mark.parametrize("rewind_epoch", [0, 2])
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "lambda"])
def test_every_cycle_is_a_whole_training(tmp_path: Path, name: str, rewind_epoch: int) -> None:
    """Step by step, the rates and momenta of each cycle are those of a training that ends with it."""
    length = rewind_epoch + 4
    alone = whole_training(name, length)
    assert len(set(alone.rates)) > 1
    rates = rates_of(tmp_path, Scheduled(SCHEDULES[name]), imp(rewind_epoch=rewind_epoch), max_epochs=12)
    for values, expected in ((rates.rates, alone.rates), (rates.momenta, alone.momenta)):
        first, second, ticket = rates.phases(values, 4, 4, 4)
        assert first == expected[: 4 * STEPS]
        assert second == expected[rewind_epoch * STEPS :]
        assert ticket == second


def test_every_cycle_is_a_whole_training__momentum_is_scheduled(tmp_path: Path) -> None:
    """The sequences above are not constant where OneCycleLR sets the momentum, of AdamW too."""
    for optimizer in (SGD, AdamW):
        alone = whole_training("one_cycle", 4, optimizer)
        assert len(set(alone.momenta)) > 3
        rates = rates_of(tmp_path, Scheduled(SCHEDULES["one_cycle"], optimizer), imp(), max_epochs=12)
        assert rates.phases(rates.momenta, 4, 4, 4) == [alone.momenta] * 3


def test_every_cycle_is_a_whole_training__accumulated_gradients(tmp_path: Path) -> None:
    """Optimizer steps are counted, not batches."""
    module = Scheduled(SCHEDULES["one_cycle"])
    rates = rates_of(tmp_path, module, imp(), max_epochs=10, accumulate_grad_batches=2)
    alone = rates_of(tmp_path, Scheduled(SCHEDULES["one_cycle"]), max_epochs=4, accumulate_grad_batches=2)
    first, second, _ = rates.phases(rates.rates, 4, 4, 2)
    assert first == second == alone.rates


def test_every_cycle_is_a_whole_training__no_schedule(tmp_path: Path) -> None:
    rates = rates_of(tmp_path, Scheduled(lambda optimizer, trainer: None), imp(), max_epochs=9)
    assert set(rates.rates) == {LR}


class Adversaries(pl.LightningModule):
    """Two optimizers with a schedule each, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 4)
        self.rates: list[tuple[float, ...]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        self.rates.append(tuple(optimizer.param_groups[0]["lr"] for optimizer in self.trainer.optimizers))
        for optimizer in optimizers:
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.last(self.first(batch[0].flatten(1))), batch[1]))
            optimizer.step()
        schedulers: Any = self.lr_schedulers()
        schedulers[0].step()
        if self.trainer.is_last_batch:
            schedulers[1].step()

    def configure_optimizers(self) -> Any:
        first, last = SGD(self.first.parameters(), LR), AdamW(self.last.parameters(), LR)
        steps = STEPS * (self.trainer.max_epochs or 0)
        schedulers = [OneCycleLR(first, LR, steps), CosineAnnealingLR(last, self.trainer.max_epochs or 0)]
        return [first, last], schedulers


def test_every_cycle_is_a_whole_training__two_optimizers(tmp_path: Path) -> None:
    """With manual optimization, too; and the ticket has a length of its own."""
    runs = {}
    for epochs, callbacks in ((4, []), (6, []), (14, [imp()])):
        module = Adversaries()
        rates_of_nothing = fits.trainer(tmp_path, *callbacks, max_epochs=epochs, limit_val_batches=0)
        rates_of_nothing.fit(module, fits.loader())
        runs[epochs] = module.rates
    assert runs[14] == runs[4] + runs[4] + runs[6]


class Warming(LRScheduler):
    """A warm-up around another schedule, as users write it: it keeps the other one in an attribute."""

    def __init__(self, optimizer: Optimizer, after: LRScheduler) -> None:
        self.after = after
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: Any = None) -> None:
        super().step()
        if self.last_epoch > 1:
            self.after.step()

    def state_dict(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key not in ("optimizer", "after")}
        return {**own, "after": self.after.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        self.after.load_state_dict(state_dict.pop("after"))
        vars(self).update(state_dict)


class WarmingAsItIs(Warming):
    """The same with the state that it inherits, which has the other schedule itself in it."""

    state_dict = LRScheduler.state_dict
    load_state_dict = LRScheduler.load_state_dict


@pytest.mark.parametrize("ticket", [4, 6])
@pytest.mark.parametrize("kind", [Warming, WarmingAsItIs])
def test_schedule_around_another(tmp_path: Path, kind: type[Warming], ticket: int) -> None:
    """The other one is rewound, too, and drives the running optimizer."""

    def schedule(optimizer: Optimizer, trainer: pl.Trainer) -> LRScheduler:
        return kind(optimizer, CosineAnnealingLR(optimizer, trainer.max_epochs or 0))

    rates = rates_of(tmp_path, Scheduled(schedule), imp(), max_epochs=8 + ticket)
    alone = [rates_of(tmp_path, Scheduled(schedule), max_epochs=epochs).rates for epochs in (4, 4, ticket)]
    assert rates.phases(rates.rates, 4, 4, ticket) == alone


class Remembering(LRScheduler):
    """A schedule that changes its state in place."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.history: list[int] = []
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        self.history.append(self.last_epoch)
        return [base_lr / len(self.history) for base_lr in self.base_lrs]


def test_schedule_with_state_changed_in_place(tmp_path: Path) -> None:
    """What is remembered of a schedule does not change with it, in any cycle."""
    rates = rates_of(tmp_path, Scheduled(lambda optimizer, trainer: Remembering(optimizer)), imp(), max_epochs=12)
    first, second, ticket = rates.phases(rates.rates, 4, 4, 4)
    assert first == second == ticket
    assert len(set(first)) == 4


# What the Trainer says of itself, to whom.


class Ask(pl.Callback):
    """Asks the Trainer for its length in every hook."""

    def __init__(self) -> None:
        self.answers: set[int | None] = set()

    def _ask(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self.answers.add(trainer.max_epochs)

    setup = on_fit_start = on_train_start = on_train_epoch_start = on_train_batch_start = _ask  # type: ignore[assignment]
    on_train_batch_end = on_train_epoch_end = on_train_end = teardown = _ask  # type: ignore[assignment]


@pytest.mark.parametrize("rewind_epoch", [0, 2])
def test_only_configure_optimizers_sees_a_phase(tmp_path: Path, rewind_epoch: int) -> None:
    """It sees a cycle first, with what a rewind skips, and later the ticket; everyone else sees the real length."""

    class Asking(Scheduled):
        def setup(self, stage: str) -> None:
            self.others = {self.trainer.max_epochs}

        def on_fit_start(self) -> None:
            self.others.add(self.trainer.max_epochs)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.others.add(self.trainer.max_epochs)
            return super().training_step(batch, batch_idx)

    first, last, module = Ask(), Ask(), Asking(SCHEDULES["step"])
    running = fits.trainer(tmp_path, first, imp(rewind_epoch=rewind_epoch), last, max_epochs=13, limit_val_batches=0)
    running.fit(module, fits.loader())
    assert first.answers == last.answers == module.others == {13}
    assert module.seen[0] == rewind_epoch + 4
    assert set(module.seen[1:]) <= {rewind_epoch + 4, rewind_epoch + 5}
    assert running.max_epochs == 13
    assert running.max_steps == -1
    assert "configure_optimizers" not in vars(module)
    assert module.seen.count(rewind_epoch + 5) >= 1


def test_only_configure_optimizers_sees_a_phase__called_once(tmp_path: Path) -> None:
    """Where all phases are equally long, it is called once, as ever."""
    module = Scheduled(SCHEDULES["cosine"])
    rates_of(tmp_path, module, imp(rewind_epoch=1), max_epochs=12)
    assert module.seen == [5]


def test_only_configure_optimizers_sees_a_phase__on_the_instance(tmp_path: Path) -> None:
    """One that is set on the module itself, as LightningCLI does, is there again afterwards."""
    module = Scheduled(SCHEDULES["step"])
    seen = []

    def configure_optimizers() -> Optimizer:
        seen.append(module.trainer.max_epochs)
        return SGD(module.parameters(), LR)

    module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
    rates_of(tmp_path, module, imp(), max_epochs=9)
    assert seen[0] == 4
    assert vars(module)["configure_optimizers"] is configure_optimizers


@pytest.mark.parametrize("where", ["configure_optimizers", "setup"])
def test_only_configure_optimizers_sees_a_phase__error(tmp_path: Path, where: str) -> None:
    """After an error in it, or in another callback before it is called, everything is as it was."""

    class Fail(pl.Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            if where == "setup":
                raise RuntimeError("no such optimizer")

    def fail(*_: Any) -> None:
        raise RuntimeError("no such optimizer")

    module = Scheduled(fail)
    running = fits.trainer(tmp_path, imp(), Fail(), max_epochs=9)
    with pytest.raises(RuntimeError, match="no such optimizer"):
        running.fit(module, fits.loader())
    assert running.max_epochs == 9
    assert "configure_optimizers" not in vars(module)


def test_a_finished_ticket_trains_by_an_ordinary_schedule(tmp_path: Path) -> None:
    """In a further fit, which is no phase of anything, the schedule is as long as the fit."""
    module, callback = Scheduled(SCHEDULES["cosine"]), imp()
    rates_of(tmp_path, module, callback, max_epochs=10)
    module.seen.clear()
    rates = rates_of(tmp_path, module, callback, max_epochs=3)
    assert module.seen == [3]
    assert rates.rates == whole_training("cosine", 3).rates


# The last phase.


@pytest.mark.parametrize(
    ("name", "ticket"),
    [
        (name, ticket)
        for name in FOLLOWS_THE_TRAINER
        for ticket in (1, 3, 6)
        if (name, ticket) != ("warm_up_cosine", 1)  # its warm-up alone takes two epochs
    ],
)
def test_the_ticket_has_its_own_length(tmp_path: Path, name: str, ticket: int) -> None:
    """A schedule that reads its length from the Trainer ends with the ticket, however long that trains."""
    rates = rates_of(tmp_path, Scheduled(SCHEDULES[name]), imp(), max_epochs=8 + ticket)
    for values, phase in ((rates.rates, "rates"), (rates.momenta, "momenta")):
        expected = [getattr(whole_training(name, epochs), phase) for epochs in (4, 4, ticket)]
        assert rates.phases(values, 4, 4, ticket) == expected


@pytest.mark.parametrize("name", FOLLOWS_THE_TRAINER)
def test_the_ticket_has_its_own_length__with_a_rewind_epoch(tmp_path: Path, name: str) -> None:
    """It goes on from the rewind point's place in the schedule and rate, and ends where a long schedule ends."""
    rates = rates_of(tmp_path, Scheduled(SCHEDULES[name]), imp(rewind_epoch=2), max_epochs=15)
    first, second, ticket = rates.phases(rates.rates, 4, 4, 7)
    short, long = whole_training(name, 6), whole_training(name, 9)
    assert first == short.rates[: 4 * STEPS]
    assert second == short.rates[2 * STEPS :]
    expected = long.rates[2 * STEPS :]
    assert len(ticket) == len(expected)
    if "cosine" in name or name == "polynomial":  # each rate is made from the one before it
        scale = (ticket[1] - 1e-3) / (expected[1] - 1e-3) if name == "cosine_per_step" else ticket[0] / expected[0]
        floor = 1e-3 if name == "cosine_per_step" else 0.0
        expected = [floor + (rate - floor) * scale for rate in expected]
    skipped = STEPS if name in ("one_cycle_per_epoch", "lambda_of_length") else 1
    assert ticket[skipped:] == pytest.approx(expected[skipped:])


@pytest.mark.parametrize("name", ["step", "multi_step", "exponential", "warm_restarts", "plateau", "chained"])
def test_the_ticket_has_its_own_length__fixed_schedules(tmp_path: Path, name: str) -> None:
    """Where nothing is read from the Trainer, the schedule just goes on as written."""
    rates = rates_of(tmp_path, Scheduled(SCHEDULES[name]), imp(), max_epochs=15)
    short, long = whole_training(name, 4).rates, whole_training(name, 7).rates
    assert rates.phases(rates.rates, 4, 4, 7) == [short, short, long]


def test_the_ticket_has_its_own_length__first_rate(tmp_path: Path) -> None:
    """Also the first rate of the ticket is that of its own schedule, where it depends on the length."""

    def warm_up(optimizer: Optimizer, trainer: pl.Trainer) -> Any:
        length = trainer.max_epochs or 0
        return LambdaLR(optimizer, lambda epoch: (epoch + 1) / length)

    rates = rates_of(tmp_path, Scheduled(warm_up), imp(), max_epochs=8 + 8)
    short, long = (rates_of(tmp_path, Scheduled(warm_up), max_epochs=epochs).rates for epochs in (4, 8))
    assert rates.phases(rates.rates, 4, 4, 8) == [short, short, long]


def test_the_ticket_has_its_own_length__read_while_it_runs(tmp_path: Path) -> None:
    """A closure that asks the Trainer at every step gets the real length then: nothing can be done, and it runs."""
    rates = rates_of(tmp_path, Scheduled(SCHEDULES["lambda"]), imp(), max_epochs=10)
    first, second, _ = rates.phases(rates.rates, 4, 4, 2)
    assert first == second


@pytest.mark.parametrize("epoch", [8, 10])
@pytest.mark.parametrize("name", ["cosine", "one_cycle", "lambda_of_length"])
def test_the_ticket_has_its_own_length__resumed(tmp_path: Path, name: str, epoch: int) -> None:
    class SaveAt(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == epoch:
                trainer.save_checkpoint(tmp_path / "at.ckpt")

    whole = rates_of(tmp_path, Scheduled(SCHEDULES[name]), imp(), SaveAt(), max_epochs=13)
    module, callback = Scheduled(SCHEDULES[name]), imp()
    resumed = rates_of(tmp_path, module, callback, max_epochs=13, ckpt_path=tmp_path / "at.ckpt")
    assert resumed.rates == whole.rates[(epoch + 1) * STEPS :]


def test_the_ticket_has_its_own_length__same_objects_resumed(tmp_path: Path) -> None:
    """The very callback and module that have finished may go back to a checkpoint of an earlier cycle."""

    class SaveAt(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 5 and trainer.ckpt_path is None:
                trainer.save_checkpoint(tmp_path / "at.ckpt")

    module, callback = Scheduled(SCHEDULES["lambda_of_length"]), imp()
    whole = rates_of(tmp_path, module, callback, SaveAt(), max_epochs=14)
    resumed = rates_of(tmp_path, module, callback, max_epochs=14, ckpt_path=tmp_path / "at.ckpt")
    assert resumed.rates == whole.rates[6 * STEPS :]


@pytest.mark.parametrize("max_epochs", [-1, 20])
def test_the_ticket_has_its_own_length__max_steps(tmp_path: Path, max_epochs: int) -> None:
    """Where `max_steps` ends the ticket, that is its length."""
    rates = rates_of(
        tmp_path, Scheduled(SCHEDULES["cosine_per_step"]), imp(), max_epochs=max_epochs, max_steps=11 * STEPS
    )
    expected = [whole_training("cosine_per_step", epochs).rates for epochs in (4, 4, 3)]
    assert rates.phases(rates.rates, 4, 4, 3) == expected


@pytest.mark.parametrize("max_epochs", [-1, 20])
def test_the_ticket_has_its_own_length__max_steps_one_cycle(tmp_path: Path, max_epochs: int) -> None:
    """The same with a schedule that must not be too short: it is just long enough."""
    rates = rates_of(tmp_path, Scheduled(SCHEDULES["one_cycle"]), imp(), max_epochs=max_epochs, max_steps=11 * STEPS)
    expected = [whole_training("one_cycle", epochs).rates for epochs in (4, 4, 3)]
    assert rates.phases(rates.rates, 4, 4, 3) == expected


def test_the_ticket_has_its_own_length__max_steps_with_a_rewind_epoch(tmp_path: Path) -> None:
    """The part of the schedule that a rewind skips counts for the length, too."""
    rates = rates_of(tmp_path, Scheduled(SCHEDULES["one_cycle"]), imp(rewind_epoch=2), max_epochs=20, max_steps=33)
    _, _, ticket = rates.phases(rates.rates, 4, 4, 3)
    assert ticket[1:] == pytest.approx(whole_training("one_cycle", 5).rates[2 * STEPS + 1 :])


# What is refused.


@pytest.mark.parametrize(
    ("schedule", "settings", "max_epochs", "message"),
    [
        (
            lambda optimizer, trainer: per_step(OneCycleLR(optimizer, LR, total_steps=11)),
            {},
            12,
            r"OneCycleLR has total_steps=11, but an IMP cycle takes 12 steps\. .*estimated_stepping_batches",
        ),
        (
            lambda optimizer, trainer: per_step(OneCycleLR(optimizer, LR, total_steps=12)),
            {},
            13,
            "OneCycleLR has total_steps=12, but training the ticket takes 15 steps",
        ),
        (
            lambda optimizer, trainer: OneCycleLR(optimizer, LR, total_steps=5),
            {"rewind_epoch": 2},
            12,
            "OneCycleLR has total_steps=5, but an IMP cycle takes 6 steps",
        ),
        (
            lambda optimizer, trainer: {"scheduler": StepLR(optimizer, 1), "frequency": 2},
            {"epochs_per_cycle": 3},
            12,
            r"StepLR steps every 2 epochs, which does not divide `epochs_per_cycle=3` and `rewind_epoch=0`",
        ),
        (
            lambda optimizer, trainer: {"scheduler": StepLR(optimizer, 1), "frequency": 2},
            {"rewind_epoch": 1},
            12,
            "steps every 2 epochs, which does not divide `epochs_per_cycle=4` and `rewind_epoch=1`",
        ),
        (
            lambda optimizer, trainer: {
                "scheduler": ReduceLROnPlateau(optimizer), "frequency": 3, "monitor": "constant"
            },
            {},
            12,
            "ReduceLROnPlateau steps every 3 epochs",
        ),
    ],
    ids=["cycle", "ticket", "with_rewind_epoch", "frequency", "frequency_and_rewind_epoch", "plateau"],
)  # fmt: skip
def test_schedule__error(tmp_path: Path, schedule: Any, settings: Any, max_epochs: int, message: str) -> None:
    """Refused before the first step, not in the middle of the night."""
    rates = Rates()
    running = fits.trainer(tmp_path, imp(**settings), rates, max_epochs=max_epochs)
    with pytest.raises(MisconfigurationException, match=message):
        running.fit(Scheduled(schedule), fits.loader())
    assert rates.rates == []


@pytest.mark.parametrize(
    ("schedule", "max_epochs"),
    [
        (lambda optimizer, trainer: per_step(OneCycleLR(optimizer, LR, total_steps=15)), 13),
        (lambda optimizer, trainer: per_step(StepLR(optimizer, 1)) | {"frequency": 3}, 13),
        (lambda optimizer, trainer: {"scheduler": StepLR(optimizer, 1), "frequency": 4}, 13),
    ],
    ids=["long_enough", "frequency_of_steps", "frequency_of_epochs"],
)
def test_schedule__just_right(tmp_path: Path, schedule: Any, max_epochs: int) -> None:
    rates = rates_of(tmp_path, Scheduled(schedule), imp(), max_epochs=max_epochs)
    first, second, ticket = rates.phases(rates.rates, 4, 4, 5)
    assert first == second == ticket[: 4 * STEPS]


def test_schedule__other_optimizers_error(tmp_path: Path) -> None:
    """An optimizer that depends on how often it was asked for cannot be matched with the running one."""

    class Fickle(Scheduled):
        def configure_optimizers(self) -> Any:
            self.optimizer = SGD if not self.seen else AdamW
            return super().configure_optimizers()

    with pytest.raises(MisconfigurationException, match="must return the same optimizers whenever it is called"):
        rates_of(tmp_path, Fickle(SCHEDULES["cosine"]), imp(), max_epochs=9)


# The parts.


def test_seen_as_whole(tmp_path: Path) -> None:
    """Both lengths are there for the time being, and those of the training are back afterwards, come what may."""
    running = fits.trainer(tmp_path, max_epochs=10, max_steps=50)
    with seen_as_whole(running, 3, steps_before=20):
        assert (running.max_epochs, running.max_steps) == (3, 30)
    assert (running.max_epochs, running.max_steps) == (10, 50)
    with seen_as_whole(running, 3, steps_before=60):
        assert running.max_steps == 0
    seen = seen_as_whole(running, -1)
    seen.__enter__()
    assert (running.max_epochs, running.max_steps) == (-1, 50)
    assert not seen.__exit__(KeyError, KeyError(), None)
    assert (running.max_epochs, running.max_steps) == (10, 50)


def test_seen_as_whole__no_max_steps(tmp_path: Path) -> None:
    running = fits.trainer(tmp_path, max_epochs=10)
    with seen_as_whole(running, 3, steps_before=20):
        assert running.max_steps == -1


@pytest.mark.parametrize(
    ("then", "short", "long", "expected"),
    [
        ({"T": 5, "at": 2}, {"T": 5, "at": 0}, {"T": 8, "at": 0}, {"T": 8, "at": 2}),
        ({"T": 5, "at": 2}, {"T": 5, "at": 0}, {"T": 5, "at": 0}, {"T": 5, "at": 2}),
        (
            {"parts": [{"T": 5, "at": 2}, {"T": 1, "at": 1}]},
            {"parts": [{"T": 5, "at": 0}, {"T": 1, "at": 0}]},
            {"parts": [{"T": 9, "at": 0}, {"T": 1, "at": 0}]},
            {"parts": [{"T": 9, "at": 2}, {"T": 1, "at": 1}]},
        ),
        ({"ends": [4, 6], "at": 3}, {"ends": [4, 6], "at": 0}, {"ends": [7, 9], "at": 0}, {"ends": [7, 9], "at": 3}),
        ({"ends": [1], "at": 3}, {"ends": [1], "at": 0}, {"ends": [1, 2], "at": 0}, {"ends": [1, 2], "at": 3}),
        ({"later": 3}, {}, {}, {"later": 3}),
        ({"f": None, "at": 1}, {"f": None, "at": 0}, {"f": {"T": 3}, "at": 0}, {"f": {"T": 3}, "at": 1}),
    ],
    ids=["length", "no_length", "parts", "list", "longer_list", "created_later", "another_kind"],
)
def test_adapted(then: Any, short: Any, long: Any, expected: Any) -> None:
    """The place in the schedule is that of then, its length that of the long one."""
    assert adapted(then, short, long) == expected
