"""Tiny models and files for recipes on tags, questions and running text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.reviews import BAD, GOOD, WORDS, write_model, write_recipe, write_rows
from tests.tiny import tiny_llama, tiny_tokenizer

NAMES = ("B-BAD", "B-GOOD", "I-GOOD", "O")


def tagged_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences in which good and bad words are entities; two good ones in a row are one."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(3, 9))]
        tags: list[str] = []
        for word in words:
            inside = bool(tags) and tags[-1].endswith("GOOD")
            tags.append("B-BAD" if word in BAD else "O" if word not in GOOD else "I-GOOD" if inside else "B-GOOD")
        made.append({"words": words, "tags": tags})
    # All tags are there, whatever was drawn.
    return [{"words": ["good", "fun", "bad", "film"], "tags": ["B-GOOD", "I-GOOD", "B-BAD", "O"]}, *made[1:]]


def asked_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Reviews in which the one good word answers the question; some have none, and some are longer than a window."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        words = [draw.choice(WORDS[:5]) for _ in range(draw.choice((6, 40)))]
        answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
        if index % 4:
            place, word = draw.randrange(len(words)), draw.choice(GOOD)
            words[place] = word
            answers = {"text": [word], "answer_start": [len(" ".join([*words[:place], ""]))]}
        made.append({"question": "was the film good", "context": " ".join(words), "answers": answers})
    return made


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts in which each word says which one comes next."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        start = draw.randrange(3, 90)
        made.append({"text": " ".join(f"w{3 + (start + 2 * step) % 90}" for step in range(draw.randint(5, 30)))})
    return made


def write_kind(folder: Path, kind: str) -> Path:
    """`model/`, `train.jsonl` and `validation.jsonl` of a kind of problem in a folder."""
    if kind == "causal_lm":
        folder.mkdir(parents=True, exist_ok=True)
        tiny_llama().save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
    else:
        write_model(folder / "model")
    rows = {"token_classification": tagged_rows, "question_answering": asked_rows, "causal_lm": text_rows}[kind]
    write_rows(folder / "train.jsonl", rows(48))
    write_rows(folder / "validation.jsonl", rows(24, seed=1))
    return folder


def kind_recipe(folder: Path, kind: str, **changes: Any) -> Path:
    """`recipe.yaml` for the files of [`write_kind`]; `changes` as those of `write_recipe`."""
    columns: dict[str, dict[str, Any]] = {
        "token_classification": {"text_columns": ["words"], "label_column": "tags"},
        "question_answering": {"text_columns": ["question", "context"], "label_column": "answers"},
        "causal_lm": {"text_columns": ["text"], "max_length": 16},
    }
    data = {**columns[kind], "problem_type": kind, **changes.pop("data", {})}
    return write_recipe(folder, data=data, **changes)
