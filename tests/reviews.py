"""A tiny model with its tokenizer, and labelled sentences, as files for recipes and the command line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

from hf_quant.recipe.schema import Recipe

GOOD, BAD = ("good", "great", "fun"), ("bad", "awful", "boring")
WORDS = ("the", "a", "was", "film", "plot", *GOOD, *BAD)
LENGTH = 32

SIZES = {
    "vocab_size": 5 + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": LENGTH,
}


def write_model(folder: Path, head: bool = False, **config: Any) -> Path:
    """A folder with a tiny BERT, without a head unless asked for, and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=LENGTH).save_pretrained(folder)
    kind = BertForSequenceClassification if head else BertModel
    kind(BertConfig(**SIZES, **config)).save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences with one good or bad word in them, which is their label."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        label = draw.randrange(2)
        words = [draw.choice(WORDS[:5]) for _ in range(draw.randint(2, 8))]
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if label else BAD))
        made.append({"text": " ".join(words), "label": label})
    return made


def write_rows(path: Path, values: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n", encoding="utf-8")
    return path


def write_files(folder: Path) -> Path:
    """`model/`, `train.jsonl` and `validation.jsonl` in a folder."""
    write_model(folder / "model")
    write_rows(folder / "train.jsonl", rows(32))
    write_rows(folder / "validation.jsonl", rows(24, seed=1))
    return folder


def write_recipe(folder: Path, **changes: Any) -> Path:
    """`recipe.yaml` for the files of [`write_files`]; `changes` replace or add values within sections.

    `data={"train": "x"}` changes one value, `data=None` removes the section, `seed=1` sets a top-level value.
    """
    values: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "text_columns": ["text"],
        },
        "training": {
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "dataloader_pin_memory": False,
        },
        "quantization": {"scheme": "int8_static", "start_step": 0.5, "freeze_step": 0.9},
        "evaluation": {"baseline": "none"},
        "output": str(folder / "out"),
    }
    for key, change in changes.items():
        if isinstance(change, dict) and isinstance(values.get(key), dict):
            values[key] = {name: value for name, value in {**values[key], **change}.items() if value is not None}
        else:
            values[key] = change
    path = folder / "recipe.yaml"
    # JSON is YAML, and a test that needs a certain line writes its own text.
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}, indent=1))
    return path


def read_recipe(folder: Path, **changes: Any) -> Recipe:
    """The recipe of [`write_recipe`]."""
    return Recipe.from_yaml(write_recipe(folder, **changes))
