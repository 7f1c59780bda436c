"""QATCallback under the options that people train with: precision, accumulation, checkpointing, model_init ..."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_quant import QATCallback, load_quantized
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.kernels import use_kernel
from hf_quant.schemes import SCHEMES
from tests.tiny import logits, make_trainer, tiny_bert, tiny_llama

schemes = pytest.mark.parametrize("scheme", sorted(SCHEMES))


def _ranges(model: nn.Module) -> dict[str, float]:
    return {name: float(value) for name, value in model.named_buffers() if ".observer." in name}


@schemes
def test_bf16(scheme: str, tmp_path: Path) -> None:
    callback = QATCallback(scheme)
    trainer = make_trainer(
        tmp_path, callbacks=[callback], changes={"bf16": True, "eval_strategy": "steps", "eval_steps": 8}
    )
    trainer.train()
    assert callback.conversion is not None
    assert min(callback.conversion.layer_sqnr.values()) > 60
    state = trainer.model.state_dict()
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}
    during = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(during[-1], rel=0.05)
    trainer.save_model(str(tmp_path / "int8"))
    reloaded = load_quantized(tmp_path / "int8")
    for name, value in reloaded.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_bfloat16_model(tmp_path: Path) -> None:
    callback = QATCallback()
    trainer = make_trainer(tmp_path, tiny_bert().bfloat16(), [callback])
    trainer.train()
    assert all(
        module.weight_scale.dtype == torch.bfloat16 and module.int8_weight.dtype == torch.int8
        for module in quantized_modules(trainer.model).values()
    )
    trainer.save_model(str(tmp_path / "int8"))
    reloaded = load_quantized(tmp_path / "int8")
    assert reloaded.dtype == torch.bfloat16
    assert torch.equal(logits(reloaded), logits(trainer.model))


def test_ranges_are_kept_in_float32_under_bf16(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[QATCallback(convert=False)], changes={"bf16": True})
    trainer.train()
    buffers = {name: value.dtype for name, value in trainer.model.named_buffers() if ".observer." in name}
    assert set(buffers.values()) == {torch.float32}


def test_bf16_full_eval_leaves_the_ranges_alone(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        callbacks=[QATCallback()],
        changes={"bf16_full_eval": True, "eval_strategy": "steps", "eval_steps": 4},
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_gradient_accumulation_counts_steps_not_forwards(tmp_path: Path) -> None:
    class Count(TrainerCallback):
        counts: list[float]
        phases: list[bool]

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.counts, self.phases = [], []

        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            module = model.bert.pooler.dense
            self.counts.append(float(module.activation_fake_quant.observer.num_batches))
            self.phases.append(module.state.fake_quantizing)

    count = Count()
    make_trainer(
        tmp_path,
        callbacks=[QATCallback(start_step=1, freeze_step=3, convert=False), count],
        changes={"gradient_accumulation_steps": 2, "max_steps": 4},
    ).train()
    assert count.phases == [False, True, True, True]
    assert count.counts == [0, 2, 4, 4], "each of the two micro-batches of steps 1 and 2 was seen"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("maker", [tiny_bert, tiny_llama])
def test_activation_checkpointing_sees_each_batch_once(maker: Any, reentrant: bool, tmp_path: Path) -> None:
    # transformers before 5.23 knows it as gradient checkpointing.
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    options = {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}}
    models = []
    for changes in ({}, options):
        # Reentrant checkpointing needs an input with a gradient: the embeddings', which both have.
        trainer = make_trainer(
            tmp_path, maker(), [QATCallback(convert=False)], causal=maker is tiny_llama, changes=changes
        )
        trainer.train()
        models.append(trainer.model)
    plain, checkpointed = models
    assert _ranges(plain)
    assert _ranges(checkpointed) == pytest.approx(_ranges(plain), rel=1e-5)
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_auto_find_batch_size(tmp_path: Path) -> None:
    class Full(Trainer):
        """Out of memory at any batch of more than two rows, at the second step."""

        def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == 1 and len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    callback = QATCallback()
    model = tiny_bert()
    parameters = {id(parameter) for parameter in model.bert.pooler.parameters()}
    trainer = make_trainer(tmp_path, model, [callback], cls=Full, changes={"auto_find_batch_size": True})
    assert {id(parameter) for parameter in model.bert.pooler.parameters()} == parameters

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            counts.append(float(model.bert.pooler.dense.activation_fake_quant.observer.num_batches))

    counts: list[float] = []
    trainer.add_callback(Count())
    trainer.train()
    assert trainer._train_batch_size < 4
    assert counts[-8:] == [1, 2, 3, 4, 5, 6, 7, 8], "the attempt that worked has ranges of its own"
    assert set(counts[:-8]) == {1}
    assert callback.conversion is not None
    assert len(quantized_modules(trainer.model)) == len(callback.conversion.quantized)


def test_label_smoothing(tmp_path: Path) -> None:
    callback = QATCallback()
    make_trainer(tmp_path, callbacks=[callback], changes={"label_smoothing_factor": 0.1}).train()
    assert callback.conversion is not None


def test_early_stopping(tmp_path: Path) -> None:
    callback = QATCallback()
    trainer = make_trainer(
        tmp_path,
        callbacks=[callback, EarlyStoppingCallback(1, 100.0)],
        changes={
            "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
            "load_best_model_at_end": True, "metric_for_best_model": "loss",
        },
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 8
    assert callback.conversion is not None


def test_only_some_layers_by_pattern(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[QATCallback(targets=["*.layer.1.*"])])
    trainer.train()
    assert {name.split(".")[3] for name in quantized_modules(trainer.model)} == {"1"}
    trainer.save_model(str(tmp_path / "int8"))
    assert torch.equal(logits(load_quantized(tmp_path / "int8")), logits(trainer.model))


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    before = model.bert.embeddings.word_embeddings.weight.detach().clone()
    trainer = make_trainer(tmp_path, model, [QATCallback(convert=False)])
    trainer.train()
    assert torch.equal(trainer.model.bert.embeddings.word_embeddings.weight, before)


@pytest.mark.slow
@schemes
def test_torch_compile(scheme: str, tmp_path: Path) -> None:
    losses: list[Sequence[float]] = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        callback = QATCallback(scheme, start_step=2, freeze_step=5)
        trainer = make_trainer(
            tmp_path, callbacks=[callback], changes={"eval_strategy": "steps", "eval_steps": 4, **changes}
        )
        with use_kernel("reference"):
            trainer.train()
        assert callback.conversion is not None
        assert callback.conversion.logits_sqnr is not None, "compiled runs are proven too"
        assert trainer.evaluate()["eval_loss"] > 0
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
