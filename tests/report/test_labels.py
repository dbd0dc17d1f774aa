"""Every name in code that the report shows has words."""

from typing import get_args

from lightning_drive.core.arguments import Control
from lightning_drive.report import labels


def test_controls__all_have_words() -> None:
    """All but the one that changes nothing, which is not shown."""
    assert labels.CONTROLS.keys() == {*get_args(Control)} - {"none"}
