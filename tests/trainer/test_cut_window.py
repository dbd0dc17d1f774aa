"""Cuts are due at equal distances from the start of the window to its end, and never out of it."""

from fractions import Fraction

import pytest

from lightning_drive.trainer.cut_window import CutWindow, check_settings


@pytest.mark.parametrize("cuts_per_epoch", [1, 3, 4, 50])
@pytest.mark.parametrize("num_batches", [1, 7, 12])
def test_num_due(num_batches: int, cuts_per_epoch: int) -> None:
    """As many as whole intervals have passed, in exact arithmetic."""
    window = CutWindow(2, 5, cuts_per_epoch)
    for epoch in range(7):
        for batch in range(num_batches):
            passed = (epoch + Fraction(batch, num_batches) - 2) * cuts_per_epoch
            expected = min(max(passed.__floor__(), 0), 3 * cuts_per_epoch)
            assert window.num_due(epoch, batch, num_batches) == expected


def test_num_due__at_the_ends() -> None:
    """None at the start of the window, all at its end, where nobody has to know how long an epoch is."""
    window = CutWindow(2, 5, 4)
    assert [window.num_due(epoch, 0, float("inf")) for epoch in (0, 2, 3, 5, 9)] == [0, 0, 4, 12, 12]
    assert window.num_due(4, 11, 12) == 11


@pytest.mark.parametrize(
    ("start", "end", "max_epochs", "expected"),
    [
        (None, None, 1, (0, 1)),
        (None, None, 2, (0, 1)),
        (None, None, 4, (1, 3)),
        (None, None, 30, (2, 20)),
        (None, 2, -1, (1, 2)),
        (7, None, 30, (7, 20)),
        (0, 1, -1, (0, 1)),
    ],
)
def test_of(start: int | None, end: int | None, max_epochs: int, expected: tuple[int, int]) -> None:
    assert CutWindow.of(start, end, 4, max_epochs) == (*expected, 4)


@pytest.mark.parametrize(
    ("start", "end", "max_epochs", "message"),
    [
        (None, None, -1, "number of epochs of the run is not known"),
        (3, 3, -1, "must be less than 3, got start_epoch=3"),
        (20, None, 30, r"must be less than 20 \(two thirds of max_epochs=30\), got start_epoch=20"),
    ],
)
def test_of__error(start: int | None, end: int | None, max_epochs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CutWindow.of(start, end, 4, max_epochs)


SETTINGS = {"start_epoch": 2, "end_epoch": 4, "cuts_per_epoch": 2, "sparsity": 0.9, "include": None}


def test_saved() -> None:
    assert CutWindow.saved(SETTINGS) == CutWindow(2, 4, 2)
    for name in ("start_epoch", "end_epoch", "cuts_per_epoch"):
        with pytest.raises(ValueError, match=f"`{name}` in the settings of the checkpoint's callback state must be"):
            CutWindow.saved({**SETTINGS, name: "2"})


def test_check_settings() -> None:
    """What is not given goes on as it was; what is, must be the same, as long as there are cuts to come."""
    check_settings(3, SETTINGS, {**SETTINGS, "start_epoch": None, "end_epoch": None, "include": ["*"]})
    check_settings(4, SETTINGS, {**SETTINGS, "sparsity": 0.5})
    with pytest.raises(ValueError, match=r"from cut 3 of gradual pruning with sparsity=0\.9, .* has sparsity=0\.5"):
        check_settings(3, SETTINGS, {**SETTINGS, "sparsity": 0.5})
