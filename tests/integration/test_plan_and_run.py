"""What a plan says beforehand is what a run then does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

from hf_quant.callbacks.pruning import PruningCallback
from hf_quant.planning.measure import measure
from hf_quant.planning.plan import make_plan
from hf_quant.quantization.qat import qat_modules
from hf_quant.recipe.progress import TrainingProgress
from hf_quant.recipe.run import run
from hf_quant.recipe.schema import Recipe

from ..kinds import kind_recipe, write_kind
from ..reviews import read_recipe, write_files


class Seen:
    """What the training of the result inside a run really did, and which trainings there were."""

    def __init__(self) -> None:
        self.name = ""
        self.trainings: list[str] = []
        self.trainer: Trainer | None = None
        self.pruned: list[PruningCallback] = []
        self.phases: list[str] = []
        self.rates: list[float] = []
        self.saves: list[int] = []
        self.optimizer_bytes = 0
        self.mask_bytes = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Watches through the display of `run`, which is a callback that comes after the others."""
    found = Seen()
    made = Trainer.__init__

    def init(self: Trainer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        folder = Path(str(self.args.output_dir))
        if (folder.parent.name, folder.name) == ("checkpoints", found.name):
            found.trainer = self
            found.pruned = [one for one in kwargs["callbacks"] if isinstance(one, PruningCallback)]

    def begin(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            found.trainings.append(self.phase)
        if self.phase == found.name:
            modules = list(qat_modules(kwargs["model"]).values())
            on = bool(modules) and modules[0].state.fake_quantizing
            found.phases.append("float" if not on else "observing" if modules[0].state.observing else "frozen")

    def step(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.phase == found.name:
            optimizer = kwargs["optimizer"]
            found.rates.append(optimizer.param_groups[0]["lr"])
            values = [value for one in optimizer.state.values() for value in one.values()]
            found.optimizer_bytes = sum(v.nbytes for v in values if isinstance(v, Tensor) and v.numel() > 1)
            found.mask_bytes = sum(callback.memory for callback in found.pruned)

    def saved(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.phase == found.name:
            found.saves.append(state.global_step)

    monkeypatch.setattr(Trainer, "__init__", init)
    monkeypatch.setattr(TrainingProgress, "on_step_begin", begin)
    monkeypatch.setattr(TrainingProgress, "on_pre_optimizer_step", step)
    monkeypatch.setattr(TrainingProgress, "on_save", saved)
    return found


def check(recipe: Recipe, seen: Seen) -> None:
    """Plans, runs, and compares."""
    plan = make_plan(recipe)
    assert not plan.has_errors
    planned_trainings = plan.to_dict()["trainings"]
    seen.name = ([name for name in planned_trainings if name != "float"] or ["float"])[0]
    result = run(recipe, console=Console(quiet=True))
    steps, qat, student = plan.steps, plan.phases.quantization, seen.trainer
    assert student is not None
    assert seen.trainings == planned_trainings
    assert student.state.max_steps == student.state.global_step == steps.total == len(seen.phases)
    for step, phase in enumerate(seen.phases):
        if qat is None or step < qat.start:
            expected = "float"
        elif qat.freeze is None:
            expected = seen.phases[qat.start]
            assert expected != "float"
        else:
            expected = "observing" if step < qat.freeze else "frozen"
        assert phase == expected, step
    rates = dict(plan.rates)
    assert list(rates) == list(range(steps.total)), "so short a training is drawn step by step"
    assert seen.rates == pytest.approx(list(rates.values()))
    assert seen.saves == list(steps.saves)
    logged = [entry["step"] for entry in student.state.log_history if "eval_loss" in entry]
    assert logged[: len(steps.evaluations)] == list(steps.evaluations)
    assert set(logged[len(steps.evaluations) :]) <= {steps.total}, "after the training, the result"

    size, memory = plan.size, plan.memory
    assert size is not None
    assert memory is not None
    assert size.result_bytes == pytest.approx((result.int8_model / "model.safetensors").stat().st_size, rel=0.01)
    if result.float_model is not None:
        assert size.float_bytes == pytest.approx((result.float_model / "model.safetensors").stat().st_size, rel=0.01)
    assert memory.optimizer == pytest.approx(seen.optimizer_bytes, rel=0.01)
    assert memory.pruning == seen.mask_bytes

    prunings = list(plan.phases.prunings.values())
    assert len(prunings) == len(seen.pruned) == len(recipe.pruning)
    for planned, callback in zip(prunings, seen.pruned, strict=True):
        assert [step for step, _ in planned.goals] == [step for step, _, _ in callback.history]
        assert [goal for _, goal in planned.goals] == pytest.approx(
            [goal for _, goal, _ in callback.history], abs=1e-6
        )
        assert planned.reached == pytest.approx(callback.history[-1][2], abs=1e-3)
    config = json.loads((result.int8_model / "config.json").read_text(encoding="utf-8"))
    shrunk = any(one.shrink for one in recipe.pruning)
    assert (size.kept < size.parameters) is shrunk
    if shrunk:
        assert (config["intermediate_size"], config["num_hidden_layers"]) != (48, 2)


NEURONS = {"structure": "neuron", "final_sparsity": 0.5, "uniform": True, "shrink": True}
HEADS = {"structure": "head", "final_sparsity": 0.5, "scope": "layer"}
STEPS = {"start_step": 1, "end_step": 4, "frequency": 1}
AFTER = {"method": "post_training", "start_step": None, "freeze_step": None}


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluation": {"baseline": "train"}},
        {"quantization": {"scheme": "int8_dynamic", "embeddings": False}},
        {"quantization": {"scheme": "int4_weight_only", "start_step": 2}},
        {"quantization": None, "pruning": {"final_sparsity": 0.5, "structure": "2:4", **STEPS}},
        {
            "pruning": {"final_sparsity": 0.6, **STEPS, "criterion": "movement"},
            "training": {
                "max_steps": None,
                "num_train_epochs": 1.7,
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 3,
                "eval_strategy": "epoch",
                "warmup_steps": 0.3,
            },
            "quantization": {"start_step": 6, "freeze_step": 0.9},
        },
        {
            "pruning": [{**NEURONS, **STEPS}, {**HEADS, **STEPS}],
            "training": {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"},
        },
        {"pruning": {**NEURONS, **STEPS, "criterion": "fisher"}, "quantization": {"scheme": "int8_weight_only"}},
        {
            "pruning": {"structure": "layer", "final_sparsity": 0.5, "shrink": True, **STEPS},
            "distillation": {"start_step": 2},
            "training": {"eval_strategy": "steps", "eval_steps": 3, "optim": "adafactor"},
        },
        {"quantization": AFTER, "evaluation": {"baseline": "train"}, "training": {"eval_strategy": "epoch"}},
        {"quantization": {**AFTER, "scheme": "int4_weight_only"}, "training": {"save_strategy": "epoch"}},
        {
            "quantization": {**AFTER, "scheme": "int8_dynamic", "embeddings": False},
            "pruning": {**NEURONS, **STEPS},
            "evaluation": {"baseline": "train"},
        },
    ],
    ids=[
        *("static", "dynamic", "int4", "float", "sparse", "shrunk", "neurons", "layers"),
        *("static after", "int4 after", "shrunk after"),
    ],
)
def test_plan_then_run(tmp_path: Path, seen: Seen, changes: dict[str, Any]) -> None:
    check(read_recipe(write_files(tmp_path), **changes), seen)


@pytest.mark.parametrize("kind", ["token_classification", "question_answering", "causal_lm"])
def test_windows_and_tags(tmp_path: Path, seen: Seen, kind: str) -> None:
    # The number of windows follows from the tokens of the texts.
    folder = write_kind(tmp_path, kind)
    training = {"max_steps": None, "num_train_epochs": 1}
    scheme = {"scheme": "int4_weight_only" if kind == "causal_lm" else "int8_static", "start_step": 0}
    recipe = Recipe.from_yaml(kind_recipe(folder, kind, training=training, quantization=scheme))
    assert measure(make_plan(recipe)).total > 0
    check(recipe, seen)


def test_zeros_are_those_of_the_trained_model(tmp_path: Path, seen: Seen) -> None:
    folder = write_files(tmp_path)
    single = {"final_sparsity": 0.7, "targets": ["*.layer.?.intermediate.*", "*.layer.?.output.*"]}
    recipe = read_recipe(
        folder,
        pruning=[{**single, **STEPS}, {**HEADS, **STEPS}],
        training={"save_strategy": "steps", "save_steps": 8},
    )
    size = make_plan(recipe).size
    assert size is not None
    run(recipe, console=Console(quiet=True))
    weights = load_file(folder / "out" / "checkpoints" / "int8" / "checkpoint-8" / "model.safetensors")
    trained = {name for name, _ in recipe_parameters(folder)}
    zeros = sum(int((weights[name] == 0).sum()) for name in trained)
    assert size.zeros is not None
    # The padding's embedding is 0 from the start, and biases of keys have no gradient.
    assert size.zeros <= zeros <= size.zeros + 3 * 32


def recipe_parameters(folder: Path) -> list[tuple[str, Tensor]]:
    """The parameters of the model of [`write_files`]."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder / "model")
    return list(AutoModelForSequenceClassification.from_config(config).named_parameters())
