"""Every option is where the help says, and a word that is none of them ends in one line that names what was meant."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shtab
from commands import fails

from lightning_drive import __version__, command_options
from lightning_drive.command import main


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([option])
    assert capsys.readouterr().out == f"lightning-drive {__version__}\n"


@pytest.mark.parametrize(
    ("words", "command", "line"),
    [
        ("--sparsity 0.9 plan a:b", "plan", "plan a:b --sparsity 0.9"),
        ("--sparsity=0.9 --method imp plan a:b", "plan", "plan a:b --sparsity=0.9 --method imp"),
        ("--max-epochs 3 plan a:b --sparsity 0.9", "plan", "plan a:b --sparsity 0.9 --max-epochs 3"),
        ("--json report last.ckpt", "report", "report last.ckpt --json"),
        ("--trust-pickle compress a b", "compress", "compress a b --trust-pickle"),
        ("--overwrite expand a b", "expand", "expand a b --overwrite"),
        ("--over expand a b", "expand", "expand a b --over"),
    ],
)
def test_options_before_their_command(words: str, command: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The line to type is in the error; argparse takes it."""
    option = words.split()[0].partition("=")[0]
    message = fails(capsys, *words.split())
    assert message.startswith(
        f"lightning-drive: error: `{option}` is an option of `{command}` and comes after it: `lightning-drive {line}`. "
    )
    known, unknown = command_options._parser().parse_known_args(line.split())
    assert (known.command.prog, unknown) == (f"lightning-drive {command}", [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sparsity 0.9 a:b", "unrecognized arguments: --sparsity. `--sparsity` is an option of `plan`, and comes"),
        ("--overwrite", "`--overwrite` is an option of `compress` and `expand`, and comes after that word"),
        ("report --sparsity 0.9 a", "unrecognized arguments: --sparsity. `--sparsity` is an option of `plan`"),
        ("--json plan a:b --sparsity 0.9", "unrecognized arguments: --json. `--json` is an option of `report`"),
        ("plan a:b --version", "unrecognized arguments: --version. `lightning-drive --version` stands alone."),
        ("plan a:b --sparsty 0.9", "unrecognized arguments: --sparsty. Did you mean `--sparsity`?"),
        ("plan a:b --warmup-epochs 2", "Arguments of the callback are given as `--set warmup_epochs=VALUE`. ("),
        ("plan a:b --sparsity 0.9 --maxepochs=3", "unrecognized arguments: --maxepochs. Did you mean `--max-epochs`?"),
        ("report a --yaml --json", "unrecognized arguments: --yaml. ("),
        ("report -j a", "unrecognized arguments: -j. ("),
        ("--versoin", "unrecognized arguments: --versoin. Did you mean `--version`?"),
        ("report a b", "unrecognized arguments: b ("),
        ("plan a:b --max-epochs half", "argument --max-epochs: invalid int value: 'half'"),
        ("plan a:b --sparsity 0.9 --method driv", "argument --method: invalid choice: 'driv'"),
    ],
)
def test_unknown_options(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, *words.split())
    assert message in line
    assert line.endswith("--help` has more)\n")


def test_words_that_look_like_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ``--`` nothing is an option, and a file may have the name of one, or that of a command."""
    monkeypatch.chdir(tmp_path)
    for name in ("--json", "--sparsity", "report"):
        assert f"There is no file '{name}'" in fails(capsys, "report", "--", name)


@pytest.mark.parametrize("shell", command_options._SHELLS)
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The script knows all commands and options; shtab has a printer for each shell that is offered."""
    assert shell in shtab.SUPPORTED_SHELLS
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    for word in ("plan", "compress", "sparsity", "steps-per-epoch", "trust-pickle"):
        assert word in script


BASH = """
source "$1"
COMP_WORDS=(lightning-drive "${@:2}"); COMP_CWORD=$(( $# - 1 ))
$(complete -p lightning-drive | sed -E 's/.*-F ([^ ]+).*/\\1/') lightning-drive
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pl"], {"plan"}),
        (["plan", "--s"], {"--sparsity", "--set", "--steps-per-epoch"}),
        (["plan", "a:b", "--method", "s"], {"snip", "synflow"}),
        (["report", "la"], {"last.ckpt"}),
    ],
)
def test_completion__in_bash(
    words: list[str], expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell that has read the script completes commands, options, choices and files."""
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--print-completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "last.ckpt").touch()
    done = subprocess.run(
        ["bash", "-c", BASH, "bash", "./script", *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert {word.strip() for word in done.stdout.split()} == expected


def test_completion__without_shtab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "`--print-completion` needs shtab: `pip install shtab`." in fails(capsys, "--print-completion", "bash")
