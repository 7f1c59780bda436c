"""Mutated recipes: whatever is in the file, a user sees errors with their places, and never a traceback."""

from __future__ import annotations

import copy
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hf_quant import cli
from hf_quant.recipe.schema import Recipe
from hf_quant.recipe.source import RecipeError

REPOSITORY = Path(__file__).resolve().parents[2]

FULL = """\
extends: base.yaml
model: some/model
data:
  train: train.csv
  validation: validation.csv
  text_columns: [text, other]
  num_labels: 3
  metrics: [accuracy]
training:
  learning_rate: 5e-5
  max_steps: 300
  bf16: auto
  optim: adamw_torch
  eval_strategy: "no"
  lr_scheduler_kwargs: {a: 1}
pruning:
- final_sparsity: {"*.query": 0.9, "*": 0.5}
  start_step: 0.1
  criterion: movement
- structure: "2:4"
  schedule: one_shot
distillation:
  hardness: 0.7
  hidden_states: {1: 2, 2: 4}
  end_step: 200
quantization:
  scheme: int8_static
  start_step: 0.5
  targets: ["*.query", "*.key"]
evaluation:
  baseline: none
  max_samples: 10
hub:
  repo_id: me/bert
output: out
seed: 3
"""
BASE = "training:\n  weight_decay: 0.1\n  num_train_epochs: 2\nquantization:\n  freeze_step: 0.9\n"
ALONE = FULL.partition("\n")[2]
AFTER = ALONE.replace("  start_step: 0.5\n  targets", "  method: post_training\n  calibration_samples: 9\n  targets")
SHIPPED = [path.read_text("utf-8") for path in sorted(REPOSITORY.glob("recipes/*.yaml"))]
TEXTS = [FULL, ALONE, AFTER, *(text for text in SHIPPED if "\nextends: " not in text)]

WORDS = (
    *("null", "true", "no", "~", "1e999", ".nan", "-.inf", "0x" + "f" * 9000, "9" * 5000, "1:30:59", "2024-01-01"),
    *(
        "*a",
        "&a ",
        "&a [*a]",
        "!!int ",
        "!!bool x",
        "!!python/object:os.system ",
        "<<: ",
        "? ",
        "- ",
        "---\n",
        "...\n",
    ),
    *("'", '"', "{", "}", "[", "]", ":", ": ", "#", "%", "@", "`", "|\n", ">-\n", "\t", "\r", "\n", "\0", "\x1b[31m"),
    *("é", "\u2028", "\ufeff", "😀", '"\\uD800"', '"\\UFFFFFFFF"', "[" * 900, "{a: " * 50, "extends: ", "\x85", ""),
)
KEYS = (
    "model",
    "extends",
    "training",
    "pruning",
    "final_sparsity",
    "start_step",
    "schedule",
    "scheme",
    "teacher",
    "x",
)
LEAVES: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 10**400, -(2**70), 2**63])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["int8_static", "int4_dynamic_g7", "2:4", "0:0", "9" * 4400 + "x1", "polynomial_1e999", "l0", ""]
    )
    | st.sampled_from(["top.yaml", "base.yaml", "loop.yaml", ".", "/", "~", "\0", "a" * 5000, "é"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


@st.composite
def trees(draw: st.DrawFn) -> str:
    """A recipe with some values replaced, removed, nested deeper, or under another key, as YAML."""
    tree: Any = copy.deepcopy(yaml.safe_load(draw(st.sampled_from(TEXTS))))
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(places(tree)[1:] or [()]))
        if not path:
            break
        holder = tree
        for part in path[:-1]:
            holder = holder[part]
        how, last = draw(st.sampled_from(["value", "value", "rename", "remove", "deepen", "copy"])), path[-1]
        if how == "value":
            holder[last] = draw(VALUES)
        elif how == "remove":
            del holder[last]
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS) | st.text(max_size=6) | st.integers() | st.none())] = holder.pop(last)
        elif how == "copy":
            tree[draw(st.sampled_from(KEYS))] = copy.deepcopy(holder[last])
        elif how == "deepen":
            inner = holder[last]
            for _ in range(draw(st.sampled_from([1, 2, 40, 200]))):
                inner = {"a": inner} if draw(st.booleans()) else [inner]
            holder[last] = inner
    try:
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=draw(st.booleans()))
    except RecursionError:
        return "[" * 5000


@st.composite
def texts(draw: st.DrawFn) -> str:
    """A recipe's text with characters replaced, removed and put in."""
    text = draw(st.sampled_from(TEXTS) | trees())
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        new = draw(st.sampled_from(WORDS) | st.text(max_size=4))
        text = text[:start] + new + text[start + draw(st.integers(0, 8)) :]
    return text


KEY_PATHS = (
    st.sampled_from(["training.learning_rate", "pruning.criterion", "pruning[0].final_sparsity", "pruning[7]", "data"])
    | st.sampled_from(["hub.x.y", "quantization.targets[0]", "distillation.hidden_states", "extends", "seed"])
    | st.sampled_from(["a..b", "model.x", "x[0][1]"])
    | st.text(min_size=1, max_size=6)
)
SETTINGS = st.dictionaries(KEY_PATHS, st.sampled_from(WORDS) | VALUES.map(repr), max_size=2)
RECIPES = st.tuples(
    trees() | texts(), st.sampled_from([BASE, "extends: top.yaml\n", "extends: loop.yaml\n"]) | texts()
)

PLACED = re.compile(r"(--set .*?|.*\.yaml:[1-9]\d*:[1-9]\d*): \S", re.DOTALL)


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    from hf_quant.recipe.json_schema import recipe_schema

    return jsonschema.Draft202012Validator(recipe_schema())


def write(folder: Path, top: str, base: str) -> Path:
    """`top.yaml`, `base.yaml` and `loop.yaml`, in whatever bytes the texts have."""
    for name, text in (("top", top), ("base", base), ("loop", "extends: base.yaml\n")):
        (folder / f"{name}.yaml").write_bytes(text.encode("utf-8", errors="surrogatepass"))
    return folder / "top.yaml"


def check(path: Path, overrides: dict[str, str], validator: Any) -> bool:
    """Whether a recipe is accepted; where it is not, all errors have their places."""
    try:
        recipe = Recipe.from_yaml(path, overrides)
    except RecipeError as error:
        problems, lines = error.problems, str(error).split("\n")
    else:
        problems, lines = [], []
    if problems:
        assert lines == [str(problem) for problem in problems]
        assert not [line for line in lines if not (PLACED.match(line) and line.isprintable())]
        return False
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    if "nan" not in recipe.to_yaml():  # which is not equal to itself
        assert Recipe.from_yaml(path) == recipe
    assert recipe.callbacks() or recipe.quantizes_after_training
    assert not list(validator.iter_errors(recipe.to_dict()))
    return True


def fuzz(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis with that many recipes."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    phases = [Phase.generate, Phase.shrink]
    return settings(max_examples=examples, suppress_health_check=quiet, phases=phases)


@given(RECIPES, SETTINGS)
@fuzz(80)
def test_no_mutation_ends_in_anything_but_a_recipe_error(
    tmp_path: Path, validator: Any, recipe: tuple[str, str], overrides: dict[str, str]
) -> None:
    check(write(tmp_path, *recipe), overrides, validator)


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[[str, str, dict[str, str]], int]:
    """`hf-quant run` of a recipe, as far as training; gives the exit code after looking at what was printed."""
    monkeypatch.setattr("hf_quant.recipe.run.run", lambda *_, **__: None)
    monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)

    def call(top: str, base: str, overrides: dict[str, str]) -> int:
        given_settings = itertools.chain(*(("--set", f"{key}={value}") for key, value in overrides.items()))
        monkeypatch.setattr(sys, "argv", ["hf-quant", "run", str(write(tmp_path, top, base)), *given_settings])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        code = int(stopped.value.code or 0)
        assert code in (0, cli.USER_ERROR)
        assert "Traceback" not in out + err
        assert err.startswith("error") == (code == cli.USER_ERROR) or "Usage: " in err
        return code

    return call


@given(RECIPES, SETTINGS)
@fuzz(30)
def test_no_traceback_reaches_the_user(
    command_line: Callable[..., int], recipe: tuple[str, str], overrides: dict[str, str]
) -> None:
    command_line(*recipe, overrides)


def test_the_fuzz_starts_from_recipes_that_are_right(
    command_line: Callable[..., int], tmp_path: Path, validator: Any
) -> None:
    for text in TEXTS:
        assert check(write(tmp_path, text, BASE), {}, validator)
    assert command_line(FULL, BASE, {}) == 0
    assert command_line(FULL, BASE, {"seed": "x"}) == cli.USER_ERROR


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_mutations(
    tmp_path: Path, command_line: Callable[..., int], validator: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {"accepted": 0, "refused": 0}

    @given(RECIPES, SETTINGS)
    @fuzz(10_000)
    def one(recipe: tuple[str, str], overrides: dict[str, str]) -> None:
        accepted = check(write(tmp_path, *recipe), overrides, validator)
        seen["accepted" if accepted else "refused"] += 1
        code = command_line(*recipe, overrides)
        assert accepted == (code == 0) or any(key.startswith("-") or "=" in key for key in overrides)

    one()
    with capsys.disabled():
        print(f"\nmutated recipes: {seen}")
    assert sum(seen.values()) >= 9_000  # hypothesis may stop where it has seen everything
    assert min(seen.values()) > 100
