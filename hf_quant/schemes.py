"""What a scheme's name means: which numbers become integers, of how many bits, and when ranges are found."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .errors import did_you_mean

GROUP_SIZES = (32, 64, 128)
_DEFAULT_GROUP = 32
_NAME = re.compile(r"int([2-8])_(static|dynamic_symmetric|dynamic|weight_only)(?:_(channel)|_g(\d+))?")


@dataclass(frozen=True)
class Scheme:
    """How a Linear layer is quantized.

    Weights are always symmetric integers. Embeddings, where they are quantized, are symmetric int8 with one scale
    per row, whatever the scheme.

    Args:
        name (`str`): the name that recipes and the command line see.
        activations (`str` or `None`): `"static"`: one asymmetric int8 range per tensor, observed beforehand;
            `"dynamic"`: one int8 range per token, computed at each forward; `None`: activations stay in float.
        description (`str`): one line for tables and `--help`.
        bits (`int`, *optional*, defaults to 8): of a weight; below 8 they are packed, on disk and in memory.
        group_size (`int`, *optional*): input features that share one scale of the weight; by default all of an
            output channel's.
        symmetric (`bool`, *optional*, defaults to `False`): whether dynamic ranges are symmetric around 0. They lose
            accuracy where a token's values lie on one side, such as GELU's, or one channel is much the largest.
    """

    name: str
    activations: Literal["static", "dynamic"] | None
    description: str
    bits: int = 8
    group_size: int | None = None
    symmetric: bool = False

    @property
    def packed(self) -> bool:
        """Whether weights are stored packed, several in one int32."""
        return self.bits < 8 or self.group_size is not None


def make_scheme(
    bits: int,
    activations: Literal["static", "dynamic"] | None,
    group_size: int | None = None,
    symmetric: bool = False,
) -> Scheme:
    """The scheme of those properties, with the name that stands for them; see [`Scheme`]."""
    kind = "dynamic_symmetric" if symmetric else activations or "weight_only"
    default = _DEFAULT_GROUP if bits < 8 else None
    name = f"int{bits}_{kind}"
    if group_size != default:
        name += "_channel" if group_size is None else f"_g{group_size}"
    scales = "per channel" if group_size is None else f"per group of {group_size}"
    inputs = {
        "static": "int8 activations per tensor (asymmetric), ranges observed beforehand",
        "dynamic": "int8 activations per token (asymmetric), ranges found at each forward",
        "dynamic_symmetric": "int8 activations per token (symmetric), ranges found at each forward",
        "weight_only": "float activations",
    }[kind]
    return Scheme(name, activations, f"int{bits} weights {scales}, {inputs}", bits, group_size, symmetric)


# The usual ones. `get_scheme` knows every other number of bits and group size by its name.
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        make_scheme(8, "dynamic", None),
        make_scheme(8, "static", None),
        make_scheme(8, None, None),
        make_scheme(4, None, _DEFAULT_GROUP),
        make_scheme(4, "dynamic", _DEFAULT_GROUP),
    )
}


def get_scheme(name: str | Scheme) -> Scheme:
    """The scheme of that name.

    Args:
        name (`str` or [`Scheme`]): `"int8_dynamic"`, `"int8_static"`, `"int8_weight_only"`, `"int4_weight_only"`,
            `"int4_dynamic"`, or another one made up of bits, kind and group size: `"int6_weight_only"`,
            `"int8_dynamic_symmetric"`, `"int4_weight_only_g128"`, `"int3_dynamic_g64"`,
            `"int4_weight_only_channel"`. Weights of fewer than 8 bits have one scale per group of 32 input features
            unless the name says otherwise.

    Raises:
        `ValueError`: if there is no such scheme.
    """
    if isinstance(name, Scheme):
        return name
    if isinstance(name, str) and name in SCHEMES:
        return SCHEMES[name]
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(
            f"unknown scheme {name!r}{did_you_mean(name, SCHEMES) or '.'} Choose one of: {', '.join(SCHEMES)}; or "
            "another number of bits (2 to 8) and group size, such as int6_weight_only or int4_weight_only_g128."
        )
    bits, kind, group = int(found[1]), found[2], None if found[4] is None else int(found[4])
    if group is not None and group not in GROUP_SIZES:
        raise ValueError(
            f"scheme {name!r} has groups of {group}; allowed: {', '.join(map(str, GROUP_SIZES))}. Write, for example, "
            f"int{bits}_{kind}_g{min(GROUP_SIZES, key=lambda size: abs(size - int(found[4])))}."
        )
    if kind == "static" and (bits < 8 or group is not None):
        raise ValueError(
            f"scheme {name!r}: static activations go with int8 weights per channel. Use int8_static, or "
            f"int{bits}_dynamic for weights of {bits} bits."
        )
    if group is None and bits < 8 and not found[3]:
        group = _DEFAULT_GROUP
    symmetric = kind == "dynamic_symmetric"
    activations: Literal["static", "dynamic"] | None = None
    if kind != "weight_only":
        activations = "static" if kind == "static" else "dynamic"
    made = make_scheme(bits, activations, group, symmetric)
    return SCHEMES.get(made.name, made)
