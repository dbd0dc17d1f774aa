"""Under `SparseCalls` all is as in the masked dense network, in whatever way torch differentiates; nothing stays."""

import copy
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sparse_layers
import torch
import torch.nn.functional as F
from sparse_layers import EACH, KEPT, layer_and_input, mask_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_drive.acceleration import operations
from lightning_drive.acceleration.operations import Operation
from lightning_drive.acceleration.sparse_calls import SparseCalls, SparseWeight

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


class Counted:
    """How often outputs and gradients were computed in a sparse form."""

    outputs = gradients = 0


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counts = Counted()

    def counting(name: str) -> Callable[..., Any]:
        function = getattr(operations, name.removesuffix("s") if name == "outputs" else name)

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            setattr(counts, name, getattr(counts, name) + 1)
            return function(*args)

        return run

    monkeypatch.setattr(operations, "output", counting("outputs"))
    monkeypatch.setattr(operations, "gradients", counting("gradients"))
    return counts


def weight_of(layer: Any, places: Tensor, input: Tensor, form: int = 0) -> SparseWeight:
    operation = Operation.of_layer(layer)
    assert operation is not None
    names = [*operation.layouts(operation.batch(input.detach()))]
    return SparseWeight(layer.weight, places, operation, names[form % len(names)])


def masked(layer: Any, places: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the masked dense layer: gradients of pruned weights are zero in it."""

    def forward(input: Tensor) -> Tensor:
        weight = layer.weight * mask_of(layer.weight, places)
        result: Tensor = torch.func.functional_call(layer, {"weight": weight}, (input,))
        return result

    return forward


def derivatives(forward: Callable[[Tensor], Tensor], layer: nn.Module, input: Tensor) -> list[Tensor]:
    output = forward(input)
    tensors = [input, *layer.parameters()]
    return [output, *torch.autograd.grad(output.sin().sum(), tensors)]


def assert_same(sparse: list[Tensor], dense: list[Tensor]) -> None:
    for one, other in zip(sparse, dense, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("kept", KEPT)
@EACH
def test_each__gradients_of_the_masked_dense_network(name: str, kept: str, form: int, counted: Counted) -> None:
    layer, places, input = layer_and_input(name, kept)
    with SparseCalls([weight_of(layer, places, input, form)]):
        sparse = derivatives(layer, layer, input)
    assert (counted.outputs, counted.gradients) == (1, 1)
    assert_same(sparse, derivatives(masked(layer, places), layer, input))
    assert not sparse[2][mask_of(layer.weight, places) == 0].any()
    assert sparse[0].stride() == layer(input).stride()


@pytest.mark.parametrize("name", ["linear_of_a_vector", "linear", "conv1d_same", "conv2d_uneven", "conv2d_pointwise"])
def test_double_backward(name: str) -> None:
    layer, places, input = layer_and_input(name)

    def penalty(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        output = forward(input)
        first = torch.autograd.grad(output.sin().sum(), [input, layer.weight], create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
        return [*first, *torch.autograd.grad(total, [input, *layer.parameters()], allow_unused=True)]  # type: ignore[arg-type]

    with SparseCalls([weight_of(layer, places, input)]):
        sparse = penalty(layer)
    assert_same(sparse, penalty(masked(layer, places)))


@pytest.mark.parametrize("name", ["linear_without_bias", "conv1d", "conv2d_strided"])
def test_gradgradcheck(name: str) -> None:
    layer, places, input = layer_and_input(name)

    def forward(input: Tensor, factor: Tensor) -> Tensor:
        result: Tensor = layer(input * factor)
        return result

    factor = torch.rand((), dtype=torch.float64, requires_grad=True)
    with SparseCalls([weight_of(layer, places, input)]):
        assert torch.autograd.gradcheck(forward, (input, factor))
        assert torch.autograd.gradgradcheck(forward, (input, factor))


class Twice(nn.Module):
    """Uses one weight twice, and another one through a checkpoint."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8).double(), nn.Linear(8, 4).double()
        self.use_reentrant = use_reentrant
        self.places = {"first": torch.arange(0, 64, 5), "last": torch.arange(1, 32, 3)}
        for name, places in self.places.items():
            sparse_layers.prune_(self.get_submodule(name).weight, places)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.first(self.first(input).tanh()).tanh()
        if self.use_reentrant is None:
            return self.last(hidden)
        result: Tensor = checkpoint(lambda value: self.last(value).sin(), hidden, use_reentrant=self.use_reentrant)
        return result

    def calls(self) -> SparseCalls:
        layers = {name: self.get_submodule(name) for name in self.places}
        return SparseCalls([weight_of(layer, self.places[name], torch.zeros(1, 8)) for name, layer in layers.items()])


BACKWARD: dict[str, Callable[[Tensor, nn.Module], Any]] = {
    "method": lambda loss, module: loss.backward(),
    "method_with_gradient": lambda loss, module: loss.backward(torch.ones_like(loss)),
    "function": lambda loss, module: torch.autograd.backward([loss]),
    "with_inputs": lambda loss, module: loss.backward(inputs=list(module.parameters())),
    "grad": lambda loss, module: set_gradients(module, torch.autograd.grad(loss, list(module.parameters()))),
}


def set_gradients(module: nn.Module, gradients: tuple[Tensor, ...]) -> None:
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient


@pytest.mark.parametrize(
    ("use_reentrant", "backward"),
    [(None, name) for name in BACKWARD]
    + [(False, name) for name in BACKWARD]
    + [(True, name) for name in BACKWARD if name not in ("grad", "with_inputs")],  # torch has no such passes
)
def test_checkpointing__recomputed_in_the_same_form(
    use_reentrant: bool | None, backward: str, counted: Counted
) -> None:
    module, plain = Twice(use_reentrant), Twice(use_reentrant)
    input = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    with module.calls() as mode:
        BACKWARD[backward](module(input).square().sum(), module)
        assert mode is not None
        assert torch._C._len_torch_function_stack() == 1
    assert counted.outputs == 3 + (use_reentrant is not None)
    assert counted.gradients == 3
    plain(input).square().sum().backward()
    for name, parameter in module.named_parameters():
        expected = plain.get_parameter(name).grad
        assert expected is not None
        if name.endswith("weight"):
            expected = expected * mask_of(parameter, module.places[name.removesuffix(".weight")])
        torch.testing.assert_close(parameter.grad, expected)


TOUCHES: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "accumulated": lambda layer, input: layer(input).sum().backward(),
    "clipped": lambda layer, input: nn.utils.clip_grad_norm_(layer.parameters(), 1e-3),
    "written": lambda layer, input: layer.weight.grad.add_(1),
    "replaced": lambda layer, input: setattr(layer.weight, "grad", layer.weight.grad.clone()),
    "none": lambda layer, input: setattr(layer.weight, "grad", None),
    "used_otherwise": lambda layer, input: (layer.weight * input.sum()).sum().backward(),
}


@pytest.mark.parametrize("other", TOUCHES)
def test_masked_gradients__only_those_that_nobody_touched(other: str) -> None:
    """A gradient is known to have zeros where weights are pruned as long as it is the one that was computed."""
    layer, places, input = layer_and_input("linear")
    calls = SparseCalls([weight_of(layer, places, input)])
    with calls:
        layer(input).sum().backward()
        assert calls.masked_gradients == {layer.weight}
        TOUCHES[other](layer, input)
        assert calls.masked_gradients == set()


def test_masked_gradients__not_beside_other_uses() -> None:
    """Autograd adds the gradients of all uses before they get there."""
    layer, places, input = layer_and_input("linear")
    calls = SparseCalls([weight_of(layer, places, input)])
    with calls:
        (layer(input).sum() + layer.weight.sum()).backward()
        assert calls.masked_gradients == set()
        layer.zero_grad()
        (layer.weight.sum() + layer(input).sum()).backward()
        assert calls.masked_gradients == set()


def test_frozen_parts__have_no_gradient() -> None:
    layer, places, input = layer_and_input("linear")
    layer.bias.requires_grad_(False)
    input = input.detach()
    with SparseCalls([weight_of(layer, places, input)]):
        layer(input).sum().backward()
        layer.weight.requires_grad_(False)
        assert not layer(input).requires_grad
        with torch.no_grad():
            assert not layer(input).requires_grad
    assert layer.bias.grad is None


def test_changed_in_place__raises_as_ever() -> None:
    layer, places, input = layer_and_input("linear")
    with SparseCalls([weight_of(layer, places, input)]):
        loss = layer(input).sum()
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_weights_in_channels_last() -> None:
    layer, places, input = layer_and_input("conv2d")
    layer.to(memory_format=torch.channels_last)
    with SparseCalls([weight_of(layer, places, input)]):
        sparse = derivatives(layer, layer, input)
    assert_same(sparse, derivatives(masked(layer, places), layer, input))


def test_other_sizes__of_batches_and_images(counted: Counted) -> None:
    layer, places, input = layer_and_input("conv2d")
    inputs = [torch.randn(batch, 3, size, size + 1).double() for batch in (1, 3) for size in range(3, 14)]
    with SparseCalls([weight_of(layer, places, input)]):
        outputs = [layer(one) for one in inputs]
    assert counted.outputs == len(inputs)
    assert_same(outputs, [layer(one) for one in inputs])


def test_multi_head_attention(counted: Counted) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double()
    input = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weights = {}
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 2:
            places = torch.arange(0, parameter.numel(), 3)
            sparse_layers.prune_(parameter, places)
            weights[name] = SparseWeight(parameter, places, Operation(tuple(parameter.shape)), "tokens")
    with SparseCalls(weights.values()):
        sparse = [layer(input, input, input)[0]]
        sparse += torch.autograd.grad(sparse[0].sum(), [input])
    assert counted.outputs == 2
    dense = layer(input, input, input)[0]
    assert_same(sparse, [dense, *torch.autograd.grad(dense.sum(), [input])])


@pytest.fixture
def linear() -> Iterator[tuple[nn.Linear, SparseCalls]]:
    layer, places, input = layer_and_input("linear")
    layer.float()
    assert isinstance(layer, nn.Linear)
    mode = SparseCalls([weight_of(layer, places, input.float())])
    with mode:
        yield layer, mode


OF_TORCH = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")

OTHERS: dict[str, Callable[[nn.Linear], object]] = {
    "another_type_of_numbers": lambda layer: layer.bfloat16()(torch.randn(3, 7).bfloat16()),
    "vmap": lambda layer: torch.vmap(layer)(torch.randn(3, 7)),
    "grad": lambda layer: torch.func.grad(lambda input: layer(input).sum())(torch.randn(3, 7)),
    "jvp": lambda layer: torch.func.jvp(layer, (torch.randn(3, 7),), (torch.randn(3, 7),)),
    "empty_batch": lambda layer: layer(torch.randn(0, 7)).sum().backward(),
    "meta": lambda layer: F.linear(torch.randn(3, 7, device="meta"), layer.weight.to("meta")),
    "a_subclass": lambda layer: layer(torch.randn(3, 7).as_subclass(nn.Buffer)),  # type: ignore[arg-type]
    "traced": lambda layer: torch.jit.trace(layer, torch.randn(3, 7), check_trace=False),  # type: ignore[no-untyped-call]
    "compiled": lambda layer: torch.compile(layer, backend="aot_eager")(torch.randn(3, 7)),
    "a_copy_of_the_weight": lambda layer: F.linear(torch.randn(3, 7), layer.weight * 1),
    "another_use_of_the_weight": lambda layer: torch.randn(3, 7) @ layer.weight.t(),
}


@OF_TORCH
@pytest.mark.parametrize("name", OTHERS)
def test_fallback__torch_computes_as_ever(name: str, linear: tuple[nn.Linear, SparseCalls], counted: Counted) -> None:
    OTHERS[name](linear[0])
    assert counted.outputs == 0


def test_fallback__autocast(linear: tuple[nn.Linear, SparseCalls], counted: Counted) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert linear[0](torch.randn(3, 7)).dtype == torch.bfloat16
    assert counted.outputs == 0
    assert linear[0](torch.randn(3, 7)).dtype == torch.float32
    assert counted.outputs == 1


@OF_TORCH
def test_fallback__dual_numbers(linear: tuple[nn.Linear, SparseCalls], counted: Counted) -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(3, 7), torch.ones(3, 7))
        assert torch.autograd.forward_ad.unpack_dual(linear[0](dual)).tangent is not None
    assert counted.outputs == 0


def test_fallback__other_settings(counted: Counted) -> None:
    """What was measured was the convolution of the layer, not another one with the same weight."""
    layer, places, input = layer_and_input("conv2d")
    with SparseCalls([weight_of(layer, places, input)]):
        F.conv2d(input, layer.weight, stride=2, padding=1)
        F.conv2d(input, layer.weight)
        F.conv2d(input, weight=layer.weight, bias=None, padding=[2, 2])
        assert counted.outputs == 0
        F.conv2d(input, weight=layer.weight, bias=None, padding=[1, 1])
        assert counted.outputs == 1


@pytest.mark.parametrize("shape", [(3, 6), (), (0,)])
def test_errors__are_those_of_torch(shape: tuple[int, ...], linear: tuple[nn.Linear, SparseCalls]) -> None:
    with pytest.raises(RuntimeError):
        linear[0](torch.randn(shape))


def test_nothing_is_attached() -> None:
    """Module, copies and pickles have nothing of the mode, and neither has the stack of modes after an error."""
    module = Twice()
    keys, own = list(module.state_dict()), [dict(vars(part)) for part in module.modules()]
    with module.calls():
        module(torch.randn(3, 8).double()).sum().backward()
        twin = copy.deepcopy(module)
        file = io.BytesIO()
        torch.save(module, file)
    with pytest.raises(RuntimeError), module.calls():
        module(torch.randn(3, 7).double())
    assert torch._C._len_torch_function_stack() == 0
    file.seek(0)
    for one in (module, twin, torch.load(file, weights_only=False)):
        assert list(one.state_dict()) == keys
        assert [vars(part).keys() for part in one.modules()] == [part.keys() for part in own]
        assert all(type(parameter) is nn.Parameter for parameter in one.parameters())
        assert all(vars(parameter) == {} for parameter in one.parameters())
        assert not any(parameter._backward_hooks for parameter in one.parameters())
