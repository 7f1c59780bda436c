"""Which modules are quantized, which are left, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertForMaskedLM,
    CLIPConfig,
    CLIPForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
)

from hf_quant.targets import replace_modules, select_modules
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama

BERT_EMBEDDINGS = {f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")}
T5_SIZES = {"vocab_size": 96, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


def test_bert_is_quantized_but_for_its_classifier() -> None:
    model = tiny_bert()
    selection = select_modules(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(selection.quantized) == (linear - {"classifier"}) | BERT_EMBEDDINGS
    assert selection.left == {"classifier": "head"}
    assert selection.quantized["bert.embeddings.word_embeddings"] == "embedding"
    assert selection.quantized["bert.pooler.dense"] == "linear"


def test_names_come_in_the_models_order() -> None:
    model = tiny_bert()
    order = [name for name, _ in model.named_modules()]
    names = list(select_modules(model).quantized)
    assert names == sorted(names, key=order.index)


def test_tied_embedding_and_head_are_left_and_each_names_the_other() -> None:
    selection = select_modules(tiny_llama())
    assert selection.left == {
        "model.embed_tokens": "shares its weight with lm_head",
        "lm_head": "shares its weight with model.embed_tokens",
    }


def test_untied_head_is_left_and_its_embedding_is_not() -> None:
    selection = select_modules(tiny_llama(tie_word_embeddings=False))
    assert selection.left == {"lm_head": "head"}
    assert selection.quantized["model.embed_tokens"] == "embedding"


def test_masked_lm_head_is_left_as_a_whole() -> None:
    selection = select_modules(BertForMaskedLM(tiny_bert().config))
    assert selection.left["cls.predictions.transform.dense"] == "head"
    assert selection.left["cls.predictions.decoder"] == "shares its weight with bert.embeddings.word_embeddings"


def test_classification_head_of_several_layers_is_left() -> None:
    config = BartConfig(
        vocab_size=96, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
    )  # fmt: skip
    selection = select_modules(BartForSequenceClassification(config))
    assert selection.left["classification_head.dense"] == "head"
    assert selection.left["classification_head.out_proj"] == "head"
    assert selection.quantized["model.encoder.layers.0.fc1"] == "linear"


def test_lm_head_without_a_base_model_is_left_with_the_embeddings_that_it_shares() -> None:
    selection = select_modules(T5ForConditionalGeneration(T5Config(**T5_SIZES)))
    assert selection.left["lm_head"] == "shares its weight with shared, encoder.embed_tokens, decoder.embed_tokens"
    assert "decoder.block.0.layer.1.EncDecAttention.q" in selection.quantized


def test_head_beside_a_model_without_its_base_attribute() -> None:
    """These hold `encoder` or `vision_model`, not the `transformer` or `clip` that `base_model_prefix` names."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    clip = CLIPForImageClassification(CLIPConfig(text_config=sizes, vision_config=vision))
    assert select_modules(clip).left["classifier"] == "head"
    assert "vision_model.encoder.layers.0.mlp.fc1" in select_modules(clip).quantized
    answers = T5ForQuestionAnswering(T5Config(**T5_SIZES))
    assert select_modules(answers).left["qa_outputs"] == "head"


def test_base_model_has_no_head_to_leave() -> None:
    assert select_modules(tiny_bert().bert).left == {}


def test_gpt2_layers_are_conv1d() -> None:
    selection = select_modules(tiny_gpt2())
    assert selection.quantized["transformer.h.0.attn.c_attn"] == "conv1d"
    assert selection.left["lm_head"].startswith("shares its weight with transformer.wte")


def test_targets_are_taken_exactly_heads_included() -> None:
    selection = select_modules(tiny_bert(), targets=["*.query", "classifier"])
    assert set(selection.quantized) == {
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.attention.self.query",
        "classifier",
    }
    assert selection.left["bert.pooler.dense"] == "not a target"


def test_ignore_wins_over_targets_and_says_so() -> None:
    selection = select_modules(tiny_bert(), targets=["*.query", "*.key"], ignore=["*.layer.0.*"])
    assert set(selection.quantized) == {f"bert.encoder.layer.1.attention.self.{kind}" for kind in ("query", "key")}
    assert selection.left["bert.encoder.layer.0.attention.self.query"] == "ignored"


def test_embeddings_can_be_left() -> None:
    selection = select_modules(tiny_bert(), embeddings=False)
    assert {name for name, reason in selection.left.items() if reason == "embeddings=False"} == BERT_EMBEDDINGS
    assert not BERT_EMBEDDINGS & set(selection.quantized)


@pytest.mark.parametrize("option", ["targets", "ignore"])
def test_pattern_that_matches_nothing(option: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"pattern '\*\.qeury' in `{option}` matches no module; did you mean '\*\.query'\? Patterns are "
        r"matched against whole names, such as 'bert\.embeddings\.word_embeddings' and 'classifier'\.",
    ):
        select_modules(tiny_bert(), **{option: ["*.key", "*.qeury"]})


def test_pattern_of_a_module_that_is_none_of_ours_matches_nothing() -> None:
    with pytest.raises(ValueError, match=r"pattern '\*\.LayerNorm' in `targets` matches no module"):
        select_modules(tiny_bert(), targets=["*.LayerNorm"])


def test_a_string_is_not_a_list_of_patterns() -> None:
    with pytest.raises(TypeError, match=r"`targets` is a list of patterns, but '\*\.query' is a string\. Write \["):
        select_modules(tiny_bert(), targets="*.query")


def test_nothing_left_says_why() -> None:
    with pytest.raises(
        ValueError,
        match=r"nothing is left to quantize in BertForSequenceClassification: .*: ignored; .*; and \d+ more\. "
        r"Loosen `targets` or `ignore`\.",
    ):
        select_modules(tiny_bert(), ignore=["*"])


def test_empty_list_of_targets_is_nothing() -> None:
    with pytest.raises(ValueError, match=r"nothing is left to quantize"):
        select_modules(tiny_bert(), targets=[])


def test_model_without_a_quantizable_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4))
    with pytest.raises(
        ValueError,
        match=r"Sequential has no module that can be quantized: it holds no nn\.Linear, transformers Conv1D",
    ):
        select_modules(model)


@pytest.mark.parametrize("part", ["lm_head", "model.embed_tokens"])
def test_a_part_of_a_tied_group_is_refused(part: str) -> None:
    other = {"lm_head": "model.embed_tokens", "model.embed_tokens": "lm_head"}[part]
    with pytest.raises(
        ValueError,
        match=rf"{part} shares its weight with {other}, which would stay in float: the weight would be stored "
        rf"twice\. Name all of them in `targets`, or put {part} into `ignore`\.",
    ):
        select_modules(tiny_llama(), targets=["*.q_proj", part])


def test_a_tied_group_named_whole_is_taken() -> None:
    selection = select_modules(tiny_llama(), targets=["lm_head", "model.embed_tokens"])
    assert selection.quantized == {"model.embed_tokens": "embedding", "lm_head": "linear"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_subclasses_and_odd_weights_are_left_with_the_reason() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "scaled": Scaled(4, 4),
            "clipped": nn.Embedding(4, 4, max_norm=1.0),
            "empty": nn.Linear(4, 0),
            "attention": nn.MultiheadAttention(4, 1),
        }
    )
    selection = select_modules(model)
    assert set(selection.quantized) == {"plain"}
    assert selection.left == {
        "scaled": "Scaled is no plain Linear",
        "clipped": "renormalizes its weight at each forward (max_norm)",
        "empty": "its weight is empty",
        "attention": "MultiheadAttention holds its weight outside of a Linear, Conv1D or Embedding",
        "attention.out_proj": "NonDynamicallyQuantizableLinear is no plain Linear",
    }


def test_modules_are_replaced_wherever_they_hang() -> None:
    shared, alone, kept = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.ModuleList([shared, alone]), "b": nn.ModuleDict({"c": shared, "d": kept})})
    model.register_module("none", None)
    first, second = nn.Identity(), nn.Identity()
    replace_modules(model, {"b.c": first, "a.1": second})
    assert model.get_submodule("a.0") is first
    assert model.get_submodule("b.c") is first
    assert model.get_submodule("a.1") is second
    assert model.get_submodule("b.d") is kept
    replace_modules(model, {})
    assert model.get_submodule("a.0") is first
    with pytest.raises(AttributeError, match="nothing"):
        replace_modules(model, {"a.0": kept, "b.nothing": kept})
    assert model.get_submodule("a.0") is first, "all or none"
