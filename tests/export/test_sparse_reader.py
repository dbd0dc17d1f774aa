"""A sparse file is read as it was written, or one error says what is wrong with it; nothing in it is run."""

import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from stored import Change, assert_same, crafted, first_ones
from torch import Tensor, nn

from lightning_drive import load_sparse, save_sparse
from lightning_drive.export import sparse_format, sparse_reader


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
    state_dict = {"whole": torch.ones(1000), "sparse": first_ones(1000), "wave": torch.ones(9, dtype=torch.complex64)}
    save_sparse(state_dict, tmp_path / "file")
    found = load_sparse(tmp_path / "file")
    size = (tmp_path / "file").stat().st_size
    with (tmp_path / "file").open("r+b") as file:  # in place, unlike `save_sparse`
        file.write(b"\xff" * size)
    assert_same(found, state_dict)
    found["whole"].add_(1)
    assert (tmp_path / "file").read_bytes() == b"\xff" * size


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


SMALL = {"weight": first_ones(40, 40), "bias": torch.arange(4.0), "tied": torch.ones(2)}


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


def test_metadata__every_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a new file and of one of the former version, whose only checksum is that of everything."""
    for former in (False, True):
        path = tmp_path / f"{former}"
        with monkeypatch.context() as patch:
            if former:
                patch.setattr(sparse_format, "digest_of_texts", lambda *_: None)
            save_sparse({"a": torch.eye(30)}, path, metadata={"checkpoint": '{"epoch": 12}'})
        if former:
            with safetensors.safe_open(path, "pt") as file:
                metadata, stored = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            record = json.loads(metadata.pop("lightning_drive"))
            del record["digest_of_texts"]
            record["digest"] = sparse_format.digest_of(record, metadata, stored)
            safetensors.torch.save_file(stored, path, {**metadata, "lightning_drive": json.dumps(record)})
        assert torch.equal(load_sparse(path)["a"], torch.eye(30))
        assert sparse_reader.read_metadata(path) == {"checkpoint": '{"epoch": 12}'}
        whole = path.read_bytes()
        place = whole.index(b"epoch")
        for bit in range(8 * place, 8 * (place + 12)):
            wrong = bytearray(whole)
            wrong[bit // 8] ^= 1 << bit % 8
            path.write_bytes(wrong)
            with pytest.raises(ValueError, match="damaged"):
                sparse_reader.read_metadata(path)


class Payload:
    """Leaves a trace when it is unpickled."""

    ran = False

    def __reduce__(self) -> Any:
        return exec, ("import test_sparse_reader; test_sparse_reader.Payload.ran = True",)


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
        pytest.param(record_entry(tensors=[]), "its description of itself cannot be read", id="tensors"),
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
    with pytest.raises(ValueError, match=r"small\.safetensors.*its description of itself cannot be read"):
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
