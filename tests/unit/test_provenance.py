"""What is written beside the weights, so that a model folder alone can be made again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

import hf_quant
from hf_quant.recipe.provenance import describe_run, write_provenance
from hf_quant.recipe.schema import Recipe
from hf_quant.recipe.sections import Data, Distillation, Quantization
from tests.reviews import read_recipe, write_files


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_versions_seed_and_hashes_are_written(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    recipe = read_recipe(folder, seed=7)
    (tmp_path / "int8").mkdir()
    path = write_provenance(tmp_path / "int8", recipe)
    (tmp_path / "int8" / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert path == tmp_path / "int8" / "provenance.json"
    found = json.loads(path.read_text(encoding="utf-8"))

    versions = found["versions"]
    assert versions["hf_quant"] == hf_quant.__version__
    assert (versions["torch"], versions["transformers"]) == (torch.__version__, transformers.__version__)
    assert {"python", "accelerate", "datasets", "compressed-tensors", "tokenizers"} < set(versions)
    assert "unknown" not in versions.values()
    assert found["machine"]["processes"] == 1
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["seed"] == 7
    assert found["recipe"]["sha256"] == sha256(tmp_path / "int8" / "recipe.yaml")
    weights = found["model"]["sha256"]
    assert found["model"]["name"] == str(folder / "model")
    assert weights["model.safetensors"] == sha256(folder / "model" / "model.safetensors")
    assert {"config.json", "tokenizer.json", "vocab.txt"} < set(weights)
    assert found["data"]["sha256"] == {
        str(folder / name): sha256(folder / name) for name in ("train.jsonl", "validation.jsonl")
    }
    assert "teacher" not in found
    assert describe_run(recipe) == found, "two runs of the same say the same"


def test_other_bytes_have_other_hashes(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    before = describe_run(read_recipe(folder))
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"text": "a film", "label": 0}\n')
    after = describe_run(read_recipe(folder, training={"learning_rate": 0.02}))
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"recipe", "data"}
    assert [
        a != b for a, b in zip(before["data"]["sha256"].values(), after["data"]["sha256"].values(), strict=True)
    ] == [
        True,
        False,
    ]


def test_the_same_recipe_written_in_another_way_has_the_same_hash(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    recipe = read_recipe(folder)
    (folder / "child.yaml").write_text("# the same\nextends: recipe.yaml\nseed: 42\n")
    child = Recipe.from_yaml(folder / "child.yaml", {"quantization.embeddings": "true"})
    assert describe_run(child)["recipe"] == describe_run(recipe)["recipe"]


def test_files_of_tasks_and_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "glue" / "mnli").mkdir(parents=True)
    for split in ("train", "validation_matched"):
        (tmp_path / "glue" / "mnli" / f"{split}.parquet").write_bytes(split.encode())
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    recipe = Recipe("no/where", "o", Quantization(), "mnli", distillation=Distillation(str(tmp_path / "teacher")))
    monkeypatch.delenv("HF_QUANT_GLUE_DIR", raising=False)
    assert describe_run(recipe)["data"] == {"hub": "nyu-mll/glue", "config": "mnli"}
    assert describe_run(recipe)["model"] == {"name": "no/where"}, "which is in no cache"
    assert describe_run(recipe)["teacher"]["sha256"] == {"config.json": hashlib.sha256(b"{}").hexdigest()}
    wanted = {
        f"mnli/{split}.parquet": hashlib.sha256(split.encode()).hexdigest()
        for split in ("train", "validation_matched")
    }
    monkeypatch.setenv("HF_QUANT_GLUE_DIR", str(tmp_path / "glue"))
    assert describe_run(recipe)["data"] == {"sha256": wanted}
    monkeypatch.setenv("HF_QUANT_GLUE_DIR", str(tmp_path / "elsewhere"))
    assert describe_run(recipe)["data"] == {"sha256": dict.fromkeys(wanted)}, "gone, which loses no model"
    given = dataclasses.replace(recipe, data=Data(data_dir=str(tmp_path / "glue")))
    assert describe_run(given)["data"] == {"sha256": wanted}


def test_a_model_from_the_hub_is_named_with_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--me--bert" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(snapshot / "config.json"))
    found = describe_run(Recipe("me/bert", "o", Quantization(), "mrpc"))["model"]
    wanted = {"config.json": hashlib.sha256(b"{}").hexdigest()}
    assert found == {"name": "me/bert", "revision": "abc123", "sha256": wanted}


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_the_git_revision_of_the_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    path = folder / "mine.yaml"
    path.write_text("model: m\ntask: mrpc\nquantization: {}\noutput: o\n")
    recipe = Recipe.from_yaml(path)
    assert "git" not in describe_run(recipe)["recipe"], "no repository"
    git(tmp_path, "init", "--quiet")
    assert "git" not in describe_run(recipe)["recipe"], "no revision"
    (tmp_path / "other.txt").write_text("1")
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    assert describe_run(recipe)["recipe"]["git"]["dirty"] is True, "the recipe is not in it"
    git(tmp_path, "add", "recipes")
    git(tmp_path, "commit", "--quiet", "-m", "two")
    clean = describe_run(recipe)["recipe"]["git"]
    assert clean == {"path": "recipes/mine.yaml", "revision": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "outputs.txt").write_text("what a run writes changes nothing")
    assert describe_run(recipe)["recipe"]["git"] == clean
    (tmp_path / "other.txt").write_text("2")
    assert describe_run(recipe)["recipe"]["git"] == {**clean, "dirty": True}
    assert "git" not in describe_run(Recipe("m", "o", Quantization(), "mrpc"))["recipe"], "made in Python"


def test_without_git_nothing_is_said_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\ntask: mrpc\nquantization: {}\noutput: o\n")
    assert "git" not in describe_run(Recipe.from_yaml(path))["recipe"]
