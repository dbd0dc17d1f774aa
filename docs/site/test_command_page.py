"""The page of the command names every option and key, and that of LightningCLI prints the errors as they are."""

import re
import sys
from pathlib import Path

import mymodel
import pytest

import lightning_drive
from lightning_drive import command_json, command_options
from lightning_drive.cli import OneLineErrorsCLI
from lightning_drive.report.parts import LayerReport

DOCS = Path(lightning_drive.__file__).parents[1] / "docs"
PAGE = (DOCS / "reference" / "command.md").read_text(encoding="utf-8")
LAYER = LayerReport("weight", (2,), num_weights=2, num_kept=1, num_active=1)
REPORT = lightning_drive.PruningReport("", (LAYER,), seconds=0, epoch=0, step=0, digest="", warnings=())


def named(page: str) -> set[str]:
    """Return the words in code on a page, without the values of options."""
    return {word.split()[0] for word in re.findall(r"`([^`\n]+)`", page)}


@pytest.mark.parametrize("command", ["", *command_options._parser().commands])
def test_options(command: str) -> None:
    parser = command_options._parser()
    assert set((parser.commands[command] if command else parser).options) <= named(PAGE)
    assert set(parser.commands) | set(command_options._CALLBACKS) | set(command_options._SHELLS) <= named(PAGE)


def test_keys_of_json() -> None:
    """Of both kinds of files; and no other key is described."""
    texts = command_json.of_report("", REPORT), command_json.of_zeros("", [{"numbers": 2, "zeros": 1}])
    keys = {key for text in texts for key in re.findall(r'^ {2}(?: {2})?"(\w+)":', text, flags=re.MULTILINE)}
    of_report = set(REPORT.to_dict())
    described = named("\n".join(re.findall(r"^\| (`.*?) \|", PAGE.partition("## JSON")[2], flags=re.MULTILINE)))
    assert keys - of_report <= described <= keys


ARGUMENTS = (
    ["=DrivePruningCallback"],
    ["=SNIPPruningCallback"],
    ["=SNIPPruningCallback", ".sparsity=0.5", ".round=3"],
    ["=KeepZerosCallback", ".masks=pruned.ckpt"],
)


def test_errors_of_lightning_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "recipes" / "cli.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    lines = []
    quiet = [f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_progress_bar")]
    for words in ARGUMENTS:
        arguments = [
            "fit",
            "--seed_everything=1",
            "--trainer.max_epochs=1",
            "--trainer.accelerator=cpu",
            *quiet,
            *(f"--trainer.callbacks{word}" for word in words),
        ]
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        with pytest.raises(SystemExit, match="2"):
            OneLineErrorsCLI(mymodel.MyModel, mymodel.MyData, save_config_callback=None)
        lines += [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert block.splitlines() == lines
