"""Checkpoints that compressed-tensors itself wrote, as llm-compressor does, load straight into int8 modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from hf_quant import load_quantized, quantize_dynamic, save_quantized
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.kernels import use_kernel
from tests.tiny import logits, tiny_bert, tiny_llama, weights_bytes

WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
INPUTS: dict[str, dict[str, Any] | None] = {
    "int8_dynamic": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True},
    "int8_dynamic_symmetric": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "int8_static": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
    "int8_weight_only": None,
}


def _written(model: PreTrainedModel, folder: Path, scheme: str, targets: list[str], ignore: list[str]) -> None:
    """One-shot quantization with another library's tools, from start to end."""
    ranges: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            ranges[name] = args[0].min(), args[0].max()

        return hook

    hooks = [
        module.register_forward_pre_hook(observe(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    logits(model)
    for hook in hooks:
        hook.remove()

    group = QuantizationScheme(targets=targets, weights=WEIGHTS, input_activations=INPUTS[scheme])
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=ignore, format="int-quantized")
    apply_quantization_config(model, config, show_progress=False)
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        weight = module.weight.detach()
        scale, zero_point = calculate_qparams(weight.amin(-1, True), weight.amax(-1, True), group.weights)
        module.weight_scale.data, module.weight_zero_point.data = scale, zero_point
        if scheme == "int8_static":
            scale, zero_point = calculate_qparams(*ranges[name], group.input_activations)
            module.input_scale.data, module.input_zero_point.data = scale, zero_point
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="int-quantized")
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


@pytest.mark.parametrize("scheme", sorted(INPUTS))
@pytest.mark.parametrize(
    ("maker", "targets", "ignore"),
    [
        (tiny_bert, ["Linear"], ["classifier"]),
        (tiny_bert, ["Linear"], []),
        (lambda: tiny_llama(tie_word_embeddings=False), ["re:.*_proj$"], ["lm_head", "re:.*down_proj"]),
    ],
    ids=["bert", "bert and classifier", "llama by regular expression"],
)
def test_loads_into_int8_modules_with_the_logits_of_plain_transformers(
    maker: Any, targets: list[str], ignore: list[str], scheme: str, tmp_path: Path
) -> None:
    model = maker()
    _written(model, tmp_path / "theirs", scheme, targets, ignore)
    auto = AutoModelForCausalLM if "llama" in model.config.model_type else AutoModelForSequenceClassification
    expected = logits(auto.from_pretrained(tmp_path / "theirs"))

    loaded = load_quantized(tmp_path / "theirs")
    modules = quantized_modules(loaded)
    assert all(module.scheme.name == scheme for module in modules.values())
    assert len(modules) > 4
    assert ("classifier" in modules) is (ignore == [])
    with use_kernel("reference"):
        assert torch.equal(logits(loaded), expected)

    save_quantized(loaded, tmp_path / "ours")
    again = load_quantized(tmp_path / "ours")
    with use_kernel("reference"):
        assert torch.equal(logits(again), expected)
    assert weights_bytes(tmp_path / "ours") == weights_bytes(tmp_path / "theirs")


def test_saved_after_a_forward_in_plain_transformers_it_is_refused(tmp_path: Path) -> None:
    """Plain transformers decompresses at the first forward, and then saves float weights under an int8 config."""
    save_quantized(quantize_dynamic(tiny_bert(), progress=False), tmp_path / "ours")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    logits(plain)
    plain.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"bert\..*\.weight"):
        load_quantized(tmp_path / "theirs")


def test_the_same_numbers_as_ours(tmp_path: Path) -> None:
    model = tiny_bert()
    ours = quantize_dynamic(model, embeddings=False, progress=False)
    _written(model, tmp_path / "theirs", "int8_dynamic", ["Linear"], ["classifier"])
    save_quantized(ours, tmp_path / "ours")
    assert weights_bytes(tmp_path / "ours") == weights_bytes(tmp_path / "theirs")
