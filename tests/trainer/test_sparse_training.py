"""Training with `accelerate=True` is dense training within rounding, whatever else a run does; a mode stays nowhere."""

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import resumable
import torch
import torch.nn.functional as F
from chosen_forms import IN_TRAINING, prefer
from fits import CALLBACKS, ConvModule
from optimizers import Wandering
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_drive import DRIVEPruningCallback, PruningReport, SNIPPruningCallback, SynFlowPruningCallback
from lightning_drive.acceleration import measuring, timing
from lightning_drive.acceleration.sparse_calls import SparseCalls
from lightning_drive.callbacks.hooks import PruningCallback
from lightning_drive.network.masked_parameters import _FastMask

MAKERS: dict[str, Callable[..., PruningCallback]] = {
    **CALLBACKS,
    "SNIP": lambda **settings: SNIPPruningCallback(**{"sparsity": 0.8, **settings}),
    "SynFlow": lambda **settings: SynFlowPruningCallback(**{"sparsity": 0.8, "rounds": 5, **settings}),
}


@pytest.fixture(autouse=True)
def sparse_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every layer take a sparse form, whatever the clock says."""
    prefer(monkeypatch, *IN_TRAINING)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the kind of call whenever one is computed in a sparse form."""
    kinds: list[str] = []
    compute = SparseCalls.compute

    def noted(self: Any, known: Any, call: Any) -> Any:
        if known.fits(call):
            kinds.append(call.function.__name__)
        return compute(self, known, call)

    monkeypatch.setattr(SparseCalls, "compute", noted)
    return kinds


def both(
    tmp_path: Path,
    make: Callable[[], pl.LightningModule],
    callback: Callable[..., PruningCallback] = fits.drive,
    **run: Any,
) -> tuple[PruningCallback, pl.LightningModule, PruningCallback, pl.LightningModule]:
    """Train twice in float64, accelerated and not."""
    results: list[Any] = []
    for accelerate in (True, False):
        torch.manual_seed(0)
        pruning, module = callback(accelerate=accelerate), make()
        others = [other() for other in run.get("callbacks", ())]
        settings = {name: value for name, value in run.items() if name != "callbacks"}
        fits.fit(tmp_path, module, pruning, *others, **({"precision": "64-true"} | settings))
        results += [pruning, module]
    return tuple(results)


def assert_close(accelerated: nn.Module, plain: nn.Module) -> None:
    torch.testing.assert_close(accelerated.state_dict(), plain.state_dict(), rtol=1e-8, atol=1e-10)
    assert accelerated.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", MAKERS)
def test_each__as_dense(tmp_path: Path, name: str, computed: list[str]) -> None:
    """Weights agree closely, masks exactly, and what is pruned is exactly 0; the report names the forms."""
    pruning, module, plain, dense = both(tmp_path, ConvModule, MAKERS[name])
    assert pruning.masks == plain.masks
    assert pruning.masks.hold_for(module)
    for parameter_name, mask in pruning.masks.items():
        assert not module.get_parameter(parameter_name)[~mask].any()
    assert_close(module, dense)
    assert {"linear", "conv2d"} == set(computed)
    assert pruning.report is not None
    assert plain.report is not None
    assert plain.report.acceleration is None
    acceleration = pruning.report.acceleration
    assert acceleration is not None
    assert {layer.name: layer.form for layer in acceleration.layers} == {
        "features.0.weight": "windows",
        "features.4.weight": "windows",
        "head.weight": "tokens",
    }
    sparsities = [1 - mask.float().mean().item() for mask in pruning.masks.values()]
    assert [layer.sparsity for layer in acceleration.layers] == pytest.approx(sparsities)


def test_report__in_checkpoints(tmp_path: Path) -> None:
    pruning = fits.drive(accelerate=True)
    running = fits.fit(tmp_path, ConvModule(), pruning)
    running.save_checkpoint(tmp_path / "last.ckpt")
    report = PruningReport.from_checkpoint(tmp_path / "last.ckpt")
    assert report == pruning.report
    assert report.acceleration is not None
    assert report.acceleration.num_sparse == 3


class Steps(pl.Callback):
    """Notes, for every batch of training and validation, whether a mode is on the stack."""

    def __init__(self) -> None:
        self.training: list[int] = []
        self.others: list[int] = []

    def on_before_zero_grad(self, *_: Any) -> None:
        self.training.append(torch._C._len_torch_function_stack())

    def on_validation_batch_start(self, *_: Any) -> None:
        self.others.append(torch._C._len_torch_function_stack())

    def on_train_epoch_end(self, *_: Any) -> None:
        self.others.append(torch._C._len_torch_function_stack())


def test_mode__on_while_batches_are_trained_on_after_pruning(tmp_path: Path) -> None:
    steps = Steps()
    fits.fit(tmp_path, ConvModule(), steps, fits.drive(accelerate=True), val_check_interval=1)
    assert steps.training == [0] * 6 + [1] * 6
    assert set(steps.others) == {0}


class Skips(ConvModule):
    """Skips the rest of each epoch after its first batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 1 else None


def test_mode__off_after_a_skipped_epoch(tmp_path: Path) -> None:
    steps = Steps()
    fits.fit(tmp_path, Skips(), fits.drive(accelerate=True), steps)
    assert steps.training == [0, 0, 1, 1]
    assert set(steps.others) == {0}


class Fails(ConvModule):
    """Fails in the last epoch, in a way to choose."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch == 3 and torch._C._len_torch_function_stack():
            raise self.error("in the middle")
        return loss


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_mode__off_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    pruning = fits.drive(accelerate=True)
    expected = (ValueError, SystemExit) if error is KeyboardInterrupt else error
    with pytest.raises(expected):
        fits.fit(tmp_path, Fails(error), pruning)
    assert torch._C._len_torch_function_stack() == 0
    assert pruning._fit.sparse._calls is None


def test_copies__have_no_mode(tmp_path: Path) -> None:
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if pruning.pruned:
                for twin in (copy.deepcopy(pruning), pickle.loads(pickle.dumps(pruning))):
                    assert twin._fit.sparse._calls is None
                    assert twin.accelerate
                seen.append(pruning._fit.sparse._calls)

    seen: list[Any] = []
    pruning = fits.drive(accelerate=True)
    fits.fit(tmp_path, ConvModule(), pruning, Copies())
    assert len(seen) == 6
    assert None not in seen


def test_clipping_and_accumulation(tmp_path: Path, computed: list[str]) -> None:
    run = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
    _, module, _, dense = both(tmp_path, lambda: ConvModule("adamw"), **run)
    assert_close(module, dense)
    assert computed


class Manual(fits.Manual):
    """Steps as others do, with the gradient of a penalty on gradients, and without metrics."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        gradients = torch.autograd.grad(loss, parameters := list(self.parameters()), create_graph=True)
        kept = [gradient * (parameter != 0) for gradient, parameter in zip(gradients, parameters, strict=True)]
        self.manual_backward(loss + sum(gradient.square().sum() for gradient in kept))
        optimizer.step()


@pytest.mark.parametrize("loss_fn", [fits.loss_fn, None])
def test_manual_optimization(tmp_path: Path, loss_fn: Any, computed: list[str]) -> None:
    method = fits.drive if loss_fn else MAKERS["SynFlow"]
    settings = {"loss_fn": loss_fn} if loss_fn else {}
    _, module, _, dense = both(tmp_path, Manual, lambda **kwargs: method(**settings, **kwargs))
    assert_close(module, dense)
    assert set(computed) == {"linear", "conv2d"}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(tmp_path: Path, use_reentrant: bool, computed: list[str]) -> None:
    class Checkpointed(ConvModule):
        def forward(self, images: Tensor) -> Tensor:
            features = self.features(images)
            if not self.training:
                return self.rest(features)
            result: Tensor = checkpoint(self.rest, features, use_reentrant=use_reentrant)
            return result

        def rest(self, features: Tensor) -> Tensor:
            head: Tensor = self.head(F.relu(features).flatten(1))
            return head

    _, module, _, dense = both(tmp_path, Checkpointed)
    assert_close(module, dense)
    assert computed.count("conv2d") == computed.count("linear")  # two of one, one of the other twice


def test_averages(tmp_path: Path) -> None:
    averaging = pl.callbacks.WeightAveraging if hasattr(pl.callbacks, "WeightAveraging") else None
    if averaging is None:
        pytest.skip("this Lightning has no WeightAveraging")
    _, module, _, dense = both(tmp_path, ConvModule, callbacks=[averaging])
    assert_close(module, dense)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("name", CALLBACKS)
def test_resume__within_tolerance(tmp_path: Path, name: str, accelerate: bool) -> None:
    """From every epoch, with or without acceleration; the setting is none of those that a resume compares."""
    whole, pruning = ConvModule().double(), CALLBACKS[name](accelerate=True)
    fits.fit(tmp_path, whole, pruning, fits.SaveEpochs(), precision="64-true")
    for epoch in range(3):
        module, again = ConvModule().double(), CALLBACKS[name](accelerate=accelerate)
        resumable.forget(module)
        path = tmp_path / f"{epoch}.ckpt"
        fits.fit(tmp_path, module, again, ckpt_path=path, precision="64-true")
        assert again.masks == pruning.masks
        assert again.masks.hold_for(module)
        assert_close(module, whole)


def test_measured__at_each_cut_and_each_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """IMP cuts twice; a further fit measures once, for its own batches."""
    measured: list[tuple[int, int]] = []
    real = measuring.measure

    def measure(pruned: Any, *args: Any) -> Any:
        measured.append((trainer.current_epoch, sum(len(each.places) for each in pruned)))
        return real(pruned, *args)

    monkeypatch.setattr(measuring, "measure", measure)
    pruning, module = CALLBACKS["IMP"](accelerate=True), ConvModule()
    trainer = fits.trainer(tmp_path, pruning)
    trainer.fit(module, fits.loader())
    assert measured == [(1, 446), (2, 200)]
    trainer = fits.trainer(tmp_path, pruning, max_epochs=2)
    trainer.fit(module, fits.loader())
    assert measured[2:] == [(0, 200)]


def test_measuring__leaves_no_trace(tmp_path: Path) -> None:
    """If all stays dense, the run is bit for bit the one without; metrics and random numbers included."""
    results = {}
    for accelerate in (True, False):
        module = ConvModule(dropout=0.3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timing, "least_seconds", lambda works, runs=None: dict.fromkeys(works, 1.0))
            torch.manual_seed(0)
            pruning = fits.drive(accelerate=accelerate)
            running = fits.fit(tmp_path, module, pruning)
        results[accelerate] = [fits.state_of(module), dict(running.callback_metrics)]
        if accelerate:
            assert pruning.report is not None
            assert pruning.report.acceleration is not None
            assert pruning.report.acceleration.num_sparse == 0
    assert fits.equal_states(results[True], results[False])


# What stays dense, and says why.


class Log:
    """The lines that were shown."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    @property
    def lines(self) -> list[str]:
        starts = ("training step: ", "not measured: ")
        return [record.message for record in self._caplog.records if record.message.startswith(starts)]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        yield Log(caplog)


ALL_DENSE = "training step: 0 of 3 layers with zeros in a sparse form (1 thread)"
PRUNED = "features.0.weight, features.4.weight, head.weight"


def test_log__headline(tmp_path: Path, log: Log) -> None:
    fits.fit(tmp_path, ConvModule(), fits.drive(accelerate=True))
    assert log.lines == [
        "training step: 3 of 3 layers with zeros in a sparse form, 25.00 times as fast as dense (1 thread)"
    ]


def test_mixed_precision__stays_dense(tmp_path: Path, log: Log, computed: list[str]) -> None:
    fits.fit(tmp_path, ConvModule(), fits.drive(accelerate=True), precision="bf16-mixed")
    reason = "mixed precision (autocast) computes with it in another type"
    assert log.lines == [ALL_DENSE, f"not measured: {PRUNED}: {reason}"]
    assert not computed


def test_half_precision__stays_dense(tmp_path: Path, log: Log, computed: list[str]) -> None:
    fits.fit(tmp_path, ConvModule(), fits.drive(accelerate=True), precision="bf16-true")
    assert log.lines == [ALL_DENSE, f"not measured: {PRUNED}: its numbers are of type torch.bfloat16"]
    assert not computed


class Other(ConvModule):
    """Has weights that no layer of torch computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(fits.NUM_CLASSES, fits.NUM_CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) @ self.matrix


def test_other_uses_of_weights__stay_dense(tmp_path: Path, log: Log) -> None:
    pruning = fits.drive(accelerate=True, include=["features.4.weight", "head.weight", "matrix"])
    module = Other()
    fits.fit(tmp_path, module, pruning)
    assert log.lines == [
        "training step: 2 of 3 layers with zeros in a sparse form, 25.00 times as fast as dense (1 thread)",
        "not measured: matrix: no linear layer or convolution of torch computes with it",
    ]
    assert pruning.masks.hold_for(module)


class Compilable(ConvModule):
    """Without metrics, which are nothing to compile."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def of_whole_module(module: ConvModule) -> Any:
    return torch.compile(module, backend="aot_eager")


def of_a_part(module: ConvModule) -> Any:
    module.features = torch.compile(module.features, backend="aot_eager")  # type: ignore[assignment]
    return module


def of_a_part_in_place(module: ConvModule) -> Any:
    module.features.compile(backend="aot_eager")
    return module


@pytest.mark.parametrize("compiled", [of_whole_module, of_a_part, of_a_part_in_place])
def test_compiled__stays_dense(tmp_path: Path, log: Log, compiled: Any) -> None:
    torch._dynamo.reset()
    module = compiled(Compilable())
    pruning = fits.drive(accelerate=True)
    fits.fit(tmp_path, module, pruning)
    headline, reason = log.lines
    if compiled is of_whole_module:
        assert headline == ALL_DENSE
        assert reason == f"not measured: {PRUNED}: `torch.compile` compiles it"
    else:
        assert headline.startswith("training step: 1 of 3 layers")
        assert reason.endswith("4.weight: `torch.compile` compiles it")
        assert pruning.report is not None
        assert pruning.report.acceleration is not None
        assert pruning.report.acceleration.sparse_names == ["head.weight"]
    torch._dynamo.reset()


def test_failed_measurement__one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    def measure(*_: Any) -> None:
        raise LookupError("no batch is left")

    monkeypatch.setattr(measuring, "measure", measure)
    pruning, module = fits.drive(accelerate=True), ConvModule()
    with pytest.warns(UserWarning, match="since a training step could not be measured: LookupError: no batch is left"):
        fits.fit(tmp_path, module, pruning)
    assert log.lines == [ALL_DENSE, f"not measured: {PRUNED}: the training step could not be measured"]
    assert pruning.masks.hold_for(module)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.", "ignore:Scoring skipped 3 batches")
def test_batch_without_loss__measured_on_the_next(tmp_path: Path, log: Log) -> None:
    class SkipsFirst(ConvModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
            loss = super().training_step(batch, batch_idx)
            return None if torch.equal(batch[0], first) else loss

    first = next(iter(fits.loader()))[0]
    pruning = fits.drive(accelerate=True, loss_fn=fits.loss_fn)
    pruning.loss_fn = lambda module, batch: None if torch.equal(batch[0], first) else fits.loss_fn(module, batch)
    fits.fit(tmp_path, SkipsFirst(), pruning)
    [headline] = log.lines
    assert headline.startswith("training step: 3 of 3")


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`accelerate` must be True or False, got 1"):
        DRIVEPruningCallback(sparsity=0.5, accelerate=1)  # type: ignore[arg-type]
    assert not fits.drive().accelerate


class Disturbed(ConvModule):
    """Lets other code write into gradients or weights: hooks, an optimizer of its own, or a second use of weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.pruning: PruningCallback | None = None
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 1e-3 * self.head.weight.sum() if self.kind == "second_use" else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.kind == "gradient_noise" or (self.kind == "passing_noise" and self.steps == 2):
            for parameter in self.parameters():
                assert parameter.grad is not None
                parameter.grad.add_(0.1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.pruning is not None
        if self.pruning.pruned:
            assert self.pruning.masks.hold_for(self)
            self.steps += 1
        if self.kind == "weight_noise":
            with torch.no_grad():
                self.head.weight.add_(0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "optimizer":
            return Wandering(self.parameters(), {})
        return super().configure_optimizers()


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(
    "kind", ["nothing", "second_use", "gradient_noise", "passing_noise", "weight_noise", "optimizer"]
)
@pytest.mark.filterwarnings("ignore:Pruned weights were no longer 0")
def test_pruned_weights__zero_after_every_step(tmp_path: Path, kind: str, clip: float | None) -> None:
    """Masks are spared where nobody else wrote, and only there."""
    module = Disturbed(kind)
    module.pruning = fits.drive(accelerate=True)
    fits.fit(tmp_path, module, module.pruning, gradient_clip_val=clip)
    assert module.pruning.report is not None
    assert module.pruning.report.acceleration is not None
    assert module.pruning.report.acceleration.num_sparse == 3
    assert module.steps > 3


def test_masks__spared_where_nobody_else_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In sparse forms the gradients are masked already, and torch's own optimizers leave the pruned weights at zero."""
    written: list[int] = []
    zero_ = _FastMask.zero_

    def noted(self: Any, tensor: Tensor, **settings: Any) -> None:
        written.append(tensor.numel())
        zero_(self, tensor, **settings)

    monkeypatch.setattr(_FastMask, "zero_", noted)
    counts = []
    for accelerate, module in ((False, ConvModule()), (True, ConvModule()), (True, Disturbed("optimizer"))):
        written.clear()
        pruning = fits.drive(accelerate=accelerate)
        module.pruning = pruning  # type: ignore[assignment]
        fits.fit(tmp_path, module, pruning)
        counts.append(len(written))
    plain, accelerated, wandering = counts
    assert accelerated < plain / 2
    assert accelerated < wandering < plain  # the gradients are masked, the weights move
