"""Heads, neurons and layers in training: pruned as wholes, taken out at the end, int8 after that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from hf_quant import PruningCallback, QATCallback, load_quantized
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.kernels import use_kernel
from tests.tiny import (
    Sentences,
    logits,
    make_trainer,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    weights_bytes,
)


def _llama() -> Any:
    return tiny_llama(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)


def _bert() -> Any:
    return tiny_bert(num_hidden_layers=4)


def test_neurons_are_whole_neurons(tmp_path: Path) -> None:
    callback = PruningCallback(0.5, structure="neuron", start_step=1, end_step=5, frequency=1)
    trainer = make_trainer(tmp_path, callbacks=[callback], changes={"learning_rate": 0.01})
    trainer.train()
    dead = 0
    for layer in trainer.model.bert.encoder.layer:
        up, down = layer.intermediate.dense, layer.output.dense
        rows, bias, columns = (up.weight == 0).all(1), up.bias == 0, (down.weight == 0).all(0)
        assert torch.equal(rows, bias)
        assert torch.equal(rows, columns)
        dead += int(rows.sum())
    assert dead == 48  # of 2 layers x 48
    assert callback.sparsities.keys() == {f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)}


@pytest.mark.parametrize("criterion", ["magnitude", "l2", "fisher", "movement", "first_order", "random"])
@pytest.mark.parametrize(
    ("model", "structure", "smaller"),
    [
        (_bert, "neuron", {"intermediate_size": 24}),
        (_bert, "layer", {"num_hidden_layers": 2}),
        (_llama, "neuron", {"intermediate_size": 24}),
        (_llama, "head", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ],
    ids=["bert neurons", "bert layers", "llama neurons", "llama heads"],
)
def test_shrunk_models_load_plainly(tmp_path: Path, model: Any, structure: str, smaller: Any, criterion: str) -> None:
    callback = PruningCallback(
        0.5, structure=structure, uniform=True, shrink=True, start_step=2, end_step=5, criterion=criterion
    )
    causal = model is _llama
    trainer = make_trainer(tmp_path, model(), [callback], causal=causal)
    trainer.train()
    for key, value in smaller.items():
        assert getattr(trainer.model.config, key) == value
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "out"))
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    again, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(again), logits(trainer.model))
    if not causal:  # there, the Trainer's mean of batches is not the mean over tokens
        assert loss == pytest.approx(float(again(**_labelled()).loss.detach()), rel=1e-4)
    with pytest.raises(RuntimeError, match="was shrunk when training ended"):
        trainer.train()


def _labelled() -> dict[str, torch.Tensor]:
    data = Sentences(16, seed=1)
    return {"input_ids": data.input_ids, "attention_mask": data.attention_mask, "labels": data.labels}


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("structure", ["neuron", "layer"])
def test_prune_shrink_and_int8_in_one_train(tmp_path: Path, scheme: str, order: int, structure: str) -> None:
    pruning = PruningCallback(0.5, structure=structure, uniform=True, shrink=True, start_step=1, end_step=4)
    trainer = make_trainer(tmp_path, _bert(), [pruning, QATCallback(scheme, start_step=4)][::order])
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    layers, width = (2, 48) if structure == "layer" else (4, 24)
    int8 = quantized_modules(trainer.model)
    assert sum("intermediate" in name for name in int8) == layers
    assert all(module.int8_weight.shape[0] == width for name, module in int8.items() if "intermediate" in name)
    again = load_quantized(tmp_path / "out")
    assert torch.equal(logits(again), logits(trainer.model))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with use_kernel("reference"):  # others sum in another order, and a value may round to the other side
        torch.testing.assert_close(logits(plain), logits(trainer.model), rtol=1e-4, atol=1e-4)


class _Die(Exception):
    pass


class _Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise _Die


@pytest.mark.parametrize("structure", ["neuron", "layer"])
@pytest.mark.parametrize("criterion", ["magnitude", "fisher"])
def test_a_resumed_run_ends_in_the_same_bytes(tmp_path: Path, structure: str, criterion: str) -> None:
    def trainer(folder: Path, *more: TrainerCallback) -> Any:
        callback = PruningCallback(
            0.5,
            structure=structure,
            uniform=True,
            shrink=True,
            start_step=2,
            end_step=7,
            frequency=2,
            criterion=criterion,
        )
        changes = {"save_strategy": "steps", "save_steps": 5, "max_steps": 9}
        return make_trainer(folder, _bert(), [callback, *more], changes=changes)

    whole = trainer(tmp_path / "whole")
    whole.train()
    whole.save_model(str(tmp_path / "whole" / "out"))
    with pytest.raises(_Die):
        trainer(tmp_path / "killed", _Kill()).train()
    again = trainer(tmp_path / "killed")
    again.train(resume_from_checkpoint=str(tmp_path / "killed" / "run" / "checkpoint-5"))
    again.save_model(str(tmp_path / "killed" / "out"))
    assert weights_bytes(tmp_path / "whole" / "out") == weights_bytes(tmp_path / "killed" / "out")


def test_heads_stay_as_zeros_without_shrink(tmp_path: Path) -> None:
    callback = PruningCallback(0.5, structure="head", scope="layer", start_step=1, end_step=4)
    trainer = make_trainer(tmp_path, callbacks=[callback, QATCallback("int8_dynamic", start_step=4)])
    trainer.train()
    for index in (0, 1):
        modules = quantized_modules(trainer.model)
        prefix = f"bert.encoder.layer.{index}.attention."
        dead = (modules[prefix + "self.query"].int8_weight == 0).all(1).view(2, 16).all(1)
        assert int(dead.sum()) == 1
        columns = (modules[prefix + "output.dense"].int8_weight == 0).all(0).view(2, 16).all(1)
        assert torch.equal(dead, columns)


def test_heads_and_neurons_together(tmp_path: Path) -> None:
    heads = PruningCallback(0.5, structure="head", uniform=True, shrink=True, start_step=1, end_step=4)
    neurons = PruningCallback(0.25, structure="neuron", uniform=True, shrink=True, start_step=2, end_step=5)
    trainer = make_trainer(tmp_path, _llama(), [heads, neurons], causal=True)
    trainer.train()
    config = trainer.model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 36)
    trainer.save_model(str(tmp_path / "out"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(trainer.model))


def test_gpt2_neurons_shrink(tmp_path: Path) -> None:
    callback = PruningCallback(0.5, structure="neuron", uniform=True, shrink=True, start_step=1, end_step=4)
    trainer = make_trainer(tmp_path, tiny_gpt2(), [callback], causal=True)
    trainer.train()
    assert trainer.model.config.n_inner == 64
    trainer.save_model(str(tmp_path / "out"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(trainer.model))


def test_layers_are_skipped_while_training(tmp_path: Path) -> None:
    """The removed layers do not compute: what their norm would add is not there."""
    losses = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            losses.append(metrics["eval_loss"])

    callback = PruningCallback(0.5, structure="layer", shrink=True, start_step=2, schedule="one_shot")
    changes = {"eval_strategy": "steps", "eval_steps": 8}
    trainer = make_trainer(tmp_path, _bert(), [callback, Watch()], changes=changes)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        losses[0], rel=1e-5
    )  # after and before they were taken out


def test_early_end_does_not_shrink(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    callback = PruningCallback(0.5, structure="neuron", uniform=True, shrink=True, start_step=1, end_step=7)
    trainer = make_trainer(tmp_path, callbacks=[callback, Stop()])
    trainer.train()
    assert trainer.model.config.intermediate_size == 48
    assert "The model is not shrunk" in caplog.text
