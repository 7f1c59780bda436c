"""Vocabulary that a corpus never uses leaves the model and its tokenizer; what the corpus says stays the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from hf_quant.pruning.vocabulary import shrink_vocabulary

from ..tiny import tiny_llama, tiny_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards quietly examine jackdaws loving big quartz"
ALL = [WORDS, "zebras, quizzes and foxes jump quickly", "the wizards loved the dogs"] * 3
CORPUS = ["the quick brown dog", "the dog examines the fox"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def fast(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one kind, trained on a few words, with BERT's special tokens and template."""
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIAL, show_progress=False)
    elif kind == "wordlevel":
        backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    elif kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=340, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
        )
    elif kind == "bpe":  # as CLIP's
        backend = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(
            vocab_size=140, end_of_word_suffix="</w>", special_tokens=SPECIAL, show_progress=False
        )
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=70, unk_token="[UNK]", special_tokens=SPECIAL, show_progress=False
        )
    backend.train_from_iterator(ALL, trainer)
    ends = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    return wrap(backend)


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def built(model: Any, *words: str) -> PreTrainedTokenizerFast:
    """A tokenizer around a model made by hand, which splits at spaces."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def fitting(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> LlamaForCausalLM:
    return tiny_llama(vocab_size=len(tokenizer), **changes).eval()


@torch.no_grad()
def outputs(model: nn.Module, ids: list[int]) -> Tensor:
    model.eval()
    batch = {"input_ids": torch.tensor([ids])}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    return model(**batch).logits


def same_tokens(old: Any, new: Any, *text: str) -> bool:
    before, after = old(*text)["input_ids"], new(*text)["input_ids"]
    return old.convert_ids_to_tokens(before) == new.convert_ids_to_tokens(after)


class TestKinds:
    @pytest.mark.parametrize("kind", ["wordpiece", "wordlevel", "bytes", "bpe", "unigram"])
    def test_corpus_and_outputs_stay_through_a_plain_reload(self, kind: str, tmp_path: Path) -> None:
        tokenizer = fast(kind)
        model = fitting(tokenizer)
        before = copy.deepcopy(model)
        model, smaller, change = shrink_vocabulary(model, tokenizer, CORPUS)
        model.save_pretrained(tmp_path)
        smaller.save_pretrained(tmp_path)
        reloaded = AutoTokenizer.from_pretrained(tmp_path)
        model = LlamaForCausalLM.from_pretrained(tmp_path)

        assert len(reloaded) == model.config.vocab_size == change.new_size < change.old_size == len(tokenizer)
        assert model.get_input_embeddings().weight.shape[0] == change.new_size
        for text in [(text,) for text in CORPUS] + [tuple(CORPUS)]:
            assert same_tokens(tokenizer, reloaded, *text)
            old = tokenizer(*text)["input_ids"]
            new = reloaded(*text)["input_ids"]
            assert change.renumber(torch.tensor(old)).tolist() == new
            torch.testing.assert_close(outputs(model, new), outputs(before, old)[..., change.kept])
        for token in SPECIAL:
            assert reloaded.convert_tokens_to_ids(token) < change.new_size
            assert reloaded.decode([reloaded.convert_tokens_to_ids(token)]) == token
        assert change.sqnr is not None
        assert change.sqnr > 100

    @pytest.mark.parametrize("kind", ["wordpiece", "bytes", "bpe", "unigram"])
    def test_other_texts_become_shorter_pieces(self, kind: str) -> None:
        tokenizer = fast(kind)
        _, smaller, _ = shrink_vocabulary(fitting(tokenizer), tokenizer, CORPUS)
        old, new = tokenizer.tokenize("quickly wizards jumps"), smaller.tokenize("quickly wizards jumps")
        assert len(new) > len(old)
        assert "[UNK]" not in new

    def test_other_words_of_a_word_level_vocabulary_are_unknown(self) -> None:
        tokenizer = fast("wordlevel")
        _, smaller, _ = shrink_vocabulary(fitting(tokenizer), tokenizer, CORPUS)
        assert smaller.tokenize("the lazy dog") == ["the", "[UNK]", "dog"]

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=40), st.sampled_from([AddedToken("<new>", normalized=False), None]))
    def test_bytes_hold_any_text(self, text: str, added: AddedToken | None) -> None:
        tokenizer, smaller = self.byte_level(added)
        ids = smaller(text, add_special_tokens=False)["input_ids"]
        assert smaller.decode(ids) == tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert smaller.decode(ids, clean_up_tokenization_spaces=False) == text

    made: ClassVar[dict[str, tuple[Any, Any]]] = {}

    def byte_level(self, added: AddedToken | None) -> tuple[Any, Any]:
        key = str(added)
        if key not in self.made:
            tokenizer = fast("bytes")
            tokenizer.add_tokens([added] if added else [])
            self.made[key] = (tokenizer, shrink_vocabulary(fitting(tokenizer), tokenizer, CORPUS)[1])
        return self.made[key]

    def test_merges_of_kept_tokens_stay_and_no_others(self) -> None:
        merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("b", "c"), ("a", "bc")]
        tokens = ["[UNK]", "a", "b", "c", "d", "ab", "cd", "abcd", "bc", "abc"]
        tokenizer = built(models.BPE({token: index for index, token in enumerate(tokens)}, merges, unk_token="[UNK]"))
        _, smaller, change = shrink_vocabulary(fitting(tokenizer), tokenizer, ["abcd"])
        assert set(smaller.get_vocab()) == {"[UNK]", "a", "b", "c", "d", "ab", "cd", "abcd"}
        assert smaller.tokenize("abcd abc") == ["abcd", "ab", "c"]
        assert change.new_size == 8

    def test_the_beginning_of_an_unknown_word_stays(self) -> None:
        # Without "ab", the word "abX" would no longer fail after "ab", but be "a" and "##bX".
        vocab = {token: index for index, token in enumerate(["[UNK]", "a", "##b", "ab", "##bX", "c", "zz"])}
        tokenizer = built(models.WordPiece(vocab, unk_token="[UNK]"))
        _, smaller, _ = shrink_vocabulary(fitting(tokenizer), tokenizer, ["abX cbX"])
        assert smaller.tokenize("abX cbX") == tokenizer.tokenize("abX cbX") == ["[UNK]", "c", "##bX"]
        assert "zz" not in smaller.get_vocab()

    def test_an_unknown_character_costs_what_it_did(self) -> None:
        # The lowest score, of "zz", makes "?" cost -40; without it, at -25, "x ? yb" would beat "x?y b".
        pieces = [("[UNK]", 0.0), ("x", -1.0), ("b", -15.0), ("x?y", -15.0), ("yb", -1.0), ("zz", -30.0)]
        tokenizer = built(models.Unigram([*pieces, ("qq", -20.0)], unk_id=0))
        _, smaller, _ = shrink_vocabulary(fitting(tokenizer), tokenizer, ["x?yb yb"])
        assert smaller.tokenize("x?yb") == tokenizer.tokenize("x?yb") == ["x?y", "b"]
        assert "qq" not in smaller.get_vocab()

    @pytest.mark.parametrize(
        "processor",
        [
            processors.BertProcessing(("[SEP]", 0), ("[CLS]", 0)),
            processors.RobertaProcessing(("[SEP]", 0), ("[CLS]", 0)),
            processors.Sequence([processors.ByteLevel(), processors.BertProcessing(("[SEP]", 0), ("[CLS]", 0))]),
        ],
        ids=["bert", "roberta", "sequence"],
    )
    def test_ids_in_post_processors_are_renumbered(self, processor: Any) -> None:
        tokens = ["zebra", "the", "dog", *SPECIAL]  # special tokens last, so that their ids change
        backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        ids = {name: backend.token_to_id(name) for name in SPECIAL}
        ends = (("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
        if isinstance(processor, processors.Sequence):
            backend.post_processor = processors.Sequence([processors.ByteLevel(), processors.BertProcessing(*ends)])
        else:
            backend.post_processor = type(processor)(*ends)
        backend.enable_padding(pad_id=ids["[PAD]"], pad_token="[PAD]", length=9)
        tokenizer = wrap(backend)
        model = fitting(tokenizer, pad_token_id=3, bos_token_id=5, eos_token_id=6)
        _, smaller, _ = shrink_vocabulary(model, tokenizer, ["the dog"])
        assert len(smaller) == len(tokenizer) - 1
        assert smaller.backend_tokenizer.padding["pad_id"] == smaller.pad_token_id == ids["[PAD]"] - 1
        assert same_tokens(tokenizer, smaller, "the dog", "the")

    def test_classes_with_a_pipeline_of_their_own(self) -> None:
        pieces = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
        pieces += [(letter, -5.0) for letter in "▁adehginot"] + [("▁the", -2.0), ("▁dog", -2.0), ("ing", -3.0)]
        multilingual = XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)])
        vocab = {
            t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", *"adehginot", "th", "do", "in", "<mask>"])
        }
        english = RobertaTokenizer(vocab=vocab, merges=[("t", "h"), ("d", "o"), ("i", "n")])
        for tokenizer, gone in ((multilingual, "ing"), (english, "in")):
            _, smaller, _ = shrink_vocabulary(fitting(tokenizer), tokenizer, ["the dog"])
            assert type(smaller) is type(tokenizer)
            assert set(tokenizer.get_vocab()) - set(smaller.get_vocab()) == {gone}
            assert same_tokens(tokenizer, smaller, "the dog", "the")
            assert smaller.mask_token_id == len(smaller) - 1


class TestCorpus:
    def tokens(self, texts: Any, **options: Any) -> set[str]:
        tokenizer = tiny_tokenizer()
        _, smaller, _ = shrink_vocabulary(fitting(tokenizer), tokenizer, texts, **options)
        return set(smaller.get_vocab()) - {"[PAD]", "[UNK]", "[SEP]"}

    def test_texts_pairs_and_rows(self) -> None:
        expected = {"w3", "w7", "w9"}
        assert self.tokens(["w3 w7", "w9"]) == expected
        assert self.tokens(iter([("w3", "w7"), ["w9"]])) == expected
        rows = {"a": ["w3", "w7"], "b": ["w9", "w9"], "label": [40, 41]}
        assert self.tokens(datasets.Dataset.from_dict(rows)) == expected
        assert self.tokens(datasets.Dataset.from_dict(rows).select_columns(["a"])) == {"w3", "w7"}

    def test_rows_of_ids(self) -> None:
        assert self.tokens([{"input_ids": [3, 7], "labels": 40}, {"input_ids": torch.tensor([[9]])}]) == {
            "w3", "w7", "w9",
        }  # fmt: skip
        assert self.tokens([{"input_ids": [3], "labels": [-100, 7], "text": "w40"}]) == {"w3", "w7"}

    def test_min_count_and_keep(self) -> None:
        assert self.tokens(["w3 w3 w7", "w7 w9"], min_count=2) == {"w3", "w7"}
        assert self.tokens(["w3"], keep=["w20", 21, "w22 w23"]) == {"w3", "w20", "w21", "w22", "w23"}

    def test_a_kept_word_keeps_its_pieces_after_a_space_too(self) -> None:
        tokenizer = fast("bytes")
        _, smaller, _ = shrink_vocabulary(fitting(tokenizer), tokenizer, CORPUS, keep=["wizards"])
        for text in ("wizards", "the wizards"):
            assert same_tokens(tokenizer, smaller, text)
        assert not same_tokens(tokenizer, smaller, "jackdaws loving")

    def test_the_tokenizer_given_stays_as_it_is(self) -> None:
        tokenizer = fast("wordpiece")
        tokenizer.backend_tokenizer.enable_truncation(3)
        before = tokenizer.backend_tokenizer.to_str()
        _, smaller, _ = shrink_vocabulary(fitting(tokenizer), tokenizer, ["the quick brown fox jumps over"])
        assert tokenizer.backend_tokenizer.to_str() == before
        assert smaller.backend_tokenizer.truncation["max_length"] == 3
        assert smaller.tokenize("over") == tokenizer.tokenize("over")  # beyond the cut, and counted

    @pytest.mark.parametrize(
        ("texts", "error", "message"),
        [
            ("w3", TypeError, "`texts` is a str; pass a list of texts"),
            ([], ValueError, "`texts` holds no token"),
            ([3], TypeError, "item 0 of `texts` is 3; allowed: a string"),
            (["w3", {"label": 1}], TypeError, r"item 1 of `texts` is a row with the columns \['label'\]"),
            ([{"input_ids": [3, 96]}], ValueError, "row 0 of `texts` holds the id 96 in 'input_ids'.*has 96 rows"),
        ],
    )
    def test_refuses_what_is_no_corpus(self, texts: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            self.tokens(texts)

    def test_refuses_options_out_of_range(self) -> None:
        with pytest.raises(ValueError, match="`min_count` is 0; allowed: whole numbers from 1"):
            self.tokens(["w3"], min_count=0)
        with pytest.raises(ValueError, match="`keep` names the id 96; the model's ids are 0 to 95"):
            self.tokens(["w3"], keep=[96])
        with pytest.raises(TypeError, match=r"'w3' is a string. Write \['w3'\]"):
            self.tokens(["w3"], keep="w3")
