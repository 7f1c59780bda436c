"""The JSON Schema of recipes, for editors: made from the dataclasses and the docstrings of the sections."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

from ..evaluation.tasks import GLUE_TASKS, METRICS_BY_PROBLEM_TYPE
from ..pruning.criteria import CRITERIA
from ..pruning.schedules import SCHEDULES
from ..pruning.structures import UNIT_KINDS
from ..schemes import GROUP_SIZES, SCHEMES
from .resolve import EXTENDS
from .rules import hints_of
from .schema import Recipe
from .sections import Data, Distillation, Evaluation, Hub, Pruning, Quantization
from .training import training_fields

_STEP = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    ]
}
_SHARE = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
_LAYERS = {
    "anyOf": [
        {"type": "boolean"},
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": {"type": "integer", "minimum": 0},
            "minProperties": 1,
        },
    ]
}


def _words(names: Any, pattern: str) -> dict[str, Any]:
    """Some names, for an editor to offer, and what else the pattern allows."""
    return {"anyOf": [{"enum": list(names)}, {"type": "string", "pattern": f"^(?:{pattern})$"}]}


_NAMES: dict[tuple[type, str], dict[str, Any]] = {
    (Quantization, "scheme"): _words(
        SCHEMES,
        "int8_static|int[2-8]_(dynamic|dynamic_symmetric|weight_only)"
        f"(_channel|_g({'|'.join(map(str, GROUP_SIZES))}))?",
    ),
    (Pruning, "criterion"): _words(CRITERIA, r"l[1-8]|block_fisher_[0-9]{1,3}"),
    (Pruning, "structure"): _words(
        ["unstructured", "row", "column", *UNIT_KINDS, "2:4", "4x1"], r"[0-9]+:[0-9]+|[0-9]+x[0-9]+"
    ),
    (Pruning, "schedule"): {
        "anyOf": [
            *_words(SCHEDULES, "polynomial_.+")["anyOf"],
            {"type": "array", "items": {"type": "array", "items": {"type": "number", "minimum": 0}}, "minItems": 1},
        ]
    },
    (Pruning, "final_sparsity"): {
        "anyOf": [_SHARE, {"type": "object", "additionalProperties": _SHARE, "minProperties": 1}]
    },
    (Distillation, "hidden_states"): _LAYERS,
    (Distillation, "attention"): _LAYERS,
    (Data, "metrics"): {
        "type": "array",
        "items": {"enum": [name for names in METRICS_BY_PROBLEM_TYPE.values() for name in names]},
        "minItems": 1,
    },
    (Evaluation, "baseline"): {"anyOf": [{"enum": ["train", "none"]}, {"type": "string", "minLength": 1}]},
    (Recipe, "task"): {"enum": list(GLUE_TASKS)},
}
_STEPS = {"start_step", "end_step", "freeze_step", "frequency"}


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of recipes.

    It accepts a little more than [`Recipe.from_yaml`], which alone knows what goes together.

    Returns:
        `dict[str, Any]`: plain values, ready for `json.dumps`.
    """
    import transformers

    described = _descriptions(Recipe)
    properties: dict[str, Any] = {
        EXTENDS: {
            "description": "Another recipe, by its path from the folder of this one. Mappings merge, other values "
            "replace what it says, and null removes a key.",
            "type": "string",
            "minLength": 1,
        }
    }
    sections = {"data": Data, "distillation": Distillation, "quantization": Quantization}
    sections |= {"evaluation": Evaluation, "hub": Hub}
    for field in dataclasses.fields(Recipe):
        name = field.name
        if name == "source":
            continue
        if name in sections:
            schema = _section(sections[name])
        elif name == "pruning":
            one = {"$ref": "#/$defs/pruning"}
            schema = {"anyOf": [one, {"type": "array", "items": one}]}
        elif name == "training":
            schema = {"type": "object", "additionalProperties": False, "properties": _training()}
        else:
            schema = _field(Recipe, field)
        properties[name] = {"description": described[name], **_nullable(schema)}
    # What is needed may stand in the recipe that this one extends.
    alone = {
        "required": ["model", "output"],
        "properties": {name: {"not": {"type": "null"}} for name in ("model", "output")},
        "anyOf": [{"required": [name]} for name in ("pruning", "distillation", "quantization")],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": f"Made by `hf-quant schema` with transformers {transformers.__version__}; do not edit.",
        "title": "hf_quant recipe",
        "description": _summary(Recipe),
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "if": {"not": {"required": [EXTENDS]}},
        "then": alone,
        "$defs": {"pruning": _section(Pruning)},
    }


def schema_json() -> str:
    """[`recipe_schema`] as text, the same for the same versions."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def _section(kind: type) -> dict[str, Any]:
    """A section: an object of the dataclass's fields, or null for one with the defaults."""
    described = _descriptions(kind)
    properties = {}
    for field in dataclasses.fields(kind):
        properties[field.name] = {"description": described[field.name], **_nullable(_field(kind, field))}
        if field.default not in (None, dataclasses.MISSING):
            properties[field.name]["default"] = field.default
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _field(kind: type, field: dataclasses.Field[Any]) -> dict[str, Any]:
    """The schema of one field, by its names, its bounds or its type."""
    if (kind, field.name) in _NAMES:
        return _NAMES[kind, field.name]
    if field.name in _STEPS:
        return _STEP
    bounds = {key: value for key, value in field.metadata.items() if key in _BOUNDS}
    schema = {**_of_type(hints_of(kind)[field.name]), **bounds}
    if "string" in schema.get("type", ()):
        schema["minLength"] = 1  # an empty text is an error, and so is an empty list
    if "array" in schema.get("type", ()):
        schema["minItems"] = 1
    return schema


_BOUNDS = ("minimum", "maximum", "exclusiveMinimum")


def _training() -> dict[str, Any]:
    """The fields of `TrainingArguments`; what they mean stands in transformers' documentation."""
    found = {}
    for name, (hint, choices) in training_fields().items():
        found[name] = _nullable({"enum": choices} if choices else _of_type(hint))
    return found


def _of_type(hint: Any) -> dict[str, Any]:
    """The schema of what [`fits`] a type hint."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if any(_is_enum(arg) for arg in args):
            args = tuple(arg for arg in args if arg is not str)
        found = [_of_type(arg) for arg in args]
        if {"type": "number"} in found and {"type": "integer"} in found:
            found.remove({"type": "integer"})
        if all(list(one) == ["type"] or "items" in one for one in found):
            merged = {key: value for one in found for key, value in one.items()}
            names = [one["type"] for one in found]
            return {**merged, "type": names if len(names) > 1 else names[0]}
        return {"anyOf": found}
    if origin is Literal:
        return {"enum": list(args)}
    if _is_enum(hint):
        return {"enum": [member.value for member in hint]}
    if origin in (list, tuple):
        return {"type": "array", "items": _of_type(args[0])}
    if hint is dict or origin is dict:
        return {"type": "object"}
    words = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", None: "null"}
    # YAML cannot write an object of Python, so only null is left of such a field.
    return {"type": words[hint]} if hint in words else {"not": {}}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """The same or null, which removes what an extended recipe says."""
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return {**schema, "type": names if "null" in names else [*names, "null"]}
    if "enum" in schema:
        return {"enum": [*schema["enum"], None]}
    if {"type": "null"} in schema["anyOf"]:
        return schema
    return {"anyOf": [*schema["anyOf"], {"type": "null"}]}


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _summary(kind: type) -> str:
    return _plain((inspect.getdoc(kind) or "").partition("\n\n")[0])


def _descriptions(kind: type) -> dict[str, str]:
    """What a docstring says of each argument, without its type."""
    block = (inspect.getdoc(kind) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = {}
    for one in re.split(r"^ {4}(?=\w)", block, flags=re.MULTILINE)[1:]:
        head, _, text = one.partition("):" if "):" in one else ":")
        found[re.split(r"\W", head)[0]] = _plain(text)
    return found


def _plain(text: str) -> str:
    """Without line breaks and the brackets of links; a sentence."""
    text = re.sub(r"\[(`\w+`)\]", r"\1", " ".join(text.split()))
    return text[:1].upper() + text[1:] if not text.startswith("`") else text
