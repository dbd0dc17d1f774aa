"""What is saved in a sparse file comes back to the bit, is smaller where it can be, and is refused if damaged."""

import io
import json
import os
import pickle
import stat
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from models import Tied
from safetensors import safe_open
from torch import Tensor, nn

from lightning_drive import load_sparse, save_sparse
from lightning_drive.core.bits import pack
from lightning_drive.export import sparse_format, sparse_reader

FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")  # some are newer
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.complex32),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    torch.bool,
    *(getattr(torch, name) for name in FLOAT8 if hasattr(torch, name)),
]
SHAPES = [(), (1,), (0,), (3, 0, 2), (7,), (8, 25), (64, 65), (3, 4, 5, 6)]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, density: float, generator: torch.Generator) -> Tensor:
    """Give numbers of any bits at all, NaN with payloads and -0.0 among them, of which a part is not 0."""
    numbers = torch.Size(shape).numel()
    data = torch.randint(256, (numbers, dtype.itemsize), generator=generator, dtype=torch.uint8)
    if dtype == torch.bool:
        data = data % 2
    data[torch.rand(numbers, generator=generator) >= density] = 0
    return data.view(-1).view(dtype).view(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def sparse(*shape: int, kept: int = 5) -> Tensor:
    """Give a tensor with as many ones, the first ones."""
    tensor = torch.zeros(shape)
    tensor.view(-1)[:kept] = 1
    return tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
def test_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever the numbers, shapes and densities."""
    generator = torch.Generator().manual_seed(0)
    state_dict = {
        f"{density}/{shape}": random_bits(shape, dtype, density, generator)
        for density in (0.0, 0.02, 0.5, 1.0)
        for shape in SHAPES
    }
    save_sparse(state_dict, tmp_path / "file")
    assert_same(load_sparse(tmp_path / "file"), state_dict)


def test_round_trip__negative_zero_and_nan(tmp_path: Path) -> None:
    """A -0.0 is a value, and a NaN keeps its payload."""
    tensor = torch.zeros(1000)
    tensor[3] = -0.0
    tensor.view(torch.int32)[5] = 0x7FA0_1234  # a signalling NaN
    save_sparse({"tensor": tensor}, tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.get_tensor("tensor.values").view(torch.int32).tolist() == [-(1 << 31), 0x7FA0_1234]
    assert_same(load_sparse(tmp_path / "file"), {"tensor": tensor})


def test_round_trip__layouts(tmp_path: Path) -> None:
    """Not contiguous, expanded, channels last, conjugated, negated, parameters."""
    base = sparse(40, 50, kept=7)
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    waves = torch.randn(30, dtype=torch.complex64)
    state_dict = {
        "transposed": base.t(),
        "every_other": torch.arange(100.0)[::2],
        "expanded": torch.ones(1, 4).expand(300, 4),
        "channels_last": image,
        "waves": waves,
        "conjugated": waves.conj(),
        "imaginary": waves.conj().imag,
        "negated": torch._neg_view(base),
        "parameter": nn.Parameter(torch.randn(3)),
    }
    save_sparse(state_dict, tmp_path / "file")
    assert_same(load_sparse(tmp_path / "file"), state_dict)


ONE_NUMBER: dict[str, Callable[[Tensor], Tensor]] = {
    "column": lambda numbers: numbers.view(1, 24)[:, 3],
    "corner": lambda numbers: numbers.view(4, 6)[3:, 5:].t(),
    "block": lambda numbers: numbers.view(2, 3, 4)[1:, 2:, 3:].permute(2, 0, 1),
    "scalar": lambda numbers: numbers.view(4, 6)[1, 2],
    "strided": lambda numbers: numbers.as_strided((1, 1), (7, 11), 5),
    "expanded": lambda numbers: numbers[4].expand(1, 3),
    "nothing": lambda numbers: numbers.view(4, 6)[:0, ::2].t(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("view", ONE_NUMBER)
def test_round_trip__views_of_one_number(view: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Whose strides may be anything, although they are contiguous; also conjugated and negated ones."""
    odd = ONE_NUMBER[view](random_bits((24,), dtype, 1.0, torch.Generator().manual_seed(0)))
    state_dict = {"odd": odd, "parameter": nn.Parameter(odd, requires_grad=False)}
    if dtype in (torch.complex64, torch.complex128):
        state_dict |= {"conjugated": odd.conj(), "imaginary": odd.conj().imag}
    elif dtype in (torch.float32, torch.float64):
        state_dict |= {"negated": torch._neg_view(odd)}
    save_sparse(state_dict, tmp_path / "file")
    found = load_sparse(tmp_path / "file")
    assert list(found) == list(state_dict)
    for name, tensor in state_dict.items():
        expected = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].untyped_storage().tolist() == expected.reshape(-1).untyped_storage().tolist()


def test_save_sparse__format(tmp_path: Path) -> None:
    """The bits of `bits.pack` and the values in order; all else as any reader of safetensors expects it."""
    weight, bias = torch.zeros(30, 40), torch.randn(40)
    weight[2, 3], weight[4, 5] = 0.5, -2.0
    save_sparse({"weight": weight, "bias": bias}, tmp_path / "file")
    found = safetensors.torch.load_file(tmp_path / "file")
    assert found.keys() == {"weight.bits", "weight.values", "bias"}
    assert torch.equal(found["weight.bits"], pack(weight != 0))
    assert torch.equal(found["weight.values"], torch.tensor([0.5, -2.0]))
    assert torch.equal(found["bias"], bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bool, torch.complex64], ids=str)
def test_save_sparse__no_larger_than_dense(dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors are stored sparse exactly where that makes the file smaller, give or take what names take."""
    generator = torch.Generator().manual_seed(0)
    for density in (0.0, 0.3, 0.8, 0.9, 0.97, 1.0):
        tensor = random_bits((200, 50), dtype, 1.0, generator)
        tensor.view(-1)[int(density * 10_000) :] = 0
        save_sparse({"tensor": tensor}, tmp_path / "file")
        kept = int(tensor.count_nonzero())
        expected = min(tensor.nbytes, 10_000 // 8 + kept * tensor.itemsize)
        assert abs((tmp_path / "file").stat().st_size - expected) < 700


def test_save_sparse__small_tensors_stay(tmp_path: Path) -> None:
    """Two entries in the header would be longer than what is saved."""
    save_sparse({"small": torch.zeros(60)}, tmp_path / "file")
    assert safetensors.torch.load_file(tmp_path / "file").keys() == {"small"}


class Network(pl.LightningModule):
    """Large enough for a header not to matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(1, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Sequential(nn.Linear(32 * 16, 200), nn.ReLU(), nn.Linear(200, fits.NUM_CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.max_pool2d(F.relu(self.norm(self.features(images))), 2).flatten(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def test_save_sparse__pruned_network(tmp_path: Path) -> None:
    """At a sparsity of 98 % the file is at most a tenth of the dense one, and a new network predicts the same."""
    module, callback = Network(), fits.drive(sparsity=0.98, warmup_epochs=1, rounds=4)
    fits.trainer(tmp_path, callback, max_epochs=2).fit(module, fits.loader())
    torch.save(module.state_dict(), tmp_path / "dense.pt")
    save_sparse(module, tmp_path / "sparse.safetensors")
    assert (tmp_path / "sparse.safetensors").stat().st_size <= (tmp_path / "dense.pt").stat().st_size / 10

    assert_same(load_sparse(tmp_path / "sparse.safetensors"), dict(module.state_dict()))
    other = Network()
    for parameter in other.parameters():
        nn.init.ones_(parameter)
    other.load_state_dict(load_sparse(tmp_path / "sparse.safetensors"))
    images = fits.dataset(seed=1).tensors[0]
    assert torch.equal(other.eval()(images), module.eval()(images))
    assert callback.masks.hold_for(other)


def test_save_sparse__tied(tmp_path: Path) -> None:
    """Stored once, and one tensor under both names again; rows of another tensor are apart; empty ones are no ties."""
    weight = torch.randn(30, 30)
    empty = torch.zeros(0, 2)
    state_dict = {"first": weight, "row": weight[2], "second": weight, "turned": weight.t(), "a": empty, "b": empty}
    save_sparse(state_dict, tmp_path / "file")
    assert safetensors.torch.load_file(tmp_path / "file").keys() == {"first", "row", "turned", "a", "b"}
    found = load_sparse(tmp_path / "file")
    assert_same(found, state_dict)
    assert found["first"] is found["second"]
    found["first"].zero_()
    assert torch.equal(found["row"], weight[2])


def test_save_sparse__tied_module(tmp_path: Path) -> None:
    module, other = Tied(), Tied()
    save_sparse(module, tmp_path / "file")
    other.load_state_dict(load_sparse(tmp_path / "file"))
    assert other.first.weight is other.second.weight
    assert torch.equal(other.first.weight, module.first.weight)


def test_save_sparse__name_clashes(tmp_path: Path) -> None:
    """Whatever names there are, nothing takes the place of anything else."""
    for clash in ("a.bits", "a.values"):
        state_dict = {"a": sparse(40, 40), clash: torch.arange(5.0), "": sparse(40, 40), "é \n\"'": sparse(40, 40)}
        save_sparse(state_dict, tmp_path / "file")
        assert_same(load_sparse(tmp_path / "file"), state_dict)


def test_save_sparse__nothing(tmp_path: Path) -> None:
    save_sparse({}, tmp_path / "file")
    assert load_sparse(tmp_path / "file") == {}


class Versioned(nn.Linear):
    """Reads its own version, as BatchNorm and others do to know an old `state_dict`."""

    _version = 7
    seen: int | None = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        self.seen = local_metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_load_sparse__versions_of_modules(tmp_path: Path) -> None:
    module = nn.Sequential(Versioned(2, 2))
    save_sparse(module, tmp_path / "file")
    module.load_state_dict(load_sparse(tmp_path / "file"))
    assert module[0].seen == 7
    save_sparse(OrderedDict(module.state_dict()), tmp_path / "file")  # a plain copy has none
    module.load_state_dict(load_sparse(tmp_path / "file"))
    assert module[0].seen is None


def test_load_sparse__memory_of_its_own(tmp_path: Path) -> None:
    """What is loaded can be changed, and does not change with the file."""
    state_dict = {"whole": torch.ones(1000), "sparse": sparse(1000), "wave": torch.ones(9, dtype=torch.complex64)}
    save_sparse(state_dict, tmp_path / "file")
    found = load_sparse(tmp_path / "file")
    size = (tmp_path / "file").stat().st_size
    with (tmp_path / "file").open("r+b") as file:  # in place, unlike `save_sparse`
        file.write(b"\xff" * size)
    assert_same(found, state_dict)
    found["whole"].add_(1)
    assert (tmp_path / "file").read_bytes() == b"\xff" * size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_save_sparse__cuda(tmp_path: Path) -> None:
    weight = sparse(40, 50)
    save_sparse({"a": weight.cuda(), "b": torch.ones(3).cuda()}, tmp_path / "file")
    assert_same(load_sparse(tmp_path / "file"), {"a": weight, "b": torch.ones(3)})


# What is refused when saving.


class Doubled(Tensor):
    """A tensor whose numbers lie in two others, as those of some quantised tensors do."""

    @staticmethod
    def __new__(cls, first: Tensor) -> "Doubled":
        return Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype)

    def __init__(self, first: Tensor) -> None:
        self.first = first

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["first"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


class Hidden(Doubled):
    """The same, of a class that does not say so."""

    __tensor_flatten__ = property()  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore:.*(beta state|prototype stage|[qQ]uantize)")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: [1.0], "'bad' is of type list, and only tensors can be stored", id="list"),
        pytest.param(lambda: None, "'bad' is of type NoneType", id="none"),
        pytest.param(lambda: torch.eye(3).to_sparse(), r"layout torch.sparse_coo. Make it dense", id="sparse"),
        pytest.param(lambda: torch.empty(3, device="meta"), "'bad' is on the meta device", id="meta"),
        pytest.param(lambda: nn.LazyLinear(3).weight, "'bad' has no shape yet", id="lazy"),
        pytest.param(lambda: Doubled(torch.ones(3)), "'bad' is a Doubled of torch.float32", id="subclass"),
        pytest.param(lambda: Hidden(torch.ones(3)), "'bad' is a Hidden of torch.float32", id="wrapper"),
        pytest.param(lambda: torch.eye(3).to_sparse_csr(), r"layout torch.sparse_csr. Make it dense", id="csr"),
        pytest.param(
            lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "is a Tensor of torch.qint8", id="q"
        ),
        pytest.param(lambda: torch.nested.nested_tensor([torch.ones(2)]), "'bad' is a nested tensor", id="nested"),
        pytest.param(lambda: torch.zeros(3, dtype=torch.bits8), "of torch.bits8, which cannot be", id="dtype"),
    ],
)
def test_save_sparse__no_tensor(make: Callable[[], Any], message: str, tmp_path: Path) -> None:
    """Refused by name, with nothing written."""
    with pytest.raises(TypeError, match=message):
        save_sparse({"good": torch.ones(3), "bad": make()}, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_save_sparse__sharded(tmp_path: Path) -> None:
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.tensor import DTensor, Shard

        mesh = distributed.init_device_mesh("cpu", (1,))
        weight = DTensor.from_local(torch.ones(4, 2), mesh, [Shard(0)])
        with pytest.raises(TypeError, match=r"'weight' is split over ranks. Gather it first: .*get_model_state_dict"):
            save_sparse({"weight": weight}, tmp_path / "file")
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["__metadata__", 3], ids=repr)
def test_save_sparse__bad_names(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"must be a text other than '__metadata__', got {name!r}"):
        save_sparse({name: torch.ones(3)}, tmp_path / "file")


def test_metadata(tmp_path: Path) -> None:
    metadata = {"note": 'two\nlines, "quoted", é', "": ""}
    save_sparse({"a": torch.ones(1)}, tmp_path / "file", metadata=metadata)
    assert sparse_reader.read_metadata(tmp_path / "file") == metadata
    save_sparse({"a": torch.ones(1)}, tmp_path / "file")
    assert sparse_reader.read_metadata(tmp_path / "file") == {}


class Unread:
    """A safetensors file whose tensors must not be read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.file = safe_open(*args, **kwargs)

    def __enter__(self) -> "Unread":
        self.file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        assert name in ("metadata", "keys")
        return getattr(self.file, name)


def test_metadata__reads_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be of a file that is large."""
    save_sparse({"a": torch.ones(1), "b": torch.eye(100)}, tmp_path / "file", metadata={"mine": "text"})
    monkeypatch.setattr(safetensors, "safe_open", Unread)
    assert sparse_reader.read_metadata(tmp_path / "file") == {"mine": "text"}
    with pytest.raises(AssertionError):
        load_sparse(tmp_path / "file")


@pytest.mark.parametrize(
    ("metadata", "kind", "message"),
    [
        ({"epoch": 3}, TypeError, "`metadata` must be texts by name, but 'epoch' is not"),
        ({3: "epoch"}, TypeError, "`metadata` must be texts by name, but 3 is not"),
        ({"lightning_drive": ""}, ValueError, "may not have the key 'lightning_drive'"),
    ],
)
def test_metadata__refused(metadata: Any, kind: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        save_sparse({}, tmp_path / "file", metadata=metadata)


@pytest.mark.parametrize("function", ["save_sparse", "load_sparse"])
def test_files__without_safetensors(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sparse({}, tmp_path / "file")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    arguments = ({}, tmp_path / "file") if function == "save_sparse" else (tmp_path / "file",)
    with pytest.raises(ModuleNotFoundError, match=f"`{function}` needs safetensors: `pip install safetensors`"):
        {"save_sparse": save_sparse, "load_sparse": load_sparse}[function](*arguments)


# How a file comes to its place.


@pytest.mark.parametrize("error", [KeyboardInterrupt, safetensors.SafetensorError], ids=lambda error: error.__name__)
def test_save_sparse__interrupted(error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays, and nothing else is left."""
    save_sparse({"old": torch.ones(3)}, tmp_path / "file")

    def stop(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise error("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", stop)
    with pytest.raises(OSError if error is safetensors.SafetensorError else error, match="disk full"):
        save_sparse({"new": torch.ones(3)}, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert load_sparse(tmp_path / "file").keys() == {"old"}


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of another kind")
def test_save_sparse__permissions_and_links(tmp_path: Path) -> None:
    """As of any new file; those of a file that is replaced stay, and so does a link to it."""

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    (tmp_path / "usual").touch()
    save_sparse({}, tmp_path / "new")
    assert mode(tmp_path / "new") == mode(tmp_path / "usual")
    (tmp_path / "usual").chmod(0o640)
    (tmp_path / "link").symlink_to(tmp_path / "usual")
    save_sparse({"a": torch.ones(1)}, tmp_path / "link")
    assert mode(tmp_path / "usual") == 0o640
    assert (tmp_path / "link").is_symlink()
    assert load_sparse(tmp_path / "usual").keys() == {"a"}


def test_save_sparse__nowhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a file, but is a folder or a device"):
        save_sparse({}, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no folder '.*nowhere' to write a file in"):
        save_sparse({}, tmp_path / "nowhere" / "file")


# What is refused when loading.


SMALL = {"weight": sparse(40, 40), "bias": torch.arange(4.0), "tied": torch.ones(2)}
SMALL["wave"] = torch.ones(2, dtype=torch.complex64)
SMALL["same"] = SMALL["tied"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file with a tensor of each kind."""
    path = tmp_path / "small.safetensors"
    save_sparse(SMALL, path, metadata={"note": "text"})
    return path


def test_load_sparse__truncated(small: Path) -> None:
    """Refused by name, wherever it was cut off, or if something was added."""
    whole = small.read_bytes()
    for length in [*range(0, len(whole), 3), len(whole) - 1]:
        small.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"small\.safetensors"):
            load_sparse(small)
    small.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=r"small\.safetensors"):
        load_sparse(small)


def test_load_sparse__flipped(small: Path) -> None:
    """One wrong bit, anywhere, is found, unless it changes nothing."""
    whole = small.read_bytes()
    refused, positions = 0, range(0, len(whole), 3)
    for position in positions:
        wrong = bytearray(whole)
        wrong[position] ^= 1 << position % 8
        small.write_bytes(wrong)
        try:
            assert_same(load_sparse(small), SMALL)
            assert sparse_reader.read_metadata(small) == {"note": "text"}
        except ValueError as error:
            assert "small.safetensors" in str(error)  # noqa: PT017  # in most, not in all
            refused += 1
    assert refused > 0.99 * len(positions)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(b'"bias":{"dtype":"F32","shape":[4]', b'"bias":{"dtype":"I32","shape":[4]', id="dtype"),
        pytest.param(b'"shape":[2,3]', b'"shape":[3,2]', id="shape"),
        pytest.param(b'"note":"text"', b'"note":"next"', id="metadata"),
    ],
)
def test_load_sparse__header_changed(before: bytes, after: bytes, tmp_path: Path) -> None:
    """The checksum is over what a tensor is called and how it is read, too."""
    path = tmp_path / "file"
    save_sparse({**SMALL, "turned": torch.ones(2, 3)}, path, metadata={"note": "text"})
    content = path.read_bytes()
    assert content.count(before) == 1
    path.write_bytes(content.replace(before, after))
    with pytest.raises(ValueError, match="does not have the checksum that was written with it"):
        load_sparse(path)


class Payload:
    """Leaves a trace when it is unpickled."""

    ran = False

    def __reduce__(self) -> Any:
        return exec, ("import test_sparse_files; test_sparse_files.Payload.ran = True",)


def _torch_checkpoint() -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": SMALL, "payload": Payload()}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(lambda: b"", "not a file that `save_sparse` wrote", id="empty"),
        pytest.param(lambda: b"# Just a text\n" * 20, "not a file that `save_sparse` wrote", id="text"),
        pytest.param(_torch_checkpoint, "not a file that `save_sparse` wrote", id="torch"),
        pytest.param(lambda: pickle.dumps(Payload()), "not a file that `save_sparse` wrote", id="pickle"),
        pytest.param(
            lambda: safetensors.torch.save({"a": torch.ones(3)}, {"format": "pt"}),
            r"is a safetensors file, but not one that `save_sparse` wrote\. Read it with",
            id="safetensors",
        ),
        pytest.param(
            lambda: safetensors.torch.save({"a": torch.ones(3)}), "is a safetensors file, but not", id="no_metadata"
        ),
    ],
)
def test_load_sparse__foreign(content: Callable[[], bytes], message: str, tmp_path: Path) -> None:
    """Refused by name, with nothing unpickled."""
    (tmp_path / "foreign.file").write_bytes(content())
    for function in (load_sparse, sparse_reader.read_metadata):
        with pytest.raises(ValueError, match=rf"foreign\.file.*{message}"):
            function(tmp_path / "foreign.file")
    assert not Payload.ran


def test_load_sparse__missing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=f"There is no file '{path}'"):
            load_sparse(path)


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def crafted(path: Path, change: Change) -> None:
    """Change what a file says of itself, or its tensors, and write it again with the right checksum."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        stored = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    record = json.loads(metadata.pop("lightning_drive"))
    change(record, stored)
    record["digest"] = sparse_format.digest_of(record, metadata, stored)
    safetensors.torch.save_file(stored, path, {**metadata, "lightning_drive": json.dumps(record)})


def entry(name: str, **values: Any) -> Change:
    return lambda record, stored: record["tensors"][name].update(values)


def part(key: str, tensor: Tensor) -> Change:
    return lambda record, stored: stored.update({key: tensor})


def record_entry(**values: Any) -> Change:
    return lambda record, stored: record.update(values)


def test_crafted__unchanged(small: Path) -> None:
    """What the other tests below change would otherwise be read."""
    crafted(small, lambda record, stored: None)
    assert_same(load_sparse(small), SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(part("weight.bits", torch.full((200,), 255).byte()), "1,600 bits set, but 5", id="many_bits"),
        pytest.param(part("weight.values", torch.ones(4)), "5 bits set, but 4 values", id="few_values"),
        pytest.param(part("weight.values", torch.ones(5, 1)), "do not fit its shape", id="values_2d"),
        pytest.param(part("weight.bits", torch.zeros(201, dtype=torch.uint8)), "do not fit its shape", id="long_bits"),
        pytest.param(part("weight.bits", torch.zeros(200, dtype=torch.int8)), "do not fit its shape", id="bits_dtype"),
        pytest.param(
            lambda record, stored: (stored["weight.bits"].fill_(255), entry("weight", shape=[1593])(record, stored)),
            "bits set behind the 1,593",
            id="padding",
        ),
        pytest.param(entry("weight", shape=[1 << 40, 1 << 40]), "do not fit its shape", id="huge"),
        pytest.param(entry("weight", shape=[1 << 33]), "do not fit its shape", id="large"),
        pytest.param(entry("weight", shape=[0, 1 << 62]), "a shape that no sparse tensor has", id="no_numbers"),
        pytest.param(entry("weight", shape=[1] * 98 + [1600]), "a shape that no sparse tensor has", id="dimensions"),
        pytest.param(entry("weight", shape=[-40, -40]), "no valid shape", id="negative"),
        pytest.param(entry("weight", shape=[1600, True]), "no valid shape", id="bool"),
        pytest.param(entry("weight", shape=[1600.0]), "no valid shape", id="float"),
        pytest.param(entry("weight", shape=None), "no valid shape", id="no_shape"),
        pytest.param(entry("weight", dtype="complex64"), "bytes that are no whole numbers of complex64", id="dtype"),
        pytest.param(entry("weight", stored="dense"), "how 'weight' is stored", id="stored"),
        pytest.param(entry("weight", stored=["whole"]), "how 'weight' is stored", id="stored_list"),
        pytest.param(lambda record, stored: record["tensors"].update(weight=[]), "how 'weight' is stored", id="entry"),
        pytest.param(entry("wave", shape=[3]), "has 2 numbers, but its shape", id="wave_shape"),
        pytest.param(entry("wave", shape=[2, 1 << 62, 0]), "has 2 numbers, but its shape", id="wave_huge"),
        pytest.param(entry("wave", dtype="load"), "numbers of the unknown kind 'load'", id="unknown_dtype"),
        pytest.param(entry("wave", dtype=["complex64"]), "numbers of the unknown kind", id="dtype_list"),
        pytest.param(part("wave", torch.ones(15, dtype=torch.uint8)), "no whole numbers of complex64", id="wave_bytes"),
        pytest.param(entry("same", to="nothing"), "tied to a tensor that does not come before", id="tied_to_nothing"),
        pytest.param(entry("same", to="same"), "tied to a tensor that does not come before", id="tied_to_itself"),
        pytest.param(entry("same", to=["tied"]), "tied to a tensor that does not come before", id="tied_to_list"),
        pytest.param(part("extra", torch.ones(1)), "should have other tensors: extra", id="extra"),
        pytest.param(lambda record, stored: stored.pop("weight.bits"), "other tensors: weight.bits", id="missing"),
        pytest.param(record_entry(tensors=[]), "what it says of itself cannot be read", id="tensors"),
        pytest.param(record_entry(versions={"": "1"}), "versions of its modules", id="versions"),
        pytest.param(record_entry(versions=[1]), "versions of its modules", id="versions_list"),
        pytest.param(record_entry(version=2), "has version 2, but this lightning_drive reads version 1", id="newer"),
    ],
)
def test_load_sparse__crafted(change: Change, message: str, small: Path) -> None:
    """A right checksum does not help, and nothing of the size that a file claims is made before it is checked."""
    crafted(small, change)
    with pytest.raises(ValueError, match=rf"small\.safetensors.*({message})"):
        load_sparse(small)


@pytest.mark.parametrize("text", ["", "{", "null", "[" * 100_000, "1" * 10_000, "{}"], ids=lambda text: text[:3])
def test_load_sparse__crafted_text(text: str, small: Path) -> None:
    safetensors.torch.save_file({}, small, {"lightning_drive": text})
    with pytest.raises(ValueError, match=r"small\.safetensors.*what it says of itself cannot be read"):
        load_sparse(small)


def test_load_sparse__crafted_header(small: Path) -> None:
    """A shape without numbers that torch cannot have."""
    record = {"version": 1, "tensors": {"a": {"stored": "whole"}}}
    header = json.dumps(
        {
            "__metadata__": {"lightning_drive": json.dumps(record)},
            "a": {"dtype": "F32", "shape": [(1 << 64) - 1, 0], "data_offsets": [0, 0]},
        }
    ).encode()
    small.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"small\.safetensors.*not a file that `save_sparse` wrote"):
        load_sparse(small)
