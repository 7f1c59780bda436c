"""What a scheme's name means: which numbers become int8, with which granularity, and when ranges are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import did_you_mean


@dataclass(frozen=True)
class Scheme:
    """How the Linear layers of a model are quantized.

    Weights are always symmetric int8 with one scale per output channel. Embeddings, where they are quantized,
    are symmetric int8 with one scale per row, whatever the scheme.

    Args:
        name (`str`): the name that recipes, the command line and `config.json` readers see.
        activations (`str` or `None`): `"static"`: one asymmetric int8 range per tensor, observed beforehand;
            `"dynamic"`: one symmetric int8 scale per token, computed at each forward; `None`: activations
            stay in float.
        description (`str`): one line for tables and `--help`.
    """

    name: str
    activations: Literal["static", "dynamic"] | None
    description: str


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "int8_dynamic",
            "dynamic",
            "int8 weights per channel, int8 activations per token, ranges found at each forward",
        ),
        Scheme(
            "int8_static",
            "static",
            "int8 weights per channel, int8 activations per tensor (asymmetric), ranges observed in training",
        ),
        Scheme(
            "int8_weight_only",
            None,
            "int8 weights per channel, float activations",
        ),
    )
}


def get_scheme(name: str | Scheme) -> Scheme:
    """The scheme of that name.

    Args:
        name (`str` or [`Scheme`]): one of `"int8_dynamic"`, `"int8_static"`, `"int8_weight_only"`.

    Raises:
        `ValueError`: if there is no such scheme.
    """
    if isinstance(name, Scheme):
        return name
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(
            f"unknown scheme {name!r}{did_you_mean(name, SCHEMES) or '.'} Choose one of: {', '.join(SCHEMES)}."
        )
    return SCHEMES[name]
