"""What a smaller vocabulary changes in a model, and what is refused and leaves all as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_quant import quantize_dynamic
from hf_quant.pruning.tokens import Vocabulary
from hf_quant.pruning.vocabulary import VocabularyChange, shrink_vocabulary
from hf_quant.quantization.qat import prepare
from hf_quant.schemes import get_scheme
from hf_quant.targets import select_modules

from ..tiny import tiny_bert, tiny_llama, tiny_tokenizer
from .test_vocabulary import CORPUS, SPECIAL, fast, fitting, outputs, wrap


def snapshot(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.generation_config.to_dict())


class TestModels:
    @pytest.mark.parametrize("tied", [True, False])
    def test_input_and_output_embeddings(self, tied: bool) -> None:
        tokenizer = fast("bytes")
        model = fitting(tokenizer, tie_word_embeddings=tied)
        size = model.num_parameters()
        _, _, change = shrink_vocabulary(model, tokenizer, CORPUS)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert model.lm_head.out_features == model.model.embed_tokens.num_embeddings == change.new_size
        assert model.vocab_size == change.new_size
        assert change.parameters_removed == size - model.num_parameters()
        assert change.parameters_removed == (change.old_size - change.new_size) * 32 * (1 if tied else 2)

    def test_bias_of_a_masked_language_model(self, tmp_path: Path) -> None:
        tokenizer = fast("wordpiece")
        model = BertForMaskedLM(tiny_bert(vocab_size=len(tokenizer)).config).eval()
        nn.init.normal_(model.cls.predictions.bias)
        before = copy.deepcopy(model)
        _, smaller, change = shrink_vocabulary(model, tokenizer, CORPUS)
        model.save_pretrained(tmp_path)
        old, new = (t(CORPUS[0])["input_ids"] for t in (tokenizer, smaller))
        got = outputs(BertForMaskedLM.from_pretrained(tmp_path), new)
        torch.testing.assert_close(got, outputs(before, old)[..., change.kept])

    @pytest.mark.parametrize("species", ["bart", "t5"])
    def test_encoder_decoders(self, species: str) -> None:
        tokenizer = fast("wordpiece")
        common = {"vocab_size": len(tokenizer), "d_model": 32, "pad_token_id": 0}
        ids = {"decoder_start_token_id": 2, "eos_token_id": 3, "bos_token_id": 2}
        torch.manual_seed(0)
        model: Any
        if species == "bart":
            sizes = {f"{part}_{what}": n for part in ("encoder", "decoder")
                     for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
            config: Any = BartConfig(**common, **ids, **sizes, max_position_embeddings=32, forced_eos_token_id=3)
            model = BartForConditionalGeneration(config)
            model.final_logits_bias.normal_()
        else:
            model = T5ForConditionalGeneration(T5Config(**common, **ids, d_kv=16, d_ff=48, num_layers=1, num_heads=2))
        before = copy.deepcopy(model).eval()
        _, smaller, change = shrink_vocabulary(model, tokenizer, CORPUS)
        old, new = (t(CORPUS[0])["input_ids"] for t in (tokenizer, smaller))
        torch.testing.assert_close(outputs(model, new), outputs(before, old)[..., change.kept])
        assert model.get_encoder().get_input_embeddings().weight is model.get_decoder().get_input_embeddings().weight
        assert model.get_encoder().config.vocab_size == change.new_size
        assert change.sqnr is not None

    def test_special_ids_follow(self, tmp_path: Path) -> None:
        tokens = ["zebra", "the", "dog", "fox", *SPECIAL, "quick", "lazy"]
        backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = wrap(backend)
        model = fitting(tokenizer, pad_token_id=4, bos_token_id=6, eos_token_id=[7, 9])
        model.generation_config.suppress_tokens = [0, 2, 5]
        model.generation_config.bad_words_ids = [[2, 3], [2, 5]]
        _, smaller, _ = shrink_vocabulary(model, tokenizer, ["the dog"])
        assert list(smaller.get_vocab().items()) != list(tokenizer.get_vocab().items())
        assert sorted(smaller.get_vocab(), key=smaller.get_vocab().get) == ["the", "dog", *SPECIAL, "quick"]
        model.save_pretrained(tmp_path)
        model = LlamaForCausalLM.from_pretrained(tmp_path)
        for config in (model.config, model.generation_config):
            assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (2, 4, [5, 7])
        assert model.model.embed_tokens.padding_idx == 2
        assert model.generation_config.suppress_tokens == [1, 3]
        assert model.generation_config.bad_words_ids == [[1, 3]]

    def test_rows_that_no_token_has(self) -> None:
        tokenizer = fast("wordpiece")
        model = tiny_llama(vocab_size=len(tokenizer) + 30, eos_token_id=len(tokenizer) + 7).eval()
        row = model.model.embed_tokens.weight[len(tokenizer) + 7].clone()
        _, smaller, change = shrink_vocabulary(model, tokenizer, CORPUS)
        assert change.new_size == len(smaller) + 1  # the id that the config names keeps its row, the last
        assert model.config.eos_token_id == len(smaller)
        assert torch.equal(model.model.embed_tokens.weight[-1], row)

    def test_nothing_to_remove(self) -> None:
        tokenizer = tiny_tokenizer()
        model = fitting(tokenizer)
        before = snapshot(model)[0]
        _, smaller, change = shrink_vocabulary(model, tokenizer, [f"w{index}" for index in range(3, 96)])
        assert (change.new_size, change.parameters_removed) == (96, 0)
        assert smaller.get_vocab() == tokenizer.get_vocab()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_keeps_the_mode_and_the_frozen(self) -> None:
        tokenizer = tiny_tokenizer()
        model = fitting(tokenizer).train()
        model.model.layers[0].eval()
        model.model.embed_tokens.weight.requires_grad_(False)
        shrink_vocabulary(model, tokenizer, ["w3 w4"])
        assert model.training
        assert not model.model.layers[0].training
        assert not model.model.embed_tokens.weight.requires_grad

    def test_renumber(self) -> None:
        change = VocabularyChange(6, 3, torch.tensor([0, 2, 5]), 0, None)
        assert change.renumber(torch.tensor([[5, -100], [0, 2]])).tolist() == [[2, -100], [0, 1]]
        with pytest.raises(ValueError, match=r"ids \[1, 7\] are not in the smaller vocabulary"):
            change.renumber(torch.tensor([0, 7, 1]))


class Numerologist(LlamaForCausalLM):
    """Takes ids for numbers."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits + 10 * input_ids[..., None]
        return output


class Stubborn(LlamaForCausalLM):
    """Always has 96 words."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.embed_tokens = nn.Embedding(96, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, 96, bias=False)


class TestRefusals:
    def test_outputs_that_would_change_leave_everything_as_it_was(self) -> None:
        tokenizer = fast("wordpiece")
        config = tiny_llama(vocab_size=len(tokenizer)).config
        model = Numerologist(config)
        weight, before = model.lm_head.weight, snapshot(model)
        with pytest.raises(ValueError, match=r"outputs of Numerologist would differ.*uses the numbers of its ids"):
            shrink_vocabulary(model, tokenizer, CORPUS)
        after = snapshot(model)
        assert all(torch.equal(value, before[0][name]) for name, value in after[0].items())
        assert after[1:] == before[1:]
        assert model.lm_head.weight is weight is model.model.embed_tokens.weight
        assert model.lm_head.out_features == len(tokenizer)

    def test_a_size_that_the_config_does_not_hold(self) -> None:
        with pytest.raises(ValueError, match="Stubborn cannot be built with a smaller embedding"):
            shrink_vocabulary(Stubborn(tiny_llama().config), tiny_tokenizer(), ["w3"])
        model = tiny_llama()
        model.config.vocab_size = 97
        with pytest.raises(ValueError, match=r"no vocab_size .* equals its 96 rows"):
            shrink_vocabulary(model, tiny_tokenizer(), ["w3"])

    def test_a_tokenizer_of_another_model(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<new>"])
        with pytest.raises(ValueError, match="token '<new>' has the id 96, but the model's embedding has 96 rows"):
            shrink_vocabulary(tiny_llama(), tokenizer, ["w3"])

    def test_ids_in_the_config_that_are_not_renumbered(self) -> None:
        model = tiny_llama()
        model.generation_config.sequence_bias = [[[3], 1.0]]
        with pytest.raises(ValueError, match=r"sets sequence_bias=\[\[\[3\], 1.0\]\].*Set it to None"):
            shrink_vocabulary(model, tiny_tokenizer(), ["w3"])
        assert model.config.vocab_size == 96

    def test_models_that_cannot(self) -> None:
        tokenizer = tiny_tokenizer()
        with pytest.raises(ValueError, match="BertForSequenceClassification is quantized already"):
            shrink_vocabulary(quantize_dynamic(tiny_bert(), progress=False), tokenizer, ["w3"])
        model, scheme = tiny_bert(), get_scheme("int8_dynamic")
        prepare(model, scheme, select_modules(model, scheme=scheme))
        with pytest.raises(ValueError, match="is prepared for quantization-aware training"):
            shrink_vocabulary(model, tokenizer, ["w3"])
        with pytest.raises(TypeError, match="`model` is a Linear"):
            shrink_vocabulary(nn.Linear(2, 2), tokenizer, ["w3"])  # type: ignore[arg-type]
        vision = ViTForImageClassification(
            ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
        )
        with pytest.raises(ValueError, match="ViTForImageClassification has no embedding of tokens"):
            shrink_vocabulary(vision, tokenizer, ["w3"])

    def test_tokenizers_that_cannot(self) -> None:
        with pytest.raises(ValueError, match="object is no fast tokenizer"):
            Vocabulary(object())  # type: ignore[arg-type]
        tokenizer = fast("bytes")
        tokenizer.backend_tokenizer.model.dropout = 0.1
        with pytest.raises(ValueError, match="draws random pieces"):
            Vocabulary(tokenizer)

        class Upper:
            def pre_tokenize(self, text: Any) -> None: ...

        tokenizer = fast("wordlevel")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Upper())
        with pytest.raises(ValueError, match="cannot be written as JSON"):
            Vocabulary(tokenizer)
