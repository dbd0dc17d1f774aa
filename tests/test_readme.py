"""What the README shows runs, and prints what it says."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*tensorboardX.* has been removed:UserWarning")
def test_first_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one-line example, up to its ``fit``, which gets whatever the reader has."""
    fitted: list[tuple[object, ...]] = []
    monkeypatch.setattr(pl.Trainer, "fit", lambda trainer, *arguments: fitted.append(arguments))
    exec(BLOCKS[0], {"model": "model", "train_loader": "loader"})
    assert fitted == [("model", "loader")]


def test_find_masks(capsys: pytest.CaptureFixture[str]) -> None:
    exec(BLOCKS[1], {})
    [promised] = re.findall(r"print\(masks\)  # (.*)", BLOCKS[1])
    assert capsys.readouterr().out.strip() == promised
