"""Whatever optimizer steps, and however its gradients are made: what is pruned stays 0, and is in no gradient norm."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
from chosen_forms import IN_TRAINING, prefer
from optimizers import Drifting
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from lightning_drive import DRIVEPruningCallback

Make = Callable[[Iterable[nn.Parameter]], Any]

OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and name not in ("Optimizer", "SparseAdam", "LBFGS")
}
"""All that this torch has, but `SparseAdam`, which takes no dense gradients, and `LBFGS`, which needs settings."""

WANTED = {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True, "centered": True, "amsgrad": True, "etas": (0.5, 2)}
CONSTANTS = {("Rprop", "step_size"), ("Adamax", "exp_inf")}
"""States that such an optimizer keeps above 0 whatever the gradient: a step size, and a bound that includes eps."""


def variants() -> dict[str, Make]:
    """Every optimizer with momentum, weight decay and the like, by loop, foreach and fused, where it has them."""
    made: dict[str, Make] = {}
    for name, kind in OPTIMIZERS.items():
        known = inspect.signature(kind).parameters
        settings = {key: value for key, value in WANTED.items() if key in known}
        made[name] = lambda parameters, kind=kind, settings=settings: kind(parameters, **settings)
        for switch in sorted({"foreach", "fused"} & known.keys()):
            chosen = {**settings, switch: True}
            made[f"{name}-{switch}"] = lambda parameters, kind=kind, chosen=chosen: kind(parameters, **chosen)
    made["Drifting"] = lambda parameters: Drifting(parameters, lr=0.05, momentum=0.9)
    for search in (None, "strong_wolfe"):
        made[f"LBFGS-{search}"] = lambda parameters, search=search: torch.optim.LBFGS(
            parameters, lr=0.5, max_iter=4, history_size=5, line_search_fn=search
        )
    return made


class Trained(fits.BiaslessMLP):
    """Two matrices and an optimizer; ``watch`` is called in every ``training_step``."""

    def __init__(self, make: Make, watch: Callable[["Trained"], None] | None = None) -> None:
        super().__init__()
        self.make, self.watch = make, watch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.watch is not None:
            self.watch(self)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Survivors(pl.Callback):
    """Remembers the weights right after pruning."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.before = fits.state_of(pl_module)


def drive(**kwargs: Any) -> DRIVEPruningCallback:
    return fits.drive(**({"warmup_epochs": 1, "rounds": 2, "bn_batches": 0} | kwargs))


fit = partial(fits.fit, max_epochs=3)


def assert_pruned(module: nn.Module, callback: DRIVEPruningCallback, survivors: Survivors | None = None) -> None:
    """The count is exact, what is pruned is +0, and what is kept has moved."""
    assert callback.masks.num_kept == round(callback.masks.num_prunable * (1 - callback.sparsity))
    assert callback.report is not None
    for name, mask in callback.masks.items():
        weight = module.get_parameter(name).detach()
        assert torch.equal(weight[~mask], torch.zeros_like(weight[~mask]))
        assert not weight[~mask].signbit().any()
        assert weight.isfinite().all()
        if survivors is not None:
            assert (weight[mask] != survivors.before[name][mask]).any()


def assert_forgotten(optimizer: Any, module: nn.Module, callback: DRIVEPruningCallback, least: int = 0) -> None:
    """Nothing in the shape of a parameter remembers a pruned weight; at least so many states were looked at."""
    seen = 0
    for name, mask in callback.masks.items():
        for key, value in optimizer.state.get(module.get_parameter(name), {}).items():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                seen += 1
                if (type(optimizer).__name__, key) in CONSTANTS:
                    assert value[~mask].unique().numel() == 1
                else:
                    assert not value[~mask].any(), key
    assert seen >= least


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in variants().items()])
def test_torch_optimizers(tmp_path: Path, make: Make) -> None:
    """Pruned for good, forgotten, resumed bit for bit from a dense and a sparse epoch; the module keeps its names."""
    module, callback, survivors = Trained(make), drive(), Survivors()
    names, parameters = [name for name, _ in module.named_parameters()], list(module.parameters())
    fit(tmp_path, module, callback, survivors, fits.SaveEpochs())
    assert_pruned(module, callback, survivors)
    optimizer = module.trainer.optimizers[0]
    per_weight = not isinstance(optimizer, (torch.optim.LBFGS, torch.optim.Adafactor))
    assert_forgotten(optimizer, module, callback, least=2 * per_weight)
    assert [name for name, _ in module.named_parameters()] == names == list(module.state_dict())
    assert all(now is before for now, before in zip(module.parameters(), parameters, strict=True))

    for epoch in (0, 1):
        again, pruning = Trained(make), drive()
        fit(tmp_path, again, pruning, ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert pruning.masks == callback.masks
        assert fits.equal_states(fits.state_of(again), fits.state_of(module))
        assert fits.equal_states(again.trainer.optimizers[0].state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in variants().items()])
def test_torch_optimizers__accelerated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    """In sparse forms every optimizer gets the gradients that it gets otherwise, but for rounding."""
    prefer(monkeypatch, *IN_TRAINING)
    modules = []
    for accelerate in (True, False):
        module, callback = Trained(make).double(), drive(accelerate=accelerate)
        fit(tmp_path, module, callback, precision="64-true")
        assert_pruned(module, callback)
        modules.append(fits.state_of(module))
        assert callback.report is not None
        assert (callback.report.acceleration is not None) == accelerate
    torch.testing.assert_close(*modules, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(tmp_path: Path, search: str | None) -> None:
    """Its flat history starts anew with the pruned network, so no direction in it brings a weight back."""
    histories: list[tuple[int, list[Tensor]]] = []

    def watch(module: Trained) -> None:
        state = module.trainer.optimizers[0].state.get(module.first.weight, {})
        histories.append((state.get("n_iter", 0), [value.clone() for value in state.get("old_dirs") or []]))
        assert not callback.pruned or callback.masks.hold_for(module)  # in every evaluation of the closure

    module, callback = Trained(variants()[f"LBFGS-{search}"], watch), drive()
    fit(tmp_path, module, callback)
    assert_pruned(module, callback)
    state = module.trainer.optimizers[0].state[module.first.weight]
    pruned = torch.cat([~callback.masks[name].flatten() for name, _ in module.named_parameters()])
    assert len(state["old_dirs"]) > 1
    for vector in (state["d"], state["prev_flat_grad"], *state["old_dirs"], *state["old_stps"]):
        assert vector.shape == pruned.shape
        assert vector.any()
        assert not vector[pruned].any()
    counts = [count for count, _ in histories]
    restarts = [i for i in range(1, len(counts)) if counts[i] < counts[i - 1]]
    assert len(restarts) == 1
    assert any(direction[pruned].any() for direction in histories[restarts[0] - 1][1])  # there was one to forget


class Tokens(pl.LightningModule):
    """Adds up the embeddings of the brightest pixels: gradients are sparse."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make = make
        self.bag = nn.EmbeddingBag(64, fits.NUM_CLASSES, mode="sum", sparse=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.bag(images.flatten(1).topk(16).indices)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return fits.loss_fn(self, batch)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        gradient = self.bag.weight.grad
        assert gradient is not None
        assert gradient.is_sparse
        self.last_gradient = gradient.to_dense()

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # torch's own
@pytest.mark.parametrize("name", ["SparseAdam", "SGD", "Adagrad"])
def test_sparse_gradients(tmp_path: Path, name: str) -> None:
    """Sparse gradients, and a momentum that is sparse like them, are masked where they have entries."""
    settings = {"momentum": 0.9} if name == "SGD" else {}
    module = Tokens(lambda parameters: getattr(torch.optim, name)(list(parameters), lr=0.05, **settings))
    callback, survivors = drive(include=["bag.weight"]), Survivors()
    fit(tmp_path, module, callback, survivors)
    assert_pruned(module, callback, survivors)
    [mask] = callback.masks.values()
    assert module.last_gradient[mask].any()
    assert not module.last_gradient[~mask].any()
    for value in module.trainer.optimizers[0].state[module.bag.weight].values():
        if isinstance(value, Tensor) and value.shape == mask.shape:
            assert not value.to_dense()[~mask].any()


# Optimizers around optimizers.


class SAM(Optimizer):
    """Sharpness-aware minimisation: a step of the base optimizer with the gradients of a worse point nearby."""

    def __init__(self, parameters: Iterable[nn.Parameter], rho: float = 0.5) -> None:
        super().__init__(parameters, {"rho": rho})
        self.base = Drifting(self.param_groups, lr=0.05, momentum=0.9, weight_decay=0.05)
        self.away: list[float] = []

    @torch.no_grad()
    def climb(self) -> None:
        used = [parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None]
        norm = torch.stack([parameter.grad.norm() for parameter in used]).norm()
        for parameter in used:
            self.state[parameter]["home"] = parameter.detach().clone()
            parameter.add_(parameter.grad, alpha=self.param_groups[0]["rho"] / float(norm))
        self.away.append(float(norm))

    @torch.no_grad()
    def descend(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter]["home"])
        self.base.step()

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        loss = closure()
        self.climb()
        closure()
        self.descend()
        return loss


class ManualSAM(Trained):
    """Takes SAM's two steps itself, by a closure, by its two halves, or by halves without Lightning in between."""

    def __init__(self, style: str, watch: Callable[[Trained], None], after: Callable[[], None]) -> None:
        super().__init__(SAM, watch)
        self.style, self.after, self.automatic_optimization = style, after, False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers(use_pl_optimizer=self.style != "raw")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = super(ManualSAM, self).training_step(batch, batch_idx)
            loss.backward() if self.style == "raw" else self.manual_backward(loss)
            return loss.detach()

        if self.style == "closure":
            optimizer.step(closure)
            return
        closure()
        optimizer.climb()
        closure()
        optimizer.descend()
        self.after()


@pytest.mark.parametrize("style", ["automatic", "closure", "halves", "raw"])
def test_sam(tmp_path: Path, style: str) -> None:
    """Pruned weights are 0 at the point nearby, too, when the second forward pass runs there, and after the step."""
    callback, survivors, forwards = drive(loss_fn=fits.loss_fn), Survivors(), []

    def check() -> None:
        if callback.pruned:
            assert all(module.get_parameter(name).detach()[~mask].eq(0).all() for name, mask in callback.masks.items())

    def watch(module: Trained) -> None:
        forwards.append(module)
        check()

    module = Trained(SAM, watch) if style == "automatic" else ManualSAM(style, watch, check)
    fit(tmp_path, module, callback, survivors)
    assert_pruned(module, callback, survivors)
    optimizer = module.trainer.optimizers[0]
    assert len(optimizer.away) == 9
    assert len(forwards) == 2 * 9
    assert_forgotten(optimizer, module, callback, least=2)
    assert_forgotten(optimizer.base, module, callback, least=2)


class Lookahead(Optimizer):
    """Slow weights that follow the fast ones of an inner optimizer; ``hold`` says how it keeps that."""

    def __init__(self, inner: Optimizer, hold: Callable[[Optimizer], Any], every: int = 2) -> None:
        self.held = hold(inner)
        super().__init__(inner.param_groups, {})
        self._begin(inner, every)

    def _begin(self, inner: Optimizer, every: int) -> None:
        self.every, self.count, self.step_inner = every, 0, inner.step
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["slow"] = parameter.detach().clone()

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self._advance(closure)

    def _advance(self, closure: Any) -> Any:
        loss = self.step_inner(closure)
        self.count += 1
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if self.count % self.every == 0:
                        parameter.copy_(self.state[parameter]["slow"].lerp_(parameter, 0.5))
        return loss


class UninitialisedLookahead(Lookahead):
    """As some wrappers are: of the class, but without ``super().__init__()``, so no hook of its own ever runs."""

    def __init__(self, inner: Optimizer, hold: Callable[[Optimizer], Any], every: int = 2) -> None:
        self.held = hold(inner)
        self.param_groups, self.defaults = inner.param_groups, inner.defaults
        self.state = {parameter: {} for group in inner.param_groups for parameter in group["params"]}  # type: ignore[assignment]
        self._begin(inner, every)

    def step(self, closure: Any = None) -> Any:
        return self._advance(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class LooksLikeAnOptimizer:
    """As some wrappers are: not of the class, and what it has not itself it asks its inner optimizer for."""

    def __init__(self, inner: Optimizer, hold: Callable[[Optimizer], Any]) -> None:
        self.held, self.inner = hold(inner), inner
        self.slow = [parameter.detach().clone() for group in inner.param_groups for parameter in group["params"]]

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    # Lightning asks for these where it checks the protocol of optimizers.
    param_groups = property(lambda self: self.inner.param_groups)
    defaults = property(lambda self: self.inner.defaults)
    state = property(lambda self: self.inner.state)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter, slow in zip(parameters, self.slow, strict=True):
            parameter.copy_(slow.lerp_(parameter, 0.5))
        return loss


HOLDS: dict[str, Callable[[Optimizer], Any]] = {
    "attribute": lambda inner: inner,
    "list": lambda inner: [inner],
    "dict": lambda inner: {"fast": inner},
    "nested": lambda inner: {"all": [(inner, 1.0)]},
}


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
@pytest.mark.parametrize("kind", [Lookahead, UninitialisedLookahead, LooksLikeAnOptimizer])
def test_lookahead(tmp_path: Path, kind: Any, hold: Callable[[Optimizer], Any]) -> None:
    """Inner optimizers are found wherever the wrapper keeps them, and slow weights bring nothing back."""
    callback, survivors = drive(), Survivors()
    inner: list[Optimizer] = []

    def watch(module: Trained) -> None:
        assert not callback.pruned or callback.masks.hold_for(module)

    def make(parameters: Iterable[nn.Parameter]) -> Any:
        inner.append(AdamW(parameters, lr=0.01, weight_decay=0.05))
        return kind(inner[0], hold)

    module = Trained(make, watch)
    fit(tmp_path, module, callback, survivors)
    assert_pruned(module, callback, survivors)
    assert_forgotten(inner[0], module, callback, least=4)
    if isinstance(module.trainer.optimizers[0], Lookahead):
        assert_forgotten(module.trainer.optimizers[0], module, callback, least=2)


# Manual optimization.


class Duel(fits.BiaslessMLP):
    """Two optimizers that step in turn, every second batch, with gradients that are clipped inside."""

    def __init__(self, style: str, pruning: DRIVEPruningCallback) -> None:
        super().__init__()
        self.style, self.pruning, self.automatic_optimization = style, pruning, False
        self.seen = 0

    def check(self) -> None:
        """What a clip would measure, and the weights that the next forward pass would use."""
        if not self.pruning.pruned:
            return
        for name, mask in self.pruning.masks.items():
            parameter = self.get_parameter(name)
            assert parameter.detach()[~mask].eq(0).all()
            if parameter.grad is not None:
                assert parameter.grad[~mask].eq(0).all()
                self.seen += bool(parameter.grad.any())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers(use_pl_optimizer=self.style == "lightning")
        for optimizer, weight in zip(optimizers, (self.first.weight, self.last.weight), strict=True):
            if self.style == "lightning":
                self.toggle_optimizer(optimizer)
            loss = fits.loss_fn(self, batch)
            if self.style == "lightning":
                self.manual_backward(loss)
                self.check()
                self.clip_gradients(optimizer, gradient_clip_val=0.1)
            elif self.style == "raw":
                loss.backward()
                self.check()
                nn.utils.clip_grad_norm_(self.parameters(), 0.1)
            else:  # nothing is called that could mask these
                [gradient] = torch.autograd.grad(loss, [weight])
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
            if batch_idx % 2:
                optimizer.step()
                if self.style == "assigned":
                    self.check()
                optimizer.zero_grad()
            if self.style == "lightning":
                self.untoggle_optimizer(optimizer)
            if batch_idx % 2:
                self.check()

    def configure_optimizers(self) -> Any:
        return [
            SGD([self.first.weight], lr=0.05, momentum=0.9, weight_decay=0.05),
            AdamW([self.last.weight], lr=0.01, weight_decay=0.05),
        ]


@pytest.mark.parametrize("style", ["lightning", "raw", "assigned"])
def test_manual_optimization(tmp_path: Path, style: str) -> None:
    """Through Lightning, around it, and with gradients assigned by hand; weights are 0 after every single step."""
    callback, survivors = drive(loss_fn=fits.loss_fn), Survivors()
    module = Duel(style, callback)
    fit(tmp_path, module, callback, survivors)
    assert module.seen >= 4
    assert_pruned(module, callback, survivors)
    for optimizer in module.trainer.optimizers:
        assert_forgotten(optimizer, module, callback, least=1)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())


def test_manual_optimization__optimizer_that_the_trainer_does_not_know(tmp_path: Path) -> None:
    """Its steps cannot be followed, but at the end of the batch the masks hold."""

    class Own(fits.BiaslessMLP):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> None:
            return None

        def on_fit_start(self) -> None:
            self.own = SGD(self.parameters(), lr=0.05, momentum=0.9)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            self.own.zero_grad()
            fits.loss_fn(self, batch).backward()
            self.own.step()

    module, callback, survivors = Own(), drive(loss_fn=fits.loss_fn), Survivors()
    with pytest.warns(UserWarning, match="this fit will run with no optimizer"):
        fit(tmp_path, module, callback, survivors)
    assert_pruned(module, callback, survivors)


# Parameter groups, accumulation and clipping in automatic optimization.


def test_parameter_groups(tmp_path: Path) -> None:
    """Groups with settings of their own, one of them added by hand."""

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        first, last = parameters
        optimizer = RMSprop([{"params": [last], "lr": 1e-3}], momentum=0.9, centered=True, weight_decay=0.05)
        optimizer.add_param_group({"params": [first], "weight_decay": 0.0})
        return optimizer

    module, callback, survivors = Trained(make), drive(), Survivors()
    fit(tmp_path, module, callback, survivors, accumulate_grad_batches=2)
    assert_pruned(module, callback, survivors)
    assert_forgotten(module.trainer.optimizers[0], module, callback, least=6)


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.05)


class Clipping:
    """Clips to a norm, and writes down how much of what it measured were gradients of pruned weights."""

    def __init__(self, pruning: DRIVEPruningCallback) -> None:
        self.pruning, self.norms, self.pruned = pruning, [], []

    def __call__(self, module: nn.Module) -> None:
        named = module.named_parameters()
        gradients = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
        assert gradients
        outside = [gradients[name][~mask].abs().max() for name, mask in self.pruning.masks.items()]
        self.pruned += [largest.item() for largest in outside]
        self.norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), 0.1)))


PLACES = (
    *("backward", "on_after_backward", "optimizer_step", "on_before_optimizer_step", "configure_gradient_clipping"),
    *("callback_on_after_backward", "callback_on_before_optimizer_step"),
)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_clipping(tmp_path: Path, place: str, batches: int) -> None:
    """Wherever gradients are clipped, the norm is that of survivors alone."""
    callback = drive()
    clip, module, before = Clipping(callback), Trained(sgd), pl.Callback()

    def backward(loss: Tensor, *_: Any) -> None:
        loss.backward()
        clip(module)

    def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        closure()
        clip(module)
        optimizer.step()

    in_module: dict[str, Callable[..., None]] = {
        "backward": backward,
        "optimizer_step": optimizer_step,
        "on_after_backward": lambda: clip(module),
        "on_before_optimizer_step": lambda optimizer: clip(module),
        "configure_gradient_clipping": lambda optimizer, gradient_clip_val, gradient_clip_algorithm: clip(module),
    }
    if place in in_module:
        setattr(module, place, in_module[place])
    else:
        setattr(before, place.removeprefix("callback_"), lambda trainer, module, *_: clip(module))
    survivors = Survivors()
    fit(tmp_path, module, before, callback, survivors, accumulate_grad_batches=batches)
    assert_pruned(module, callback, survivors)
    assert max(clip.norms) > 0.1
    assert len(clip.pruned) >= 2 * 2 * 2
    assert max(clip.pruned) == 0


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping__by_the_trainer(tmp_path: Path, algorithm: str) -> None:
    """``gradient_clip_val`` sees masked gradients: the survivors' are those of a clip that knows of no others."""
    callback, module, survivors = drive(), Trained(sgd), Survivors()
    limit, steps = 0.01, []

    def configure_gradient_clipping(optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        expected = [parameter.grad.clone() for parameter in module.parameters()]
        if callback.pruned:
            expected = [gradient * mask for gradient, mask in zip(expected, callback.masks.values(), strict=True)]
        if algorithm == "norm":
            norm = torch.stack([gradient.norm() for gradient in expected]).norm()
            expected = [gradient * limit / norm for gradient in expected]
        else:
            expected = [gradient.clamp(-limit, limit) for gradient in expected]
        module.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        for gradient, parameter in zip(expected, module.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
        steps.append(callback.pruned)

    module.configure_gradient_clipping = configure_gradient_clipping  # type: ignore[method-assign, assignment]
    fit(tmp_path, module, callback, survivors, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    assert steps == [False] * 3 + [True] * 6
    assert_pruned(module, callback, survivors)


def test_plain_training_has_no_gradient_hooks(tmp_path: Path) -> None:
    """Where nothing looks at gradients early, no backward pass pays for that."""
    hooks: list[Any] = []

    def watch(module: Trained) -> None:
        if callback.pruned:
            hooks.extend(parameter._post_accumulate_grad_hooks for parameter in module.parameters())

    module, callback = Trained(sgd, watch), drive()
    fit(tmp_path, module, callback)
    assert hooks == [None] * 2 * 6


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.98])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw", "rmsprop", "adagrad"])
def test_exact_and_stays(tmp_path: Path, optimizer: str, sparsity: float) -> None:
    """With convolutions, BatchNorm and biases beside, at any sparsity: exact, forgotten, and names as they were."""
    module, callback = fits.ConvModule(optimizer), fits.drive(sparsity=sparsity)
    names, keys, parameters = (
        [name for name, _ in module.named_parameters()],
        list(module.state_dict()),
        list(module.parameters()),
    )
    fit(tmp_path, module, callback, accumulate_grad_batches=2)
    assert tuple(callback.masks) == ("features.0.weight", "features.4.weight", "head.weight")
    assert callback.masks.num_prunable == 6 * 9 + 8 * 6 * 9 + 8 * 16 * 4
    assert_pruned(module, callback)
    assert_forgotten(module.trainer.optimizers[0], module, callback, least=3)
    for name, mask in callback.masks.items():
        assert module.get_parameter(name).detach()[mask].count_nonzero() == mask.sum()
    assert [name for name, _ in module.named_parameters()] == names
    assert list(module.state_dict()) == keys
    assert all(now is before for now, before in zip(module.parameters(), parameters, strict=True))
