"""The compressed-tensors layout: `quantization_config` to and from int8 modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .runtime.modules import Int8Embedding, Int8Linear, int8_modules
from .schemes import SCHEMES, Scheme

QUANT_METHOD = "compressed-tensors"
FORMAT = "int-quantized"

# No reader but ours has an int8 Conv1D: compressed-tensors would skip it and cast the int8 weights to float,
# which is noise. Its check of this field stops it first, and the message shows the value.
CONV1D_FORMAT = "int8 Conv1D: use hf_quant.load_quantized"

_CHANNEL = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
}
_ACTIVATIONS: dict[str, dict[str, Any] | None] = {
    "int8_dynamic": {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    },
    "int8_static": {
        "num_bits": 8,
        "type": "int",
        "symmetric": False,
        "strategy": "tensor",
        "dynamic": False,
    },
    "int8_weight_only": None,
}


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """What `config.json` says of a model with int8 modules.

    Raises:
        `ValueError`: if the model has no int8 module, or Linear layers of more than one scheme.
    """
    modules = int8_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no int8 module. Quantize it before saving.")
    linear = [module for module in modules.values() if isinstance(module, Int8Linear)]
    groups: dict[str, Any] = {}
    for key, target, format, transposed in (
        ("linear", "Linear", FORMAT, False),
        ("conv1d", "Conv1D", CONV1D_FORMAT, True),
    ):
        schemes = sorted({module.scheme.name for module in linear if module.transposed is transposed})
        if len(schemes) > 1:
            raise ValueError(f"the layout holds one scheme for all {target} layers, not {', '.join(schemes)}")
        if schemes:
            groups[key] = _group(target, _ACTIVATIONS[schemes[0]], format)
    if any(isinstance(module, Int8Embedding) for module in modules.values()):
        groups["embedding"] = _group("Embedding", None, FORMAT)
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name, module in model.named_modules() if _is_float_target(module, groups)],
    }


def read_schemes(config: Mapping[str, Any], model: nn.Module) -> dict[str, Scheme | None]:
    """Which modules of a float model the layout says are int8.

    Args:
        config (`dict`): the `quantization_config` of `config.json`, ours or another writer's.
        model (`torch.nn.Module`): the float model, on any device (the meta device will do).

    Returns:
        `dict[str, Scheme | None]`: by module name: the scheme of a Linear or Conv1D, `None` for an Embedding.

    Raises:
        `ValueError`: if the layout holds something that hf_quant cannot run, in one sentence.
    """
    from compressed_tensors.utils.match import match_named_modules
    from transformers.pytorch_utils import Conv1D

    if config.get("kv_cache_scheme"):
        raise ValueError("this checkpoint quantizes the KV cache, which hf_quant does not run")
    result: dict[str, Scheme | None] = {}
    ignore = config.get("ignore") or []
    for group in (config.get("config_groups") or {}).values():
        for name, module in match_named_modules(model, group["targets"], ignore):
            if isinstance(module, nn.Embedding):
                _require_channel_int8(name, group)
                result[name] = None
            elif isinstance(module, (nn.Linear, Conv1D)):
                result[name] = _scheme(name, group)
    if not result:
        raise ValueError("the `quantization_config` of this checkpoint matches no module of the model")
    return result


def _group(target: str, activations: dict[str, Any] | None, format: str) -> dict[str, Any]:
    return {
        "targets": [target],
        "weights": dict(_CHANNEL),
        "input_activations": None if activations is None else dict(activations),
        "output_activations": None,
        "format": format,
    }


def _is_float_target(module: nn.Module, groups: Mapping[str, Any]) -> bool:
    from transformers.pytorch_utils import Conv1D

    kinds = [nn.Linear]
    kinds += [nn.Embedding] * ("embedding" in groups) + [Conv1D] * ("conv1d" in groups)
    return isinstance(module, tuple(kinds))


def _scheme(name: str, group: Mapping[str, Any]) -> Scheme:
    _require_channel_int8(name, group)
    if group.get("output_activations"):
        raise ValueError(f"{name} has quantized outputs, which hf_quant does not run")
    activations = _essence(group.get("input_activations"))
    for scheme in SCHEMES.values():
        if _essence(_ACTIVATIONS[scheme.name]) == activations:
            return scheme
    raise ValueError(
        f"{name} has input activations {activations}, which hf_quant does not run; it runs "
        + "; ".join(f"{key}: {_essence(value)}" for key, value in _ACTIVATIONS.items())
    )


def _require_channel_int8(name: str, group: Mapping[str, Any]) -> None:
    if _essence(group.get("weights")) != _essence(_CHANNEL):
        raise ValueError(
            f"{name} has weights {_essence(group.get('weights'))}, which hf_quant does not run; it runs "
            f"{_essence(_CHANNEL)}"
        )


def _essence(arguments: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The fields that say how to compute; writers add others, such as which observer was used."""
    return None if arguments is None else {key: arguments.get(key) for key in _CHANNEL}
