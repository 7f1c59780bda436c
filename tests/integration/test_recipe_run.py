"""`hf-quant run`'s work on tiny real models: from files to a saved, reloaded, compared int8 model."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_quant import Recipe, load_quantized
from hf_quant.recipe.data import load_labels, load_rows, tokenize
from hf_quant.recipe.run import _require_same_recipe, run
from hf_quant.recipe.sections import Hub
from hf_quant.recipe.source import RecipeError
from hf_quant.runtime.modules import Int8Linear
from tests.reviews import LENGTH, read_recipe, rows, write_files, write_model, write_recipe, write_rows
from tests.tiny import folder_bytes

REPOSITORY = Path(__file__).resolve().parents[2]
GLUE = REPOSITORY.parent / "shared" / "data" / "glue"


def record() -> Console:
    """A console that keeps what it prints."""
    return Console(record=True, width=400, file=open(os.devnull, "w"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a whole run of two trainings and a comparison, and what was printed."""
    folder = write_files(tmp_path_factory.mktemp("run"))
    console = record()
    training = {"save_strategy": "steps", "save_steps": 4}
    recipe = read_recipe(folder, evaluation={"baseline": "train"}, training=training)
    result = run(recipe, console=console)
    assert result.report == folder / "out" / "report.html"
    return folder, console.export_text()


def test_a_run_leaves_models_recipe_report_and_checkpoints(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == {
        *("checkpoints", "float", "int8", "recipe.yaml", "report.html", "report.json", "report.md"),
    }
    assert {path.name for path in (out / "checkpoints" / "int8").iterdir()} == {"checkpoint-4", "checkpoint-8"}
    wanted = Recipe.from_yaml(folder / "recipe.yaml")
    for place in (out, out / "int8", out / "float"):
        assert Recipe.from_yaml(place / "recipe.yaml") == wanted
    assert not list(out.glob("*/*.bin")), "no pickles beside the weights"

    int8 = load_quantized(out / "int8")
    assert sum(isinstance(module, Int8Linear) for module in int8.modules()) == 13
    assert isinstance(int8.classifier, torch.nn.Linear)
    assert not isinstance(int8.classifier, Int8Linear)
    plain = AutoModelForSequenceClassification.from_pretrained(out / "float")
    assert plain.dtype == torch.float32
    assert not any(isinstance(module, Int8Linear) for module in plain.modules())
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["int8_model"]["name"] == str(out / "int8")
    assert report["splits"][0]["split"] == "validation"
    assert report["splits"][0]["rows"] == 24
    assert f"report: {out / 'report.html'}" in printed
    assert "training in float32 (the recipe asks for nothing else)" in printed
    assert "new weights, to be trained: classifier.bias, classifier.weight" in printed


def test_the_float_twin_differs_from_the_first_step_with_fake_quant_on(finished: tuple[Path, str]) -> None:
    losses: dict[str, list[str]] = {"int8": [], "float": []}
    for name, loss in re.findall(r"^(int8|float) step \d+/8 {2}loss (\S+)", finished[1], re.MULTILINE):
        losses[name].append(loss)
    assert len(losses["int8"]) == len(losses["float"]) == 8
    # Same head, order and dropout: equal until fake-quant starts at step 4, and not for ever.
    assert losses["int8"][:4] == losses["float"][:4]
    assert losses["int8"][4:] != losses["float"][4:]


def test_resume_goes_on_from_a_checkpoint_and_keeps_what_is_finished(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = finished
    moved = shutil.copytree(folder / "out", tmp_path / "moved")
    before = folder_bytes(moved / "int8")
    float_before = (moved / "float" / "model.safetensors").stat().st_mtime_ns
    # As if the run had died between its second checkpoint and its end.
    shutil.rmtree(moved / "int8")
    shutil.rmtree(moved / "checkpoints" / "int8" / "checkpoint-8")
    console = record()
    recipe = dataclasses.replace(Recipe.from_yaml(folder / "recipe.yaml"), output=str(moved))
    run(recipe, resume=True, console=console)
    printed = console.export_text()
    assert f"resuming from {moved / 'checkpoints' / 'int8' / 'checkpoint-4'}" in printed
    assert "int8 step 4/8" not in printed
    assert "int8 step 5/8" in printed
    assert f"kept the float model in {moved / 'float'}" in printed
    after = folder_bytes(moved / "int8")
    assert after["model.safetensors"] == before["model.safetensors"]
    assert (moved / "float" / "model.safetensors").stat().st_mtime_ns == float_before


def test_resume_of_another_recipe_is_refused(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    other = dataclasses.replace(Recipe.from_yaml(folder / "recipe.yaml"), seed=7, output=str(folder / "out"))
    before = folder_bytes(folder / "out")
    with pytest.raises(ValueError, match=r"holds the run of another recipe: `seed` differ"):
        run(other, resume=True)
    assert folder_bytes(folder / "out") == before
    # Where an upload was refused, another repository is no other run.
    _require_same_recipe(dataclasses.replace(other, seed=42, hub=Hub(repo_id="me/other")), folder / "out")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no recipe\.yaml, so there is no run to resume"):
        run(dataclasses.replace(other, output=str(tmp_path)), resume=True)


def test_a_folder_with_something_in_it_is_refused_and_overwrite_keeps_the_rest(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    out = tmp_path / "out"
    (out / "checkpoints" / "int8" / "checkpoint-99").mkdir(parents=True)
    (out / "thesis.txt").write_text("mine")
    recipe = read_recipe(folder, training={"max_steps": 4})
    before = folder_bytes(tmp_path)
    with pytest.raises(FileExistsError, match=r"out is not empty.*`--overwrite`"):
        run(recipe)
    assert folder_bytes(tmp_path) == before
    console = record()
    result = run(recipe, overwrite=True, console=console)
    assert (out / "thesis.txt").read_text() == "mine"
    assert not (out / "checkpoints" / "int8" / "checkpoint-99").exists()
    assert (result.float_model, result.report, result.comparison) == (None, None, None)
    assert re.search(r"^int8 step 4/4 {2}eval_loss \S+ {2}eval_accuracy", console.export_text(), re.MULTILINE)
    run(recipe, resume=True, console=console)
    assert f"kept the int8 model in {out / 'int8'}" in console.export_text()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"train": "nowhere.csv"}}, r"recipe\.yaml:4:12: There is no data file nowhere\.csv"),
        ({"data": {"text_columns": ["txt"]}}, r":7:4: the train data have no column `txt`; did you mean `text`\?"),
        ({"data": {"label_column": "lable"}}, r": the validation data have no column `lable`; did you mean `label`"),
        ({"data": {"num_labels": 3, "train": "words.jsonl"}}, r":\d+:\d+: the data have 2 classes \(bad, good\), but"),
        ({"data": {"train": "holes.jsonl"}}, r":4:12: train data: .*row 1 of the text column 'text' holds None"),
        (
            {"data": {"validation": "holes.jsonl", "label_column": "maybe"}},
            r":5:17: validation data: .*row 1.*missing",
        ),
        ({"data": {"max_length": 4096}}, r"`max_length` is 4096; allowed for these models: 1 to 32"),
        ({"model": "no/such/model"}, r":2:11: no/such/model is no folder \(relative paths start from /"),
        ({"model": "empty"}, r":2:11: .*empty has no config\.json"),
        ({"model": "headless"}, r":2:11: `model`: .* lacks \d+ weights of BertForSequenceClassification"),
        ({"evaluation": {"baseline": "trian"}}, r"`baseline` must be `train`, `none` or .*; did you mean `train`\?"),
        ({"quantization": {"ignore": ["nothing.*"]}}, r"`quantization`: .*'?nothing\.\*"),
        (
            {"training": {"load_best_model_at_end": True, "save_strategy": "epoch"}},
            r"TrainingArguments refuses the `training` section",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str
) -> None:
    folder = write_files(tmp_path)
    write_rows(folder / "words.jsonl", [{"text": "a film", "label": word} for word in ("good", "bad")])
    write_rows(
        folder / "holes.jsonl",
        [{"text": "a", "label": 0, "maybe": 1}, {"text": None, "label": 1, "maybe": None}],
    )
    (folder / "empty").mkdir()
    shutil.copytree(folder / "model", folder / "headless")
    _forget_weights(folder / "headless")
    monkeypatch.chdir(folder)
    if "maybe" in str(changes):
        write_rows(folder / "train.jsonl", [{**row, "maybe": row["label"]} for row in rows(8)])
    path = write_recipe(folder, **changes)
    before = folder_bytes(folder)
    with pytest.raises(RecipeError, match=expected):
        run(Recipe.from_yaml(path))
    assert folder_bytes(folder) == before


def _forget_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    kept = dict(list(load_file(folder / "model.safetensors").items())[:3])
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_several_mistakes_come_together(tmp_path: Path) -> None:
    recipe = read_recipe(write_files(tmp_path), model="no/such/model", data={"train": "a.csv", "validation": "b.csv"})
    with pytest.raises(RecipeError) as caught:
        run(recipe)
    assert len(caught.value.problems) == 3


def test_class_names_pairs_and_regression(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    words = [{"a": row["text"], "b": "the plot", "label": ("bad", "good")[row["label"]]} for row in rows(24)]
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", words)
    run(read_recipe(folder, data={"text_columns": ["a", "b"]}, output=str(folder / "names")), console=record())
    model = load_quantized(folder / "names" / "int8")
    assert model.config.id2label == {0: "bad", 1: "good"}

    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", [{**row, "label": row["label"] * 2.5} for row in rows(24)])
    console = record()
    run(read_recipe(folder, data={"problem_type": "regression"}, output=str(folder / "number")), console=console)
    assert load_quantized(folder / "number" / "int8").config.num_labels == 1
    assert "eval_pearsonr" in console.export_text()


def test_labels_follow_the_numbering_of_the_model(tmp_path: Path) -> None:
    # A model that calls its classes as the data do, in another order, keeps its order.
    folder = write_files(tmp_path)
    names = {0: "good", 1: "bad"}
    write_model(folder / "model", head=True, id2label=names, label2id={"good": 0, "bad": 1})
    for split in ("train", "validation"):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
        )
        values = {"text": ["a good film", "a bad film"], "label": [1, 0]}
        datasets.Dataset.from_dict(values, features=features).to_parquet(folder / f"{split}.parquet")
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation")}
    recipe = read_recipe(folder, data=files)
    task = recipe.to_task()
    model = AutoModelForSequenceClassification.from_pretrained(recipe.model)
    splits = load_rows(recipe, task)
    labels = load_labels(recipe, task, splits, model.config)
    assert labels["train"].tolist() == [0, 1]
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    encoded = tokenize(recipe, task, splits, labels, tokenizer, LENGTH)
    assert encoded["train"]["labels"][:] == [0, 1]
    assert tokenizer.decode(encoded["train"][0]["input_ids"]) == "[CLS] a good film [SEP]"


def test_baseline_in_a_folder(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    recipe = read_recipe(folder, training={"max_steps": 4}, output=str(tmp_path / "out"))
    baseline = str(folder / "out" / "float")
    recipe = dataclasses.replace(recipe, evaluation=dataclasses.replace(recipe.evaluation, baseline=baseline))
    result = run(recipe, console=record())
    assert result.comparison is not None
    assert result.comparison.float_model.name == baseline
    assert not (tmp_path / "out" / "float").exists()


def test_a_task_with_its_files_in_a_folder(tmp_path: Path) -> None:
    if not GLUE.is_dir():
        pytest.skip("needs ../shared/data/glue")
    folder = write_files(tmp_path)
    recipe = read_recipe(
        folder,
        task="mrpc",
        data=None,
        training={"max_steps": 3, "per_device_train_batch_size": 2},
        evaluation={"baseline": "train", "max_samples": 24},
    )
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, data_dir=str(GLUE)))
    comparison = run(recipe, console=record()).comparison
    assert comparison is not None
    assert (comparison.task, comparison.headline) == ("mrpc", "f1")
    (split,) = comparison.splits
    assert (split.split, split.samples, split.rows) == ("validation", 24, 408)


def test_reload_check_script(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    values = rows(24, seed=1)
    columns = {name: [row[name] for row in values] for name in ("text", "label")}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "validation.parquet")
    script = REPOSITORY / "scripts" / "reload_check.py"
    command = [sys.executable, str(script), str(folder / "out" / "int8"), str(tmp_path / "validation.parquet")]
    command += ["--max-length", str(LENGTH)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    accuracy = report["splits"][0]["metrics"][0]["int8_value"]
    assert re.findall(r"accuracy (\S+)", done.stdout) == [f"{accuracy:.4f}"] * 2
    assert "changed predictions 0.00%" in done.stdout


@pytest.mark.parametrize("hidden", [False, True])
def test_progress_bars_on_a_terminal(tmp_path: Path, hidden: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    training = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "disable_tqdm": hidden}
    run(read_recipe(write_files(tmp_path), training=training), console=console)
    shown = screen.getvalue()
    assert "int8 step 4/4" in shown
    for bar in ("training int8 \x1b", "  evaluating"):
        assert (bar in shown) is not hidden, bar
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h"), "the cursor comes back"


def test_the_bar_goes_when_training_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("transformers.Trainer.training_step", stop)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(read_recipe(write_files(tmp_path)), console=console)
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") > 0
    assert not (tmp_path / "out" / "int8").exists()


def test_a_recipe_prunes_shrinks_quantizes_and_compares(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    neurons = {"structure": "neuron", "final_sparsity": 0.5, "uniform": True, "shrink": True}
    heads = {"structure": "head", "final_sparsity": 0.5, "scope": "layer"}
    steps = {"start_step": 1, "end_step": 4}
    pruning = [{**neurons, **steps}, {**heads, **steps}]
    recipe = read_recipe(folder, pruning=pruning, evaluation={"baseline": "train"})
    result = run(recipe, console=record())
    int8 = load_quantized(result.int8_model)
    dense = AutoModelForSequenceClassification.from_pretrained(result.float_model)
    assert int8.config.intermediate_size == dense.config.intermediate_size // 2
    assert Recipe.from_yaml(result.int8_model / "recipe.yaml") == recipe
    assert result.comparison is not None
    for index in (1, 2):
        assert "<svg" in (folder / "out" / f"pruning-{index}.html").read_text(encoding="utf-8")


def test_a_recipe_that_cannot_shrink_says_so_before_training(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    recipe = read_recipe(folder, pruning={"structure": "neuron", "final_sparsity": 0.5, "shrink": True})
    with pytest.raises(RecipeError, match=r"`pruning`: `shrink=True` with scope 'global' leaves each layer another"):
        run(recipe, console=record())
    assert not (folder / "out").exists()
    recipe = read_recipe(folder, pruning=[{"final_sparsity": 0.5}, {"final_sparsity": 0.5, "targets": ["*.qery"]}])
    with pytest.raises(RecipeError, match=r"`pruning\[1\]`: pattern '\*.qery' in `targets` matches no module"):
        run(recipe, console=record())
