"""GPTQ: weights rounded one column after another, each making up for the errors of those before.

Written here because no library serves: llm-compressor and GPTQModel each want their own versions of transformers,
compressed-tensors or torch, and torchao's GPTQ needs CUDA.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..qparams import dequantize, dequantize_weight, quantize, quantize_weight, search_scale, symmetric_scale
from ..schemes import Scheme
from ..targets import require_finite
from .int8_training import version_of
from .masks import batch_masks, holds_only_padding, tokens
from .one_pass import Finished, merge_batches, one_pass

_CHUNK = 8192  # tokens


@torch.no_grad()
def gptq(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    schemes: Mapping[str, Scheme],
    *,
    damping: float = 0.01,
    block_size: int = 128,
    search: bool = True,
    progress: Callable[[], None] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights as integers that keep each layer's outputs, on calibration data, near those of the float weights.

    Frantar et al. (2022), "GPTQ", eq. 2 to 5 and algorithm 1, in one forward of all batches at once: a layer is
    quantized when its inputs arrive, and hands on the outputs of its quantized weight, so that each layer is
    calibrated on inputs from layers that are quantized already. Activations are not quantized meanwhile.

    The model is the same afterwards: a dequantized weight takes the float one's place during the calls of its
    module only. Beside the model and the activations of one forward, memory holds the integers, and one layer's
    Hessian (in, in) in float32.

    Args:
        model (`torch.nn.Module`): the float model.
        batches (list of `dict`): keyword arguments of `forward`, on the model's device; see [`merge_batches`].
            Padding is not counted.
        schemes (`dict[str, Scheme]`): of the modules to quantize, `nn.Linear` or transformers `Conv1D`, by name.
        damping (`float`, *optional*, defaults to 0.01): share of the Hessian's mean diagonal that is added to the
            diagonal; raised where that does not suffice.
        block_size (`int`, *optional*, defaults to 128): columns between two updates of the whole rest of a weight;
            changes speed only.
        search (`bool`, *optional*, defaults to `True`): whether to take scales with the least squared rounding error
            ([`search_scale`]) rather than those that hold the largest weight.
        progress (callable, *optional*): called once for each module.

    Returns:
        `dict[str, tuple[Tensor, Tensor]]`: by name what [`quantize_weight`] returns of a weight: int8 (out, in) and
        scales (out, groups) in the weight's dtype. Absent are modules that never ran, and those that share their
        weight with a module that is not in `schemes`. A module that runs several times counts with its first call.

    Raises:
        `ValueError`: if batches do not fit together or hold only padding, a module is of another kind, groups do not
            divide its inputs, or a weight or an input of it holds NaN or infinity.
    """
    groups = _groups(model, schemes)
    batch = merge_batches(batches)
    if all(holds_only_padding(one) for one in batches):
        raise ValueError("all calibration batches hold only padding: their attention masks are 0. Give some tokens.")
    masks = batch_masks(batch)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    replaced: dict[str, nn.Parameter] = {}
    last: _Seen | None = None

    def before(name: str, module: nn.Module, values: Tensor) -> None:
        nonlocal last
        transposed = not isinstance(module, nn.Linear)
        original: nn.Parameter = module.weight  # type: ignore[assignment]
        if name not in found:
            # Query, key and value read the same input.
            if last is None or not last.holds(values):
                hessian = input_hessian(tokens(values, masks))
                _require_finite_input(name, hessian)
                last = _Seen(weakref.ref(values), version_of(values), inverse_factor(hessian, damping))
            rows = original.t() if transposed else original
            result = gptq_weight(rows, last.factor, schemes[name], block_size=block_size, search=search)
            for partner in groups[id(original)]:
                found[partner] = result
                if progress is not None:
                    progress()
        if len(found) == sum(map(len, groups.values())):
            raise Finished
        weight = dequantize_weight(*found[name])
        replaced[name] = original
        module.weight = nn.Parameter(weight.t() if transposed else weight, requires_grad=False)

    def after(name: str, module: nn.Module, output: Tensor) -> None:
        module.weight = replaced.pop(name)

    try:
        one_pass(model, batch, [name for names in groups.values() for name in names], before, after)
    finally:
        for name, original in replaced.items():
            model.get_submodule(name).weight = original
    return {name: found[name] for name in schemes if name in found}


def input_hessian(rows: Tensor) -> Tensor:
    """Half the Hessian of a layer's squared output error, `X X^T`, as a mean over tokens.

    Args:
        rows (`torch.Tensor`): the layer's inputs (tokens, in), float.

    Returns:
        `torch.Tensor`: float32 (in, in); zeros without a token, as for an expert that no token was sent to.
    """
    hessian = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float32, device=rows.device)
    for chunk in rows.split(_CHUNK):
        part = chunk.float()
        hessian.addmm_(part.t(), part, alpha=1 / max(1, rows.shape[0]))
    return hessian


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U with `H^-1 = U^T U`, of the damped H.

    Row j of U, from its diagonal on, is what eq. 2 needs once the columns before j are rounded (algorithm 1, the
    "Cholesky reformulation"). With the order of channels reversed, H's own Cholesky factor becomes an upper triangular
    R with `H = R R^T`, so `U = R^-1`: nothing as ill-conditioned as H is ever inverted, and float32 serves.

    Args:
        hessian (`torch.Tensor`): (in, in), float32, positive semidefinite. A channel that was always 0 is only
            damped: its weights are rounded and touch no others.
        damping (`float`): share of the mean diagonal that is added to the diagonal; tenfold until H is definite.

    Returns:
        `torch.Tensor`: (in, in), upper triangular.
    """
    unit = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    mean = hessian.diagonal().mean()
    if mean == 0:
        return unit
    while True:
        backwards = hessian.flip(0, 1)
        backwards.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if not failed:
            return torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True)
        damping = max(10 * damping, 1e-4)


@torch.no_grad()
def gptq_weight(
    weight: Tensor, factor: Tensor, scheme: Scheme, *, block_size: int = 128, search: bool = True
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of GPTQ on one weight.

    A column's rounding error, divided by its diagonal element of U, is taken from the columns after it in proportion
    to its row of U (eq. 2): at once within a block, and once a block for all others (eq. 4). A group's scale is
    found when its first column is reached, from weights that hold the errors before them; a channel's beforehand.

    Args:
        weight (`torch.Tensor`): (out, in), float; stays as it is.
        factor (`torch.Tensor`): (in, in), float32; see [`inverse_factor`].
        scheme ([`Scheme`]): bits and group size.
        block_size (`int`, *optional*, defaults to 128): columns of a block, brought to a multiple of the group's.
        search (`bool`, *optional*, defaults to `True`): see [`gptq`].

    Returns:
        `tuple[Tensor, Tensor]`: int8 (out, in) and scales (out, groups) of `weight`'s dtype.
    """
    rows, columns = weight.shape
    bits, size = scheme.bits, scheme.group_size or columns
    if scheme.group_size is not None:
        block_size = max(1, block_size // size) * size
    # Columns as rows, which are contiguous: each step then reads and writes memory in order.
    values = weight.t().float().clone(memory_format=torch.contiguous_format)
    integers = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
    scale = torch.empty(columns // size, rows, dtype=weight.dtype, device=weight.device)
    if scheme.group_size is None:
        scale[0] = quantize_weight(weight, bits, None, search)[1][:, 0]
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, own = values[start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            group = (start + i) // size
            if scheme.group_size is not None and (start + i) % size == 0:
                members = block[i : i + size].t().contiguous().to(weight.dtype)
                best = search_scale(members, bits) if search else symmetric_scale(members, (-1,), bits)
                scale[group] = best[:, 0]
            integers[start + i] = quantize(block[i], scale[group], bits=bits)
            rounded = dequantize(integers[start + i], scale[group]).float()
            torch.sub(block[i], rounded, out=errors[i]).div_(own[i, i])
            block[i + 1 :].addr_(own[i, i + 1 :], errors[i], alpha=-1)
        values[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return integers.t().contiguous(), scale.t().contiguous()


@dataclass
class _Seen:
    """The input that was seen last, and what was made of it."""

    source: weakref.ref[Tensor]
    version: int | None
    factor: Tensor

    def holds(self, values: Tensor) -> bool:
        return self.source() is values and self.version == version_of(values) is not None


def _groups(model: nn.Module, schemes: Mapping[str, Scheme]) -> dict[int, list[str]]:
    """Names of the modules to quantize by the identity of the weight that they share."""
    from transformers.pytorch_utils import Conv1D

    groups: dict[int, list[str]] = defaultdict(list)
    modules = {name: model.get_submodule(name) for name in schemes}
    for name, module in modules.items():
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise ValueError(
                f"{name} is a {type(module).__name__}; GPTQ knows nn.Linear and transformers Conv1D. Take it out of "
                "`schemes`."
            )
        require_finite(name, module)
        weight = module.weight
        inputs, size = weight.shape[int(isinstance(module, nn.Linear))], schemes[name].group_size
        if size is not None and inputs % size:
            raise ValueError(f"{name} has {inputs} inputs, not a multiple of the group of {size}. Leave it in float.")
        groups[id(weight)].append(name)
    # One weight has one form: what a module outside holds too, such as an embedding, is not for this function.
    outside = {
        id(parameter)
        for module in model.modules()
        if module not in modules.values()
        for parameter in module._parameters.values()
    }
    return {weight: names for weight, names in groups.items() if weight not in outside}


def _require_finite_input(name: str, hessian: Tensor) -> None:
    bad = int((~torch.isfinite(hessian.diagonal())).sum())
    if bad:
        raise ValueError(
            f"the inputs of {name} hold NaN or infinity in {bad} of {len(hessian)} channels on the calibration data. "
            "Look for a float16 overflow or a broken checkpoint, or put the layer into `ignore`."
        )
