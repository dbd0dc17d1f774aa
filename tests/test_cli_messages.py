"""One line is made of the errors of jsonargparse, of whatever form they are."""

import pytest

from lightning_drive import cli_messages

CLASSES = ["DRIVEPruningCallback", "SNIPPruningCallback", "EarlyStopping"]


def union(*errors: str, given: str = "x") -> str:
    """Write an error as jsonargparse does for a value that is of none of several types."""
    lines = "\n".join("  - " + error.replace("\n", "\n    ") for error in errors)
    return (
        f"Does not validate against any of the Union subtypes\nSubtypes: [A, B]\nErrors:\n{lines}\n"
        f"Given value type: <class 'str'>\nGiven value: {given}"
    )


def within(place: str, text: str) -> str:
    return f'Parser key "{place}":\n  ' + text.replace("\n", "\n  ")


LIST, NONE = "Expected a <class 'list'>", "Expected a <class 'NoneType'>"
OF_A_CLASS = "Problem with given class_path 'lightning_drive.SNIP':\n  "


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Problems of\n  two lines", "Problems of two lines"),
        ('Parser key "config": no such file', "config: no such file"),
        (within("a", "wrong"), "a: wrong"),
        (within("a", within("b", "wrong")), "a: b: wrong"),
        (within("a", within("a", "wrong")), "a: wrong"),
        (within("a", union(LIST, NONE, given="7")), "a: Expected a <class 'list'>. Got value: 7"),
        (within("a", union(NONE, "Expected a <class 'int'>")), "a: Expected a <class 'int'>. Got value: x"),
        (within("a", union(LIST, OF_A_CLASS + "required: b", NONE)), "a: lightning_drive.SNIP: required: b"),
        (
            within("a", union(LIST, OF_A_CLASS + within("b", union(NONE, "Expected a <class 'int'>", given="7")))),
            "a: lightning_drive.SNIP: b: Expected a <class 'int'>. Got value: 7",
        ),
        (
            within("a", "\n- Expected a path\n- " + union(LIST, "Expected a dot import path string: Qqq", NONE)),
            "a: there is no class 'Qqq'. Name one with its module, as in 'package.module.Class'.",
        ),
        (within("a", union(LIST, NONE, given="n" * 61)), f"a: Expected a <class 'list'>. Got value: {'n' * 60}..."),
        (
            OF_A_CLASS + "Option 'round' is not accepted",
            "lightning_drive.SNIP: Option 'round' is not accepted. Did you mean 'rounds'?",
        ),
        (
            "Problem with given class_path 'no.where':\n  Option 'a' is not accepted",
            "no.where: Option 'a' is not accepted.",
        ),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert cli_messages.one_line(text, CLASSES) == line


def test_one_line__unknown_form() -> None:
    """What another version writes in another form is printed whole."""
    text = "Does not validate against any of the Union subtypes: int, float. Given: x"
    assert cli_messages.one_line(text, CLASSES) == text
