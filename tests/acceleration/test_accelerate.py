"""An accelerated module returns what the dense one returns, for inputs of any size, and says what it cannot do."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from chosen_forms import ALWAYS_SPARSE, prefer
from compacted import difference, numbers
from models import MLP, ConvNet, changes, fingerprint, randomised
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_drive import accelerate
from lightning_drive.acceleration.sparse_layer import SparseLayer

IMAGES = (2, 8, 8)


def thinned(module: nn.Module, density: float = 0.1, seed: int = 0) -> nn.Module:
    """Draw all weights, and zero single weights of layers."""
    module = randomised(module, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                weight.mul_(torch.rand(weight.shape, generator=generator) < density)
    return module


def forms(module: nn.Module) -> dict[str, str]:
    return {layer.name: layer.form for layer in module.report.layers}  # type: ignore[union-attr]


class Residual(nn.Module):
    """Two convolutions with BatchNorm around a shortcut with a stride, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.shortcut, self.norm3 = nn.Conv2d(2, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6, affine=False)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.fc(self.pool(F.relu(y + self.norm3(self.shortcut(x)))).flatten(1))


class Sequences(nn.Module):
    """Convolutions over sequences, linear layers over three dimensions, and one layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 6, 5, padding="same", dilation=2), nn.BatchNorm1d(6)
        self.mix, self.out = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x.flatten(2)))).transpose(1, 2)
        return self.out(self.mix(F.relu(self.mix(y))))


class Flattened(nn.Module):
    """Asks for contiguous outputs of a convolution, and takes channels out of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 3, 3), nn.Linear(108, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x[:, :2]).contiguous().view(len(x), -1))


NETWORKS: list[Any] = [ConvNet, Residual, Sequences, Flattened, lambda: nn.Sequential(nn.Flatten(), MLP(128, 9, 9, 3))]


@pytest.mark.parametrize("memory_format", [1, 2], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", [("tokens", "pixels", "lines"), ("tokens", "pixels", "windows")], ids=lambda f: f[-1])
@pytest.mark.parametrize("make", NETWORKS)
def test_accelerate__same_outputs(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], form: tuple[str, ...], memory_format: int
) -> None:
    """In every form and memory format, for batches of other sizes, numbers of other sizes, and images laid out so."""
    prefer(monkeypatch, *form, memory_format, 1)
    given = thinned(make(), density=0.3)
    before = fingerprint(given)
    fast = accelerate(given, numbers(4, *IMAGES))
    assert set(forms(fast).values()) <= {*form}
    assert not fast.training
    for size, scale in ((1, 1.0), (4, 10.0), (70, 1.0), (3, 0.0)):
        for laid_out in (torch.contiguous_format, torch.channels_last):
            images = scale * numbers(size, *IMAGES).to(memory_format=laid_out)
            assert difference(given, fast, images) < 1e-5
    assert changes(given, before) == []


@pytest.mark.parametrize("shape", [(3, 2, 11, 8), (1, 2, 20, 31)])
def test_accelerate__images_of_other_sizes(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(ConvNet(), density=0.3)
    fast = accelerate(given, numbers(2, *IMAGES))
    for example in (numbers(*shape), numbers(2, *IMAGES), numbers(*shape)):  # there and back
        assert difference(given, fast, example) < 1e-5


@pytest.mark.parametrize("form", ["lines", "windows"])
def test_accelerate__empty_batches(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """A batch may be empty, such as the regions that a detector proposes."""
    prefer(monkeypatch, "tokens", "pixels", form, 1)
    given = thinned(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 1), nn.Linear(6, 4)), density=0.5)
    fast = accelerate(given, numbers(2, *IMAGES))
    assert set(forms(fast).values()) == {"tokens", "pixels", form}
    for empty in (numbers(0, *IMAGES), numbers(0, *IMAGES).to(memory_format=torch.channels_last)):
        assert fast(empty).shape == given(empty).shape == (0, 3, 6, 4)


def test_accelerate__float64(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(ConvNet()).double()
    fast = accelerate(given, numbers(2, *IMAGES).double())
    assert difference(given, fast, numbers(5, *IMAGES).double()) < 1e-13


def test_accelerate__folds_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, *ALWAYS_SPARSE)
    fast = accelerate(thinned(Residual()), numbers(2, *IMAGES))
    assert {type(part) for part in fast.modules()} == {Residual, SparseLayer, nn.Identity, nn.MaxPool2d}


def test_accelerate__folds_no_batch_norm_that_others_bypass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else reads the outputs of a layer gets them as they were."""

    class Bypassed(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            return self.fc(self.conv2(F.relu(self.norm1(y)) + y).mean((2, 3)))

    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(Bypassed(), density=0.5)
    fast = accelerate(given, numbers(2, *IMAGES))
    assert isinstance(fast.norm1, nn.BatchNorm2d)
    assert difference(given, fast, numbers(3, *IMAGES)) < 1e-5


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 6)])
def test_accelerate__folds_batch_norm_of_the_same_dimension(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    """BatchNorm over three dimensions normalises the second one, a linear layer computes the last one."""
    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), density=0.5)
    fast = accelerate(given, numbers(*shape))
    assert isinstance(fast[1], nn.Identity) == (len(shape) == 2)  # type: ignore[index]
    assert difference(given, fast, numbers(*shape)) < 1e-5


class InputsFirst(nn.Module):
    """A linear layer as transformers has it, which is known by its name."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("outputs", [6, 8])
def test_accelerate__batch_norm_after_layers_of_other_libraries(monkeypatch: pytest.MonkeyPatch, outputs: int) -> None:
    """BatchNorm is only folded into torch's own layers; one with the inputs first is sparse all the same."""
    prefer(monkeypatch, *ALWAYS_SPARSE)
    kind: Any = type("Conv1D", (InputsFirst,), {"__module__": "transformers.pytorch_utils"})
    given = thinned(nn.Sequential(kind(8, outputs), nn.BatchNorm1d(outputs)), density=0.5)
    fast = accelerate(given, numbers(4, 8))
    assert [type(part) for part in fast.children()] == [SparseLayer, nn.BatchNorm1d]
    assert difference(given, fast, numbers(5, 8)) < 1e-5


def test_accelerate__batch_norm_over_unbatched_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the places of a sequence without a batch for channels."""
    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(nn.Sequential(nn.Conv1d(2, 5, 3), nn.BatchNorm1d(6)), density=0.5)
    fast = accelerate(given, numbers(2, 8))
    assert difference(given, fast, numbers(2, 8)) < 1e-5


def test_accelerate__dense_where_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose dense form is the fastest stays the layer that it was."""
    prefer(monkeypatch, 1, "dense", "tokens")
    fast = accelerate(thinned(MLP(6, 8, 3)), numbers(2, 6))
    assert forms(fast) == {"0": "dense", "2": "dense"}
    assert {type(part) for part in fast.modules()} == {MLP, nn.Linear, nn.ReLU}


def test_accelerate__all_dense_where_the_whole_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers may be faster one by one and the whole not: then nothing is changed; the times are shown."""
    prefer(monkeypatch, "tokens", 0, 1)
    fast = accelerate(thinned(MLP(6, 8, 3)), numbers(2, 6))
    assert forms(fast) == {"0": "dense", "2": "dense"}
    assert [layer.sparse_seconds for layer in fast.report.layers] == [0.1, 0.1]  # type: ignore[union-attr]
    assert fast.report.speedup == 1  # type: ignore[union-attr]
    assert not any(isinstance(part, SparseLayer) for part in fast.modules())


def test_accelerate__dense_where_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse form that does not agree with the dense one is not taken, however fast it is."""
    prefer(monkeypatch, "windows", "lines", 1)
    monkeypatch.setattr(
        "lightning_drive.acceleration.convolution_layouts.Windows.write_", lambda self, block, product: block.zero_()
    )
    given = thinned(nn.Sequential(nn.Conv2d(2, 3, 3)), density=0.5)
    fast = accelerate(given, numbers(2, *IMAGES))
    assert forms(fast) == {"0": "lines"}
    assert difference(given, fast, numbers(2, *IMAGES)) < 1e-5


def test_accelerate__dense_where_all_forms_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, *ALWAYS_SPARSE)
    monkeypatch.setattr(
        "lightning_drive.acceleration.layouts.Tokens.write_", lambda self, block, product: block.zero_()
    )
    given = thinned(nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2)), density=0.5)
    fast = accelerate(given, numbers(4, 6))
    assert forms(fast) == {"0": "dense", "2": "lines"}
    assert fast.report.notes == ("not measured: 0: no sparse form gives its outputs",)  # type: ignore[union-attr]
    assert difference(given, fast, numbers(5, 6)) < 1e-5


def test_accelerate__complex_layers_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.out = nn.Linear(6, 6, dtype=torch.complex64), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.mix(x.to(torch.complex64)).abs())

    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = Spectral()
    with torch.no_grad():
        given.mix.weight[::2], given.out.weight[::2] = 0, 0
    assert forms(accelerate(given, numbers(4, 6))) == {"mix": "dense", "out": "tokens"}


class Others(nn.Module):
    """Layers that stay dense, each for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.transposed = nn.Conv2d(2, 2, 3, groups=2), nn.ConvTranspose2d(2, 2, 3)
        self.circular = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
        self.hooked, self.computed = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        nn.utils.parametrize.register_parametrization(self.computed, "weight", nn.Tanh())
        self.hooked.register_forward_hook(lambda layer, given, output: 2 * output)
        self.doubled, self.unused = Doubled(8, 8), nn.Linear(8, 8)
        self.recurrent = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.circular(self.transposed(self.grouped(x)))
        y = self.doubled(self.computed(self.hooked(y)))
        return self.recurrent(y.flatten(1, 2))[0]


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_accelerate__leaves_other_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(Others(), density=0.5)
    fast = accelerate(given, numbers(2, *IMAGES))
    assert set(forms(fast).values()) == {"dense"}
    assert difference(given, fast, numbers(3, *IMAGES)) == 0
    no_form = "there is no sparse form for such a layer"
    assert {layer.name: layer.reason for layer in fast.report.layers} == {  # type: ignore[union-attr]
        "grouped": no_form,
        "transposed": no_form,
        "circular": no_form,
        "hooked": "it has hooks, or a `forward` of its own",
        "doubled": no_form,
        "unused": "it did not run on the example",
        "recurrent": no_form,
    }


class Encoder(nn.Module):
    """Torch's own transformer, an encoder of which torch computes with a fused kernel in eval mode, and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        settings: Any = {"dim_feedforward": 12, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **settings), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, norm_first=True, **settings), 1)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.decoder(tokens, self.encoder(tokens, mask=mask))


@pytest.mark.parametrize("is_masked", [False, True])
def test_accelerate__attention(monkeypatch: pytest.MonkeyPatch, is_masked: bool) -> None:
    """Attention has sparse projections, and the fused kernel of a whole layer makes way for its sparse layers."""
    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(Encoder(), density=0.4)
    mask = (nn.Transformer.generate_square_subsequent_mask(5),) if is_masked else ()
    fast = accelerate(given, (numbers(4, 5, 8), *mask) if is_masked else numbers(4, 5, 8))
    assert set(forms(fast)) == {
        *(f"encoder.layers.{n}.{part}" for n in (0, 1) for part in ("self_attn", "linear1", "linear2")),
        *(f"decoder.layers.0.{part}" for part in ("self_attn", "multihead_attn", "linear1", "linear2")),
    }
    assert set(forms(fast).values()) == {"tokens"}
    for twin in (fast, pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
        assert difference(given, twin, numbers(70, 5, 8), *mask) < 1e-5


def test_accelerate__attention_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """All results and arguments of attention are those of torch; keys and values of other sizes, too."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.other = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=6, vdim=4, bias=False)

        def forward(self, x: Tensor, keys: Tensor, values: Tensor, ignored: Tensor) -> tuple[Tensor, ...]:
            own = self.own(x, x, x, key_padding_mask=ignored, average_attn_weights=False)
            return *own, *self.other(query=x, key=keys, value=values)

    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(Attends(), density=0.4).eval()
    ignored = torch.tensor([[False, False, True], [False, True, True]])
    inputs = (numbers(3, 2, 8), numbers(5, 2, 6), numbers(5, 2, 4), ignored)
    fast = accelerate(given, inputs)
    assert forms(fast) == {"own": "tokens", "other": "tokens"}
    torch.testing.assert_close(fast(*inputs), given(*inputs))


def test_accelerate__subclasses_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass that inherits `forward` is the same layer; a layer under two names is sparse under both."""

    class Named(nn.Linear):
        pass

    prefer(monkeypatch, *ALWAYS_SPARSE)
    shared = Named(6, 6)
    given = thinned(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(6, 3)), density=0.5)
    fast = accelerate(given, numbers(4, 6))
    assert forms(fast) == {"0": "tokens", "3": "tokens"}
    assert fast[0] is fast[2]  # type: ignore[index]
    assert difference(given, fast, numbers(5, 6)) < 1e-5


def test_accelerate__a_single_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(nn.Linear(6, 3), density=0.5)
    fast = accelerate(given, numbers(4, 6))
    assert isinstance(fast, SparseLayer)
    assert difference(given, fast, numbers(5, 6)) < 1e-5
    assert forms(fast) == {"": "tokens"}


@pytest.mark.parametrize("kept", [0, 1])
def test_accelerate__hardly_any_weights(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(Residual(), density=0.5)
    with torch.no_grad():
        for layer in (given.conv2, given.shortcut, given.fc):
            layer.weight.flatten()[kept:] = 0  # type: ignore[union-attr,operator]
    fast = accelerate(given, numbers(2, *IMAGES))
    assert difference(given, fast, numbers(3, *IMAGES)) < 1e-5


def test_accelerate__attributes_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that reads a layer's sizes or its weight, as transformers does, finds them."""

    class Reads(MLP):
        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self[0].weight.dtype)
            return super().forward(x) * self[0].in_features + self[2].weight.sum()

    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(Reads(6, 8, 3))
    fast = accelerate(given, numbers(2, 6))
    assert torch.equal(fast[0].weight, given[0].weight)  # type: ignore[index]
    assert difference(given, fast, numbers(3, 6)) < 1e-5


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda module: pickle.loads(pickle.dumps(module)), id="pickle"),
        pytest.param(lambda module: saved_and_loaded(module), id="torch_save"),
    ],
)
def test_accelerate__copies(monkeypatch: pytest.MonkeyPatch, copied: Callable[[nn.Module], nn.Module]) -> None:
    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(ConvNet())
    fast = accelerate(given, numbers(2, *IMAGES))
    twin = copied(fast)
    assert difference(given, twin, numbers(3, *IMAGES)) < 1e-5
    assert twin.report == fast.report
    with pytest.raises(RuntimeError, match=r"has no `state_dict`"):
        twin.state_dict()


def saved_and_loaded(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_accelerate__smaller_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that are 0 are not there."""
    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(MLP(200, 200, 200), density=0.02)
    fast = accelerate(given, numbers(2, 200))
    size, fast_size = (len(pickle.dumps(module)) for module in (given, fast))
    assert fast_size < 0.15 * size


def test_accelerate__for_inference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(MLP(6, 8, 3))
    fast = accelerate(given, numbers(2, 6))
    with pytest.raises(RuntimeError, match=r"has no `state_dict`.*Save it whole"):
        fast.state_dict()
    with pytest.raises(RuntimeError, match=r"cannot load a `state_dict`.*accelerate that again"):
        fast.load_state_dict(given.state_dict())
    with pytest.raises(RuntimeError, match=r"for inference, but this input needs gradients"):
        fast(numbers(2, 6).requires_grad_())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert torch.equal(fast(numbers(2, 6)), fast(numbers(2, 6)))  # also where gradients are enabled
    with pytest.raises(ValueError, match=r"must have 6 features or channels in dimension -1, got .* \(2, 7\)"):
        fast(numbers(2, 7))


def test_accelerate__in_a_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A LightningModule predicts in a Trainer as before, also under autocast."""

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = ConvNet()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    prefer(monkeypatch, *ALWAYS_SPARSE)
    given = thinned(Module(), density=0.5).eval()
    images = numbers(6, *IMAGES)
    expected = given(images)
    for precision, tolerance in (("32-true", 1e-5), ("bf16-mixed", 0.05)):
        trainer = pl.Trainer(
            precision=precision,  # type: ignore[arg-type]
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        fast = accelerate(given, images)
        predictions = trainer.predict(fast, DataLoader(images, batch_size=3))  # type: ignore[arg-type]
        assert predictions is not None
        torch.testing.assert_close(torch.cat(predictions).float(), expected, atol=tolerance, rtol=tolerance)  # type: ignore[arg-type]


class Noisy(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(())


ERRORS: list[Any] = [
    pytest.param(lambda: "net", TypeError, r"`module` must be a torch module, got str", id="no_module"),
    pytest.param(lambda: torch.compile(MLP(4, 3)), TypeError, r"compiled. Accelerate what was compiled", id="compiled"),
    pytest.param(nn.ReLU, ValueError, r"must have parameters, and has none", id="no_parameters"),
    pytest.param(lambda: nn.BatchNorm1d(4), ValueError, r"must have linear layers or convolutions", id="no_layers"),
    pytest.param(
        lambda: randomised(MLP(4, 5, 3)), ValueError, r"those of '0', '2' have no zeros.*masks.apply_", id="no_zeros"
    ),
    pytest.param(
        lambda: thinned(MLP(4, 3)).half(), ValueError, r"'0.weight' is in torch.float16.*module.float\(\)", id="float16"
    ),
    pytest.param(lambda: thinned(MLP(4, 3)).bfloat16(), ValueError, r"is in torch.bfloat16", id="bfloat16"),
    pytest.param(lambda: thinned(Noisy(4, 3)), ValueError, r"must be the same for the same input", id="random"),
]


@pytest.mark.parametrize(("make", "error", "message"), ERRORS)
def test_accelerate__error(make: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        accelerate(make(), numbers(2, 4))


def test_accelerate__other_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the device is the same on any: a module on the meta device stands for one on a GPU."""
    monkeypatch.setattr("lightning_drive.network.given_modules.check", lambda *_: None)
    with pytest.raises(ValueError, match=r"'0.weight' is on meta, but whether zeros pay was measured on CPUs only"):
        accelerate(MLP(4, 3).to("meta"), numbers(2, 4))
