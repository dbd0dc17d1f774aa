"""A point remembers everything a module holds, and returns to it bit for bit, under a mask."""

import io
import pickle
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from lightning_drive.network.rewinding import RewindPoint


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, also those that `state_dict()` leaves out."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def disturb(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rewind_module_(dtype: torch.dtype) -> None:
    module = models.randomised(models.Restless()).to(dtype)
    module.count.fill_(7)
    objects = [*module.parameters(), *module.buffers()]
    before = tensors_of(module)
    point = RewindPoint.take(module, [], [])
    assert set(point.weights) == {*before, "absent"}
    disturb(module)
    point.rewind_module_(module)
    after = tensors_of(module)
    assert all(after[name].equal(before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert all(one is two for one, two in zip(objects, [*module.parameters(), *module.buffers()], strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_rewind_module___torchscript() -> None:
    """A part of TorchScript keeps its buffers in an object of its own."""
    script = torch.jit.trace(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), torch.randn(2, 3))
    module = nn.Sequential(nn.Linear(3, 3), script)
    before = tensors_of(module)
    point = RewindPoint.take(module, [], [])
    disturb(module)
    point.rewind_module_(module)
    assert all(each.equal(before[name]) for name, each in tensors_of(module).items())


def test_rewind_module___under_masks() -> None:
    """Survivors return to their values, pruned weights to exactly +0.0, parameters without a mask as a whole."""
    module = models.InnerProduct(4)
    with torch.no_grad():
        module.layer.weight.copy_(torch.tensor([[-1.0, float("nan"), -2.0, float("inf")]]))
    module.offset = nn.Parameter(torch.tensor([5.0]))
    point = RewindPoint.take(module, [], [])
    disturb(module)
    point.rewind_module_(module, {"layer.weight": torch.tensor([[True, False, False, False]])})
    assert module.layer.weight.detach().view(torch.int32).equal(torch.tensor([[-1.0, 0, 0, 0]]).view(torch.int32))
    assert module.offset.item() == 5.0


def test_rewind_module___again_and_again() -> None:
    """A rewind under a mask does not change what is remembered."""
    module = models.InnerProduct(4)
    point = RewindPoint.take(module, [], [])
    point.rewind_module_(module, {"layer.weight": torch.zeros(1, 4, dtype=torch.bool)})
    point.rewind_module_(module)
    assert module.layer.weight.tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_take__tied_weight_once() -> None:
    module = models.Tied()
    point = RewindPoint.take(module, [], [])
    assert "second.weight" not in point.weights
    before = tensors_of(module)
    disturb(module)
    point.rewind_module_(module)
    assert module.first.weight is module.second.weight
    assert all(value.equal(before[name]) for name, value in tensors_of(module).items())


def test_rewind_module___keeps_requires_grad_and_gradients() -> None:
    module = models.InnerProduct(4)
    module.layer.weight.grad = torch.ones(1, 4)
    point = RewindPoint.take(module, [], [])
    assert not any(value.requires_grad for value in point.weights.values())
    point.rewind_module_(module)
    assert module.layer.weight.requires_grad
    assert module.layer.weight.is_leaf
    assert module.layer.weight.grad.tolist() == [[1.0] * 4]


def test_state_dict__file() -> None:
    module = models.randomised(models.ConvNet())
    before = tensors_of(module)
    file = io.BytesIO()
    torch.save(RewindPoint.take(module, [], []).state_dict(), file)
    file.seek(0)
    disturb(module)
    RewindPoint.from_state_dict(torch.load(file, weights_only=True)).rewind_module_(module)
    assert all(value.equal(before[name]) for name, value in tensors_of(module).items())


def test_state_dict__stored_form() -> None:
    """Checkpoints of former versions have these names, and the oldest no digest."""
    state = RewindPoint.take(models.InnerProduct(2), [], []).state_dict()
    assert {name: value for name, value in state.items() if name != "snapshot"} == {
        "optimizers": [],
        "schedulers": [],
        "digest": "d05906adeecd0f53c1500a7dac59e7a01e5544c4453340dc10ebc8474e74f299",
    }
    assert {name: value.tolist() for name, value in state["snapshot"].items()} == {"layer.weight": [[0.0, 1.0]]}
    del state["digest"]
    assert RewindPoint.from_state_dict(state).weights == state["snapshot"]


def test_rewind_point__pickles() -> None:
    point = RewindPoint.take(models.InnerProduct(4), [], [])
    assert pickle.loads(pickle.dumps(point)).weights["layer.weight"].tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_rewind_module___other_names_error() -> None:
    point = RewindPoint.take(models.MLP(4, 5, 3), [], [])
    with pytest.raises(ValueError, match=r"of another module: 4.bias, 4.weight is in only one of the two"):
        point.rewind_module_(models.MLP(4, 5, 3, 2))


def test_rewind_module___other_shape_error() -> None:
    """The error comes before anything is written."""
    module = models.MLP(4, 5, 2)
    before = tensors_of(module)
    with pytest.raises(ValueError, match=r"holds '2.weight' in shape \(3, 5\), but the module .* \(2, 5\)"):
        RewindPoint.take(models.MLP(4, 5, 3), [], []).rewind_module_(module)
    assert all(value.equal(before[name]) for name, value in tensors_of(module).items())


class Growing(nn.Module):
    """Its buffers come, go and grow, as caches of positions do; those of the beginning are `early` and `unset`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("early", torch.arange(3.0), persistent=False)
        self.register_buffer("unset", None)

    def grow(self) -> None:
        self.early = torch.arange(5.0)
        self.unset = torch.ones(2)
        self.register_buffer("late", torch.ones(1))


def test_rewind_module___buffers_that_came_later() -> None:
    """There are the buffers of the beginning again, in their shapes, and no others."""
    module = nn.Sequential(Growing(), Growing())
    point = RewindPoint.take(module, [], [])
    for growing in module:
        growing.grow()
    point.rewind_module_(module)
    for growing in module:
        assert growing.early.tolist() == [0.0, 1.0, 2.0]
        assert growing.unset is None
        assert not hasattr(growing, "late")
        growing.grow()  # and it can happen again
    assert point.weights["0.early"] is not None
    assert point.weights["0.early"].tolist() == [0.0, 1.0, 2.0]


def test_rewind_module___buffer_that_was_unset_later() -> None:
    module = Growing()
    module.unset = torch.ones(2)
    point = RewindPoint.take(module, [], [])
    module.unset = None
    point.rewind_module_(module)
    assert module.unset is not None
    assert module.unset.tolist() == [1.0, 1.0]


def test_redrawn() -> None:
    """The same values in another order, for the named tensors only; the original stays."""
    module = models.MLP(20, 30, 3)
    point = RewindPoint.take(module, [], [])
    redrawn = point.redrawn(["0.weight"], torch.Generator().manual_seed(0))
    before, after = point.weights["0.weight"], redrawn.weights["0.weight"]
    assert before is not None
    assert after is not None
    assert before.equal(module[0].weight)
    assert after.shape == before.shape
    assert after.flatten().sort().values.equal(before.flatten().sort().values)
    assert (after != before).float().mean() > 0.9
    others = [name for name in point.weights if name != "0.weight"]
    assert all(redrawn.weights[name] is point.weights[name] for name in others)
    again = point.redrawn(["0.weight"], torch.Generator().manual_seed(0)).weights["0.weight"]
    assert again is not None
    assert again.equal(after)


def trained(make: Any, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    module = models.MLP(4, 5, 3)
    optimizer = make(module.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(module, optimizer, scheduler, steps)
    return module, optimizer, scheduler


def train(module: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    for _, batch in zip(range(steps), models.make_batches(4, count=steps), strict=True):
        optimizer.zero_grad()
        models.loss_fn(module, batch).backward()
        optimizer.step()
        scheduler.step()


OPTIMIZERS = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    lambda parameters: torch.optim.NAdam(parameters, lr=0.1),
]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("make", OPTIMIZERS, ids=["sgd", "adamw", "adagrad", "nadam"])
def test_rewind_point__training_repeats_itself(make: Any, steps: int) -> None:
    """From the point on, the same batches give the same weights and learning rates, again and again."""
    module, optimizer, scheduler = trained(make, steps)
    point = RewindPoint.take(module, [optimizer], [scheduler])
    rate = optimizer.param_groups[0]["lr"]
    ends = []
    for _ in range(3):
        train(module, optimizer, scheduler, 3)
        ends.append(tensors_of(module))
        point.rewind_module_(module)
        point.rewind_optimizers_([optimizer], learning_rates=True)
        point.rewind_schedulers_([scheduler])
        assert optimizer.param_groups[0]["lr"] == rate == 0.1 * 0.5**steps
    assert all(ends[0][name].equal(end[name]) for end in ends for name in end)


def test_rewind_point__without_learning_rates() -> None:
    """Momenta go back, and the settings of the parameter groups stay as they are now."""
    module, optimizer, scheduler = trained(OPTIMIZERS[0], 1)
    point = RewindPoint.take(module, [optimizer], [scheduler])
    then = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    train(module, optimizer, scheduler, 2)
    point.rewind_optimizers_([optimizer], learning_rates=False)
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3
    assert all(
        state["momentum_buffer"].equal(value) for state, value in zip(optimizer.state.values(), then, strict=True)
    )


def test_rewind_point__file(tmp_path: Path) -> None:
    """It survives a checkpoint that is loaded without unpickling anything."""
    module, optimizer, scheduler = trained(OPTIMIZERS[1])
    point = RewindPoint.take(module, [optimizer], [scheduler])
    torch.save(point.state_dict(), tmp_path / "point.pt")
    read = RewindPoint.from_state_dict(torch.load(tmp_path / "point.pt", weights_only=True))
    assert repr(read.state_dict()) == repr(point.state_dict())


def test_rewind_point__is_a_copy() -> None:
    """What is remembered shares no memory with what trains on, before and after a rewind."""
    module, optimizer, scheduler = trained(OPTIMIZERS[0])
    point = RewindPoint.take(module, [optimizer], [scheduler])
    before = repr(point.state_dict())
    train(module, optimizer, scheduler, 2)
    assert repr(point.state_dict()) == before
    point.rewind_optimizers_([optimizer], learning_rates=True)
    point.rewind_schedulers_([scheduler])
    train(module, optimizer, scheduler, 2)
    assert repr(point.state_dict()) == before


def test_rewind_point__other_groups_error() -> None:
    module, optimizer, scheduler = trained(OPTIMIZERS[0])
    point = RewindPoint.take(module, [optimizer], [scheduler])
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match=r"had \[1\] parameter groups at the rewind point, but have \[2\] now"):
        point.rewind_optimizers_([optimizer], learning_rates=True)
