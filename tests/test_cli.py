"""A few lines of YAML are enough, through the real LightningCLI, and a wrong value ends in one clear line."""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

import lightning_drive
from lightning_drive import Magnitude
from lightning_drive.cli import OneLineErrorsCLI
from lightning_drive.warmup import WarmupPruningCallback

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
  log_every_n_steps: 1
  callbacks:
    - class_path: lightning_drive.DRIVEPruningCallback
      init_args:
        sparsity: 0.8
        warmup_epochs: 1
        rounds: 4
        scope: layerwise
        accelerate: true
        exclude: ["head.*"]
        loss_fn: test_cli.squared_outputs
"""


class Data(LightningDataModule):
    """The images of every other test here."""

    def train_dataloader(self) -> Any:
        return fits.loader()

    def val_dataloader(self) -> Any:
        return fits.loader(16)


class Broken(pl.Callback):
    """A callback of somebody else, with a mistake of theirs in its constructor."""

    def __init__(self) -> None:
        raise ValueError("a mistake of their own")


class Largest(WarmupPruningCallback):
    """Keep the largest weights, as the page on adding a method writes a callback."""

    def __init__(self, *, rounds: int = 2, **settings: Any) -> None:
        super().__init__(Magnitude(rounds=rounds), **settings)


def squared_outputs(module: Any, batch: Any) -> Any:
    return module(batch[0]).square().mean()


def falling(done: float) -> float:
    return 1 - done


def early(done: float) -> float:
    return done**0.5


class Early:
    """A schedule with a setting of its own."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def __call__(self, done: float) -> float:
        return done**self.power


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LightningCLI]:
    """Return a function that runs ``main.py fit --config config.yaml ...`` as a person would, in this process."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)

    def run(*arguments: str, subcommand: str = "fit", kind: Any = LightningCLI, **kwargs: Any) -> LightningCLI:
        monkeypatch.setattr(sys, "argv", ["main.py", *subcommand.split(), "--config", str(config), *arguments])
        return kind(fits.ConvModule, Data, **{"save_config_callback": None, **kwargs})

    return run


def test_yaml(command_line: Any) -> None:
    [callback, *_] = command_line().trainer.callbacks
    assert list(callback.masks) == ["features.0.weight", "features.4.weight"]
    assert [int(mask.sum()) for mask in callback.masks.values()] == [round(54 * 0.2), round(432 * 0.2)]
    assert callback.loss_fn.__name__ == "squared_outputs"
    assert callback.accelerate
    assert callback.report.acceleration is not None


def test_yaml__callback_of_ones_own(command_line: Any) -> None:
    """One that passes its settings on takes all of those of the base class, under its import path."""
    callback, *_ = command_line(
        "--trainer.callbacks=test_cli.Largest",
        "--trainer.callbacks.sparsity={features.*: 0.5, '*': 0.8}",
        "--trainer.callbacks.scope=erk",
        "--trainer.callbacks.control=shuffle",
    ).trainer.callbacks
    assert type(callback).__name__ == "Largest"
    assert callback.masks.num_kept == round(486 * 0.5) + round(512 * 0.2)
    assert callback.report.control == "shuffle"


def test_command_line(command_line: Any) -> None:
    """Arguments on the command line go over those in the file."""
    [callback, *_] = command_line("--trainer.callbacks.sparsity=0.5").trainer.callbacks
    assert [int(mask.sum()) for mask in callback.masks.values()] == [27, 216]


@pytest.mark.parametrize(
    "schedule", ["test_cli.early", {"class_path": "test_cli.Early", "init_args": {"power": 0.5}}], ids=str
)
def test_sparsities(
    command_line: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], schedule: str | dict[str, Any]
) -> None:
    """A mapping, whose rest comes first where YAML is sorted, and a function, by its name or as a class with settings.

    The config prints itself again, and finds the same masks.
    """
    config = yaml.safe_load(CONFIG)
    settings = config["trainer"]["callbacks"][0]["init_args"]
    settings |= {"sparsity": {"features.0.*": 0.5, "*": 0.9}, "scope": "erk", "schedule": schedule}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    [callback, *_] = command_line().trainer.callbacks
    kept = {name: int(mask.sum()) for name, mask in callback.masks.items()}
    assert kept == {"features.0.weight": 27, "features.4.weight": 43}
    removed = [sum(each.removed) for each in callback.report.rounds]
    assert removed[0] == 54 - round(54 * (1 - 0.5 * 0.5)) + 432 - round(432 * (1 - 0.9 * 0.5))
    assert callback.sparsity == {"features.0.*": 0.5, "*": 0.9}

    text = printed(lambda: command_line("--print_config"), capsys)
    assert yaml.safe_load(text)["trainer"]["callbacks"][0]["init_args"]["schedule"] == schedule
    (tmp_path / "config.yaml").write_text(text)
    assert printed(lambda: command_line("--print_config"), capsys) == text
    assert command_line().trainer.callbacks[0].masks.digest() == callback.masks.digest()


def test_sparsities__on_the_command_line(command_line: Any) -> None:
    [callback, *_] = command_line('--trainer.callbacks.sparsity={"*.4.*": 0.75, "*": 0.5}').trainer.callbacks
    assert [int(mask.sum()) for mask in callback.masks.values()] == [27, 108]


@pytest.mark.parametrize(
    "arguments", [["warmup_steps=2"], ["warmup_epochs=5", "warmup_steps=4"], ["warmup_steps=null"]]
)
def test_warmup_steps(command_line: Any, tmp_path: Path, arguments: list[str]) -> None:
    """In steps; `null` as in a file that was printed, beside the default of `warmup_epochs`."""
    config = tmp_path / "config.yaml"
    given = arguments != ["warmup_steps=null"]
    config.write_text(CONFIG.replace("        warmup_epochs: 1\n", "") if given else CONFIG)
    settings = [f"--trainer.callbacks.{argument}" for argument in arguments]
    cli = command_line(*settings, "--trainer.max_epochs=3") if given else command_line(*settings)
    [callback, *_] = cli.trainer.callbacks
    assert callback.report.step == (int(arguments[-1].partition("=")[2]) if given else 3)


@pytest.mark.parametrize("masks", ["of_a_file", "null", None])
def test_keep_zeros(command_line: Any, tmp_path: Path, masks: str | None) -> None:
    """Masks are a path in a file of settings, or, by default, the zeros that the network has."""
    pruned = lightning_drive.find_masks(fits.ConvModule(), lightning_drive.Random(seed=1), sparsity=0.7)
    module = fits.ConvModule()
    pruned.apply_(module)
    torch.save(module.state_dict(), tmp_path / "of_a_file")
    before, _, _ = CONFIG.partition("    - class_path")
    given = "" if masks is None else f"\n        masks: {tmp_path / masks if masks == 'of_a_file' else masks}"
    settings = f"      init_args:\n        exclude: ['head.*']{given}\n"
    (tmp_path / "config.yaml").write_text(f"{before}    - class_path: lightning_drive.KeepZerosCallback\n{settings}")
    cli = command_line(run=False, subcommand="")
    [callback, *_] = cli.trainer.callbacks
    if masks != "of_a_file":
        pruned.apply_(cli.model)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert callback.masks == lightning_drive.Masks({name: pruned[name] for name in pruned if name != "head.weight"})


WRONG = {
    "warmup_steps=5": "`warmup_steps` sets when to prune .* got warmup_steps=5 and warmup_epochs=1. Set only .*",
    "sparsity=90": r"`sparsity` is the fraction removed and must be in \[0, 1\), got 90.0. For 90 % pass 0.9.",
    "rounds=0": "`rounds` must be a whole number of at least 1, got 0.",
    "warmup_epochs=-1": "`warmup_epochs` must be a whole number of at least 0, got -1.",
    "rounds=1.5": ".*DRIVEPruningCallback: rounds: Expected a <class 'int'>. Got value: 1.5",
    "sparsity=half": ".*DRIVEPruningCallback: sparsity: Expected a <class 'float'>. Got value: half",
    "include=features": ".*DRIVEPruningCallback: include: Expected a <class 'list'>. Got value: features",
    "warmup_steps=soon": ".*DRIVEPruningCallback: warmup_steps: Expected a <class 'int'>. Got value: soon",
    "schedule=square": r".*schedule: Expected a typing.Literal\['exponential', 'linear', 'cubic'\]. Got value: square",
    "schedule=nowhere.f": ".*schedule: Type .* a callable class: No module named 'nowhere'. Got value: nowhere.f",
    "schedule=test_cli.falling": "`schedule` is a function, 'falling', .* it must never fall, got 0.75 at 0.25 and .*",
    'sparsity={"head.*":90}': r"`sparsity\['head.\*'\]` is the fraction removed .*, got 90.0. For 90 % pass 0.9.",
    'sparsity={"head.*":[]}': ".*Callback: sparsity: Expected a <class 'float'>. Got value: {'head.*': \\[\\]}",
    "sparsity={}": "`sparsity` must be a number or map at least one glob pattern to one, got an empty mapping.",
    "loss_fn=nowhere.f": ".*loss_fn: Type .* a callable class: No module named 'nowhere'. Got value: nowhere.f",
    "sparsty=0.5": ".*DRIVEPruningCallback: Option 'sparsty' is not accepted",
    "Rounds=5": ".*DRIVEPruningCallback: Option 'Rounds' is not accepted",
}


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_value__one_line(command_line: Any, capsys: pytest.CaptureFixture[str], argument: str) -> None:
    """With `OneLineErrorsCLI` the line is all that a person sees."""
    with pytest.raises(SystemExit, match="2"):
        command_line(f"--trainer.callbacks.{argument}", kind=OneLineErrorsCLI)
    seen = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set to")]
    assert len(seen) == 1
    meant = {"sparsty=0.5": "sparsity", "Rounds=5": "rounds"}.get(argument, "")
    assert re.fullmatch(f"error: {WRONG[argument]}{meant and rf'. Did you mean {meant!r}.'}", seen[0])


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_value(command_line: Any, capsys: pytest.CaptureFixture[str], argument: str) -> None:
    """Without it, the line is among those of jsonargparse."""
    with pytest.raises((SystemExit, ValueError)) as raised:
        command_line(f"--trainer.callbacks.{argument}")
    seen = capsys.readouterr().err if raised.type is SystemExit else str(raised.value)
    assert re.search(WRONG[argument].split(": ")[-1].removesuffix(f" Got value: {argument.split('=')[1]}"), seen)


def test_wrong_settings_together__one_line(command_line: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """An error that is found when a run is set up is one line, too."""
    with pytest.raises(SystemExit, match="2"):
        command_line("--trainer.callbacks.warmup_epochs=7", kind=OneLineErrorsCLI)
    *_, seen = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"error: DRIVEPruningCallback\(warmup_epochs=7\) prunes at the start of epoch 7 .* max_epochs=3 .*", seen
    )


def test_wrong_value__missing(command_line: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.replace("sparsity: 0.8", ""))
    with pytest.raises(SystemExit):
        command_line(kind=OneLineErrorsCLI)
    [seen] = capsys.readouterr().err.splitlines()
    assert seen.startswith("error: trainer.callbacks: lightning_drive.DRIVEPruningCallback: ")
    assert seen.endswith("required: sparsity")


def test_one_line_errors__others(command_line: Any) -> None:
    """Errors in code of others keep their traceback."""
    with pytest.raises(ValueError, match="a mistake of their own"):
        command_line("--trainer.callbacks+=test_cli.Broken", kind=OneLineErrorsCLI)


SINGLE = "--trainer.callbacks"
NO_CLASS = "error: trainer.callbacks: there is no class"
MISTAKES: dict[str, tuple[list[str], str]] = {
    "no_sparsity": (
        [f"{SINGLE}=lightning_drive.SNIPPruningCallback"],
        "error: trainer.callbacks: lightning_drive.SNIPPruningCallback: the following arguments are required: sparsity",
    ),
    "no_sparsity_by_short_name": (
        [f"{SINGLE}=IMPPruningCallback", f"{SINGLE}.cycles=2"],
        "error: trainer.callbacks: lightning_drive.IMPPruningCallback: the following arguments are required: sparsity",
    ),
    "class": ([f"{SINGLE}=DrivePruningCallback"], f"{NO_CLASS} 'DrivePruningCallback'. Did you mean 'DRIVEPru"),
    "class_added": (
        [f"{SINGLE}+=GradualPruning"],
        f"{NO_CLASS} 'GradualPruning'. Did you mean 'GradualPruningC",
    ),
    "class_of_lightning": ([f"{SINGLE}=EarlyStoping"], f"{NO_CLASS} 'EarlyStoping'. Did you mean 'EarlyStopping'?"),
    "class_like_no_other": ([f"{SINGLE}=Qqqq"], f"{NO_CLASS} 'Qqqq'. Name one with its module, as in 'package"),
    "class_of_a_module": (
        [f"{SINGLE}=lightning_drive.snippruningcallback"],
        "module 'lightning_drive' has no attribute 'snippruningcallback'. Did you mean 'SNIPPruningCallback'?",
    ),
    "module": (
        [f"{SINGLE}=lightning_driv.SNIPPruningCallback"],
        "No module named 'lightning_driv'. Did you mean 'SNIPPruningCallback'?",
    ),
    "no_callback": (
        [f"{SINGLE}=lightning_drive.find_masks"],
        "trainer.callbacks: Import path does not correspond to a subclass of Callback. Got value: lightning_drive.find",
    ),
    "in_json": (
        [SINGLE + '=[{"class_path": "SNIPPruningCallback", "init_args": {"sparsity": 0.5, "scop": "global"}}]'],
        "lightning_drive.SNIPPruningCallback: Option 'scop' is not accepted. Did you mean 'scope'?",
    ),
    "of_one_in_json": (
        [SINGLE + '={"class_path": "SNIPPruningCallback", "init_args": {"sparsity": 0.5, "scope": "glob"}}'],
        "SNIPPruningCallback: scope: Expected a typing.Literal['global', 'layerwise', 'erk']. Got value: glob",
    ),
    "pattern": ([f'{SINGLE}.exclude=["backbone.*"]'], "error: `exclude` pattern 'backbone.*' matches no parameter."),
    "nothing_left": ([f'{SINGLE}.exclude=["*"]'], "error: There is no trainable parameter to prune."),
    "masks_of_no_file": (
        [f"{SINGLE}=KeepZerosCallback", f"{SINGLE}.masks=missing.ckpt"],
        "error: There is no file 'missing.ckpt'.",
    ),
    "no_zeros": ([f"{SINGLE}=KeepZerosCallback"], "error: None of the 998 weights of ConvModule that are prunable is"),
    "two_that_prune": (
        [f"{SINGLE}+=SNIPPruningCallback", f"{SINGLE}.sparsity=0.5"],
        "error: Only one callback of a Trainer can prune, got DRIVEPruningCallback and SNIPPruningCallback",
    ),
    "too_short": ([f"{SINGLE}=IMPPruningCallback", f"{SINGLE}.sparsity=0.5"], "but training ends after max_epochs=3"),
    "no_window": (
        [f"{SINGLE}=GradualPruningCallback", f"{SINGLE}.sparsity=0.5", f"{SINGLE}.start_epoch=4"],
        "error: Grad",
    ),
    "no_config": (["--config=missing.yaml"], "error: config: File does not exist: '"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes__one_line(mistake: str, command_line: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A class, a setting or a file: one line names it, and what was likely meant."""
    arguments, message = MISTAKES[mistake]
    with pytest.raises(SystemExit, match="2"):
        command_line(*arguments, kind=OneLineErrorsCLI)
    [line] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("INFO", "Seed set to"))]
    assert message in line
    assert line.startswith("error: ")
    assert "Expected a <class 'list'>" not in line


def test_damaged_checkpoint__one_line(command_line: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(fits.ConvModule().state_dict(), tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:5000])
    arguments = [f"{SINGLE}=KeepZerosCallback", f"{SINGLE}.masks={tmp_path / 'cut.ckpt'}"]
    with pytest.raises(SystemExit, match="2"):
        command_line(*arguments, kind=OneLineErrorsCLI)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {str(tmp_path / 'cut.ckpt')!r} is not a file that `torch.save` wrote, or it is")


MISTAKES_IN_CODE = {ValueError: "int('x')", TypeError: "len(1)", OSError: "open('/nowhere/file')"}


@pytest.mark.parametrize("error", MISTAKES_IN_CODE)
def test_one_line_errors__mistakes_in_code(
    command_line: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """What no `raise` of this package raised is a mistake in its code or another's, and keeps its traceback."""
    module: dict[str, Any] = {"__name__": "lightning_drive.own"}
    exec(f"def selected(self, module): return {MISTAKES_IN_CODE[error]}", module)
    monkeypatch.setattr(lightning_drive.DRIVEPruningCallback, "prunable_parameters", module["selected"])
    with pytest.raises(error):
        command_line(kind=OneLineErrorsCLI)


def test_short_names__whatever_is_imported_first() -> None:
    """The callbacks are known by their short names also where this package comes before Lightning."""
    script = "from lightning_drive.cli import OneLineErrorsCLI, _class_names; print(*_class_names())"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    ours = {name for name in lightning_drive.__all__ if name.endswith("Callback")}
    assert ours < set(done.stdout.split())


@pytest.mark.parametrize("argument", ["sparsity=90", "rounds=1.5"])
def test_one_line_errors__debug(command_line: Any, monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    """With the variable of jsonargparse, errors are as in LightningCLI."""
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(Exception, match="Does not validate against any of the Union subtypes"):
        command_line(f"--trainer.callbacks.{argument}", kind=OneLineErrorsCLI)


SIBLINGS = {
    "DRIVEPruningCallback": {"warmup_epochs": 1, "rounds": 3, "mode": "eval"},
    "SNIPPruningCallback": {"warmup_epochs": 1, "rounds": 2, "batches_per_round": 2},
    "SynFlowPruningCallback": {"rounds": 5, "schedule": "linear"},
    "IMPPruningCallback": {"cycles": 2, "epochs_per_cycle": 1, "rewind_epoch": 0},
    "GradualPruningCallback": {"start_epoch": 0, "end_epoch": 1, "cuts_per_epoch": 2, "criterion": "drive"},
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


@pytest.mark.parametrize(
    ("name", "path"), [*((name, "lightning_drive.{}") for name in SIBLINGS), ("DRIVEPruningCallback", "{}")]
)
def test_command_line__append(command_line: Any, tmp_path: Path, name: str, path: str) -> None:
    """A callback can be added on the command line alone, also by its class name (`test_rooms` has all names)."""
    config = yaml.safe_load(CONFIG)
    config["trainer"]["callbacks"] = [{"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    settings = {"sparsity": 0.9, **SIBLINGS[name]}
    arguments = [f"--trainer.callbacks.{argument}={value}" for argument, value in settings.items()]
    first, callback, *_ = command_line(f"--trainer.callbacks+={path.format(name)}", *arguments).trainer.callbacks
    assert (type(first).__name__, type(callback).__name__) == ("EarlyStopping", name)
    assert callback.masks.num_kept == 100  # of 998
    of_method = vars(getattr(callback, "method", None) or callback)
    assert settings.items() <= {**vars(callback), **of_method}.items()


def printed(run: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        run()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", SIBLINGS)
def test_print_config__round_trip(
    command_line: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """`--print_config` prints a config, with all defaults, that prints itself again and finds the same masks."""
    config = yaml.safe_load(CONFIG)
    given = {"sparsity": 0.8, "exclude": ["head.*"], "control": "shuffle", **SIBLINGS[name]}
    if name in ("DRIVEPruningCallback", "SNIPPruningCallback"):
        given["loss_fn"] = "test_cli.squared_outputs"
    config["trainer"]["callbacks"] = [{"class_path": f"lightning_drive.{name}", "init_args": given}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    [callback, *_] = command_line().trainer.callbacks

    text = printed(lambda: command_line("--print_config"), capsys)
    [entry] = yaml.safe_load(text)["trainer"]["callbacks"]
    parameters = inspect.signature(getattr(lightning_drive, name)).parameters.items()
    defaults = {argument: parameter.default for argument, parameter in parameters}
    assert entry == {"class_path": f"lightning_drive.{name}", "init_args": {**defaults, **given}}

    (tmp_path / "config.yaml").write_text(text)
    assert printed(lambda: command_line("--print_config"), capsys) == text
    [again, *_] = command_line().trainer.callbacks
    assert again.masks.digest() == callback.masks.digest()


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # ModelCheckpoint, in a new version's folder
def test_saved_config__resume(command_line: Any, tmp_path: Path) -> None:
    """The `config.yaml` that LightningCLI leaves behind, with a checkpoint, is all that is needed to train on."""
    here = [
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={tmp_path}",
    ]
    cli = command_line(*here, "--trainer.enable_checkpointing=true", save_config_callback=SaveConfigCallback)
    [first, *_] = cli.trainer.callbacks
    [saved] = tmp_path.glob("lightning_logs/version_0/config.yaml")
    [checkpoint] = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")

    saved.rename(tmp_path / "config.yaml")
    cli = command_line(f"--ckpt_path={checkpoint}", "--trainer.max_epochs=5", save_config_callback=SaveConfigCallback)
    [callback, *_] = cli.trainer.callbacks
    assert (cli.trainer.current_epoch, callback.report.epoch) == (5, 1)  # trained on, pruned before
    assert callback.masks.digest() == first.masks.digest()
    for name, weight in cli.model.named_parameters():
        if name in callback.masks:
            assert torch.equal(weight != 0, callback.masks[name])

    for subcommand in ("validate", "fit"):  # a finished run: nothing is left to do
        cli = command_line(f"--ckpt_path={checkpoint}", subcommand=subcommand)
        assert callback.masks.digest() == cli.trainer.callbacks[0].masks.digest()
        assert torch.equal(cli.model.features[4].weight != 0, callback.masks["features.4.weight"])


RANGE = re.compile(r"in ``\[0, 1\)``|[Aa]t least \d|from 0 .* to ``\w+ - 1``")


def help_texts(text: str) -> dict[str, str]:
    """Return argument to its text in ``--trainer.callbacks.help``."""
    [_, *parts] = re.split(r"^  --trainer\.callbacks\.(?=\w+ .*$)", text, flags=re.MULTILINE)
    return {part.split()[0]: " ".join(part.split()) for part in parts}


@pytest.mark.parametrize("name", SIBLINGS)
def test_help(capsys: pytest.CaptureFixture[str], command_line: Any, name: str) -> None:
    """Every argument is there with its meaning and its default; a number with its range, which holds."""
    kind = getattr(lightning_drive, name)
    texts = help_texts(printed(lambda: command_line(f"--trainer.callbacks.help=lightning_drive.{name}"), capsys))
    parameters = inspect.signature(kind).parameters
    assert list(texts) == list(parameters)
    for argument, parameter in parameters.items():
        meaning, _, rest = texts[argument].rpartition(" (")
        assert len(meaning.split()) > 6  # the name of the argument, that of its value, and a sentence
        if parameter.default is inspect.Parameter.empty:
            assert rest.startswith("required")
        else:
            assert rest.endswith(f"default: {'null' if parameter.default is None else parameter.default})")
        if parameter.annotation in (int, float):
            assert RANGE.search(meaning), meaning
        if least := re.search(r"[Aa]t least (\d)", meaning):
            kind(**{"sparsity": 0.5, argument: int(least[1])})
            with pytest.raises(ValueError, match=f"`{argument}` must be a whole number of at least {least[1]}"):
                kind(**{"sparsity": 0.5, argument: int(least[1]) - 1})
