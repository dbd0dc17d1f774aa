"""A pruned network is written small; what cannot be stored is an error that names it, and nothing is written."""

import sys
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
from stored import assert_same, first_ones
from torch import Tensor, nn

from lightning_drive import Masks, load_sparse, save_sparse
from lightning_drive.command import main


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_save_sparse__cuda(tmp_path: Path) -> None:
    weight = first_ones(40, 50)
    save_sparse({"a": weight.cuda(), "b": torch.ones(3).cuda()}, tmp_path / "file")
    assert_same(load_sparse(tmp_path / "file"), {"a": weight, "b": torch.ones(3)})


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


HUGE = {
    "expanded": torch.ones(1).expand(10**12),
    "rows": torch.ones(1, 10).expand(10**11, 10),
    "windows": torch.ones(2 * 10**6).as_strided((10**6, 10**6), (1, 1)),
}


@pytest.mark.parametrize("name", HUGE)
def test_expanded(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError, match=r"'a' claims 1,000,000,000,000 numbers, and has"):
        save_sparse({"a": HUGE[name]}, tmp_path / "out")
    torch.save({"state_dict": {"a": HUGE[name]}}, tmp_path / "a.ckpt")
    assert main(["compress", str(tmp_path / "a.ckpt"), str(tmp_path / "out")]) == 2
    assert main(["report", str(tmp_path / "a.ckpt")]) == (2 if name == "windows" else 0)
    bits = {"shape": [8 * 10**12], "bits": torch.ones(1).byte().expand(10**12)}
    with pytest.raises(ValueError, match="does not hold"):
        Masks.from_state_dict({"version": 1, "masks": {"a": bits}})


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
