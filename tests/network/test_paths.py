"""A weight is active exactly when some path from the input to the output uses it."""

from collections.abc import Callable, Sequence

import models
import pytest
import reference
import torch
import torch.nn.functional as F
from followed import EACH_NETWORK, Calls, active_counts, agree, all_active, build, dense_masks, random_masks
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_drive.network import paths


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("density", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("sizes", [(4, 3), (3, 5, 2), (4, 6, 6, 5, 3), (2, 3, 3, 3, 3, 3, 2)], ids=str)
def test_active_masks__are_what_is_reachable(seed: int, density: float, sizes: Sequence[int]) -> None:
    module = models.MLP(*sizes)
    masks = random_masks(module, density, seed)
    expected = reference.active_weights([mask.int().tolist() for mask in masks.values()])
    active = paths.active_masks(module, masks, torch.zeros(1, sizes[0]))
    assert [mask.int().tolist() for mask in active.values()] == expected


@EACH_NETWORK
def test_active_masks__keep_all_of_dense_networks(network: str) -> None:
    module, shape = build(network)
    masks = dense_masks(module)
    assert all_active(module, masks, torch.zeros(1, *shape))


def test_active_masks__end_at_channels_that_are_cut() -> None:
    """The second conv no longer hears channel 1, and nobody listens to channel 3."""
    module, shape = build("conv_net")
    masks = dense_masks(module)
    masks["conv1.weight"][1] = False
    masks["conv2.weight"][:, 3] = False
    expected = {name: mask.clone() for name, mask in masks.items()}
    expected["conv1.weight"][3] = False
    expected["conv2.weight"][:, 1] = False
    active = paths.active_masks(module, masks, torch.zeros(1, *shape))
    assert agree(active, expected)


def test_active_masks__go_on_through_shortcuts() -> None:
    """What block1.conv2 does not give to channel 2, the shortcut still does: nothing after it is lost."""
    module, shape = build("residual_net")
    masks = dense_masks(module)
    masks["block1.conv2.weight"][2] = False
    active = paths.active_masks(module, masks, torch.zeros(1, *shape))
    assert agree(active, masks)
    masks["block1.shortcut.0.weight"][2] = False
    active = paths.active_masks(module, masks, torch.zeros(1, *shape))
    assert not active["block2.conv1.weight"][:, 2].any()
    assert not active["block2.shortcut.0.weight"][:, 2].any()
    assert active["block2.conv1.weight"][:, [0, 1, 3]].all()


def test_active_masks__drop_taps_that_see_only_padding() -> None:
    module = nn.Conv2d(1, 1, 3, padding=1)
    masks = {"weight": torch.ones(1, 1, 3, 3, dtype=torch.bool)}
    active = paths.active_masks(module, masks, torch.zeros(1, 1, 1, 1))
    assert active["weight"].int().tolist() == [[[[0, 0, 0], [0, 1, 0], [0, 0, 0]]]]


def test_active_masks__start_at_no_bias() -> None:
    module = models.MLP(3, 3, 2)
    masks = dense_masks(module) | {"0.weight": torch.zeros(3, 3, dtype=torch.bool)}
    assert active_counts(module, masks, torch.zeros(1, 3)) == {"0.weight": 0, "2.weight": 0}


def test_active_masks__go_through_weights_without_a_mask() -> None:
    module = models.MLP(3, 3, 2)
    assert active_counts(module, {"2.weight": dense_masks(module)["2.weight"]}, torch.zeros(1, 3)) == {"2.weight": 6}


def test_active_masks__depend_on_no_value() -> None:
    """Masks alone decide: zero, negative and NaN weights lie on paths too."""
    module, shape = build("conv_net")
    masks = random_masks(module, 0.4, seed=3)
    expected = paths.active_masks(module, masks, torch.zeros(1, *shape))
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.fill_([0.0, -1.0, float("nan")][i % 3])
    active = paths.active_masks(module, masks, torch.zeros(1, *shape))
    assert agree(active, expected)


@EACH_NETWORK
def test_active_masks__leave_the_module_alone(network: str) -> None:
    module, shape = build(network)
    masks = random_masks(module, 0.5, seed=0)
    copies = {name: mask.clone() for name, mask in masks.items()}
    before = models.fingerprint(module)
    with torch.no_grad():
        paths.active_masks(module, masks, torch.zeros(1, *shape))
    assert models.changes(module, before) == []
    assert agree(masks, copies)


class Residual(nn.Module):
    """x + layer(x), again and again."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.relu(layer(x))
        return x


@pytest.mark.parametrize(
    "make", [lambda: models.MLP(*[8] * 201), lambda: Residual(8, 200)], ids=["chain", "residual_chain"]
)
def test_active_masks__neither_overflow_nor_underflow(make: Callable[[], nn.Module]) -> None:
    """8 ** 200 paths would overflow and (1 / 8) ** 200 underflow float32; every weight is on some."""
    module = make()
    assert sum(active_counts(module, dense_masks(module), torch.zeros(1, 8)).values()) == 200 * 64


@pytest.mark.parametrize("seed", range(3))
def test_active_masks__are_exact_in_deep_networks(seed: int) -> None:
    """Infinity times a pruned weight would be NaN, forwards as well as backwards."""
    module = models.MLP(*[8] * 201)
    masks = random_masks(module, 0.6, seed)
    expected = reference.active_weights([mask.int().tolist() for mask in masks.values()])
    active = paths.active_masks(module, masks, torch.zeros(1, 8))
    assert [mask.int().tolist() for mask in active.values()] == expected


def test_active_masks__keep_a_single_path() -> None:
    """One path of 200 weights; then it is cut in the middle."""
    module = models.MLP(*[8] * 201)
    masks = {name: torch.zeros(8, 8, dtype=torch.bool) for name in dense_masks(module)}
    for mask in masks.values():
        mask[3, 3] = True
    assert sum(active_counts(module, masks, torch.zeros(1, 8)).values()) == 200
    masks["200.weight"][3, 3] = False
    assert sum(active_counts(module, masks, torch.zeros(1, 8)).values()) == 0


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        pytest.param(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (2, 3, 4), id="encoder_layer"),
        pytest.param(nn.TransformerEncoderLayer(4, 2, 8, norm_first=True), (3, 2, 4), id="norm_first"),
        pytest.param(models.Tied(), (1, 4), id="tied"),
        pytest.param(nn.Sequential(nn.Conv1d(2, 4, 2), nn.GLU(1), nn.Flatten(), nn.LazyLinear(2)), (1, 2, 5), id="glu"),
        pytest.param(nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.PixelShuffle(1)), (1, 2, 3, 3), id="transposed"),
        pytest.param(Calls(lambda x: {"a": [x]}), None, id="structured_output"),
    ],
)
def test_active_masks__keep_all_of_dense_layers(module: nn.Module, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        inner, module, shape = nn.Linear(4, 3), module, (1, 4)
        module.inner, module.function = inner, lambda x: {"a": [inner(x)], "b": 3}
    module.eval()(torch.zeros(shape))
    masks = dense_masks(module)
    assert all_active(module, masks, torch.zeros(shape))


def test_active_masks__start_at_token_ids() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    assert active_counts(module, dense_masks(module), torch.tensor([[0, 4, 2]])) == {"1.weight": 12}


def test_active_masks__raise_without_an_output() -> None:
    module = nn.Linear(4, 3)
    module.forward = lambda x: "text"
    with pytest.raises(ValueError, match="must return at least one floating-point tensor, got str"):
        paths.active_masks(module, dense_masks(module), torch.zeros(1, 4))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_active_masks__go_through_negative_computed_weights(sign: float) -> None:
    """A weight without a mask carries everything, also where it is computed and happens to be negative."""
    net = nn.Sequential(nn.Linear(3, 4), spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2)).eval()
    normalised = net[1].parametrizations.weight[0]
    normalised._u.fill_(0.5)
    normalised._v.fill_(0.5 * sign)
    masks = {"0.weight": torch.rand(4, 3) < 0.7, "2.weight": torch.tensor([[True, False, True, True], [False] * 4])}
    masks["0.weight"][:, 0] = True
    assert torch.equal(paths.active_masks(net, masks, torch.ones(1, 3))["0.weight"], masks["0.weight"])


class Computing(nn.Module):
    """Its dense kernel is computed from a parameter without a mask."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.kernel, self.head = nn.Parameter(torch.randn(8, 2, 3, 3)), nn.Linear(8, 3)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(x, self.compute(self.kernel)).amax((2, 3)))


@pytest.mark.parametrize(
    "compute",
    [
        lambda kernel: kernel - kernel.mean((1, 2, 3), keepdim=True),
        lambda kernel: (kernel - kernel.mean()) / kernel.std(),
        lambda kernel: kernel.clone().sub_(kernel.amin()),
        lambda kernel: F.layer_norm(kernel, kernel.shape[1:]),
    ],
    ids=["centred", "standardised", "least", "layer_norm"],
)
def test_active_masks__go_through_kernels_that_are_computed(compute: Callable[[Tensor], Tensor]) -> None:
    """Equal numbers in place of their weights would be 0 less their mean."""
    module, mask = Computing(compute), torch.ones(3, 8, dtype=torch.bool)
    mask[:, 5] = False
    active = paths.active_masks(module, {"head.weight": mask}, torch.zeros(1, 2, 6, 6))
    assert torch.equal(active["head.weight"], mask)


class Weighted(nn.Module):
    """Has a gain that is computed from an unmasked parameter."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.gain, self.compute = nn.Parameter(torch.randn(4)), compute

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.compute(self.gain))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.exp(),
        lambda x: x.abs().log(),
        lambda x: F.layer_norm(x, (4,)),
        lambda x: (x - x.mean()) / x.std(),
        lambda x: F.batch_norm(x[:, None], None, None, training=True)[:, 0],
    ],
    ids=["exp", "log", "layer_norm", "standardised", "batch_norm"],
)
def test_active_masks__go_through_what_is_computed_from_unmasked_weights(compute: Callable[[Tensor], Tensor]) -> None:
    """Weights without a mask carry everything, and so does what is computed from them."""
    module = Weighted(compute)
    masks = dense_masks(module)
    assert all_active(module, masks, torch.zeros(1, 4))
