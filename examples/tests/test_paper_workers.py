"""Processes that do the runs end with the one that started them, and one that is killed costs its own run only."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Script

PAPER = Path(__file__).parents[1] / "paper"
SCRIPT = f"""
import os, sys, time
from functools import partial
from pathlib import Path

sys.path.insert(0, {str(PAPER)!r})
from workers import Workers, interrupted_by_signals, was_killed


def work(name):
    Path(f"{{name}}.begun").write_text(str(os.getpid()))
    while name.startswith("long") or name == "waits" and not Path("go").exists():
        time.sleep(0.01)
    if name == "wrong":
        raise ValueError("no")
    return os.getpid()


if __name__ == "__main__":
    try:
        with interrupted_by_signals(), Workers(2, partial(print, "ready", flush=True)) as workers:
            for name, future in workers.call(work, sys.argv[1:]):
                killed, error = was_killed(future), future.exception()
                print(name, "killed" if killed else error or future.result(), flush=True)
    except KeyboardInterrupt:
        sys.exit("stopped")
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Script]:
    """Start a script that does one call for each name, two at once."""
    (tmp_path / "script.py").write_text(SCRIPT)
    return lambda *names: Script(tmp_path / "script.py", *names, folder=tmp_path)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def process_of(path: Path) -> int:
    """Return the process that began a call, once it has."""
    wait_until(lambda: path.is_file() and path.read_text())
    return int(path.read_text())


def lives(process: int) -> bool:
    """Whether a process is there, and is not one that nobody has waited for yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rows(output: str) -> dict[str, str]:
    return {row.partition(" ")[0]: row.partition(" ")[2] for row in output.splitlines() if " " in row}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_workers__end_with_their_parent(start: Callable[..., Script], tmp_path: Path, name: str) -> None:
    """A signal to the parent alone ends them too, and calls that wait for their turn are not begun."""
    script = start("long", "longer", "never")
    workers = [process_of(tmp_path / f"{call}.begun") for call in ("long", "longer")]
    assert script.process.pid is not None
    os.kill(script.process.pid, getattr(signal, name))
    ended = script.finish(timeout=60)
    assert ended.returncode == (-signal.SIGKILL if name == "SIGKILL" else 1)
    assert name == "SIGKILL" or "stopped" in ended.stderr
    wait_until(lambda: not any(map(lives, workers)))
    assert not (tmp_path / "never.begun").exists()


def test_workers__terminal_closed_under_nohup(
    start: Callable[..., Script], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where somebody has arranged that SIGHUP is ignored, it stays so."""
    (tmp_path / "script.py").write_text(f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{SCRIPT}")
    script = Script(tmp_path / "script.py", "waits", folder=tmp_path)
    process_of(tmp_path / "waits.begun")
    assert script.process.pid is not None
    os.kill(script.process.pid, signal.SIGHUP)
    (tmp_path / "go").touch()
    assert script.finish().returncode == 0


def test_workers__one_is_killed(start: Callable[..., Script], tmp_path: Path) -> None:
    """Its call is lost, all others are done, and a new process is there for the next."""
    script = start("long", "waits", "wrong", "next")
    worker = process_of(tmp_path / "long.begun")
    process_of(tmp_path / "waits.begun")
    os.kill(worker, signal.SIGKILL)
    process_of(tmp_path / "next.begun")
    (tmp_path / "go").touch()
    ended = script.finish()
    assert ended.returncode == 0, ended.stderr
    found = rows(ended.stdout)
    assert (found["long"], found["wrong"]) == ("killed", "no")
    assert found["next"] == (tmp_path / "next.begun").read_text() != str(worker)
    assert found["waits"] == (tmp_path / "waits.begun").read_text()
    assert ended.stdout.splitlines().count("ready") == 3
