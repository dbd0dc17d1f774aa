"""Statistics are those of `update_bn`, of tracked layers only, and are written only when asked to."""

import copy

import models
import pytest
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_drive.network import batch_norm


def trained_conv_net() -> models.ConvNet:
    module = models.randomised(models.ConvNet())
    for batch in models.make_batches(2, 6, 6, seed=1):
        models.loss_fn(module.train(), batch)
    return module


def test_batch_norm_statistics() -> None:
    """What `torch.optim.swa_utils.update_bn` writes, but written only when asked to."""
    module, batches = trained_conv_net(), models.make_batches(2, 6, 6, count=4)
    expected = copy.deepcopy(module)
    update_bn(batches, expected)
    before = models.fingerprint(module)
    statistics = batch_norm.batch_norm_statistics(copy.deepcopy(module), models.loss_fn, batches)
    assert list(statistics) == ["norm1", "norm2"]
    batch_norm.load_batch_norm_statistics(module, statistics)
    for (name, found), wanted in zip(module.named_buffers(), expected.buffers(), strict=True):
        assert found.equal(wanted), name
    assert set(models.changes(module, before)) >= {"buffer norm1.running_mean", "buffer norm2.running_var"}


def test_batch_norm_statistics__frozen_and_untrained() -> None:
    module = trained_conv_net()
    module.norm1.eval()
    assert list(batch_norm.batch_norm_statistics(module, models.loss_fn, models.make_batches(2, 6, 6))) == ["norm2"]
    assert batch_norm.batch_norm_statistics(models.ConvNet(), models.loss_fn, models.make_batches(2, 6, 6)) == {}


def test_batch_norm_statistics__no_batches() -> None:
    """Mean 0 and variance 1 of nothing would be worse than what is there."""
    assert batch_norm.batch_norm_statistics(trained_conv_net(), models.loss_fn, []) == {}


def test_batch_norm_statistics__momentum_returns_after_an_error() -> None:
    module = trained_conv_net()
    momentum = module.norm1.momentum

    def broken(module: nn.Module, batch: models.Batch) -> Tensor:
        models.loss_fn(module, batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch_norm.batch_norm_statistics(module, broken, models.make_batches(2, 6, 6))
    assert module.norm1.momentum == momentum


def test_load_batch_norm_statistics__error() -> None:
    """Nothing is written if one layer does not fit."""
    module = trained_conv_net()
    statistics = batch_norm.batch_norm_statistics(copy.deepcopy(module), models.loss_fn, models.make_batches(2, 6, 6))
    before = models.fingerprint(module)
    for name in ("fc", "absent", "norm2"):
        odd = {**statistics, name: {"running_mean": statistics["norm1"]["running_mean"]}}
        with pytest.raises(ValueError, match=f"statistics of the BatchNorm layer '{name}'.*do not fit the module"):
            batch_norm.load_batch_norm_statistics(module, odd)
    assert models.changes(module, before) == []
