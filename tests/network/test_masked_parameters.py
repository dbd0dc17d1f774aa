"""Live parameters under masks: weights, gradients and where they were replaced."""

import models
import torch
from torch import Tensor, nn

from lightning_drive import Masks
from lightning_drive.network.masked_parameters import MaskedParameters

NAN = float("nan")


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def mlp_masks(seed: int = 0) -> Masks:
    return Masks({"0.weight": random_mask(5, 4, seed=seed), "2.weight": random_mask(3, 5, seed=seed + 1)})


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


def test_masked_parameters__zero_weights_() -> None:
    module, masks = models.MLP(4, 5, 3), mlp_masks()
    live = MaskedParameters(module, masks)
    with torch.no_grad():
        module[0].weight.fill_(NAN)
    live.zero_weights_()
    assert module[0].weight.isnan().equal(masks["0.weight"])


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
