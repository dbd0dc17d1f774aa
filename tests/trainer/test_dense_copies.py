"""Warnings of copies that stay dense, once of each, and of zeros that have no masks, before they are trained."""

import warnings
from pathlib import Path
from typing import Any

import copies
import fits
import pytest
import torch
from copies import METHODS, Ema, MeanTeacher, Student
from torch import nn

from lightning_drive import DRIVEPruningCallback, SNIPPruningCallback, SynFlowPruningCallback
from lightning_drive.callbacks.hooks import PruningCallback

# Copies that stay dense.


@pytest.mark.parametrize("method", METHODS)
def test_dense_copies(tmp_path: Path, method: str) -> None:
    """Named once in a run, however often it is pruned: a submodule with what to return, an attribute without."""
    inside, outside = copies.fit(tmp_path, MeanTeacher(), pruning := METHODS[method](), Ema())
    assert inside.startswith("'teacher' has the same names and shapes as 'student', but is not trained")
    assert (
        f'override `averages(pl_module)` of {type(pruning).__name__} and return it by `return [{{f"student.' in inside
    )
    assert outside.startswith("`average` of Ema has the same names and shapes as MeanTeacher")
    assert outside.endswith(f"override `averages(pl_module)` of {type(pruning).__name__} and return it.")


def test_copies_returned_as_views(tmp_path: Path) -> None:
    """A `state_dict` has other tensors over the same memory."""

    class Along(DRIVEPruningCallback):
        def averages(self, pl_module: Any) -> Any:
            return [{f"student.{name}": each for name, each in pl_module.teacher.state_dict().items()}]

    assert not copies.fit(tmp_path, MeanTeacher(), METHODS["DRIVE"](Along))


# Zeros that arrive.


def warned_of_zeros(
    folder: Path, module: Any, pruning: PruningCallback, ckpt_path: Path | None = None, **settings: Any
) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fits.trainer(folder, pruning, **settings).fit(module, fits.loader(), ckpt_path=ckpt_path)
    return [text for warning in caught if "are 0 already" in (text := str(warning.message))]


def sparse(module: Any, share: float = 0.9) -> Any:
    """Prune a module at random, without a mask that anybody keeps."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in module.parameters():
            if each.ndim > 1:
                each.mul_(torch.rand(each.shape, generator=generator) > share)
    return module


@pytest.mark.parametrize("make", [Student, fits.ConvModule])
@pytest.mark.parametrize("method", ["DRIVE", "IMP"])
def test_zeros_that_arrive(tmp_path: Path, make: Any, method: str) -> None:
    module = sparse(make())
    [text] = warned_of_zeros(tmp_path, module, METHODS[method]())
    assert "has no masks for them: these zeros will be trained" in text
    assert "`ckpt_path`" in text
    assert text.endswith("use `KeepZerosCallback`.")


def test_zeros_that_arrive__by_a_hook_of_the_module(tmp_path: Path) -> None:
    """Hooks of the module come after those of callbacks; the warning comes once, before the first step."""

    class Loads(Student):
        def on_train_start(self) -> None:
            sparse(self)

    [text] = warned_of_zeros(tmp_path, Loads(), METHODS["IMP"]())
    assert "these zeros will be trained" in text


@pytest.mark.parametrize("left", ["nothing", "renamed"])
def test_zeros_that_arrive__checkpoint_without_state(tmp_path: Path, left: str) -> None:
    module, pruning = Student(), SNIPPruningCallback(sparsity=0.8)
    trained = fits.trainer(tmp_path, pruning, max_epochs=2)
    trained.fit(module, fits.loader())
    trained.save_checkpoint(tmp_path / "own.ckpt")
    content = torch.load(tmp_path / "own.ckpt", weights_only=True)
    content["callbacks"] = {} if left == "nothing" else {"Other": {"x": 1}}
    torch.save(content, tmp_path / "own.ckpt")
    later = DRIVEPruningCallback(sparsity=0.8, warmup_epochs=3, rounds=2)
    assert len(warned_of_zeros(tmp_path, Student(), later, max_epochs=4, ckpt_path=tmp_path / "own.ckpt")) == 1


def test_zeros_that_arrive__restored(tmp_path: Path) -> None:
    """Not where the masks are known, from the checkpoint or from the fit before."""
    module, pruning = Student(), SNIPPruningCallback(sparsity=0.8)
    trained = fits.trainer(tmp_path, pruning, max_epochs=2)
    trained.fit(module, fits.loader())
    trained.save_checkpoint(tmp_path / "own.ckpt")
    assert not warned_of_zeros(tmp_path, module, pruning, max_epochs=2)
    again = SNIPPruningCallback(sparsity=0.8)
    assert not warned_of_zeros(tmp_path, Student(), again, max_epochs=3, ckpt_path=tmp_path / "own.ckpt")


def with_new_layer(module: Any) -> Any:
    """Its widest layer begins at zero, as the last layer of a branch does."""
    nn.init.zeros_(module.student[1].weight)
    return module


@pytest.mark.parametrize("make", [Student, lambda: sparse(Student(), 0.4), lambda: with_new_layer(Student())])
def test_zeros_that_arrive__few(tmp_path: Path, make: Any) -> None:
    assert not warned_of_zeros(tmp_path, make(), METHODS["IMP"]())


@pytest.mark.parametrize(
    ("kind", "make"),
    [(SNIPPruningCallback, Student), (SynFlowPruningCallback, fits.ConvModule)],
    ids=["SNIP", "SynFlow"],
)
@pytest.mark.parametrize("sparsity", [0.95, 0.9, 0.5])
def test_zeros_that_arrive__cut_at_once(tmp_path: Path, sparsity: float, make: Any, kind: Any) -> None:
    """Zeros go first; those that are kept are counted."""
    module = sparse(make())
    empty = {name: each == 0 for name, each in module.named_parameters()}
    pruning = kind(sparsity=sparsity, scope="layerwise")
    said = warned_of_zeros(tmp_path, module, pruning)
    kept = sum(int((mask & empty[name]).sum()) for name, mask in pruning.masks.items())
    assert bool(said) == (kept > 0)
    assert all(f"no masks for them: {kept:,} of these zeros are kept" in text for text in said)


def test_zeros_that_arrive__two_of_four(tmp_path: Path) -> None:
    module = Student()
    with torch.no_grad():
        module.student[1].weight.view(-1, 4)[:, :2] = 0  # type: ignore[index]
    assert warned_of_zeros(tmp_path, module, METHODS["DRIVE"]())
