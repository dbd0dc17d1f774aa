"""The command makes checkpoints small and whole again, prints what was pruned, and prints an error as one line."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import fits
import lightning.pytorch as pl
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from commands import fails, in_shell, succeeds
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_drive import DRIVEPruningCallback, PruningReport, load_sparse, save_sparse
from lightning_drive.command import main

PACKAGE = Path(__file__).parents[1]
Run: TypeAlias = "tuple[Path, Network, DRIVEPruningCallback]"


class Network(pl.LightningModule):
    """Large enough for a header not to matter, with hyper-parameters of several kinds."""

    def __init__(
        self, width: int = 10, rates: tuple[float, ...] = (1.0,), names: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.BatchNorm1d(width), nn.Linear(width, 4))
        self.loaded: dict[str, Any] = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"names": ("cat", "dog"), "seen": 3}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint["mine"]

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.flatten(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self(batch[0])

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["rates"][0])


class OurOwn(DRIVEPruningCallback):
    """A subclass, whose state has another name in the checkpoint."""


SETTINGS: dict[str, Any] = {"width": 300, "rates": (0.01, 0.1), "names": {"a": [None, True, ("x", float("inf"))]}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A checkpoint of a pruned run, with the module and the callback as they were then."""
    folder = tmp_path_factory.mktemp("run")
    module = Network(**SETTINGS)
    callback = OurOwn(sparsity=0.98, warmup_epochs=1, rounds=3)
    trainer = fits.trainer(folder, callback, max_epochs=2)
    trainer.fit(module, fits.loader())
    trainer.save_checkpoint(folder / "pruned.ckpt")
    return folder / "pruned.ckpt", module.eval(), callback


@pytest.fixture
def checkpoint(run: Run) -> Path:
    return run[0]


def test_compress(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights are those of the checkpoint, and the printed sizes are true."""
    checkpoint, module, _ = run
    out = tmp_path / "small.safetensors"
    lines = succeeds(capsys, "compress", checkpoint, out).splitlines()
    before, after = checkpoint.stat().st_size, out.stat().st_size
    weights = sum(tensor.nbytes for tensor in module.state_dict().values())
    assert lines == [
        f"{checkpoint}: {before:,} bytes, of which {weights:,} are weights and buffers",
        f"{out}: {after:,} bytes, {after / weights:.2%} of the weights and {after / before:.2%} of the checkpoint",
    ]
    assert after < weights / 5  # a third of it is BatchNorm and biases
    assert fits.equal_states(load_sparse(out), fits.state_of(module))


def test_expand(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`load_from_checkpoint` builds the module with its hyper-parameters, and it predicts the same."""
    checkpoint, module, _ = run
    succeeds(capsys, "compress", checkpoint, tmp_path / "small")
    line = succeeds(capsys, "expand", tmp_path / "small", tmp_path / "large.ckpt")
    size = (tmp_path / "large.ckpt").stat().st_size
    assert line == (
        f"{tmp_path / 'large.ckpt'}: {size:,} bytes, {len(module.state_dict())} tensors,"
        " hyper-parameters: width, rates, names, dtype\n"
    )
    again = Network.load_from_checkpoint(tmp_path / "large.ckpt").eval()
    assert fits.equal_states(fits.state_of(again), fits.state_of(module))
    assert {name: again.hparams[name] for name in SETTINGS} == SETTINGS
    images = fits.dataset(seed=1).tensors[0]
    assert torch.equal(again(images), module(images))

    old, new = (torch.load(path, weights_only=True) for path in (checkpoint, tmp_path / "large.ckpt"))
    kept = {"epoch", "global_step", "pytorch-lightning_version", "hparams_name", "mine"}
    assert new.keys() == {*kept, "hyper_parameters", "lightning_drive", "state_dict"}
    assert all(new[key] == old[key] for key in kept)
    assert again.loaded == {"names": ("cat", "dog"), "seen": 3}


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_expand__for_a_trainer(stage: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Trainer that has the callback again takes the file for its ``ckpt_path``."""
    checkpoint, module, _ = run
    succeeds(capsys, "compress", checkpoint, tmp_path / "small")
    succeeds(capsys, "expand", tmp_path / "small", tmp_path / "large.ckpt")
    fresh = Network(**SETTINGS)
    trainer = fits.trainer(tmp_path, OurOwn(sparsity=0.98, warmup_epochs=1, rounds=3))
    getattr(trainer, stage)(fresh, fits.loader(), ckpt_path=tmp_path / "large.ckpt")
    assert fits.equal_states(fits.state_of(fresh), fits.state_of(module))


def test_compress__entries_left_out(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "centres": torch.ones(3), "keys": {1: 2}}, tmp_path / "odd.ckpt")
    *_, line = succeeds(capsys, "compress", tmp_path / "odd.ckpt", tmp_path / "small").splitlines()
    assert line == (
        "Entries that JSON cannot hold are left out: centres (Tensor), keys (dict). If your `on_load_checkpoint` reads"
        " them, it must do without."
    )


def test_compress__hyper_parameters_left_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What JSON cannot hold is named; all else is kept."""
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"] |= {"dtype": torch.float32, "keys": {1: 2}, "size": torch.Size([2])}
    content["hyper_parameters"] |= {"marked": {"__tuple__": [1]}, "__tuple__": [1]}
    torch.save(content, tmp_path / "odd.ckpt")
    *_, line = succeeds(capsys, "compress", tmp_path / "odd.ckpt", tmp_path / "small").splitlines()
    assert line == (
        "Hyper-parameters that JSON cannot hold are left out: dtype (dtype), keys (dict), size (Size), marked (dict),"
        " __tuple__ (list). Give them to `load_from_checkpoint` again."
    )
    succeeds(capsys, "expand", tmp_path / "small", tmp_path / "large.ckpt")
    again = Network.load_from_checkpoint(tmp_path / "large.ckpt")
    assert {name: again.hparams[name] for name in SETTINGS} == SETTINGS


class Config(dict[str, Any]):
    """A mapping of the user's own, as those of OmegaConf are."""


PICKLED: dict[str, tuple[Any, str]] = {
    "own_class": ({"names": Config(a=1)}, "names (Config)"),
    "namespace": ({"names": argparse.Namespace(a=1)}, "names (Namespace)"),
    "path": ({"names": Path("data")}, f"names ({type(Path()).__name__})"),
    "numpy": ({"names": np.float64(0.5)}, "names (float64)"),
    "as_a_whole": (argparse.Namespace(**SETTINGS), "hyper_parameters (Namespace)"),
}


@pytest.mark.parametrize("kind", PICKLED)
def test_trust_pickle(kind: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such a checkpoint is an error that names the flag; with it, only entries that JSON cannot hold are left out."""
    value, name = PICKLED[kind]
    content = torch.load(run[0], weights_only=True)
    content["hyper_parameters"] = {**SETTINGS, **value} if isinstance(value, dict) else value
    path, out = tmp_path / "odd.ckpt", tmp_path / "small"
    torch.save(content, path)
    for arguments in (("report", path), ("compress", path, out)):
        assert "`--trust-pickle`" in fails(capsys, *arguments)
    assert not out.exists()
    assert str(run[2].report) in succeeds(capsys, "report", path, "--trust-pickle")
    *_, line = succeeds(capsys, "compress", "--trust-pickle", path, out).splitlines()
    assert line.startswith(f"Hyper-parameters that JSON cannot hold are left out: {name}. Give them")
    assert fits.equal_states(load_sparse(out), content["state_dict"])


def test_trust_pickle__of_the_current_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class is imported from the current folder, as `plan` does it; elsewhere the error names its module."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    (here / "settings_of_mine.py").write_text("class Settings:\n    pass\n")
    content = torch.load(checkpoint, weights_only=True)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(here)
        patch.delitem(sys.modules, "settings_of_mine", raising=False)
        content["hyper_parameters"]["names"] = importlib.import_module("settings_of_mine").Settings()
        torch.save(content, tmp_path / "odd.ckpt")
    sys.modules.pop("settings_of_mine", None)
    monkeypatch.chdir(elsewhere)
    message = fails(capsys, "report", "--trust-pickle", tmp_path / "odd.ckpt")
    assert "cannot be imported here: No module named 'settings_of_mine'" in message
    monkeypatch.chdir(here)
    succeeds(capsys, "report", "--trust-pickle", tmp_path / "odd.ckpt")
    sys.modules.pop("settings_of_mine", None)


def test_trust_pickle__warns_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("report", "compress"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "RUNS CODE FROM THE FILE" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "odd",
    [
        torch.arange(2.0, 7.0).view(1, 5)[:, 0],
        torch.arange(6.0).view(2, 3)[1:, 2:].t(),
        torch.arange(8, dtype=torch.bfloat16).view(2, 2, 2)[1:, :1, 1],
    ],
)
def test_compress__view_of_one_number(
    odd: Tensor, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["odd"] = odd
    torch.save(content, tmp_path / "odd.ckpt")
    succeeds(capsys, "compress", tmp_path / "odd.ckpt", tmp_path / "small")
    assert torch.equal(load_sparse(tmp_path / "small")["odd"], odd)


@pytest.mark.parametrize("version", [None, "0.9.0", "1.5.10", "1.6.2", "1.9.0", "2.0.0"])
def test_expand__other_versions(
    version: str | None,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bare `state_dict` and checkpoints of any age can be loaded again."""
    checkpoint, module, _ = run
    content = torch.load(checkpoint, weights_only=True)
    content["pytorch-lightning_version"] = version
    torch.save(content if version else content["state_dict"], tmp_path / "old.ckpt")
    monkeypatch.setattr(Network, "on_load_checkpoint", pl.LightningModule.on_load_checkpoint)  # `mine` may be missing
    succeeds(capsys, "compress", tmp_path / "old.ckpt", tmp_path / "small")
    succeeds(capsys, "expand", tmp_path / "small", tmp_path / "large.ckpt")
    again = Network.load_from_checkpoint(tmp_path / "large.ckpt", width=300)
    assert fits.equal_states(fits.state_of(again), fits.state_of(module))


def test_expand__saved_by_python(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, "on_load_checkpoint", pl.LightningModule.on_load_checkpoint)
    save_sparse(run[1], tmp_path / "small", metadata={"mine": "text"})
    assert "hyper-parameters: none" in succeeds(capsys, "expand", tmp_path / "small", tmp_path / "large.ckpt")
    again = Network.load_from_checkpoint(tmp_path / "large.ckpt", width=300)
    assert fits.equal_states(fits.state_of(again), fits.state_of(run[1]))


def test_compress__dense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"weight": torch.ones(100, 100)}}, tmp_path / "dense.ckpt")
    *_, line = succeeds(capsys, "compress", tmp_path / "dense.ckpt", tmp_path / "small").splitlines()
    assert line == "Nothing was gained: no tensor has enough zeros. Was the checkpoint saved after pruning?"


def test_compress__much_beside_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not for want of zeros that this file is larger than its weights."""
    content = {"state_dict": {"weight": torch.eye(40)}, "notes": "x" * 10_000}
    torch.save(content, tmp_path / "notes.ckpt")
    lines = succeeds(capsys, "compress", tmp_path / "notes.ckpt", tmp_path / "small").splitlines()
    assert len(lines) == 2
    assert (tmp_path / "small").stat().st_size > 40 * 40 * 4


def test_compress__tied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights under two names are counted once."""
    weight = torch.ones(100)
    torch.save({"state_dict": {"a": weight, "b": weight}}, tmp_path / "tied.ckpt")
    assert "of which 400 are weights" in succeeds(capsys, "compress", tmp_path / "tied.ckpt", tmp_path / "small")


@pytest.mark.parametrize("tool", ["torch", "lightning"])
def test_masks_of_another_tool(tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted as the network sees them; compressed and expanded, they load into the plain network."""
    module = Network(width=300)
    layers: list[nn.Linear] = [module.layers[0], module.layers[3]]  # type: ignore[list-item]
    pairs: Any = [(layer, "weight") for layer in layers]
    path, small, whole = tmp_path / "pruned.ckpt", tmp_path / "small.safetensors", tmp_path / "whole.ckpt"
    if tool == "torch":
        prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.9)
        torch.save(module.state_dict(), path)
    else:
        callback = pl.callbacks.ModelPruning(
            "l1_unstructured", pairs, amount=0.9, use_lottery_ticket_hypothesis=False, make_pruning_permanent=False
        )
        trainer = fits.trainer(tmp_path, callback, max_epochs=1)
        trainer.fit(module, fits.loader())
        trainer.save_checkpoint(path)
    expected = [layer.weight.detach() * layer.weight_mask for layer in layers]

    lines = succeeds(capsys, "report", path).splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    zeros = sum(int(table[name][2].replace(",", "")) for name in ("layers.0.weight", "layers.3.weight"))
    assert zeros == sum(int((weight == 0).sum()) for weight in expected) == round(0.9 * (64 * 300 + 300 * 4))
    assert not any(name.endswith(("_orig", "_mask")) for name in table)
    assert "(as 'layers.0.weight_orig' and 'layers.0.weight_mask')" in lines[-1]
    tensors = json.loads(succeeds(capsys, "report", path, "--json"))["tensors"]
    assert [each["name"] for each in tensors] == [*table][1:-2]

    said = succeeds(capsys, "compress", path, small)
    assert "`torch.nn.utils.prune.remove`" in said
    assert small.stat().st_size < 0.3 * path.stat().st_size
    succeeds(capsys, "expand", small, whole)
    plain = Network(width=300)
    plain.load_state_dict(torch.load(whole, weights_only=True)["state_dict"])
    for layer, weight in zip((plain.layers[0], plain.layers[3]), expected, strict=True):
        assert torch.equal(layer.weight, weight)  # type: ignore[arg-type]


def test_masks_of_the_module_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What they prune is not known here; they are named, and stored as they are."""
    stored = {"0.weight": torch.ones(40, 40), "0.mask": torch.eye(40)}
    torch.save(stored, tmp_path / "own.ckpt")
    small = tmp_path / "small.safetensors"
    for arguments in (("report", tmp_path / "own.ckpt"), ("compress", tmp_path / "own.ckpt", small)):
        last = succeeds(capsys, *arguments).splitlines()[-1]
        assert last.startswith("These seem to be masked by a buffer of their module: '0.weight' (by '0.mask').")
    assert fits.equal_states(load_sparse(small), stored)


@pytest.mark.parametrize("command", ["compress", "expand"])
def test_overwrite(command: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeeds(capsys, "compress", checkpoint, tmp_path / "small")
    source = checkpoint if command == "compress" else tmp_path / "small"
    (tmp_path / "out").write_text("precious")
    error = fails(capsys, command, source, tmp_path / "out")
    assert "out' exists already. Choose another name, or set `--overwrite` to replace it." in error
    assert (tmp_path / "out").read_text() == "precious"
    succeeds(capsys, command, source, tmp_path / "out", "--overwrite")
    assert (tmp_path / "out").read_bytes()[:8] != b"precious"
    assert f"OUT must be another file than '{source}'" in fails(capsys, command, source, source, "--overwrite")


# Reports.


def test_report(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _, callback = run
    assert succeeds(capsys, "report", checkpoint) == f"{callback.report}\n"
    printed = json.loads(succeeds(capsys, "report", "--json", checkpoint))
    assert printed["callback"] == "OurOwn"
    assert PruningReport.from_dict(printed["report"]) == callback.report


def test_report__after_compress(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report goes along into the sparse file, and from there into the checkpoint that is made of it."""
    checkpoint, _, callback = run
    small, large, again = (tmp_path / name for name in ("small.safetensors", "large.ckpt", "again.safetensors"))
    succeeds(capsys, "compress", checkpoint, small)
    succeeds(capsys, "expand", small, large)
    succeeds(capsys, "compress", large, again)
    for path in (small, large, again):
        assert succeeds(capsys, "report", path) == f"{callback.report}\n"
        assert json.loads(succeeds(capsys, "report", path, "--json"))["callback"] == "OurOwn"
        assert PruningReport.from_checkpoint(path) == callback.report


def test_report__of_a_sparse_file_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sparse({"weight": torch.eye(400)}, tmp_path / "small")
    first, *_, last = succeeds(capsys, "report", tmp_path / "small").splitlines()
    assert first.startswith(f"No report in {tmp_path / 'small'}: no pruning callback was saved in it.")
    assert last.split() == ["all", "160,000", "159,600", "99.75%"]


def test_report__sharded(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a folder the report can be read, but not the weights."""
    checkpoint, _, callback = run
    content = torch.load(checkpoint, weights_only=True)
    (tmp_path / "sharded").mkdir()
    del content["state_dict"]
    torch.save(content, tmp_path / "sharded" / "meta.pt")
    assert succeeds(capsys, "report", tmp_path / "sharded") == f"{callback.report}\n"
    del content["callbacks"]
    torch.save(content, tmp_path / "sharded" / "meta.pt")
    assert "sharded' is a sharded checkpoint, a folder" in fails(capsys, "report", tmp_path / "sharded")


@pytest.mark.parametrize("name", fits.CALLBACKS)
def test_report__every_callback(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback, module = fits.CALLBACKS[name](), fits.ConvModule()
    trainer = fits.trainer(tmp_path, callback, max_epochs=3)
    trainer.fit(module, fits.loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert succeeds(capsys, "report", tmp_path / "last.ckpt") == f"{callback.report}\n"


@pytest.mark.parametrize("kind", ["no_callback", "not_yet", "state_dict"])
def test_report__zeros(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Worked out by hand."""
    state_dict = {
        "weight": torch.eye(40),
        "wave": torch.tensor([0j, 1j]),
        "flags": torch.tensor([True, False]),
        "count": torch.tensor(0),
        "none": torch.zeros(0, 3),
    }
    content: dict[str, Any] = {"state_dict": state_dict, "callbacks": {"Timer": {"report": {}}, "Other": None}}
    if kind == "not_yet":
        content["callbacks"]["DRIVEPruningCallback"] = DRIVEPruningCallback(sparsity=0.5).state_dict()
    path = tmp_path / "last.ckpt"
    torch.save(state_dict if kind == "state_dict" else content, path)
    reason = "DRIVEPruningCallback had not pruned yet" if kind == "not_yet" else "no pruning callback was saved in it"
    assert succeeds(capsys, "report", path).splitlines() == [
        f"No report in {path}: {reason}. These are the zeros in all parameters and buffers:",
        "tensor  shape  numbers  zeros    share",
        "weight  40x40    1,600  1,560   97.50%",
        "wave    2            2      1   50.00%",
        "flags   2            2      1   50.00%",
        "count                1      1  100.00%",
        "none    0x3          0      0    0.00%",
        "all              1,605  1,563   97.38%",
    ]
    printed = json.loads(succeeds(capsys, "report", path, "--json"))
    assert printed["report"] is None
    assert printed["callback"] == ("DRIVEPruningCallback" if kind == "not_yet" else None)
    assert printed["tensors"][0] == {"name": "weight", "shape": [40, 40], "numbers": 1600, "zeros": 1560}
    assert [tensor["zeros"] for tensor in printed["tensors"]] == [1560, 1, 1, 1, 0]


# Errors.


@pytest.mark.parametrize("command", ["compress", "report"])
def test_errors__checkpoint(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is one line that names the file; nothing is written. `test_checkpoints` has all that a file can be."""
    path = tmp_path / "bad.ckpt"
    arguments = (command, path, tmp_path / "out") if command == "compress" else (command, path)

    assert f"There is no file '{path}'" in fails(capsys, *arguments)
    path.write_text("text")
    assert f"'{path}' is not a file that `torch.save` wrote, or it is damaged" in fails(capsys, *arguments)
    torch.save({"state_dict": {}, "hyper_parameters": argparse.Namespace(lr=1)}, path)
    assert f"'{path}' holds a argparse.Namespace, and" in fails(capsys, *arguments)
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    assert f"'{path}' {'seems to be' if command == 'compress' else 'is'} a safetensors file" in fails(
        capsys, *arguments
    )
    torch.save({"state_dict": [1]}, path)
    assert f"The 'state_dict' in '{path}' must be a dictionary, got a list" in fails(capsys, *arguments)
    torch.save({"state_dict": {"a": torch.ones(1), "b": 1}}, path)
    assert "but in its 'state_dict' are 'b', which are no tensors" in fails(capsys, *arguments)
    torch.save({"epoch": 1}, path)
    assert "but in it are 'epoch', which are no tensors" in fails(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def no_such_shape() -> bytes:
    """Return a file with a tensor that makes torch raise an error of many lines."""
    record = {"version": 1, "tensors": {"a": {"stored": "whole"}}}
    tensor = {"dtype": "F32", "shape": [(1 << 64) - 1, 0], "data_offsets": [0, 0]}
    header = json.dumps({"__metadata__": {"lightning_drive": json.dumps(record)}, "a": tensor}).encode()
    return len(header).to_bytes(8, "little") + header


def test_errors__sparse(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "is not a file that `save_sparse` wrote" in fails(capsys, "expand", checkpoint, out)
    assert f"There is no file '{tmp_path / 'missing'}'" in fails(capsys, "expand", tmp_path / "missing", out)
    (tmp_path / "small").write_bytes(no_such_shape())
    assert "is not a file that `save_sparse` wrote" in fails(capsys, "expand", tmp_path / "small", out)
    for text in ("[1]", "{", "[" * 100_000, '{"__tuple__": 1}'):
        save_sparse({}, tmp_path / "small", metadata={"checkpoint": text})
        assert "that `lightning-drive compress` did not write" in fails(capsys, "expand", tmp_path / "small", out)
    assert not out.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=lambda error: error.__name__)
def test_errors__interrupted(
    error: type[BaseException],
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The old file stays, and nothing else is left."""

    def stop(content: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise error("disk full")

    succeeds(capsys, "compress", checkpoint, tmp_path / "small")
    (tmp_path / "out").write_text("old")
    monkeypatch.setattr(torch, "save", stop)
    if error is RuntimeError:
        assert "disk full" in fails(capsys, "expand", tmp_path / "small", tmp_path / "out", "--overwrite")
    else:
        with pytest.raises(error, match="disk full"):
            main(["expand", str(tmp_path / "small"), str(tmp_path / "out"), "--overwrite"])
    assert (tmp_path / "out").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"small", "out"}


def test_errors__out(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no folder" in fails(capsys, "compress", checkpoint, tmp_path / "missing" / "out")
    assert "is a folder or a device" in fails(capsys, "compress", checkpoint, tmp_path, "--overwrite")
    assert list(tmp_path.iterdir()) == []


def test_errors__report_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"version": 9, "masks": {}, "report": {"novel": 1}}
    torch.save({"state_dict": {}, "callbacks": {"DRIVEPruningCallback": state}}, tmp_path / "new.ckpt")
    assert "does not know (novel): it was written by a newer version" in fails(capsys, "report", tmp_path / "new.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("shrink",), "invalid choice: 'shrink'", id="command"),
        pytest.param(("compress", "a"), "the following arguments are required: OUT", id="out"),
        pytest.param(("report", "a", "--yaml"), "unrecognized arguments: --yaml", id="option"),
    ],
)
def test_errors__arguments(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, *arguments)
    assert message in error
    assert error.endswith("--help` has more)\n")
    assert error.startswith(f"lightning-drive {arguments[0]}: " if arguments[0] != "shrink" else "lightning-drive: ")


def test_errors__no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """Without arguments, the help is printed, and the exit status is that of an error."""
    assert main([]) == 2
    out, help_text = capsys.readouterr()
    assert out == ""
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    assert capsys.readouterr().out == help_text


def test_errors__without_safetensors(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "needs safetensors: `pip install safetensors`" in fails(capsys, "compress", checkpoint, tmp_path / "out")


# The command itself.


def test_command(run: Run, tmp_path: Path) -> None:
    """In a process of its own, as a shell runs it."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, "report", path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for module, path in (("lightning_drive", str(run[0])), ("lightning_drive.command", "missing.ckpt"))
    ]
    (good, silence), (nothing, error) = [process.communicate() for process in processes]
    assert (processes[0].returncode, good, silence) == (0, f"{run[2].report}\n", "")
    assert (processes[1].returncode, nothing) == (2, "")
    assert error == "lightning-drive: error: There is no file 'missing.ckpt'.\n"


def test_command__reader_has_seen_enough(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in ``lightning-drive report CKPT | head``."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["report", str(checkpoint)]) == 0
    assert sys.stdout is None  # or Python would print at its end that it could not write
    assert capsys.readouterr().err == ""
    with pytest.raises(BrokenPipeError):
        stream.close()


@pytest.mark.parametrize(
    ("words", "status"),
    [
        pytest.param("$drive report {} >&-", 0, id="no_output"),
        pytest.param("$drive report {} <&- >&- 2>&-", 0, id="no_stream"),
        pytest.param("$drive report missing.ckpt 2>&-", 2, id="no_errors"),
        pytest.param("PYTHONUNBUFFERED= $drive report {} | :", 0, id="closed_pipe_with_a_buffer"),
        pytest.param("$drive compress {} small >&- 2>&-", 0, id="compress"),
        pytest.param("$drive --help >&-", 0, id="help"),
        pytest.param("PYTHONUNBUFFERED= $drive --help | :", 0, id="help_into_a_closed_pipe"),
        pytest.param("$drive --version 2>&-", 0, id="version"),
        pytest.param("$drive report >&- 2>&-", 2, id="wrong_arguments"),
        pytest.param("$drive report missing.ckpt 2>&1 | :", 2, id="error_into_a_closed_pipe"),
    ],
)
def test_command__closed_streams(words: str, status: int, checkpoint: Path, tmp_path: Path) -> None:
    """It ends quietly, with the status that it would have, and no file takes the place of a stream."""
    done = in_shell(words.format(checkpoint), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (status, b"")
    if "compress" in words:
        assert load_sparse(tmp_path / "small").keys() == torch.load(checkpoint, weights_only=True)["state_dict"].keys()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("command", ["--help", "report {}"])
def test_command__full_disk(command: str, checkpoint: Path) -> None:
    """It is an error of one line, and Python does not complain once more at its end."""
    done = in_shell(f"PYTHONUNBUFFERED= $drive {command.format(checkpoint)} >/dev/full")
    assert done.returncode == 2
    assert re.fullmatch(rb"lightning-drive: error: .*No space left on device\n", done.stderr)


NAMES = {
    "umlaut": "gr\u00fc\u00dfe.ckpt",
    "no_text": "caf\udce9.ckpt",
    "space": "a b.ckpt",
    "astral": "\U0001f525.ckpt",
}
LOCALES = {
    "C": {"LC_ALL": "C"},
    "POSIX_without_help": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ascii_output": {"PYTHONIOENCODING": "ascii"},
    "utf8": {"LC_ALL": "C.UTF-8"},
}


@pytest.mark.parametrize("locale", LOCALES)
def test_command__file_names(locale: str, tmp_path: Path) -> None:
    """Whatever its name is and whatever can be printed: a file is read, written, and named in lines that are text."""
    content = {"state_dict": {"gr\u00f6\u00dfe.weight": torch.eye(40)}}
    for name in NAMES.values():
        torch.save(content, tmp_path / "plain.ckpt")
        (tmp_path / "plain.ckpt").rename(tmp_path / name)
    script = """
import sys
from pathlib import Path
from lightning_drive.command import main
for path in sorted(Path().glob("*.ckpt")):
    small, large = path.with_suffix(".small"), path.with_suffix(".large")
    for words in (["report", path], ["report", "--json", path], ["compress", path, small], ["report", small]):
        assert main(list(map(str, words))) == 0, words
    assert main(["expand", str(small), str(large)]) == 0
    assert main(["compress", str(path), str(small)]) == 2
    path.write_bytes(path.read_bytes()[:1000])
    assert main(["report", str(path)]) == 2
"""
    (tmp_path / "script.py").write_text(script)
    done = in_shell(f"{sys.executable} script.py", LOCALES[locale], cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    printed = done.stdout.decode("utf-8" if locale in ("C", "utf8") else "iso-8859-1")
    assert printed.count("No report in ") == 2 * len(NAMES)
    assert "b.ckpt" in printed
    errors = done.stderr.decode("iso-8859-1").splitlines()
    assert len(errors) == 2 * len(NAMES)
    assert sum("exists already" in line for line in errors) == sum("cut off" in line for line in errors) == len(NAMES)


def test_command__entry_point() -> None:
    [target] = re.findall(r'^lightning-drive = "(.*)"$', (PACKAGE / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert target == f"{main.__module__}:{main.__name__}"


HEAVY = {"torch", "lightning", "numpy", "safetensors", "yaml"}


@pytest.mark.parametrize(
    ("arguments", "status", "stream"),
    [
        pytest.param(["--help"], 0, "out", id="help"),
        pytest.param(["--version"], 0, "out", id="version"),
        pytest.param(["plan", "--help"], 0, "out", id="help_of_a_command"),
        pytest.param(["report"], 2, "err", id="wrong_arguments"),
        pytest.param([], 2, "err", id="nothing"),
    ],
)
def test_command__imports_nothing_heavy(arguments: list[str], status: int, stream: str) -> None:
    """Help and wrong arguments do not wait for torch, by the list of imports that Python prints."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lightning_drive", *arguments], capture_output=True, text=True
    )
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    printed = [line for line in lines if not line.startswith("import time:")] if stream == "err" else [done.stdout]
    assert done.returncode == status
    assert any("lightning-drive" in line for line in printed)
    assert "argparse" in imported  # or nothing was measured
    assert imported & HEAVY == set()


def test_command__version(capsys: pytest.CaptureFixture[str]) -> None:
    """The version stands in one place, where the build takes it from, too."""
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    source = (PACKAGE / "lightning_drive" / "__init__.py").read_text()
    [version] = re.findall(r'^__version__ = "([\d.]+)"$', source, flags=re.MULTILINE)
    assert capsys.readouterr().out == f"lightning-drive {version}\n"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", ["", "plan", "report", "compress", "expand"])
def test_command__help_fits(
    command: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line is wider than the terminal, and every command is listed with its purpose."""
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*command.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith(f"usage: lightning-drive {command}".strip())
    listed = {line.split()[0] for line in lines if re.match(r"    \w+ {2,}\w", line)}
    assert listed == (set() if command else {"plan", "report", "compress", "expand"})


MODELS = """
from torch import nn

net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
number = 3

def early(done):
    return done**0.5

class Models:
    def broken():
        raise KeyError("depth\\nof it")

    def empty():
        raise ValueError

    def wide(width):
        return nn.Linear(width, width)

    def mlp():
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
"""


@pytest.fixture
def models_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the reader's own in the current folder."""
    name = f"models_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    (tmp_path / "models_that_fail.py").write_text("net = nn.Linear(1, 1)")
    (tmp_path / "models_cut_off.py").write_text("net = (")
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("what", ["net", "Models.mlp"])
def test_plan(what: str, models_here: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints the callback's own plan."""
    arguments = ["plan", f"{models_here}:{what}", "--sparsity", "0.5", "--set", "rounds=3", "--set", "exclude=['2.*']"]
    assert main([*arguments, "--max-epochs", "8", "--steps-per-epoch", "6"]) == 0
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    callback = DRIVEPruningCallback(sparsity=0.5, rounds=3, exclude=["2.*"])
    assert capsys.readouterr().out == f"{callback.plan(module, max_epochs=8, steps_per_epoch=6)}\n"


def test_plan__method(models_here: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--method", "imp", "--sparsity", "0.5", "--set", "cycles=2", "--set", "scope=layerwise"]
    assert main(["plan", f"{models_here}:net", *arguments]) == 0
    assert capsys.readouterr().out.startswith("IMP(cycles=2, epochs_per_cycle=20")


def test_plan__sparsities(models_here: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A sparsity for each pattern, the rest wherever it stands, and a schedule that is a function here."""
    arguments = ["--sparsity", "*=0.5", "--sparsity", "0.*=0.75", "--set", f"schedule={models_here}:early"]
    assert main(["plan", f"{models_here}:net", *arguments, "--set", "rounds=4"]) == 0
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    callback = DRIVEPruningCallback(sparsity={"0.*": 0.75, "*": 0.5}, schedule=lambda done: done**0.5, rounds=4)
    printed = capsys.readouterr().out
    assert printed == f"{callback.plan(module)}\n"
    assert "'0.*' keeps 8 of 32 weights, a sparsity of 75.00%\n'*' keeps 12 of 24 weights" in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["half"], "`--sparsity` takes one FRACTION, such as 0.98, or PATTERN=FRACTION, .* got 'half'"),
        (["0.5", "0.9"], "once for every pattern, got '0.5' and '0.9'"),
        (["0.5", "0.*=0.9"], "got '0.5' and '0.\\*=0.9'"),
        (["0.*=0.5", "0.*=0.9"], "once for every pattern, got '0.\\*=0.5' and '0.\\*=0.9'"),
        (["0.*=half"], "got '0.\\*=half'"),
        (["=0.5"], "got '=0.5'"),
        (["98"], r"`sparsity` is the fraction removed and must be in \[0, 1\), got 98.0. For 98 % pass 0.98"),
        (["*=98"], r"`sparsity\['\*'\]` is the fraction removed .* got 98.0. For 98 % pass 0.98"),
        (["0.weigt=0.5", "*=0.9"], "`sparsity` pattern '0.weigt' matches no parameter. Did you mean '0.weight'?"),
        (["0.*=0.5"], "`sparsity` has no pattern that matches '2.weight'. Add '\\*' for the rest"),
    ],
)
def test_plan__sparsity_error(
    given: list[str], message: str, models_here: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [word for text in given for word in ("--sparsity", text)]
    assert main(["plan", f"{models_here}:net", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net"], "MODULE must be PACKAGE.MODULE:NAME"),
        (["{}:nothing"], "cannot be imported: module"),
        (["nowhere_at_all:net"], "cannot be imported: No module named"),
        (["{}:number"], "must be a torch module or return one, got int"),
        (["{}:net", "--set", "rounds"], "`--set` takes NAME=VALUE"),
        (["{}:net", "--set", "rounds=0"], "`rounds` must be a whole number of at least 1, got 0"),
        (["{}:net", "--set", "cycles=2"], "DRIVEPruningCallback has no such argument. Apart from the sparsity: warmup"),
        (["{}:net", "--set", "scpoe=erk"], "no such argument. Did you mean 'scope'? Apart from the sparsity: warmup"),
        (["{}:net", "--set", "sparsity=0.9"], "`--set sparsity=0.9`: DRIVEPruningCallback has no such argument"),
        (["{}:net", "--set", "schedule=square"], "`schedule` must be one of 'exponential', 'linear', 'cubic', or a"),
        (["{}:net", "--set", "schedule={}:nothing"], "cannot be imported: module"),
        (["builtins:dict"], "must be a torch module or return one, got dict"),
        (["{}:Models.broken"], ":Models.broken' cannot be called: KeyError: 'depth"),
        (["{}:Models.empty"], ":Models.empty' cannot be called: ValueError"),
        (["models_that_fail:net"], "'models_that_fail:net' cannot be imported: NameError: name 'nn' is not defined"),
        (["models_cut_off:net"], "'models_cut_off:net' cannot be imported: SyntaxError: "),
        ([".models:net"], "'.models:net' cannot be imported: TypeError: "),
        (["{}:Models.wide"], "needs arguments (missing a required argument: 'width'). Name a module"),
        (["{}:net", "--max-epochs", "5"], "DRIVEPruningCallback(warmup_epochs=5) prunes at the start of epoch 5"),
        (["{}:net", "--method", "imp", "--max-epochs", "1000"], "IMPPruningCallback(cycles=50, epochs_per_cycle=20)"),
        (["{}:net", "--method", "gradual", "--max-epochs", "1"], "it would never reach its sparsity. Raise `max_ep"),
        (["{}:net", "--max-epochs", "2", "--steps-per-epoch", "3", "--set", "warmup_steps=6"], "after 6 steps, so it"),
        (["{}:net", "--max-epochs", "0"], "`max_epochs` must be a whole number of at least 1, got 0"),
    ],
)
def test_plan__error(arguments: list[str], message: str, models_here: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--sparsity", "0.5", *(text.format(models_here) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
