"""Patterns of a sparsity must divide what is pruned; what is wrong with them is said by name."""

from functools import partial
from typing import Any

import models
import pytest
from torch import nn

from lightning_drive.core.goal import Goal
from lightning_drive.network import prunable, sparsity_groups


def check(sparsity: Any, module: nn.Module, **selection: Any) -> None:
    select = partial(prunable.prunable_parameters, **selection)
    sparsity_groups.check(Goal(sparsity), module, select(module), select)


@pytest.mark.parametrize(
    "sparsity",
    [
        0.5,
        {"*": 0.5},
        {"conv1.weight": 0.5, "*": 0.5},
        {"*.weight": 0.5},
        {"conv?.*": 0.5, "fc.*": 0.1},
        {"conv1.*": 0.5, "conv*": 0.1, "*": 0.9},
        {"conv*": 0.5, "fc.*": 0.1, "*": 0.9},  # no rest is left
    ],
    ids=str,
)
def test_check(sparsity: Any) -> None:
    check(sparsity, models.ConvNet())


@pytest.mark.parametrize(
    ("sparsity", "selection", "message"),
    [
        (
            {"conv9.*": 0.5, "*": 0.9},
            {},
            r"pattern 'conv9.\*' matches no parameter. Did you mean 'conv\d.\*'\? The param",
        ),
        (
            {"fc.bias": 0.5, "*": 0.9},
            {},
            r"not pruned \(fc.bias\). Prunable are: conv1.weight, conv2.weight, fc.weight.",
        ),
        ({"norm1.*": 0.5, "*": 0.9}, {}, r"matches only parameters that are not pruned \(norm1.weight, norm1.bias\)"),
        (
            {"conv1.*": 0.5, "*": 0.9},
            {"exclude": ["conv1.*"]},
            r"not pruned \(conv1.weight, conv1.bias\). Prunable are",
        ),
        (
            {"*.weight": 0.5, "fc.*": 0.9},
            {},
            r"'fc.\*' is never used, .* by '\*.weight' before it. Put it before that.",
        ),
        (
            {"c*1*": 0.5, "c*2*": 0.5, "conv*": 0.9, "*": 0},
            {},
            r"'conv\*' is never used, .* by 'c\*1\*', 'c\*2\*' before",
        ),
        ({"conv*": 0.5}, {}, r"`sparsity` has no pattern that matches 'fc.weight'. Add '\*' for the rest"),
        ({"fc.*": 0.5}, {"exclude": ["conv1.*"]}, "no pattern that matches 'conv2.weight'. Add"),
    ],
    ids=str,
)
def test_check__error(sparsity: Any, selection: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(sparsity, models.ConvNet(), **selection)


def test_check__frozen() -> None:
    """It may have a pattern, and need not; whether a parameter requires a gradient is as before."""
    module = models.ConvNet()
    module.conv1.requires_grad_(False)
    check({"conv1.*": 0.5, "*": 0.9}, module)
    check({"conv2.*": 0.5, "fc.*": 0.9}, module)
    assert not module.conv1.weight.requires_grad
    assert module.conv2.weight.requires_grad


def test_check__tied() -> None:
    """A tied weight has a pattern under its first name."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    check({"0.*": 0.5}, module)
    with pytest.raises(ValueError, match=r"pattern '1.weight' matches no parameter. .*a tied one by its first name"):
        check({"1.weight": 0.5, "*": 0.9}, module)
