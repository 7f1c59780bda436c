"""The JSON Schema: current, right for what is shipped, and agreeing with what reads recipes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from hf_quant import cli
from hf_quant.evaluation.tasks import GLUE_TASKS
from hf_quant.pruning.criteria import get_criterion
from hf_quant.pruning.schedules import check_schedule
from hf_quant.pruning.structures import _PLAIN, get_structure
from hf_quant.recipe.json_schema import recipe_schema, schema_json
from hf_quant.recipe.schema import Recipe
from hf_quant.recipe.sections import Data, Distillation, Evaluation, Hub, Pruning, Quantization
from hf_quant.recipe.source import RecipeError, read_source
from hf_quant.recipe.training import training_fields
from hf_quant.schemes import get_scheme

jsonschema = pytest.importorskip("jsonschema")

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PLAIN: dict[str, Any] = {"model": "m", "task": "sst2", "quantization": {}, "output": "o"}


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_published_schema_is_current() -> None:
    published = json.loads((RECIPES / "schema.json").read_text(encoding="utf-8"))
    made = json.loads(schema_json())
    if transformers.__version__ not in published["$comment"]:  # whose TrainingArguments have other fields
        for schema in (published, made):
            del schema["$comment"], schema["properties"]["training"]["properties"]
    assert published == made, "run `hf-quant schema --output recipes/schema.json --overwrite`"


def test_shipped_recipes_are_valid(validator: Any) -> None:
    files = sorted(RECIPES.glob("*.yaml"))
    assert files
    for file in files:
        validator.validate(read_source(file).tree)
        validator.validate(Recipe.from_yaml(file).to_dict())


def test_everything_has_a_place_and_a_description() -> None:
    schema = recipe_schema()
    properties = schema["properties"]
    sections: dict[type, dict[str, Any]] = {
        Recipe: properties,
        Pruning: schema["$defs"]["pruning"]["properties"],
        **{
            kind: properties[kind.__name__.lower()]["properties"]
            for kind in (Data, Distillation, Quantization, Evaluation, Hub)
        },
    }
    for kind, found in sections.items():
        names = {field.name for field in dataclasses.fields(kind)} - {"source"}
        assert set(found) - {"extends"} == names
        for name, one in found.items():
            assert len(one["description"]) > 10, (kind, name)
            assert "\n" not in one["description"]
            assert "(`" not in one["description"].split(" ")[0], "a type instead of a text"
    assert set(properties["training"]["properties"]) == set(training_fields())
    assert sections[Quantization]["start_step"]["description"] == (
        "First step with fake-quant. An `int` counts optimizer steps, a `float` in [0, 1) is a share of all."
    )


@pytest.mark.parametrize(
    "change",
    [
        {"modle": "m"},
        {"model": 3},
        {"model": None},
        {"output": ""},
        {"task": "sst3"},
        {"seed": -1},
        {"seed": 1.5},
        {"quantization": {"scheme": "int9_static"}},
        {"quantization": {"scheme": "int4_static"}},
        {"quantization": {"start_step": 1.5}},
        {"quantization": {"start_step": -1}},
        {"quantization": {"targets": "*.query"}},
        {"quantization": {"targets": []}},
        {"quantization": {"embeddings": "yes"}},
        {"quantization": {"method": "ptq"}},
        {"quantization": {"method": "post_training", "calibration_samples": 0}},
        {"pruning": {"final_sparsity": 80}},
        {"pruning": {"final_sparsity": {"*": 0}}},
        {"pruning": {"final_sparsity": 0.5, "criterion": "l9"}},
        {"pruning": {"final_sparsity": 0.5, "structure": "two of four"}},
        {"pruning": [{"final_sparsity": 0.5, "schedule": "cubick"}]},
        {"pruning": [{"final_sparsity": 0.5, "scope": "local"}]},
        {"pruning": 0.5},
        {"distillation": {"hardness": 0}},
        {"distillation": {"hardness": 1.5}},
        {"distillation": {"temperature": 0}},
        {"distillation": {"hidden_states": {"first": 1}}},
        {"distillation": {"attention": {"1": "one"}}},
        {"training": {"learning_rat": 1}},
        {"training": {"learning_rate": "fast"}},
        {"training": {"bf16": "maybe"}},
        {"training": {"optim": "adamw_torhc"}},
        {"training": {"seed": 1}},
        {"training": {"report_to": [1]}},
        {"evaluation": {"batch_size": 0}},
        {"hub": {"token": "hf_x"}},
        {"data": {"metrics": ["acuracy"]}},
    ],
)
def test_schema_and_reader_refuse_the_same(validator: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    validator.validate(PLAIN)
    assert not validator.is_valid({**PLAIN, **change})
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**PLAIN, **change}))
    with pytest.raises(RecipeError):
        Recipe.from_yaml(path)


@pytest.mark.parametrize(
    "change",
    [
        {"training": None, "data": None, "quantization": None},
        {"seed": 2**32 - 1},
        {"quantization": {"scheme": "int4_weight_only_g128", "start_step": 0, "freeze_step": 0.5, "targets": None}},
        {"quantization": {"scheme": "int8_dynamic_symmetric"}},
        {"pruning": {"structure": "2:4"}},
        {"pruning": [{"final_sparsity": {"*.query": 0.5}, "criterion": "block_fisher_32", "structure": "16x1"}]},
        {"pruning": [{"schedule": [[0.1, 0.2], [0.5, 0.5]]}, {"final_sparsity": 0.5, "schedule": "polynomial_2.5"}]},
        {"distillation": {"teacher": "t", "hidden_states": {"1": 2}, "attention": True, "end_step": 10}},
        {"training": {"bf16": "auto", "lr_scheduler_kwargs": {"a": 1}, "report_to": ["none"], "max_steps": 100}},
        {"training": {"eval_strategy": "steps", "optim": "adafactor", "fsdp": None, "debug": "", "tf32": None}},
        {"evaluation": {"baseline": "some/folder", "max_samples": 3}},
        {"hub": {"repo_id": "me/bert", "private": False, "commit_message": "new"}},
    ],
)
def test_schema_and_reader_accept_the_same(validator: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    validator.validate({**PLAIN, **change})
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**PLAIN, **change}))
    validator.validate(Recipe.from_yaml(path).to_dict())


def test_what_is_needed_may_be_extended(validator: Any) -> None:
    assert not validator.is_valid({"seed": 1})
    assert not validator.is_valid({key: value for key, value in PLAIN.items() if key != "quantization"})
    validator.validate({"extends": "base.yaml", "seed": 1, "pruning": None, "training": {"max_steps": None}})
    assert not validator.is_valid({"extends": "base.yaml", "sead": 1})


def test_names_that_are_offered_exist() -> None:
    schema = recipe_schema()
    pruning = schema["$defs"]["pruning"]["properties"]
    for one in pruning["structure"]["anyOf"][0]["enum"]:
        get_structure(one)
    assert set(pruning["structure"]["anyOf"][0]["enum"]) == set(_PLAIN)
    for one in pruning["criterion"]["anyOf"][0]["enum"]:
        get_criterion(one)
    for one in pruning["schedule"]["anyOf"][0]["enum"]:
        check_schedule(one)
    for one in schema["properties"]["quantization"]["properties"]["scheme"]["anyOf"][0]["enum"]:
        get_scheme(one)
    assert schema["properties"]["task"]["enum"] == [*GLUE_TASKS, None]


def test_the_command_prints_or_writes_the_schema(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def call(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-quant", "schema", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return (stopped.value.code or 0, *capsys.readouterr())

    assert call()[:2] == (0, schema_json())
    path = tmp_path / "schema.json"
    assert call("--output", str(path))[0] == 0
    assert path.read_text(encoding="utf-8") == schema_json()
    code, _, err = call("--output", str(path))
    assert code == 2
    assert "exists already" in err
    assert call("--output", str(path), "--overwrite")[0] == 0
