"""What has no gradient is left out and named; factors near 0 and low-rank pairs are named where they do harm."""

import ast
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import models
import pytest
import torch
import torch.nn.functional as F
from fits import ConvModule
from torch import Tensor, nn

from lightning_drive import DRIVE, SNIP, Magnitude, Masks, SynFlow, SynFlowPruningCallback, find_masks
from lightning_drive.search import vanishing_scores


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def warned(module: nn.Module, method: Any, **settings: Any) -> tuple[Masks, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masks = find_masks(module, method, **settings)
    return masks, [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("names", "others", "expected"),
    [
        (["a.0.w", "a.1.w"], ["b.w"], ["a.*"]),
        (["a.0.w"], ["b.w"], ["a.0.w"]),
        (["a.b.0.w", "a.b.1.w"], ["a.c.w"], ["a.b.*"]),
        (["w", "a.w", "a.v"], ["b.w"], ["w", "a.*"]),
        (["a.w", "a.v"], ["ab.w"], ["a.*"]),
    ],
)
def test_patterns(names: list[str], others: list[str], expected: list[str]) -> None:
    assert vanishing_scores.patterns(names, [*others, *names]) == expected


# --- parameters without a gradient


class Distilled(nn.Module):
    """A student, and a teacher that is trainable by name but never by the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = models.MLP(4, 6, 3), models.MLP(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return self.student(x) + 0 * target


class Detached(nn.Module):
    """An auxiliary head that is run, and whose output goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.head = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.body(x))
        return self.head(hidden) + self.aux(hidden).detach()


class Experts(nn.Module):
    """Two experts, the second of which no input is given to, and a convolution for another task."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([models.MLP(4, 6, 3), models.MLP(4, 6, 3)])
        self.conv = nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


UNREACHED: list[tuple[Callable[[], nn.Module], list[str]]] = [
    (Distilled, ["teacher.*"]),
    (Detached, ["aux.weight"]),
    (Experts, ["experts.1.*", "conv.weight"]),
]
EACH_UNREACHED = pytest.mark.parametrize(("make", "patterns"), UNREACHED, ids=["teacher", "detached", "experts"])


@EACH_UNREACHED
@pytest.mark.parametrize("container", [list, iter], ids=["list", "iterator"])
@pytest.mark.parametrize("method", [DRIVE(rounds=4), SNIP(), SynFlow(rounds=4)], ids=["drive", "snip", "synflow"])
def test_unreached(make: Callable[[], nn.Module], patterns: list[str], method: Any, container: Any) -> None:
    """They are left out as if they had been excluded, in one text, which says what to write."""
    module = models.randomised(make())
    settings: Any = {"sparsity": 0.6, "loss_fn": models.loss_fn}
    batches = models.make_batches(4, count=6)
    masks, texts = warned(module, method, batches=container(batches), **settings)
    expected, silence = warned(module, method, batches=batches, exclude=patterns, **settings)
    assert masks == expected
    assert silence == []
    assert len(texts) == 1
    assert "had no gradient in any round" in texts[0]
    assert f"`exclude={patterns}`" in texts[0]


@EACH_UNREACHED
def test_unreached__without_gradients(make: Callable[[], nn.Module], patterns: list[str]) -> None:
    """Magnitude asks for none: nothing is left out."""
    masks, texts = warned(make(), Magnitude(), sparsity=0.5)
    assert any(name.startswith(patterns[0].rstrip("*")) for name in masks)
    assert texts == []


def test_unreached__starting_masks() -> None:
    """Masks to start from may have them, or not if they are excluded; the error says so."""
    module, batches = models.randomised(Distilled()), models.make_batches(4, count=6)
    settings: Any = {"batches": batches, "loss_fn": models.loss_fn}
    start, _ = warned(module, Magnitude(), sparsity=0.3)
    masks, _ = warned(module, DRIVE(rounds=2), sparsity=0.6, masks=start, **settings)
    assert not any("teacher" in name for name in masks)
    with pytest.raises(ValueError, match=r"'?teacher.0.weight.* What an earlier search left out.* goes in `exclude`"):
        find_masks(module, DRIVE(rounds=2), sparsity=0.8, masks=masks, **settings)
    again, texts = warned(module, DRIVE(rounds=2), sparsity=0.8, masks=masks, exclude=["teacher.*"], **settings)
    assert again.num_prunable == masks.num_prunable
    assert texts == []


def test_unreached__in_some_rounds_only() -> None:
    """What any batch reaches is pruned with the rest."""

    def loss_fn(module: Any, batch: models.Batch) -> Tensor:
        expert = module.experts[next(turn) % 2]
        return F.cross_entropy(expert(batch[0]), batch[1])

    turn: Iterator[int] = iter(range(100))
    masks, _ = warned(
        models.randomised(Experts()),
        DRIVE(rounds=4, batches_per_round=2),
        sparsity=0.5,
        batches=models.make_batches(4),
        loss_fn=loss_fn,
        exclude=["conv.*"],
    )
    assert {name.split(".")[1] for name in masks} == {"0", "1"}


def test_unreached__all_is_an_error() -> None:
    module = models.randomised(models.MLP(4, 6, 3))
    with pytest.raises(ValueError, match=r"does not depend on any prunable parameter .* a whole pass"):
        find_masks(
            module,
            SNIP(),
            sparsity=0.5,
            batches=models.make_batches(4),
            loss_fn=lambda module, batch: module[0].bias.sum(),
        )


class WithTarget(ConvModule):
    """Has a copy that computes targets."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.target(batch[0])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("synflow", [False, True], ids=["drive", "synflow"])
def test_unreached__callback(tmp_path: Path, synflow: bool) -> None:
    """The masks are those with `exclude`, and a resume goes on with them without a word."""

    def make(**settings: Any) -> Any:
        if synflow:
            return SynFlowPruningCallback(sparsity=0.6, warmup_epochs=1, rounds=3, **settings)
        return fits.drive(sparsity=0.6, warmup_epochs=1, rounds=5, **settings)

    def fit(callback: Any, epochs: int, ckpt: Any = None) -> tuple[pl.Trainer, list[str]]:
        trainer = fits.trainer(tmp_path, callback, max_epochs=epochs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(WithTarget(), fits.loader(), ckpt_path=ckpt)
        return trainer, [str(each.message) for each in caught]

    callback, excluding = make(), make(exclude=["target.*"])
    trainer, texts = fit(callback, 2)
    fit(excluding, 2)
    assert callback.masks == excluding.masks
    assert sum("had no gradient in any round" in text for text in texts) == 1
    assert any("`exclude=['target.*']`" in text for text in callback.report.warnings)
    trainer.save_checkpoint(tmp_path / "sparse.ckpt")
    for again in (make(), make(exclude=["target.*"])):
        _, texts = fit(again, 3, tmp_path / "sparse.ckpt")
        assert again.masks == callback.masks
        assert not [text for text in texts if "checkpoint was pruned" in text or "no gradient" in text]


# --- factors that begin near 0


class LayerScale(nn.Module):
    """A vector, seen through a view, as ConvNeXt has it."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.ls1 = nn.ParameterDict({"gamma": nn.Parameter(torch.full((width,), init))})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x).mul(self.ls1["gamma"].reshape(1, -1))


class ReZero(nn.Module):
    """A scalar."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.alpha = nn.Parameter(torch.tensor(init))
        self.token = nn.Parameter(torch.zeros(1, 1, width))  # added, no factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x + self.token[0], self.alpha, self.net(x))


class NormScale(nn.Module):
    """The scale of a norm that is not one of torch's."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.net, self.mix = nn.Linear(width, width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.layer_norm(self.net(x), x.shape[-1:]) * self.scale)


def stack(block: Callable[[int, float], nn.Module], init: float) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 12), block(12, init), nn.Linear(12, 12), block(12, init), nn.Linear(12, 3))


@pytest.mark.parametrize("init", [0.0, 1e-6, 1e-4])
@pytest.mark.parametrize(
    ("block", "named"),
    [(LayerScale, "'1.ls1.gamma', '3.ls1.gamma'"), (ReZero, "'1.alpha', '3.alpha'"), (NormScale, "'1.scale'")],
)
@pytest.mark.parametrize("method", [SNIP(), DRIVE(rounds=20)], ids=["snip", "drive"])
def test_factors(block: Callable[[int, float], nn.Module], named: str, init: float, method: Any) -> None:
    settings: Any = {"sparsity": 0.9, "batches": models.make_batches(4, count=5), "loss_fn": models.loss_fn}
    masks, texts = warned(stack(block, init), method, **settings)
    lost = {name.split(".")[0] for name, mask in masks.items() if not mask.any()}
    assert lost & {"1", "3"}
    (text,) = [text for text in texts if "multiply a branch of the network" in text]
    assert text.startswith(named)
    assert "token" not in text
    assert f"by {f'at most {init:g}' if init else '0'}," in text
    assert "exclude=[" in text
    assert not any("More rounds" in text for text in texts if text.startswith("Layer collapse"))
    assert "multiply a branch" not in " ".join(warned(stack(block, 1.0), method, **settings)[1])


class ZeroLast(nn.Module):
    """A branch whose last layer is 0."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        with torch.no_grad():
            self.net[2].weight.mul_(init)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("block", [LayerScale, ReZero, NormScale, ZeroLast])
@pytest.mark.parametrize("method", [SNIP(), SNIP(rounds=20), DRIVE(rounds=20)], ids=["one", "rounds", "drive"])
def test_factors__exclude_keeps_the_branches(block: Callable[[int, float], nn.Module], method: Any) -> None:
    """All of their weights are named, and none of the others, so that none goes in the place of another."""
    settings: Any = {"sparsity": 0.9, "batches": models.make_batches(4, count=5), "loss_fn": models.loss_fn}
    text = next(text for text in warned(stack(block, 0.0), method, **settings)[1] if "exclude=" in text)
    exclude = ast.literal_eval(text.partition("exclude=")[2].rpartition("`")[0])
    assert exclude == ["1.*", "3.*"]
    masks, texts = warned(stack(block, 0.0), method, **settings, exclude=exclude)
    assert list(masks) == ["0.weight", "2.weight", "4.weight"]
    assert not any("exclude=" in text for text in texts)


def test_factors__synflow() -> None:
    texts = warned(stack(ReZero, 1e-6), SynFlow(rounds=20), sparsity=0.9, example_input=torch.ones(1, 4))[1]
    assert any(text.startswith("'1.alpha', '3.alpha' multiply") for text in texts)


def test_factors__other_causes() -> None:
    """A collapse that no factor explains keeps its advice, whatever small vectors there are."""
    module = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3))
    module.shift = nn.Parameter(torch.zeros(6))
    with torch.no_grad():
        module[2].weight.mul_(0.02)
    settings: Any = {"sparsity": 0.8, "batches": models.make_batches(4), "loss_fn": models.loss_fn}
    texts = warned(module, SNIP(), **settings)[1]
    assert texts[0].startswith("Layer collapse: no weight is left in ")
    assert "More rounds" in texts[0]
    assert not any("multiply" in text for text in texts)


class ZeroConv(nn.Module):
    """A branch whose last layer is 0, as in ControlNet, Fixup and adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 3)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.last(F.relu(self.first(x))))


def test_factors__zero_weights() -> None:
    settings: Any = {"sparsity": 0.85, "batches": models.make_batches(4), "loss_fn": models.loss_fn}
    texts = warned(ZeroConv(), SNIP(), **settings)[1]
    (text,) = [text for text in texts if "'last.weight' are 0 throughout before pruning" in text]
    assert "exclude=['first.weight', 'last.weight']" in text
    assert not any("More rounds" in text for text in texts)


def test_factors__callback(tmp_path: Path) -> None:
    class Scaled(ConvModule):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.layer_scale = nn.Conv2d(1, 1, 3, padding=1), nn.Parameter(torch.full((1,), 1e-6))

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images + self.layer_scale * self.block(images))

    callback = fits.drive(sparsity=0.9, warmup_epochs=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fits.trainer(tmp_path, callback, max_epochs=1).fit(Scaled(), fits.loader())
    assert any(text.startswith("'layer_scale' multiply a branch") for text in callback.report.warnings)


# --- low-rank adapters


class Peft(nn.Module):
    """Two layers within each other, with the names that peft gives."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x) + self.lora_B["default"](self.lora_A["default"](x)))


class Loralib(nn.Module):
    """Raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.q = nn.ParameterDict({"lora_A": torch.randn(2, 8), "lora_B": torch.zeros(8, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + x @ self.q["lora_A"].T @ self.q["lora_B"].T)


class Lowercase(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.lora_a, self.lora_b = nn.Linear(8, 3), nn.Linear(8, 2), nn.Linear(2, 3)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.lora_b(self.lora_a(x))


class Kohya(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.lora = nn.Linear(8, 3), nn.ModuleDict({"down": nn.Linear(8, 2), "up": nn.Linear(2, 3)})
        nn.init.zeros_(self.lora["up"].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.lora["up"](self.lora["down"](x))


@pytest.mark.parametrize("method", [SNIP(), Magnitude()], ids=["snip", "magnitude"])
@pytest.mark.parametrize(
    ("module", "include"),
    [(Peft, None), (Loralib, ["head.weight", "q.*"]), (Lowercase, None), (Kohya, None)],
    ids=["peft", "loralib", "lowercase", "kohya"],
)
def test_low_rank(module: Callable[[], nn.Module], include: list[str] | None, method: Any) -> None:
    settings: Any = {"sparsity": 0.5, "batches": models.make_batches(8), "loss_fn": models.loss_fn, "include": include}
    texts = warned(module(), method, **settings)[1]
    (text,) = [text for text in texts if text.startswith("Low-rank adapters: one factor of ")]
    assert "`exclude=['*lora*']`" in text
    texts = warned(module(), method, **{**settings, "exclude": ["*lora*"]})[1]
    assert not any("Low-rank" in text for text in texts)


def test_low_rank__trained() -> None:
    """Where both factors are there before and after, there is nothing to say."""
    module = models.randomised(Peft())
    assert warned(module, Magnitude(), sparsity=0.1)[1] == []


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, of which one factor starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))  # type: ignore[no-any-return]


def zero_head(width: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
    nn.init.zeros_(net[-1].weight)
    return net


@pytest.mark.parametrize("method", [SNIP(), DRIVE(rounds=3)], ids=["snip", "drive"])
@pytest.mark.parametrize(
    ("module", "named"),
    [
        (zero_head(5), r"The weights of '2\.weight' are 0 throughout"),
        (zero_head(9), r"The weights of '2\.weight' are 0 throughout"),
        (Adapted(), r"'lora_B\.weight' are 0 throughout.*Low-rank adapters.*exclude=\['\*lora\*'\]"),
    ],
    ids=["head", "wide", "lora"],
)
def test_every_score_is_zero(module: nn.Module, named: str, method: Any) -> None:
    """The error names what starts at 0, and the adapters that it is a factor of."""
    batch = torch.randn(8, 4), torch.randint(3, (8,))
    with pytest.raises(ValueError, match=f"Every score is zero.*{named}"):
        find_masks(module, method, sparsity=0.5, batches=[batch], loss_fn=models.loss_fn)


class PerHead(ReZero):
    """A factor of two dimensions."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__(width, init)
        self.alpha = nn.Parameter(torch.full((2, width // 2), init))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha.flatten() * self.net(x)


class Depthwise(ReZero):
    """The factor is a depthwise convolution, prunable itself."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__(width, init)
        del self.alpha
        self.alpha = nn.Conv1d(width, width, 1, groups=width, bias=False)
        nn.init.constant_(self.alpha.weight, init)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha(self.net(x)[..., None])[..., 0]


class SmallLast(ReZero):
    """The last layer of a branch begins with tiny weights, or had zeros that a short warm-up has moved."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__(width, 1.0)
        if init != 1:
            nn.init.uniform_(self.net[2].weight, -init, init)


@pytest.mark.parametrize(
    ("block", "named"), [(PerHead, "'1.alpha'"), (Depthwise, "'1.alpha.weight'"), (SmallLast, "'1.net.2.weight'")]
)
@pytest.mark.parametrize("init", [1e-6, 1e-4])
@pytest.mark.parametrize("method", [SNIP(), DRIVE(rounds=20)], ids=["snip", "drive"])
def test_factors__of_other_shapes(
    block: Callable[[int, float], nn.Module], named: str, init: float, method: Any
) -> None:
    settings: Any = {"sparsity": 0.9, "batches": models.make_batches(4, count=5), "loss_fn": models.loss_fn}
    texts = warned(stack(block, init), method, **settings)[1]
    (text,) = [text for text in texts if "score that much lower than others" in text]
    assert named in text.partition(" are at most ")[0].partition(" multiply ")[0]
    assert not any("More rounds" in text for text in texts)
    assert not any("much lower" in text for text in warned(stack(block, 1.0), method, **settings)[1])


def test_factors__wide_layers_are_not_tiny() -> None:
    """Their weights are small, and should be: they are not what makes another layer collapse."""
    module = nn.Sequential(nn.Linear(4, 150_000), nn.ReLU(), nn.Linear(150_000, 3))
    settings: Any = {"sparsity": 0.9999, "batches": models.make_batches(4), "loss_fn": models.loss_fn}
    assert not any("before pruning" in text for text in warned(module, SNIP(), **settings)[1])


class TermOfZero(nn.Module):
    """Only `main` moves the loss."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.main, self.head, self.how = nn.Linear(4, 6), nn.Linear(6, 3), how
        self.other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6))
        nn.init.constant_(self.other[0].bias, -100.0 if how == "dead" else 0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "dead":
            return self.head(self.main(x)) + self.other[2].bias.sum() + 0 * x.sum() + self.other(x).sum() * 1
        return self.head(self.main(x) + (0.0 if self.how == "times 0" else torch.zeros(6)) * self.other(x))


@pytest.mark.parametrize("how", ["times 0", "gate of zeros", "dead"])
@pytest.mark.parametrize("method", [SNIP(), DRIVE(rounds=5)], ids=["snip", "drive"])
def test_silent(how: str, method: Any) -> None:
    """A gradient of 0 is named as such, and no rounds are advised."""
    settings: Any = {"sparsity": 0.7, "batches": models.make_batches(4, count=5), "loss_fn": models.loss_fn}
    texts = warned(TermOfZero(how), method, **settings)[1]
    [text] = [text for text in texts if "scored 0 throughout before anything was pruned" in text]
    assert "'other.0.weight'" in text
    assert "exclude=['other" in text
    assert not any("More rounds" in text for text in texts)
    excluded = warned(TermOfZero(how), method, exclude=["other.*"], **settings)[1]
    assert not any("scored 0 throughout" in text for text in excluded)


@pytest.mark.parametrize("method", [SNIP(), SNIP(rounds=3)], ids=["one", "rounds"])
@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_every_score_is_zero__names_the_zeros(scope: Any, method: Any) -> None:
    """A last layer of zeros, as torchvision's vision transformers have it, leaves no gradient to any layer."""
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    nn.init.zeros_(module[2].weight)
    settings: Any = {"sparsity": 0.9, "batches": models.make_batches(4), "loss_fn": models.loss_fn}
    with pytest.raises(ValueError, match=r"The weights of '2\.weight' are 0 throughout"):
        find_masks(module, method, scope=scope, **settings)
