"""What a weight is worth: the scores by which pruning chooses."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import did_you_mean
from .fisher import add_gradient, block_scores, compensate_blocks, new_blocks

CRITERIA: dict[str, str] = {
    "magnitude": "|w|, also called l1",
    "l2": "w**2, so that rows and blocks rank by their L2 norm; any l1 to l8",
    "random": "a random order: the baseline that every other criterion has to beat",
    "movement": "weights that training moves away from 0 stay",
    "soft_movement": "movement in steps of one size, with a pull on all scores that strong ones escape",
    "first_order": "|w * mean gradient| since the last update: the change of the loss, to first order (SNIP)",
    "fisher": "w**2 * mean squared gradient / 2 since the last update: the change of the loss, to second order",
    "block_fisher": "the same where neighbours make up for what is pruned (oBERT); block_fisher_32: blocks of 32",
}

_POWERS = range(1, 9)  # w**9 of a weight of 1e-5 is 0 in float32, and such weights would all rank the same
_BLOCKS = range(2, 129)
_LARGEST = 1e15  # whose square float32 can still sum up


class Criterion:
    """How pruning scores weights. The base class scores nothing; see [`get_criterion`].

    What is gathered from gradients lies in a `dict` of tensors that the caller keeps for each weight, so a criterion
    itself holds nothing and serves all weights of a model.

    Args:
        name (`str`): the name that recipes see.
    """

    floats_per_weight: int = 0
    """float32 numbers of state for each weight."""
    lasting: bool = False
    """Whether gradients count from the first step of training on, rather than since the last update of the masks."""
    revives: bool = False
    """Whether a pruned weight may return; [`~Criterion.compensate`] then gives it back its value."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def needs_gradients(self) -> bool:
        """Whether the criterion gathers anything from gradients."""
        return self.floats_per_weight > 0

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """Zeros by name, on the weight's device: what [`~Criterion.accumulate`] adds to. Empty for some criteria."""
        return {}

    def memory(self, numel: int) -> int:
        """Bytes of the state of a weight with `numel` elements."""
        return sum(tensor.nbytes for tensor in self.new_state(torch.empty(numel, device="meta")).values())

    def accumulate(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
        """Count the gradient of one optimizer step, in place. A gradient that is not finite is not counted.

        Args:
            weight (`torch.Tensor`): any shape and float dtype, as it was when the gradient was computed.
            grad (`torch.Tensor`): of the same shape, any float dtype, dense, after clipping.
            state (`dict[str, torch.Tensor]`): see [`~Criterion.new_state`].
        """

    def score(self, weight: Tensor, state: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """What each weight is worth. Scores add up: a row, block, neuron or head is worth the sum of its weights.

        Args:
            weight (`torch.Tensor`): any shape, finite, any float dtype.
            state (`dict[str, torch.Tensor]`): see [`~Criterion.new_state`].
            generator (`torch.Generator`): used by `"random"` only.

        Returns:
            `torch.Tensor`: float32, new, of the weight's shape; the larger, the rather it is kept.
        """
        raise NotImplementedError

    def compensate(self, weight: Tensor, pruned: Tensor, state: Mapping[str, Tensor]) -> None:
        """Let the weights that stay make up for those that are pruned, in place. By default nothing happens.

        Args:
            weight (`torch.Tensor`): still with the values of what is to be pruned.
            pruned (`torch.Tensor`): boolean, of the weight's shape: all that is 0 afterwards.
            state (`dict[str, torch.Tensor]`): see [`~Criterion.new_state`].
        """

    def renew(self, state: Mapping[str, Tensor]) -> None:
        """Begin anew after an update of the masks, where scores count gradients since the last one."""


class Magnitude(Criterion):
    """`|w|**power`, without a state. Power 1: Han et al. (2015), section 3; Zhu and Gupta (2017)."""

    def __init__(self, name: str, power: int) -> None:
        super().__init__(name)
        self.power = power

    @torch.no_grad()
    def score(self, weight: Tensor, state: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """See [`Criterion.score`]."""
        size = weight.abs().float()
        return size if self.power == 1 else size.pow_(self.power)


class Random(Criterion):
    """Uniform numbers in [0, 1), drawn on the generator's device: one seed, one order."""

    def score(self, weight: Tensor, state: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """See [`Criterion.score`]."""
        return torch.rand(weight.shape, generator=generator, device=generator.device).to(weight.device)


class Movement(Criterion):
    """Sanh et al. (2020), "Movement Pruning", section 4: `S = -sum_t w_t * dL/dw_t`, since training began.

    A positive score: descent moved the weight away from 0. The paper's learning rate of scores scales all of them
    alike and is left out. As in the paper a pruned weight keeps its value beside the 0 that the model computes with,
    its score goes on with the straight-through gradient, and it returns when others move to 0 faster.
    """

    floats_per_weight = 2
    lasting = True
    revives = True

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """`movement`: the scores; `kept`: the values of pruned weights, and 0 elsewhere."""
        return {"movement": _zeros(weight), "kept": _zeros(weight)}

    @torch.no_grad()
    def accumulate(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
        """See [`Criterion.accumulate`]."""
        if _is_finite(grad):
            # Where one of both is a value, the other one is 0.
            state["movement"].addcmul_(weight, grad, value=-1).addcmul_(state["kept"], grad, value=-1)

    def score(self, weight: Tensor, state: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """See [`Criterion.score`]."""
        return state["movement"].clone()

    @torch.no_grad()
    def compensate(self, weight: Tensor, pruned: Tensor, state: Mapping[str, Tensor]) -> None:
        """Give weights that return their values, and keep those of weights that are pruned."""
        kept = state["kept"]
        weight.add_(kept)
        kept.copy_(weight).mul_(pruned)


class SoftMovement(Movement):
    """Soft movement pruning (Sanh et al., 2020, section 4): movement, and the regularizer `lambda * sum sigmoid(S)`.

    One step is `S <- S - rate * (w * dL/dw / r + sigmoid(S) * (1 - sigmoid(S)))`, where r is the root mean square of
    `w * dL/dw` over the weights of the tensor. The paper trains scores with Adam, whose steps are
    of one size; dividing by r does that with one number for each weight instead of three, and brings scores to where
    the sigmoid bends. Large scores are pulled down less than middling ones, so what moved early and much is kept.
    The paper compares scores with one threshold for the whole model; use a global scope.
    """

    rate = 0.01

    @torch.no_grad()
    def accumulate(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
        """See [`Criterion.accumulate`]."""
        if not _is_finite(grad):
            return
        scores = state["movement"]
        pull = torch.sigmoid(scores)
        pull.addcmul_(pull, pull, value=-1)  # the sigmoid's slope
        step = (weight.float() + state["kept"]) * grad
        size = torch.linalg.vector_norm(step) / torch.count_nonzero(step).clamp(min=1).sqrt()
        pull.addcdiv_(step, size.clamp(min=torch.finfo(torch.float32).tiny))
        scores.sub_(pull, alpha=self.rate)


class _SinceUpdate(Criterion):
    """Means over the gradients since the last update of the masks."""

    def renew(self, state: Mapping[str, Tensor]) -> None:
        """See [`Criterion.renew`]."""
        for tensor in state.values():
            tensor.zero_()


class FirstOrder(_SinceUpdate):
    """`|w * mean_t dL/dw_t|`: what the loss changes by, to first order, if the weight becomes 0.

    Lee et al. (2019), "SNIP", the connection sensitivity without its normalization; Molchanov et al. (2019),
    "Importance Estimation for Neural Network Pruning", use its square, which ranks single weights alike. The mean is
    over the steps since the last update.
    """

    floats_per_weight = 1

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """`gradient`: the sum; `count`: of how many."""
        return {"gradient": _zeros(weight), "count": _count(weight)}

    @torch.no_grad()
    def accumulate(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
        """See [`Criterion.accumulate`]."""
        if _is_finite(grad):
            state["gradient"].add_(grad)
            state["count"].add_(1)

    @torch.no_grad()
    def score(self, weight: Tensor, state: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """See [`Criterion.score`]."""
        return _times(state["gradient"], weight).abs_().div_(state["count"].clamp(min=1))


class Fisher(_SinceUpdate):
    """`w**2 / 2 * mean_t (dL/dw_t)**2`: what the loss rises by if the weight becomes 0 and no other changes.

    LeCun et al. (1989), "Optimal Brain Damage", the saliency `h_ii * w_i**2 / 2`, with the diagonal of the empirical
    Fisher matrix in place of the Hessian's (Theis et al., 2018).
    """

    floats_per_weight = 1

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """`fisher`: the sum of squares; `count`: of how many."""
        return {"fisher": _zeros(weight), "count": _count(weight)}

    @torch.no_grad()
    def accumulate(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
        """See [`Criterion.accumulate`]."""
        if _is_finite(grad):
            state["fisher"].addcmul_(grad, grad)
            state["count"].add_(1)

    @torch.no_grad()
    def score(self, weight: Tensor, state: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """See [`Criterion.score`]."""
        return _times(state["fisher"], weight).mul_(weight).div_(2 * state["count"].clamp(min=1))


class BlockFisher(_SinceUpdate):
    """The Optimal BERT Surgeon (Kurtic et al., 2022): scores of [`block_scores`], and its update of what stays.

    Memory: `size` float32 numbers for each weight, 64 bytes for the default of 16.

    Args:
        name (`str`): the name that recipes see.
        size (`int`): consecutive weights (along the last dimension) that make up for each other.
    """

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name)
        self.floats_per_weight = size

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """`blocks`: the sum of outer products (blocks, size, size); `count`: of how many."""
        return {"blocks": new_blocks(weight, self.floats_per_weight), "count": _count(weight)}

    def accumulate(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
        """See [`Criterion.accumulate`]."""
        if _is_finite(grad):
            add_gradient(state["blocks"], grad)
            state["count"].add_(1)

    def score(self, weight: Tensor, state: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """See [`Criterion.score`] and [`block_scores`]."""
        return block_scores(weight, state["blocks"], state["count"])

    def compensate(self, weight: Tensor, pruned: Tensor, state: Mapping[str, Tensor]) -> None:
        """See [`compensate_blocks`]."""
        compensate_blocks(weight, pruned, state["blocks"])


def get_criterion(name: str) -> Criterion:
    """The criterion of that name.

    Args:
        name (`str`): one of `CRITERIA`; also `"l1"` to `"l8"`, and `"block_fisher_2"` to `"block_fisher_128"`.

    Raises:
        `ValueError`: if there is none, with the nearest name that there is.
    """
    plain = {
        "random": Random,
        "movement": Movement,
        "soft_movement": SoftMovement,
        "first_order": FirstOrder,
        "fisher": Fisher,
    }
    if name in plain:
        return plain[name](name)
    if name == "magnitude":
        return Magnitude(name, 1)
    if name == "block_fisher":
        return BlockFisher(name, 16)
    found = re.fullmatch(r"(l|block_fisher_)(\d{1,9})", name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(
            f"unknown criterion {name!r}{did_you_mean(name, CRITERIA) or '.'} Choose one of: {', '.join(CRITERIA)}."
        )
    number, allowed = int(found[2]), _POWERS if found[1] == "l" else _BLOCKS
    if number not in allowed:
        reason = "powers whose values float32 holds" if allowed is _POWERS else "weights in a block"
        nearest = min(allowed, key=lambda one: abs(one - number))
        raise ValueError(
            f"criterion {name!r}: {number} is not among the {reason}, {allowed[0]} to {allowed[-1]}. "
            f"Write {found[1]}{nearest}."
        )
    return Magnitude(name, number) if allowed is _POWERS else BlockFisher(name, number)


def _zeros(weight: Tensor) -> Tensor:
    return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)


def _count(weight: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=weight.device)


def _times(state: Tensor, weight: Tensor) -> Tensor:
    """A new float32 product, whatever the weight's dtype."""
    return torch.mul(state, weight, out=torch.empty_like(state))


def _is_finite(grad: Tensor) -> bool:
    """Whether a gradient can be summed up in float32; one pass, without a temporary."""
    norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    return float(norm) < _LARGEST
