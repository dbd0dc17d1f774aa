"""A module that is scored itself has its parameters, gradients, buffers and attributes back afterwards."""

import models
import pytest
import torch

from lightning_drive.network.module_state import preserved_state
from lightning_drive.network.random_state import preserved_rng


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_preserved_state(error: type[BaseException] | None) -> None:
    """After passes that change all they can, with weights set to 0 and one that is given other memory."""
    module = models.randomised(models.Restless())
    module.totals = {"by_class": [0]}
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    hooked: list[int] = []
    module.last.weight.register_post_accumulate_grad_hook(lambda parameter: hooked.append(1))
    before = models.fingerprint(module)

    def score() -> None:
        with preserved_rng(), preserved_state(module):
            assert all(parameter.grad is None for parameter in module.parameters())
            models.loss_fn(module, models.make_batches(4)[0]).backward()
            module.totals["by_class"][0] += 1
            module.cache = torch.ones(1)
            module.first.weight.data.zero_()
            module.last.weight.data = torch.ones(3, 6)
            if error:
                raise error

    if error:
        with pytest.raises(error):
            score()
    else:
        score()
    assert models.changes(module, before) == []
    assert (module.totals, hasattr(module, "cache"), hooked) == ({"by_class": [0]}, False, [])
    module.last.weight.sum().backward()
    assert hooked == [1]
