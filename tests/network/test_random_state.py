"""Random numbers go on as if nothing had been drawn, after an interrupt, too."""

import random

import numpy as np
import pytest
import torch

from lightning_drive.network.random_state import preserved_rng


def test_preserved_rng() -> None:
    def draw(error: type[BaseException] | None = None) -> tuple[float, float, float]:
        numbers = torch.rand(()).item(), float(np.random.rand()), random.random()
        if error:
            raise error
        return numbers

    with preserved_rng():
        inside = draw()
    with pytest.raises(KeyboardInterrupt), preserved_rng():
        draw(KeyboardInterrupt)
    assert draw() == inside
