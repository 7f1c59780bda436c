"""What equalization and AWQ gain over plain rounding: planted outliers, and a real model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_quant.qparams import calculate_qparams, dequantize, dequantize_weight, quantize, quantize_weight
from hf_quant.quantization.equalization import awq_scale, equalize, rows_of
from hf_quant.quantization.float_models import shallow_copy
from hf_quant.quantization.graph import find_scaling_groups
from hf_quant.quantization.sensitivity import sqnr
from tests.tiny import Sentences
from tests.zoo import batch_for, build, outputs

from .test_equalization import batches, inputs_of, names_of, outliers

REPOSITORY = Path(__file__).resolve().parents[2]


def rounded(model: nn.Module, names: Sequence[str], bits: int = 8, group_size: int | None = None) -> nn.Module:
    """A copy whose weights are rounded."""
    model = copy.deepcopy(model)
    for name in names:
        module = model.get_submodule(name)
        weight = dequantize_weight(*quantize_weight(rows_of(module).contiguous(), bits, group_size))
        module.weight = nn.Parameter(weight.T if isinstance(module, Conv1D) else weight)
    return model


def static(model: nn.Module, names: Sequence[str], batch: dict[str, Tensor]) -> nn.Module:
    """A copy in static int8: one asymmetric range for each layer's input."""
    seen = inputs_of(model, names, batch)
    model = rounded(model, names)
    for name in names:
        scale, zero = calculate_qparams(seen[name].min(), seen[name].max(), symmetric=False)

        def round_input(_: nn.Module, args: Any, scale: Tensor = scale, zero: Tensor = zero) -> Any:
            return (dequantize(quantize(args[0], scale, zero), scale, zero),)

        model.get_submodule(name).register_forward_pre_hook(round_input)
    return model


def test_static_int8_loses_less_with_equalization() -> None:
    [test] = batches(4, seed=9)
    [calibration] = [{name: values[:16] for name, values in Sentences(16, seed=3).batch(16).items()}]
    gains = []
    for seed in range(3):
        model = outliers(seed)
        names = names_of(model)
        expected = outputs(model, test)["logits"]
        naive = sqnr(expected, outputs(static(model, names, calibration), test)["logits"])
        equalize(model, [calibration], names)
        gains.append(sqnr(expected, outputs(static(model, names, calibration), test)["logits"]) - naive)
    assert min(gains) > 3  # decibels: at most 70 % of the error


def test_awq_loses_less_than_rounding_in_the_layers_that_it_scales() -> None:
    model, given, [test] = outliers(), batches(), batches(8, seed=9)[:1]
    names = names_of(model)
    twin: Any = shallow_copy(model)
    scales = awq_scale(twin, given, names, 4, 32)
    assert {"model.layers.0.input_layernorm", "model.layers.1.post_attention_layernorm"} <= set(scales)
    for layer in (0, 1):
        for name in (f"model.layers.{layer}.self_attn.q_proj", f"model.layers.{layer}.mlp.gate_proj"):
            errors = []
            for candidate in (model, twin):
                values = inputs_of(candidate, [name], test)[name].flatten(0, 1)
                weight = rows_of(candidate.get_submodule(name))
                rounding = dequantize_weight(*quantize_weight(weight, 4, 32)) - weight
                errors.append((values @ rounding.T).square().sum())
            assert errors[1] < 0.8 * errors[0]


def test_awq_is_never_worse_than_rounding_on_its_own_tokens() -> None:
    scaled = 0
    for species in ("llama", "gpt2", "opt"):
        model = build(species)
        batch = batch_for(species, model)
        for group in find_scaling_groups(model, batch, names_of(model)):
            twin: Any = shallow_copy(model)
            scales = awq_scale(twin, [batch], group.consumers, 3, None, grid=8)
            errors = []
            for candidate in (model, twin):
                values = inputs_of(candidate, group.consumers, batch)
                error = 0.0
                for name in group.consumers:
                    weight = rows_of(candidate.get_submodule(name)).contiguous()
                    rounding = dequantize_weight(*quantize_weight(weight, 3, None)) - weight
                    rows = values[name] if values[name].ndim == 2 else values[name][batch["attention_mask"].bool()]
                    error += float((rows @ rounding.T).square().sum())
                errors.append(error)
            assert errors[1] < errors[0] if scales else errors[1] == errors[0]
            scaled += len(scales)
    assert scaled > 10


@pytest.mark.real
@pytest.mark.timeout(3600)
def test_smollm2_in_static_int8_and_in_few_bits() -> None:
    folder, data = REPOSITORY / "build" / "smollm2", REPOSITORY.parent / "shared" / "data" / "wikitext2"
    if not folder.is_dir() or not data.is_dir():
        pytest.skip(f"{folder.name} is not in build/, or wikitext2 is not beside this checkout")
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    names = names_of(model)

    def pieces(split: str, count: int, length: int = 128) -> Tensor:
        rows = load_dataset("parquet", data_files=str(data / f"{split}.parquet"))["train"]["text"]
        ids = tokenizer("\n".join(rows[: 40 * count]), return_tensors="pt").input_ids[0]
        return ids[: count * length].view(count, length)  # type: ignore[no-any-return]

    @torch.no_grad()
    def loss(candidate: Any) -> float:
        parts = pieces("test", 16).split(4)
        return sum(float(candidate(input_ids=part, labels=part).loss) for part in parts) / len(parts)

    calibration = [{"input_ids": part} for part in pieces("validation", 16).split(4)]
    everything = {"input_ids": pieces("validation", 16)}
    losses = {"float": loss(model), "static": loss(static(model, names, everything))}
    twin: Any = shallow_copy(model)
    assert len(equalize(twin, calibration, names)) == 120
    losses["equalized"] = loss(twin)
    losses["equalized static"] = loss(static(twin, names, everything))
    for bits in (3, 4):
        twin = shallow_copy(model)
        assert len(awq_scale(twin, calibration, names, bits, 64)) > 100
        losses[f"{bits} bits"] = loss(rounded(model, names, bits, 64))
        losses[f"awq {bits} bits"] = loss(rounded(twin, names, bits, 64))
    print(losses)
    assert abs(losses["equalized"] - losses["float"]) < 1e-4
    assert losses["equalized static"] - losses["float"] < 0.5 * (losses["static"] - losses["float"])
    # From what was measured, 0.90 and 0.71 of rounding's loss, with room for other machines; 3 bits win little.
    for bits, share in ((3, 0.95), (4, 0.8)):
        assert losses[f"awq {bits} bits"] - losses["float"] < share * (losses[f"{bits} bits"] - losses["float"])
