"""The `HfQuantizer` through which transformers saves and loads int8 modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import dot_natural_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .layout import Stored, quantization_config, read_schemes
from .runtime.base import QuantizedModule
from .runtime.modules import Int8Embedding, Int8Linear
from .runtime.packed import PackedLinear
from .targets import replace_modules

METHOD = "hf_quant"


@register_quantization_config(METHOD)
class HfQuantConfig(QuantizationConfigMixin):
    """Holds the compressed-tensors layout while a model is in memory; on disk only the layout is written.

    Args:
        layout (`dict`): the `quantization_config` of `config.json`.
    """

    def __init__(self, layout: dict[str, Any], **kwargs: Any) -> None:
        self.quant_method = METHOD
        self.layout = layout

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` gets."""
        return dict(self.layout)


@register_quantizer(METHOD)
class HfQuantQuantizer(HfQuantizer):
    """Puts int8 modules into a model before its weights are loaded, so float weights are never made."""

    quantization_config: HfQuantConfig
    requires_calibration = True

    def __init__(self, quantization_config: HfQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.tied: dict[str, str] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        schemes = read_schemes(self.quantization_config.layout, model)
        shells = {name: _shell(model.get_submodule(name), stored) for name, stored in schemes.items()}
        replace_modules(model, shells)
        # Tied weights are Parameters to transformers, which would look for them; int8 ones are tied afterwards.
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.tied = {name: source for name, source in tied.items() if name not in parameters}
        for name in self.tied:
            del tied[name]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, source in self.tied.items():
            (owner, _, buffer), (holder, _, held) = name.rpartition("."), source.rpartition(".")
            model.get_submodule(owner)._buffers[buffer] = model.get_submodule(holder)._buffers[held]
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model's own state dict is the layout; what it holds may have changed since it was quantized."""
        self.quantization_config.layout = quantization_config(model)
        # In the order in which transformers itself writes a model that it loaded, so that shards are cut alike.
        state = model.state_dict()
        return {name: state[name] for name in sorted(state, key=dot_natural_key)}, {}

    def is_serializable(self) -> bool:
        """Saving is what this class is for."""
        return True

    # A Trainer refuses even to evaluate a model unless both of these hold. Int8 modules refuse training
    # themselves, in words, and so does the callback.
    @property
    def is_trainable(self) -> bool:
        """Lets a Trainer hold the model, to evaluate it."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Lets a Trainer hold the model, to evaluate it."""
        return True


def _shell(module: nn.Module, stored: Stored) -> QuantizedModule:
    """The quantized module, without its numbers, that takes a float module's place."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if stored.scheme is None:
        rows, columns = weight.shape
        padding_idx = module.padding_idx if isinstance(module, nn.Embedding) else None
        return Int8Embedding(rows, columns, padding_idx, weight.dtype, "meta")
    transposed = not isinstance(module, nn.Linear)
    out_features, in_features = weight.t().shape if transposed else weight.shape
    kind = PackedLinear if stored.packed else Int8Linear
    bias = module.bias is not None
    return kind(in_features, out_features, stored.scheme, bias, transposed, weight.dtype, "meta")
