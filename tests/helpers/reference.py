"""Slow oracles, written from the papers' algorithms and from nothing else: they import no part of the package.

Everything is float64, autograd and plain Python. DRIVE multiplies the weights by an explicit mask tensor and asks
autograd for the gradient of both factors, so the chain rule that the engine relies on is not assumed here.
"""

import copy
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any
LossFn = Callable[[nn.Module, Batch], Tensor]
Scores = dict[str, Tensor]


class LossModule(nn.Module):
    """A loss as a module, so that `functional_call` can put other weights into `module` while it is computed."""

    def __init__(self, module: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.module = module
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_fn(self.module, batch)


def keep_highest(scores: Mapping[str, Tensor], num_kept: int, alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sort every alive (score, position) and keep the first ones: earlier entries win ties."""
    entries = [
        (name, i, score)
        for name in scores
        for i, (score, lives) in enumerate(
            zip(scores[name].flatten().tolist(), alive[name].flatten().tolist(), strict=True)
        )
        if lives
    ]
    best_first = sorted(entries, key=lambda entry: -entry[2])  # sorted() is stable
    kept = {(name, i) for name, i, _ in best_first[:num_kept]}
    return {
        name: torch.tensor([(name, i) in kept for i in range(score.numel())]).view(score.shape)
        for name, score in scores.items()
    }


def num_kept_after(round_index: int, num_rounds: int, num_weights: int, sparsity: float, schedule: Any) -> int:
    """Return `round(P * (1 - s)^(n / N))`, or the same on a straight line, counted from all P and at least 1.

    A function of `n / N` says which part of the straight line is behind.
    """
    progress = round_index / num_rounds
    if callable(schedule):
        progress = schedule(progress)
    density = (1 - sparsity) ** progress if schedule == "exponential" else 1 - sparsity * progress
    return max(1, round(num_weights * density))


def groups_of(sparsity: Any, names: Sequence[str]) -> Iterator[tuple[list[str], float]]:
    """Yield the names of each pattern, which no earlier one has, the rest last, with its sparsity."""
    if not isinstance(sparsity, Mapping):
        yield list(names), sparsity
        return
    left = list(names)
    for pattern in [*(each for each in sparsity if each != "*"), *(["*"] * ("*" in sparsity))]:
        found = [name for name in left if fnmatch.fnmatchcase(name, pattern)]
        left = [name for name in left if name not in found]
        if found:
            yield found, sparsity[pattern]
    assert not left


def handed_out(shares: Mapping[str, int], total: int, most: Mapping[str, int]) -> dict[str, int]:
    """Hand out one by one what is due first: number k of a share s at (k - 1/2) / s, everyone's first one at once."""
    due = sorted(
        (Fraction(2 * k - 1, 2 * max(1, share)) if k > 1 else Fraction(0), place, name)
        for place, (name, share) in enumerate(shares.items())
        for k in range(1, most[name] + 1)
    )
    counts = dict.fromkeys(shares, 0)
    for _, _, name in due[:total]:
        counts[name] += 1
    return counts


def prune(
    score: Callable[[dict[str, Tensor], int], Scores],
    masks: dict[str, Tensor],
    *,
    sparsity: Any,
    rounds: int,
    schedule: Any = "exponential",
    scope: str = "global",
) -> list[dict[str, Tensor]]:
    """Score and keep the highest `rounds` times; return the masks after each round."""
    history = []
    for round_index in range(1, rounds + 1):
        scores = score(masks, round_index)
        new_masks: dict[str, Tensor] = {}
        for group, kept in to_keep(masks, round_index, rounds, sparsity, schedule, scope):
            new_masks |= keep_highest(
                {name: scores[name] for name in group}, kept, {name: masks[name] for name in group}
            )
        masks = {name: new_masks[name] for name in masks}
        history.append(masks)
    return history


def to_keep(
    masks: Mapping[str, Tensor], round_index: int, rounds: int, sparsity: Any, schedule: Any, scope: str
) -> Iterator[tuple[list[str], int]]:
    """Yield which parameters are ranked together, and how many of their weights a round keeps."""

    def kept(names: Sequence[str], own: float) -> int:
        total = sum(masks[name].numel() for name in names)
        return num_kept_after(round_index, rounds, total, own, schedule)

    for names, own in groups_of(sparsity, list(masks)):
        if scope == "global":
            yield names, kept(names, own)
        elif scope == "layerwise":
            yield from (([name], kept([name], own)) for name in names)
        else:
            shares = {name: sum(masks[name].shape) for name in names}
            most = {name: int(masks[name].sum()) for name in names}
            counts = handed_out(shares, kept(names, own), most)
            yield from (([name], count) for name, count in counts.items())


def ones_like_weights(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    return {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in names}


def set_scoring_mode(module: nn.Module, mode: str) -> None:
    """Batch statistics or running ones; Dropout is off either way."""
    module.train(mode == "train")
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.eval()


def mask_and_weight_gradients(
    module: nn.Module, names: Sequence[str], masks: Mapping[str, Tensor], batches: Sequence[Batch], loss_fn: LossFn
) -> tuple[Scores, Scores, Scores]:
    """Return theta, dL/dm and dL/dtheta of f(theta * m), each gradient summed over the batches."""
    parameters = dict(module.named_parameters())
    thetas = {name: parameters[name].detach().clone().requires_grad_() for name in names}
    ms = {name: masks[name].double().requires_grad_() for name in names}
    mask_grads = {name: torch.zeros_like(thetas[name]) for name in names}
    weight_grads = {name: torch.zeros_like(thetas[name]) for name in names}
    for batch in batches:
        weights = {f"module.{name}": thetas[name] * ms[name] for name in names}
        # A copy of the buffers: BatchNorm updates them in place.
        buffers = {f"module.{name}": buffer.clone() for name, buffer in module.named_buffers()}
        loss = torch.func.functional_call(LossModule(module, loss_fn), {**weights, **buffers}, (batch,))
        inputs = [*ms.values(), *thetas.values()]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        for name, mask_grad, weight_grad in zip(names, grads[: len(names)], grads[len(names) :], strict=True):
            mask_grads[name] += mask_grad
            weight_grads[name] += weight_grad
    return {name: theta.detach() for name, theta in thetas.items()}, mask_grads, weight_grads


def normalised(scores: Scores) -> Scores:
    """Divide by the sum over all layers (Eq. 3 and 7)."""
    total = math.fsum(x for score in scores.values() for x in score.flatten().tolist())
    return {name: score / total for name, score in scores.items()} if total else scores


def drive(
    module: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    loss_fn: LossFn,
    *,
    mode: str = "train",
    batches_per_round: int = 1,
    snip: bool = False,
    masks: dict[str, Tensor] | None = None,
    **settings: Any,
) -> list[dict[str, Tensor]]:
    """DRIVE, Algorithm 1 (or, with `snip`, SNIP repeated): fresh batches every round, cycled in order."""
    module = copy.deepcopy(module).double()
    set_scoring_mode(module, mode)

    def score(masks: dict[str, Tensor], round_index: int) -> Scores:
        first = (round_index - 1) * batches_per_round
        chosen = [batches[i % len(batches)] for i in range(first, first + batches_per_round)]
        thetas, mask_grads, weight_grads = mask_and_weight_gradients(module, names, masks, chosen, loss_fn)
        if snip:
            return normalised({name: mask_grads[name].abs() for name in names})  # Eq. 2-3
        return normalised({name: (thetas[name] * mask_grads[name] * weight_grads[name]).abs() for name in names})

    return prune(score, masks or ones_like_weights(module, names), **settings)


def grasp(
    module: nn.Module, names: Sequence[str], batches: Sequence[Batch], loss_fn: LossFn, *, mode: str, **settings: Any
) -> list[dict[str, Tensor]]:
    """GraSP (Wang et al., 2020, Algorithm 1): keep the lowest -theta * (H g), with all of H written out."""
    module = copy.deepcopy(module).double()
    set_scoring_mode(module, mode)
    parameters = dict(module.named_parameters())
    shapes = [parameters[name].shape for name in names]
    theta = torch.cat([parameters[name].detach().flatten() for name in names])

    def loss_at(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        weights = {f"module.{name}": part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            buffers = {f"module.{name}": buffer.clone() for name, buffer in module.named_buffers()}
            total = total + torch.func.functional_call(LossModule(module, loss_fn), {**weights, **buffers}, (batch,))
        return total

    gradient = torch.autograd.functional.jacobian(loss_at, theta)
    hessian = torch.autograd.functional.hessian(loss_at, theta)
    to_remove = -theta * (hessian @ gradient)
    parts = (-to_remove).split([shape.numel() for shape in shapes])
    scores = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
    return prune(lambda masks, round_index: scores, ones_like_weights(module, names), rounds=1, **settings)


def synflow_flow_and_scores(
    module: nn.Module, names: Sequence[str], masks: Mapping[str, Tensor], input_shape: Sequence[int]
) -> tuple[float, Scores]:
    """Return R = sum f(|theta| * m; ones) and theta * dR/dtheta of the network without signs and offsets."""
    module = copy.deepcopy(module).double().eval()
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.abs_()
            if name.endswith("bias"):
                parameter.zero_()
            if name in masks:
                parameter.mul_(masks[name])
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.zero_()
    flow = module(torch.ones(1, *input_shape, dtype=torch.float64)).sum()
    grads = torch.autograd.grad(flow, [parameters[name] for name in names])
    return flow.item(), {
        name: (parameters[name].detach() * grad).abs() for name, grad in zip(names, grads, strict=True)
    }


def synflow(
    module: nn.Module, names: Sequence[str], input_shape: Sequence[int], **settings: Any
) -> list[dict[str, Tensor]]:
    """SynFlow (Tanaka et al., 2020, Algorithm 1)."""

    def score(masks: dict[str, Tensor], round_index: int) -> Scores:
        del round_index
        return synflow_flow_and_scores(module, names, masks, input_shape)[1]

    return prune(score, ones_like_weights(module, names), **settings)


def magnitude(module: nn.Module, names: Sequence[str], **settings: Any) -> list[dict[str, Tensor]]:
    """Keep the largest weights."""
    parameters = dict(module.named_parameters())
    scores = {name: parameters[name].detach().double().abs() for name in names}
    return prune(lambda masks, round_index: scores, ones_like_weights(module, names), **settings)


def active_weights(matrices: Sequence[Sequence[Sequence[int]]]) -> list[list[list[int]]]:
    """Mark the kept weights of an MLP that lie on a path from some input to some output.

    `matrices[k][j][i]` is 1 where layer k keeps the weight from its input i to its output j.
    """
    fed = [set(range(len(matrices[0][0])))]  # the neurons that some input reaches, layer by layer
    for matrix in matrices:
        fed.append({j for j, row in enumerate(matrix) if any(row[i] and i in fed[-1] for i in range(len(row)))})
    heard = [set(range(len(matrices[-1])))]  # the neurons that reach some output, from the last layer back
    for matrix in reversed(matrices):
        heard.insert(
            0, {i for i in range(len(matrix[0])) if any(row[i] and j in heard[0] for j, row in enumerate(matrix))}
        )
    return [
        [[int(x and i in fed[k] and j in heard[k + 1]) for i, x in enumerate(row)] for j, row in enumerate(matrix)]
        for k, matrix in enumerate(matrices)
    ]
