"""Paths through attention: every query sees every value."""

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_drive.network.path_marks import Gate, without_shut, zeros_and_ones


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the mark of attention; queries and keys matter where their products scale a value that a path reaches."""
    query, key, value = without_shut(query), without_shut(key), without_shut(value)
    if kwargs.get("enable_gqa"):  # each head of keys and values serves a group of heads of queries
        key, value = (heads.repeat_interleave(query.shape[-3] // heads.shape[-3], -3) for heads in (key, value))
    weight = 1 + (query * key.mean(-2, keepdim=True)).sum(-1, keepdim=True)
    return zeros_and_ones(weight * value.mean(-2, keepdim=True))


def _multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Return the marks of what ``torch.nn.MultiheadAttention`` returns: its outputs, and the weights of attention."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given["use_separate_proj_weight"]:
        weights = [given[f"{kind}_proj_weight"] for kind in "qkv"]
    else:
        weights = list(given["in_proj_weight"].chunk(3))
    projected = [
        zeros_and_ones(F.linear(without_shut(given[kind]), weight))
        for kind, weight in zip(("query", "key", "value"), weights, strict=True)
    ]
    heads = [part.reshape(*part.shape[:-1], given["num_heads"], -1).movedim(0, -2) for part in projected]
    joined = zeros_and_ones(F.linear(_attention(*heads).movedim(-2, 0).flatten(-2), given["out_proj_weight"]))
    if not given["need_weights"]:
        return joined, None
    similarity = zeros_and_ones(heads[0] @ heads[1].mT)
    similarity = F.pad(similarity, (0, int(given["bias_k"] is not None) + int(given["add_zero_attn"])))
    return joined, (similarity.mean(-3) if given["average_attn_weights"] else similarity).as_subclass(Gate)


RULES: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
}
"""Functions of torch to what takes their place."""
