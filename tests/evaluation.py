"""Tiny tokenizers, labelled texts and ready-made reports for the tests of the evaluation."""

from __future__ import annotations

import math

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_quant.evaluation.report import Comparison
from hf_quant.evaluation.results import (
    Agreement,
    Interval,
    Latency,
    Machine,
    MetricResult,
    ModelInfo,
    ModelSize,
    SplitResult,
)

from .tiny import VOCAB

WORDS = [f"w{i}" for i in range(VOCAB - 4)]


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One id a word; texts begin with [CLS] and end with [SEP]."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*names, *WORDS])}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", **special}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{k: v for k, v in tokens.items() if v})


def sentences(count: int = 48, columns: tuple[str, ...] = ("text",), seed: int = 0) -> dict[str, list[str]]:
    rng = np.random.default_rng(seed)
    return {name: [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(count)] for name in columns}


def labelled(count: int = 48, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed + 1)
    return Dataset.from_dict({**sentences(count, seed=seed), "label": rng.integers(0, 2, count).tolist()})


def by_hand(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Logits one text at a time: no batches, no padding, no sorting."""
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in texts]
    return np.stack(rows)


EVIL = '<script>alert("x")</script>&|`'


def metric(
    name: str = "f1", before: float = 0.8946, after: float = 0.8910, low: float = -0.0172, high: float = 0.0098
) -> MetricResult:
    return MetricResult(name, before, after, Interval(low, high))


def comparison(**changes: object) -> Comparison:
    accuracy = metric("accuracy", 0.8505, 0.8480, -0.0196, 0.0147)
    fields = {
        "task": "mrpc",
        "problem_type": "single_label_classification",
        "headline": "f1",
        "float_model": ModelInfo("me/bert", "Bert", "float32", 0, ModelSize(95_400_000, 340_000_000, 2_700_000)),
        "int8_model": ModelInfo(
            "bert-int8", "Bert", "float32", 2, ModelSize(24_100_000, 85_700_000, 2_700_000, 112_600_000)
        ),
        "splits": (SplitResult("validation", 408, 408, (accuracy, metric()), Agreement(10, 10 / 408, 4, 6, 0.754)),),
        "confidence": 0.95,
        "resamples": 10_000,
        "seed": 0,
        "max_length": 512,
        "latency": Latency(1, 128, 2, 100, 190.3, 221.9, 103.4, 118.0, 1.83),
        "layer_sqnr": {"encoder.0.dense": 31.44, "embeddings": math.inf, "encoder.1.dense": 28.96},
        "machine": Machine("A CPU", "cpu", 2),
        "versions": {"hf_quant": "0.1.0", "python": "3.11"},
    }
    return Comparison(**{**fields, **changes})  # type: ignore[arg-type]


def with_metric(found: MetricResult, samples: int = 408, **changes: object) -> Comparison:
    return comparison(headline=found.name, splits=(SplitResult("validation", samples, samples, (found,)),), **changes)
