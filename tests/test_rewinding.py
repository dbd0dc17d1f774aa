"""A snapshot remembers everything a module holds, and returns to it bit for bit, under a mask."""

import io
import pickle

import models
import pytest
import torch
from torch import Tensor, nn

from lightning_drive.rewinding import Snapshot


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, also those that `state_dict()` leaves out."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def disturb(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rewind_(dtype: torch.dtype) -> None:
    module = models.randomised(models.Restless()).to(dtype)
    module.count.fill_(7)
    objects = [*module.parameters(), *module.buffers()]
    before = tensors_of(module)
    snapshot = Snapshot.take(module)
    assert set(snapshot.tensors) == {*before, "absent"}
    disturb(module)
    snapshot.rewind_(module)
    after = tensors_of(module)
    assert all(after[name].equal(before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert all(one is two for one, two in zip(objects, [*module.parameters(), *module.buffers()], strict=True))


def test_rewind___under_masks() -> None:
    """Survivors return to their values, pruned weights to exactly +0.0, parameters without a mask as a whole."""
    module = models.InnerProduct(4)
    with torch.no_grad():
        module.layer.weight.copy_(torch.tensor([[-1.0, float("nan"), -2.0, float("inf")]]))
    module.offset = nn.Parameter(torch.tensor([5.0]))
    snapshot = Snapshot.take(module)
    disturb(module)
    snapshot.rewind_(module, {"layer.weight": torch.tensor([[True, False, False, False]])})
    assert module.layer.weight.detach().view(torch.int32).equal(torch.tensor([[-1.0, 0, 0, 0]]).view(torch.int32))
    assert module.offset.item() == 5.0


def test_rewind___again_and_again() -> None:
    """A rewind under a mask does not change what is remembered."""
    module = models.InnerProduct(4)
    snapshot = Snapshot.take(module)
    snapshot.rewind_(module, {"layer.weight": torch.zeros(1, 4, dtype=torch.bool)})
    snapshot.rewind_(module)
    assert module.layer.weight.tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_take__tied_weight_once() -> None:
    module = models.Tied()
    snapshot = Snapshot.take(module)
    assert "second.weight" not in snapshot.tensors
    before = tensors_of(module)
    disturb(module)
    snapshot.rewind_(module)
    assert module.first.weight is module.second.weight
    assert all(value.equal(before[name]) for name, value in tensors_of(module).items())


def test_rewind___keeps_requires_grad_and_gradients() -> None:
    module = models.InnerProduct(4)
    module.layer.weight.grad = torch.ones(1, 4)
    snapshot = Snapshot.take(module)
    assert not any(value.requires_grad for value in snapshot.tensors.values())
    snapshot.rewind_(module)
    assert module.layer.weight.requires_grad
    assert module.layer.weight.is_leaf
    assert module.layer.weight.grad.tolist() == [[1.0] * 4]


def test_state_dict__file() -> None:
    module = models.randomised(models.ConvNet())
    before = tensors_of(module)
    file = io.BytesIO()
    torch.save(Snapshot.take(module).state_dict(), file)
    file.seek(0)
    disturb(module)
    Snapshot.from_state_dict(torch.load(file, weights_only=True)).rewind_(module)
    assert all(value.equal(before[name]) for name, value in tensors_of(module).items())


def test_snapshot__pickles() -> None:
    snapshot = Snapshot.take(models.InnerProduct(4))
    assert pickle.loads(pickle.dumps(snapshot)).tensors["layer.weight"].tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_rewind___other_names_error() -> None:
    snapshot = Snapshot.take(models.MLP(4, 5, 3))
    with pytest.raises(ValueError, match=r"of another module: 4.bias, 4.weight is in only one of the two"):
        snapshot.rewind_(models.MLP(4, 5, 3, 2))


def test_rewind___other_shape_error() -> None:
    """The error comes before anything is written."""
    module = models.MLP(4, 5, 2)
    before = tensors_of(module)
    with pytest.raises(ValueError, match=r"holds '2.weight' in shape \(3, 5\), but the module .* \(2, 5\)"):
        Snapshot.take(models.MLP(4, 5, 3)).rewind_(module)
    assert all(value.equal(before[name]) for name, value in tensors_of(module).items())
