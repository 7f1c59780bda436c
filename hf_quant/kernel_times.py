"""Which kernel each shape of quantized Linear layer gets on this machine, and how long one product takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from .runtime import choice, cpu, products, weight_only
from .schemes import get_scheme

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class KernelTimes:
    """The kernels of the layers that have one shape and one kind of product.

    Args:
        product (`str`): `"uint8 x int8"`, or such as `"bfloat16 x int4 by 32"` where activations stay float.
        out_features (`int`): rows of the weight.
        in_features (`int`): columns of the weight.
        layers (`int`): how many there are.
        chosen (`dict`): by bucket of tokens, the kernel that is taken.
        microseconds (`dict`): by bucket of tokens, the times by kernel; none where there is nothing to choose.
    """

    product: str
    out_features: int
    in_features: int
    layers: int
    chosen: dict[int, str]
    microseconds: dict[int, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, where the buckets of tokens are strings."""
        by_bucket = {str(bucket): name for bucket, name in self.chosen.items()}
        times = {str(bucket): found for bucket, found in self.microseconds.items()}
        return {**asdict(self), "chosen": by_bucket, "microseconds": times}


def kernel_times(layers: Iterable[tuple[str, int, int]]) -> tuple[KernelTimes, ...]:
    """The kernels of quantized Linear layers; what was not measured on this machine yet is measured now.

    Where activations stay float, times are those of bfloat16 ones.

    Args:
        layers (iterable of `tuple`): scheme, out_features and in_features of each layer.

    Returns:
        tuple of [`KernelTimes`]: one for each shape and kind of product, the most frequent first.
    """
    counts = Counter((get_scheme(name), out_features, in_features) for name, out_features, in_features in layers)
    found: dict[tuple[str, int, int], KernelTimes] = {}
    for (scheme, out_features, in_features), count in counts.items():
        group = scheme.group_size or in_features
        product = f"bfloat16 x int{scheme.bits}" + ("" if scheme.group_size is None else f" by {group}")
        if scheme.activations is not None and scheme.group_size is None:
            product = "uint8 x int8"  # fewer bits are multiplied as eight
        key = product, out_features, in_features
        if key in found:
            count += found[key].layers
        chosen, microseconds = {}, {}
        for bucket in choice.BUCKETS:
            if product == "uint8 x int8":
                times = choice.times(in_features, out_features, bucket)
                preferred = products.exact_kernels()[0]
            else:
                shape = in_features, out_features, group, scheme.bits
                times = weight_only.times(*shape, bucket, torch.bfloat16)
                preferred = weight_only.kernels_for(*shape, torch.bfloat16)[0]
            chosen[bucket] = choice.fastest(times, preferred)
            if any(times.values()):
                microseconds[bucket] = times
        found[key] = KernelTimes(*key, count, chosen, microseconds)
    return tuple(sorted(found.values(), key=lambda one: -one.layers))


def kernel_table(found: Sequence[KernelTimes]) -> RenderableType:
    """For `rich`: one row for each shape, with the kernel and its microseconds for each bucket of tokens."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    features = ", ".join(name for name, there in cpu.features().items() if there) or "none of those that count here"
    machine = f"{cpu.name()} ({features}); threads: {torch.get_num_threads()}; torch {torch.__version__}"
    if not found:
        return Group(Text(machine), Text("No Linear layer is quantized, so there is no kernel to choose."))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("product", "weight", "layers"):
        table.add_column(heading, justify="left" if heading == "product" else "right")
    for bucket, before in zip(choice.BUCKETS, (0, *choice.BUCKETS), strict=False):
        last = bucket == choice.BUCKETS[-1]
        words = (
            f"{before + 1} or more" if last else str(bucket) if bucket == before + 1 else f"{before + 1} to {bucket}"
        )
        table.add_column(words, justify="right")
    for one in found:
        cells = [_cell(one, bucket) for bucket in choice.BUCKETS]
        table.add_row(one.product, f"{one.out_features} x {one.in_features}", str(one.layers), *cells)
    notes = [
        "Columns are tokens of a batch: the kernel, and microseconds of one product of "
        f"{', '.join(map(str, choice.BUCKETS))} tokens, the least of several."
    ]
    if any(one.product != "uint8 x int8" for one in found):
        notes.append("float32 activations of weight-only layers are multiplied by the weight dequantized to float32.")
    return Group(Text(machine), Text(), table, Text(), *(Text(note) for note in notes))


def _cell(one: KernelTimes, bucket: int) -> str:
    name = one.chosen[bucket]
    times = one.microseconds.get(bucket)
    return name if times is None else f"{name} {times[name]:,.0f}"
