"""What lies in a model folder: zeros, schemes and bytes, against the loaded tensors and the files themselves."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_quant import QATCallback, load_quantized, quantize, save_quantized
from hf_quant.inspection import ZIP_SAMPLE, InspectedModule, _count, _zip_size, inspect_folder
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.modules import Int8Embedding
from tests.tiny import INT8_SCHEMES, int8_model, make_trainer, tiny_bert, tiny_gpt2, tiny_llama

ATTENTION = "bert.encoder.layer.{}.attention.self.{}"


def keep_at_most(weight: Tensor, keep: int, of: int) -> None:
    """Zero all but the `keep` largest of each `of` consecutive columns, in place."""
    groups = weight.view(-1, of)
    groups.scatter_(1, groups.abs().argsort(1)[:, : of - keep], 0.0)


@torch.no_grad()
def pruned_bert() -> Any:
    """A tiny BERT with every kind of zeros."""
    model = tiny_bert()
    keep_at_most(model.get_submodule(ATTENTION.format(0, "query")).weight, 2, 4)
    keep_at_most(model.get_submodule(ATTENTION.format(1, "query")).weight, 1, 4)
    keep_at_most(model.get_submodule(ATTENTION.format(0, "key")).weight, 4, 8)
    value = model.get_submodule(ATTENTION.format(0, "value")).weight
    value[3:6] = 0
    value[:, [1, 30]] = 0
    model.bert.embeddings.word_embeddings.weight[10:17] = 0
    model.bert.encoder.layer[1].output.dense.weight.zero_()
    return model


def by_name(folder: Path) -> dict[str, InspectedModule]:
    return {module.name: module for module in inspect_folder(folder).modules}


def weights_size(folder: Path) -> int:
    return sum(os.stat(file).st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float_folder(tmp_path: Path, dtype: torch.dtype) -> None:
    pruned_bert().to(dtype).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    found = inspect_folder(tmp_path)
    matrices = {key: value for key, value in state.items() if value.ndim > 1}
    assert {f"{module.name}.weight" for module in found.modules} == set(matrices)
    assert len(matrices) == 17
    for module in found.modules:
        weight, bias = state[f"{module.name}.weight"], state.get(f"{module.name}.bias")
        assert module.zeros == int((weight == 0).sum()), module.name
        assert module.sparsity == module.zeros / weight.numel()
        assert (module.shape, module.weights) == (tuple(weight.shape), weight.numel())
        assert module.bytes == weight.nbytes + (0 if bias is None else bias.nbytes)
        assert module.scheme == str(dtype).removeprefix("torch.")
        assert module.kind == ("embedding" if "embeddings" in module.name else "linear")
        assert module.training_bytes == 0
    assert found.weights == sum(value.numel() for value in matrices.values())
    assert found.zeros == sum(int((value == 0).sum()) for value in matrices.values())
    assert (found.bytes, found.files) == (weights_size(tmp_path), 1)
    assert 0 < found.zip_bytes < found.bytes

    modules = {module.name: module for module in found.modules}
    told = {name: (one.pattern, one.zero_rows, one.zero_columns) for name, one in modules.items()}
    assert told[ATTENTION.format(0, "query")][0] == "2:4"
    assert told[ATTENTION.format(1, "query")][0] == "1:4"
    assert told[ATTENTION.format(0, "key")][0] == "4:8"
    assert told[ATTENTION.format(0, "value")] == (None, 3, 2)
    assert told[ATTENTION.format(1, "value")] == (None, 0, 0)
    assert told["bert.encoder.layer.1.output.dense"] == (None, 32, 48), "all zero is no pattern"
    # Token 0 is the padding, which starts as zeros.
    assert told["bert.embeddings.word_embeddings"] == (None, 8, 0)


def test_shards_are_one_model(tmp_path: Path) -> None:
    model = pruned_bert()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    whole, shards = inspect_folder(tmp_path / "whole"), inspect_folder(tmp_path / "shards")
    assert shards.files == len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert shards.bytes == weights_size(tmp_path / "shards")
    assert shards.modules == whole.modules


def test_other_weights_beside_the_models_are_not_counted(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path)
    before = inspect_folder(tmp_path)
    save_file({"lora.weight": torch.zeros(8, 8)}, tmp_path / "adapter_model.safetensors")
    assert inspect_folder(tmp_path) == before


@pytest.mark.parametrize("scheme", [*INT8_SCHEMES, "int8_dynamic_symmetric", "int4_weight_only", "int4_dynamic"])
@pytest.mark.parametrize("make", [pruned_bert, tiny_llama, tiny_gpt2])
def test_a_quantized_folder(tmp_path: Path, scheme: str, make: Any) -> None:
    float_model = make()
    truth = {name: type(module) for name, module in float_model.named_modules()}
    if scheme in INT8_SCHEMES:
        save_quantized(int8_model(float_model, scheme), tmp_path / "q")
    else:
        save_quantized(quantize(float_model, scheme, progress=False), tmp_path / "q")
    found = by_name(tmp_path / "q")
    state = load_file(tmp_path / "q" / "model.safetensors")
    quantized = quantized_modules(load_quantized(tmp_path / "q"))
    assert len(quantized) > 8
    for name, module in quantized.items():
        seen, weight = found[name], module.weight
        assert seen.scheme == ("int8_weight_only" if isinstance(module, Int8Embedding) else module.scheme.name)
        assert seen.kind == {nn.Linear: "linear", Conv1D: "conv1d", nn.Embedding: "embedding"}[truth[name]]
        assert seen.zeros == int((weight == 0).sum()), name
        assert seen.weights == weight.numel()
        assert seen.shape == tuple(module.integers.shape)
        assert seen.bytes == sum(value.nbytes for key, value in state.items() if key.startswith(f"{name}."))
    for name in set(found) - set(quantized):
        assert found[name].scheme == "float32"
        assert found[name].zeros == int((state[f"{name}.weight"] == 0).sum())
    found_in_files = inspect_folder(tmp_path / "q")
    assert found_in_files.bytes == weights_size(tmp_path / "q")
    if make is pruned_bert:
        assert found[ATTENTION.format(0, "query")].pattern == "2:4", "patterns survive quantization"
        assert found[ATTENTION.format(0, "value")].zero_rows >= 3


def test_bits_that_do_not_fill_words_and_layers_of_their_own_scheme(tmp_path: Path) -> None:
    model = tiny_bert(hidden_size=40, intermediate_size=72)
    overrides = {"*.query": "int3_weight_only_channel", "*.key": "int6_dynamic_channel", "*.value": None}
    save_quantized(quantize(model, "int8_dynamic", overrides=overrides, progress=False), tmp_path / "q")
    found = by_name(tmp_path / "q")
    expected = {"query": "int3_weight_only_channel", "key": "int6_dynamic_channel", "value": "float32"}
    for name, scheme in expected.items():
        assert found[ATTENTION.format(1, name)].scheme == scheme
    for name, module in quantized_modules(load_quantized(tmp_path / "q")).items():
        assert found[name].zeros == int((module.integers == 0).sum())
        assert found[name].shape == tuple(module.integers.shape)

    # Names on disk may differ from those in memory, of which the layout speaks; the zeros are right all the same.
    config = tmp_path / "q" / "config.json"
    config.write_text(config.read_text().replace("query", "elsewhere"))
    again = by_name(tmp_path / "q")[ATTENTION.format(1, "query")]
    assert again.scheme == "int3"
    assert again.zeros == found[ATTENTION.format(1, "query")].zeros


def test_conv1d_has_its_inputs_in_rows(tmp_path: Path) -> None:
    model = tiny_gpt2()
    attention = model.transformer.h[1].attn
    with torch.no_grad():
        turned = attention.c_proj.weight.t().contiguous()  # square: only its neighbours tell that it is a Conv1D
        keep_at_most(turned, 2, 4)
        attention.c_proj.weight.copy_(turned.t())
        attention.c_attn.weight[:, 5] = 0  # an output
        attention.c_attn.weight[[1, 2]] = 0  # two inputs
    model.save_pretrained(tmp_path)
    found = by_name(tmp_path)
    kinds = {name: module.kind for name, module in found.items()}
    assert {name for name, kind in kinds.items() if kind == "embedding"} == {"transformer.wte", "transformer.wpe"}
    assert [kind for name, kind in kinds.items() if ".h." in name] == ["conv1d"] * 8
    proj, qkv = found["transformer.h.1.attn.c_proj"], found["transformer.h.1.attn.c_attn"]
    assert (proj.pattern, proj.zeros) == ("2:4", 32 * 32 // 2)
    assert (qkv.shape, qkv.zero_rows, qkv.zero_columns) == ((32, 96), 1, 2)
    assert found["transformer.h.0.attn.c_proj"].pattern is None


def test_tied_weights_are_counted_once(tmp_path: Path) -> None:
    tied, untied = tiny_llama(), tiny_llama(tie_word_embeddings=False)
    tied.save_pretrained(tmp_path / "tied")
    untied.save_pretrained(tmp_path / "untied")
    for model, folder in ((tied, "tied"), (untied, "untied")):
        found = inspect_folder(tmp_path / folder)
        assert found.weights == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    kinds = {name: module.kind for name, module in by_name(tmp_path / "untied").items()}
    assert [name for name, kind in kinds.items() if kind != "linear"] == ["model.embed_tokens"]
    assert kinds["lm_head"] == "linear"
    assert "lm_head" not in by_name(tmp_path / "tied")


def test_a_checkpoint_in_the_midst_of_training(tmp_path: Path) -> None:
    model = pruned_bert()
    query = model.get_submodule(ATTENTION.format(0, "query"))
    query.register_buffer("pruning_sum", torch.ones(32, 32))
    query.register_buffer("pruning_inverse", torch.ones(64, 16, 16))
    callback = QATCallback("int8_static", start_step=1)
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tmp_path, model, [callback], changes=changes).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    state = load_file(checkpoint / "model.safetensors")
    ranges = sum(value.nbytes for key, value in state.items() if ".observer." in key)
    kept = state[f"{ATTENTION.format(0, 'query')}.pruning_sum"].nbytes * 17
    assert min(ranges, kept) > 0
    found = inspect_folder(checkpoint)
    assert {module.scheme for module in found.modules} == {"float32"}
    assert len(found.modules) == 17, "what a criterion keeps is no weight"
    assert sum(module.training_bytes for module in found.modules) == ranges + kept
    assert by_name(checkpoint)[ATTENTION.format(1, "query")].training_bytes == ranges / 13  # 13 int8 Linear layers
    assert "state that only training needs" in str(found)
    for module in found.modules:
        assert module.zeros == int((state[f"{module.name}.weight"] == 0).sum())


def test_kinds_that_are_no_matrix_of_a_module(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    experts = torch.ones(2, 8, 8)
    experts[0, 0, :3] = 0
    tensors = {
        "experts.gate_up_proj": experts,
        "conv.weight": torch.ones(4, 3, 2, 2),
        "conv.bias": torch.ones(4),
        "cls_token": torch.ones(1, 1, 8),
        "norm.weight": torch.zeros(8),
        "attn.bias": torch.zeros(1, 1, 8, 8),
        "position_ids": torch.zeros(4, 4, dtype=torch.int64),
        "float8.weight": torch.tensor([[0.0, -0.0, 1.0, 2.0]] * 4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = by_name(tmp_path)
    assert {name: (one.kind, one.zeros) for name, one in found.items()} == {
        "conv": ("other", 0),
        "experts.gate_up_proj": ("other", 3),
        "float8": ("linear", 8),
    }
    assert found["float8"].scheme == "float8_e4m3fn"
    assert found["conv"].bytes == 4 * 12 * 4 + 16


def test_an_int8_weight_without_its_scale_is_counted(tmp_path: Path) -> None:
    # transformers fuses some layers as it saves, and then leaves their scales under their names in memory.
    save_quantized(int8_model(pruned_bert(), "int8_dynamic"), tmp_path / "q")
    before, file = inspect_folder(tmp_path / "q"), tmp_path / "q" / "model.safetensors"
    name = ATTENTION.format(0, "query")
    state = load_file(file)
    state["elsewhere.weight_scale"] = state.pop(f"{name}.weight_scale")
    save_file(state, file)
    found = inspect_folder(tmp_path / "q")
    assert (found.weights, found.zeros) == (before.weights, before.zeros)
    assert by_name(tmp_path / "q")[name].scheme == "int8_dynamic"


def test_float_weights_under_an_int8_config(tmp_path: Path) -> None:
    save_quantized(int8_model(tiny_bert(), "int8_dynamic"), tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    name = ATTENTION.format(0, "query")
    state = load_file(file)
    state[f"{name}.weight"] = state[f"{name}.weight"].float()
    save_file(state, file)
    assert by_name(tmp_path / "q")[name].scheme == "float32 (config.json: int8_dynamic)"


@given(st.data())
def test_counts_against_counting(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([3, 4, 8, 12, 16]))
    values = data.draw(st.lists(st.sampled_from([0, 0, 0, 1, -2]), min_size=rows * columns, max_size=rows * columns))
    weight = torch.tensor(values, dtype=torch.int8).view(rows, columns)
    table = weight.tolist()

    def most(group: int) -> int:
        return max(sum(v != 0 for v in row[i : i + group]) for row in table for i in range(0, columns, group))

    expected = None
    for group in (8, 4):
        if columns % group == 0 and 0 < most(group) <= group // 2:
            expected = f"{most(group)}:{group}"
    zero_rows = sum(not any(row) for row in table)
    zero_columns = sum(not any(row[i] for row in table) for i in range(columns))
    assert _count(weight, False) == (values.count(0), expected, zero_rows, zero_columns)
    assert _count(weight.t().contiguous().float(), True) == (values.count(0), expected, zero_rows, zero_columns)


def test_the_zip_size_is_zlibs() -> None:
    small = torch.randn(64, 64)
    small[:32] = 0
    assert _zip_size(small) == len(zlib.compress(small.numpy().tobytes(), 6))
    large = torch.randint(-128, 128, (5 * ZIP_SAMPLE // 1024, 1024), dtype=torch.int8)
    large[: len(large) // 2] = 0  # the half that a beginning alone would see
    exact = len(zlib.compress(large.numpy().tobytes(), 6))
    assert _zip_size(large) == pytest.approx(exact, rel=0.02)
    assert _zip_size(torch.zeros(0, 4)) < 20
