"""Recipes that extend others, and values set from the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hf_quant import cli
from hf_quant.recipe.resolve import parse_settings
from hf_quant.recipe.run import RunResult
from hf_quant.recipe.schema import Recipe
from hf_quant.recipe.sections import Pruning, Quantization
from hf_quant.recipe.source import RecipeError

BASE = """\
model: some/model
task: sst2
training:
  learning_rate: 5e-5
  num_train_epochs: 2
pruning:
- final_sparsity: 0.5
  criterion: movement
quantization:
  targets: ["*.query", "*.key"]
  start_step: 0.7
output: out
"""


def write(folder: Path, **files: str) -> None:
    """`a="..."` becomes `a.yaml`."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def errors(path: Path, overrides: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(path, overrides)
    return str(caught.value).replace(f"{path.parent}{os.sep}", "").splitlines()


def test_mappings_merge_lists_and_scalars_replace_and_null_removes(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    write(tmp_path, base=BASE)
    write(
        tmp_path / "deeper",
        middle="extends: ../base.yaml\ntraining: {num_train_epochs: 3, weight_decay: 0.1}\noutput: middle\n",
        top="extends: middle.yaml\nquantization:\n  targets: ['*.value']\n  start_step: null\npruning: null\nseed: 7\n"
        "training:\n  num_train_epochs: null\n",
    )
    recipe = Recipe.from_yaml(tmp_path / "deeper" / "top.yaml")
    assert recipe.training == {"learning_rate": 5e-5, "weight_decay": 0.1}
    assert recipe.quantization == Quantization(targets=["*.value"])
    assert (recipe.model, recipe.task, recipe.output, recipe.seed) == ("some/model", "sst2", "middle", 7)
    assert recipe.pruning == []
    assert "extends" not in recipe.to_yaml()
    write(tmp_path, saved=recipe.to_yaml())
    assert Recipe.from_yaml(tmp_path / "saved.yaml") == recipe


def test_the_base_is_not_changed_by_who_extends_it(tmp_path: Path) -> None:
    write(tmp_path, base=BASE, child="extends: base.yaml\nquantization: null\npruning:\n  final_sparsity: 0.9\n")
    assert Recipe.from_yaml(tmp_path / "child.yaml").pruning == [Pruning(final_sparsity=0.9)]
    assert Recipe.from_yaml(tmp_path / "child.yaml").quantization is None
    assert Recipe.from_yaml(tmp_path / "base.yaml").pruning == [Pruning(final_sparsity=0.5, criterion="movement")]


def test_an_error_names_the_file_in_which_the_value_stands(tmp_path: Path) -> None:
    write(
        tmp_path,
        base=BASE.replace("5e-5", "fast").replace("some/model", "[1]").replace("movement", "movment"),
        child="extends: base.yaml\n\ntraining:\n  num_train_epochs: many\n  weight_decai: 1\nmodel: better\n",
    )
    assert errors(tmp_path / "child.yaml") == [
        "base.yaml:4:18: `training.learning_rate` must be a number, but is 'fast'",
        "base.yaml:8:14: unknown criterion 'movment'; did you mean 'movement'? Choose one of: magnitude, l2, random, "
        "movement, soft_movement, first_order, fisher, block_fisher",
        "child.yaml:4:21: `training.num_train_epochs` must be a number, but is 'many'",
        "child.yaml:5:3: unknown key `weight_decai` in `training`; did you mean `weight_decay`?",
    ]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"base": BASE, "top": "seed: 1\nextends: bass.yaml\n"},
            "top.yaml:2:10: `extends` names bass.yaml, which does not exist (its path starts from the folder of this "
            "recipe); did you mean `base.yaml`?",
        ),
        ({"top": "extends: .\n"}, "top.yaml:1:10: `extends` names ., which is a folder (its path starts from"),
        ({"top": "extends: top.yaml\n"}, "top.yaml:1:10: `extends` goes in a circle: top.yaml -> top.yaml. Remove"),
        (
            {"a": "extends: b.yaml\n", "b": "# b\nextends: ./a.yaml\n", "top": "extends: a.yaml\n"},
            "b.yaml:2:10: `extends` goes in a circle: a.yaml -> b.yaml -> ./a.yaml. Remove one of them",
        ),
        ({"top": "extends: 3\n"}, "top.yaml:1:10: `extends` must be the path of another recipe, but is 3"),
        ({"top": "extends:\n"}, "top.yaml:1:9: `extends` must be the path of another recipe, but is empty"),
        ({"top": "extends: [a, b]\n"}, "top.yaml:1:10: `extends` must be the path of another recipe, but is a list"),
        ({"top": f"extends: {'x' * 300}\n"}, "top.yaml:1:10: `extends` names xxx"),
        ({"top": 'extends: "a\\0b"\n'}, "top.yaml:1:10: `extends` names a\\x00b, which does not exist"),
        ({"top": "extends: 2024-01-01\n"}, "top.yaml:1:10: '2024-01-01' reads as YAML `timestamp`"),
        ({"base": "- 1\n", "top": "extends: base.yaml\n"}, "base.yaml:1:1: a recipe is a mapping of keys to values"),
        ({"base": "a: [\n", "top": "extends: base.yaml\n"}, "base.yaml:2:1: not valid YAML: "),
        ({"top": "exteds: base.yaml\n"}, "top.yaml:1:1: unknown key `exteds`; did you mean `extends`?"),
        (
            {"base": BASE, "top": "extends: base.yaml\ntraining: {learning_rat: null}\n"},
            "top.yaml:2:26: `training.learning_rat` is null, which removes a key, but there is none to remove; write "
            "{} for an empty section; did you mean `learning_rate`?",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_extended(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    write(tmp_path, **files)
    found = errors(tmp_path / "top.yaml")
    assert any(line.startswith(expected) for line in found), found


def test_what_is_wrong_beside_a_missing_base_is_told_too(tmp_path: Path) -> None:
    write(tmp_path, top="extends: nowhere.yaml\nseeed: 1\ntraining: {learning_rate: fast}\n")
    assert [line.split(": ")[0] for line in errors(tmp_path / "top.yaml")] == [
        "top.yaml:1:10",
        "top.yaml:2:1",
        "top.yaml:3:27",
    ]  # and not that model and output are missing: the other recipe may have them


def test_an_unreadable_value_does_not_remove_what_it_replaces(tmp_path: Path) -> None:
    write(tmp_path, base=BASE, top="extends: base.yaml\nmodel: 2024-01-01\n")
    assert len(errors(tmp_path / "top.yaml")) == 1


def test_values_are_set(tmp_path: Path) -> None:
    write(tmp_path, top=BASE)
    overrides = {
        "training.learning_rate": "3e-5",
        "training.num_train_epochs": "null",
        "pruning.final_sparsity": "0.9",
        "pruning[0].criterion": "fisher",
        "quantization": "{scheme: int8_dynamic}",
        "evaluation.baseline": "none",
        "output": '"1"',
    }
    recipe = Recipe.from_yaml(tmp_path / "top.yaml", overrides)
    assert recipe.training == {"learning_rate": 3e-5}
    assert recipe.pruning == [Pruning(final_sparsity=0.9, criterion="fisher")]
    assert recipe.quantization == Quantization("int8_dynamic")
    assert (recipe.evaluation.baseline, recipe.output) == ("none", "1")
    recipe = Recipe.from_yaml(tmp_path / "top.yaml", {"quantization.targets[1]": "'*.dense'", "pruning": "null"})
    assert recipe.quantization == Quantization(targets=["*.query", "*.dense"], start_step=0.7)
    assert recipe.pruning == []


def test_one_pruning_is_set_with_and_without_a_number(tmp_path: Path) -> None:
    alone = BASE.replace("- final", "  final")
    write(tmp_path, list=BASE, alone=alone)
    for name in ("list", "alone"):
        for key in ("pruning.final_sparsity", "pruning[0].final_sparsity"):
            assert Recipe.from_yaml(tmp_path / f"{name}.yaml", {key: "0.9"}).pruning[0].final_sparsity == 0.9


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("training.lerning_rate", "1", "unknown key `lerning_rate` in `training`; did you mean `learning_rate`?"),
        ("trainig.learning_rate", "1", "unknown key `trainig`; did you mean `training`?"),
        ("training.learning_rate", "fast", "`training.learning_rate` must be a number, but is 'fast'"),
        ("training", "{learning_rate: fast}", "`training.learning_rate` must be a number, but is 'fast'"),
        ("training.learning_rate", "[1", "not valid YAML: "),
        ("training.learning_rate", "2024-01-01", "'2024-01-01' reads as YAML `timestamp`"),
        ("training.learning_rate", "&a 1", "a recipe has no anchors (`&a`); remove it"),
        ("training.learning_rate", "", 'no value; write null to remove the key, or "" for no text'),
        ("pruning[1].final_sparsity", "0.1", "`pruning` has 1 entries, so there is no `pruning[1]`"),
        ("pruning[0]", "null", "an entry of a list cannot be removed; give the whole list"),
        ("pruning[0].criterion", "movment", "unknown criterion 'movment'; did you mean 'movement'?"),
        ("pruning.criterium", "l2", "unknown key `criterium` in `pruning[0]`; did you mean `criterion`?"),
        ("model.size", "1", "`model` is 'some/model', so it has no key `size`"),
        ("quantization[0].scheme", "int8_static", "`quantization` is no list, so there is no `quantization[0]`"),
        ("training.warmup_stepz", "null", "`training.warmup_stepz` is null, which removes a key, but there is none"),
        ("hub.repo_id", "a/b/c", "`hub.repo_id` is 'a/b/c', but must be"),
        ("extends", "x.yaml", "`extends` can stand in a file only; run a recipe that extends the one you want"),
        ("training..x", "1", "'' is no key; write, for example, --set training.learning_rate=3e-5"),
        ("training.a b", "1", "'a b' is no key"),
    ],
)
def test_what_cannot_be_set(tmp_path: Path, key: str, value: str, expected: str) -> None:
    write(tmp_path, top=BASE)
    found = errors(tmp_path / "top.yaml", {key: value})
    assert len(found) == 1
    assert found[0].startswith(f"--set {key}: {expected}")


def test_which_of_two_prunings_has_to_be_said(tmp_path: Path) -> None:
    write(tmp_path, top=BASE.replace("pruning:\n", "pruning:\n- final_sparsity: 0.1\n  targets: ['a*']\n"))
    assert errors(tmp_path / "top.yaml", {"pruning.criterion": "l2"}) == [
        "--set pruning.criterion: `pruning` is a list of 2; say which, as in pruning[0].criterion"
    ]
    with pytest.raises(TypeError, match=r"overrides\['seed'\] is 7; give text, as after --set: '7'"):
        Recipe.from_yaml(tmp_path / "top.yaml", {"seed": 7})  # type: ignore[dict-item]


def test_settings_of_the_command_line() -> None:
    assert parse_settings(["a.b=1", "c=x=y"]) == {"a.b": "1", "c": "x=y"}
    with pytest.raises(ValueError, match=r"--set 'seed' is not KEY=VALUE. Write, for example, --set training\.learn"):
        parse_settings(["seed"])
    with pytest.raises(ValueError, match=r"--set seed is given twice: 1 and 2. Keep one of them"):
        parse_settings(["seed=1", "seed=2"])


def test_run_takes_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write(tmp_path, top=BASE)
    runs: list[Recipe] = []

    def run(recipe: Recipe, **_: object) -> RunResult:
        runs.append(recipe)
        return RunResult(tmp_path)

    def call(*arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", ["hf-quant", "run", str(tmp_path / "top.yaml"), *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code

    monkeypatch.setattr("hf_quant.recipe.run.run", run)
    assert call("--set", "training.learning_rate=3e-5", "--set", "seed=7") in (0, None)
    assert (runs[0].training["learning_rate"], runs[0].seed) == (3e-5, 7)
    assert call("--set", "training.lerning_rate=3e-5", "--set", "seed=x") == 2
    assert capsys.readouterr().err.splitlines()[:3] == [
        "errors:",
        "--set seed: `seed` must be a whole number, but is 'x'",
        "--set training.lerning_rate: unknown key `lerning_rate` in `training`; did you mean `learning_rate`?",
    ]
    assert len(runs) == 1
