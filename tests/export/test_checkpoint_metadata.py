"""JSON in the metadata of a sparse file returns what it took of a checkpoint, and names what it cannot hold."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_drive.export import checkpoint_metadata


def state(report: object) -> dict[str, Any]:
    return {"version": 1, "masks": {}, "report": report}


def test_packed() -> None:
    """Training state and weights stay out, and what JSON cannot hold is named."""
    plain = {"epoch": 3, "labels": ("cat", [1.5, None, True]), "none": None, "deep": {"a": {"b": (1, (2,))}}}
    training = {"loops": {}, "optimizer_states": [], "lr_schedulers": [], "callbacks": {"A": state({"x": [1]})}}
    odd = {"tensor": torch.ones(1), "keys": {1: 2}, "size": torch.Size([2]), "__tuple__": [1], 3: 4}
    hyper_parameters = {"width": 3, "dtype": torch.float32, "size": (1, 2)}
    found = checkpoint_metadata.packed(
        {"state_dict": {}, **plain, **training, **odd, "hyper_parameters": hyper_parameters}
        | {"datamodule_hyper_parameters": {"folder": Path("x")}}
    )
    assert found.entries_left_out == ["tensor (Tensor)", "keys (dict)", "size (Size)", "__tuple__ (list)", "3 (int)"]
    assert [text.split()[0] for text in found.hyper_parameters_left_out] == ["dtype", "folder"]
    assert json.loads(found.metadata["checkpoint"]).keys() & {"state_dict", *training} == set()
    assert checkpoint_metadata.unpacked(found.metadata, Path("x")) == {
        **plain,
        "hyper_parameters": {"width": 3, "size": (1, 2)},
        "datamodule_hyper_parameters": {},
        "lightning_drive": {"callback": "A", "report": {"x": [1]}},
    }


def test_packed__bare() -> None:
    """A ``state_dict`` has nothing else, whatever its tensors are called."""
    assert checkpoint_metadata.packed({"epoch": torch.ones(1)}) == ({}, [], [])
    assert checkpoint_metadata.unpacked({}, Path("x")) == {}
    assert checkpoint_metadata.unpacked({"mine": "text"}, Path("x")) == {}


def test_unpacked__no_training_state() -> None:
    """A file that others wrote cannot bring in what `compress` leaves out."""
    text = json.dumps({"state_dict": {}, "callbacks": {}, "epoch": 1})
    assert checkpoint_metadata.unpacked({"checkpoint": text}, Path("x")) == {"epoch": 1}


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "[" * 100_000, '{"__tuple__": 1}', '{"__tuple__": [1]}'])
def test_unpacked__error(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape("'x' has metadata under 'checkpoint' that `lightning-drive compr")):
        checkpoint_metadata.unpacked({"checkpoint": text}, Path("x"))
