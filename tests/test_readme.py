"""What the README shows runs, and prints what it says."""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def block_with(text: str) -> str:
    [block] = [block for block in BLOCKS if text in block]
    return block


@pytest.mark.filterwarnings("ignore:.*tensorboardX.* has been removed:UserWarning")
def test_first_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one-line example, up to its ``fit``, which gets whatever the reader has."""
    fitted: list[tuple[object, ...]] = []
    monkeypatch.setattr(pl.Trainer, "fit", lambda trainer, *arguments: fitted.append(arguments))
    exec(BLOCKS[0], {"model": "model", "train_loader": "loader"})
    assert fitted == [("model", "loader")]


@pytest.mark.filterwarnings("ignore:.*tensorboardX.* has been removed:UserWarning")
def test_imp() -> None:
    found: dict[str, Any] = {}
    exec(block_with("IMPPruningCallback("), found)
    assert found["trainer"].callbacks[0] is found["imp"]
    assert found["trainer"].max_epochs > found["imp"].cycles * found["imp"].epochs_per_cycle


def test_find_masks(capsys: pytest.CaptureFixture[str]) -> None:
    block = block_with("find_masks(")
    exec(block, {})
    [promised] = re.findall(r"print\(masks\)  # (.*)", block)
    assert capsys.readouterr().out.strip() == promised


def test_sparse_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model comes back to the bit, from a file in the current folder."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(30, 30)
    with torch.no_grad():
        model.weight[1:] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saving, loading = block_with("save_sparse(model, ").split("model.load_state_dict")
    found: dict[str, Any] = {"model": model}
    exec(saving, found)
    torch.nn.init.ones_(model.weight)
    exec(f"model.load_state_dict{loading}", found)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())


def test_all_blocks() -> None:
    """Every block of Python in the README has its test here."""
    assert len(BLOCKS) == 4
