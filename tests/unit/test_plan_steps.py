"""Steps, events and learning rates that are planned, against real Trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from hf_quant.planning.steps import count_steps, learning_rates

from ..tiny import Sentences, make_trainer, tiny_tokenizer, training_arguments


class Spy(TrainerCallback):
    """What a Trainer really did."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.evaluations: list[int] = []
        self.saves: list[int] = []
        self.epochs: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epochs.append(state.epoch)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluations.append(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saves.append(state.global_step)


EPOCHS: dict[str, Any] = {"max_steps": -1}
BOTH: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps"}


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (32, {}),
        (33, {**EPOCHS, "num_train_epochs": 2}),
        (33, {**EPOCHS, "num_train_epochs": 2, "dataloader_drop_last": True}),
        (35, {**EPOCHS, "num_train_epochs": 1.3, "gradient_accumulation_steps": 2}),
        (37, {**EPOCHS, "num_train_epochs": 2, "gradient_accumulation_steps": 4, "eval_strategy": "epoch"}),
        (6, {**EPOCHS, "num_train_epochs": 3, "gradient_accumulation_steps": 8, "save_strategy": "epoch"}),
        (33, {"max_steps": 13, "eval_strategy": "epoch", "save_strategy": "epoch", "warmup_steps": 3}),
        (33, {"max_steps": 13, "eval_strategy": "epoch", "eval_delay": 1, "gradient_accumulation_steps": 3}),
        (32, {"max_steps": 10, **BOTH, "eval_steps": 3, "save_steps": 5, "warmup_steps": 0.25}),
        (32, {"max_steps": 10, **BOTH, "eval_steps": 0.3, "save_steps": 0.5, "eval_delay": 5}),
        (32, {"max_steps": 8, **BOTH, "eval_steps": 100, "save_steps": 4, "eval_on_start": True}),
        (32, {"max_steps": 9, "eval_strategy": "steps", "logging_steps": 4, "lr_scheduler_type": "cosine"}),
        (32, {**EPOCHS, "train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 3}),
        (32, {**EPOCHS, "train_sampling_strategy": "group_by_length", "lr_scheduler_type": "inverse_sqrt"}),
        (
            35,
            {
                **EPOCHS,
                "train_sampling_strategy": "batch_rebalance",
                "gradient_accumulation_steps": 2,
                "dataloader_drop_last": True,
            },
        ),
        (
            32,
            {
                "lr_scheduler_type": "polynomial",
                "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 1e-5},
                "warmup_steps": 2,
            },
        ),
        (
            32,
            {
                "max_steps": 12,
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 4},
                "warmup_steps": 0.2,
            },
        ),
    ],
)
def test_a_plan_counts_what_a_trainer_does(tmp_path: Path, rows: int, changes: dict[str, Any]) -> None:
    spy = Spy()
    trainer = make_trainer(
        tmp_path, callbacks=[spy], changes=changes, train_dataset=Sentences(rows), processing_class=tiny_tokenizer()
    )
    planned = count_steps(trainer.args, rows)
    rates = learning_rates(trainer.args, planned.total, range(planned.total))
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == planned.total == len(spy.rates)
    assert rates == pytest.approx(spy.rates, rel=1e-12, abs=1e-18)
    assert list(planned.evaluations) == spy.evaluations
    assert list(planned.saves) == spy.saves
    assert [planned.epoch(step + 1) for step in range(planned.total)] == pytest.approx(spy.epochs)


def test_the_best_are_saved_among_the_evaluated(tmp_path: Path) -> None:
    spy = Spy()
    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss"}
    trainer = make_trainer(tmp_path, callbacks=[spy], changes=best)
    planned = count_steps(trainer.args, 32)
    trainer.train()
    assert planned.saves_best_only
    assert planned.saves == planned.evaluations == (3, 6, 8)
    assert spy.saves
    assert set(spy.saves) <= set(planned.saves)


def test_a_rate_that_depends_on_evaluations_is_not_planned(tmp_path: Path) -> None:
    wanted = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    assert learning_rates(training_arguments(tmp_path, **wanted), 8, range(8)) is None


@pytest.mark.parametrize(
    ("rows", "changes", "expected"),
    [
        (3, {"dataloader_drop_last": True}, r"3 examples, which make no whole batch of 4, and `dataloader_drop_last`"),
        (32, {"max_steps": 0}, r"`max_steps` is 0, so there is no step to take"),
        (32, {"max_steps": -1, "num_train_epochs": 0}, r"`num_train_epochs` is 0, so there is no step"),
    ],
)
def test_no_step_at_all(tmp_path: Path, rows: int, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        count_steps(training_arguments(tmp_path, **changes), rows)


def test_a_trainer_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a Trainer was made")

    monkeypatch.setattr(Trainer, "__init__", refuse)
    assert count_steps(training_arguments(tmp_path), 32).total == 8
    assert not (tmp_path / "run").exists()
