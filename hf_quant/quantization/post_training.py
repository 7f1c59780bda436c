"""Quantize a trained model without training it."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..checkpoint import architecture, attach_quantizer, require_sound_folder
from ..progress import progress_bar
from ..runtime.modules import INT8_MODULES, int8_modules
from ..schemes import SCHEMES, Scheme, get_scheme
from ..targets import select_modules
from .convert import convert_float
from .qat import qat_modules


def quantize_dynamic(
    model: PreTrainedModel | nn.Module | str | os.PathLike[str],
    scheme: str | Scheme = "int8_dynamic",
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    embeddings: bool = True,
    auto_class: type[Any] | None = None,
    inplace: bool = False,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """Quantize the Linear layers and embeddings of any model to int8, without data.

    Args:
        model (`PreTrainedModel` or `str`): a model of any `AutoModel` class, or its folder or hub id.
        scheme (`str`, *optional*, defaults to `"int8_dynamic"`): a scheme that needs no observed ranges:
            `"int8_dynamic"` or `"int8_weight_only"`.
        targets (list of `str`, *optional*): patterns of modules to quantize; see [`select_modules`].
        ignore (list of `str`, *optional*): patterns of modules to leave in float.
        embeddings (`bool`, *optional*, defaults to `True`): whether embeddings become int8 too.
        auto_class (*optional*): the class to load a path with; by default the one its config names.
        inplace (`bool`, *optional*, defaults to `False`): whether the model that was passed is changed. If not,
            it stays as it is, and shares no tensor with the result.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.
        kwargs: passed on to `from_pretrained` where `model` is a path.

    Returns:
        the int8 model, in eval mode; its `save_pretrained` writes the compressed-tensors layout.

    Raises:
        `ValueError`: for an unknown scheme or one that needs observed ranges, a pattern that matches nothing, a
            model without a quantizable module or one that is quantized already, and NaN or infinite weights.
    """
    scheme = get_scheme(scheme)
    if scheme.activations == "static":
        others = ", ".join(name for name, other in SCHEMES.items() if other.activations != "static")
        raise ValueError(
            f"scheme {scheme.name!r} needs observed activation ranges, which quantize_dynamic has no data for. "
            f"Train with QATCallback({scheme.name!r}), or choose one of: {others}."
        )
    if isinstance(model, (str, os.PathLike)):
        model, inplace = load_float(model, auto_class, **kwargs), True
    elif kwargs:
        raise TypeError(f"{', '.join(kwargs)} are arguments of from_pretrained, but a model was passed, not a path")
    require_unquantized(model)
    selection = select_modules(model, targets, ignore, embeddings)
    if not inplace:
        model = _shallow_copy(model)
    with progress_bar(f"Quantizing to {scheme.name}", len(selection.quantized), progress) as advance:
        convert_float(model, scheme, selection, advance)
    if not inplace:
        _own_tensors(model)
    attach_quantizer(model)
    return model.eval()


def load_float(path: str | os.PathLike[str], auto_class: type[Any] | None = None, **kwargs: Any) -> PreTrainedModel:
    """A float model from a folder or hub id, as the class that its config names.

    Raises:
        `ValueError`: if the checkpoint is quantized already, or a file is damaged.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        require_sound_folder(path)
    hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}
    config = AutoConfig.from_pretrained(path, trust_remote_code=kwargs.get("trust_remote_code"), **hub)
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
    modules = int8_modules(model)
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


def _shallow_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules on the same tensors: a second float model is never held."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _own_tensors(model: nn.Module) -> None:
    """Copy what is still shared with the float model: biases, norms and the layers left in float."""
    own: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, INT8_MODULES):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                clone = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[name] = own.setdefault(id(parameter), clone)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = own.setdefault(id(buffer), buffer.clone())
