"""Choose the forms of layers without a clock, so that tests do not depend on the machine."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from lightning_drive.acceleration import measuring, timing


def prefer(monkeypatch: pytest.MonkeyPatch, *names: Any) -> None:
    """Let these pieces of work be the fastest, in this order, wherever they are timed; all of them are run once."""

    def least_seconds(works: Mapping[Any, Callable[[], object]], runs: int | None = None) -> dict[Any, float]:
        for work in works.values():
            work()
        return {name: 0.1 * (1 + names.index(name)) if name in names else 10.0 for name in works}

    monkeypatch.setattr(timing, "least_seconds", least_seconds)
    monkeypatch.setattr(measuring, "LEAST_SPARSITY", 0.0)


ALWAYS_SPARSE = ("tokens", "pixels", "lines", "windows", 1)
"""Every layer in its first sparse form, and images as they are; for `prefer`."""

IN_TRAINING = ("windows", "tokens", "pixels", "sparse")
"""Every layer and the whole step in a sparse form, which is 25 times as fast then."""
