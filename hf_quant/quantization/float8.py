"""float8 on a GPU that has it, through torchao: the one scheme whose numbers are not integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..targets import Selection

FLOAT8 = "float8_dynamic"

_CAPABILITY = (8, 9)  # Ada, Hopper and later multiply float8


def require_float8(model: nn.Module) -> None:
    """Refuse a device without float8 products.

    Raises:
        `ValueError`: if the model does not lie on such a GPU.
        `ImportError`: if torchao is not installed.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(
            f"scheme {FLOAT8!r} runs on GPUs of compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]} or newer, but "
            f'the model is on {str(device)!r}. Move it there (model.to("cuda")), or use int8_dynamic.'
        )
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        raise ValueError(
            f"scheme {FLOAT8!r} needs compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]} or newer; "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}. Use int8_dynamic."
        )
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise ImportError(f"scheme {FLOAT8!r} needs torchao: pip install 'hf_quant[float8]'") from error


def float8_dynamic_config() -> Any:
    """torchao's configuration: float8 (e4m3) weights, one scale a row, and activations, one scale a token."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


def quantize_float8(model: nn.Module, selection: Selection, config: Any) -> None:
    """Quantize the selected Linear layers with torchao, in place, so that the model saves itself in its format.

    Embeddings and `Conv1D` stay in float. The saved model loads with plain `from_pretrained` where torchao is
    installed.

    Args:
        model (`torch.nn.Module`): a float model on a device that torchao's configuration runs on.
        selection ([`Selection`]): which modules.
        config (`torchao` configuration): such as [`float8_dynamic_config`] gives.
    """
    from torchao.quantization import quantize_
    from transformers import PreTrainedModel, TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    linear = {name for name, kind in selection.quantized.items() if kind == "linear"}
    quantize_(model, config, filter_fn=lambda module, name: name in linear)
    if isinstance(model, PreTrainedModel):
        left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in linear]
        layout = TorchAoConfig(config, modules_to_not_convert=left)
        model.hf_quantizer = TorchAoHfQuantizer(layout, pre_quantized=True)
        model.config.quantization_config = layout
        model.is_quantized = True
        model.quantization_method = layout.quant_method
