"""A few lines of YAML are enough, through the real LightningCLI, and a wrong value is refused in one clear line."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import pytest
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

import lightning_drive

CONFIG = """
seed_everything: 1
trainer:
  max_epochs: 3
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  callbacks:
    - class_path: lightning_drive.DRIVEPruningCallback
      init_args:
        sparsity: 0.8
        warmup_epochs: 1
        rounds: 4
        scope: layerwise
        exclude: ["head.*"]
        loss_fn: test_cli.squared_outputs
"""


class Data(LightningDataModule):
    """The images of every other test here."""

    def train_dataloader(self) -> Any:
        return fits.loader()

    def val_dataloader(self) -> Any:
        return fits.loader(16)


def squared_outputs(module: Any, batch: Any) -> Any:
    return module(batch[0]).square().mean()


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LightningCLI]:
    """Run ``main.py fit --config config.yaml ...`` as a person would, in this process."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)

    def run(*arguments: str) -> LightningCLI:
        monkeypatch.setattr(sys, "argv", ["main.py", "fit", "--config", str(config), *arguments])
        return LightningCLI(fits.ConvModule, Data, save_config_callback=None)

    return run


def test_yaml(command_line: Any) -> None:
    [callback, *_] = command_line().trainer.callbacks
    assert list(callback.masks) == ["features.0.weight", "features.4.weight"]
    assert [int(mask.sum()) for mask in callback.masks.values()] == [round(54 * 0.2), round(432 * 0.2)]
    assert callback.loss_fn.__name__ == "squared_outputs"


def test_command_line(command_line: Any) -> None:
    """Arguments on the command line go over those in the file."""
    [callback, *_] = command_line("--trainer.callbacks.sparsity=0.5").trainer.callbacks
    assert [int(mask.sum()) for mask in callback.masks.values()] == [27, 216]


def test_print_config__round_trip(command_line: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What ``--print_config`` prints, with all defaults, is a config that says the same."""
    with pytest.raises(SystemExit):
        command_line("--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][0]["init_args"]
    given = yaml.safe_load(CONFIG)["trainer"]["callbacks"][0]["init_args"]
    assert {name: printed[name] for name in given} == given
    assert printed["bn_batches"] == 20


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sparsity=90", r"`sparsity` is the fraction removed and must be in \[0, 1\), got 90"),
        ("rounds=0", "`rounds` must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_value(command_line: Any, argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command_line(f"--trainer.callbacks.{argument}")


def test_wrong_value__choice(command_line: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line("--trainer.callbacks.schedule=cubic")
    assert "Literal['exponential', 'linear']. Got value: cubic" in capsys.readouterr().err


SIBLINGS = {
    "DRIVEPruningCallback": {"warmup_epochs": 1, "rounds": 3, "mode": "eval"},
    "SNIPPruningCallback": {"warmup_epochs": 1, "rounds": 2, "batches_per_round": 2},
    "SynFlowPruningCallback": {"rounds": 5, "schedule": "linear"},
    "IMPPruningCallback": {"cycles": 2, "epochs_per_cycle": 1, "rewind_epoch": 0},
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings(command_line: Any, tmp_path: Path, name: str) -> None:
    """Each callback comes out of YAML with its own settings and the common ones, and prunes."""
    config = yaml.safe_load(CONFIG)
    common = {"sparsity": 0.9, "scope": "layerwise", "include": ["features.*"], "control": "shuffle"}
    config["trainer"]["callbacks"] = [
        {"class_path": f"lightning_drive.{name}", "init_args": {**common, **SIBLINGS[name]}}
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    [callback, *_] = command_line().trainer.callbacks
    assert type(callback).__name__ == name
    assert [int(mask.sum()) for mask in callback.masks.values()] == [5, 43]
    assert callback.report.control == "shuffle"


@pytest.mark.parametrize("name", SIBLINGS)
def test_help(capsys: pytest.CaptureFixture[str], command_line: Any, name: str) -> None:
    """Every argument is there, with its meaning and its default."""
    kind = getattr(lightning_drive, name)
    with pytest.raises(SystemExit):
        command_line(f"--trainer.callbacks.help=lightning_drive.{name}")
    text = " ".join(capsys.readouterr().out.split())
    assert "Fraction of the prunable weights to remove" in text
    for argument, parameter in inspect.signature(kind).parameters.items():
        assert f"--trainer.callbacks.{argument}" in text
        if parameter.default is not inspect.Parameter.empty:
            default = "null" if parameter.default is None else parameter.default
            assert f"default: {default}" in text
