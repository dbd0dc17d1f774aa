"""A replica computes what its module computes, and shares nothing with it that scoring could write to."""

import collections
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import models
import pytest
import torch
import torch._dynamo  # as after any torch.compile
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_drive import (
    DRIVE,
    SNIP,
    DRIVEPruningCallback,
    IMPPruningCallback,
    Magnitude,
    SNIPPruningCallback,
    SynFlow,
    SynFlowPruningCallback,
    find_masks,
)
from lightning_drive.network.replica import Replica

METHODS = [Magnitude(), SNIP(), DRIVE(rounds=2), SynFlow(rounds=2)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def clone(name: str, value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_(value.requires_grad)


# --- layers under two names


class Named(nn.Module):
    """A network, with more names for parts of it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def alias() -> nn.Module:
    module = Named(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    module.head = module.net[-1]
    return module


def repeated() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *[nn.Linear(6, 6)] * 3, nn.ReLU(), nn.Linear(6, 3))


def block_with_norm() -> nn.Module:
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    return nn.Sequential(block, nn.Sequential(block), nn.Linear(4, 3))


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    net[2].weight = net[0].weight
    return net


def in_a_list_too() -> nn.Module:
    module = Named(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    module.branches = nn.ModuleList([module.net[0], module.net[2]])
    module.by_name = nn.ModuleDict({"last": module.net[2]})
    return module


def conv_alias() -> nn.Module:
    module = Named(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 3))
    module.features = module.net[1]
    return module


SHARED: dict[str, Callable[[], nn.Module]] = {
    each.__name__: each for each in (alias, repeated, block_with_norm, tied, in_a_list_too, conv_alias)
}


def identities(module: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(each)) for name, each in module.named_parameters(remove_duplicate=False)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("build", SHARED.values(), ids=SHARED)
def test_find_masks__shared_layers(build: Callable[[], nn.Module], method: Any) -> None:
    """The module has the very same parameters and values afterwards, under all of their names."""
    module = models.randomised(build())
    before, parameters = models.fingerprint(module), identities(module)
    masks = find_masks(module, method, sparsity=0.5, batches=models.make_batches(4), loss_fn=models.loss_fn)
    assert identities(module) == parameters
    assert models.changes(module, before) == []
    assert masks.sparsity == pytest.approx(0.5, abs=0.02)
    assert masks.keys() <= dict(module.named_parameters()).keys()


class Fitted(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: models.Batch, batch_idx: int) -> Tensor:
        return models.loss_fn(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def fit(module: pl.LightningModule, callback: pl.Callback | None, max_epochs: int = 3) -> pl.LightningModule:
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        callbacks=[] if callback is None else [callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(models.make_batches(4, count=4), batch_size=None))
    return module


@pytest.mark.parametrize(
    "callback",
    [
        lambda: DRIVEPruningCallback(sparsity=0.0, warmup_epochs=1, rounds=2),
        lambda: SNIPPruningCallback(sparsity=0.0),
        lambda: SynFlowPruningCallback(sparsity=0.0, rounds=2),
        lambda: IMPPruningCallback(sparsity=0.0, cycles=1, epochs_per_cycle=1),
    ],
    ids=["DRIVE", "SNIP", "SynFlow", "IMP"],
)
@pytest.mark.parametrize("build", SHARED.values(), ids=SHARED)
def test_fit__shared_layers(build: Callable[[], nn.Module], callback: Callable[[], pl.Callback]) -> None:
    """At sparsity 0 the run is the dense one (IMP's: its last two epochs), to the bit."""
    torch.manual_seed(1)
    dense = Fitted(models.randomised(build()))
    torch.manual_seed(1)
    pruned = Fitted(models.randomised(build()))
    parameters = identities(pruned)
    chosen = callback()
    if isinstance(chosen, (DRIVEPruningCallback, SynFlowPruningCallback, SNIPPruningCallback)):
        chosen.bn_batches = 0
    fit(dense, None, max_epochs=2 if isinstance(chosen, IMPPruningCallback) else 3)
    fit(pruned, chosen)
    assert identities(pruned) == parameters
    for (name, found), expected in zip(pruned.state_dict().items(), dense.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


# --- state outside parameters and buffers


class Stateful(Fitted):
    """Keeps state wherever a module can."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        self.outputs: list[Tensor] = []
        self.count = 0
        self.totals = {"loss": 0.0, "by_class": [0, 0, 0]}
        self.metrics = {"accuracy": torchmetrics.MeanMetric()}  # in a plain dict, so nobody registers it
        self.registered = torchmetrics.MetricCollection([torchmetrics.MeanMetric()])
        self.meter = Meter()
        self.generator = torch.Generator().manual_seed(3)
        self.last: Tensor | None = None
        self.features: list[Tensor] = []
        self.net[0].register_forward_hook(lambda module, inputs, output: self.features.append(output.detach()))
        self.act = lambda x: self.net(x)  # holds the module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)

    def training_step(self, batch: models.Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss.detach())
        self.count += 1
        self.totals["loss"] += float(loss.detach())
        self.totals["by_class"][0] += 1
        self.metrics["accuracy"].update(loss.detach())
        self.registered.update(loss.detach())
        self.meter.update(float(loss.detach()))
        torch.rand(3, generator=self.generator)
        self.last = loss  # which is no leaf
        return loss

    def state(self) -> dict[str, Any]:
        return {
            "outputs": len(self.outputs),
            "count": self.count,
            "totals": str(self.totals),
            "metric": self.metrics["accuracy"].compute().item(),
            "registered": str(self.registered.compute()),
            "meter": vars(self.meter),
            "generator": self.generator.get_state().sum().item(),
            "features": len(self.features),
        }


class Meter:
    """An average of one's own."""

    def __init__(self) -> None:
        self.sum, self.history = 0.0, []

    def update(self, value: float) -> None:
        self.sum += value
        self.history.append(value)


@pytest.mark.parametrize("kind", [DRIVEPruningCallback, SNIPPruningCallback, SynFlowPruningCallback])
def test_fit__state_of_the_module(kind: Any) -> None:
    """At sparsity 0, everything that the module counts and collects is that of the dense run."""
    dense = fit(Stateful(), None)
    torch.manual_seed(0)
    pruned = fit(Stateful(), kind(sparsity=0.0, warmup_epochs=1))
    assert pruned.state() == dense.state()
    assert dense.count == 12


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"])
@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_fit__hooks_that_prepare(hook: str, warmup_epochs: int) -> None:
    """`training_step` may use what the module's own hooks prepare; they are called for scoring, on the replica."""
    calls = models.Record()

    def prepare(self: Any, *_: Any) -> None:
        self.weights = torch.tensor([1.0, 2.0, 1.0])
        self.number = getattr(self, "number", 0) + 1
        for optimizer in [self.optimizers()] if hook.startswith("on_train") else []:
            optimizer.param_groups[0]["lr"] *= 0.5  # of the optimizer that training has: once
        calls.append(self.number)

    def training_step(self: Any, batch: models.Batch, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1], weight=self.weights)

    kind = type("Hooked", (Fitted,), {hook: prepare, "training_step": training_step})
    callback = SNIPPruningCallback(sparsity=0.5, warmup_epochs=warmup_epochs, bn_batches=0)
    dense, pruned = (fit(kind(models.MLP(4, 5, 3)), each) for each in (None, callback))
    assert callback.pruned
    assert pruned.number == dense.number
    assert pruned.trainer.optimizers[0].param_groups[0]["lr"] == dense.trainer.optimizers[0].param_groups[0]["lr"]


def test_fit__trainer_of_the_replica() -> None:
    """What `training_step` does to its Trainer while it is scored, and what it logs, reaches nobody."""

    class Stopping(Fitted):
        def training_step(self, batch: models.Batch, batch_idx: int) -> Tensor:
            self.log("loss", 1.0)
            self.scored = self.trainer.lightning_module is self
            if batch_idx == 3 and self.trainer.current_epoch == 0:
                self.trainer.should_stop = True
            return super().training_step(batch, batch_idx)

    callback = SNIPPruningCallback(sparsity=0.5)
    module = Stopping(models.MLP(4, 5, 3))
    callback.method = SNIP(batches_per_round=4)
    fit(module, callback, max_epochs=2)
    assert module.scored
    assert module.trainer.current_epoch == 1  # stopped by training itself, after the first epoch


# --- ways in which a module refers to itself and keeps what it needs


class Kept(Fitted):
    """A network that comes with something that counts what it does."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        self.prepare()

    def prepare(self) -> None:
        pass

    def state(self) -> Any:
        return None


class ByWeakReference(Kept):
    def prepare(self) -> None:
        self.calls = 0
        self.net[2] = Child(weakref.ref(self))

    def state(self) -> Any:
        return self.calls


class ByProxy(ByWeakReference):
    def prepare(self) -> None:
        self.calls, proxy = 0, weakref.proxy(self)
        self.net[2] = Child(lambda: proxy)


class Child(nn.Linear):
    """A layer that knows its network."""

    def __init__(self, parent: Callable[[], Any]) -> None:
        super().__init__(8, 3)
        self.parent = parent

    def forward(self, x: Tensor) -> Tensor:
        self.parent().calls += 1
        return super().forward(x) + 0 * self.parent().net[0].bias.sum()


class ByWeakKey(Kept):
    def prepare(self) -> None:
        self.calls = weakref.WeakKeyDictionary(dict.fromkeys(self.net, 0))
        self.layers = weakref.WeakValueDictionary(dict(enumerate(self.net)))
        self.known = weakref.WeakSet(self.net)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(3):
            assert self.layers[index] in self.known
            self.calls[self.layers[index]] += 1
            x = self.layers[index](x)
        return x

    def state(self) -> Any:
        return list(self.calls.values())


class ByParameter(Kept):
    def prepare(self) -> None:
        self.by_id = {id(parameter): 0 for parameter in self.parameters()}
        self.by_parameter = collections.Counter(self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        for parameter in self.parameters():
            self.by_id[id(parameter)] += 1
            self.by_parameter[parameter] += 1
        return super().forward(x)

    def state(self) -> Any:
        return list(self.by_id.values()), list(self.by_parameter.values())


@dataclasses.dataclass
class State:
    hidden: Tensor | None = None
    count: int = 0
    lock: Any = dataclasses.field(default_factory=threading.Lock)


class InAnObject(Kept):
    """Its parts cannot be copied by `copy.deepcopy`: a lock, and tensors with a history."""

    def prepare(self) -> None:
        self.kept = State()

    def forward(self, x: Tensor) -> Tensor:
        self.kept.count += 1
        self.kept.hidden = self.net[0](x)
        return self.net[2](self.kept.hidden)

    def state(self) -> Any:
        return self.kept.count


class Pair(NamedTuple):
    hidden: Tensor | None
    counts: list[int]


class InContainers(Kept):
    def prepare(self) -> None:
        self.pair, self.last = Pair(None, []), collections.deque[Tensor](maxlen=99)
        self.groups = collections.defaultdict[str, list[Tensor]](list)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[0](x)
        self.pair = Pair(hidden, self.pair.counts)
        self.pair.counts.append(1)
        self.last.append(hidden)
        self.groups["hidden"].append(hidden)
        return self.net[2](hidden)

    def state(self) -> Any:
        return len(self.pair.counts), len(self.last), len(self.groups["hidden"])


class Extractor:
    def __init__(self, layer: nn.Module) -> None:
        self.seen: list[Tensor] = []
        self.handle = layer.register_forward_hook(lambda module, inputs, output: self.seen.append(output))


class ByHook(Kept):
    """The handle of a hook comes before the layer that has it."""

    def prepare(self) -> None:
        net = self._modules.pop("net")
        self.extractor, self.outputs = Extractor(net[0]), {}
        self.handle = net[2].register_forward_hook(lambda module, inputs, output: self.outputs.update(last=output))
        self.net = net

    def training_step(self, batch: models.Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + self.extractor.seen[-1].square().mean() + self.outputs["last"].square().mean()

    def state(self) -> Any:
        return len(self.extractor.seen)


class ByMethod(Kept):
    def prepare(self) -> None:
        self.losses: list[int] = []
        self.note = self.losses.append
        self.cached = functools.lru_cache(self.last_weight)

    def last_weight(self) -> list[Tensor]:
        return [self.net[2].weight]

    def forward(self, x: Tensor) -> Tensor:
        self.note(1)
        return nn.functional.linear(self.net[0](x), self.cached()[0])

    def state(self) -> Any:
        return self.losses


class Teacher(Kept):
    """Networks that nobody registered, with statistics of their own and an output that was kept."""

    def prepare(self) -> None:
        self.teachers = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))]

    def forward(self, x: Tensor) -> Tensor:
        self.teachers[0].last = self.teachers[0](x)
        return super().forward(x) - self.teachers[0].last

    def state(self) -> Any:
        return int(self.teachers[0][1].num_batches_tracked)


class Counting(torch.optim.SGD):
    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        self.count = 0


class OwnOptimizer(Kept):
    def prepare(self) -> None:
        self.optimizer = Counting(self.parameters(), 0.05)

    def forward(self, x: Tensor) -> Tensor:
        self.optimizer.count += len(self.optimizer.param_groups)
        return super().forward(x) + 0 * self.optimizer.param_groups[0]["params"][0].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer

    def state(self) -> Any:
        return self.optimizer.count


class Slotted(Kept):
    class Layer(nn.Linear):
        __slots__ = ("calls",)

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(1)
            return super().forward(x)

    def prepare(self) -> None:
        self.net[2] = self.Layer(8, 3)
        object.__setattr__(self.net[2], "calls", [])

    def state(self) -> Any:
        return self.net[2].calls


KEPT = [
    *(ByWeakReference, ByProxy, ByWeakKey, ByParameter, InAnObject, InContainers),
    *(ByHook, ByMethod, Teacher, OwnOptimizer, Slotted),
]


@pytest.mark.parametrize("warmup_epochs", [0, 1])
@pytest.mark.parametrize("kind", KEPT)
def test_fit__what_modules_keep(kind: Any, warmup_epochs: int) -> None:
    """At sparsity 0 the run is the dense one, however the module refers to itself and whatever it keeps."""
    dense = fit(kind(), None)
    torch.manual_seed(0)
    pruned = fit(kind(), SNIPPruningCallback(sparsity=0.0, warmup_epochs=warmup_epochs, bn_batches=0))
    assert pruned.state() == dense.state()
    assert pruned.state()
    for (name, found), expected in zip(pruned.state_dict().items(), dense.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize(
    "make",
    [
        lambda: (float(number) for number in range(99)),
        lambda: iter(DataLoader([1.0] * 99, batch_size=None)),
        lambda: zip(iter(DataLoader([1.0] * 99, batch_size=None))),
    ],
    ids=["generator", "loader", "zip"],
)
def test_fit__iterators_that_cannot_be_copied(make: Callable[[], Any]) -> None:
    """What scoring takes from them training would miss: an error, and only where it takes something."""

    class Taking(Fitted):
        def training_step(self, batch: models.Batch, batch_idx: int) -> Tensor:
            self.taken.append(next(self.noise))
            return super().training_step(batch, batch_idx)

    module = Taking(models.MLP(4, 5, 3))
    module.noise, module.taken = make(), []
    with pytest.raises(ValueError, match="takes from an iterator that the module keeps"):
        fit(module, SNIPPruningCallback(sparsity=0.5))
    assert module.taken == []
    fit(module, SNIPPruningCallback(sparsity=0.5, loss_fn=models.loss_fn))
    assert len(module.taken) == 12


# --- what a replica is


def test_replica__functions_and_hooks() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    seen: list[int] = []
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(id(module)))
    net.method, net.function, net.seen = net[1].forward, lambda x: net[0](x), seen
    replica = Replica(net, clone)
    twin = replica.module
    twin.function(torch.ones(1, 2))
    assert (seen, twin.seen) == ([], [id(twin[0])])
    assert twin.method.__self__ is twin[1]
    assert replica.of(net[0].forward).__self__ is twin[0]
    kept: list[int] = []
    replica.of(lambda module: kept.append(1))(None)  # a function that does not hold the module is what it was
    assert kept == [1]


def test_replica__what_functions_hold() -> None:
    """In a closure, a default or a keyword's default, itself or by a method or another function."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layer = net[0]

    def by_closure(x: Tensor) -> Tensor:
        return layer(x)

    def by_default(x: Tensor, held: Any = layer.forward) -> Tensor:
        return held(x)

    def by_keyword(x: Tensor, *, held: Any = by_closure) -> Tensor:
        return held(x)

    functions = (by_closure, by_default, by_keyword)
    net.functions = list(functions)
    replica = Replica(net, clone)
    for function in (*replica.module.functions, *map(replica.of, functions)):
        function(torch.ones(1, 2)).sum().backward()
        assert layer.weight.grad is None, function.__name__
        assert replica.module[0].weight.grad is not None
        replica.module[0].weight.grad = None


def test_replica__what_cannot_be_copied_is_shared() -> None:
    net = nn.Linear(2, 2)
    net.lock, net.pair = threading.Lock(), (threading.Lock(), [1])
    net.token = token = object()
    twin = Replica(net, clone).module
    assert twin.lock is net.lock
    assert twin.token is token
    twin.pair[1].append(2)
    assert net.pair[1] == [1]


def test_replica__long_lists() -> None:
    """Records of a replay buffer are shared, but not the list, nor parts of the module, nor what may change."""
    net = nn.BatchNorm1d(2)
    net.replay = collections.deque((torch.zeros(2), number) for number in range(2000))
    net.named = [(name, value) for name, value in net.named_buffers()] * 1000
    net.lists = [[number] for number in range(2000)]
    twin = Replica(net, clone).module
    twin.replay.append(1)
    assert len(net.replay) == 2000
    assert twin.replay[5] is net.replay[5]
    assert twin.named[0][1] is twin.running_mean
    assert twin.lists[5] is not net.lists[5]


def test_replica__gradient_hooks() -> None:
    """Hooks of the user's on gradients act on those of the replica."""
    net = nn.Linear(2, 1, bias=False)
    net.weight.register_hook(lambda gradient: 3 * gradient)
    twin = Replica(net, lambda name, value: nn.Parameter(value.detach().clone())).module
    twin(torch.ones(1, 2)).sum().backward()
    assert twin.weight.grad.tolist() == [[3.0, 3.0]]
    assert net.weight.grad is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 3)),
        lambda: nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3)),
        lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))),
        lambda: models.Attention(),
    ],
    ids=["script", "compiled", "weight_norm", "spectral_norm", "traced", "attention"],
)
def test_replica__computes_the_same(build: Callable[[], nn.Module]) -> None:
    net = build().eval()
    x = torch.randn(5, 16 if isinstance(net, models.Attention) else 4)
    twin = Replica(net, clone).module
    assert torch.equal(twin(x), net(x))
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in net.named_parameters()]
    twin(x).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert any(parameter.grad is not None for parameter in twin.parameters())
