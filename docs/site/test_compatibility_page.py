"""The test files that the compatibility page names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_named_tests__exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")))
    assert len(named) > 20
    assert named - {path.stem for path in (ROOT / "tests").rglob("test_*.py")} == set()
