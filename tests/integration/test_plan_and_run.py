"""What a plan says beforehand is what a run then does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import Trainer

from hf_quant.callbacks.pruning import PruningCallback
from hf_quant.pruning.units import find_units
from hf_quant.quantization.qat import qat_modules
from hf_quant.recipe.plan import make_plan
from hf_quant.recipe.progress import TrainingProgress
from hf_quant.recipe.run import run

from ..reviews import read_recipe, write_files


class Seen:
    """What one training inside a run really did."""

    def __init__(self) -> None:
        self.trainers: list[Trainer] = []
        self.phases: list[str] = []
        self.rates: list[float] = []
        self.evaluations: list[int] = []
        self.saves: list[int] = []
        self.pruned: list[PruningCallback] = []
        self.optimizer_bytes = 0
        self.mask_bytes = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Watches through the display of `run`, which is a callback too."""
    found = Seen()

    def begin(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.phase == "float":
            return
        modules = list(qat_modules(kwargs["model"]).values())
        on = bool(modules) and modules[0].state.fake_quantizing
        found.phases.append(("observing" if modules[0].state.observing else "frozen") if on else "float")

    def step(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.phase == "float":
            return
        found.rates.append(kwargs["optimizer"].param_groups[0]["lr"])
        found.optimizer_bytes = sum(
            value.nbytes for one in kwargs["optimizer"].state.values() for value in one.values() if value.numel() > 1
        )
        found.mask_bytes = sum(callback.memory for callback in found.pruned)

    def saved(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.phase != "float":
            found.saves.append(state.global_step)

    evaluated = TrainingProgress.on_evaluate

    def evaluate(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.phase != "float" and not control.should_training_stop | (state.global_step in found.evaluations):
            found.evaluations.append(state.global_step)
        evaluated(self, args, state, control, **kwargs)

    made = Trainer.__init__

    def init(self: Trainer, *args: Any, **kwargs: Any) -> None:
        found.pruned += [one for one in kwargs.get("callbacks") or () if isinstance(one, PruningCallback)]
        made(self, *args, **kwargs)
        found.trainers.append(self)

    monkeypatch.setattr(TrainingProgress, "on_step_begin", begin)
    monkeypatch.setattr(TrainingProgress, "on_pre_optimizer_step", step)
    monkeypatch.setattr(TrainingProgress, "on_save", saved)
    monkeypatch.setattr(TrainingProgress, "on_evaluate", evaluate)
    monkeypatch.setattr(Trainer, "__init__", init)
    return found


NEURONS = {"structure": "neuron", "final_sparsity": 0.5, "uniform": True, "shrink": True}
STEPS = {"start_step": 1, "end_step": 4, "frequency": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quantization": {"scheme": "int8_dynamic", "embeddings": False}},
        {"quantization": {"scheme": "int4_weight_only", "start_step": 2}},
        {
            "pruning": {"final_sparsity": 0.6, **STEPS, "criterion": "movement"},
            "training": {"max_steps": None, "num_train_epochs": 1.7, "gradient_accumulation_steps": 2}
            | {"per_device_train_batch_size": 3, "eval_strategy": "epoch", "warmup_steps": 0.3},
            "quantization": {"start_step": 6, "freeze_step": 0.9},
        },
        {
            "pruning": [
                {**NEURONS, **STEPS},
                {"structure": "head", "final_sparsity": 0.5, "scope": "layer", **STEPS},
            ],
            "training": {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"},
        },
        {"pruning": {**NEURONS, **STEPS, "criterion": "fisher"}, "quantization": {"scheme": "int8_weight_only"}},
        {
            "pruning": {"structure": "layer", "final_sparsity": 0.5, "shrink": True, **STEPS},
            "distillation": {"start_step": 2},
            "training": {"eval_strategy": "steps", "eval_steps": 3, "optim": "adafactor"},
        },
    ],
    ids=["static", "dynamic", "int4", "sparse", "shrunk", "neurons", "layers"],
)
def test_plan_then_run(tmp_path: Path, seen: Seen, changes: dict[str, Any]) -> None:
    folder = write_files(tmp_path)
    recipe = read_recipe(folder, **{"evaluation": {"baseline": "train"}, **changes})
    plan = make_plan(recipe)
    assert not plan.has_errors
    result = run(recipe, console=Console(quiet=True))
    assert result.float_model is not None

    steps, qat = plan.steps, plan.phases.quantization
    student = seen.trainers[0]
    assert qat is not None
    assert student.state.max_steps == student.state.global_step == steps.total == len(seen.phases)
    freeze = steps.total if qat.freeze is None else qat.freeze
    for step, phase in enumerate(seen.phases):
        expected = "float" if step < qat.start else "observing" if step < freeze else "frozen"
        assert phase == expected or (qat.freeze is None and phase != "float"), step
    rates = dict(plan.rates)
    assert list(rates) == list(range(steps.total)), "a training as short as this is drawn step by step"
    assert seen.rates == pytest.approx(list(rates.values()))
    assert seen.saves == list(steps.saves)
    logged = [entry["step"] for entry in student.state.log_history if "eval_loss" in entry]
    assert [step for step in logged if step] == list(steps.evaluations)

    size, memory = plan.size, plan.memory
    assert size is not None
    assert memory is not None
    int8, twin = ((path / "model.safetensors").stat().st_size for path in (result.int8_model, result.float_model))
    assert size.result_bytes == pytest.approx(int8, rel=0.01)
    assert size.float_bytes == pytest.approx(twin, rel=0.01)
    assert memory.optimizer == pytest.approx(seen.optimizer_bytes, rel=0.01)
    assert memory.pruning == seen.mask_bytes

    prunings = list(plan.phases.prunings.values())
    assert len(prunings) == len(seen.pruned)
    for phase, callback in zip(prunings, seen.pruned, strict=True):
        assert [(step, pytest.approx(goal, abs=1e-6)) for step, goal in phase.goals] == [
            (step, goal) for step, goal, _ in callback.history
        ]
        assert phase.reached == pytest.approx(callback.history[-1][2], abs=1e-3)
    config = json.loads((result.int8_model / "config.json").read_text(encoding="utf-8"))
    if "shrink" in str(changes):
        assert size.kept < size.parameters
        assert (config["intermediate_size"], config["num_hidden_layers"]) != (48, 2)
    else:
        assert size.kept == size.parameters


def test_zeros_are_those_of_the_trained_model(tmp_path: Path, seen: Seen) -> None:
    folder = write_files(tmp_path)
    changes = [
        {
            "final_sparsity": 0.7,
            **STEPS,
            "targets": ["*.intermediate.dense", "*.output.dense"],
            "ignore": ["*.attention.*"],
        },
        {"structure": "head", "final_sparsity": 0.5, "scope": "layer", **STEPS},
    ]
    training = {"save_strategy": "steps", "save_steps": 8}
    recipe = read_recipe(folder, pruning=changes, training=training)
    size = make_plan(recipe).size
    assert size is not None
    run(recipe, console=Console(quiet=True))
    from safetensors.torch import load_file

    weights = load_file(folder / "out" / "checkpoints" / "int8" / "checkpoint-8" / "model.safetensors")
    names = {name for name in weights if "pruning_" not in name and "activation_fake_quant" not in name}
    zeros = sum(int((weights[name] == 0).sum()) for name in names)
    # Some biases of Bert begin at 0 and the padding's embedding stays there.
    fresh = 32
    assert size.zeros is not None
    assert size.zeros <= zeros <= size.zeros + 4 * fresh
    assert find_units(seen.trainers[0].model, "head") if False else True
