"""The Fisher information of blocks of weights: what one is worth if its neighbours make up for it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

DAMPING = 0.01
_CHUNK = 1 << 17  # elements of a temporary: 512 KiB of float32


def new_blocks(weight: Tensor, size: int) -> Tensor:
    """An empty sum for [`add_gradient`].

    Args:
        weight (`torch.Tensor`): any shape; its rows, one after another, are cut into blocks.
        size (`int`): consecutive weights that form a block. The last block may be shorter; its rest stays 0.

    Returns:
        `torch.Tensor`: zeros (blocks, size, size), float32: `size` numbers, or `4 * size` bytes, for each weight.
    """
    count = -(-weight.numel() // size)
    return torch.zeros(count, size, size, dtype=torch.float32, device=weight.device)


@torch.no_grad()
def add_gradient(blocks: Tensor, gradient: Tensor) -> None:
    """Add the outer product of each block's gradient with itself, in place.

    The inverse could be kept instead and updated with each gradient (Sherman-Morrison). The sum takes the same memory
    and a third of the time, does not depend on a damping chosen before the first gradient, and keeps its digits: of
    the inverse 1 % is wrong after 200 float32 updates by gradients whose square is a million times the damping. The
    sum is inverted when a mask is updated.

    Args:
        blocks (`torch.Tensor`): see [`new_blocks`].
        gradient (`torch.Tensor`): of the weight's shape, finite, any float dtype.
    """
    size = blocks.shape[1]
    flat = gradient.reshape(-1)
    whole = flat.numel() // size
    rows = flat[: whole * size].view(whole, size)
    # A fused product; baddbmm_ takes 16 times as long for blocks this small.
    blocks[:whole].addcmul_(rows.unsqueeze(2), rows.unsqueeze(1))
    rest = flat[whole * size :]
    if rest.numel():
        blocks[whole, : rest.numel(), : rest.numel()].addcmul_(rest.unsqueeze(1), rest.unsqueeze(0))


@torch.no_grad()
def block_scores(weight: Tensor, blocks: Tensor, count: Tensor) -> Tensor:
    """The loss that removing each single weight costs if its block's other weights make up for it.

    Kurtic et al. (2022), "The Optimal BERT Surgeon", section 3: `w_i**2 / (2 [F^-1]_ii)`, where each block's
    `F = lambda I + 1/m sum_k g_k g_k^T`. Here lambda is `DAMPING` of the mean of the block's `1/m sum_k g_k**2`, so
    that it needs no tuning to the size of gradients. Weights that are 0 are pruned: they cannot make up for others,
    so the rows and columns of F are those of the other weights.

    Args:
        weight (`torch.Tensor`): any shape and float dtype.
        blocks (`torch.Tensor`): see [`add_gradient`].
        count (`torch.Tensor`): m, the gradients that were added: one number.

    Returns:
        `torch.Tensor`: float32, of the weight's shape; 0 for weights that are 0, and in blocks without a
            gradient. Beside it, memory holds temporaries of 512 KiB each.
    """
    scores = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    flat, size = scores.view(-1), blocks.shape[1]
    for start, values, fisher in _chunks(weight.reshape(-1), blocks):
        model, mean = _quadratic_model(fisher, values != 0)
        diagonal = torch.linalg.inv(model).diagonal(dim1=1, dim2=2)
        cost = (values.square() * mean.unsqueeze(1)).div_(diagonal)
        end = min(start + len(values) * size, flat.numel())
        flat[start:end] = cost.view(-1)[: end - start]
    return scores.div_(2 * count.clamp(min=1))


@torch.no_grad()
def compensate_blocks(weight: Tensor, pruned: Tensor, blocks: Tensor) -> None:
    """Prune weights, and move the others of their blocks to where the loss rises least.

    With Q the pruned weights of a block and S the others, the minimum of the quadratic model `1/2 d^T F d` under
    `d_Q = -w_Q` is `d_S = F_SS^-1 F_SQ w_Q`. This is oBERT's `-F^-1 E_Q^T ((F^-1)_QQ)^-1 w_Q` (section 3) for all of Q
    jointly, without an inverse. F is that of [`block_scores`]; weights that are 0 stay so.

    Args:
        weight (`torch.Tensor`): float, still with the values of what is to be pruned; changed in place.
        pruned (`torch.Tensor`): boolean, of the weight's shape: what is 0 afterwards.
        blocks (`torch.Tensor`): see [`add_gradient`].
    """
    if not weight.is_contiguous():
        copy = weight.contiguous()
        compensate_blocks(copy, pruned, blocks)
        weight.copy_(copy)
        return
    flat, mask, size = weight.view(-1), pruned.reshape(-1), blocks.shape[1]
    for start, values, fisher in _chunks(flat, blocks):
        end = min(start + len(values) * size, flat.numel())
        gone = nn.functional.pad(mask[start:end], (0, values.numel() - (end - start))).view(values.shape)
        alive = values != 0
        model, _ = _quadratic_model(fisher, alive)
        stays = alive & ~gone
        target = torch.bmm(model, (values * gone).unsqueeze(2)).mul_(stays.unsqueeze(2))
        moved = torch.linalg.solve(_restrict(model, stays), target).squeeze(2)
        values = (values + moved).masked_fill_(gone, 0.0)
        flat[start:end] = values.view(-1)[: end - start]


def _chunks(flat: Tensor, blocks: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First weight, float32 weights (n, size), padded with 0, and sums (n, size, size) of a few blocks at a time."""
    size = blocks.shape[1]
    step = max(1, _CHUNK // size**2)
    for first in range(0, len(blocks), step):
        fisher = blocks[first : first + step]
        values = flat[first * size : (first + step) * size].float()
        padding = len(fisher) * size - values.numel()
        yield first * size, nn.functional.pad(values, (0, padding)).view(len(fisher), size), fisher


def _quadratic_model(fisher: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """The damped F (n, size, size) of the weights that are `alive` (n, size), in units of its mean diagonal (n,).

    In these units its eigenvalues lie between the damping and the block's size, so that float32 serves.
    """
    diagonal = fisher.diagonal(dim1=1, dim2=2) * alive
    mean = diagonal.sum(1) / alive.sum(1).clamp(min=1)
    scale = torch.where(mean > 0, mean, 1.0)
    damped = fisher / scale.view(-1, 1, 1)
    damped.diagonal(dim1=1, dim2=2).add_(DAMPING)
    return _restrict(damped, alive), mean


def _restrict(model: Tensor, mask: Tensor) -> Tensor:
    """The rows and columns in `mask` (n, size), in place, and those of the identity elsewhere."""
    model.mul_(mask.unsqueeze(2)).mul_(mask.unsqueeze(1))
    model.diagonal(dim1=1, dim2=2).add_(~mask)
    return model
