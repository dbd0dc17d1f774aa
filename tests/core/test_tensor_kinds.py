"""Weights that are sparse, quantised or of a subclass are masked where they can be, and named where they cannot."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_drive import Masks
from lightning_drive.network.masked_parameters import MaskedParameters


class InTwoParts(Tensor):
    """A tensor whose numbers are those of two others together, as of some quantised ones."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "InTwoParts":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"no {func}")

    @classmethod
    def of(cls, weight: Tensor) -> "InTwoParts":
        scale = weight.abs().max() / 127
        return cls((weight / scale).round().to(torch.int8), scale)


class Dequantised(InTwoParts):
    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.codes * self.scale


class MadeDense(InTwoParts):
    def to_dense(self) -> Tensor:  # type: ignore[override]
        return self.codes * self.scale


def _per_channel(weight: Tensor) -> Tensor:
    return torch.quantize_per_channel(weight, torch.full((4,), 0.05), torch.arange(4), 0, torch.qint8)


def _in_parts(weight: Tensor) -> Tensor:
    """A sparse tensor that holds every entry twice, as halves."""
    half = (weight / 2).to_sparse()
    places, values = torch.cat([half.indices()] * 2, 1), torch.cat([half.values()] * 2)
    return torch.sparse_coo_tensor(places, values, weight.shape, check_invariants=False)


FORMS: dict[str, tuple[Any, bool]] = {
    "coo": (lambda weight: weight.to_sparse(), True),
    "coo_with_parts": (_in_parts, True),
    "csr": (lambda weight: weight.to_sparse_csr(), True),
    "csc": (lambda weight: weight.to_sparse_csc(), True),
    "bsr": (lambda weight: weight.to_sparse_bsr((2, 3)), True),
    "bsc": (lambda weight: weight.to_sparse_bsc((2, 3)), True),
    "qint8": (lambda weight: torch.quantize_per_tensor(weight, 0.05, 3, torch.qint8), True),
    "qint8_by_channel": (_per_channel, True),
    "dequantize": (Dequantised.of, False),
    "to_dense": (MadeDense.of, False),
}


@pytest.mark.filterwarnings("ignore:.*(beta state|[qQ]uantize)")
@pytest.mark.parametrize("form", FORMS)
def test_masks__of_weights_that_are_not_plain(form: str) -> None:
    """Masks are told from what the weights stand for, and put on where they can be; else the parameter is named."""
    convert, can_be_masked = FORMS[form]
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    masks, others = Masks({"0.weight": weight > 0}), Masks({"0.weight": weight < 0})
    module = nn.Sequential(nn.Linear(6, 4))
    module[0].weight = nn.Parameter(convert(weight.clamp(min=0)), requires_grad=False)
    assert masks.hold_for(module)
    assert not others.hold_for(module)
    masks.apply_(module)  # nothing to do
    assert masks.hold_for(module)
    if can_be_masked:
        half = Masks({"0.weight": (weight > 0) & (torch.arange(6) % 2 == 0)})
        before = module[0].weight.dequantize() if "int8" in form else module[0].weight.to_dense()
        half.apply_(module)
        after = module[0].weight.dequantize() if "int8" in form else module[0].weight.to_dense()
        assert half.hold_for(module)
        assert torch.equal(after, before.masked_fill(~half["0.weight"], 0))
    else:
        with pytest.raises(TypeError, match=r"'0.weight' is a \w+ of torch.float32, .* before the weights are quant"):
            others.apply_(module)
    with pytest.raises(TypeError, match=r"'0.weight' is a .*Put the masks on before"):
        MaskedParameters(module, masks)


@pytest.mark.parametrize("use", [Masks.hold_for, Masks.apply_])
def test_masks__of_weights_that_cannot_be_read(use: Any) -> None:
    module = nn.Linear(6, 4)
    module.weight = nn.Parameter(InTwoParts.of(torch.ones(4, 6)), requires_grad=False)
    with pytest.raises(TypeError, match=r"'weight' is a InTwoParts of torch.float32, and neither its `dequantize\(\)`"):
        use(Masks({"weight": torch.zeros(4, 6, dtype=torch.bool)}), module)


@pytest.mark.parametrize("use", [Masks.hold_for, Masks.apply_])
def test_masks__of_weights_on_the_meta_device(use: Any) -> None:
    masks = Masks({"weight": torch.zeros(4, 6, dtype=torch.bool)})
    with pytest.raises(TypeError, match="'weight' is on the meta device and has no values"):
        use(masks, nn.Linear(6, 4, device="meta"))


@pytest.mark.filterwarnings("ignore:.*prototype stage")
def test_masks__of_nested_weights() -> None:
    module, masks = nn.Module(), Masks({"weight": torch.ones(2, 3, dtype=torch.bool)})
    module.weight = nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]))
    assert not masks.hold_for(module)
    with pytest.raises(TypeError, match="'weight' is a"):
        masks.apply_(module)
