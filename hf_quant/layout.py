"""The compressed-tensors layout: `quantization_config` to and from quantized modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .runtime.base import quantized_modules
from .runtime.modules import Int8Embedding, Int8Linear
from .runtime.packed import PackedLinear
from .schemes import Scheme, make_scheme

QUANT_METHOD = "compressed-tensors"
FORMAT = "int-quantized"
PACKED_FORMAT = "pack-quantized"
MIXED_FORMAT = "mixed-precision"

# No reader but ours has an int8 Conv1D: compressed-tensors would skip it and cast the int8 weights to float,
# which is noise. Its check of this field stops it first, and the message shows the value.
CONV1D_FORMAT = "int8 Conv1D: use hf_quant.load_quantized"
PACKED_CONV1D_FORMAT = "packed Conv1D: use hf_quant.load_quantized"

_ESSENCE = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
_DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
_STATIC = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
# By activations, and whether they are symmetric.
_ACTIVATIONS: dict[tuple[str | None, bool], dict[str, Any] | None] = {
    ("dynamic", False): _DYNAMIC,
    ("dynamic", True): {**_DYNAMIC, "symmetric": True},
    ("static", False): _STATIC,
    (None, False): None,
}


@dataclass(frozen=True)
class Stored:
    """How a checkpoint holds one module.

    Args:
        scheme ([`Scheme`] or `None`): of a Linear or Conv1D; `None` for an embedding, which is int8 by row.
        packed (`bool`, *optional*, defaults to `False`): whether its weight is packed into int32.
    """

    scheme: Scheme | None
    packed: bool = False


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """What `config.json` says of a model with quantized modules.

    The scheme of most Linear layers is that of the class; layers of another scheme are named one by one.

    Raises:
        `ValueError`: if the model has no quantized module.
    """
    modules = quantized_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no int8 module. Quantize it before saving.")
    groups: dict[str, Any] = {}
    for key, target, transposed in (("linear", "Linear", False), ("conv1d", "Conv1D", True)):
        by_form: dict[tuple[Scheme, str], list[str]] = {}
        for name, module in modules.items():
            if isinstance(module, (Int8Linear, PackedLinear)) and module.transposed is transposed:
                formats = (PACKED_FORMAT, PACKED_CONV1D_FORMAT)
                if isinstance(module, Int8Linear):
                    formats = (FORMAT, CONV1D_FORMAT)
                by_form.setdefault((module.scheme, formats[transposed]), []).append(name)
        # The most frequent first: it is the class's own, and the rest are exceptions.
        for (scheme, format), names in sorted(by_form.items(), key=lambda item: -len(item[1])):
            first = key not in groups
            targets = [target] if first else [_pattern(model, name) for name in names]
            # A reader that meets the class before the names would warn of each name; config.json is sorted by key.
            groups[key if first else f"layers_{key}_{scheme.name}_{format}"] = _group(targets, scheme, format)
    if any(isinstance(module, Int8Embedding) for module in modules.values()):
        groups["embedding"] = _group(["Embedding"], make_scheme(8, None), FORMAT)
    used = {group["format"] for group in groups.values()} - {CONV1D_FORMAT, PACKED_CONV1D_FORMAT} or {FORMAT}
    left = [_pattern(model, name) for name, module in model.named_modules() if _is_float_target(module, groups)]
    return {
        "quant_method": QUANT_METHOD,
        "format": used.pop() if len(used) == 1 else MIXED_FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": left,
    }


def read_schemes(config: Mapping[str, Any], model: nn.Module) -> dict[str, Stored]:
    """Which modules of a float model the layout says are quantized.

    Args:
        config (`dict`): the `quantization_config` of `config.json`, ours or another writer's.
        model (`torch.nn.Module`): the float model, on any device (the meta device will do).

    Returns:
        `dict[str, Stored]`: by module name.

    Raises:
        `ValueError`: if the layout holds something that hf_quant cannot run, in one sentence.
    """
    from compressed_tensors.utils.match import match_named_modules, match_targets
    from transformers.pytorch_utils import Conv1D

    if config.get("kv_cache_scheme"):
        raise ValueError("this checkpoint quantizes the KV cache, which hf_quant does not run")
    # A module that several targets match is of the most specific one: a name, a pattern, a class.
    group_of: dict[str, Mapping[str, Any]] = {}
    for group in (config.get("config_groups") or {}).values():
        group_of.update(dict.fromkeys(group["targets"], group))
    result: dict[str, Stored] = {}
    for name, module in match_named_modules(model, list(group_of), config.get("ignore") or []):
        if isinstance(module, (nn.Embedding, nn.Linear, Conv1D)):
            group = group_of[match_targets(name, module, list(group_of))[0]]
            result[name] = _stored(name, group, config.get("format"), isinstance(module, nn.Embedding))
    if not result:
        raise ValueError("the `quantization_config` of this checkpoint matches no module of the model")
    return result


def _group(targets: list[str], scheme: Scheme, format: str) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": True}
    if scheme.group_size is None:
        weights |= {"strategy": "channel", "dynamic": False}
    else:
        weights |= {"strategy": "group", "group_size": scheme.group_size, "dynamic": False}
    activations = _ACTIVATIONS[scheme.activations, scheme.symmetric]
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None if activations is None else dict(activations),
        "output_activations": None,
        "format": format,
    }


def _pattern(model: nn.Module, name: str) -> str:
    """A module's name as a pattern that also holds where the base model is loaded without its head."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    if len(prefix) > 1 and name.startswith(prefix):
        return f"re:^({re.escape(prefix)})?{re.escape(name[len(prefix) :])}$"
    return name


def _is_float_target(module: nn.Module, groups: Mapping[str, Any]) -> bool:
    from transformers.pytorch_utils import Conv1D

    kinds = [nn.Linear]
    kinds += [nn.Embedding] * ("embedding" in groups) + [Conv1D] * ("conv1d" in groups)
    return isinstance(module, tuple(kinds))


def _stored(name: str, group: Mapping[str, Any], default_format: str | None, embedding: bool) -> Stored:
    weights, inputs = _essence(group.get("weights")), _essence(group.get("input_activations"))
    packed = (group.get("format") or default_format) in (PACKED_FORMAT, PACKED_CONV1D_FORMAT)
    if group.get("output_activations"):
        raise ValueError(f"{name} has quantized outputs, which hf_quant does not run")
    bits, size = (weights or {}).get("num_bits"), (weights or {}).get("group_size")
    known = type(bits) is int and 2 <= bits <= 8
    kind = next((key for key, value in _ACTIVATIONS.items() if _essence(value) == inputs), None)
    if known and kind is not None:
        scheme = make_scheme(bits, kind[0], size, kind[1])  # type: ignore[arg-type]
        expected = _group([], scheme, "")["weights"]
        form = not (embedding or kind[0] == "static") if packed else not scheme.packed
        if _essence(expected) == weights and form:
            return Stored(None if embedding else scheme, packed)
    raise ValueError(
        f"{name} has weights {weights}, format {group.get('format') or default_format!r}, and input activations "
        f"{inputs}, which hf_quant does not run. It runs symmetric integers of 2 to 8 bits by channel or group (8 by "
        f"channel as {FORMAT!r}, all others as {PACKED_FORMAT!r}; embeddings of 8 bits as {FORMAT!r} only) with input "
        "activations " + " or ".join(str(_essence(value)) for value in _ACTIVATIONS.values()) + "."
    )


def _essence(arguments: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The fields that say how to compute; writers add others, such as which observer was used."""
    return None if arguments is None else {key: arguments[key] for key in _ESSENCE if arguments.get(key) is not None}
