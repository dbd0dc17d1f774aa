"""Masks count, store and apply exactly: one bit per weight on disk, and a true zero on live parameters."""

import copy
import io
import pickle
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_drive import Masks
from lightning_drive.core import zeroing
from lightning_drive.core.bits import pack, unpack
from lightning_drive.network import masked_parameters, optimizer_state
from lightning_drive.network.masked_parameters import MaskedParameters

SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (3, 5), (2, 3, 1, 7), (4, 4, 3, 3), (1, 1000)]
INF, NAN = float("inf"), float("nan")


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def mlp_masks(seed: int = 0) -> Masks:
    return Masks({"0.weight": random_mask(5, 4, seed=seed), "2.weight": random_mask(3, 5, seed=seed + 1)})


# --- bits


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_pack__round_trip(shape: tuple[int, ...], seed: int) -> None:
    mask = random_mask(*shape, seed=seed)
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == ((mask.numel() + 7) // 8,)
    found = unpack(bits, list(shape))
    assert found.dtype == torch.bool
    assert found.equal(mask)


def test_pack__first_entry_in_the_highest_bit() -> None:
    assert pack(torch.tensor([[True, False, True], [False, False, False]])).tolist() == [0b10100000]


def test_pack__layout_does_not_matter() -> None:
    mask = random_mask(4, 3, 3, 3)
    assert pack(mask.to(memory_format=torch.channels_last)).equal(pack(mask))
    assert pack(mask.transpose(0, 1)).equal(pack(mask.transpose(0, 1).contiguous()))


# --- a mapping that measures itself


def test_masks() -> None:
    masks = Masks({"a": torch.tensor([True, False, False]), "b": torch.tensor([[True]])})
    assert (masks.num_kept, masks.num_prunable, masks.sparsity, masks.density) == (2, 4, 0.5, 0.5)
    assert (list(masks), len(masks), "b" in masks, bool(masks)) == (["a", "b"], 2, True, True)
    assert masks["a"].tolist() == [True, False, False]
    assert repr(masks) == "Masks(2 parameters, 2 of 4 weights kept, sparsity 50.00%)"


def test_masks__empty() -> None:
    masks = Masks()
    assert (masks.num_kept, masks.num_prunable, masks.sparsity, masks.density) == (0, 0, 0.0, 1.0)
    assert not masks
    assert Masks.from_state_dict(masks.state_dict()) == masks


def test_masks__equality() -> None:
    masks = mlp_masks()
    assert masks == Masks(dict(reversed(list(masks.items()))))
    assert masks != mlp_masks(seed=1)
    assert masks != Masks({"0.weight": masks["0.weight"]})
    assert masks != Masks({"0.weight": masks["0.weight"].t(), "2.weight": masks["2.weight"]})
    assert masks != dict(masks)


def test_masks__own_mapping() -> None:
    """Adding to the dictionary that was given adds nothing to the masks."""
    given = {"a": torch.tensor([True])}
    masks = Masks(given)
    given["b"] = torch.tensor([True])
    assert list(masks) == ["a"]


@pytest.mark.parametrize(
    ("mask", "kind"),
    [(torch.ones(2), "torch.float32"), (torch.ones(2, dtype=torch.uint8), "torch.uint8"), ([True], "list")],
    ids=["float", "uint8", "list"],
)
def test_masks__type_error(mask: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"The mask of 'fc' must be a boolean tensor .*, got {kind}"):
        Masks({"conv": torch.tensor([True]), "fc": mask})


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda masks: pickle.loads(pickle.dumps(masks))], ids=["deepcopy", "pickle"]
)
def test_masks__copies(clone: Any) -> None:
    masks = mlp_masks()
    found = clone(masks)
    assert found == masks
    found["0.weight"].logical_not_()
    assert found != masks


# --- stored


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_state_dict__file(shape: tuple[int, ...]) -> None:
    masks = Masks({"block.weight": random_mask(*shape), "fc.weight": random_mask(3, 3, seed=1)})
    file = io.BytesIO()
    torch.save(masks.state_dict(), file)
    file.seek(0)
    assert Masks.from_state_dict(torch.load(file, weights_only=True)) == masks


def test_state_dict__one_bit_per_weight() -> None:
    state = Masks({"a": random_mask(1000, 801)}).state_dict()
    (packed,) = (value for value in state["masks"]["a"].values() if isinstance(value, Tensor))
    assert packed.untyped_storage().nbytes() == 100_125


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param({"version": 2}, "version 2, but this lightning_drive reads version 1", id="newer"),
        pytest.param({"version": None}, "version None", id="no_version"),
        pytest.param({"bits": torch.zeros(2, dtype=torch.uint8)}, "'a' does not hold 20 bits", id="truncated"),
        pytest.param({"bits": torch.zeros(4, dtype=torch.uint8)}, "'a' does not hold 20 bits", id="too_long"),
        pytest.param({"bits": torch.zeros(3)}, "'a' does not hold 20 bits", id="not_bits"),
        pytest.param({"shape": [5, 6]}, "'a' does not hold 30 bits", id="other_shape"),
    ],
)
def test_from_state_dict__error(damage: dict[str, Any], message: str) -> None:
    state = Masks({"a": random_mask(4, 5)}).state_dict()
    for key, value in damage.items():
        (state if key == "version" else state["masks"]["a"])[key] = value
    with pytest.raises(ValueError, match=message):
        Masks.from_state_dict(state)


def test_digest__equal() -> None:
    masks = mlp_masks()
    assert masks.digest() == Masks(dict(reversed(list(masks.items())))).digest()
    assert masks.digest() == Masks.from_state_dict(masks.state_dict()).digest()
    assert Masks({"a": random_mask(4, 3, 3, 3)}).digest() == (
        Masks({"a": random_mask(4, 3, 3, 3).to(memory_format=torch.channels_last)}).digest()
    )


def one_bit_flipped() -> Masks:
    mask = mlp_masks()["2.weight"].clone()
    mask[-1, -1] ^= True
    return Masks({"0.weight": mlp_masks()["0.weight"], "2.weight": mask})


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(one_bit_flipped(), id="one_bit"),
        pytest.param(Masks({"0.weight": mlp_masks()["0.weight"]}), id="one_missing"),
        pytest.param(Masks({f"net.{name}": mask for name, mask in mlp_masks().items()}), id="other_names"),
        pytest.param(Masks({name: mask.reshape(-1, 1) for name, mask in mlp_masks().items()}), id="other_shapes"),
        pytest.param(Masks({"0.weight": mlp_masks()["0.weight"], "2.weight": ~mlp_masks()["2.weight"]}), id="inverted"),
        pytest.param(Masks(), id="empty"),
    ],
)
def test_digest__differs(other: Masks) -> None:
    assert mlp_masks().digest() != other.digest()


# --- on live parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [NAN, -1.0, float("-inf"), -0.0], ids=str)
def test_apply_(dtype: torch.dtype, value: float) -> None:
    """Pruned weights become +0.0 whatever they were; kept ones, and what has no mask, keep every bit."""
    module = models.MLP(4, 5, 3).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    parameters = list(module.parameters())
    masks = mlp_masks()
    masks.apply_(module)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    kept_bits = torch.full((), value, dtype=dtype).view(bits).item()
    for name, mask in masks.items():
        expected = torch.where(mask, kept_bits, 0).to(bits)
        assert module.get_parameter(name).detach().view(bits).equal(expected)
    assert module[0].bias.detach().view(bits).eq(kept_bits).all()
    assert all(one is two for one, two in zip(parameters, module.parameters(), strict=True))


def test_apply___inner_product() -> None:
    """0 + 1 + ... + 9 is 45; without the odd ones it is 20."""
    module = models.InnerProduct(10)
    assert module(torch.ones(10)).item() == 45
    Masks({"layer.weight": torch.tensor([[True, False] * 5])}).apply_(module)
    assert module(torch.ones(10)).item() == 20


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        pytest.param({"fc.weight": random_mask(5, 4)}, "hold 'fc.weight', but the module has no parameter", id="name"),
        pytest.param(
            {"0.weight": random_mask(4, 5)},
            r"mask of '0.weight' has shape \(4, 5\), but the parameter has shape \(5, 4\)",
            id="shape",
        ),
    ],
)
@pytest.mark.parametrize("use", [Masks.apply_, Masks.parameters_of], ids=["apply_", "parameters_of"])
def test_masks__other_module_error(use: Any, masks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use(Masks(masks), models.MLP(4, 5, 3))


def test_hold_for() -> None:
    module, masks = models.randomised(models.MLP(4, 5, 3)), mlp_masks()
    assert not masks.hold_for(module)
    masks.apply_(module)
    assert masks.hold_for(module)
    assert not masks.hold_for(models.MLP(4, 6, 3))
    assert not masks.hold_for(nn.Linear(2, 2))
    with torch.no_grad():
        module[2].weight[~masks["2.weight"]] = NAN
    assert not masks.hold_for(module)


def test_zero_gradients_() -> None:
    module, masks = models.MLP(4, 5, 3), mlp_masks()
    live = MaskedParameters(module, masks)
    live.zero_gradients_()  # there are none yet
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, NAN)
    module[2].weight.grad = None
    live.zero_gradients_()
    assert module[0].weight.grad.isnan().equal(masks["0.weight"])
    assert module[0].weight.grad[~masks["0.weight"]].eq(0).all()
    assert module[0].bias.grad.isnan().all()
    assert module[2].weight.grad is None


class Wrapper(Optimizer):
    """An optimizer around another one, as SAM and Lookahead are, with a state of its own."""

    def __init__(self, base: Optimizer) -> None:
        self.base_optimizer = base
        super().__init__(base.param_groups, {})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"slow": torch.ones_like(parameter), "step": torch.ones(()), "note": "x"}

    def step(self, closure: Any = None) -> None:
        self.base_optimizer.step(closure)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("wrappers", [0, 1, 2])
def test_zero_optimizer_state_(make: Any, wrappers: int) -> None:
    """Every state in its parameter's shape forgets pruned weights, and only these."""
    module, masks = models.randomised(models.MLP(4, 5, 3)), mlp_masks()
    inner = make(module.parameters())
    models.loss_fn(module, models.make_batches(4)[0]).backward()
    inner.step()
    optimizer: Optimizer = inner
    for _ in range(wrappers):
        optimizer = Wrapper(optimizer)
    before = copy.deepcopy(inner.state_dict()["state"])
    MaskedParameters(module, masks).zero_optimizer_state_(optimizer)

    checked = 0
    for i, (name, parameter) in enumerate(module.named_parameters()):
        for key, value in inner.state[parameter].items():
            mask = masks.get(name, torch.tensor(True)) if value.shape == parameter.shape else torch.tensor(True)
            assert value.equal(torch.where(mask, before[i][key], 0))
            checked += name in masks and value.shape == parameter.shape
        if wrappers:
            assert optimizer.state[parameter]["slow"].equal(masks.get(name, torch.ones_like(parameter)).float())
            assert optimizer.state[parameter]["step"].eq(1)
    assert checked >= len(masks)


def test_masked_parameters__zero_weights_() -> None:
    module, masks = models.MLP(4, 5, 3), mlp_masks()
    live = MaskedParameters(module, masks)
    with torch.no_grad():
        module[0].weight.fill_(NAN)
    live.zero_weights_()
    assert module[0].weight.isnan().equal(masks["0.weight"])


FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64, torch.complex128, torch.int32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 100, 1 << 19])
def test_zero_(dtype: torch.dtype, layout: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pruned is +0 to the bit, and what is kept is what it was to the bit: NaN, -0.0 and infinities, too."""
    monkeypatch.setattr(zeroing, "_CHUNK", chunk)
    values = (
        torch.tensor([1.5, -2.0, -0.0]) if dtype == torch.int32 else torch.tensor([1.5, -2.0, NAN, INF, -INF, -0.0])
    )
    generator = torch.Generator().manual_seed(0)
    tensor = values[torch.randint(len(values), (6, 5, 3, 4), generator=generator)].to(dtype)
    mask = torch.rand(tensor.shape, generator=generator) < 0.4
    kept = mask.flatten().tolist()
    expected = [bits if keeps else bytes(len(bits)) for bits, keeps in zip(bits_of(tensor), kept, strict=True)]

    once, again = layout(tensor).clone(), layout(tensor).clone()
    zeroing.zero_(once, mask)
    module = nn.ParameterDict({"weight": nn.Parameter(again, requires_grad=False)})
    live = MaskedParameters(module, Masks({"weight": mask}))
    live.zero_weights_()
    assert bits_of(once) == bits_of(module["weight"].detach()) == expected


def bits_of(tensor: torch.Tensor) -> list[bytes]:
    flat = tensor.contiguous().view(-1, 1).view(torch.uint8)
    return [bytes(row) for row in flat.tolist()]


def test_zero___scalar_and_empty() -> None:
    for shape in ((), (0, 3)):
        tensor = torch.full(shape, NAN)
        zeroing.zero_(tensor, torch.zeros(shape, dtype=torch.bool))
        assert tensor.equal(torch.zeros(shape))


def test_masked_parameters__other_kinds_of_state() -> None:
    """State in another precision than the weights, and sparse gradients, are masked all the same."""
    names = {"exp_avg": torch.float32, "exp_avg_sq": torch.bfloat16, "momentum": torch.float64}
    embedding = nn.Embedding(4, 3, sparse=True, dtype=torch.bfloat16)
    live = MaskedParameters(embedding, Masks({"weight": torch.eye(4, 3, dtype=torch.bool)}))
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    optimizer.state[embedding.weight] = {name: torch.ones(4, 3, dtype=dtype) for name, dtype in names.items()}
    live.zero_optimizer_state_(optimizer)
    assert all(value.float().equal(torch.eye(4, 3)) for value in optimizer.state[embedding.weight].values())
    embedding(torch.tensor([1, 3])).sum().backward()
    live.zero_gradients_()
    expected = torch.zeros(4, 3)
    expected[1, 1] = 1
    assert embedding.weight.grad.to_dense().float().equal(expected)


class Shard(torch.Tensor):
    """Stands for a sharded parameter, in whose place its wrapper puts the whole one while a layer runs."""


def test_masked_parameters__replaced_in() -> None:
    """Named are parameters in whose place there is another one or none; a tie or a shard that comes and goes is not."""
    names = ("tied", "shard", "other", "gone")
    module = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("early", *names)})
    module["shard"].weight = nn.Parameter(torch.ones(2, 2).as_subclass(Shard))
    live = MaskedParameters(module, Masks({f"{name}.weight": torch.eye(2, dtype=torch.bool) for name in names}))
    assert live.replaced_in(module) == []
    module["shard"].weight = nn.Parameter(torch.ones(2, 2))
    module["early"].weight = module["tied"].weight
    module["other"] = nn.Linear(2, 2)
    del module["gone"]
    assert live.replaced_in(module) == ["other.weight", "gone.weight"]


def test_zero_optimizer_state__optimizers_that_know_each_other() -> None:
    """A wrapper and what it wraps may refer to each other; each is visited once."""
    module = models.MLP(4, 5, 3)
    inner, outer = (torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for _ in range(2))
    inner.outer, outer.inner = outer, inner  # type: ignore[attr-defined]
    weight = module[0].weight
    inner.state[weight]["momentum_buffer"] = torch.ones_like(weight)
    masks = Masks({"0.weight": torch.zeros_like(weight, dtype=torch.bool)})
    masked_parameters.MaskedParameters(module, masks).zero_optimizer_state_(outer)
    assert not inner.state[weight]["momentum_buffer"].any()


def test_with_wrapped__lookalikes() -> None:
    """What wraps need not be an optimizer itself, at any depth, and schedulers that know one are none."""
    inner = torch.optim.SGD(models.MLP(4, 5, 3).parameters(), lr=0.1)
    lookalike = SimpleNamespace(param_groups=inner.param_groups, layers={"fast": [inner]}, state={})
    outer = Wrapper(torch.optim.SGD(models.MLP(2, 2).parameters(), lr=0.1))
    outer.others = (lookalike, torch.optim.lr_scheduler.StepLR(inner, 1))  # type: ignore[attr-defined]
    found = optimizer_state.with_wrapped(outer)
    assert [id(each) for each in found] == [id(each) for each in (outer, outer.base_optimizer, lookalike, inner)]


def test_zero_optimizer_state___lbfgs() -> None:
    """A history in which a pruned weight moved is dropped; one without stays, bit for bit the same objects."""
    module, masks = models.randomised(models.MLP(4, 5, 3)), mlp_masks()
    live, batch = MaskedParameters(module, masks), models.make_batches(4)[0]
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = models.loss_fn(module, batch)
        loss.backward()
        live.zero_gradients_()
        return loss

    optimizer.step(closure)  # every weight is in use, but those that are masked do not move
    state = optimizer.state[module[0].weight]
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    live.zero_optimizer_state_(optimizer)
    assert optimizer.state[module[0].weight] is state
    assert state.keys() == before.keys()
    assert all(value is before[key] or torch.equal(value, before[key]) for key, value in state.items())

    position = 20 + 5 + int((~masks["2.weight"]).flatten().nonzero()[0])  # behind the first weight and bias
    state["old_dirs"][0][position] = 1e-20
    live.zero_optimizer_state_(optimizer)
    assert not optimizer.state


def test_zero_gradients_at_once() -> None:
    """Masked within every backward pass, accumulated ones too, until the handles are removed."""
    module, masks = models.randomised(models.MLP(4, 5, 3)), mlp_masks()
    module[2].weight.requires_grad_(False)
    handles = MaskedParameters(module, masks).zero_gradients_at_once(keep_overflow=False)
    assert len(handles) == 1
    mask = masks["0.weight"]
    for _ in range(2):
        models.loss_fn(module, models.make_batches(4)[0]).backward()
        assert not module[0].weight.grad[~mask].any()
        assert module[0].weight.grad[mask].any()
    for handle in handles:
        handle.remove()
    models.loss_fn(module, models.make_batches(4)[0]).backward()
    assert module[0].weight.grad[~mask].any()


@pytest.mark.parametrize(
    "packed", [{"shape": [2]}, {"bits": torch.zeros(1, dtype=torch.uint8)}, {"shape": [2], "bits": b"?"}]
)
def test_from_state_dict__incomplete_error(packed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"The packed mask of 'fc\.weight' needs a `shape` and `bits`"):
        Masks.from_state_dict({"version": 1, "masks": {"fc.weight": packed}})


def test_shuffled() -> None:
    """Every parameter keeps its count, any position can be kept, and only the generator's numbers are used."""
    generator = torch.Generator().manual_seed(0)
    masks = Masks(
        {"a": torch.arange(24).view(4, 6) < 5, "b": torch.ones(3, dtype=torch.bool), "c": torch.arange(2) > 5}
    )
    state = torch.get_rng_state()
    drawn = [masks.shuffled(generator) for _ in range(200)]
    assert torch.get_rng_state().equal(state)
    assert masks["a"].flatten()[:5].all()
    for each in drawn:
        assert {name: mask.shape for name, mask in each.items()} == {name: mask.shape for name, mask in masks.items()}
        assert [int(mask.sum()) for mask in each.values()] == [5, 3, 0]
    frequency = torch.stack([each["a"] for each in drawn]).double().mean(0)
    assert (frequency - 5 / 24).abs().max() < 0.13  # 4.5 standard deviations
    assert len({each.digest() for each in drawn}) == 200


def test_shuffled__seed() -> None:
    masks = Masks({"a": torch.arange(50) < 9, "b": torch.arange(50) < 9})
    one, two, three = (masks.shuffled(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert one == two
    assert one != three
    assert not one["a"].equal(one["b"])


class InTwoParts(Tensor):
    """A tensor whose numbers are those of two others together, as of some quantised ones."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "InTwoParts":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"no {func}")

    @classmethod
    def of(cls, weight: Tensor) -> "InTwoParts":
        scale = weight.abs().max() / 127
        return cls((weight / scale).round().to(torch.int8), scale)


class Dequantised(InTwoParts):
    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.codes * self.scale


class MadeDense(InTwoParts):
    def to_dense(self) -> Tensor:  # type: ignore[override]
        return self.codes * self.scale


def _per_channel(weight: Tensor) -> Tensor:
    return torch.quantize_per_channel(weight, torch.full((4,), 0.05), torch.arange(4), 0, torch.qint8)


def _in_parts(weight: Tensor) -> Tensor:
    """A sparse tensor that holds every entry twice, as halves."""
    half = (weight / 2).to_sparse()
    places, values = torch.cat([half.indices()] * 2, 1), torch.cat([half.values()] * 2)
    return torch.sparse_coo_tensor(places, values, weight.shape, check_invariants=False)


FORMS: dict[str, tuple[Any, bool]] = {
    "coo": (lambda weight: weight.to_sparse(), True),
    "coo_with_parts": (_in_parts, True),
    "csr": (lambda weight: weight.to_sparse_csr(), True),
    "csc": (lambda weight: weight.to_sparse_csc(), True),
    "bsr": (lambda weight: weight.to_sparse_bsr((2, 3)), True),
    "bsc": (lambda weight: weight.to_sparse_bsc((2, 3)), True),
    "qint8": (lambda weight: torch.quantize_per_tensor(weight, 0.05, 3, torch.qint8), True),
    "qint8_by_channel": (_per_channel, True),
    "dequantize": (Dequantised.of, False),
    "to_dense": (MadeDense.of, False),
}


@pytest.mark.filterwarnings("ignore:.*(beta state|[qQ]uantize)")
@pytest.mark.parametrize("form", FORMS)
def test_masks__of_weights_that_are_not_plain(form: str) -> None:
    """Masks are told from what the weights stand for, and put on where they can be; else the parameter is named."""
    convert, can_be_masked = FORMS[form]
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    masks, others = Masks({"0.weight": weight > 0}), Masks({"0.weight": weight < 0})
    module = nn.Sequential(nn.Linear(6, 4))
    module[0].weight = nn.Parameter(convert(weight.clamp(min=0)), requires_grad=False)
    assert masks.hold_for(module)
    assert not others.hold_for(module)
    masks.apply_(module)  # nothing to do
    assert masks.hold_for(module)
    if can_be_masked:
        half = Masks({"0.weight": (weight > 0) & (torch.arange(6) % 2 == 0)})
        before = module[0].weight.dequantize() if "int8" in form else module[0].weight.to_dense()
        half.apply_(module)
        after = module[0].weight.dequantize() if "int8" in form else module[0].weight.to_dense()
        assert half.hold_for(module)
        assert torch.equal(after, before.masked_fill(~half["0.weight"], 0))
    else:
        with pytest.raises(TypeError, match=r"'0.weight' is a \w+ of torch.float32, .* before the weights are quant"):
            others.apply_(module)
    with pytest.raises(TypeError, match=r"'0.weight' is a .*Put the masks on before"):
        MaskedParameters(module, masks)


@pytest.mark.parametrize("use", [Masks.hold_for, Masks.apply_])
def test_masks__of_weights_that_cannot_be_read(use: Any) -> None:
    module = nn.Linear(6, 4)
    module.weight = nn.Parameter(InTwoParts.of(torch.ones(4, 6)), requires_grad=False)
    with pytest.raises(TypeError, match=r"'weight' is a InTwoParts of torch.float32, and neither its `dequantize\(\)`"):
        use(Masks({"weight": torch.zeros(4, 6, dtype=torch.bool)}), module)


@pytest.mark.parametrize("use", [Masks.hold_for, Masks.apply_])
def test_masks__of_weights_on_the_meta_device(use: Any) -> None:
    masks = Masks({"weight": torch.zeros(4, 6, dtype=torch.bool)})
    with pytest.raises(TypeError, match="'weight' is on the meta device and has no values"):
        use(masks, nn.Linear(6, 4, device="meta"))


@pytest.mark.filterwarnings("ignore:.*prototype stage")
def test_masks__of_nested_weights() -> None:
    module, masks = nn.Module(), Masks({"weight": torch.ones(2, 3, dtype=torch.bool)})
    module.weight = nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]))
    assert not masks.hold_for(module)
    with pytest.raises(TypeError, match="'weight' is a"):
        masks.apply_(module)
