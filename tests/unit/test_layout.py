"""`quantization_config`: what we write, and what we read of others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules
from torch import nn

from hf_quant import quantize_dynamic
from hf_quant.layout import CONV1D_FORMAT, Stored, quantization_config, read_schemes
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.modules import Int8Linear
from hf_quant.runtime.packed import PackedLinear
from hf_quant.schemes import SCHEMES
from hf_quant.targets import select_modules
from tests.tiny import INT8_SCHEMES, tiny_bert, tiny_gpt2, tiny_llama

CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
ACTIVATIONS: dict[str, dict[str, Any] | None] = {
    "int8_dynamic": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True},
    "int8_dynamic_symmetric": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "int8_static": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
    "int8_weight_only": None,
}


def _static_bert() -> nn.Module:
    """Layouts do not look at values, so no range has to be observed."""
    model = tiny_bert()
    for name, kind in select_modules(model).quantized.items():
        if kind == "linear":
            layer = model.get_submodule(name)
            new = Int8Linear.from_float(
                layer.weight, layer.bias, SCHEMES["int8_static"], (torch.tensor(-1.0), torch.tensor(1.0))
            )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    return model


def _int8(scheme: str) -> nn.Module:
    if scheme == "int8_static":
        return _static_bert()
    return quantize_dynamic(tiny_bert(), scheme, progress=False)


@pytest.mark.parametrize("scheme", [*INT8_SCHEMES, "int8_dynamic_symmetric"])
def test_fields(scheme: str) -> None:
    config = quantization_config(_int8(scheme))
    assert {key: config[key] for key in ("quant_method", "format", "quantization_status")} == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
    }
    assert config["config_groups"]["linear"] == {
        "targets": ["Linear"],
        "weights": CHANNEL,
        "input_activations": ACTIVATIONS[scheme],
        "output_activations": None,
        "format": "int-quantized",
    }
    assert "classifier" in config["ignore"]
    if scheme != "int8_static":
        assert config["config_groups"]["embedding"]["targets"] == ["Embedding"]
        assert config["config_groups"]["embedding"]["format"] == "int-quantized"
        assert config["config_groups"]["embedding"]["input_activations"] is None


@pytest.mark.parametrize("scheme", [*INT8_SCHEMES, "int8_dynamic_symmetric"])
def test_compressed_tensors_understands_it(scheme: str) -> None:
    config = QuantizationConfig.model_validate(quantization_config(_int8(scheme)))
    arguments = config.config_groups["linear"].input_activations
    expected = ACTIVATIONS[scheme]
    assert (arguments is None) is (expected is None)
    if arguments is not None and expected is not None:
        assert (arguments.symmetric, arguments.strategy, bool(arguments.dynamic)) == (
            expected["symmetric"],
            expected["strategy"],
            expected["dynamic"],
        )


@pytest.mark.parametrize("scheme", [*INT8_SCHEMES, "int8_dynamic_symmetric"])
def test_reading_gives_back_what_was_written(scheme: str) -> None:
    model = _int8(scheme)
    with torch.device("meta"):
        shell = tiny_bert()
    found = read_schemes(quantization_config(model), shell)
    assert found == {
        name: Stored(getattr(module, "scheme", None)) for name, module in quantized_modules(model).items()
    }


def test_ignored_are_all_float_modules_of_the_targets_classes() -> None:
    model = quantize_dynamic(tiny_bert(), targets=["*.query", "*word_embeddings"], progress=False)
    config = quantization_config(model)
    float_modules = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    assert {name for name, _ in match_named_modules(model, config["ignore"])} == float_modules
    assert len(config["ignore"]) == len(float_modules)
    base = {name for name, _ in match_named_modules(tiny_bert().bert, config["ignore"])}
    assert base == {name.removeprefix("bert.") for name in float_modules} - {"classifier"}, "without its head too"


def test_float_embeddings_need_no_mention_where_no_embedding_is_int8() -> None:
    config = quantization_config(quantize_dynamic(tiny_bert(), embeddings=False, progress=False))
    assert set(config["config_groups"]) == {"linear"}
    assert config["ignore"] == ["classifier"]


def test_embeddings_alone() -> None:
    model = quantize_dynamic(tiny_bert(), targets=["*_embeddings"], progress=False)
    config = quantization_config(model)
    assert set(config["config_groups"]) == {"embedding"}
    assert read_schemes(config, tiny_bert()) == dict.fromkeys(quantized_modules(model), Stored(None))


def test_conv1d_has_a_group_whose_format_plain_readers_refuse() -> None:
    model = quantize_dynamic(tiny_gpt2(), progress=False)
    config = quantization_config(model)
    assert config["config_groups"]["conv1d"]["format"] == CONV1D_FORMAT
    assert "hf_quant.load_quantized" in CONV1D_FORMAT
    assert "linear" not in config["config_groups"]
    with pytest.raises(ValueError, match=r"hf_quant\.load_quantized"):
        QuantizationConfig.model_validate(config)
    assert set(read_schemes(config, tiny_gpt2())) == set(quantized_modules(model))


def test_float_conv1d_is_ignored_where_others_are_int8() -> None:
    model = quantize_dynamic(tiny_gpt2(), ignore=["*.c_proj"], progress=False)
    config = quantization_config(model)
    assert r"re:^(transformer\.)?h\.0\.attn\.c_proj$" in config["ignore"]
    assert set(read_schemes(config, tiny_gpt2())) == set(quantized_modules(model))


def test_model_without_an_int8_module() -> None:
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no int8 module\. Quantize it before"):
        quantization_config(tiny_bert())


def test_layers_of_a_rarer_scheme_are_named_one_by_one() -> None:
    overrides = {"*.0.*.query": "int4_weight_only", "*.0.*.key": "int8_weight_only", "*.value": None}
    model = quantize_dynamic(tiny_bert(), overrides=overrides, progress=False)
    config = quantization_config(model)
    assert config["format"] == "mixed-precision"
    assert config["config_groups"]["linear"]["targets"] == ["Linear"]
    named = {key: group for key, group in config["config_groups"].items() if key.startswith("layers_")}
    assert sorted(group["format"] for group in named.values()) == ["int-quantized", "pack-quantized"]
    assert all(key < "linear" for key in named), "config.json is sorted, and names must come before classes"
    with torch.device("meta"):
        whole, base = tiny_bert(), tiny_bert().bert
    expected = {
        name: Stored(getattr(module, "scheme", None), isinstance(module, PackedLinear))
        for name, module in quantized_modules(model).items()
    }
    assert read_schemes(config, whole) == expected
    assert read_schemes(config, base) == {name.removeprefix("bert."): stored for name, stored in expected.items()}


def _layout(**linear: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {**CHANNEL, "observer": "minmax", "actorder": None},
        "input_activations": {**(ACTIVATIONS["int8_dynamic"] or {}), "observer": None},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {**group, **linear}},
    }


def test_layout_of_another_writer() -> None:
    """Names of groups, fields of observers and regular expressions are up to the writer."""
    found = read_schemes(_layout(targets=[r"re:.*self_attn\.(q|k)_proj$"]), tiny_llama())
    assert found == {
        f"model.layers.{layer}.self_attn.{kind}_proj": Stored(SCHEMES["int8_dynamic"])
        for layer in (0, 1)
        for kind in "qk"
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weights": {**CHANNEL, "num_bits": 4}},
            r"q_proj has weights .*'num_bits': 4.*, which hf_quant does not run",
        ),
        ({"weights": {**CHANNEL, "strategy": "group"}}, r"'strategy': 'group'.*which hf_quant does"),
        ({"weights": {**CHANNEL, "symmetric": False}}, r"'symmetric': False.*which hf_quant does"),
        ({"weights": {**CHANNEL, "type": "float"}}, r"'type': 'float'.*which hf_quant does"),
        (
            {"input_activations": {**CHANNEL, "strategy": "tensor"}},
            r"q_proj has weights .*, and input activations .*'symmetric': True, 'strategy': 'tensor'.*, which "
            r"hf_quant does not run\. It runs symmetric integers of 2 to 8 bits by channel or group",
        ),
        ({"output_activations": dict(CHANNEL)}, r"q_proj has quantized outputs, which hf_quant does"),
        ({"targets": ["Conv2d"]}, r"matches no module of the model"),
    ],
)
def test_what_we_do_not_run_is_said_in_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_schemes(_layout(**change), tiny_llama())


def test_quantized_kv_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="quantizes the KV cache, which hf_quant does not run"):
        read_schemes({**_layout(), "kv_cache_scheme": {"num_bits": 8}}, tiny_llama())


def test_what_is_returned_shares_nothing_with_what_was_returned_before() -> None:
    model = _int8("int8_dynamic")
    first = quantization_config(model)
    before = copy.deepcopy(first)
    first["config_groups"]["linear"]["weights"]["num_bits"] = 4
    first["config_groups"]["linear"]["input_activations"]["dynamic"] = False
    assert quantization_config(model) == before
