"""A compacted module returns what the masked one does, without what cannot matter, and the masked one is left alone."""

import re
import sys
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fits
import pytest
import torch
import torch.nn.functional as F
from compacted import IMAGES, assert_same, built, count, difference, numbers, on_paths, sizes, sparse
from models import MLP, ConvNet, ResidualNet, changes, fingerprint, randomised
from torch import Tensor, nn

from lightning_drive import compact, load_sparse, save_sparse
from lightning_drive.core import containers
from lightning_drive.network import paths


class Dense(nn.Module):
    """Two blocks that are concatenated to what they were given, then BatchNorm, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
                nn.Conv2d(8, 5, 3, padding=1, bias=False),
            )
            for width in (6, 11)
        )
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.cat([x, block(x)], 1)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class Excited(nn.Module):
    """Channels are scaled by what a small network makes of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Linear(12, 6), nn.Linear(6, 12)
        self.last = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.conv(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1).flatten(1)))))
        x = x * gate.view(*gate.shape, 1, 1)
        return self.head((x + self.last(x)).amax((-1, -2)))


class FeedForward(nn.Module):
    """The part of a transformer without attention, on tokens: what is between its layers can go."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.inner, self.outer = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(len(x), 8, 16)
        return tokens + self.outer(F.gelu(self.inner(self.norm(tokens))))


def mobile() -> nn.Sequential:
    """Depthwise convolutions, PReLU, pooling and flattening."""
    return nn.Sequential(
        *(nn.Conv2d(2, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU6(inplace=True)),
        *(nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False), nn.BatchNorm2d(10), nn.Hardswish()),
        *(nn.Conv2d(10, 9, 1), nn.BatchNorm2d(9, affine=False), nn.PReLU(9), nn.AvgPool2d(2)),
        *(nn.Dropout(0.5), nn.Flatten(), nn.Linear(9 * 16, 10), nn.Tanh(), nn.Linear(10, 3)),
    )


def mixed() -> nn.Sequential:
    """Convolutions with all kinds of borders, and activations that are not 0 at 0."""
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(8, 9, 3, padding=2), nn.Softplus()),
        *(nn.Conv2d(9, 8, 3, padding=1, padding_mode="circular"), nn.ELU(), nn.Conv2d(8, 9, 3, padding="same")),
        *(nn.GELU(), nn.ConvTranspose2d(9, 8, 2, stride=2, padding=1), nn.Sigmoid(), nn.Conv2d(8, 6, 1, stride=2)),
        *(nn.LeakyReLU(), nn.Flatten(), nn.LazyLinear(3)),
    )


def lines() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv1d(2, 9, 3, padding=1), nn.BatchNorm1d(9), nn.ReLU(), nn.Conv1d(9, 8, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(8 * 6, 3),
    )


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: MLP(6, 12, 12, 3), (6,)),
    "conv": (ConvNet, IMAGES),
    "residual": (ResidualNet, IMAGES),
    "dense": (Dense, IMAGES),
    "excited": (Excited, IMAGES),
    "mobile": (mobile, IMAGES),
    "mixed": (mixed, IMAGES),
    "lines": (lines, (2, 8)),
    "feed_forward": (FeedForward, IMAGES),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_compact__same_outputs(kind: str, seed: int) -> None:
    make, shape = KINDS[kind]
    given = sparse(built(make, shape), density=0.5, seed=seed)
    small = compact(given, numbers(2, *shape, seed=seed))
    assert_same(given, small, shape)
    assert type(small) is type(given)
    assert [name for name, _ in small.named_modules()] == [name for name, _ in given.named_modules()]
    if kind not in ("conv", "residual"):  # they are so narrow that there may be nothing to remove
        assert count(small) < count(given)
    assert sizes(compact(small, numbers(2, *shape))) == sizes(small)  # nothing more can go


@pytest.mark.parametrize("seed", range(4))
def test_compact__leaves_what_is_on_paths(seed: int) -> None:
    """In a plain network exactly the neurons on paths are left, however long a chain of consequences is."""
    given = randomised(MLP(6, 20, 20, 20, 20, 3), seed)
    with torch.no_grad():
        for weight in (weight for weight in given.parameters() if weight.ndim > 1):
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.1)
    left = on_paths([weight for weight in given.parameters() if weight.ndim > 1])
    assert all(0 < each < 20 for each in left)
    small = compact(given, numbers(2, 6))
    assert [rows for rows, _ in sizes(small)] == [*left, 3]
    assert_same(given, small, (6,))


def test_compact__agrees_with_effective_sparsity() -> None:
    """Where constants can be folded, a convolutional network keeps exactly the channels that paths lead through."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((2, 12), (12, 12), (12, 12)):
        layers += [nn.Conv2d(inputs, outputs, 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    given = sparse(nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 25, 3)), density=0.15)
    given[-1].weight.data[:, 50:] = 0  # all but the first two channels
    weights = {name: weight for name, weight in given.named_parameters() if weight.ndim > 1}
    masks = paths.active_masks(
        given.eval(), {name: weight != 0 for name, weight in weights.items()}, numbers(1, *IMAGES)
    )
    expected = [int(mask.flatten(1).any(1).sum()) for mask in masks.values()]
    assert all(0 < each < 12 for each in expected[:-1])
    assert [rows for rows, _ in sizes(compact(given, numbers(2, *IMAGES)))] == expected


def test_compact__wholly_cut_off() -> None:
    """One channel of each layer is left where nothing gets through, and the output is the constant it was."""
    given = randomised(MLP(6, 8, 8, 3))
    with torch.no_grad():
        given[2].weight.zero_()
    small = compact(given, numbers(2, 6))
    assert sizes(small) == [(1, 6), (1, 1), (3, 1)]
    assert_same(given, small, (6,))


def test_compact__ends_stay() -> None:
    """Outputs that are all zero, an output that others are made of, and inputs that nobody reads keep their shapes."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.first(x)
            return {"hidden": hidden, "logits": self.second(hidden), "best": self.second(hidden).argmax(1)}

    given = Two()
    with torch.no_grad():
        given.first.weight[:, 0] = 0
        given.second.weight[:, 1:3] = 0
        given.second.weight[1] = 0
    small = compact(given, numbers(2, 4))
    assert sizes(small) == sizes(given)


def test_compact__leaves_no_trace() -> None:
    given = sparse(ConvNet(), density=0.6).train()
    given.norm1.eval()  # type: ignore[union-attr, operator]
    given.conv2.weight.requires_grad = False  # type: ignore[union-attr]
    calls: list[str] = []
    given.fc.register_forward_hook(lambda *_: calls.append("hook"))  # type: ignore[union-attr, operator]
    given(numbers(2, *IMAGES)).sum().backward()
    before, hooks = fingerprint(given), dict(given.fc._forward_hooks)  # type: ignore[union-attr, arg-type]
    example = numbers(2, *IMAGES).requires_grad_()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        small = compact(given, example)
    assert changes(given, before) == []
    assert given.fc._forward_hooks == hooks  # type: ignore[union-attr]
    assert example.grad is None
    assert [each.training for each in small.modules()] == [each.training for each in given.modules()]
    assert not small.conv2.weight.requires_grad  # type: ignore[union-attr]
    assert all(each.grad is None for each in small.parameters())
    assert {id(each) for each in small.parameters()}.isdisjoint(map(id, given.parameters()))
    assert {each.data_ptr() for each in small.parameters()}.isdisjoint(each.data_ptr() for each in given.parameters())
    small.train()(numbers(2, *IMAGES)).sum().backward()  # it can be trained on
    assert changes(given, before) == ["torch"]  # of its Dropout


class Words(nn.Module):
    """Token ids and their weights, in one bag, then two layers; the embedding itself stays."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(9, 5), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor, weights: Tensor | None = None, scale: float = 1.0) -> Tensor:
        vectors = self.embedding(tokens)
        vectors = vectors if weights is None else vectors * weights[..., None]
        return self.last(F.relu(self.first(scale * vectors.mean(1))))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(torch.tensor([[1, 2, 8]]), id="tensor"),
        pytest.param((torch.tensor([[1, 2, 8]]), torch.ones(1, 3)), id="tuple"),
        pytest.param({"tokens": torch.tensor([[1, 2, 8]]), "scale": 2.0}, id="dict"),
    ],
)
def test_compact__kinds_of_input(given: Any) -> None:
    module = sparse(Words(), density=0.6)
    module.embedding.weight.data = numbers(9, 5)  # type: ignore[union-attr]
    small = compact(module, given)
    assert len(small.first.weight) < 8  # type: ignore[union-attr, arg-type]
    assert len(small.embedding.weight[0]) == 5  # type: ignore[union-attr, index]
    assert difference(module, small, torch.tensor([[3, 4], [5, 6]])) < 1e-6


def test_compact__lightning(tmp_path: Path) -> None:
    """After a fit, with its Trainer still attached: that stays where it is, and the copy is small, plain and usable."""
    module = fits.ConvModule()
    callback = fits.drive(sparsity=0.93)
    trainer = fits.trainer(tmp_path, callback)
    trainer.fit(module, fits.loader())
    before = fits.state_of(module)
    small = compact(module, numbers(2, 1, 8, 8))
    assert isinstance(small, fits.ConvModule)
    assert module.trainer is trainer
    assert small._trainer is None
    assert fits.equal_states(fits.state_of(module), before)
    assert count(small) < count(module)
    assert_same(module, small, (1, 8, 8))

    weights = {name: weight for name, weight in small.named_parameters() if name in callback.masks}
    assert sum(int((weight == 0).sum()) for weight in weights.values()) > 0
    save_sparse(small, tmp_path / "small.safetensors")
    save_sparse(module, tmp_path / "masked.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < (tmp_path / "masked.safetensors").stat().st_size
    assert fits.equal_states(load_sparse(tmp_path / "small.safetensors"), fits.state_of(small))
    torch.save(small, tmp_path / "small.pt")
    assert_same(module, torch.load(tmp_path / "small.pt", weights_only=False), (1, 8, 8))

    again = fits.trainer(tmp_path, max_epochs=1)
    again.fit(small, fits.loader())  # it trains on
    assert small.trainer is again


def test_compact__sparse_file(tmp_path: Path) -> None:
    """Weights within what is left stay zero, and are stored as bits."""
    given = sparse(MLP(60, 120, 120, 3), density=0.1)
    small = compact(given, numbers(2, 60))
    assert count(small) < count(given)
    kept = sum(int(weight.count_nonzero()) for weight in small.parameters() if weight.ndim > 1)
    assert kept <= sum(int(weight.count_nonzero()) for weight in given.parameters() if weight.ndim > 1)
    save_sparse(small, tmp_path / "small.safetensors")
    dense = sum(value.nbytes for value in small.state_dict().values())
    assert (tmp_path / "small.safetensors").stat().st_size < dense
    assert fits.equal_states(load_sparse(tmp_path / "small.safetensors"), fits.state_of(small))


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the page on this shows runs, and makes a network smaller."""
    page = Path(__file__).parents[2] / "docs" / "compact.md"
    [block] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block, found)
    before, after = map(int, capsys.readouterr().out.split())
    assert before > 2 * after
    assert_same(found["net"], found["small"], (3, 32, 32))


class Branches(nn.Module):
    """Runs one of two layers, as the input has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.one if x.sum() > -1e9 else self.other)(self.first(x))


class Silent(MLP):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Noisy(MLP):
    """Draws other numbers in every call."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class Uncopied(MLP):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.lock = sys.stdout

    def __deepcopy__(self, memo: Mapping[int, Any]) -> "Uncopied":
        raise TypeError("no copies of me.")


def infinite() -> nn.Module:
    module = MLP(4, 3)
    module[0].bias.data.fill_(float("inf"))
    return module


class Coded(Tensor):
    """Has no numbers of its own, as a quantised weight."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "Coded":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)  # type: ignore[attr-defined, no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.detach.default
        return cls(args[0])


def coded() -> nn.Module:
    module = MLP(4, 3, 2)
    module.get_submodule("2").weight = nn.Parameter(Coded(torch.zeros(2, 3)), requires_grad=False)
    return module


ERRORS: list[Any] = [
    pytest.param(coded, TypeError, r"'2.weight' is a Coded of torch.float32.*before its weights", id="coded"),
    pytest.param(lambda: "net", TypeError, r"`module` must be a torch module, got str", id="no_module"),
    pytest.param(lambda: torch.compile(MLP(4, 3)), TypeError, r"`module` is compiled.*`_orig_mod`", id="compiled"),
    pytest.param(
        lambda: nn.Sequential(torch.compile(MLP(4, 3))), TypeError, r"`module.0` is compiled", id="compiled_inside"
    ),
    pytest.param(lambda: nn.DataParallel(MLP(4, 3)), TypeError, r"wrapped for several devices.*`module`", id="wrapped"),
    pytest.param(lambda: nn.Sequential(nn.LazyLinear(3)), ValueError, r"'0.weight' has no shape yet", id="lazy"),
    pytest.param(lambda: MLP(4, 3).to("meta"), ValueError, r"'0.weight' is on the meta device", id="meta"),
    pytest.param(nn.ReLU, ValueError, r"must have parameters, and has none", id="no_parameters"),
    pytest.param(Branches, ValueError, r"take part.*'other.weight', 'other.bias' did not", id="part_did_not_run"),
    pytest.param(Silent, ValueError, r"returned nothing with a gradient", id="no_gradient"),
    pytest.param(Noisy, ValueError, r"must be the same for the same input", id="random"),
    pytest.param(Uncopied, ValueError, r"`copy.deepcopy` can copy, and is not: no copies of me\.", id="not_copied"),
    pytest.param(infinite, ValueError, r"must be finite", id="infinite"),
]


@pytest.mark.parametrize(("make", "error", "message"), ERRORS)
def test_compact__error(make: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    module = make() if make is not Silent else Silent(4, 3)
    with pytest.raises(error, match=message):
        compact(module, numbers(2, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_compact__scripted() -> None:
    scripted = torch.jit.script(nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"`module` is scripted"):
        compact(scripted, numbers(2, 4))


def test_compact__sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_drive.core.shards.is_sharded", lambda tensor: tensor.ndim == 2)
    with pytest.raises(ValueError, match=r"'0.weight' is split over ranks"):
        compact(MLP(4, 3), numbers(2, 4))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        pytest.param(None, r"`example_input` must hold a tensor, got NoneType", id="none"),
        pytest.param(torch.ones(2, 4, device="meta"), r"on the module's device, cpu, got meta", id="other_device"),
    ],
)
def test_compact__input_error(example: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compact(MLP(4, 3), example)


def test_compact__error_of_forward() -> None:
    """An example that the module does not take gives the module's own error."""
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied"):
        compact(MLP(4, 3), numbers(2, 5))


@dataclass
class Output:
    """As networks of other libraries return it."""

    logits: Tensor


class Named(NamedTuple):
    logits: Tensor


@pytest.mark.parametrize(
    "kind",
    [Output, Named, lambda y: UserDict(logits=y), lambda y: {"logits": [y]}],
    ids=["dataclass", "namedtuple", "mapping", "nested"],
)
@pytest.mark.parametrize(
    "container", [lambda x: x, lambda x: {"x": x}, lambda x: UserDict(x=x)], ids=["x", "dict", "map"]
)
def test_compact__containers(kind: Callable[[Tensor], Any], container: Callable[[Tensor], Any]) -> None:
    """Tensors are found in all containers that batches may be, so outputs are compared, and are equal."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Any:
            return kind(self.net(x))

    torch.manual_seed(0)
    module, x = Wrapped(), torch.randn(2, 4)
    with torch.no_grad():
        module.net[0].weight[::2] = 0
        module.net[0].bias[::2] = 0
    small = compact(module, container(x))
    assert small.net[0].out_features == 4
    (found,), (expected,) = containers.leaves(small(x)), containers.leaves(module(x))
    assert type(small(x)) is type(module(x))
    torch.testing.assert_close(found, expected)
