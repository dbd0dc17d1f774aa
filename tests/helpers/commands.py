"""Runs of ``lightning-drive`` in this process and in others."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import lightning_drive
from lightning_drive.command import main


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must end in one line of error, and return that line."""
    capsys.readouterr()
    try:
        status: object = main([str(argument) for argument in arguments])
    except SystemExit as error:  # of argparse
        status = error.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert re.fullmatch(r"lightning-drive.*: error: .*\n", err)
    return err


def succeeds(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must succeed, and return what it printed."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def in_shell(words: str, variables: Mapping[str, str] | None = None, **settings: object) -> subprocess.CompletedProcess:
    """Run a line of bash in which ``$drive`` is the command, and return what came of it, as bytes."""
    places = [str(Path(lightning_drive.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    given = {"PYTHONPATH": os.pathsep.join(places), "drive": f"{sys.executable} -m lightning_drive"}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, **given, **(variables or {})},
        **settings,  # type: ignore[call-overload]
    )
