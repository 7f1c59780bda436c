"""Recipes: what is read, what is refused, and where the message points."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.recipe.schema import Recipe
from hf_quant.recipe.sections import Data, Distillation, Evaluation, Hub, Pruning, Quantization
from hf_quant.recipe.source import RecipeError, Source
from hf_quant.recipe.training import native_bf16, training_arguments
from hf_quant.recipe.values import check_type, describe, fits

REPOSITORY = Path(__file__).resolve().parents[2]

GOOD = """\
model: some/model
data:
  train: train.csv
  validation: validation.csv
  text_columns: [text]
training:
  learning_rate: 5e-5
  num_train_epochs: 2
quantization:
  scheme: int8_static
  start_step: 0.5
output: out
"""


def read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return Recipe.from_yaml(path)


def errors(tmp_path: Path, text: str) -> list[str]:
    """Messages without the folder: `recipe.yaml:3:1: ...`."""
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    return [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).splitlines()]


def test_values_are_read(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD)
    assert recipe.model == "some/model"
    assert recipe.data == Data(train="train.csv", validation="validation.csv", text_columns=["text"])
    assert recipe.training == {"learning_rate": 5e-5, "num_train_epochs": 2}
    assert recipe.quantization == Quantization(scheme="int8_static", start_step=0.5, freeze_step=0.9)
    assert recipe.evaluation == Evaluation(baseline="train")
    assert (recipe.output, recipe.seed, recipe.task) == ("out", 42, None)


def test_number_without_a_point_is_a_number(tmp_path: Path) -> None:
    # YAML 1.1, and so PyYAML, reads 5e-5 as text.
    assert yaml.safe_load("x: 5e-5") == {"x": "5e-5"}
    for written, value in (("5e-5", 5e-5), ("1E3", 1000.0), ("-2e+1", -20.0), (".5e0", 0.5), ("3.e1", 30.0)):
        text = GOOD.replace("5e-5", written)
        assert read(tmp_path, text).training["learning_rate"] == value
    assert errors(tmp_path, GOOD.replace("5e-5", '"5e-5"')) == [
        "recipe.yaml:7:18: `training.learning_rate` must be a number, but is '5e-5'"
    ]


def test_an_empty_section_is_its_defaults(tmp_path: Path) -> None:
    recipe = read(tmp_path, "model: m\ntask: mrpc\ntraining:\nquantization:\nevaluation:\noutput: o\n")
    assert (recipe.quantization, recipe.evaluation, recipe.training) == (Quantization(), Evaluation(), {})
    assert recipe.to_task().metrics == ("accuracy", "f1")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  scheme:", "  schem:", "10:3: unknown key `schem` in `quantization`; did you mean `scheme`?"),
        ("output: out", "outptu: out\noutput: out", "12:1: unknown key `outptu`; did you mean `output`?"),
        ("  num_train", "  num_trian", "8:3: unknown key `num_trian_epochs` in `training`; did you mean "),
        ("  train:", "  zzz: 1\n  train:", "3:3: unknown key `zzz` in `data`; allowed: train, validation, "),
        ("int8_static", "int8_statik", "10:11: `quantization.scheme` cannot be 'int8_statik'; did you mean `int8"),
        ("int8_static", "8", "10:11: `quantization.scheme` must be text, but is 8"),
        ("[text]", "text", "5:17: `data.text_columns` must be a list of texts or null, but is 'text'"),
        ("[text]", "[]", "5:17: `data.text_columns` is empty; give a value or remove the key"),
        ("[text]", "[a, b, c]", "2:1: Task 'data': `text_columns` must name one column of text or two"),
        ("  validation: validation.csv\n", "", "2:1: `validation` is missing in `data`"),
        ("output: out\n", "", "1:1: `output` is missing"),
        ("model: some/model", "model:", "1:7: `model` must be text, but is empty"),
        ("output: out", 'output: ""', "12:9: `output` is empty; give a value or remove the key"),
        ("output: out", "output: out\nseed: -1", "13:7: `seed` must be 0 or more and 4294967295 at most, but is -1"),
        ("output: out", "output: out\nseed: 1.5", "13:7: `seed` must be a whole number, but is 1.5"),
        ("output: out", "output: out\nseed: true", "13:7: `seed` must be a whole number, but is true"),
        ("output: out", "output: out\ntask: mrcp", "13:7: unknown task 'mrcp'"),
        ("output: out", "output: out\ntask: mrpc", "3:3: `train` cannot stand beside `task: mrpc`"),
        ("  train:", "  data_dir: x\n  train:", "3:3: `data_dir` goes with `task`"),
        ("[text]", "[text]\n  metrics: [acuracy]", "6:12: Task 'data': unknown metric 'acuracy'"),
        ("[text]", "[text]\n  num_labels: 1", "2:1: Task 'data': classification needs `num_labels` of 2 or more"),
        ("[text]", "[text]\n  problem_type: regresion", "6:17: `data.problem_type` cannot be 'regresion'"),
        ("start_step: 0.5", "start_step: 1.0", "11:15: `start_step` must be a whole number of steps"),
        ("start_step: 0.5", "start_step: -1", "11:15: `start_step` must be a whole number of steps"),
        ("start_step: 0.5", "start_step: half", "11:15: `quantization.start_step` must be a number, but"),
        ("start_step: 0.5", "freeze_step: 0.5\n  start_step: 0.5", "11:16: `freeze_step` (0.5) must come after"),
        ("start_step: 0.5", "start_step: 0.95", "11:15: `freeze_step` (0.9) must come after `start_step` (0.95)"),
        ("start_step: 0.5", "start_step: 0.5\n  embeddings: 1", "12:15: `quantization.embeddings` must be true or"),
        ("training:\n", "training:\n  seed: 1\n", "7:3: `seed` does not belong in `training`: it is a key"),
        ("training:\n", "training:\n  output_dir: x\n", "7:3: `output_dir` does not belong in `training`"),
        ("training:\n", "training:\n  hub_token: x\n", "7:3: `hub_token` does not belong in `training`: a"),
        ("training:\n", "training:\n  warmup_ratio: 0.1\n", "7:3: `warmup_ratio` is gone from TrainingArguments; use"),
        ("training:\n", "training:\n  optim: adamw_torhc\n", "7:10: `training.optim` cannot be 'adamw_torhc'; did"),
        (
            "training:\n",
            "training:\n  eval_strategy: no\n",
            "7:18: `training.eval_strategy` must be one of no, steps, epoch, but is false; "
            'YAML reads a bare `no` as false: write "no"',
        ),
        ("training:\n", "training:\n  bf16: autom\n", "7:9: `training.bf16` cannot be 'autom'; did you mean `auto`?"),
        ("training:\n", "training:\n  max_steps: 1.5\n", "7:14: `training.max_steps` must be a whole number, but"),
        ("training:\n", "training:\n  weight_decay: .nan\n", "7:17: `training.weight_decay` must be a number"),
        ("training:\n", "training: 3\nx:\n", "6:11: `training` must be a mapping, but is 3"),
        ("output: out", "output: out\nevaluation: {batch_size: 0}", "13:26: `evaluation.batch_size` must be 1 or"),
        ("output: out", "output: out\noutput: b", "13:1: key `output` is repeated (first on line 12)"),
        ("output: out", "output: out\n1: b", "13:1: unknown key `1`; allowed: extends, model, task"),
        ("output: out", "output: 2024-01-01", "12:9: '2024-01-01' reads as YAML `timestamp`, which"),
        ("output: out", "output: !!python/name:os.system ''", "12:9: '' reads as YAML `python/name:os.system`"),
        ("output: out", "output: !!int x", "12:9: 'x' is no int"),
        ("output: out", "output: &a out\nmodel2: *a", "13:9: a recipe has no aliases (`*a`); write the value out"),
        ("output: out", "output: [out", "13:1: not valid YAML: "),
        ("output: out", "output: out\n---\nmodel: b", "13:1: not valid YAML: but found another document"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, old: str, new: str, expected: str) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    found = errors(tmp_path, text)
    assert any(line.startswith(f"recipe.yaml:{expected}") for line in found), found


def test_all_errors_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        GOOD.replace("train:", "trian:", 1).replace("5e-5", "fast").replace("scheme", "schem").replace("out\n", "\n")
    )
    assert [line.split(": ")[0] for line in errors(tmp_path, text)] == [
        "recipe.yaml:2:1",  # `train` is missing in `data`
        "recipe.yaml:3:3",
        "recipe.yaml:7:18",
        "recipe.yaml:10:3",
        "recipe.yaml:12:8",
    ]


def test_an_unreadable_value_is_told_once(tmp_path: Path) -> None:
    found = errors(tmp_path, GOOD.replace("start_step: 0.5", "start_step: 2024-01-01"))
    assert len(found) == 1
    assert "timestamp" in found[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "1:1: the recipe is empty"),
        (b"# nothing\n", "1:1: the recipe is empty"),
        (b"- a\n- b\n", "1:1: a recipe is a mapping of keys to values"),
        (b"\xff\xfe\x00\x01", "1:1: not a text file in UTF-8"),
        (b"model: m\noutput: a\x07b\n", "2:10: not valid YAML: "),
        (b"model: m\noutput: a\xffb\n", "2:10: not a text file in UTF-8"),
        (b"[" * 900 + b"]" * 900, "1:33: nested more than 32 levels deep"),
        (b"#" * 2**20 + b"\n", "1:1: holds 1,048,577 bytes; a recipe is a text of 1,048,576 at most"),
        (b"model: 0x" + b"f" * 9999, "1:8: '0xf"),
        (b"model: !!bool maybe\n", "1:8: 'maybe' is no bool"),
        (b"model: &a b\n", "1:8: a recipe has no anchors (`&a`); remove it"),
        (b'model: "\\UFFFFFFFF"\n', "1:1: not valid YAML: "),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(path)
    assert any(line.startswith(f"{path}:{expected}") for line in str(caught.value).splitlines()), str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist; give the path of a recipe"):
        Recipe.from_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="is a folder, not a recipe"):
        Recipe.from_yaml(tmp_path)


@pytest.mark.parametrize(
    ("max_steps", "start", "freeze", "expected"),
    [
        (10, 2, 0.9, None),
        (10, 9, 0.9, r"`freeze_step` \(0.9\) must come after `start_step` \(9\)"),
        (10, 0.31, 0.39, r"`freeze_step` \(0.39\) must come after `start_step` \(0.31\)"),  # both are step 4
        (10, 10, 11, r"`start_step` \(10\) must come before the end of training \(10 steps\)"),
        (None, 9, 0.9, None),  # nobody knows yet how many steps there will be
        (None, 9, 8, r"`freeze_step` \(8\) must come after `start_step` \(9\)"),
    ],
)
def test_steps_are_compared_where_they_can_be(
    max_steps: int | None, start: float, freeze: float, expected: str | None
) -> None:
    def make() -> Recipe:
        return Recipe(
            model="m",
            output="o",
            task="mrpc",
            training={} if max_steps is None else {"max_steps": max_steps},
            quantization=Quantization(start_step=start, freeze_step=freeze),
        )

    if expected is None:
        assert make().quantization.start_step == start
    else:
        with pytest.raises(RecipeError, match=f"^{expected}"):  # no file, so no place in it
            make()


def test_recipe_made_in_python_is_checked_too() -> None:
    with pytest.raises(RecipeError, match=r"`data\.max_length` must be 1 or more, but is 0\n"):
        Recipe(model="m", output="o", data=Data(max_length=0), quantization=Quantization(scheme="x"))


def test_callbacks_carry_the_settings() -> None:
    wanted = Quantization("int8_dynamic", start_step=3, freeze_step=7, ignore=["a*"], embeddings=False)
    recipe = Recipe(model="m", output="o", task="sst2", quantization=wanted)
    (callback,) = recipe.callbacks()
    got: Any = callback
    assert got.scheme.name == "int8_dynamic"
    assert (got.start_step, got.freeze_step, got.ignore, got.targets, got.embeddings) == (3, 7, ["a*"], None, False)
    assert recipe.callbacks()[0] is not callback


_texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
_steps = st.one_of(st.integers(0, 400), st.floats(0, 0.5))
_recipes = st.builds(
    Recipe,
    model=_texts,
    output=_texts,
    task=st.sampled_from(["mrpc", "stsb"]),
    data=st.builds(Data, data_dir=st.none() | _texts, max_length=st.none() | st.integers(1, 999)),
    training=st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": st.floats(0, 1e300),
            "num_train_epochs": st.integers(1, 99),
            "run_name": _texts,
            "bf16": st.sampled_from(["auto", True, False]),
            "lr_scheduler_kwargs": st.dictionaries(_texts, st.floats(-1e9, 1e9) | _texts, max_size=2),
        },
    ),
    quantization=st.builds(
        lambda scheme, start, patterns, embeddings: Quantization(
            scheme, start, 500 if isinstance(start, int) else 0.9, patterns, None, embeddings
        ),
        st.sampled_from(["int8_static", "int8_dynamic", "int8_weight_only"]),
        _steps,
        st.none() | st.lists(_texts, min_size=1, max_size=3),
        st.booleans(),
    )
    | st.builds(
        lambda scheme, samples: Quantization(
            scheme, method="post_training", calibration_samples=samples if scheme == "int8_static" else 128
        ),
        st.sampled_from(["int8_static", "int8_dynamic", "int4_weight_only"]),
        st.integers(1, 999),
    ),
    evaluation=st.builds(Evaluation, baseline=_texts, max_samples=st.none() | st.integers(1, 10**6)),
    seed=st.integers(0, 2**32 - 1),
)


@given(_recipes)
@settings(max_examples=60)
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = Recipe.from_yaml(path)
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize(
    ("value", "hint", "fitting"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (True, float, False),
        (float("inf"), float, False),
        (10**400, float, False),
        (10**400, int, True),
        ("a", str, True),
        (None, str, False),
        (None, str | None, True),
        (["a"], list[str], True),
        (["a", 1], list[str], False),
        ({}, dict[str, Any], True),
        ([], dict, False),
        (0, bool, False),
        (1, object, False),
    ],
)
def test_fits(value: Any, hint: Any, fitting: bool) -> None:
    assert fits(value, hint) is fitting
    assert (check_type(value, hint, ("x",), Source()) == []) is fitting


def test_describe() -> None:
    assert describe(int | float) == "a number"
    assert describe(list[str] | None) == "a list of texts or null"
    assert describe(dict[str, Any] | str | None) == "a mapping or text or null"


def test_training_arguments_refusals_point_at_the_section(tmp_path: Path) -> None:
    text = GOOD.replace("training:\n", "training:\n  load_best_model_at_end: true\n")
    recipe = read(tmp_path, text)  # each value is right by itself
    with pytest.raises(RecipeError, match=r"recipe\.yaml:6:1: TrainingArguments refuses the `training` section: .*"):
        training_arguments(recipe.training, str(tmp_path / "o"), 1, recipe.source)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, (True, "this CPU has avx512_bf16")),
        ({"amx_bf16": True, "avx512_bf16": True}, (True, "this CPU has amx_bf16")),
        ({"avx512_f": True, "avx512_bf16": False}, (False, "this CPU has no native bfloat16")),
    ],
)
def test_bf16_auto(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capabilities: dict[str, bool], expected: tuple[bool, str]
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert native_bf16(use_cpu=True) == expected
    for section in ({"bf16": "auto", "use_cpu": True}, {"bf16": "auto"}):
        if torch.cuda.is_available() and "use_cpu" not in section:
            continue  # then it is the GPU that counts
        args, precision = training_arguments(section, str(tmp_path), 1, Source())
        assert args.bf16 is expected[0]
        assert args.device.type == "cpu"
        assert precision == f"{'bfloat16' if expected[0] else 'float32'} ({expected[1]})"


def test_shipped_recipes_are_right() -> None:
    files = sorted((REPOSITORY / "recipes").glob("*.yaml"))
    assert len(files) >= 9
    table = (REPOSITORY / "recipes" / "README.md").read_text(encoding="utf-8")
    outputs = {}
    for file in files:
        recipe = Recipe.from_yaml(file)
        assert outputs.setdefault(recipe.output, file.name) == file.name, "they would overwrite each other"
        assert recipe.evaluation.baseline == "train", "each is measured"
        assert recipe.quantizes_after_training is file.stem.endswith(("-dynamic", "-static"))
        assert recipe.training["bf16"] == "auto"
        assert f"[{file.name}]({file.name})" in table
        assert file.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")


def test_the_readme_describes_every_key() -> None:
    text = (REPOSITORY / "recipes" / "README.md").read_text(encoding="utf-8")
    for kind in (Recipe, Data, Pruning, Distillation, Quantization, Evaluation, Hub):
        for field in dataclasses.fields(kind):
            assert field.name == "source" or f"`{field.name}`" in text, field.name


def test_importing_the_schema_and_reading_without_training_loads_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.replace("  learning_rate: 5e-5\n  num_train_epochs: 2\n", ""))
    code = f"import sys; from hf_quant.recipe.schema import Recipe; Recipe.from_yaml({str(path)!r}); "
    code += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_freeze_step_means_nothing_without_static_ranges() -> None:
    recipe = Recipe("m", "out", Quantization("int8_dynamic", start_step=0.95), task="mrpc")
    (callback,) = recipe.callbacks()
    assert callback.start_step == 0.95


@pytest.mark.parametrize(
    "scheme", ["int4_dynamic", "int4_weight_only_g64", "int6_weight_only", "int8_dynamic_symmetric"]
)
def test_schemes_are_known_by_their_parts(tmp_path: Path, scheme: str) -> None:
    recipe = read(tmp_path, GOOD.replace("int8_static", scheme))
    (callback,) = recipe.callbacks()
    assert callback.scheme.name == scheme


PRUNED = GOOD.replace(
    "quantization:\n",
    "pruning:\n  final_sparsity: 0.8\n  criterion: movement\nquantization:\n",
)


def test_pruning_alone_or_as_a_list(tmp_path: Path) -> None:
    recipe = read(tmp_path, PRUNED)
    assert recipe.pruning == [Pruning(final_sparsity=0.8, criterion="movement")]
    both = "pruning:\n- structure: neuron\n  final_sparsity: 0.5\n"
    both += "- schedule: [[5, 0.2], [9, 0.4]]\n  targets: ['*.query']\n"
    recipe = read(tmp_path, GOOD + both)
    assert [one.structure for one in recipe.pruning] == ["neuron", "unstructured"]
    first, second, qat = recipe.callbacks()
    assert first.settings.structure.kind == "neuron"
    assert second.settings.start_step == 5
    assert qat.scheme.name == "int8_static"
    assert read(tmp_path, recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.8", "80", "10:19: `final_sparsity` is 80, but must lie between 0 and 1"),
        ("0.8", "lots", "10:19: `pruning.final_sparsity` must be a number or a mapping or null, but is 'lots'"),
        ("movement", "movment", "11:14: unknown criterion 'movment'"),
        ("criterion: movement", "structure: neurons", "11:14: unknown structure 'neurons'"),
        ("criterion: movement", "structure: '2:4'", "10:19: 2:4 prunes 50.0%, but `final_sparsity` is 0.8"),
        ("criterion: movement", "start_step: 0.7", "11:15: `end_step` (0.6) must come after `start_step` (0.7)"),
        ("criterion: movement", "schedule: cubick", "11:13: unknown schedule 'cubick'"),
        ("criterion: movement", "schedule: [[3]]", "11:13: a schedule of steps is a list of (step, sparsity) pairs"),
        ("criterion", "criterium", "11:3: unknown key `criterium` in `pruning`; did you mean `criterion`?"),
        ("criterion: movement", "scope: local", "11:10: `pruning.scope` cannot be 'local'; did you mean `global`?"),
        ("criterion: movement", "shrink: 1", "11:11: `pruning.shrink` must be true or false, but is 1"),
        (
            "criterion: movement\n",
            "end_step: 300\n  start_step: 9\ntraining:\n  max_steps: 100\n",
            "`end_step` (300, step 300) is not before the end of training (100 steps)",
        ),
    ],
)
def test_wrong_pruning_is_named_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (
        PRUNED.replace("training:\n  learning_rate: 5e-5\n  num_train_epochs: 2\n", "")
        if "max_steps" in new
        else PRUNED
    )
    found = errors(tmp_path, text.replace(old, new, 1) if old != "0.8" else text.replace(": 0.8", f": {new}"))
    assert len(found) == 1
    assert message in found[0]


def test_a_list_says_which_pruning_is_wrong(tmp_path: Path) -> None:
    text = GOOD + "pruning:\n- final_sparsity: 0.5\n- criterion: magnitude\n- 7\n"
    assert errors(tmp_path, text) == [
        "recipe.yaml:15:3: `final_sparsity` is missing: the share of the weights to prune, such as 0.8",
        "recipe.yaml:16:3: `pruning[2]` must be a mapping, but is 7",
    ]
    assert errors(tmp_path, GOOD + "pruning: 0.8\n") == ["recipe.yaml:13:10: `pruning` must be a mapping, but is 0.8"]


def test_a_recipe_compresses_in_one_way_at_least(tmp_path: Path) -> None:
    bare = GOOD[: GOOD.index("quantization:")] + "output: out\n"
    assert errors(tmp_path, bare) == [
        "recipe.yaml:1:1: nothing to do: a recipe has at least one of `pruning`, `distillation`, `quantization`; "
        "write `quantization: {}` for int8 with the defaults"
    ]
    assert errors(tmp_path, bare + "pruning: []\n") == errors(tmp_path, bare)
    recipe = read(tmp_path, bare + "pruning:\n  final_sparsity: 0.5\n")
    assert recipe.quantization is None
    assert "quantization" not in recipe.to_dict()
    assert [type(callback).__name__ for callback in recipe.callbacks()] == ["PruningCallback"]
    assert read(tmp_path, recipe.to_yaml()) == recipe
    with pytest.raises(RecipeError, match=r"^nothing to do: a recipe has at least one of"):
        Recipe("m", "o", task="mrpc")


DISTILLED = GOOD + "distillation:\n  teacher: some/teacher\n  hardness: 0.7\n"


def test_distillation_comes_between_pruning_and_quantization(tmp_path: Path) -> None:
    text = DISTILLED + "  hidden_states: {1: 2, 2: 4}\n  start_step: 0.1\npruning:\n  final_sparsity: 0.5\n"
    recipe = read(tmp_path, text)
    wanted = Distillation("some/teacher", hardness=0.7, hidden_states={1: 2, 2: 4}, start_step=0.1)
    assert recipe.distillation == wanted
    callbacks: list[Any] = recipe.callbacks()
    assert [type(one).__name__ for one in callbacks] == ["PruningCallback", "DistillationCallback", "QATCallback"]
    teaches = callbacks[1]
    assert (teaches.teacher, teaches.hardness, teaches.temperature) == ("some/teacher", 0.7, 2.0)
    assert (teaches.hidden_states, teaches.attention, teaches.cache) == ({1: 2, 2: 4}, False, None)
    assert (teaches.start_step, teaches.end_step) == (0.1, None)
    assert read(tmp_path, recipe.to_yaml()) == recipe
    assert read(tmp_path, GOOD + "distillation:\n").distillation == Distillation()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("hardness: 2", "15:13: `distillation.hardness` must be more than 0 and 1 at most, but is 2"),
        ("hardness: 0", "15:13: `distillation.hardness` must be more than 0 and 1 at most, but is 0"),
        ("temperature: 0", "15:16: `distillation.temperature` must be more than 0, but is 0"),
        ("temprature: 1", "15:3: unknown key `temprature` in `distillation`; did you mean `temperature`?"),
        ("teacher: 3", "15:12: `distillation.teacher` must be text or null, but is 3"),
        ("hidden_states: 3", "15:18: `distillation.hidden_states` must be true or false or a mapping, but is 3"),
        ("hidden_states: {a: 1}", "15:18: `hidden_states` maps numbers of layers"),
        ("attention: {1: one}", "15:14: `attention` maps numbers of layers"),
        ("end_step: 1.5", "15:13: `end_step` must be a whole number of steps from 0, or a share of all steps in [0"),
        ("end_step: 0", "15:13: `end_step` (0) must come after `start_step` (0)"),
        ("cache: x\n  attention: true", "15:10: `cache` keeps predictions only"),
    ],
)  # fmt: skip
def test_wrong_distillation_is_named_with_its_place(tmp_path: Path, change: str, expected: str) -> None:
    found = errors(tmp_path, GOOD + f"distillation:\n  start_step: 0\n  {change}\n")
    assert len(found) == 1
    assert found[0].startswith(f"recipe.yaml:{expected}")


def test_nobody_learns_from_himself(tmp_path: Path) -> None:
    alone = GOOD.replace("quantization:\n  scheme: int8_static\n  start_step: 0.5\n", "distillation: {hardness: 1}\n")
    assert errors(tmp_path, alone) == [
        "recipe.yaml:9:1: `teacher` is missing in `distillation`: without `pruning` or `quantization` by QAT the "
        "model would learn from itself. Name the folder or hub id of a teacher"
    ]
    assert read(tmp_path, alone.replace("{", "{teacher: t, ")).quantization is None
    steps = alone.replace("{", "{teacher: t, start_step: 9, ").replace("num_train_epochs: 2", "max_steps: 9")
    assert errors(tmp_path, steps)[0].startswith("recipe.yaml:9:40: `start_step` (9, step 9) is not before the end")


def test_hub(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD + "hub: {repo_id: me/bert-int8, private: false}\n")
    assert recipe.hub == Hub("me/bert-int8", private=False)
    assert read(tmp_path, recipe.to_yaml()) == recipe
    assert errors(tmp_path, GOOD + "hub:\n") == ["recipe.yaml:13:1: `repo_id` is missing in `hub`: write user/name"]
    assert errors(tmp_path, GOOD + "hub: {repo_id: a/b/c}\n")[0].startswith(
        "recipe.yaml:13:16: `hub.repo_id` is 'a/b/c', but must be `name` or `user/name` of"
    )
    (found,) = errors(tmp_path, GOOD + "hub: {repo_id: a/b, token: hf_x}\n")
    assert found == "recipe.yaml:13:21: unknown key `token` in `hub`; allowed: repo_id, private, commit_message"


def test_all_that_is_wrong_in_one_pruning_is_told(tmp_path: Path) -> None:
    text = GOOD + "pruning:\n  criterion: x\n  structure: y\n  schedule: z\n  frequency: 1.5\n  end_step: -1\n"
    assert [line.split(": ")[0] for line in errors(tmp_path, text)] == [
        f"recipe.yaml:{line}:{column}" for line, column in ((14, 14), (15, 14), (16, 13), (17, 14), (18, 13))
    ]


def test_messages_are_one_line_and_safe_for_a_terminal(tmp_path: Path) -> None:
    found = errors(tmp_path, GOOD + r'"a\nb\e[31m": 1' + "\n")
    assert len(found) == 1
    assert found[0].startswith(r"recipe.yaml:13:1: unknown key `a b\x1b[31m`; allowed: ")


AFTER = GOOD.replace("  start_step: 0.5\n", "  method: post_training\n")


def test_post_training(tmp_path: Path) -> None:
    recipe = read(tmp_path, AFTER)
    assert recipe.quantization == Quantization(method="post_training", calibration_samples=128)
    assert recipe.quantizes_after_training
    assert recipe.callbacks() == []
    written = recipe.to_dict()["quantization"]
    assert written == {
        "scheme": "int8_static",
        "embeddings": True,
        "method": "post_training",
        "calibration_samples": 128,
    }
    assert read(tmp_path, recipe.to_yaml()) == recipe
    dynamic = read(tmp_path, AFTER.replace("int8_static", "int8_dynamic"))
    assert "calibration_samples" not in dynamic.to_dict()["quantization"]
    assert read(tmp_path, dynamic.to_yaml()) == dynamic
    few = read(tmp_path, AFTER.replace("post_training", "post_training\n  calibration_samples: 7"))
    assert few.quantization == Quantization(method="post_training", calibration_samples=7)
    assert read(tmp_path, few.to_yaml()) == few
    qat = read(tmp_path, GOOD)
    assert not qat.quantizes_after_training
    assert set(qat.to_dict()["quantization"]) == {"scheme", "start_step", "freeze_step", "embeddings", "method"}
    pruned = read(tmp_path, AFTER + "pruning:\n  final_sparsity: 0.5\n")
    assert [type(callback).__name__ for callback in pruned.callbacks()] == ["PruningCallback"]


def test_post_training_nulls_the_steps_of_what_it_extends(tmp_path: Path) -> None:
    (tmp_path / "qat.yaml").write_text(GOOD)
    null = "extends: qat.yaml\nquantization:\n  method: post_training\n  start_step: null\noutput: other\n"
    assert read(tmp_path, null).quantization == Quantization(method="post_training")
    with pytest.raises(
        RecipeError, match=r"qat\.yaml:11:3: `start_step` is a step of QAT, and .* or write null where"
    ):
        read(tmp_path, null.replace("  start_step: null\n", ""))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("post_training", "post_traning", "11:11: `quantization.method` cannot be 'post_traning'; did you mean `post"),
        ("method: post_training", "calibration_samples: 9", "11:3: `calibration_samples` goes with `method: post_"),
        ("post_training", "post_training\n  start_step: 0", "12:3: `start_step` is a step of QAT, and `method: post_"),
        ("post_training", "post_training\n  freeze_step: 0.9", "12:3: `freeze_step` is a step of QAT, and `method: "),
        (
            "int8_static\n  method: post_training",
            "int4_weight_only\n  method: post_training\n  calibration_samples: 128",
            "12:3: `calibration_samples` goes with a static scheme, and int4_weight_only needs no data; remove it",
        ),
        ("post_training", "post_training\n  calibration_samples: 0", "12:24: `quantization.calibration_samples` mus"),
        ("int8_static", "8", "10:11: `quantization.scheme` must be text, but is 8"),
        ("int8_static", "float8_dynamic", "10:11: `quantization.scheme` cannot be 'float8_dynamic'"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_the_method(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in AFTER
    found = errors(tmp_path, AFTER.replace(old, new, 1))
    assert len(found) == 1
    assert found[0].startswith(f"recipe.yaml:{expected}")


def test_a_recipe_in_python_cannot_mix_the_methods() -> None:
    with pytest.raises(RecipeError, match=r"^`freeze_step` is a step of QAT"):
        Recipe("m", "o", Quantization(method="post_training", freeze_step=0.5), task="mrpc")
    with pytest.raises(RecipeError, match=r"^`calibration_samples` goes with `method: post_training`"):
        Recipe("m", "o", Quantization(calibration_samples=64), task="mrpc")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["float"]),
        ({"evaluation": Evaluation("none")}, ["float"]),
        ({"quantization": Quantization()}, ["int8", "float"]),
        ({"quantization": Quantization(), "evaluation": Evaluation("none")}, ["int8"]),
        ({"quantization": Quantization(), "distillation": Distillation()}, ["float", "int8"]),
        ({"pruning": [Pruning(0.5)]}, ["model", "float"]),
        ({"pruning": [Pruning(0.5)], "evaluation": Evaluation("some/folder")}, ["model"]),
        ({"pruning": [Pruning(0.5)], "distillation": Distillation()}, ["float", "model"]),
        ({"distillation": Distillation("some/teacher")}, ["model", "float"]),
        ({"quantization": None, "pruning": [Pruning(0.5)]}, ["model", "float"]),
    ],
)
def test_trainings(changes: dict[str, Any], expected: list[str]) -> None:
    values = {"quantization": Quantization(method="post_training"), **changes}
    assert Recipe("m", "o", task="mrpc", **values).trainings() == expected


def test_what_is_quantized_after_training_does_not_learn_from_itself(tmp_path: Path) -> None:
    (found,) = errors(tmp_path, AFTER + "distillation: {}\n")
    assert (
        "`teacher` is missing in `distillation`: without `pruning` or `quantization` by QAT the model would" in found
    )
