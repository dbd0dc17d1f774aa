"""What tests rely on: a script that they start is run as a person would start it."""

from pathlib import Path

import processes
import pytest

SCRIPT = """
import atexit, sys
from pathlib import Path
import beside, lightning_drive
atexit.register(print, "over")
print(__name__, sys.argv[1:], Path.cwd().name, Path(lightning_drive.__file__).parent.parent)
try:
    import fits
except ImportError:
    print("alone")
sys.exit(beside.MESSAGE)
"""


@pytest.mark.parametrize(("message", "code", "errors"), [("None", 0, ""), ("2", 2, ""), ("'wrong'", 1, "wrong\n")])
def test_script(tmp_path: Path, message: str, code: int, errors: str) -> None:
    folder = tmp_path / "somewhere"
    folder.mkdir()
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "beside.py").write_text(f"MESSAGE = {message}", encoding="utf-8")
    done = processes.script(tmp_path / "script.py", "--some", 1, folder=folder)
    assert (done.returncode, done.stderr) == (code, errors)
    assert done.stdout.splitlines() == [
        f"__main__ ['--some', '1'] somewhere {processes.ROOT}",
        "alone",
        "over",
    ]


def test_script__failure(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("print('begun')\nraise ValueError('of the script')", encoding="utf-8")
    done = processes.script("script.py", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "begun\n")
    assert done.stderr.endswith("ValueError: of the script\n")
