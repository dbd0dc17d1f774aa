"""Scores are what the papers define, in full precision, one per weight and never negative."""

import models
import pytest
import reference
import torch
from torch import Tensor

from lightning_drive.core import scores

WEIGHT = torch.tensor([[-2.0, 0.5], [0.0, 3.0]])
GRADIENT = torch.tensor([[0.25, 4.0], [7.0, -1.0]])
MASK = torch.tensor([[True, True], [True, False]])


def random_pair(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, 40, 30, generator=generator, dtype=torch.float64).to(dtype)
    return weight, gradient


def test_magnitude() -> None:
    assert scores.magnitude(WEIGHT).tolist() == [[2.0, 0.5], [0.0, 3.0]]


@pytest.mark.parametrize("score", [scores.snip, scores.drive, scores.synflow], ids=["snip", "drive", "synflow"])
def test_gradient_scores(score: object) -> None:
    assert score(WEIGHT, GRADIENT).tolist() == [[0.5, 2.0], [0.0, 3.0]]


def test_drive_three_factor() -> None:
    """Eq. 6, |theta * (theta g) * (m g)|: -2 * -0.5 * 0.25 and 0.5 * 2 * 4; the masked weight scores nothing."""
    assert scores.drive_three_factor(WEIGHT, MASK, GRADIENT).tolist() == [[0.25, 4.0], [0.0, 0.0]]


@pytest.mark.parametrize("seed", range(5))
def test_drive__same_order_as_definition(seed: int) -> None:
    weight, gradient = random_pair(seed)
    definition = scores.drive_three_factor(weight, torch.ones_like(weight), gradient)
    assert scores.drive(weight, gradient).flatten().argsort().equal(definition.flatten().argsort())


@pytest.mark.parametrize("seed", range(3))
def test_drive_three_factor__both_gradients_by_autograd(seed: int) -> None:
    """The chain rule of Eq. 9 and 10, against an explicit mask tensor in a real network."""
    module = models.randomised(models.MLP(4, 6, 3), seed).double()
    names = ["0.weight", "2.weight"]
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(module.get_parameter(name).shape, generator=generator) > 0.4 for name in names}
    batches = models.make_batches(4, seed=seed, dtype=torch.float64)
    thetas, mask_grads, weight_grads = reference.mask_and_weight_gradients(
        module, names, masks, batches[:1], models.loss_fn
    )

    with torch.no_grad():
        for name in names:
            module.get_parameter(name).masked_fill_(~masks[name], 0)
    models.loss_fn(module, batches[0]).backward()
    for name in names:
        metric = (thetas[name] * mask_grads[name] * weight_grads[name]).abs()
        found = scores.drive_three_factor(thetas[name], masks[name], module.get_parameter(name).grad)
        torch.testing.assert_close(found, metric, rtol=1e-12, atol=0)
        assert metric[masks[name]].count_nonzero() > 0


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_scores__precision(dtype: torch.dtype, expected: torch.dtype) -> None:
    """Products are taken after the conversion: in float16 this one would be 0."""
    tiny = torch.tensor([6e-5], dtype=dtype)
    for score in (scores.snip, scores.drive):
        found = score(tiny, tiny)
        assert found.dtype == expected
        assert found.item() == pytest.approx(tiny.item() ** 2, rel=1e-6)
    assert scores.magnitude(tiny).dtype == expected


@pytest.mark.parametrize("score", [scores.snip, scores.drive, scores.synflow], ids=["snip", "drive", "synflow"])
def test_scores__inputs_unchanged(score: object) -> None:
    weight, gradient = (tensor.clone() for tensor in random_pair(0, torch.float32))
    copies = weight.clone(), gradient.clone()
    found = score(weight.requires_grad_(), gradient) if score is not scores.synflow else score(weight, gradient)
    assert not found.requires_grad
    assert weight.equal(copies[0])
    assert gradient.equal(copies[1])


def test_magnitude__is_a_new_tensor() -> None:
    """Masks are found while the scores are alive and the weights are being zeroed."""
    weight = torch.tensor([1.0, 2.0])
    found = scores.magnitude(weight)
    weight.zero_()
    assert found.tolist() == [1.0, 2.0]


def test_synflow__float64() -> None:
    """A float32 weight does not pull the float64 flow down: these would be inf in float32."""
    found = scores.synflow(torch.tensor([2.0]), torch.tensor([1e200], dtype=torch.float64))
    assert found.dtype == torch.float64
    assert found.item() == 2e200


def test_snip_each() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(3, 4), torch.randn(4, dtype=torch.float64), torch.randn(5).bfloat16(), torch.randn(2, 3).t()]
    gradients = [torch.randn_like(each).to(torch.promote_types(each.dtype, torch.float32)) for each in weights]
    expected = [scores.snip(*pair) for pair in zip(weights, gradients, strict=True)]
    scores.snip_each_(weights, gradients)
    assert all(one.equal(other) for one, other in zip(gradients, expected, strict=True))
