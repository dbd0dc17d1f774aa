"""Every query sees every value; without queries or keys the weights of attention are uniform."""

import models
import pytest
import torch
import torch.nn.functional as F
from followed import active_counts, all_active, dense_masks
from torch import Tensor, nn

from lightning_drive.network import paths


def attention_masks() -> dict[str, Tensor]:
    return dense_masks(models.Attention())


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        pytest.param([], [], (48, 16, 12), id="dense"),
        # Values are rows 8..11: without them nothing passes, and queries and keys have nothing to weigh.
        pytest.param([8, 9, 10, 11], [], (0, 0, 0), id="no_values"),
        # Queries are rows 0..3: without them the weights are uniform, keys do not matter, values still pass.
        pytest.param([0, 1, 2, 3], [], (16, 16, 12), id="no_queries"),
        pytest.param([4, 5, 6, 7], [], (16, 16, 12), id="no_keys"),
        # Head 0 is rows 0, 1, 4, 5, 8, 9 and the first two columns of out_proj.
        pytest.param([8, 9], [], (24, 8, 12), id="no_values_in_head_0"),
        pytest.param([], [0, 1], (24, 8, 12), id="head_0_unheard"),
    ],
)
def test_attention(rows: list[int], columns: list[int], expected: tuple[int, ...]) -> None:
    masks = attention_masks()
    masks["attention.in_proj_weight"][rows] = False
    masks["attention.out_proj.weight"][:, columns] = False
    assert tuple(active_counts(models.Attention().eval(), masks, torch.zeros(1, 16)).values()) == expected


class AttentionByHand(nn.Module):
    """softmax(QK)V, written out; causal: no token sees a later one."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        similarity = self.q(x) @ self.k(x).mT / 2
        if self.causal:
            later = torch.ones(similarity.shape[-2:], dtype=torch.bool).triu(1)
            similarity = similarity.masked_fill(later, float("-inf"))
        return torch.softmax(similarity, -1) @ self.v(x)


@pytest.mark.parametrize(
    ("pruned", "expected"),
    [(None, (16, 16, 16)), ("v", (0, 0, 0)), ("q", (0, 0, 16)), ("k", (0, 0, 16))],
    ids=["dense", "no_values", "no_queries", "no_keys"],
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_by_hand(causal: bool, pruned: str | None, expected: tuple[int, ...]) -> None:
    """As for the layer: without queries or keys the weights are uniform, and values still pass."""
    module = AttentionByHand(causal)
    masks = {name: mask.fill_(name[0] != pruned) for name, mask in dense_masks(module).items()}
    assert tuple(active_counts(module, masks, torch.zeros(1, 3, 4)).values()) == expected


class Grouped(nn.Module):
    """Attention whose keys and values have fewer heads than its queries."""

    def __init__(self, kv_heads: int, by: str) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 2 * kv_heads), nn.Linear(8, 2 * kv_heads)
        self.out, self.by = nn.Linear(8, 8), by

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        groups = q.shape[1] // k.shape[1]
        if self.by == "torch":
            mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            if self.by == "expand":
                k, v = (heads.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for heads in (k, v))
            else:
                k, v = (heads.repeat_interleave(groups, 1) for heads in (k, v))
            mixed = torch.softmax(q @ k.mT / 2**0.5, -1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("by", ["torch", "expand", "repeat"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_serve_groups_of_queries(kv_heads: int, by: str) -> None:
    module = Grouped(kv_heads, by)
    masks = dense_masks(module)
    assert all_active(module, masks, torch.zeros(1, 3, 8))
    masks["v.weight"][:2] = False  # the first head of values
    active = paths.active_masks(module, masks, torch.zeros(1, 3, 8))
    served = 8 // kv_heads
    assert not active["out.weight"][:, :served].any()
    assert not active["q.weight"][:served].any()
    assert not active["k.weight"][:2].any()
    assert all(active[name][start:].all() for name, start in (("q.weight", served), ("k.weight", 2), ("v.weight", 2)))


def test_weights_of_attention_are_followed() -> None:
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    module = nn.ModuleDict({"attention": layer, "last": nn.Linear(4, 2)})
    module.forward = lambda x: module["last"](layer(x, x, x)[1] @ x)
    active = paths.active_masks(module.eval(), dense_masks(module), torch.zeros(1, 3, 4))
    assert active["attention.in_proj_weight"].sum(1).tolist() == [4] * 8 + [0] * 4
