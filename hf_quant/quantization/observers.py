"""The observers that keep a range."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..qparams import calculate_qparams


@torch.no_grad()
def batch_range(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, widened to hold 0; float32, shape ().

    Args:
        values (`torch.Tensor`): any shape, any float dtype.
        mask (`torch.Tensor`, *optional*): boolean, of `values`' shape without the last dimension; `False` marks
            padding, which is not counted.
    """
    if mask is None:
        low, high = torch.aminmax(values)
    else:
        # By row first: the mask is then applied to few numbers. A range holds 0, so 0 is neutral for both ends.
        low, high = torch.where(mask, values.amin(-1), 0.0).min(), torch.where(mask, values.amax(-1), 0.0).max()
    return low.float().clamp(max=0.0), high.float().clamp(min=0.0)


class MinMax:
    """The smallest and the largest value ever seen: nothing is clipped, and one outlier sets the range."""

    def __init__(self) -> None:
        self.low = torch.tensor(0.0)
        self.high = torch.tensor(0.0)

    def observe(self, values: Tensor) -> None:
        """Take a batch into account, any shape."""
        low, high = batch_range(values)
        self.low, self.high = torch.minimum(self.low, low.cpu()), torch.maximum(self.high, high.cpu())

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value; float32, shape ()."""
        return self.low, self.high


class MovingAverageMinMax(nn.Module):
    """Running minimum and maximum of an activation, per tensor, in float32.

    The n-th batch moves the range by `max(1/n, averaging_constant)` of its distance: a plain mean of the
    batches' ranges at first, then the exponential moving average of Jacob et al. (2018), section 3.1. So the
    range does not hang on the first batch, and a run has no step at which it would have to be initialized.

    All that it knows lies in buffers, so a checkpoint holds it and a resumed run goes on where it was.

    Args:
        averaging_constant (`float`, *optional*, defaults to 0.01): weight of a new batch once 1/n is smaller.
        device (`torch.device`, *optional*): where the buffers live.
    """

    min_val: Tensor
    max_val: Tensor
    num_batches: Tensor

    def __init__(self, averaging_constant: float = 0.01, device: torch.device | None = None) -> None:
        super().__init__()
        self.averaging_constant = averaging_constant
        self.register_buffer("min_val", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("max_val", torch.zeros((), dtype=torch.float32, device=device))
        # float32, not int64: counts are exact to 2^24, and one dtype lets processes average all buffers at once.
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.float32, device=device))

    def reset(self) -> None:
        """Forget everything seen."""
        self.min_val.zero_()
        self.max_val.zero_()
        self.num_batches.zero_()

    @torch.no_grad()
    def observe(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Take one batch into account.

        Args:
            values (`torch.Tensor`): the activation, any shape, any float dtype.
            mask (`torch.Tensor`, *optional*): boolean, of `values`' shape without the last dimension; `False`
                marks padding, which is not counted.
        """
        if values.numel() > 0:  # an expert that no token was routed to has no range
            self.update(*batch_range(values, mask))

    @torch.no_grad()
    def update(self, low: Tensor, high: Tensor) -> None:
        """Take the range of one batch into account; both ends float32, shape ()."""
        self.num_batches += 1
        weight = torch.clamp(1.0 / self.num_batches, min=self.averaging_constant)
        self.min_val.lerp_(low, weight)
        self.max_val.lerp_(high, weight)

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value; float32, shape ()."""
        return self.min_val, self.max_val

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point (int8) of the present range, each of shape `()`."""
        return calculate_qparams(self.min_val, self.max_val, symmetric=False)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"range=[{self.min_val.item():.4g}, {self.max_val.item():.4g}], batches={int(self.num_batches)}"
