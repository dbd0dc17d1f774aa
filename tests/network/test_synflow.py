"""Synaptic flow is that of the paper, and conserved, and computed without touching the network."""

import models
import pytest
import reference
import torch
from followed import EACH_NETWORK, apply, build, random_masks
from torch import Tensor, nn

from lightning_drive.core import scores as formulas
from lightning_drive.network import prunable, synflow

RESIDUAL_CUTS = {
    "stem": ["stem.weight"],
    "block1_early": ["block1.conv1.weight", "block1.shortcut.0.weight"],
    "block1_late": ["block1.conv2.weight", "block1.shortcut.0.weight"],
    "block2_early": ["block2.conv1.weight", "block2.shortcut.0.weight"],
    "block2_late": ["block2.conv2.weight", "block2.shortcut.0.weight"],
    "fc": ["fc.weight"],
}


def flow_scores(module: nn.Module, example_input: Tensor) -> tuple[dict[str, Tensor], float]:
    parameters = prunable.prunable_parameters(module)
    gradients, total = synflow.SynapticFlow(module, parameters).gradients(example_input)
    return {name: formulas.synflow(parameters[name].detach(), gradients[name]) for name in parameters}, total


def test_synaptic_flow__is_that_by_hand() -> None:
    """R = |w| . 1 = 0 + 1 + 2 + 3, the gradient by each |w| is 1."""
    module = models.InnerProduct(4)
    with torch.no_grad():
        module.layer.weight[0, 2] = -2.0
    gradients, total = synflow.SynapticFlow(module, prunable.prunable_parameters(module)).gradients(torch.zeros(7, 4))
    assert total == 6.0
    assert gradients["layer.weight"].tolist() == [[1.0, 1.0, 1.0, 1.0]]


@EACH_NETWORK
@pytest.mark.parametrize("density", [1.5, 0.5], ids=["dense", "masked"])
def test_synaptic_flow__matches_reference(network: str, density: float) -> None:
    module, shape = build(network)
    masks = random_masks(module, density, seed=1)
    expected_total, expected = reference.synflow_flow_and_scores(module, list(masks), masks, shape)
    apply(masks, module)
    scores, total = flow_scores(module, torch.zeros(2, *shape))
    assert total == pytest.approx(expected_total, rel=1e-12)
    for name in masks:
        torch.testing.assert_close(scores[name], expected[name], rtol=1e-12, atol=0)
        assert scores[name].dtype == torch.float64


@pytest.mark.parametrize("network", ["mlp", "plain_conv_net", "conv_net"])
@pytest.mark.parametrize("density", [1.5, 0.5], ids=["dense", "masked"])
def test_synaptic_flow__is_conserved_by_layers(network: str, density: float) -> None:
    module, shape = build(network)
    apply(random_masks(module, density, seed=2), module)
    scores, total = flow_scores(module, torch.zeros(1, *shape))
    assert total > 0
    assert [score.sum().item() for score in scores.values()] == pytest.approx([total] * len(scores), rel=1e-12)


@pytest.mark.parametrize("cut", RESIDUAL_CUTS)
def test_synaptic_flow__is_conserved_by_cuts(cut: str) -> None:
    """Beside a shortcut it is the layers that together separate input from output that carry all of it."""
    module, shape = build("residual_net")
    scores, total = flow_scores(module, torch.zeros(1, *shape))
    assert sum(scores[name].sum().item() for name in RESIDUAL_CUTS[cut]) == pytest.approx(total, rel=1e-12)


def test_synaptic_flow__goes_beyond_float32() -> None:
    module = models.randomised(models.MLP(*[64] * 60))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(8)
    scores, total = flow_scores(module, torch.zeros(1, 64))
    assert torch.finfo(torch.float32).max < total < float("inf")
    assert [score.sum().item() for score in scores.values()] == pytest.approx([total] * 59, rel=1e-9)


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


def test_synaptic_flow__is_zero_in_what_is_unused() -> None:
    module = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    module.forward = lambda x: module["used"](x)
    gradients, total = synflow.SynapticFlow(module, dict(module.named_parameters())).gradients(torch.zeros(1, 2))
    assert gradients["unused.weight"].tolist() == [[0.0, 0.0]]
    module.forward = lambda x: x
    gradients, total = synflow.SynapticFlow(module, dict(module.named_parameters())).gradients(torch.zeros(1, 2))
    assert total == 2.0
    assert gradients["used.weight"].tolist() == [[0.0, 0.0]]
