r"""The formulas of scores: tensors in, one non-negative score per weight out, higher is kept.

Symbols as in the DRIVE paper: weights :math:`\theta`, keep mask :math:`m`, effective weights
:math:`w = \theta \odot m`, and :math:`g = \partial L / \partial w` on one batch. All scores are computed in float32,
or in float64 where the weights are float64, whatever precision the network trains in.
"""

import torch
from torch import Tensor

_FULL = {torch.float32, torch.float64}


def magnitude(weight: Tensor) -> Tensor:
    r"""Magnitude, :math:`|\theta|`: the criterion of iterative magnitude pruning (Frankle & Carbin, 2019).

    Args:
        weight: Weights of any shape.

    Returns:
        Scores of the same shape and device.

    Examples:
        >>> magnitude(torch.tensor([-2.0, 0.5]))
        tensor([2.0000, 0.5000])

    """
    return in_full(weight).abs()


def snip(weight: Tensor, gradient: Tensor, *, out: Tensor | None = None) -> Tensor:
    r"""Connection sensitivity, :math:`|\partial L / \partial m| = |\theta \odot g|` (SNIP, Lee et al., 2019).

    The division by the sum over all weights (Eq. 2-3 in the DRIVE paper) is a common positive factor, changes no
    rank and is left out.

    Args:
        weight: Effective weights :math:`\theta \odot m`, of any shape.
        gradient: Loss gradient :math:`g` with respect to them, same shape.
        out: Where to write the scores, such as the gradient itself; by default into new memory.

    Returns:
        Scores of the same shape and device.

    Examples:
        >>> snip(torch.tensor([-2.0, 0.5]), torch.tensor([0.25, 4.0]))
        tensor([0.5000, 2.0000])

    """
    return torch.mul(in_full(weight), in_full(gradient), out=out).abs_()


@torch.no_grad()
def snip_each_(weights: list[Tensor], gradients: list[Tensor]) -> None:
    """Write :func:`snip` of every weight over its gradient, with few operations however many they are.

    Args:
        weights: Effective weights.
        gradients: Their gradients, in float32 or float64.

    """
    torch._foreach_mul_(gradients, weights)
    torch._foreach_abs_(gradients)


def synflow(weight: Tensor, gradient: Tensor, *, out: Tensor | None = None) -> Tensor:
    r"""Synaptic flow, :math:`|\theta \odot \partial R / \partial \theta|` (SynFlow, Tanaka et al., 2020).

    Args:
        weight: Effective weights, of any shape.
        gradient: Gradient of :math:`R = \mathbf{1}^T f(|\theta|; \mathbf{1})`, see
            :mod:`lightning_drive.network.synflow`.
        out: Where to write the scores, such as the gradient itself; by default into new memory.

    Returns:
        Scores of the same shape and device, in the gradient's precision (float64 from
        :mod:`lightning_drive.network.synflow`).

    """
    return torch.mul(weight.detach().to(gradient.dtype), gradient, out=out).abs_()


def drive(weight: Tensor, gradient: Tensor, *, out: Tensor | None = None) -> Tensor:
    r"""DRIVE's ranking score, :math:`|\theta \odot g|`, whose square is the paper's metric.

    DRIVE joins magnitude, connection sensitivity :math:`\theta \odot g` (Eq. 9) and convergence sensitivity
    :math:`m \odot g` (Eq. 10). When both come from the same batch, as in Algorithm 1, the product
    (:func:`drive_three_factor`) is :math:`m \odot (\theta \odot g)^2`, and squaring keeps the order of non-negative
    numbers. Ranking by the root is therefore the same ranking, and safer: squares underflow where roots do not.
    It follows, and we say so openly, that *within one round* DRIVE ranks exactly as SNIP does; DRIVE's strength
    is the warm-up before and the many rounds.

    Args:
        weight: Effective weights :math:`\theta \odot m`, of any shape.
        gradient: Loss gradient :math:`g` with respect to them, same shape.
        out: Where to write the scores, such as the gradient itself; by default into new memory.

    Returns:
        Scores of the same shape and device.

    Examples:
        The order is that of the three-factor definition:

        >>> weight, gradient = torch.tensor([-2.0, 0.5, 1.0]), torch.tensor([0.25, 4.0, -1.0])
        >>> definition = drive_three_factor(weight, torch.ones(3), gradient)
        >>> drive(weight, gradient).argsort().equal(definition.argsort())
        True

    """
    return snip(weight, gradient, out=out)


def drive_three_factor(weight: Tensor, mask: Tensor, gradient: Tensor) -> Tensor:
    r"""DRIVE's metric as printed: magnitude times both sensitivities (Saikumar & Varghese, 2024, Eq. 6).

    .. math:: \left| \theta \odot \frac{\partial L}{\partial m} \odot \frac{\partial L}{\partial \theta} \right|
        = | \theta \odot (\theta \odot g) \odot (m \odot g) |

    This is the definition that the tests hold :func:`drive` to, and a diagnostic in float64. It is not used for
    ranking: in half precision 97 % of these products are exactly zero.

    Args:
        weight: Weights :math:`\theta`, of any shape.
        mask: Keep mask :math:`m`, same shape, boolean or 0/1.
        gradient: Loss gradient :math:`g` at :math:`\theta \odot m`, same shape.

    Returns:
        The metric in float64, same shape and device.

    Examples:
        >>> drive_three_factor(torch.tensor([2.0, 2.0]), torch.tensor([True, False]), torch.tensor([0.5, 0.5]))
        tensor([1., 0.], dtype=torch.float64)

    """
    weight, mask, gradient = weight.double(), mask.double(), gradient.double()
    return (weight * (weight * gradient) * (mask * gradient)).abs()


def in_full(tensor: Tensor) -> Tensor:
    """Return weights or gradients in the precision of scores: float64 if they have it, else float32."""
    tensor = tensor.detach()
    return tensor if tensor.dtype in _FULL else tensor.to(torch.promote_types(tensor.dtype, torch.float32))
