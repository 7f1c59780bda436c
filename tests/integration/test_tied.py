"""Tied weights: one Parameter before, one int8 tensor after, stored once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BertForMaskedLM

from hf_quant import QATCallback, load_quantized, quantize_dynamic, save_quantized
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.modules import Int8Embedding, Int8Linear
from tests.tiny import folder_bytes, logits, make_trainer, tiny_bert, tiny_gpt2, tiny_llama

BOTH = {
    "llama": (tiny_llama, "model.embed_tokens", "lm_head"),
    "gpt2": (tiny_gpt2, "transformer.wte", "lm_head"),
}
families = pytest.mark.parametrize("family", sorted(BOTH))


def _whole(family: str, scheme: str = "int8_dynamic") -> tuple[Any, str, str]:
    maker, embedding, head = BOTH[family]
    pattern = "*_proj" if family == "llama" else "*c_fc"
    return quantize_dynamic(maker(), scheme, targets=[embedding, head, pattern], progress=False), embedding, head


@families
def test_prepare_keeps_the_tie_and_one_parameter(family: str, tmp_path: Path) -> None:
    maker, embedding, head = BOTH[family]
    model = maker()
    count = sum(1 for _ in model.parameters())
    make_trainer(tmp_path, model, [QATCallback(targets=[embedding, head])], causal=True)
    assert model.get_submodule(embedding).weight is model.get_submodule(head).weight
    assert sum(1 for _ in model.parameters()) == count
    model.tie_weights()
    assert model.get_submodule(embedding).weight is model.get_submodule(head).weight


@families
def test_checkpoint_in_training_stores_the_tied_weight_once(family: str, tmp_path: Path) -> None:
    maker, embedding, head = BOTH[family]
    callback = QATCallback(targets=[embedding, head], convert=False)
    trainer = make_trainer(
        tmp_path, maker(), [callback], causal=True, changes={"save_strategy": "steps", "save_steps": 4}
    )
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-8"
    stored = load_file(checkpoint / "model.safetensors")
    assert (f"{embedding}.weight" in stored) + (f"{head}.weight" in stored) == 1
    plain, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert plain.get_submodule(head).weight is plain.get_submodule(embedding).weight
    assert torch.equal(plain.get_submodule(head).weight, trainer.model.get_submodule(head).weight)


@families
def test_by_default_a_tied_pair_stays_float_and_tied(family: str, tmp_path: Path) -> None:
    maker, embedding, head = BOTH[family]
    model = quantize_dynamic(maker(), progress=False)
    save_quantized(model, tmp_path / "int8")
    loaded = load_quantized(tmp_path / "int8")
    for each in (model, loaded):
        assert isinstance(each.get_submodule(embedding), nn.Embedding)
        assert each.get_submodule(embedding).weight is each.get_submodule(head).weight
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    assert (f"{embedding}.weight" in stored) + (f"{head}.weight" in stored) == 1


@families
def test_a_pair_in_int8_is_one_tensor_stored_once(family: str, tmp_path: Path) -> None:
    model, embedding, head = _whole(family)
    first, second = model.get_submodule(embedding), model.get_submodule(head)
    assert isinstance(first, Int8Embedding)
    assert isinstance(second, Int8Linear)
    assert first.int8_weight is second.int8_weight
    assert torch.equal(first.weight_scale, second.weight_scale)
    save_quantized(model, tmp_path / "int8")
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    assert (f"{embedding}.weight" in stored) + (f"{head}.weight" in stored) == 1


@families
def test_a_pair_in_int8_loads_tied_and_saves_the_same_bytes(family: str, tmp_path: Path) -> None:
    model, embedding, head = _whole(family)
    save_quantized(model, tmp_path / "int8")
    loaded = load_quantized(tmp_path / "int8")
    assert loaded.get_submodule(embedding).int8_weight is loaded.get_submodule(head).int8_weight
    assert torch.equal(logits(loaded), logits(model))
    save_quantized(loaded, tmp_path / "again")
    assert folder_bytes(tmp_path / "int8") == folder_bytes(tmp_path / "again")


def test_a_pair_in_int8_loads_tied_in_plain_transformers(tmp_path: Path) -> None:
    model, _, _ = _whole("llama")
    save_quantized(model, tmp_path / "int8")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", output_loading_info=True)
    assert not info["missing_keys"]
    got, expected = logits(plain), logits(model)
    assert (got - expected).norm() <= 0.03 * expected.norm()


@families
def test_a_pair_trained_in_int8_ends_as_one_tensor(family: str, tmp_path: Path) -> None:
    maker, embedding, head = BOTH[family]
    callback = QATCallback(targets=[embedding, head, "*.mlp.*"])
    trainer = make_trainer(tmp_path, maker(), [callback], causal=True)
    trainer.train()
    assert callback.conversion is not None
    assert {embedding, head} <= set(callback.conversion.quantized)
    assert trainer.model.get_submodule(embedding).int8_weight is trainer.model.get_submodule(head).int8_weight
    trainer.save_model(str(tmp_path / "int8"))
    assert torch.equal(logits(load_quantized(tmp_path / "int8")), logits(trainer.model))


def test_deep_copy_of_a_pair_keeps_the_tie_and_shares_nothing(tmp_path: Path) -> None:
    """`quantize_dynamic` copies the model: its float tie must survive that, and the original its own."""
    model = tiny_llama()
    int8 = quantize_dynamic(model, progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert int8.lm_head.weight is int8.model.embed_tokens.weight
    assert int8.lm_head.weight is not model.lm_head.weight


def test_masked_language_model_with_a_tied_decoder(tmp_path: Path) -> None:
    """BERT ties the decoder's weight, and its bias to one beside it."""
    model = BertForMaskedLM(tiny_bert().config)
    int8 = quantize_dynamic(model, progress=False)
    save_quantized(int8, tmp_path / "int8")
    loaded = load_quantized(tmp_path / "int8")
    assert torch.equal(logits(loaded), logits(int8))
    assert loaded.cls.predictions.decoder.bias is loaded.cls.predictions.bias
    assert "cls.predictions.decoder" not in quantized_modules(loaded)
    save_quantized(loaded, tmp_path / "again")
    assert folder_bytes(tmp_path / "int8") == folder_bytes(tmp_path / "again")


def test_module_that_hangs_in_two_places_becomes_int8_in_both() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4)})
    model["second"] = model["first"]
    int8 = quantize_dynamic(model, progress=False)
    assert isinstance(int8["first"], Int8Linear)
    assert int8["second"] is int8["first"]
    assert type(model["second"]) is nn.Linear
