"""Recipes beyond one label a text: tags, questions, language models; and models that stay in float."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_quant import Recipe, compare, load_quantized, perplexity
from hf_quant.evaluation.evaluator import task_evaluator
from hf_quant.evaluation.report import Comparison
from hf_quant.evaluation.sweep_report import Sweep
from hf_quant.evaluation.tasks import Task
from hf_quant.recipe.prepare import prepare
from hf_quant.recipe.run import RunResult, run
from hf_quant.recipe.source import RecipeError
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.packed import PackedLinear
from tests.kinds import NAMES, kind_recipe, tagged_rows, write_kind
from tests.reviews import WORDS, read_recipe, write_files, write_rows
from tests.tiny import tiny_bert, tiny_tokenizer


def record() -> Console:
    """A console that keeps what it prints."""
    return Console(record=True, width=400, file=open(os.devnull, "w"))


def carry_out(folder: Path, kind: str, **changes: Any) -> tuple[RunResult, str, Recipe]:
    recipe = Recipe.from_yaml(kind_recipe(write_kind(folder, kind), kind, **changes))
    console = record()
    return run(recipe, console=console), console.export_text(), recipe


TAGS = Task("tags", ("words",), "tags", problem_type="token_classification")
LONGER = {"max_steps": 40, "eval_strategy": "steps", "eval_steps": 20, "logging_steps": 20}


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, str, Recipe]:
    folder = tmp_path_factory.mktemp("tagged")
    data = {"metrics": ["entity_f1", "token_accuracy"]}
    return carry_out(folder, "token_classification", data=data, training=LONGER, evaluation={"baseline": "train"})


def test_a_tagger_is_trained_made_int8_and_compared(tagged: tuple[RunResult, str, Recipe]) -> None:
    result, printed, _ = tagged
    found = result.comparison
    assert isinstance(found, Comparison)
    assert (found.headline, found.splits[0].samples) == ("entity_f1", 24)
    f1, accuracy = found.splits[0].metrics
    assert f1.float_value > 0.7
    assert accuracy.float_value > 0.85
    assert f1.interval.low <= f1.delta <= f1.interval.high
    assert found.splits[0].agreement is not None
    int8 = load_quantized(result.int8_model)
    assert type(int8).__name__ == "BertForTokenClassification"
    assert list(int8.config.id2label.values()) == list(NAMES)
    plain = AutoModelForTokenClassification.from_pretrained(result.float_model)
    assert plain.config.label2id["I-GOOD"] == 2
    assert "entity F1" in (result.int8_model.parent / "report.md").read_text(encoding="utf-8")
    # The Trainer's own evaluation counts the same: nothing is cut here.
    last = re.findall(r"^float step 40/40 .*eval_entity_f1 (\S+)", printed, re.MULTILINE)[-1]
    assert float(last) == pytest.approx(f1.float_value, abs=1e-3)


def test_compare_takes_a_tagger_and_counts_what_the_model_says(tagged: tuple[RunResult, str, Recipe]) -> None:
    result, _, recipe = tagged
    assert result.float_model is not None
    given: dict[str, Any] = {"data": recipe.data.validation, "latency_batch_size": None, "progress": False}
    found = compare(str(result.float_model), str(result.int8_model), task=TAGS, resamples=200, **given)
    model = AutoModelForTokenClassification.from_pretrained(result.float_model).eval()
    right = total = 0
    for row in tagged_rows(24, seed=1):
        ids = torch.tensor([[2, *(5 + WORDS.index(word) for word in row["words"]), 3]])  # [CLS], words, [SEP]
        best = model(input_ids=ids).logits[0, 1:-1].argmax(-1)
        right += sum(NAMES[tag] == true for tag, true in zip(best.tolist(), row["tags"], strict=True))
        total += len(row["tags"])
    assert found.splits[0].metrics[0].float_value == pytest.approx(right / total)
    assert Comparison.from_json(found.to_json()) == found


def test_questions_are_answered_in_windows(tmp_path: Path) -> None:
    training = {**LONGER, "max_steps": 60}
    result, printed, _ = carry_out(tmp_path, "question_answering", training=training, evaluation={"baseline": "train"})
    found = result.comparison
    assert isinstance(found, Comparison)
    exact, f1 = found.splits[0].metrics
    assert (exact.name, f1.name, found.splits[0].samples) == ("exact_match", "token_f1", 24)
    assert f1.float_value >= exact.float_value > 0.9
    assert re.search(r"training int8 on (\d+) examples", printed)[1] > "48"  # type: ignore[index]
    last = re.findall(r"^float step 60/60 .*eval_exact_match (\S+)", printed, re.MULTILINE)[-1]
    assert float(last) == pytest.approx(exact.float_value, abs=1e-3)
    assert type(load_quantized(result.int8_model)).__name__ == "BertForQuestionAnswering"
    assert AutoModelForQuestionAnswering.from_pretrained(result.float_model).config.num_labels == 2


def test_a_language_model_is_trained_in_int4_and_its_perplexity_compared(tmp_path: Path) -> None:
    result, printed, recipe = carry_out(
        tmp_path,
        "causal_lm",
        training=LONGER,
        quantization={"scheme": "int4_weight_only", "start_step": 0, "freeze_step": 0.9},
        evaluation={"baseline": "train"},
    )
    found = result.comparison
    assert isinstance(found, Sweep)
    assert result.float_model is not None
    model = load_quantized(result.int8_model)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 12
    texts = [json.loads(line)["text"] for line in Path(recipe.data.validation or "").read_text().splitlines()]
    for side, folder in (("float", result.float_model), ("quantized", result.int8_model)):
        one = AutoModelForCausalLM.from_pretrained(folder) if side == "float" else model
        value = perplexity(one, tiny_tokenizer(), texts, length=16, progress=False).value
        assert f"{value:.4g}"[:4] in found.to_markdown(), side
        assert value < 30, "an untrained one has about 100"
    assert "eval_loss" in printed
    assert (tmp_path / "out" / "report.html").is_file()


def test_texts_are_packed_into_whole_windows(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(kind_recipe(write_kind(tmp_path, "causal_lm"), "causal_lm"))
    prepared = prepare(recipe)
    rows = prepared.encoded["train"]
    assert np.asarray(rows["input_ids"][:]).shape == (len(rows), 16)
    assert rows["input_ids"][:] == rows["labels"][:]
    texts = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    ids = tiny_tokenizer()("\n\n".join(texts))["input_ids"]
    assert [token for row in rows["input_ids"][:] for token in row] == ids[: len(ids) // 16 * 16]
    longest = Recipe.from_yaml(kind_recipe(tmp_path, "causal_lm", data={"max_length": None}))
    assert prepare(longest).max_length == 32
    over = Recipe.from_yaml(kind_recipe(tmp_path, "causal_lm", data={"max_length": 33}))
    with pytest.raises(RecipeError, match=r"`data.max_length`: `length` is 33; allowed for LlamaForCausalLM: 2 to 32"):
        prepare(over)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("token_classification", {"num_labels": 3}, r"recipe\.yaml:\d+:\d+: the training data have 4 tags, but"),
        ("token_classification", {"label_column": "tegs"}, r"have no column `tegs`.*did you mean `tags`"),
        ("token_classification", {"text_columns": ["words", "tags"]}, "must name one column of lists of words; got 2"),
        ("question_answering", {"metrics": ["f1"]}, "unknown metric 'f1' for question_answering"),
        ("question_answering", {"max_length": 8}, "train data: `max_length` is 8; question and context need 16"),
        ("causal_lm", {"label_column": "text"}, "trained on the text alone; remove `label_column`"),
        ("causal_lm", {"problem_type": "causal"}, "did you mean `causal_lm`"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, kind: str, data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare(Recipe.from_yaml(kind_recipe(write_kind(tmp_path, kind), kind, data=data)))
    assert not (tmp_path / "out").exists()


def test_tags_of_the_validation_data_that_were_never_trained_are_refused(tmp_path: Path) -> None:
    path = kind_recipe(write_kind(tmp_path, "token_classification"), "token_classification")
    write_rows(tmp_path / "validation.jsonl", [{"words": ["good"], "tags": ["B-GOD"]}])
    with pytest.raises(RecipeError, match=r"validation data: .* the tag 'B-GOD'.*B-GOOD"):
        prepare(Recipe.from_yaml(path))


def test_compare_points_language_models_to_their_own_report() -> None:
    with pytest.raises(ValueError, match=r"call hf_quant\.compare_perplexity"):
        compare("a", "b", task=Task("texts", ("text",), problem_type="causal_lm"), data="x.csv")


def test_schemes_are_not_compared_on_tags() -> None:
    with pytest.raises(ValueError, match=r"is of token_classification; several schemes .* Measure one model with"):
        task_evaluator(tiny_bert(), task=TAGS, data="x.jsonl", processing_class=tiny_tokenizer())


def test_a_finished_model_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, Any, Any]] = []

    class Hub:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> SimpleNamespace:
            done.append((repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            assert (folder_path / "recipe.yaml").is_file(), "it is finished"
            done.append((repo_id, folder_path, commit_message))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    recipe = read_recipe(write_files(tmp_path), training={"max_steps": 2}, hub={"repo_id": "me/reviews"})
    console = record()
    result = run(recipe, console=console)
    assert done == [("me/reviews", True, True), ("me/reviews", result.int8_model, "hf_quant: int8 model")]
    assert "to me/reviews" in console.export_text()


def test_without_quantization_the_model_stays_in_float(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    recipe = read_recipe(folder, quantization=None, pruning={"final_sparsity": 0.5}, evaluation={"baseline": "train"})
    console = record()
    result = run(recipe, console=console)
    assert result.int8_model == tmp_path / "out" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(result.int8_model)
    assert not quantized_modules(model)
    assert float((model.bert.encoder.layer[0].attention.self.query.weight == 0).float().mean()) > 0.2
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model", "float", "pruning.html", "report.json"}
    assert not (tmp_path / "out" / "int8").exists()
    assert (result.int8_model / "provenance.json").is_file()
    assert isinstance(result.comparison, Comparison)
    run(recipe, resume=True, console=console)
    assert f"kept {result.int8_model}" in console.export_text()


@pytest.mark.parametrize("baseline", ["train", "none"])
def test_the_float_twin_teaches_its_int8_version(tmp_path: Path, baseline: str) -> None:
    recipe = read_recipe(write_files(tmp_path), distillation={"hardness": 0.7}, evaluation={"baseline": baseline})
    console = record()
    result = run(recipe, console=console)
    printed = console.export_text()
    assert printed.index("training float") < printed.index("training int8")
    assert printed.count("training float on") == 1
    assert "distillation_loss" in printed
    assert (result.comparison is None) == (baseline == "none")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "float") is not None


def test_a_teacher_of_another_vocabulary_is_refused_before_training(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    recipe = read_recipe(folder, distillation={"teacher": str(tmp_path / "gone")})
    with pytest.raises(RecipeError, match=r"`distillation`: .*gone"):
        run(recipe, console=record())
    assert not (tmp_path / "out").exists()


def test_other_processes_print_nothing_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    monkeypatch.setattr(accelerate.PartialState, "is_main_process", property(lambda self: False))
    recipe = read_recipe(write_files(tmp_path), training={"max_steps": 2}, evaluation={"baseline": "train"})
    recipe = dataclasses.replace(recipe, output=str(tmp_path / "other"))
    console = record()
    assert run(recipe, console=console).comparison is None
    assert console.export_text() == ""
    assert not (tmp_path / "other" / "recipe.yaml").exists()
    assert not (tmp_path / "other" / "int8").exists()
