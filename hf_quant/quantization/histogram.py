"""The observer that keeps a histogram, and the ranges that can be read off it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BINS = 8192  # of the histogram, over [-limit, limit)
_CANDIDATES = 64  # ranges that are tried
_LEAST = 0.02  # of the full range, the smallest that is tried
_LEVELS = 256  # int8


class HistogramObserver:
    """A histogram of an activation's values over all batches, and a range that may clip the rarest of them.

    The histogram spans `[-limit, limit)`, where the limit doubles whenever a value lies outside: pairs of bins are
    then merged, so no count is ever estimated. Counts are exact to 2^53.

    Args:
        method (`str`): how the range is chosen.
            `"percentile"`: the central 99.99 % of the values (as in Wu et al., 2020, "Integer Quantization for Deep
            Learning Inference", section 3.2; asymmetric here).
            `"mse"`: the least squared error after int8 (Choukroun et al., 2019, section 3).
            `"entropy"`: the least Kullback-Leibler divergence of the quantized distribution from the original
            (Migacz, 2017, "8-bit Inference with TensorRT"; asymmetric here).
    """

    def __init__(self, method: str = "mse") -> None:
        self.choose = METHODS[method]
        self.limit = 0.0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.low = torch.tensor(0.0)
        self.high = torch.tensor(0.0)

    @torch.no_grad()
    def observe(self, rows: Tensor) -> None:
        """Take a batch into account: (tokens, features), finite, without padding."""
        if rows.numel() == 0:
            return
        values = rows.float().flatten()
        low, high = torch.aminmax(values)
        self.low = torch.minimum(self.low, low.cpu())
        self.high = torch.maximum(self.high, high.cpu())
        largest = max(-float(low), float(high))
        if largest == 0.0:
            largest = 2.0**-20  # only zeros so far: any bin serves them
        if self.limit == 0.0:
            self.limit = 2.0 ** torch.tensor(largest).log2().ceil().item()
        while largest >= self.limit:
            self._double()
        # Binning by hand: torch.histc has no float64 counts, and is slower.
        width = 2 * self.limit / _BINS
        bins = ((values + self.limit) / width).long().clamp_(0, _BINS - 1)
        self.counts += torch.bincount(bins, minlength=_BINS).cpu()

    def _double(self) -> None:
        quarter = _BINS // 4
        merged = self.counts.view(-1, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[quarter : 3 * quarter] = merged
        self.limit *= 2

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value to be represented; float32, shape (); both hold 0."""
        if self.limit == 0.0:
            return self.low, self.high
        width = 2 * self.limit / _BINS
        centers = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width - self.limit
        low, high = self.choose(self.counts, centers, float(self.low), float(self.high))
        return torch.tensor(min(low, 0.0)), torch.tensor(max(high, 0.0))


def percentile_range(
    counts: Tensor, centers: Tensor, low: float, high: float, share: float = 0.9999
) -> tuple[float, float]:
    """The range that leaves out `(1 - share) / 2` of the values at each end.

    Args:
        counts (`torch.Tensor`): float64 (bins,).
        centers (`torch.Tensor`): float64 (bins,), the bins' middles, ascending.
        low, high (`float`): smallest and largest value seen.
        share (`float`, *optional*, defaults to 0.9999): of the values, to be kept.
    """
    total = counts.cumsum(0) / counts.sum()
    tail = (1 - share) / 2
    first, last = int(torch.searchsorted(total, tail)), int(torch.searchsorted(total, 1 - tail))
    return max(low, float(centers[first])), min(high, float(centers[min(last, len(centers) - 1)]))


def mse_range(counts: Tensor, centers: Tensor, low: float, high: float) -> tuple[float, float]:
    """The range with the least squared error after int8; arguments as in [`percentile_range`]."""

    def error(lower: float, upper: float) -> float:
        scale = max((upper - lower) / (_LEVELS - 1), 1e-30)
        zero = round(-lower / scale)
        kept = ((centers / scale).round() + zero).clamp(0, _LEVELS - 1) - zero
        # Within a bin values lie evenly, which adds the same to every candidate.
        return float((counts * (kept * scale - centers).square()).sum())

    return _least(error, low, high)


def entropy_range(counts: Tensor, centers: Tensor, low: float, high: float) -> tuple[float, float]:
    """The range with the least Kullback-Leibler divergence after int8; arguments as in [`percentile_range`]."""
    # Zeros (padding, ReLU, dropout) are represented exactly whatever the range; spread over a level, as all else is,
    # so tall a spike would drown what the range is chosen for.
    counts = torch.where(centers.abs() < 0.6 * (centers[1] - centers[0]), 0.0, counts)
    present = counts > 0
    if not bool(present.any()):
        return low, high

    def divergence(lower: float, upper: float) -> float:
        scale = max((upper - lower) / (_LEVELS - 1), 1e-30)
        level = ((centers - lower) / scale).round().clamp(0, _LEVELS - 1).long()
        # What is clipped is counted at the ends of the reference distribution, and at no bin of the quantized one.
        inside = (centers >= lower - scale / 2) & (centers <= upper + scale / 2)
        ends = torch.zeros_like(counts)
        if not bool((inside & present).any()):
            return float("inf")
        first, last = int(inside.nonzero()[0]), int(inside.nonzero()[-1])
        ends[first], ends[last] = counts[:first].sum(), counts[last + 1 :].sum()
        reference = torch.where(inside, counts, 0.0) + ends
        spread = torch.zeros(_LEVELS, dtype=torch.float64).scatter_add_(0, level[inside], counts[inside])
        members = torch.zeros(_LEVELS, dtype=torch.float64).scatter_add_(0, level[inside], present[inside].double())
        quantized = torch.where(inside & present, spread[level] / members[level].clamp(min=1), 0.0)
        p, q = reference / reference.sum(), quantized / quantized.sum().clamp(min=1e-30)
        used = p > 0
        return float((p[used] * (p[used] / q[used].clamp(min=1e-12)).log()).sum())

    return _least(divergence, low, high)


METHODS = {"percentile": percentile_range, "mse": mse_range, "entropy": entropy_range}


def _least(cost: Callable[[float, float], float], low: float, high: float) -> tuple[float, float]:
    """The cheapest range: both ends shrunk together first, then each end by itself around what was found."""
    best, least = (low, high), cost(low, high)
    shares = torch.linspace(1.0, _LEAST, _CANDIDATES).tolist()[1:]
    for moved in ((True, True), (True, False), (False, True)):
        start = best
        for share in shares:
            candidate = (low * share if moved[0] else start[0], high * share if moved[1] else start[1])
            if (found := cost(*candidate)) < least:
                best, least = candidate, found
    return best
