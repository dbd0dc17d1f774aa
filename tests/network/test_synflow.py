"""Synaptic flow is conserved, and a weight is active exactly when some path from input to output uses it."""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import models
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from lightning_drive import SNIP, Magnitude, Masks, SynFlow, find_masks
from lightning_drive.core import scores as formulas
from lightning_drive.network import paths, prunable, synflow, synflow_breakers

RESIDUAL_CUTS = {
    "stem": ["stem.weight"],
    "block1_early": ["block1.conv1.weight", "block1.shortcut.0.weight"],
    "block1_late": ["block1.conv2.weight", "block1.shortcut.0.weight"],
    "block2_early": ["block2.conv1.weight", "block2.shortcut.0.weight"],
    "block2_late": ["block2.conv2.weight", "block2.shortcut.0.weight"],
    "fc": ["fc.weight"],
}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: models.MLP(4, 6, 5, 3), (4,)),
    "plain_conv_net": (models.PlainConvNet, (2, 4, 4)),
    "conv_net": (models.ConvNet, (2, 6, 6)),
    "residual_net": (models.ResidualNet, (2, 4, 4)),
}
EACH_NETWORK = pytest.mark.parametrize("network", NETWORKS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Calls(nn.Module):
    """A module that only calls a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def build(network: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    make, shape = NETWORKS[network]
    return models.randomised(make(), seed).eval(), shape


def random_masks(module: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parameters = prunable.prunable_parameters(module)
    return {name: torch.rand(value.shape, generator=generator) < density for name, value in parameters.items()}


def dense_masks(module: nn.Module) -> dict[str, Tensor]:
    return random_masks(module, 2.0, 0)


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """Keep all of every weight that is not a vector."""
    named = module.named_parameters()
    return {name: torch.ones_like(value, dtype=torch.bool) for name, value in named if value.ndim > 1}


def apply(masks: dict[str, Tensor], module: nn.Module) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).masked_fill_(~mask, 0)


def flow_scores(module: nn.Module, example_input: Tensor) -> tuple[dict[str, Tensor], float]:
    parameters = prunable.prunable_parameters(module)
    found, total = synflow.SynapticFlow(module, parameters).gradients(example_input)
    return {name: formulas.synflow(parameters[name].detach(), found[name]) for name in parameters}, total


def active_counts(module: nn.Module, masks: dict[str, Tensor], example_input: Tensor) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in paths.active_masks(module, masks, example_input).items()}


# --- synaptic flow


def test_synaptic_flow__by_hand() -> None:
    """R = |w| . 1 = 0 + 1 + 2 + 3, the gradient by each |w| is 1."""
    module = models.InnerProduct(4)
    with torch.no_grad():
        module.layer.weight[0, 2] = -2.0
    found, total = synflow.SynapticFlow(module, prunable.prunable_parameters(module)).gradients(torch.zeros(7, 4))
    assert total == 6.0
    assert found["layer.weight"].tolist() == [[1.0, 1.0, 1.0, 1.0]]


@EACH_NETWORK
@pytest.mark.parametrize("density", [1.5, 0.5], ids=["dense", "masked"])
def test_synaptic_flow__matches_reference(network: str, density: float) -> None:
    module, shape = build(network)
    masks = random_masks(module, density, seed=1)
    expected_total, expected = reference.synflow_flow_and_scores(module, list(masks), masks, shape)
    apply(masks, module)
    found, total = flow_scores(module, torch.zeros(2, *shape))
    assert total == pytest.approx(expected_total, rel=1e-12)
    for name in masks:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=0)
        assert found[name].dtype == torch.float64


@pytest.mark.parametrize("network", ["mlp", "plain_conv_net", "conv_net"])
@pytest.mark.parametrize("density", [1.5, 0.5], ids=["dense", "masked"])
def test_synaptic_flow__conserved_by_layer(network: str, density: float) -> None:
    module, shape = build(network)
    apply(random_masks(module, density, seed=2), module)
    found, total = flow_scores(module, torch.zeros(1, *shape))
    assert total > 0
    assert [score.sum().item() for score in found.values()] == pytest.approx([total] * len(found), rel=1e-12)


@pytest.mark.parametrize("cut", RESIDUAL_CUTS)
def test_synaptic_flow__conserved_by_cut(cut: str) -> None:
    """Beside a shortcut it is the layers that together separate input from output that carry all of it."""
    module, shape = build("residual_net")
    found, total = flow_scores(module, torch.zeros(1, *shape))
    assert sum(found[name].sum().item() for name in RESIDUAL_CUTS[cut]) == pytest.approx(total, rel=1e-12)


def test_synaptic_flow__beyond_float32() -> None:
    module = models.randomised(models.MLP(*[64] * 60))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(8)
    found, total = flow_scores(module, torch.zeros(1, 64))
    assert torch.finfo(torch.float32).max < total < float("inf")
    assert [score.sum().item() for score in found.values()] == pytest.approx([total] * 59, rel=1e-9)


def test_synaptic_flow__complex_error() -> None:
    """Also where the complex layer itself is not to be pruned: the flow runs through it."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"not defined for complex parameters \('1\.weight'\)"):
        synflow.SynapticFlow(module, {"0.weight": module[0].weight}).gradients(torch.ones(1, 3))


@EACH_NETWORK
def test_synaptic_flow__leaves_the_module_alone(network: str) -> None:
    module, shape = build(network)
    before = models.fingerprint(module)
    flow_scores(module, torch.zeros(1, *shape))
    assert models.changes(module, before) == []


def test_synaptic_flow__only_the_shape_matters() -> None:
    module, shape = build("conv_net")
    first, first_total = flow_scores(module, torch.zeros(1, *shape))
    second, second_total = flow_scores(module, torch.full((5, *shape), -9.0, dtype=torch.bfloat16))
    assert first_total == second_total
    assert all(first[name].equal(second[name]) for name in first)


def test_synaptic_flow__unused_and_cut_off() -> None:
    module = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    module.forward = lambda x: module["used"](x)
    found, total = synflow.SynapticFlow(module, dict(module.named_parameters())).gradients(torch.zeros(1, 2))
    assert found["unused.weight"].tolist() == [[0.0, 0.0]]
    module.forward = lambda x: x
    found, total = synflow.SynapticFlow(module, dict(module.named_parameters())).gradients(torch.zeros(1, 2))
    assert total == 2.0
    assert found["used.weight"].tolist() == [[0.0, 0.0]]


# --- layers without flow


def named_without_flow(module: nn.Module, example_input: Tensor) -> list[str]:
    return [each.layer for each in synflow_breakers.flow_breakers(module, example_input)]


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.ReLU6(), "hardtanh"),
        (nn.Hardtanh(), "hardtanh"),
        (nn.Tanh(), "tanh"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Hardsigmoid(), "hardsigmoid"),
        (nn.Softsign(), "softsign"),
        (nn.LayerNorm(4), "layer_norm"),
        (nn.GroupNorm(2, 4), "group_norm"),
        (nn.InstanceNorm1d(4), "instance_norm"),
        (nn.RMSNorm(4), "rms_norm"),
        (nn.LocalResponseNorm(2), "local_response_norm"),
        (nn.Softmax(-1), "softmax"),
        (Calls(lambda x: x.sigmoid()), "sigmoid"),
        (Calls(lambda x: x.tanh_()), "tanh_"),
        (Calls(lambda x: F.relu6(x)), "relu6"),
        (Calls(lambda x: torch.softmax(x, -1)), "softmax"),
        (Calls(lambda x: F.normalize(x, dim=-1)), "normalize"),
        (Calls(lambda x: F.scaled_dot_product_attention(x, x, x)), "scaled_dot_product_attention"),
        (nn.LSTM(4, 4), "lstm"),
        (nn.GRU(4, 4), "gru"),
    ],
    ids=str,
)
def test_layers_without_flow(layer: nn.Module, name: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer)
    assert named_without_flow(module, torch.zeros(1, 4, 4)) == [f"'2' ({name})"]


def test_layers_without_flow__called_by_the_module_itself() -> None:
    class Net(models.MLP):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(super().forward(x))

    assert named_without_flow(Net(4, 3), torch.zeros(1, 4)) == ["`forward` (sigmoid)"]


def test_layers_without_flow__attention_is_one_layer() -> None:
    found = named_without_flow(models.Attention().eval(), torch.zeros(1, 16))
    assert found == ["'attention' (multi_head_attention_forward)"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(),
        nn.LeakyReLU(),
        nn.PReLU(),
        nn.GELU(),
        nn.SiLU(),
        nn.Hardswish(),
        nn.BatchNorm1d(4),
        nn.Dropout(),
        nn.MaxPool1d(2),
        nn.AvgPool1d(2),
        nn.Identity(),
    ],
    ids=str,
)
def test_layers_without_flow__none(layer: nn.Module) -> None:
    assert named_without_flow(nn.Sequential(nn.Linear(4, 4), layer).eval(), torch.zeros(1, 4, 4)) == []


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def by_var_mean(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


WRITTEN_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": rms,
    "unit_length": lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6),
    "layer_norm": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
    "standardised": lambda x: (x - x.mean()) / x.std(),
    "softmax": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    "stable_softmax": lambda x: (x - x.amax(-1, keepdim=True)).exp() / x.exp().sum(-1, keepdim=True),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "layer_norm_by_var_mean": by_var_mean,
    "clamp": lambda x: x.clamp(0, 6),
    "in_place": lambda x: x.clone().div_(x.abs().sum(-1, keepdim=True)),
}


@pytest.mark.parametrize("function", WRITTEN_OUT.values(), ids=WRITTEN_OUT)
@pytest.mark.parametrize("place", ["before_a_layer", "at_the_end", "before_a_convolution"])
def test_layers_without_flow__written_out(function: Callable[[Tensor], Tensor], place: str) -> None:
    after = {"before_a_layer": [nn.Linear(4, 3)], "at_the_end": [], "before_a_convolution": [nn.Conv1d(4, 3, 1)]}[place]
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(Calls(function), nn.Dropout()), *after).eval()
    assert named_without_flow(module, torch.zeros(1, 4, 4)) == ["'2.0' (Calls)"]


def test_layers_without_flow__softmax_by_logsumexp() -> None:
    module = nn.Sequential(nn.Linear(4, 4), Calls(lambda x: (x - x.logsumexp(-1, keepdim=True)).exp()))
    assert named_without_flow(module, torch.zeros(1, 4)) == ["'1' (logsumexp)"]


def test_layers_without_flow__written_out_in_a_branch() -> None:
    """The block grows by its shortcut, but its layer does not get what grows; each call of it is named."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(rms(x))

    block = Block()
    assert named_without_flow(nn.Sequential(block, nn.ReLU(), block), torch.zeros(1, 4)) == ["'0' (Block)"] * 2
    assert named_without_flow(block, torch.zeros(1, 4)) == ["`forward` (Block)"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
        lambda x: x / (1 + torch.exp(-x)),
        lambda x: F.silu(x) * x,
        lambda x: torch.cat([x, x.relu() + 1], -1)[..., 1:5],
        lambda x: x * x.sum(-1, keepdim=True) / x.norm(dim=-1, keepdim=True),
        lambda x: F.interpolate(x, size=4) + x.mean(),
        lambda x: x.square().sqrt(),
        lambda x: x.clamp(min=0),
    ],
    ids=["gelu", "silu", "swiglu", "moved", "gain", "resized", "root_of_square", "relu"],
)
def test_layers_without_flow__written_out_with_flow(function: Callable[[Tensor], Tensor]) -> None:
    module = nn.Sequential(nn.Linear(4, 4), Calls(function), nn.Linear(4, 3))
    assert named_without_flow(module, torch.zeros(1, 4, 4)) == []


# --- parts that run again in the backward pass


class Checkpointed(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.body, self.head, self.settings = models.MLP(4, 6, 5), nn.Linear(5, 3), settings

    def forward(self, x: Tensor) -> Tensor:
        if not self.settings:
            return self.head(self.body(x))  # type: ignore[no-any-return]
        return self.head(checkpoint(self.body, x.requires_grad_(), **self.settings))  # type: ignore[no-any-return]


def by_parts(module: Any, batch: Tensor) -> Tensor:
    """Runs nothing that has a submodule around the checkpointed part."""
    return module.head(checkpoint(module.body, batch, use_reentrant=False)).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", [SNIP(), SynFlow(rounds=3)], ids=["snip", "synflow"])
@pytest.mark.parametrize("loss_fn", [lambda module, x: module(x).square().mean(), by_parts], ids=["forward", "parts"])
def test_checkpointed_parts(loss_fn: Any, method: Any) -> None:
    """They are followed as if they were not."""
    found = []
    for settings in ({}, {"use_reentrant": False}):
        torch.manual_seed(0)
        module = Checkpointed(**settings)
        x = torch.randn(2, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            masks = find_masks(module, method, sparsity=0.6, batches=[x], loss_fn=loss_fn)
        found.append((masks, paths.active_masks(module, masks, x)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][0])


def test_checkpointed_parts__without_gradients() -> None:
    module, x = Checkpointed(use_reentrant=True), torch.randn(2, 4)
    masks = Masks({"head.weight": torch.ones(3, 5, dtype=torch.bool)})
    with pytest.raises(ValueError, match="Set `use_reentrant=False`"):
        paths.active_masks(module, masks, x)
    with pytest.raises(ValueError, match="Set `use_reentrant=False`"):
        synflow.SynapticFlow(module, prunable.prunable_parameters(module)).gradients(x.double())


# --- active weights


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("density", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("sizes", [(4, 3), (3, 5, 2), (4, 6, 6, 5, 3), (2, 3, 3, 3, 3, 3, 2)], ids=str)
def test_active_masks__matches_reachability(seed: int, density: float, sizes: Sequence[int]) -> None:
    module = models.MLP(*sizes)
    masks = random_masks(module, density, seed)
    expected = reference.active_weights([mask.int().tolist() for mask in masks.values()])
    found = paths.active_masks(module, masks, torch.zeros(1, sizes[0]))
    assert [mask.int().tolist() for mask in found.values()] == expected


@EACH_NETWORK
def test_active_masks__dense(network: str) -> None:
    module, shape = build(network)
    masks = dense_masks(module)
    assert all(mask.all() for mask in paths.active_masks(module, masks, torch.zeros(1, *shape)).values())


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
def test_active_masks__dense_kernels_that_are_computed(compute: Callable[[Tensor], Tensor]) -> None:
    """Equal numbers in place of their weights would be 0 less their mean."""
    module, mask = Computing(compute), torch.ones(3, 8, dtype=torch.bool)
    mask[:, 5] = False
    found = paths.active_masks(module, {"head.weight": mask}, torch.zeros(1, 2, 6, 6))
    assert torch.equal(found["head.weight"], mask)


def test_active_masks__cut_channel() -> None:
    """The second conv no longer hears channel 1, and nobody listens to channel 3."""
    module, shape = build("conv_net")
    masks = dense_masks(module)
    masks["conv1.weight"][1] = False
    masks["conv2.weight"][:, 3] = False
    expected = {name: mask.clone() for name, mask in masks.items()}
    expected["conv1.weight"][3] = False
    expected["conv2.weight"][:, 1] = False
    found = paths.active_masks(module, masks, torch.zeros(1, *shape))
    assert all(found[name].equal(expected[name]) for name in masks)


def test_active_masks__cut_channel_of_a_residual_net() -> None:
    """What block1.conv2 does not give to channel 2, the shortcut still does: nothing after it is lost."""
    module, shape = build("residual_net")
    masks = dense_masks(module)
    masks["block1.conv2.weight"][2] = False
    found = paths.active_masks(module, masks, torch.zeros(1, *shape))
    assert all(found[name].equal(masks[name]) for name in masks)
    masks["block1.shortcut.0.weight"][2] = False
    found = paths.active_masks(module, masks, torch.zeros(1, *shape))
    assert not found["block2.conv1.weight"][:, 2].any()
    assert not found["block2.shortcut.0.weight"][:, 2].any()
    assert found["block2.conv1.weight"][:, [0, 1, 3]].all()


def test_active_masks__taps_that_see_only_padding() -> None:
    module = nn.Conv2d(1, 1, 3, padding=1)
    masks = {"weight": torch.ones(1, 1, 3, 3, dtype=torch.bool)}
    found = paths.active_masks(module, masks, torch.zeros(1, 1, 1, 1))
    assert found["weight"].int().tolist() == [[[[0, 0, 0], [0, 1, 0], [0, 0, 0]]]]


def test_active_masks__biases_carry_nothing() -> None:
    module = models.MLP(3, 3, 2)
    masks = dense_masks(module) | {"0.weight": torch.zeros(3, 3, dtype=torch.bool)}
    assert active_counts(module, masks, torch.zeros(1, 3)) == {"0.weight": 0, "2.weight": 0}


def test_active_masks__weights_without_a_mask_carry_all() -> None:
    module = models.MLP(3, 3, 2)
    assert active_counts(module, {"2.weight": dense_masks(module)["2.weight"]}, torch.zeros(1, 3)) == {"2.weight": 6}


def test_active_masks__values_do_not_matter() -> None:
    """Masks alone decide: zero, negative and NaN weights lie on paths too."""
    module, shape = build("conv_net")
    masks = random_masks(module, 0.4, seed=3)
    expected = paths.active_masks(module, masks, torch.zeros(1, *shape))
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.fill_([0.0, -1.0, float("nan")][i % 3])
    found = paths.active_masks(module, masks, torch.zeros(1, *shape))
    assert all(found[name].equal(expected[name]) for name in masks)


@EACH_NETWORK
def test_active_masks__leaves_the_module_alone(network: str) -> None:
    module, shape = build(network)
    masks = random_masks(module, 0.5, seed=0)
    copies = {name: mask.clone() for name, mask in masks.items()}
    before = models.fingerprint(module)
    with torch.no_grad():
        paths.active_masks(module, masks, torch.zeros(1, *shape))
    assert models.changes(module, before) == []
    assert all(masks[name].equal(copies[name]) for name in masks)


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
def test_active_masks__deep(make: Callable[[], nn.Module]) -> None:
    """8 ** 200 paths would overflow and (1 / 8) ** 200 underflow float32; every weight is on some."""
    module = make()
    assert sum(active_counts(module, dense_masks(module), torch.zeros(1, 8)).values()) == 200 * 64


@pytest.mark.parametrize("seed", range(3))
def test_active_masks__deep_with_gaps(seed: int) -> None:
    """Infinity times a pruned weight would be NaN, forwards as well as backwards."""
    module = models.MLP(*[8] * 201)
    masks = random_masks(module, 0.6, seed)
    expected = reference.active_weights([mask.int().tolist() for mask in masks.values()])
    found = paths.active_masks(module, masks, torch.zeros(1, 8))
    assert [mask.int().tolist() for mask in found.values()] == expected


def test_active_masks__deep_and_thin() -> None:
    """One path of 200 weights; then it is cut in the middle."""
    module = models.MLP(*[8] * 201)
    masks = {name: torch.zeros(8, 8, dtype=torch.bool) for name in dense_masks(module)}
    for mask in masks.values():
        mask[3, 3] = True
    assert sum(active_counts(module, masks, torch.zeros(1, 8)).values()) == 200
    masks["200.weight"][3, 3] = False
    assert sum(active_counts(module, masks, torch.zeros(1, 8)).values()) == 0


# Every element-wise activation, norm and Dropout of torch.nn lets everything through.
ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(), nn.PReLU(), nn.RReLU(), nn.ELU(), nn.SELU(), nn.CELU()),
    *(nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.ReLU6(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Sigmoid()),
    *(nn.Tanh(), nn.Softsign(), nn.Softplus(), nn.LogSigmoid(), nn.Tanhshrink(), nn.Softshrink(), nn.Hardshrink()),
    *(nn.Threshold(1.0, 0.0), nn.Softmax(-1), nn.LogSoftmax(-1), nn.Softmin(-1)),
    *(nn.BatchNorm1d(6), nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.RMSNorm(6), nn.Dropout(), nn.AlphaDropout()),
    *(Calls(lambda x: x.relu()), Calls(lambda x: x.relu_()), Calls(lambda x: x.tanh()), Calls(torch.sigmoid)),
]


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
def test_active_masks__passed_through(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 3)).eval()
    assert active_counts(module, dense_masks(module), torch.zeros(1, 4)) == {"0.weight": 24, "2.weight": 18}


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: -x, id="sign"),
        pytest.param(lambda x: -2 * x, id="negative_factor"),
        pytest.param(lambda x: x / -2, id="negative_divisor"),
        pytest.param(lambda x: 1 - x, id="one_minus"),
        pytest.param(lambda x: x - 2, id="offset"),
        pytest.param(lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt(), id="norm"),
        pytest.param(lambda x: x.clamp(0, 0.5), id="clamp"),
    ],
)
def test_active_masks__arithmetic(function: Callable[[Tensor], Tensor]) -> None:
    """Subtraction and a hand-written norm pass signals on, whatever their sign."""
    module = nn.Sequential(nn.Linear(4, 6), Calls(function), nn.Linear(6, 3))
    assert active_counts(module, dense_masks(module), torch.zeros(1, 4)) == {"0.weight": 24, "2.weight": 18}


def in_place(operation: str, other: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: getattr(x, operation)(other)


@pytest.mark.parametrize("operation", ["sub_", "add_", "mul_", "div_", "__isub__", "__iadd__", "__imul__", "relu_"])
@pytest.mark.parametrize("place", ["input", "token_embedding", "hidden"])
def test_active_masks__in_place(operation: str, place: str) -> None:
    """Changing the input, an embedding or a hidden layer in place is nothing special."""
    change = nn.ReLU(inplace=True) if operation == "relu_" else Calls(in_place(operation, torch.tensor(2.0)))
    before = {"input": [], "token_embedding": [nn.Embedding(5, 4)], "hidden": [nn.Linear(4, 4), nn.ReLU()]}[place]
    module = nn.Sequential(*before, change, nn.Linear(4, 3))
    masks = dense_masks(module)
    example_input = torch.tensor([1, 2]) if place == "token_embedding" else torch.zeros(1, 4)
    assert all(mask.all() for mask in paths.active_masks(module, masks, example_input).values())


def test_active_masks__input_normalisation() -> None:
    """Images in 0..255 are often normalised by buffers inside the model: 1 - 127.5 is not "nothing"."""

    class Net(models.MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x - self.mean) / self.std)

    module = Net(4, 6, 3)
    module.register_buffer("mean", torch.tensor(127.5))
    module.register_buffer("std", torch.tensor(64.0))
    assert active_counts(module, dense_masks(module), torch.zeros(1, 4)) == {"0.weight": 24, "2.weight": 18}


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "MaxPool2d": nn.MaxPool2d(2),
    "MaxPool2d_overlapping": nn.MaxPool2d(3, 2, 1),
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "F.max_pool2d_keywords": lambda x: F.max_pool2d(input=x, kernel_size=2, stride=2),
    "F.max_pool2d_indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(2),
    "F.adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "AvgPool2d": nn.AvgPool2d(2),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(2),
    "amax": lambda x: x.amax((2, 3), keepdim=True),
    "max": lambda x: x.flatten(2).max(-1).values[..., None, None],
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_active_masks__pooling(pool: Callable[[Tensor], Tensor]) -> None:
    """With a full window each tap of the 3x3 convolution sees pixels; with only one position some see padding."""
    module = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Calls(pool), nn.Conv2d(2, 2, 1))
    assert active_counts(module, dense_masks(module), torch.zeros(1, 1, 2, 2)) == {"0.weight": 18, "2.weight": 4}


def test_active_masks__adaptive_max_pooling_of_a_window() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveMaxPool2d(1), nn.Conv2d(2, 2, 1))
    assert active_counts(module, dense_masks(module), torch.zeros(1, 1, 2, 2)) == {"0.weight": 18, "2.weight": 4}


def attention_masks() -> dict[str, Tensor]:
    return dense_masks(models.Attention())


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        pytest.param([], [], (48, 16, 12), id="dense"),
        # Values are rows 8..11: without them nothing passes, and queries and keys have nothing to weigh.
        pytest.param([8, 9, 10, 11], [], (0, 0, 0), id="no_values"),
        # Queries are rows 0..3: without them the weights are uniform, keys do not matter, values still pass.
        pytest.param([0, 1, 2, 3], [], (16, 16, 12), id="no_queries"),
        pytest.param([4, 5, 6, 7], [], (16, 16, 12), id="no_keys"),
        # Head 0 is rows 0, 1, 4, 5, 8, 9 and the first two columns of out_proj.
        pytest.param([8, 9], [], (24, 8, 12), id="no_values_in_head_0"),
        pytest.param([], [0, 1], (24, 8, 12), id="head_0_unheard"),
    ],
)
def test_active_masks__attention(rows: list[int], columns: list[int], expected: tuple[int, ...]) -> None:
    masks = attention_masks()
    masks["attention.in_proj_weight"][rows] = False
    masks["attention.out_proj.weight"][:, columns] = False
    assert tuple(active_counts(models.Attention().eval(), masks, torch.zeros(1, 16)).values()) == expected


class AttentionByHand(nn.Module):
    """softmax(QK)V, written out; causal: no token sees a later one."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        similarity = self.q(x) @ self.k(x).mT / 2
        if self.causal:
            later = torch.ones(similarity.shape[-2:], dtype=torch.bool).triu(1)
            similarity = similarity.masked_fill(later, float("-inf"))
        return torch.softmax(similarity, -1) @ self.v(x)


@pytest.mark.parametrize(
    ("pruned", "expected"),
    [(None, (16, 16, 16)), ("v", (0, 0, 0)), ("q", (0, 0, 16)), ("k", (0, 0, 16))],
    ids=["dense", "no_values", "no_queries", "no_keys"],
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_active_masks__attention_by_hand(causal: bool, pruned: str | None, expected: tuple[int, ...]) -> None:
    """As for the layer: without queries or keys the weights are uniform, and values still pass."""
    module = AttentionByHand(causal)
    masks = {name: mask.fill_(name[0] != pruned) for name, mask in dense_masks(module).items()}
    assert tuple(active_counts(module, masks, torch.zeros(1, 3, 4)).values()) == expected


class Gated(nn.Module):
    """A squeeze-and-excitation gate: what passes is multiplied by sigmoid(gate)."""

    def __init__(self, squash: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.squash = squash

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden * self.squash(self.gate(hidden)))


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "Sigmoid": nn.Sigmoid(),
    "hardsigmoid": F.hardsigmoid,
    "softplus": F.softplus,
    # as squeeze-and-excitation layers bring one number per channel to the shape of the image
    "reshaped": lambda x: torch.sigmoid(x).view(len(x), -1, 1).expand(-1, -1, 2)[..., 0],
    "scaled": lambda x: 2 * torch.sigmoid(x),
}


@pytest.mark.parametrize("squash", GATES.values(), ids=GATES)
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned_gate"])
def test_active_masks__gate(squash: Callable[[Tensor], Tensor], pruned: bool) -> None:
    """A gate without weights stands half open; it does not cut the network off."""
    module = Gated(squash)
    masks = dense_masks(module)
    masks["gate.weight"].fill_(not pruned)
    expected = {"first.weight": 24, "gate.weight": 0 if pruned else 36, "last.weight": 18}
    assert active_counts(module, masks, torch.zeros(1, 4)) == expected


def test_active_masks__gate_in_place() -> None:
    class Net(Gated):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            passed = hidden.clone()
            passed *= torch.sigmoid(self.gate(hidden))
            return self.last(passed)

    module = Net(torch.sigmoid)
    expected = {"first.weight": 24, "gate.weight": 36, "last.weight": 18}
    assert active_counts(module, dense_masks(module), torch.zeros(1, 4)) == expected


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.recurrent, self.last = nn.Linear(4, 64), kind(64, 64, batch_first=True), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(self.first(x))[0])


RECURRENT: dict[str, Callable[..., nn.RNNBase]] = {
    "rnn": nn.RNN,
    "relu": partial(nn.RNN, nonlinearity="relu", num_layers=2),
    "gru": partial(nn.GRU, batch_first=True),
    "gru_both_ways": partial(nn.GRU, bidirectional=True, num_layers=2),
    "lstm": nn.LSTM,
    "lstm_both_ways": partial(nn.LSTM, bidirectional=True, num_layers=2, batch_first=True),
    "lstm_projected": partial(nn.LSTM, proj_size=2),
}


class Remembers(nn.Module):
    """A recurrent layer, without biases, and a linear one."""

    def __init__(self, make: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = make(3, 4, bias=False)
        ways = 1 + self.recurrent.bidirectional
        self.last = nn.Linear(ways * (self.recurrent.proj_size or 4), 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(x)[0])


class RemembersByCells(Remembers):
    """The same, written as a loop of cells."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__(nn.RNN)
        self.recurrent = cell(3, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x:
            state = self.recurrent(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return self.last(torch.stack(outputs))


class RemembersPacked(Remembers):
    """The same for sequences of different lengths."""

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, [len(x)] * x.shape[1])
        outputs, last = self.recurrent(packed)
        last = last[0] if isinstance(last, tuple) else last
        return self.last(pad_packed_sequence(outputs)[0]) + 0 * last.sum()


def weights_that_matter(module: nn.Module, masks: dict[str, Tensor], example_input: Tensor) -> dict[str, Tensor]:
    """Find kept weights on which the output of a network of positive numbers, without biases, depends."""
    module = copy.deepcopy(module).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.rand_like(parameter) * 0.5 + 0.3).mul_(masks[name])
    outputs = module(example_input.double() + torch.rand(example_input.shape, dtype=torch.float64))
    gradients = torch.autograd.grad(outputs.sum(), list(module.parameters()), materialize_grads=True)
    return {name: (gradient != 0) & masks[name] for name, gradient in zip(masks, gradients, strict=True)}


@pytest.mark.parametrize("density", [0.15, 0.3, 0.6])
@pytest.mark.parametrize(
    "make",
    [
        *(partial(Remembers, make) for make in RECURRENT.values()),
        *(partial(RemembersByCells, cell) for cell in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)),
        *(partial(RemembersPacked, make) for make in (nn.RNN, nn.GRU, nn.LSTM)),
    ],
    ids=[*RECURRENT, "rnn_cell", "gru_cell", "lstm_cell", "rnn_packed", "gru_packed", "lstm_packed"],
)
def test_active_masks__recurrent(make: Callable[[], nn.Module], density: float) -> None:
    """The example has one step: weights between steps matter in sequences that are longer."""
    for seed in range(4):
        torch.manual_seed(seed)
        module = make()
        masks = {name: torch.rand(value.shape) < density for name, value in module.named_parameters()}
        first = (1, 1, 3)
        expected = weights_that_matter(module, masks, torch.zeros(12, *first[1:]))
        if getattr(module.recurrent, "batch_first", False):
            expected = weights_that_matter(module, masks, torch.zeros(1, 12, 3))
        found = paths.active_masks(module, masks, torch.zeros(first))
        assert all(found[name].equal(expected[name]) for name in masks)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("is_biased", [False, True])
def test_active_masks__recurrent_gates(kind: type[nn.RNNBase], is_biased: bool) -> None:
    """A gate alone lets nothing in, but if a bias holds what it opens."""
    module = nn.ModuleDict({"recurrent": kind(2, 2, bias=is_biased)})
    module.forward = lambda x: module["recurrent"](x)[0]
    masks = {
        name: torch.ones_like(value, dtype=torch.bool) for name, value in module.named_parameters() if "weight" in name
    }
    if kind is nn.RNN:
        masks["recurrent.weight_ih_l0"][:] = False
        assert set(active_counts(module, masks, torch.zeros(1, 1, 2)).values()) == {0}
        return
    new = slice(4, 6)  # of the gates of both layers, the one that is no gate: g of an LSTM, n of a GRU
    for mask in masks.values():
        mask[new] = False
    found = active_counts(module, masks, torch.zeros(1, 1, 2))
    assert any(found.values()) == is_biased


def test_active_masks__recurrent_between_others() -> None:
    module = Recurrent(nn.LSTM)
    masks = {
        name: torch.ones_like(value, dtype=torch.bool) for name, value in module.named_parameters() if value.ndim > 1
    }
    assert all(mask.all() for mask in paths.active_masks(module, masks, torch.zeros(1, 5, 4)).values())
    masks["first.weight"][:] = False
    assert not any(mask.any() for mask in paths.active_masks(module, masks, torch.zeros(1, 5, 4)).values())


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
def test_active_masks__dense_is_all_active(module: nn.Module, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        inner, module, shape = nn.Linear(4, 3), module, (1, 4)
        module.inner, module.function = inner, lambda x: {"a": [inner(x)], "b": 3}
    module.eval()(torch.zeros(shape))
    masks = dense_masks(module)
    assert all(mask.all() for mask in paths.active_masks(module, masks, torch.zeros(shape)).values())


def test_active_masks__token_ids() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    assert active_counts(module, dense_masks(module), torch.tensor([[0, 4, 2]])) == {"1.weight": 12}


def test_active_masks__not_a_network_error() -> None:
    module = nn.Linear(4, 3)
    module.forward = lambda x: "text"
    with pytest.raises(ValueError, match="must return at least one floating-point tensor, got str"):
        paths.active_masks(module, dense_masks(module), torch.zeros(1, 4))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_active_masks__computed_weight(sign: float) -> None:
    """A weight without a mask carries everything, also where it is computed and happens to be negative."""
    net = nn.Sequential(nn.Linear(3, 4), spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2)).eval()
    normalised = net[1].parametrizations.weight[0]
    normalised._u.fill_(0.5)
    normalised._v.fill_(0.5 * sign)
    masks = {"0.weight": torch.rand(4, 3) < 0.7, "2.weight": torch.tensor([[True, False, True, True], [False] * 4])}
    masks["0.weight"][:, 0] = True
    assert torch.equal(paths.active_masks(net, masks, torch.ones(1, 3))["0.weight"], masks["0.weight"])


class Positive(nn.Module):
    """A function between two linear layers without biases."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def attention(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Attention by hand, with a change to its scores, given the places that come later."""

    def function(x: Tensor) -> Tensor:
        scores = x @ x.mT
        return torch.softmax(change(scores, torch.ones_like(scores).triu(1) > 0), -1) @ x

    return function


def rotary(x: Tensor) -> Tensor:
    angles = torch.arange(1, x.shape[-2] + 1).to(x)[:, None] * torch.tensor([1.0, 2.0, 3.0] * 2).to(x)
    return x * angles.cos() + torch.cat([-x[..., 3:], x[..., :3]], -1) * angles.sin()


def written(x: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    result[:, ::2], result[:, 1] = x[:, ::2], x[:, 0]
    return result


PLACES = torch.tensor([1, 0, 1, 2, 0])
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotary": rotary,
    "masked_fill": attention(lambda scores, later: scores.masked_fill(later, float("-inf"))),
    "masked_fill_": attention(lambda scores, later: scores.masked_fill_(later, -1e9)),
    "added_mask": attention(lambda scores, later: scores + later.to(scores) * torch.finfo(torch.float32).min),
    "where_mask": attention(lambda scores, later: scores.where(~later, float("-inf"))),
    "roll": lambda x: x.roll(1, -1),
    "cumsum": lambda x: x.cumsum(-1),
    "cumprod": lambda x: x.cumprod(-1),
    "norm": lambda x: x.norm(dim=-1, keepdim=True).expand(-1, -1, 6),
    "var": lambda x: x.var(-1, keepdim=True).expand(-1, -1, 6),
    "std": lambda x: x.std(1, keepdim=True).expand(-1, 5, -1),
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True).expand(-1, -1, 6),
    "sin": torch.sin,
    "index_select": lambda x: x.index_select(-1, torch.tensor([5, 4, 3, 0, 0, 1])),
    "index_add": lambda x: torch.zeros_like(x).index_add(1, PLACES, x),
    "scatter_reduce": lambda x: torch.zeros_like(x).scatter_reduce(1, PLACES.view(1, 5, 1).expand_as(x), x, "mean"),
    "setitem": written,
    "fft": lambda x: torch.fft.rfft(x, dim=-1).abs()[..., [0, 1, 2, 3, 1, 2]],
    "fft_and_back": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * (1 + 2j), n=5, dim=1),
    "fnet": lambda x: torch.fft.fft2(x).real,
    "complex_pairs": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * (1 + 2j)).flatten(2),
    "resized": lambda x: F.interpolate(x, size=6, mode="linear"),
    "folded": lambda x: F.fold(F.unfold(x.unsqueeze(1), (2, 6)), (5, 6), (2, 6)).squeeze(1),
    "circular": lambda x: F.pad(x, (1, 1), mode="circular")[..., :6],
    "distances": lambda x: torch.cdist(x, x.flip(1) * 0.5)[..., [0, 1, 2, 3, 4, 0]],
    "einsum": lambda x: torch.einsum("btc,bsc->bts", x, x) @ x,
    "glu": lambda x: F.glu(torch.cat([x, x], -1)),
    "product": lambda x: x.prod(-1, keepdim=True) * x,
    "chunks": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "lerp": lambda x: torch.lerp(x, x.flip(1), 0.3),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x,
    "cosine": lambda x: F.cosine_similarity(x, x.flip(1), dim=-1).unsqueeze(-1) * x,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_active_masks__functions(function: Callable[[Tensor], Tensor]) -> None:
    """A signal passes a function wherever its result changes with its argument."""
    for seed, density in enumerate((0.25, 0.4, 0.6, 2.0)):
        torch.manual_seed(seed)
        module = Positive(function)
        masks = random_masks(module, density, seed)
        example_input = torch.zeros(1, 5, 4)
        many = [weights_that_matter(module, masks, example_input) for _ in range(2)]
        found = paths.active_masks(module, masks, example_input)
        assert all(found[name].equal(many[0][name] | many[1][name]) for name in masks)


def untrained(x: Tensor) -> Tensor:
    with torch.no_grad():
        return 2 * x


@pytest.mark.parametrize(
    "function",
    [
        *(lambda x: torch.where(x > 1, x, 0.1 * x), lambda x: x * (x > 0), lambda x: x * (x < 0).float()),
        *(lambda x: x.masked_fill(~(x > 0), 0), lambda x: torch.max(x, x.flip(1)), lambda x: x.detach(), untrained),
        *(lambda x: x.topk(5, 1).values, lambda x: x.sort(1).values, lambda x: x.amin(1, keepdim=True)),
        *(lambda x: x.median(1, keepdim=True).values, lambda x: x.kthvalue(1, 1, True)[0]),
        lambda x: x + (x.round() - x).detach(),
        lambda x: F.max_pool1d(x.mT, 2, 1, 1, 2).mT,
        lambda x: F.max_pool1d(x.mT, 2, return_indices=True)[0].mT,
        lambda x: torch.zeros_like(x).scatter_reduce(1, PLACES.view(1, 5, 1).expand_as(x), x, "amax"),
    ],
)
def test_active_masks__chosen_by_value(function: Callable[[Tensor], Tensor]) -> None:
    """What is chosen depends on values, which paths do not have: all of it may be."""
    module = Positive(function)
    masks = dense_masks(module)
    assert all(mask.all() for mask in paths.active_masks(module, masks, torch.zeros(1, 5, 4)).values())
    masks["first.weight"][2] = False
    masks["last.weight"][:, 4] = False
    found = paths.active_masks(module, masks, torch.zeros(1, 5, 4))
    assert not found["first.weight"][4].any()


class Experts(nn.Module):
    """A mixture of experts, of which each token uses two."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = torch.topk(torch.softmax(self.router(tokens), -1), 2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.dense:
            gates = (F.one_hot(chosen, 3) * weights.unsqueeze(-1)).sum(1)
            return sum(gates[:, [i]] * expert(tokens) for i, expert in enumerate(self.experts))
        outputs = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == i)
            outputs.index_add_(0, rows, expert(tokens[rows]) * weights[rows, places, None])
        return outputs


@pytest.mark.parametrize("dense", [False, True])
def test_active_masks__experts(dense: bool) -> None:
    """Experts are used in turn; without a router, they still are."""
    module = Experts(dense)
    masks = dense_masks(module)
    assert all(mask.all() for mask in paths.active_masks(module, masks, torch.zeros(1, 6, 4)).values())
    masks["router.weight"][:] = False
    found = paths.active_masks(module, masks, torch.zeros(1, 6, 4))
    assert all(found[f"experts.{i}.weight"].all() for i in range(3))


class Grouped(nn.Module):
    """Attention whose keys and values have fewer heads than its queries."""

    def __init__(self, kv_heads: int, by: str) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 2 * kv_heads), nn.Linear(8, 2 * kv_heads)
        self.out, self.by = nn.Linear(8, 8), by

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        groups = q.shape[1] // k.shape[1]
        if self.by == "torch":
            mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            if self.by == "expand":
                k, v = (each.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for each in (k, v))
            else:
                k, v = (each.repeat_interleave(groups, 1) for each in (k, v))
            mixed = torch.softmax(q @ k.mT / 2**0.5, -1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("by", ["torch", "expand", "repeat"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_active_masks__grouped_queries(kv_heads: int, by: str) -> None:
    module = Grouped(kv_heads, by)
    masks = dense_masks(module)
    assert all(mask.all() for mask in paths.active_masks(module, masks, torch.zeros(1, 3, 8)).values())
    masks["v.weight"][:2] = False  # the first head of values
    found = paths.active_masks(module, masks, torch.zeros(1, 3, 8))
    served = 8 // kv_heads
    assert not found["out.weight"][:, :served].any()
    assert not found["q.weight"][:served].any()
    assert not found["k.weight"][:2].any()
    assert all(found[name][start:].all() for name, start in (("q.weight", served), ("k.weight", 2), ("v.weight", 2)))


def test_active_masks__weights_of_attention_are_used() -> None:
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    module = nn.ModuleDict({"attention": layer, "last": nn.Linear(4, 2)})
    module.forward = lambda x: module["last"](layer(x, x, x)[1] @ x)
    found = paths.active_masks(module.eval(), dense_masks(module), torch.zeros(1, 3, 4))
    assert found["attention.in_proj_weight"].sum(1).tolist() == [4] * 8 + [0] * 4


class Positions(nn.Module):
    """Looks up what distances between positions mean, by buckets that are computed from constants, as T5 does."""

    def __init__(self, bucket: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.table = nn.Linear(4, 4), nn.Linear(4, 2), nn.Embedding(3, 1)
        self.bucket = bucket

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        distances = self.bucket((places[:, None] - places[None]).abs().float()).long()
        hidden = self.first(x)
        return self.last(hidden + self.table(distances).mean() * hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "bucket",
    [
        lambda x: (1 + x).log().clamp(max=2.5),
        lambda x: 2 * torch.tanh(x),
        lambda x: F.threshold(-x, -3, -3).neg().pow(0.5),
        lambda x: x.exp().reciprocal().mul(2),
        lambda x: F.hardtanh(x, 0, 2),
    ],
    ids=["log", "tanh", "pow", "exp", "hardtanh"],
)
def test_active_masks__constants_keep_their_values(bucket: Callable[[Tensor], Tensor]) -> None:
    module = Positions(bucket)
    module(torch.zeros(1, 12, 4))
    masks = dense_masks(module)
    masks["first.weight"][1] = False
    found = paths.active_masks(module, masks, torch.zeros(1, 12, 4))
    assert {name: int(mask.sum()) for name, mask in found.items()} == {"first.weight": 12, "last.weight": 6}


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
def test_active_masks__computed_from_unmasked_weights(compute: Callable[[Tensor], Tensor]) -> None:
    """Weights without a mask carry everything, and so does what is computed from them."""
    module = Weighted(compute)
    masks = dense_masks(module)
    assert all(mask.all() for mask in paths.active_masks(module, masks, torch.zeros(1, 4)).values())


def divided(x: Tensor) -> Tensor:
    values = torch.topk(x, 2, -1).values
    values /= values.sum(-1, keepdim=True)
    return values.sum(-1, keepdim=True) * x


def filled(x: Tensor) -> Tensor:
    values = x.max(-1, keepdim=True).values.clone()
    values[:, 0] *= 2
    return values + x


def matched(x: Tensor) -> Tensor:
    return x[:, x[0].detach().numpy().argsort(0)[:, 0].copy()]


def located(x: Tensor) -> Tensor:
    rows, places = torch.where(x.sum(-1) > -1)
    return x[rows, places][None]


def gathered(x: Tensor) -> Tensor:
    values = x.gather(1, x.argmax(1, keepdim=True))
    values += 1
    return values + x


@pytest.mark.parametrize("function", [divided, filled, matched, located, gathered])
def test_active_masks__chosen_values_are_written_to(function: Callable[[Tensor], Tensor]) -> None:
    """As routers of experts, and matchers of boxes, do."""
    module = nn.Sequential(nn.Linear(4, 4), Calls(function), nn.Linear(4, 2))
    masks = dense_masks(module)
    assert all(mask.all() for mask in paths.active_masks(module, masks, torch.zeros(1, 3, 4)).values())


class Between(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6, dtype=dtype), nn.Linear(6, 3, dtype=dtype)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def _padded(x: Tensor) -> Tensor:
    whole = torch.zeros(x.shape, dtype=torch.get_default_dtype())
    whole[:, :5] = x[:, 1:]
    return whole


CONVERSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "written into a new tensor": _padded,
    "multiplied with a new matrix": lambda x: x @ torch.ones(6, 6, dtype=torch.get_default_dtype()),
    "converted": lambda x: x.to(torch.get_default_dtype()),
    "in bfloat16": lambda x: x.bfloat16(),
    "in float32": lambda x: x.float(),
}


@pytest.mark.parametrize("between", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constants_and_conversions_in_forward(between: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """What `forward` makes or converts has the precision of what is sent through, whatever that is."""
    module = Between(between, dtype)
    masks = dense_masks(module)
    torch.set_default_dtype(dtype)
    try:
        active = paths.active_masks(module, masks, torch.zeros(1, 4))
        found, total = synflow.SynapticFlow(module, dict(module.named_parameters())).gradients(torch.zeros(1, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    num_unused = 4 if between is _padded else 0
    assert sum(int(mask.logical_not().sum()) for mask in active.values()) == num_unused + 3 * bool(num_unused)
    assert total > 0
    assert {gradient.dtype for gradient in found.values()} == {torch.float64}


@pytest.mark.parametrize("times", [1, 2])
def test_active_masks__vmap(times: int) -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            layer: Any = self.first
            for _ in range(times):
                layer = torch.vmap(layer)
            return self.second(layer(x).relu())

    module = Mapped()
    masks = dense_masks(module)
    masks["first.weight"][2] = False
    active = paths.active_masks(module, masks, torch.zeros(2, 5, 4))
    assert not active["second.weight"][:, 2].any()
    assert int(active["second.weight"].sum()) == 15


@pytest.mark.parametrize(
    ("function", "name"),
    [(torch.linalg.inv, "linalg_inv"), (torch.linalg.cholesky, "linalg_cholesky"), (torch.inverse, "inverse")],
    ids=["inv", "cholesky", "inverse"],
)
def test_active_masks__names_what_cannot_be_followed(function: Any, name: str) -> None:
    module = Between(lambda x: function(x.mT @ x + torch.eye(6)) @ x.mT, torch.float32)
    with pytest.raises(RuntimeError, match=f"^in `{name}`: "):
        paths.active_masks(module, dense_masks(module), torch.zeros(3, 4))


def test_errors_of_torch_are_cut_short() -> None:
    """Torch lists all its backends where an operation has no kernel, on a hundred lines."""
    text = "Could not run 'aten::x'. " + "It is available for: [CPU]. " * 50 + "\nregistered at a.cpp\n" * 100

    def fail(x: Tensor) -> Tensor:
        raise NotImplementedError(text)

    module = Between(fail, torch.float32)
    with pytest.warns(UserWarning, match="paths could not be followed") as caught:
        find_masks(module, Magnitude(), sparsity=0.5, example_input=torch.zeros(1, 4))
    said = [str(each.message) for each in caught]
    assert max(map(len, said)) < 600
    assert "registered" not in " ".join(said)
