"""2:4 weights on CUDA: PyTorch's semi-structured kernels, which skip the zeros, and an error where there are none."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from .base import quantized_modules

logger = logging.getLogger(__name__)

_KEEP, _OF = 2, 4
_DTYPES = (torch.float16, torch.bfloat16)
# What both backends, cuSPARSELt and CUTLASS, take in 16 bits.
_ROWS, _COLUMNS = 32, 64
_COMPUTE_CAPABILITY = (8, 0)

_NO_SPEED = (
    "Unstructured zeros give no speed on CPUs or GPUs, nor do 2:4 zeros elsewhere: dense products do not skip them. "
    'What does give speed everywhere: structure="neuron", "head" or "layer" with shrink=True, and int8.'
)


def is_n_m(weight: Tensor, n: int, m: int) -> bool:
    """Whether a weight is N:M sparse: at most `n` of each `m` consecutive inputs differ from zero.

    Args:
        weight (`torch.Tensor`): (out_features, in_features), any dtype; for a transformers `Conv1D` its transpose.
        n (`int`): weights that may stay, at most `m`.
        m (`int`): length of a group; a weight whose inputs it does not divide is not N:M.

    Raises:
        `ValueError`: if `n` or `m` is out of range, or the weight is no matrix.
    """
    if not 1 <= n <= m:
        raise ValueError(f"{n}:{m} is no pattern; N:M needs 1 <= N <= M, such as 2:4.")
    if weight.ndim != 2:
        raise ValueError(
            f"N:M is a pattern of a matrix (out_features, in_features), not of shape {tuple(weight.shape)}."
        )
    if weight.shape[1] % m:
        return False
    return bool(((weight != 0).view(weight.shape[0], -1, m).sum(-1) <= n).all())


def use_semi_structured(model: nn.Module) -> list[str]:
    """Run the Linear layers with 2:4 weights on PyTorch's semi-structured sparse kernels, in place.

    For inference on NVIDIA GPUs. A converted weight has no gradient and is not in the form that files hold: save the
    model before. What stays dense is logged with the reason: int8 layers (torch's 2:4 product of integers returns
    int8, too narrow for a sum), transformers' `Conv1D`, weights that another module shares, and sizes that the kernels
    do not take. A layer of few rows or a small batch may be slower than the dense product; measure.

    Args:
        model (`torch.nn.Module`): in float16 or bfloat16 on a CUDA device of compute capability 8.0 or later.

    Returns:
        `list[str]`: qualified names of the layers that were converted.

    Raises:
        `ValueError`: if no weight is 2:4, naming how sparse they are, or none of those that are can be converted,
            naming why.
        `RuntimeError`: if the model is not on such a device, naming the one it is on. Nothing is changed then.
    """
    weights = _matrices(model)
    if not weights:
        raise ValueError(f"{type(model).__name__} has no Linear layer, so no weight that could be 2:4.")
    candidates = {name: weight for name, weight in weights.items() if is_n_m(weight, _KEEP, _OF)}
    if not candidates:
        zeros = sum(int((weight == 0).sum()) for weight in weights.values())
        share = zeros / sum(weight.numel() for weight in weights.values())
        raise ValueError(
            f"no weight of {type(model).__name__} is 2:4: {100 * share:.1f} % of the weights in its {len(weights)} "
            'Linear layers are zero, without that pattern. Prune with structure="2:4". ' + _NO_SPEED
        )
    _require_device(next(iter(candidates.values())).device)

    left = {name: reason for name, reason in ((name, _obstacle(model, name)) for name in candidates) if reason}
    chosen = [name for name in candidates if name not in left]
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5])
        raise ValueError(f"none of the {len(candidates)} weights that are 2:4 can use sparse kernels: {reasons}.")
    sparse: dict[str, Tensor] = {}
    for name in chosen:
        dense = candidates[name].detach().contiguous()
        sparse[name] = torch.sparse.to_sparse_semi_structured(dense)
    for name, weight in sparse.items():
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    for name, reason in left.items():
        logger.warning("%s is 2:4 but stays dense: %s", name, reason)
    return chosen


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    """Weights (out_features, in_features) of all layers that multiply by a matrix, int8 ones as their integers."""
    from transformers.pytorch_utils import Conv1D

    quantized = quantized_modules(model)
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name in quantized and hasattr(module, "in_features"):
            weights[name] = quantized[name].integers
        elif isinstance(module, nn.Linear) and not isinstance(module.weight, torch.sparse.SparseSemiStructuredTensor):
            weights[name] = module.weight.detach()
        elif isinstance(module, Conv1D):
            weights[name] = module.weight.detach().t()
    return weights


def _obstacle(model: nn.Module, name: str) -> str:
    """Why a 2:4 layer stays dense, or an empty string."""
    module = model.get_submodule(name)
    if name in quantized_modules(model):
        return "it is int8, and torch's 2:4 product of integers returns int8"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is no plain nn.Linear"
    shared = [other for other, held in model.named_parameters(remove_duplicate=False) if held is module.weight]
    if len(shared) > 1:
        return f"its weight is shared: {', '.join(shared)}"
    if module.weight.dtype not in _DTYPES:
        return f"it is {module.weight.dtype}; cast the model: model.to(torch.bfloat16)"
    if module.out_features % _ROWS or module.in_features % _COLUMNS:
        return (
            f"its weight is {tuple(module.weight.shape)}, and the kernels take multiples of {_ROWS} outputs and "
            f"{_COLUMNS} inputs"
        )
    return ""


def _require_device(device: torch.device) -> None:
    """Refuse any device but a CUDA one with sparse tensor cores.

    Raises:
        `RuntimeError`: naming the device that was found.
    """
    wanted = "an NVIDIA GPU of compute capability 8.0 (Ampere) or later, with the model on it in float16 or bfloat16"
    if device.type != "cuda":
        there = "there is a CUDA device: model.to('cuda')" if torch.cuda.is_available() else "this machine has no CUDA"
        raise RuntimeError(f"2:4 kernels need {wanted}; the model is on {str(device)!r}, and {there}. {_NO_SPEED}")
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability < _COMPUTE_CAPABILITY:
        found = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
        raise RuntimeError(f"2:4 kernels need {wanted}; the model is on {found}. {_NO_SPEED}")
