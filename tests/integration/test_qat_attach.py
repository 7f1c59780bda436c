"""Ways in which the callback joins a Trainer: from the start, later, and with a model_init."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    TrainerCallback,
)

from hf_quant import QATCallback
from hf_quant.quantization.qat import qat_modules
from hf_quant.runtime.base import quantized_modules
from hf_quant.schemes import SCHEMES
from tests.tiny import make_trainer, tiny_bert, tiny_llama, weights_bytes

schemes = pytest.mark.parametrize("scheme", sorted(SCHEMES))


@pytest.mark.parametrize("joined", ["callbacks", "attach"])
def test_model_init(joined: str, tmp_path: Path) -> None:
    made: list[nn.Module] = []

    def model_init() -> nn.Module:
        with torch.random.fork_rng():  # or the run goes on with the random numbers of the model
            made.append(tiny_bert(seed=3))
        return made[-1]

    callback = QATCallback()
    callbacks = [callback] if joined == "callbacks" else []
    trainer = make_trainer(tmp_path, callbacks=callbacks, model_init=model_init)
    if joined == "attach":
        assert callback.attach(trainer) is callback
    trainer.train()
    assert trainer.model is made[-1]
    assert len(quantized_modules(trainer.model)) == 16
    trainer.save_model(str(tmp_path / "int8"))

    direct = make_trainer(tmp_path, tiny_bert(seed=3), [QATCallback()])
    direct.train()
    direct.save_model(str(tmp_path / "direct"))
    assert weights_bytes(tmp_path / "int8") == weights_bytes(tmp_path / "direct")

    trainer.train()  # model_init makes a new float model, so this is a new run
    assert trainer.model is made[-1]
    trainer.save_model(str(tmp_path / "again"))
    assert weights_bytes(tmp_path / "again") == weights_bytes(tmp_path / "int8")


def test_attach_to_a_trainer_that_exists(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, tiny_bert(), [QATCallback()])
    first.train()
    second = make_trainer(tmp_path, tiny_bert())
    callback = QATCallback().attach(second)
    assert qat_modules(second.model), "prepared at once, before a checkpoint can be loaded"
    second.train()
    assert callback.conversion is not None
    for folder, trainer in (("first", first), ("second", second)):
        trainer.save_model(str(tmp_path / folder))
    assert weights_bytes(tmp_path / "first") == weights_bytes(tmp_path / "second")


def test_attach_puts_its_logs_before_reporters(tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            seen.append(dict(logs))

    seen: list[dict[str, Any]] = []
    trainer = make_trainer(tmp_path, callbacks=[Reporter()])
    QATCallback().attach(trainer)
    trainer.train()
    assert all("qat_phase" in logs for logs in seen if "loss" in logs)


def test_add_callback_after_construction_works_for_a_fresh_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_bert())
    trainer.add_callback(QATCallback())
    trainer.train()
    assert len(quantized_modules(trainer.model)) == 16


def test_attaching_twice_is_attaching_once(tmp_path: Path) -> None:
    for options in ({"model": tiny_bert()}, {"model_init": lambda: tiny_bert()}):
        trainer = make_trainer(tmp_path, **options)
        callback = QATCallback()
        callback.attach(trainer)
        callback.attach(trainer)
        assert sum(each is callback for each in trainer.callback_handler.callbacks) == 1
        trainer.train()
        assert len(quantized_modules(trainer.model)) == 16


def test_a_callback_can_be_used_again_with_another_trainer(tmp_path: Path) -> None:
    callback = QATCallback()
    states = []
    for _ in range(2):
        trainer = make_trainer(tmp_path, tiny_bert(), [callback])
        trainer.train()
        states.append(trainer.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    decoder = make_trainer(tmp_path, tiny_llama(), [callback], causal=True)
    decoder.train()
    assert callback.conversion is not None
    assert set(callback.conversion.quantized) == set(quantized_modules(decoder.model))
