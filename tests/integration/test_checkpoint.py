"""Saving and loading int8 models: the layout on disk, its size, shards, and the same bytes again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

from hf_quant import load_quantized, quantize_dynamic, save_quantized
from hf_quant.checkpoint import is_quantized_folder
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.modules import Int8Embedding, Int8Linear
from hf_quant.schemes import SCHEMES
from tests.tiny import INT8_SCHEMES, folder_bytes, int8_model, logits, tiny_bert, tiny_gpt2, tiny_llama, tiny_tokenizer

schemes = pytest.mark.parametrize("scheme", sorted(SCHEMES))


@pytest.mark.parametrize("scheme", INT8_SCHEMES)
def test_what_lies_on_disk(scheme: str, tmp_path: Path) -> None:
    model = int8_model(tiny_bert(), scheme)
    save_quantized(model, tmp_path / "int8", processing_class=tiny_tokenizer())
    assert {file.name for file in (tmp_path / "int8").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "hf_quant" not in json.dumps(config), "plain readers need to know nothing of us"
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    for name, module in quantized_modules(model).items():
        assert stored[f"{name}.weight"].dtype == torch.int8, name
        assert stored[f"{name}.weight_scale"].shape == (module.int8_weight.shape[0], 1)
        if isinstance(module, Int8Linear) and scheme == "int8_static":
            assert stored[f"{name}.input_scale"].shape == (1,)
            assert stored[f"{name}.input_zero_point"].dtype == torch.int8
    assert stored["classifier.weight"].dtype == torch.float32
    with safe_open(tmp_path / "int8" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_generation_config_is_saved_beside(tmp_path: Path) -> None:
    model = quantize_dynamic(tiny_llama(), progress=False)
    model.generation_config = GenerationConfig(max_new_tokens=7, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    save_quantized(model, tmp_path / "int8")
    assert load_quantized(tmp_path / "int8").generation_config.max_new_tokens == 7


@schemes
def test_four_times_smaller_than_float32(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 4000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=512, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "float")
    save_quantized(int8_model(model, scheme), tmp_path / "int8")
    before, after = ((tmp_path / kind / "model.safetensors").stat().st_size for kind in ("float", "int8"))
    # One float32 scale for a row of 128 int8 is 3 %.
    assert before / after > 3.75


@pytest.mark.parametrize("maker", [tiny_bert, tiny_llama, tiny_gpt2])
@schemes
def test_loading_then_saving_gives_the_same_bytes(scheme: str, maker: Any, tmp_path: Path) -> None:
    model = int8_model(maker(), scheme)
    save_quantized(model, tmp_path / "first", processing_class=tiny_tokenizer())
    loaded = load_quantized(tmp_path / "first")
    assert torch.equal(logits(loaded), logits(model))
    logits(loaded)  # oneDNN has packed its weights by now
    save_quantized(loaded, tmp_path / "second", processing_class=tiny_tokenizer())
    loaded.save_pretrained(tmp_path / "third")
    first, second, third = (folder_bytes(tmp_path / name) for name in ("first", "second", "third"))
    assert first == second
    assert third == {name: data for name, data in first.items() if "token" not in name}


def test_save_pretrained_of_a_model_just_quantized_writes_the_same(tmp_path: Path) -> None:
    model = quantize_dynamic(tiny_bert(), progress=False)
    save_quantized(model, tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    assert folder_bytes(tmp_path / "first") == folder_bytes(tmp_path / "second")


@pytest.mark.parametrize("maker", [tiny_bert, tiny_llama])
@schemes
def test_shards(scheme: str, maker: Any, tmp_path: Path) -> None:
    model = int8_model(maker(), scheme)
    save_quantized(model, tmp_path / "int8", max_shard_size="10KB")
    names = sorted(file.name for file in (tmp_path / "int8").glob("*.safetensors"))
    assert len(names) > 2
    assert "model.safetensors" not in names
    loaded = load_quantized(tmp_path / "int8")
    assert torch.equal(logits(loaded), logits(model))
    save_quantized(loaded, tmp_path / "again", max_shard_size="10KB")
    assert folder_bytes(tmp_path / "int8") == folder_bytes(tmp_path / "again")


def test_weights_of_an_earlier_save_do_not_stay_behind(tmp_path: Path) -> None:
    model = quantize_dynamic(tiny_bert(), progress=False)
    folder = tmp_path / "int8"
    save_quantized(model, folder, max_shard_size="10KB")
    (folder / "README.md").write_text("mine")
    save_quantized(model, folder, overwrite=True)
    assert {file.name for file in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    save_quantized(model, folder, overwrite=True, max_shard_size="10KB")
    assert not (folder / "model.safetensors").exists()
    assert torch.equal(logits(load_quantized(folder)), logits(model))


class Allocations(TorchDispatchMode):
    """Notes the shape of every float tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.device.type != "meta" and value.is_floating_point():
                self.shapes.add(tuple(value.shape))
        return result


@schemes
def test_no_float_weight_is_ever_made(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a dispatch mode sees its own thread only
    model = int8_model(tiny_bert(num_labels=3, intermediate_size=64, type_vocab_size=5), scheme)
    save_quantized(model, tmp_path / "int8")
    with Allocations() as seen:
        loaded = load_quantized(tmp_path / "int8")
    for name, module in quantized_modules(loaded).items():
        assert tuple(module.shape) not in seen.shapes, name
        assert tuple(module.shape)[::-1] not in seen.shapes, name
    assert (3, 32) in seen.shapes, "the classifier was seen, so the watch works"
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in model.named_parameters()}, (
        "what is a parameter still is one"
    )


@schemes
def test_loaded_model_is_in_eval_mode_and_all_on_one_device(scheme: str, tmp_path: Path) -> None:
    save_quantized(int8_model(tiny_bert(), scheme), tmp_path / "int8")
    loaded = load_quantized(tmp_path / "int8")
    assert not any(module.training for module in loaded.modules())
    assert {value.device.type for value in loaded.state_dict().values()} == {"cpu"}
    assert isinstance(loaded.bert.embeddings.word_embeddings, Int8Embedding)
    assert loaded.bert.embeddings.word_embeddings.padding_idx == 0


@pytest.mark.parametrize("scheme", INT8_SCHEMES)
def test_dtype_of_loading_casts_the_float_part_only(scheme: str, tmp_path: Path) -> None:
    model = int8_model(tiny_bert(), scheme)
    save_quantized(model, tmp_path / "int8")
    loaded = load_quantized(tmp_path / "int8", dtype=torch.bfloat16)
    state = loaded.state_dict()
    assert state["bert.pooler.dense.weight"].dtype == torch.int8
    assert state["classifier.weight"].dtype == torch.bfloat16
    exact, rounded = logits(model), logits(loaded)
    assert (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_the_class_to_load_with_can_be_chosen(tmp_path: Path) -> None:
    model = quantize_dynamic(tiny_llama(), progress=False)
    save_quantized(model, tmp_path / "int8")
    loaded = load_quantized(tmp_path / "int8", AutoModelForCausalLM)
    assert torch.equal(logits(loaded), logits(model))


def test_architecture_that_transformers_does_not_have(tmp_path: Path) -> None:
    save_quantized(quantize_dynamic(tiny_bert(), progress=False), tmp_path / "int8")
    path = tmp_path / "int8" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["BertForSequenceClasification"]}))
    with pytest.raises(
        ValueError,
        match=r"names \['BertForSequenceClasification'\], which transformers .* does not have; did you mean "
        r"'BertForSequenceClassification'\? Pass `auto_class`",
    ):
        load_quantized(tmp_path / "int8")
    assert load_quantized(tmp_path / "int8", AutoModelForSequenceClassification) is not None
    path.write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(ValueError, match=r"names no architecture.*Pass `auto_class`"):
        load_quantized(tmp_path / "int8")


def test_a_deep_copy_saves_itself(tmp_path: Path) -> None:
    model = quantize_dynamic(tiny_bert(), progress=False)
    twin = copy.deepcopy(model)
    model.classifier.weight.data.zero_()
    save_quantized(twin, tmp_path / "one")
    twin.save_pretrained(tmp_path / "two")
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    assert load_file(tmp_path / "two" / "model.safetensors")["classifier.weight"].abs().sum() > 0


def test_changes_after_loading_are_what_is_saved(tmp_path: Path) -> None:
    save_quantized(quantize_dynamic(tiny_bert(), progress=False), tmp_path / "int8")
    loaded = load_quantized(tmp_path / "int8")
    loaded.bert.pooler.dense = nn.Linear(32, 32)
    save_quantized(loaded, tmp_path / "changed")
    config = json.loads((tmp_path / "changed" / "config.json").read_text())
    assert r"re:^(bert\.)?pooler\.dense$" in config["quantization_config"]["ignore"]
    assert torch.equal(logits(load_quantized(tmp_path / "changed")), logits(loaded))


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = quantize_dynamic(tiny_bert(), progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    save_quantized(model, tmp_path / "int8")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)
    assert isinstance(model, PreTrainedModel)


def test_config_can_be_copied_and_printed_and_written(tmp_path: Path) -> None:
    """Reporters, model cards and the Trainer all turn the config into JSON."""
    for model in (quantize_dynamic(tiny_bert(), progress=False), _saved_and_loaded(tmp_path)):
        config = copy.deepcopy(model.config)
        assert json.loads(config.to_json_string())["quantization_config"]["quant_method"] == "compressed-tensors"
        assert "compressed-tensors" in repr(config)
        assert json.loads(config.to_json_string(use_diff=False))["model_type"] == "bert"


def _saved_and_loaded(folder: Path) -> PreTrainedModel:
    save_quantized(quantize_dynamic(tiny_bert(), progress=False), folder / "int8")
    return load_quantized(folder / "int8")


def test_is_quantized_folder(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "float")
    save_quantized(quantize_dynamic(tiny_bert(), progress=False), tmp_path / "int8")
    assert is_quantized_folder(tmp_path / "int8")
    assert not is_quantized_folder(tmp_path / "float")
    assert not is_quantized_folder(tmp_path / "absent")


def test_relative_paths_and_a_trailing_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = quantize_dynamic(tiny_bert(), progress=False)
    save_quantized(model, "here/int8/")
    assert torch.equal(logits(load_quantized("here/int8/")), logits(model))
    assert [file.name for file in (tmp_path / "here").iterdir()] == ["int8"]
