"""`load_best_model_at_end`: the best int8 model, never a float one that looked better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_quant import QATCallback, load_quantized
from hf_quant.qparams import quantize, symmetric_scale
from hf_quant.runtime.base import quantized_modules
from tests.tiny import INT8_SCHEMES, make_trainer, tiny_bert, weights_bytes

BEST = {
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 1,
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


class Scores(TrainerCallback):
    """Puts a chosen score among the metrics of each evaluation."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores = scores

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics["eval_score"] = self.scores.get(state.global_step, 0.0)


def _trainer(folder: Path, scores: dict[int, float], scheme: str = "int8_static", **changes: Any) -> Trainer:
    callbacks = [Scores(scores), QATCallback(scheme, start_step=3, freeze_step=6)]
    return make_trainer(folder, callbacks=callbacks, changes={**BEST, **changes})


@pytest.mark.parametrize("scheme", INT8_SCHEMES)
def test_the_best_checkpoint_is_what_becomes_int8(scheme: str, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, {5: 0.9, 7: 0.5}, scheme)
    trainer.train()
    assert trainer.state.best_global_step == 5
    stored = load_file(tmp_path / "run" / "checkpoint-5" / "model.safetensors")
    last = load_file(tmp_path / "run" / "checkpoint-8" / "model.safetensors")
    name = "bert.pooler.dense"
    weight, layer = stored[f"{name}.weight"], quantized_modules(trainer.model)[name]
    assert torch.equal(layer.int8_weight, quantize(weight, symmetric_scale(weight, (-1,))))
    assert not torch.equal(weight, last[f"{name}.weight"])
    if scheme == "int8_static":
        low, high = (stored[f"{name}.activation_fake_quant.observer.{end}_val"] for end in ("min", "max"))
        assert float(layer.input_scale) == pytest.approx(float(high - low) / 255)


def test_a_float_checkpoint_from_before_the_start_is_never_the_best(tmp_path: Path) -> None:
    """It scores highest, but it is a float model's score, and its ranges were never observed."""
    trainer = _trainer(tmp_path, {1: 1.0, 2: 1.0, 3: 1.0, 6: 0.7})
    trainer.train()
    assert trainer.state.best_global_step == 6
    assert trainer.state.best_metric == 0.7
    assert len(quantized_modules(trainer.model)) == 16


def test_the_same_holds_after_a_resume_from_before_the_start(tmp_path: Path) -> None:
    scores = {1: 1.0, 2: 1.0, 3: 1.0, 6: 0.7}
    whole = _trainer(tmp_path, scores)
    whole.train()
    whole.save_model(str(tmp_path / "whole"))
    for step in (2, 3, 5):
        resumed = _trainer(tmp_path, scores)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert resumed.state.best_global_step == 6, step
        resumed.save_model(str(tmp_path / "resumed"))
        assert weights_bytes(tmp_path / "resumed") == weights_bytes(tmp_path / "whole"), step


def test_where_no_evaluation_follows_the_start_the_last_weights_are_taken(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, {3: 1.0}, eval_steps=3, save_steps=3, max_steps=5)
    trainer.train()
    assert trainer.state.best_global_step != 3
    stored = load_file(tmp_path / "run" / "checkpoint-5" / "model.safetensors")["bert.pooler.dense.weight"]
    layer = quantized_modules(trainer.model)["bert.pooler.dense"]
    assert torch.equal(layer.int8_weight, quantize(stored, symmetric_scale(stored, (-1,))))


def test_old_checkpoints_are_removed_but_the_best_one_stays(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, {1: 1.0, 4: 0.8}, save_total_limit=2)
    trainer.train()
    kept = {folder.name for folder in (tmp_path / "run").iterdir()}
    assert kept == {"checkpoint-4", "checkpoint-8"}
    assert trainer.state.best_global_step == 4


def test_saving_only_the_best(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, {2: 0.9, 5: 0.8, 7: 0.1}, save_strategy="best")
    trainer.train()
    assert trainer.state.best_global_step == 5
    trainer.save_model(str(tmp_path / "int8"))
    assert load_quantized(tmp_path / "int8").config.model_type == "bert"


def test_last_checkpoint_of_the_run_is_the_one_before_conversion(tmp_path: Path) -> None:
    """So a run can be taken up again after it has ended."""
    _trainer(tmp_path, {8: 1.0}).train()
    stored = load_file(tmp_path / "run" / "checkpoint-8" / "model.safetensors")
    assert stored["bert.pooler.dense.weight"].dtype == torch.float32


def test_best_model_of_a_plain_module(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_bert()

        def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None) -> Any:
            return self.inner(input_ids, attention_mask=attention_mask, labels=labels)

    callbacks = [Scores({5: 1.0}), QATCallback(start_step=3, freeze_step=6)]
    trainer = make_trainer(tmp_path, Wrapped(), callbacks, changes=BEST)
    trainer.train()
    assert trainer.state.best_global_step == 5
    assert quantized_modules(trainer.model)
    trainer.save_model(str(tmp_path / "int8"))
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    assert stored["inner.bert.pooler.dense.weight"].dtype == torch.int8
