"""Perplexity: windows, the figure against transformers' own loss, its interval, and refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from hf_quant import quantize_dynamic
from hf_quant.evaluation.perplexity import Perplexity, perplexity, perplexity_change
from hf_quant.evaluation.windows import read_texts, text_ids, windows

from ..tiny import VOCAB, tiny_bert, tiny_gpt2, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def words(count: int, seed: int = 0) -> str:
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(3, VOCAB, count))


@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_every_token_with_a_context_counts_once(tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    cuts = windows(tokens, length, stride)
    counted = [token for cut in cuts for token in range(cut.end - cut.predicted, cut.end)]
    # Without overlap, the first token of a window has nothing before it.
    alone = range(0, tokens, length) if stride == length else [0]
    assert counted == [token for token in range(tokens) if token not in alone]
    assert all(cut.end - cut.start <= length for cut in cuts)
    assert all(cut.end - cut.start == length for cut in cuts[:-1])
    assert all(cut.predicted < cut.end - cut.start + 1 for cut in cuts)


def by_transformers(model: nn.Module, ids: torch.Tensor, length: int, stride: int) -> float:
    """The strided loop with labels of -100, one window at a time, on transformers' own loss."""
    total, count, done = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + length, len(ids))
        labels = ids[start:end].clone()
        labels[: max(0, done - start)] = -100
        labels[0] = -100  # nothing before it
        wanted = int((labels != -100).sum())
        if wanted:
            with torch.no_grad():
                loss = model(input_ids=ids[None, start:end], labels=labels[None]).loss
            total, count = total + float(loss) * wanted, count + wanted
        done = end
        if end == len(ids):
            break
    return math.exp(total / count)


@pytest.mark.parametrize("stride", [None, 5, 16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_is_what_transformers_own_loss_gives(make: Any, stride: int | None, tokenizer: Any) -> None:
    model = make().eval()
    text = words(77)
    found = perplexity(model, tokenizer, text, length=16, stride=stride, batch_size=3, progress=False)
    expected = by_transformers(model, text_ids(tokenizer, text), 16, stride or 16)
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.windows == len(found.window_nll) == len(found.window_tokens)
    assert found.tokens == sum(found.window_tokens) == (76 if stride == 5 else 77 - 5)
    assert found.value == pytest.approx(math.exp(sum(found.window_nll) / found.tokens))


def test_one_batch_of_windows_is_seen_at_a_time_and_batches_change_nothing(tokenizer: Any) -> None:
    model = tiny_llama()
    seen: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = [
        perplexity(model, tokenizer, words(70), length=16, batch_size=size, progress=False).window_nll
        for size in (1, 2, 64)
    ]
    hook.remove()
    assert seen == [(1, 16)] * 4 + [(1, 6), (2, 16), (2, 16), (1, 6), (4, 16), (1, 6)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_rows_are_joined_by_blank_lines_and_a_text_is_taken_as_it_is(tokenizer: Any) -> None:
    seen = []

    def spy(text: str, **_: Any) -> dict[str, list[int]]:
        seen.append(text)
        return {"input_ids": [3, 4, 5]}

    assert text_ids(spy, ["a", "", "b"]).tolist() == [3, 4, 5]  # type: ignore[arg-type]
    assert text_ids(spy, "a b", 2).tolist() == [3, 4]  # type: ignore[arg-type]
    assert seen == ["a\n\n\n\nb", "a b"]


def test_the_model_is_put_back_as_it_was(tokenizer: Any) -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    values = {perplexity(model, tokenizer, words(40), length=16, progress=False).value for _ in range(2)}
    assert len(values) == 1  # no dropout
    assert model.training


def test_a_quantized_model_is_measured_too(tokenizer: Any) -> None:
    model = tiny_llama(tie_word_embeddings=False).eval()
    quantized = quantize_dynamic(model, progress=False)
    before, after = (perplexity(m, tokenizer, words(300), length=32, progress=False) for m in (model, quantized))
    assert after.value != before.value
    assert after.value == pytest.approx(before.value, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 33}, r"`length` is 33; allowed for LlamaForCausalLM: 2 to 32 tokens"),
        ({"length": 1}, r"`length` is 1; allowed"),
        ({"length": 16, "stride": 17}, r"`stride` is 17; allowed: 1 to `length` \(16\)"),
        ({"length": 16, "stride": 0}, r"`stride` is 0"),
        ({"length": 16, "batch_size": 0}, r"`batch_size` is 0"),
        ({"length": 16, "max_tokens": 1}, r"`max_tokens` is 1; allowed: 2 or more"),
        ({"length": 16, "texts": []}, r"hold 0 tokens; perplexity needs two or more"),
        ({"length": 16, "texts": "w5"}, r"hold 1 token; perplexity needs two or more"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, tokenizer: Any) -> None:
    options = {"texts": words(40), "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_llama(), tokenizer, options.pop("texts"), **options)


def test_what_is_no_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TypeError, match=r"row 1 holds 7, which is not text"):
        perplexity(tiny_llama(), tokenizer, ["w5", 7], length=8)  # type: ignore[list-item]


def test_models_that_do_not_predict_the_next_token_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"gives logits of shape \(3, 2\); needed: \(batch, length, vocabulary\)"):
        perplexity(tiny_bert(), tokenizer, words(24), length=8)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    with pytest.raises(ValueError, match="BertForMaskedLM is not a causal language model"):
        perplexity(BertForMaskedLM(config), tokenizer, words(24), length=8)


def test_nan_logits_are_refused_with_the_place(tokenizer: Any) -> None:
    model = tiny_llama().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[95] = math.nan  # tied: every logit row has one NaN
    with pytest.raises(ValueError, match=r"NaN or infinite logits for the tokens 0 to 7"):
        perplexity(model, tokenizer, words(24), length=8, progress=False)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"token id \d+, but LlamaForCausalLM knows 0 to 19 only"):
        perplexity(tiny_llama(vocab_size=20), tokenizer, words(24), length=8)


def made(nll: list[float], tokens: list[int]) -> Perplexity:
    return Perplexity(math.exp(sum(nll) / sum(tokens)), sum(tokens), tuple(nll), tuple(tokens))


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 9.0)), min_size=2, max_size=30), st.floats(-1.0, 1.0))
def test_a_loss_that_is_the_same_everywhere_has_no_width(rows: list[tuple[int, float]], rise: float) -> None:
    tokens = [count for count, _ in rows]
    before = made([count * nll for count, nll in rows], tokens)
    after = made([count * (nll + rise) for count, nll in rows], tokens)
    change, interval = perplexity_change(before, after, resamples=100)
    expected = math.expm1(rise)
    assert (change, interval.low, interval.high) == pytest.approx((expected,) * 3, abs=1e-9)


def test_the_interval_is_that_of_windows_drawn_one_by_one() -> None:
    rng = np.random.default_rng(3)
    tokens = [*[31] * 39, 7]
    before = made(list(rng.uniform(60, 120, 40)), tokens)
    after = made([nll + rise for nll, rise in zip(before.window_nll, rng.normal(0.5, 1.0, 40), strict=True)], tokens)
    change, interval = perplexity_change(before, after, seed=1)
    drawn = []
    for _ in range(6_000):
        rows = rng.integers(0, 40, 40)
        count = sum(tokens[row] for row in rows)
        values = [sum(p.window_nll[row] for row in rows) / count for p in (before, after)]
        drawn.append(math.exp(values[1] - values[0]) - 1)
    assert (interval.low, interval.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1.2e-3)
    assert change == pytest.approx(after.value / before.value - 1)
    assert perplexity_change(before, after, seed=1) == (change, interval)


def test_one_window_has_no_interval_and_other_windows_no_change() -> None:
    one = made([3.0], [2])
    change, interval = perplexity_change(one, made([4.0], [2]))
    assert change == pytest.approx(math.expm1(0.5))
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    with pytest.raises(ValueError, match=r"different windows \(1 of 2 tokens, 2 of 4\)"):
        perplexity_change(one, made([3.0, 3.0], [2, 2]))


def test_a_broken_model_is_infinitely_surprised() -> None:
    change, interval = perplexity_change(made([3.0, 2.0], [2, 2]), Perplexity(math.inf, 4, (4e3, 4e3), (2, 2)))
    assert change == math.inf
    assert 1e300 < interval.low <= interval.high < math.inf


def test_texts_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one\n\ntwo\n"]
    Dataset.from_dict({"text": ["x", ""], "title": ["y", "z"]}).to_parquet(str(tmp_path / "b.parquet"))
    assert read_texts(tmp_path / "b.parquet") == ["x", ""]
    Dataset.from_dict({"body": ["x"], "stars": [1]}).to_parquet(str(tmp_path / "c.parquet"))
    assert read_texts(tmp_path / "c.parquet") == ["x"]
    Dataset.from_dict({"one": ["x"], "two": ["y"]}).to_parquet(str(tmp_path / "d.parquet"))
    with pytest.raises(ValueError, match=r"has the text columns \['one', 'two'\]; needed: one named 'text'"):
        read_texts(tmp_path / "d.parquet")
    with pytest.raises(FileNotFoundError, match="no text file"):
        read_texts(tmp_path / "e.txt")
