"""Masks count, store and apply exactly: one bit per weight on disk, and a true zero on live parameters."""

import copy
import io
import pickle
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_drive import Masks
from lightning_drive.network.masks import collapsed_layers

SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (3, 5), (2, 3, 1, 7), (4, 4, 3, 3), (1, 1000)]
INF, NAN = float("inf"), float("nan")


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def mlp_masks(seed: int = 0) -> Masks:
    return Masks({"0.weight": random_mask(5, 4, seed=seed), "2.weight": random_mask(3, 5, seed=seed + 1)})


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


@pytest.mark.parametrize(("value", "expected"), [(True, 0.0), (False, 1.0)], ids=["all_kept", "all_pruned"])
def test_masks__limits(value: bool, expected: float) -> None:
    masks = Masks({"a": torch.full((3, 4), value)})
    assert (masks.sparsity, masks.density) == (expected, 1 - expected)


def test_collapsed_layers() -> None:
    masks = {"fc": torch.tensor([True, True]), "gone": torch.zeros(2, 1, dtype=torch.bool)}
    assert collapsed_layers(masks) == ["gone"]
    assert collapsed_layers({"fc": masks["fc"]}) == []


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


def test_shuffled__among() -> None:
    """Within other masks, every one of their weights has the same chance, and none outside of them has any."""
    among = {"a": torch.arange(12).view(3, 4) % 2 == 0, "b": torch.ones(5, dtype=torch.bool)}
    masks = Masks({"a": torch.arange(12).view(3, 4) == 4, "b": torch.arange(5) < 5})
    seen = torch.zeros(3, 4)
    for seed in range(200):
        shuffled = masks.shuffled(torch.Generator().manual_seed(seed), among)
        assert [int(mask.sum()) for mask in shuffled.values()] == [1, 5]
        assert (shuffled["a"] <= among["a"]).all()
        seen += shuffled["a"]
    assert torch.equal(seen > 15, among["a"])


# --- masks read off zeros


class Tokens(nn.Module):
    """Has zeros that nobody pruned: in a new position embedding, and in the row of `padding_idx`."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
        self.embedding = nn.Embedding(5, 8, padding_idx=0)
        self.layer, self.norm, self.head = nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.embedding(tokens) + self.position)))


def test_of__reads_what_was_pruned() -> None:
    pruned = Masks({"layer.weight": random_mask(4, 8), "head.weight": random_mask(2, 4, seed=1)})
    module = Tokens()
    pruned.apply_(module)
    assert Masks.of(module) == pruned
    assert list(Masks.of(module)) == ["layer.weight", "head.weight"]
    assert Masks.of(module).hold_for(module)


def test_of__every_form_of_zero() -> None:
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[0.0, -0.0, NAN, 1e-45]])
    assert Masks.of(layer)["weight"].tolist() == [[False, False, True, True]]
    assert Masks.of(layer.to(torch.float64))["weight"].tolist() == [[False, False, True, True]]


def test_of__include_and_exclude() -> None:
    module = Tokens()
    assert list(Masks.of(module, exclude=["head.*"])) == ["layer.weight"]
    everything = Masks.of(module, include=["*"])
    assert not everything["position"].any()
    assert everything["embedding.weight"].tolist() == [[row > 0] * 8 for row in range(5)]
    with pytest.raises(ValueError, match="`exclude` pattern 'tail' matches no parameter"):
        Masks.of(module, exclude=["tail"])


def test_of__masks_of_another_tool_error() -> None:
    """All layers are named at once, in their order, with the call that makes them plain."""
    module = models.MLP(4, 6, 5, 3)
    for index in (4, 0, 2):
        prune.l1_unstructured(module[index], "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"^'0.weight', '2.weight', '4.weight' are computed anew") as error:
        Masks.of(module)
    assert 'by `torch.nn.utils.prune.remove(layer, "weight")` for' in str(error.value)
    for index in (0, 2, 4):
        prune.remove(module[index], "weight")
    assert Masks.of(module).num_kept == 12 + 15 + 7


class LowRank(nn.Module):
    """A layer and an adapter of it of rank 2, as LoRA trains it (Hu et al., 2022)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.layer.weight += self.up @ self.down
        return self.layer.requires_grad_(True)


def test_apply__to_a_merged_adapter() -> None:
    """An adapter is dense, so merging it fills the zeros; the masks of the network before it go on the merged one."""
    network = models.MLP(4, 6, 3)
    mlp_masks_of_it = Masks({"0.weight": random_mask(6, 4), "2.weight": random_mask(3, 6, seed=1)})
    mlp_masks_of_it.apply_(network)
    masks = Masks.of(network)
    network[0], network[2] = LowRank(network[0]), LowRank(network[2])  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([each for each in network.parameters() if each.requires_grad], lr=0.1)
    x = torch.randn(8, 4)
    for _ in range(3):
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()
    network[0], network[2] = network[0].merged(), network[2].merged()  # type: ignore[operator]
    merged = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    assert not masks.hold_for(network)
    masks.apply_(network)
    assert masks == Masks.of(network) == mlp_masks_of_it
    for name, mask in masks.items():
        assert torch.equal(network.get_parameter(name)[mask], merged[name][mask])
