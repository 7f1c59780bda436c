"""Attention as two products in bfloat16 and one softmax kernel between them."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import MASKED


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether [`attention`] takes these."""
    return query.dtype in (torch.float32, torch.bfloat16) and query.device.type == "cpu" and query.ndim == 4


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`softmax(s Q K^T + M) V` with products in bfloat16, everything else in float32.

    PyTorch's own kernel for CPUs multiplies small tiles one by one, which loses to whole products as long as the
    scores fit into the caches. The sum of the exponentials divides the outputs, which are fewer than the scores.

    Args:
        query (`torch.Tensor`): (batch, heads, queries, width), float.
        key (`torch.Tensor`): (batch, heads, keys, width); or of fewer heads, of which each serves as many queries'.
        value (`torch.Tensor`): like `key`, (batch, heads, keys, width of the output).
        mask (`torch.Tensor`, *optional*): float32, added to the scores (batch, heads, queries, keys); broadcasts.
        causal (`bool`): whether a query sees only the keys up to its own position.
        scale (`float`): by which scores are multiplied.

    Returns:
        `torch.Tensor`: (batch, heads, queries, width of the output), in `query`'s dtype.
    """
    scores, values = _scores(query, key, value, causal, scale)
    if mask is not None:
        scores = scores + mask
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    total = powers.sum(-1, keepdim=True)
    return (_weighted(powers, values).float() / total).to(query.dtype)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """[`attention`] for a graph that runs operation by operation: with PyTorch's softmax, which is one kernel."""
    scores, values = _scores(query, key, value, causal, scale)
    if mask is not None:
        scores.add_(mask)
    return _weighted(torch.softmax(scores, -1), values).to(query.dtype)


def _scores(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Scores, float32 (batch, heads, queries, keys), new; and values, bfloat16 (batch * heads, keys, width)."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if key.shape[1] != heads:
        key = key.repeat_interleave(heads // key.shape[1], 1)
        value = value.repeat_interleave(heads // value.shape[1], 1)
    # Scaled before it is rounded: a power of two changes nothing, and other scales lose nothing.
    left = (query * scale).to(torch.bfloat16).reshape(batch * heads, queries, -1)
    right = key.to(torch.bfloat16).reshape(batch * heads, keys, -1)
    scores = torch.bmm(left, right.transpose(1, 2)).float().view(batch, heads, queries, keys)
    if causal:
        place = torch.arange(keys, device=query.device)
        scores.masked_fill_(place > place[:queries, None], MASKED)
    return scores, value.to(torch.bfloat16).reshape(batch * heads, keys, -1)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Values by weights (batch, heads, queries, keys), in bfloat16."""
    batch, heads, queries, keys = weights.shape
    flat = weights.to(torch.bfloat16).view(batch * heads, queries, keys)
    return torch.bmm(flat, values).view(batch, heads, queries, -1)
