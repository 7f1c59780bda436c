"""What compare() is made of: tokenizers, batches, sizes and timing, on tiny real models."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from hf_quant import quantize_dynamic, save_quantized
from hf_quant.evaluation import latency
from hf_quant.evaluation.predict import batches, encode_texts, predict
from hf_quant.evaluation.sizes import model_size
from hf_quant.evaluation.tasks import Task
from hf_quant.texts import find_tokenizer, length_limit

from ..evaluation import WORDS, by_hand, labelled, make_tokenizer
from ..tiny import VOCAB, tiny_bert, tiny_gpt2, tiny_llama


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def pair() -> tuple[BertForSequenceClassification, BertForSequenceClassification]:
    model = tiny_bert().eval()
    return model, quantize_dynamic(model, progress=False)


@pytest.fixture(scope="module")
def folders(
    pair: tuple[BertForSequenceClassification, BertForSequenceClassification],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    pair[0].save_pretrained(root / "float")
    tokenizer.save_pretrained(root / "float")
    save_quantized(pair[1], root / "int8")
    return root / "float", root / "int8"


def test_tokenizer_is_found_in_the_order_that_is_promised(folders: tuple[Path, Path], tmp_path: Path) -> None:
    given = make_tokenizer()
    assert find_tokenizer(given, []) is given
    found = find_tokenizer(None, [None, "", folders[1], folders[0]])  # the int8 folder has none
    assert found("w5 w6")["input_ids"] == given("w5 w6")["input_ids"]
    assert find_tokenizer(str(folders[0]), [tmp_path]).name_or_path == str(folders[0])
    with pytest.raises(ValueError, match=r"Tried: .*nowhere \("):
        find_tokenizer(str(tmp_path / "nowhere"), [folders[0]])


def test_batches_are_sorted_by_length_and_hold_every_row_once(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_texts(labelled(), Task("t", ("text",)), tokenizer, 32)
    found = list(batches(encoded, tokenizer, 7))
    assert sorted(itertools.chain.from_iterable(rows for rows, _ in found)) == list(range(48))
    widths = [batch["input_ids"].shape[1] for _, batch in found]
    assert widths == sorted(widths, reverse=True)
    for rows, batch in found:
        for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
            assert ids[mask.bool()].tolist() == encoded[row]["input_ids"]


def test_predictions_do_not_depend_on_the_batch_size(pair: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_texts(labelled(), Task("t", ("text",)), tokenizer, 32)
    alone, together = (predict({"float": pair[0]}, encoded, tokenizer, size)["float"] for size in (1, 16))
    np.testing.assert_allclose(alone, together, atol=1e-5)
    np.testing.assert_allclose(alone, by_hand(pair[0], tokenizer, labelled()["text"][:]), atol=1e-5)


def test_texts_are_cut_at_the_limit(pair: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    assert length_limit(tokenizer, pair, None) == 32
    assert length_limit(tokenizer, pair, 16) == 16
    long = Dataset.from_dict({"text": [" ".join(WORDS)], "label": [0]})
    assert len(encode_texts(long, Task("t", ("text",)), tokenizer, 16)[0]["input_ids"]) == 16


def test_sizes_by_kind_are_those_of_the_shapes(pair: Any) -> None:
    # tiny_bert: vocabulary 96, 32 positions, 2 types, width 32, inner width 48, 2 layers, 2 labels.
    rows, width, inner, layers = VOCAB + 32 + 2, 32, 48, 2
    weights = layers * (4 * width * width + 2 * width * inner) + width * width + 2 * width
    biases = layers * (4 * width + inner + width) + width + 2
    norms = 2 * width * (1 + 2 * layers)
    before = model_size(pair[0])
    assert before.embeddings == 4 * rows * width
    assert before.linear == 4 * (weights + biases)
    assert before.rest == 4 * norms
    after = model_size(pair[1])
    head = 2 * width  # the classifier stays in float
    scales = layers * (4 * width + inner + width) + width
    assert after.embeddings == rows * width + 4 * rows
    assert after.linear == (weights - head) + 4 * (head + biases + scales)
    assert after.rest == before.rest
    assert after.total == after.embeddings + after.linear + after.rest


def test_tied_weights_count_once_with_the_embeddings() -> None:
    tied, apart = tiny_llama(), tiny_llama(tie_word_embeddings=False)
    head = 4 * VOCAB * 32
    assert model_size(apart).linear - model_size(tied).linear == head
    assert model_size(apart).embeddings == model_size(tied).embeddings == head
    # GPT-2's Conv1D is a linear layer.
    assert model_size(tiny_gpt2()).linear > 0
    assert model_size(tiny_gpt2()).rest < model_size(tiny_gpt2()).linear


def test_sharded_weights_are_counted_together(pair: Any, tmp_path: Path) -> None:
    pair[0].save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert model_size(pair[0], tmp_path).on_disk == sum(shard.stat().st_size for shard in shards)
    assert model_size(pair[0], tmp_path / "none").on_disk is None


def test_latency_interleaves_the_models_and_reports_percentiles(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock of our own: each float call takes a little longer than the last, int8 calls half of that.
    order: list[str] = []
    calls = {"float": 0, "int8": 0}

    def milliseconds(model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> float:
        name = "float" if model is pair[0] else "int8"
        order.append(name)
        calls[name] += 1
        return (10.0 + 0.1 * calls[name]) / (1 if name == "float" else 2)

    monkeypatch.setattr(latency, "_milliseconds", milliseconds)
    done: list[int] = []
    batch = latency.random_batch(VOCAB, 2, 8)
    found = latency.measure_latency(*pair, batch, progress=lambda: done.append(1))
    timed = order[2 * latency.WARMUP_CALLS :]
    assert found.calls == len(done) == timed.count("float") == timed.count("int8") == latency.MAX_CALLS
    assert all(set(timed[i : i + 2]) == {"float", "int8"} for i in range(0, len(timed), 2))
    assert timed[:4] == ["float", "int8", "int8", "float"]
    times = 10.0 + 0.1 * np.arange(latency.WARMUP_CALLS + 1, latency.WARMUP_CALLS + latency.MAX_CALLS + 1)
    assert (found.float_p50, found.float_p95) == pytest.approx(tuple(np.percentile(times, [50, 95])))
    assert found.int8_p50 == pytest.approx(np.median(times) / 2)
    assert found.speedup == 2.0
    assert (found.batch_size, found.length) == (2, 8)


def test_latency_stops_when_its_time_is_spent(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_milliseconds", lambda *_: 500.0)
    batch = latency.random_batch(VOCAB, 1, 4)
    assert latency.measure_latency(*pair, batch).calls == latency.MIN_CALLS
    monkeypatch.setattr(latency, "_milliseconds", lambda *_: 250.0)
    assert latency.measure_latency(*pair, batch).calls == 30  # 15 s / (2 x 250 ms)


def test_timed_tokens_are_random_between_the_special_ones_of_a_text() -> None:
    batch = latency.random_batch(50, 4, 9, special_ids={0, 1, 2, 3}, example=[2, 40, 3], seed=1)
    ids = batch["input_ids"]
    assert ids.shape == (4, 9)
    assert (ids[:, 0] == 2).all()
    assert (ids[:, -1] == 3).all()
    assert (ids[:, 1:-1] > 3).all()
    assert len(set(ids[:, 1:-1].flatten().tolist())) > 10
    assert batch["attention_mask"].all()
    plain = latency.random_batch(50, 1, 5, special_ids={0}, example=[7, 8])
    assert (plain["input_ids"] > 0).all()
    again = latency.random_batch(50, 4, 9, special_ids={0, 1, 2, 3}, example=[2, 40, 3], seed=1)
    assert torch.equal(again["input_ids"], ids)
