"""Float models: loaded, checked, and copied without holding their weights twice."""

from __future__ import annotations

import copy
import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import architecture, load_config, require_sound_folder
from ..runtime.base import QuantizedModule, quantized_modules
from .qat import qat_modules


def load_float(path: str | os.PathLike[str], auto_class: type[Any] | None = None, **kwargs: Any) -> PreTrainedModel:
    """A float model from a folder or hub id, as the class that its config names.

    Raises:
        `ValueError`: if the checkpoint is quantized already, or a file is damaged.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        require_sound_folder(path)
    hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}
    config = load_config(path, auto_class, trust_remote_code=kwargs.get("trust_remote_code"), **hub)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method is not None:
        raise ValueError(
            f"{path} is quantized already ({method}). Pass the float checkpoint that it was made from"
            + ("; hf_quant.load_quantized loads this one." if method == "compressed-tensors" else ".")
        )
    cls = auto_class or architecture(config, path)
    return cls.from_pretrained(path, **kwargs)


def require_unquantized(model: nn.Module) -> None:
    """Refuse a model that is quantized already, by hf_quant or by anyone else.

    Raises:
        `ValueError`: if it is.
    """
    modules = quantized_modules(model)
    if modules:
        raise ValueError(
            f"{type(model).__name__} is quantized already: {len(modules)} of its modules are int8, such as "
            f"{next(iter(modules))}. Start from the float model or checkpoint."
        )
    if qat_modules(model):
        raise ValueError(
            f"{type(model).__name__} is prepared for quantization-aware training. Let its QATCallback convert it at "
            "the end of training, or load the float checkpoint."
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = getattr(quantizer.quantization_config, "quant_method", type(quantizer).__name__)
        raise ValueError(
            f"{type(model).__name__} is quantized already, with {getattr(method, 'value', method)}. Start from the "
            "float model or checkpoint."
        )


def require_device(model: nn.Module) -> None:
    """Refuse a model on a device that hf_quant does not quantize on.

    Raises:
        `ValueError`: if a tensor lies on neither the CPU nor a CUDA device.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type not in ("cpu", "cuda"):
            hint = (
                "it has no numbers yet; load the weights first"
                if tensor.is_meta
                else 'move the model first: model.to("cpu")'
            )
            raise ValueError(
                f"{name} lies on the device {str(tensor.device)!r}; models are quantized on cpu or cuda: {hint}."
            )


def require_merged_adapters(model: nn.Module) -> None:
    """Refuse a model whose adapters (PEFT) are not merged into its weights.

    Raises:
        `ValueError`: naming such a layer.
    """
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            raise ValueError(
                f"{name} is a PEFT layer ({type(module).__name__}): its adapter is apart from the weight that would "
                "be quantized. Merge it first: model = model.merge_and_unload()."
            )


def shallow_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules on the same tensors: a second float model is never held."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def own_tensors(model: nn.Module) -> None:
    """Copy what is still shared with the float model: biases, norms and the layers left in float."""
    own: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                clone = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[name] = own.setdefault(id(parameter), clone)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = own.setdefault(id(buffer), buffer.clone())
