"""QATCallback in real Trainers: what a plain `callbacks=[QATCallback()]` does to a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from hf_quant import QATCallback, load_quantized
from hf_quant.quantization.qat import qat_modules
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.kernels import use_kernel
from hf_quant.runtime.modules import Int8Embedding, Int8Linear
from hf_quant.runtime.packed import PackedLinear
from hf_quant.schemes import SCHEMES
from hf_quant.targets import select_modules
from tests.tiny import Sentences, folder_bytes, logits, make_trainer, tiny_bert, tiny_gpt2, tiny_llama

schemes = pytest.mark.parametrize("scheme", sorted(SCHEMES))
MAKERS = {"bert": (tiny_bert, False), "llama": (tiny_llama, True), "gpt2": (tiny_gpt2, True)}
makers = pytest.mark.parametrize("family", sorted(MAKERS))


class Phases(TrainerCallback):
    """Notes, at each step, whether fake-quant and observers are on."""

    def __init__(self, qat: QATCallback) -> None:
        self.qat = qat
        self.seen: list[tuple[bool, bool]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        shared = next(iter(qat_modules(model).values())).state
        self.seen.append((shared.fake_quantizing, shared.observing))


@makers
@schemes
def test_ends_in_an_int8_model_that_evaluates_predicts_and_saves(family: str, scheme: str, tmp_path: Path) -> None:
    maker, causal = MAKERS[family]
    model = maker()
    expected = select_modules(model, scheme=SCHEMES[scheme])
    linear = PackedLinear if SCHEMES[scheme].packed else Int8Linear
    callback = QATCallback(scheme)
    trainer = make_trainer(tmp_path, model, [callback], causal=causal)
    trainer.train()

    assert trainer.model is model, "converted in place"
    assert {name: type(module) for name, module in quantized_modules(model).items()} == {
        name: Int8Embedding if kind == "embedding" else linear for name, kind in expected.quantized.items()
    }
    conversion = callback.conversion
    assert conversion is not None
    assert conversion.quantized == expected.quantized
    assert conversion.left == expected.left
    assert set(conversion.layer_sqnr) == set(expected.quantized), "every layer was proven on real batches"
    assert min(conversion.layer_sqnr.values()) > 100
    assert conversion.logits_sqnr is not None
    assert conversion.logits_sqnr > 20
    least = 10 if SCHEMES[scheme].bits == 4 else 30
    assert all(least < decibels < 60 for decibels in conversion.error_sqnr.values())

    metrics = trainer.evaluate()
    prediction = trainer.predict(Sentences(8, seed=7, causal=causal))
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), logits(model))
    assert metrics["eval_loss"] > 0

    trainer.save_model(str(tmp_path / "int8"))
    reloaded = load_quantized(tmp_path / "int8")
    assert torch.equal(logits(reloaded), logits(model))


@makers
def test_parameters_and_optimizer_are_the_float_models(family: str, tmp_path: Path) -> None:
    maker, causal = MAKERS[family]
    model = maker()
    before = dict(model.named_parameters())
    plain = make_trainer(tmp_path, copy.deepcopy(model), causal=causal)
    plain.create_optimizer()
    trainer = make_trainer(tmp_path, model, [QATCallback()], causal=causal)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    trainer.create_optimizer()

    def groups(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> list[tuple[float, set[str]]]:
        names = {id(parameter): name for name, parameter in named.items()}
        return [
            (group["weight_decay"], {names[id(parameter)] for parameter in group["params"]})
            for group in optimizer.param_groups
        ]

    expected = groups(plain.optimizer, dict(plain.model.named_parameters()))
    assert groups(trainer.optimizer, before) == expected
    assert sum(len(names) for _, names in expected) == len(before)


def test_optimizer_made_by_the_user_before_the_trainer_trains_the_model(tmp_path: Path) -> None:
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(tmp_path, model, [QATCallback(convert=False)], optimizers=(optimizer, None))
    trainer.train()
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert all("embeddings" in name or "key.bias" in name for name in still), still


def test_phases_follow_the_steps(tmp_path: Path) -> None:
    callback = QATCallback(start_step=2, freeze_step=0.75)
    phases = Phases(callback)
    make_trainer(tmp_path, callbacks=[callback, phases]).train()
    off, observing, frozen = (False, False), (True, True), (True, False)
    assert phases.seen == [off] * 2 + [observing] * 4 + [frozen] * 2


def test_before_the_start_training_is_plain_training(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, tiny_bert())
    plain.train()
    trainer = make_trainer(tmp_path, tiny_bert(), [QATCallback(start_step=7, convert=False)])

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 7

    trainer.add_callback(Stop())
    trainer.train()
    plain_losses = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == plain_losses[: len(losses)]
    assert len(losses) == 3


def test_ranges_stand_still_once_frozen(tmp_path: Path) -> None:
    class Watch(TrainerCallback):
        seen: list[list[float]]

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.seen = []

        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            self.seen.append([float(value) for name, value in model.named_buffers() if ".observer.m" in name])

    watch = Watch()
    make_trainer(tmp_path, callbacks=[QATCallback(start_step=1, freeze_step=5, convert=False), watch]).train()
    assert not any(watch.seen[0])
    assert all(before != after for before, after in zip(watch.seen[:4], watch.seen[1:5], strict=True))
    assert watch.seen[4] == watch.seen[5] == watch.seen[6] == watch.seen[7]


@schemes
@makers
def test_evaluation_during_training_is_the_int8_models(family: str, scheme: str, tmp_path: Path) -> None:
    maker, causal = MAKERS[family]
    trainer = make_trainer(
        tmp_path, maker(), [QATCallback(scheme)], causal=causal, changes={"eval_strategy": "steps", "eval_steps": 8}
    )
    trainer.train()
    during = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    with use_kernel("reference"):
        after = trainer.evaluate()["eval_loss"]
    # Fake-quant and int8 differ by float32 rounding, which may turn a quantum over.
    assert during[-1] == pytest.approx(after, rel=2e-3)
    float_loss = make_trainer(tmp_path, maker(), causal=causal)
    assert float_loss.evaluate()["eval_loss"] != pytest.approx(after, rel=1e-6)


def test_evaluation_before_the_first_step_is_not_a_model_of_zeros(tmp_path: Path) -> None:
    """`eval_on_start` comes before any range was observed."""
    plain = make_trainer(tmp_path, tiny_bert()).evaluate()["eval_loss"]
    trainer = make_trainer(
        tmp_path,
        tiny_bert(),
        [QATCallback(convert=False)],
        changes={"eval_strategy": "steps", "eval_steps": 8, "eval_on_start": True},
    )
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert first["step"] == 0
    assert first["eval_loss"] == pytest.approx(plain, rel=0.02)


@schemes
def test_logs_show_phase_ranges_and_error(scheme: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[QATCallback(scheme, start_step=2, freeze_step=4)])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["qat_phase"] for entry in logs] == [0, 1, 2, 2]
    assert "qat_weight_sqnr_db" not in logs[0]
    least = 15 if SCHEMES[scheme].bits == 4 else 30
    assert all(least < entry["qat_weight_sqnr_db"] < least + 30 for entry in logs[1:])
    if scheme == "int8_static":
        assert all(entry["qat_range_min"] < 0 < entry["qat_range_max"] for entry in logs[1:])
        assert logs[2]["qat_range_max"] == logs[3]["qat_range_max"]
    else:
        assert "qat_range_min" not in logs[1]


def test_table_says_what_was_quantized_what_was_left_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, callbacks=[QATCallback(ignore=["*.key"])])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    out = capsys.readouterr().out
    assert "Converted to int8_static" in out
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert "int8 linear, static inputs" in rows["bert.encoder.layer.*.attention.self.query"]
    assert " 2 " in rows["bert.encoder.layer.*.attention.self.query"]
    assert "int8 embedding" in rows["bert.embeddings.word_embeddings"]
    assert "float: head" in rows["classifier"]
    assert "float: ignored" in rows["bert.encoder.layer.*.attention.self.key"]
    assert "int8 against fake-quant" in out


def test_without_convert_the_model_stays_a_float_qat_model(tmp_path: Path) -> None:
    callback = QATCallback(convert=False)
    trainer = make_trainer(tmp_path, callbacks=[callback])
    trainer.train()
    assert not quantized_modules(trainer.model)
    assert qat_modules(trainer.model)
    assert callback.conversion is None


@pytest.mark.parametrize("resume", [None, True], ids=["fresh", "resumed"])
def test_second_train_is_refused_in_words_and_loses_nothing(resume: bool | None, tmp_path: Path) -> None:
    """The Trainer loads a checkpoint's float weights into the model before it asks any callback."""
    trainer = make_trainer(tmp_path, callbacks=[QATCallback()], changes={"save_strategy": "steps", "save_steps": 4})
    trainer.train()
    expected = logits(trainer.model)
    with pytest.raises(RuntimeError, match=r"int8.* new Trainer from (a|the) float"):
        trainer.train(resume_from_checkpoint=resume)
    assert torch.equal(logits(trainer.model), expected)


def test_a_new_trainer_around_a_loaded_int8_model_evaluates_and_saves_the_same(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[QATCallback()])
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(tmp_path / "int8"))
    model = load_quantized(tmp_path / "int8")
    again = make_trainer(tmp_path, model)
    assert again.evaluate()["eval_loss"] == metrics["eval_loss"]
    again.save_model(str(tmp_path / "again"))
    first, second = folder_bytes(tmp_path / "int8"), folder_bytes(tmp_path / "again")
    assert first["model.safetensors"] == second["model.safetensors"]
    assert first["config.json"] == second["config.json"]


def test_a_new_trainer_with_qat_around_an_int8_model_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[QATCallback()])
    trainer.train()
    trainer.save_model(str(tmp_path / "int8"))
    for model in (trainer.model, load_quantized(tmp_path / "int8")):
        with pytest.raises(RuntimeError, match=r"is int8 already, and int8 weights cannot be trained"):
            make_trainer(tmp_path, model, [QATCallback()])


def test_two_callbacks_on_one_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"prepared by another QATCallback already. Use one QATCallback for each"):
        make_trainer(tmp_path, callbacks=[QATCallback(), QATCallback("int8_dynamic")])


def test_embeddings_can_stay_float(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[QATCallback(embeddings=False)])
    trainer.train()
    assert isinstance(trainer.model.bert.embeddings.word_embeddings, nn.Embedding)
    assert isinstance(trainer.model.bert.pooler.dense, Int8Linear)


def test_layer_that_training_never_runs_goes_back_to_float_and_is_named(tmp_path: Path) -> None:
    """Two-headed models: nothing of the second head was observed, so it has no range."""

    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.evaluated = tiny_bert(), nn.Linear(2, 2)
            nn.init.eye_(self.evaluated.weight)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
            output = self.base(input_ids, attention_mask=attention_mask, labels=labels)
            if not self.training:
                output.logits = self.evaluated(output.logits)
            return output

    callback = QATCallback()
    trainer = make_trainer(tmp_path, Extra(), [callback], changes={"eval_strategy": "steps", "eval_steps": 4})
    trainer.train()
    assert type(trainer.model.evaluated) is nn.Linear
    assert callback.conversion is not None
    assert callback.conversion.left["evaluated"] == "its inputs were never observed"
    during = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(during[-1])
