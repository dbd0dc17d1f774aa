"""Outputs that are shown are compared with those of a run, and what differs is found."""

import outputs
import pytest

PRINTED = "Trainer stopped\n\nname  shape  kept   density\nfc    8x4    1,246  14.16%\nin 0.8 s\n"


@pytest.mark.parametrize(
    ("shown", "marks"),
    [
        ("name shape kept density", []),
        ("name shape kept density\nfc 8x4 1,246 14.16%", []),
        ("fc  8x4  1,250  14.00%", ["trained"]),
        ("in 123.4 s", [r"varies: [0-9.]+ s"]),
        ("fc 8x4 1,200 14.16%\nin 9 s", ["trained", "varies: in .* s"]),
    ],
)
def test_check(shown: str, marks: list[str]) -> None:
    outputs.check(shown, PRINTED, marks)


@pytest.mark.parametrize(
    ("shown", "marks"),
    [
        ("name shape density", []),  # a word
        ("name shape kept density\nin 0.8 s", []),  # a line between them
        ("fc 8x4 1,247 14.16%", []),  # a number
        ("fc 8x4 1,100 14.16%", ["trained"]),  # a number that is too far off
        ("fc 8x3 1,246 14.16%", ["trained"]),  # a shape
        ("conv 8x4 1,246 14.16%", ["trained"]),  # a name
        ("in 0.8 m", [r"varies: [0-9.]+"]),  # what stands around that which varies
        ("in 0.8 s\nand more", []),
        ("", []),
    ],
)
def test_check__difference(shown: str, marks: list[str]) -> None:
    with pytest.raises(AssertionError):
        outputs.check(shown, PRINTED, marks)


def test_check__mark_error() -> None:
    with pytest.raises(ValueError, match=r"marked by `trained` or `varies: PATTERN`, got \['times'\]"):
        outputs.check("in 0.8 s", PRINTED, ["trained", "times"])
