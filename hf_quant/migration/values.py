"""What all sources share: epochs as shares of training, and the names of schemes."""

from __future__ import annotations

import math
from fractions import Fraction

from ..schemes import GROUP_SIZES

# A share is below 1; this one rounds up to the last step of any training of up to 10,000 steps.
LAST = 0.9999
_DIGITS = 10**6
ZERO_POINT = "hf_quant's weights are symmetric, int8 activations asymmetric"


def share(epoch: float, epochs: float) -> float:
    """An epoch as a share of training, in [0, 0.9999].

    Args:
        epoch (`float`): from 0; fractions are allowed.
        epochs (`float`): of the whole training, above 0.

    Returns:
        `float`: rounded down to six digits, because a recipe rounds the step of a share up.
    """
    exact = Fraction(str(epoch)) / Fraction(str(epochs))
    return min(max(math.floor(exact * _DIGITS) / _DIGITS, 0.0), LAST)


def plain(number: float) -> int | float:
    """A whole number without a point."""
    return int(number) if float(number).is_integer() else number


def scheme_name(bits: int, activations: str | None, group: int | None = None) -> tuple[str, str]:
    """The scheme nearest to a number of bits and a kind of activations.

    Args:
        bits (`int`): of a weight.
        activations (`str` or `None`): `"static"`, `"dynamic"`, `"dynamic_symmetric"`, or `None` for float.
        group (`int`, *optional*): input features that share a scale; by default all of an output channel's.

    Returns:
        `tuple[str, str]`: the name that [`get_scheme`] knows, empty where there is none; and how it differs.
    """
    if not 2 <= bits <= 8:
        return "", f"weights of {bits} bits; hf_quant has 2 to 8"
    remark = ""
    if activations == "static" and (bits < 8 or group is not None):
        activations, remark = "dynamic", "static ranges go with int8 weights per channel only; dynamic is the nearest"
    if group is not None and group not in GROUP_SIZES:
        wanted = group
        near = min(GROUP_SIZES, key=lambda size: abs(size - wanted))
        remark = f"groups of {group}; hf_quant has {', '.join(map(str, GROUP_SIZES))}"
        group = near
    name = f"int{bits}_{activations or 'weight_only'}"
    if group is None:
        return name + ("_channel" if bits < 8 else ""), remark
    return name + ("" if bits < 8 and group == 32 else f"_g{group}"), remark
