"""Recipes with `method: post_training`: trained once in float, then quantized as [`quantize`] does it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from hf_quant import Calibration, load_quantized, quantize
from hf_quant.checkpoint import save_quantized
from hf_quant.recipe.prepare import prepare
from hf_quant.recipe.run import run
from hf_quant.recipe.schema import Recipe
from hf_quant.recipe.source import RecipeError
from hf_quant.runtime.base import quantized_modules
from tests.kinds import kind_recipe, write_kind
from tests.reviews import read_recipe, write_files
from tests.tiny import folder_bytes

AFTER: dict[str, Any] = {"method": "post_training", "start_step": None, "freeze_step": None}
PRUNE = {"final_sparsity": 0.5, "start_step": 1, "end_step": 4, "frequency": 1}


def record() -> Console:
    """A console that keeps what it prints."""
    return Console(record=True, width=400, file=open(os.devnull, "w"))


def quantized(recipe: Recipe, folder: Path, beside: Path, samples: int = 128) -> bytes:
    """The weights of what `quantize` makes of a float folder on the recipe's calibration rows."""
    calibration = None
    assert recipe.quantization is not None
    if recipe.quantization.scheme == "int8_static":
        prepared = prepare(recipe)
        rows = prepared.encoded["train"].shuffle(seed=recipe.seed).select(range(samples))
        loader = DataLoader(rows, batch_size=8, collate_fn=prepared.trainer_options["data_collator"])
        calibration = Calibration(loader, samples=samples)
    model = quantize(str(folder), recipe.quantization.scheme, calibration, dtype=torch.float32)
    save_quantized(model, beside)
    return (beside / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, str]:
    """A folder with a whole static run, its recipe, and what was printed."""
    folder = write_files(tmp_path_factory.mktemp("after"))
    training = {"save_strategy": "steps", "save_steps": 4}
    scheme = {**AFTER, "calibration_samples": 5}
    recipe = read_recipe(folder, quantization=scheme, evaluation={"baseline": "train"}, training=training)
    console = record()
    result = run(recipe, console=console)
    assert (result.int8_model, result.float_model) == (folder / "out" / "int8", folder / "out" / "float")
    return folder, recipe, console.export_text()


def test_one_training_gives_the_float_model_and_its_int8_version(
    finished: tuple[Path, Recipe, str], tmp_path: Path
) -> None:
    folder, recipe, printed = finished
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == {
        *("checkpoints", "float", "int8", "recipe.yaml", "report.html", "report.json", "report.md"),
    }
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["float"]
    assert len(re.findall(r"^training \w+ on 32 examples$", printed, re.MULTILINE)) == 1
    assert re.findall(r"^(\w+) step \d/8  loss", printed, re.MULTILINE) == ["float"] * 8
    assert "quantized to int8_static after training, ranges found on 5 training examples" in printed
    assert f"saved the int8 model to {out / 'int8'}" in printed
    for place in (out, out / "int8", out / "float"):
        assert Recipe.from_yaml(place / "recipe.yaml") == recipe
    wanted = quantized(recipe, out / "float", tmp_path / "int8", samples=5)
    assert (out / "int8" / "model.safetensors").read_bytes() == wanted
    assert quantized(recipe, out / "float", tmp_path / "fewer", samples=1) != wanted
    other = dataclasses.replace(recipe, seed=7)
    assert quantized(other, out / "float", tmp_path / "others", samples=5) != wanted, "the seed chooses the rows"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (report["float_model"]["name"], report["int8_model"]["name"]) == (str(out / "float"), str(out / "int8"))
    model = load_quantized(out / "int8")
    assert isinstance(model.classifier, torch.nn.Linear)
    assert not quantized_modules(model.classifier)


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight_only", "int4_weight_only"])
def test_schemes_without_data_and_without_a_baseline(tmp_path: Path, scheme: str) -> None:
    recipe = read_recipe(write_files(tmp_path), quantization={**AFTER, "scheme": scheme})
    console = record()
    result = run(recipe, console=console)
    printed = console.export_text()
    assert (result.float_model, result.report) == (None, None)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoints", "float", "int8", "recipe.yaml"}
    wanted = quantized(recipe, tmp_path / "out" / "float", tmp_path / "beside")
    assert (result.int8_model / "model.safetensors").read_bytes() == wanted
    assert f"quantized to {scheme} after training\n" in printed
    assert re.search(r"^int8  eval_loss \S+  eval_accuracy \S+", printed, re.MULTILINE), "no step is made up"


def test_a_baseline_in_a_folder_and_targets(finished: tuple[Path, Recipe, str], tmp_path: Path) -> None:
    folder, _, _ = finished
    recipe = read_recipe(
        folder,
        quantization={**AFTER, "targets": ["*.query", "*.value"], "ignore": ["*.1.*"], "embeddings": False},
        evaluation={"baseline": str(folder / "out" / "float")},
        output=str(tmp_path / "out"),
    )
    result = run(recipe, console=record())
    assert result.float_model == folder / "out" / "float"
    assert result.report == tmp_path / "out" / "report.html"
    assert (tmp_path / "out" / "float" / "model.safetensors").is_file()
    names = {f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "value")}
    assert set(quantized_modules(load_quantized(result.int8_model))) == names


def test_resume_makes_what_is_missing(finished: tuple[Path, Recipe, str], tmp_path: Path) -> None:
    folder, _, _ = finished
    moved = shutil.copytree(folder / "out", tmp_path / "moved")
    wanted = folder_bytes(moved)
    recipe = dataclasses.replace(Recipe.from_yaml(moved / "recipe.yaml"), output=str(moved))

    def resume() -> str:
        console = record()
        run(recipe, resume=True, console=console)
        after = folder_bytes(moved)
        for name in ("float", "int8"):
            key = next(key for key in wanted if str(key).endswith(f"{name}/model.safetensors"))
            assert after[key] == wanted[key], name
        return console.export_text()

    shutil.rmtree(moved / "int8")
    printed = resume()
    assert f"kept the float model in {moved / 'float'}" in printed
    assert "training float" not in printed
    assert "quantized to int8_static" in printed
    printed = resume()
    assert f"kept the int8 model in {moved / 'int8'}" in printed
    assert "quantized to" not in printed
    shutil.rmtree(moved / "int8")
    shutil.rmtree(moved / "float")
    shutil.rmtree(moved / "checkpoints" / "float" / "checkpoint-8")
    printed = resume()
    assert f"resuming from {moved / 'checkpoints' / 'float' / 'checkpoint-4'}" in printed


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_pruned_then_quantized(tmp_path: Path, scheme: str, bf16: bool) -> None:
    folder = write_files(tmp_path)
    training = {"save_strategy": "steps", "save_steps": 8, "bf16": bf16}
    recipe = read_recipe(folder, pruning=PRUNE, quantization={**AFTER, "scheme": scheme}, training=training)
    console = record()
    result = run(recipe, console=console)
    printed = console.export_text()
    # The checkpoint of the last step is the model that was quantized: in float32, also where training was not.
    checkpoint = folder / "out" / "checkpoints" / "model" / "checkpoint-8"
    recipe = read_recipe(folder, quantization={**AFTER, "scheme": scheme}, output=str(tmp_path / "unused"))
    wanted = quantized(recipe, checkpoint, tmp_path / "beside", samples=32)
    assert (result.int8_model / "model.safetensors").read_bytes() == wanted
    dense, int8 = load_file(checkpoint / "model.safetensors"), load_file(result.int8_model / "model.safetensors")
    pruned = [name for name in int8 if name.endswith("query.weight")]
    assert len(pruned) == 2
    for name in pruned:
        assert (dense[name] == 0).any()
        assert (int8[name][dense[name] == 0] == 0).all()
    assert re.findall(r"^(\w+) step \d/8  loss", printed, re.MULTILINE) == ["model"] * 8
    assert re.search(r"^int8  eval_loss", printed, re.MULTILINE)
    assert "<svg" in (folder / "out" / "pruning.html").read_text(encoding="utf-8")
    assert not (folder / "out" / "float").exists()


def test_shrunk_distilled_and_compared(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    neurons = {**PRUNE, "structure": "neuron", "uniform": True, "shrink": True}
    recipe = read_recipe(
        folder,
        pruning=neurons,
        distillation={},
        quantization=AFTER,
        evaluation={"baseline": "train"},
        training={"save_strategy": "steps", "save_steps": 4},
    )
    console = record()
    result = run(recipe, console=console)
    printed = console.export_text()
    assert re.findall(r"^training (\w+) on", printed, re.MULTILINE) == ["float", "model"], "the twin teaches"
    assert result.comparison is not None
    int8 = load_quantized(result.int8_model)
    dense = AutoModelForSequenceClassification.from_pretrained(folder / "out" / "float")
    assert int8.config.intermediate_size == dense.config.intermediate_size // 2
    before = (result.int8_model / "model.safetensors").read_bytes()
    shutil.rmtree(result.int8_model)
    run(recipe, resume=True, console=console)
    assert f"resuming from {folder / 'out' / 'checkpoints' / 'model' / 'checkpoint-8'}" in console.export_text()
    assert (result.int8_model / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["token_classification", "question_answering", "causal_lm"])
def test_other_kinds_of_data(tmp_path: Path, kind: str) -> None:
    folder = write_kind(tmp_path, kind)
    path = kind_recipe(folder, kind, quantization={**AFTER, "scheme": "int8_static", "calibration_samples": 5})
    recipe = Recipe.from_yaml(path, {"evaluation.baseline": "train"})
    console = record()
    result = run(recipe, console=console)
    assert result.comparison is not None
    assert "ranges found on 5 training examples" in console.export_text()
    wanted = quantized(recipe, folder / "out" / "float", tmp_path / "beside", samples=5)
    assert (result.int8_model / "model.safetensors").read_bytes() == wanted


def test_patterns_are_checked_before_training(tmp_path: Path) -> None:
    recipe = read_recipe(write_files(tmp_path), quantization={**AFTER, "targets": ["*.qery"]})
    with pytest.raises(RecipeError, match=r"`quantization`: pattern '\*\.qery' in `targets` matches no module"):
        run(recipe, console=record())
    assert not (tmp_path / "out").exists()
