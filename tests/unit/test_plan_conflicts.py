"""What in a recipe does not go together: each conflict with its words and its place in the file."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from hf_quant.planning.plan import make_plan
from hf_quant.recipe.source import RecipeError

from ..reviews import SIZES, read_recipe, write_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("plan"))


PRUNE = {"final_sparsity": 0.5, "start_step": 1, "end_step": 4, "frequency": 1}
BEST = {
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
}
# 32 rows in batches of 8 are 4 steps an epoch, which only who reads the data knows.
TWO_EPOCHS = {"max_steps": None, "num_train_epochs": 2}


def test_a_recipe_without_conflicts_has_no_findings(folder: Path) -> None:
    best = {**BEST, "eval_steps": 8, "save_steps": 8}
    assert make_plan(read_recipe(folder, pruning=PRUNE, training=best)).findings == ()


def test_phases_of_qat_do_not_conflict_where_there_are_none(folder: Path) -> None:
    after = {"method": "post_training", "start_step": None, "freeze_step": None}
    for changes in (
        {"pruning": {**PRUNE, "end_step": 7}},
        {"training": {**TWO_EPOCHS, "learning_rate": 0}},
        {"training": BEST},
    ):
        assert make_plan(read_recipe(folder, **changes)).findings
        assert make_plan(read_recipe(folder, **changes, quantization=after)).findings == ()


@pytest.mark.parametrize(
    ("changes", "level", "key", "expected"),
    [
        (
            {"training": TWO_EPOCHS, "quantization": {"start_step": 8, "freeze_step": 9}},
            "error",
            "start_step",
            r"`quantization`: `start_step` \(8, step 8\) is not before the end of training \(8 steps\): no QAT phase",
        ),
        (
            {"training": TWO_EPOCHS, "quantization": {"start_step": 6, "freeze_step": 0.5}},
            "error",
            "freeze_step",
            r"`freeze_step` \(0\.5, step 4\) must come after `start_step` \(6, step 6\): ranges are observed between",
        ),
        (
            {"training": TWO_EPOCHS, "pruning": {**PRUNE, "end_step": 9}},
            "error",
            "end_step",
            r"`pruning`: `end_step` \(9, step 9\) is not before the end of training \(8 steps\)",
        ),
        (
            {"training": TWO_EPOCHS, "distillation": {"start_step": 8}},
            "error",
            "start_step",
            r"`distillation`: `start_step` \(8, step 8\) is not before the end of training",
        ),
        (
            {"distillation": {"attention": True}},
            "error",
            "attention",
            r"`distillation`: `attention` needs attention probabilities, which the model's attention 'sdpa' does not",
        ),
        (
            {"pruning": {**PRUNE, "end_step": 7}, "quantization": {"freeze_step": 6}},
            "error",
            "end_step",
            r"`pruning` goes on until step 7, but activation ranges are frozen at step 6: they would be those of ano",
        ),
        (
            {"pruning": {**PRUNE, "end_step": 5}},
            "warning",
            "start_step",
            r"QAT begins at step 4, before `pruning` ends at step 5: .*Raise `quantization\.start_step` to 5 or later",
        ),
        (
            {"pruning": {**PRUNE, "end_step": 8}, "quantization": {"scheme": "int8_dynamic"}},
            "warning",
            "end_step",
            r"`pruning` reaches its final sparsity at step 8, the last of all: no step is left to recover",
        ),
        (
            {"pruning": {**PRUNE, "frequency": 5}},
            "warning",
            "frequency",
            r"`pruning` updates its masks every 5 steps, but its phase has 3 \(steps 1 to 4\): all is pruned at once",
        ),
        (
            {"pruning": {**PRUNE, "structure": "head", "scope": "layer", "final_sparsity": 0.3}},
            "warning",
            "final_sparsity",
            r"`pruning` asks for a final sparsity of 30\.0%, but 4 parts can only make 50\.0%",
        ),
        (
            {"pruning": {**PRUNE, "start_step": 0, "criterion": "first_order", "initial_sparsity": 0.2}},
            "error",
            "start_step",
            r"criterion 'first_order' needs gradients, and before step 0 there are none",
        ),
        (
            {"pruning": {"schedule": "constant"}},
            "note",
            "pruning",
            r"`pruning` keeps the zeros of the weights; whether there are any is seen by `run`",
        ),
        (
            {"pruning": {**PRUNE, "structure": "neuron", "shrink": True}},
            "error",
            "pruning",
            r"`shrink=True` with scope 'global' leaves each layer another number of neurons, which the config",
        ),
        (
            {"pruning": [PRUNE, {**PRUNE, "targets": ["*.query"]}]},
            "error",
            "{",
            r"`pruning\[1\]` and `pruning\[0\]` both prune bert\.encoder\.layer\.0\.attention\.self\.query\.weight",
        ),
        (
            {"training": {**BEST, "eval_delay": 9}},
            "error",
            "load_best_model_at_end",
            r"finds no checkpoint: QAT begins at step 4, and .* \(evaluations at no step; checkpoints at steps 2, 4",
        ),
        (
            {"training": {**BEST, "eval_delay": 9}, "pruning": PRUNE, "quantization": None},
            "error",
            "load_best_model_at_end",
            r"finds no checkpoint: pruning ends at step 4, and what was evaluated before does not count",
        ),
        (
            {"training": BEST, "quantization": {"start_step": 2, "freeze_step": 7}},
            "warning",
            "load_best_model_at_end",
            r"may be one from before step 7, where ranges are frozen: after step 4 they have seen 2 of 5 steps",
        ),
        (
            {"distillation": {"end_step": 4}},
            "note",
            "end_step",
            r"distillation ends at step 4, before QAT begins at step 4: the teacher does not teach the int8 model",
        ),
        (
            {"training": {"learning_rate": 0.0}},
            "warning",
            "learning_rate",
            r"the learning rate is 0 from step 4 to the end \(linear from 0\): the weights do not learn to be int8",
        ),
        (
            {"training": {"warmup_steps": 9}},
            "warning",
            "warmup_steps",
            r"warm-up takes 9 steps, but training has 8: the learning rate never reaches 0\.01",
        ),
        (
            {"training": {"eval_strategy": "steps", "eval_steps": 20}},
            "warning",
            "eval_steps",
            r"`eval_steps` is 20, but training has 8 steps: the model is evaluated at the end only",
        ),
        (
            {"training": {"save_strategy": "steps", "save_steps": 20}},
            "warning",
            "save_steps",
            r"`save_steps` is 20, but training has 8 steps: a checkpoint is saved at the end only",
        ),
        (
            {"training": {"auto_find_batch_size": True}},
            "note",
            "auto_find_batch_size",
            r"makes batches smaller than 8 where memory is short, and then there are more steps than the 8 planned",
        ),
        (
            {"training": {"logging_steps": 20}},
            "warning",
            "logging_steps",
            r"`logging_steps` is 20, but training has 8 steps: nothing is logged before the end",
        ),
    ],
)
def test_conflicts(folder: Path, changes: dict[str, Any], level: str, key: str, expected: str) -> None:
    recipe = read_recipe(folder, **changes)
    plan = make_plan(recipe)
    (found,) = [finding for finding in plan.findings if re.search(expected, finding.problem.message)]
    assert found.level == level
    assert plan.has_errors is any(finding.level == "error" for finding in plan.findings)
    lines = (folder / "recipe.yaml").read_text(encoding="utf-8").splitlines()
    assert key in lines[found.problem.line - 1], "its place in the file"
    others = [finding for finding in plan.findings if finding is not found and finding.level == "error"]
    assert not others


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"training": {**BEST, "eval_strategy": "epoch"}},
            r":\d+:\d+: TrainingArguments refuses the `training` section: --load_best_model_at_end requires the",
        ),
        ({"training": {**BEST, "save_steps": 3}}, r"found 3, which is not a round multiple of 2"),
        (
            {"training": {"per_device_train_batch_size": 64, "dataloader_drop_last": True}},
            r"`training`: the training data have 32 examples, which make no whole batch of 64",
        ),
        (
            {"training": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}},
            r"`training`: .*cycles",
        ),
        ({"data": {"label_column": "lable"}}, r"the train data have no column `lable`; did you mean `label`\?"),
        ({"data": {"max_length": 99}}, r"`data\.max_length`: `max_length` is 99; allowed for these models: 1 to 32"),
        ({"model": "no/such/model"}, r"no/such/model is no folder"),
    ],
)
def test_where_there_is_nothing_to_plan(folder: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        make_plan(read_recipe(folder, **changes))


def test_errors_that_leave_nothing_to_plan_come_together(folder: Path) -> None:
    recipe = read_recipe(
        folder, model="no/such/model", data={"train": "nowhere.csv"}, training={**BEST, "eval_strategy": "epoch"}
    )
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe)
    assert len(caught.value.problems) == 3


def test_a_config_that_cannot_say_it_is_refused_in_the_words_of_shrink(folder: Path) -> None:
    pruning = {**PRUNE, "structure": "neuron", "shrink": True, "uniform": True, "targets": ["*.layer.0.*"]}
    (found,) = make_plan(read_recipe(folder, pruning=pruning)).findings
    assert found.level == "error"
    assert re.search(r"`pruning`: the config of BertFor.* cannot say that neurons are removed: .*nearest", str(found))


def test_groups_of_weights_that_shrinking_breaks(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    BertModel(BertConfig(**{**SIZES, "intermediate_size": 64})).save_pretrained(model)
    pruning = {**PRUNE, "structure": "neuron", "shrink": True, "uniform": True}
    quantization = {"scheme": "int4_weight_only"}
    recipe = read_recipe(
        folder, model=str(model), pruning={**pruning, "final_sparsity": 0.25}, quantization=quantization
    )
    (found,) = make_plan(recipe).findings
    assert found.level == "error"
    assert re.search(r"bert\.encoder\.layer\.0\.output\.dense would have 48 inputs once units are removed", str(found))
    fits = read_recipe(folder, model=str(model), pruning=pruning, quantization=quantization)
    assert make_plan(fits).findings == ()


def test_dynamic_schemes_have_no_ranges_to_freeze(folder: Path) -> None:
    late = {**PRUNE, "end_step": 7}
    assert make_plan(read_recipe(folder, pruning=late, quantization={"scheme": "int8_dynamic"})).findings == ()
