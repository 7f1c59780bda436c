"""QATCallback under the options that people train with: precision, accumulation, checkpointing, model_init ..."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from hf_quant import QATCallback, load_quantized
from hf_quant.quantization.qat import qat_modules
from hf_quant.runtime.kernels import use_kernel
from hf_quant.runtime.modules import int8_modules
from hf_quant.schemes import SCHEMES
from tests.tiny import VOCAB, Sentences, logits, make_trainer, tiny_bert, tiny_llama, weights_bytes

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
        module.weight_scale.dtype == torch.bfloat16 and module.weight.dtype == torch.int8
        for module in int8_modules(trainer.model).values()
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
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
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
    assert len(int8_modules(trainer.model)) == len(callback.conversion.quantized)


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
    assert len(int8_modules(trainer.model)) == 16
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
    assert len(int8_modules(trainer.model)) == 16


class SupervisedFineTuning(Trainer):
    """A loss of its own around the model's logits, as TRL's trainers have."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        loss = nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        self.log({"entropy": 1.0})
        return (loss, outputs) if return_outputs else loss


def test_trainer_with_a_loss_of_its_own(tmp_path: Path) -> None:
    callback = QATCallback()
    trainer = make_trainer(tmp_path, tiny_llama(), [callback], causal=True, cls=SupervisedFineTuning)
    trainer.train()
    assert callback.conversion is not None
    assert callback.conversion.logits_sqnr is not None
    assert trainer.evaluate()["eval_loss"] > 0


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


class Translations(Sentences):
    """Targets are the sources."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "labels": self.input_ids[index]}


@schemes
def test_generating_evaluation_of_an_encoder_decoder(scheme: str, tmp_path: Path) -> None:
    """The last forward before conversion is a step of `generate`, with a cache among its arguments."""
    torch.manual_seed(0)
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1, forced_eos_token_id=2,
        )
    )  # fmt: skip
    callback = QATCallback(scheme)
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, per_device_eval_batch_size=4, eval_strategy="steps",
        eval_steps=2, predict_with_generate=True, generation_max_length=6, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model=model, args=arguments, train_dataset=Translations(16), eval_dataset=Translations(8), callbacks=[callback]
    )
    trainer.train()
    assert callback.conversion is not None
    assert callback.conversion.logits_sqnr is not None
    assert callback.conversion.logits_sqnr > 20
    assert trainer.evaluate()["eval_loss"] > 0


def test_generation_during_training_of_a_decoder(tmp_path: Path) -> None:
    """A callback that shows samples: the arguments kept for the proof then hold a used cache."""

    class Samples(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            model.eval()
            samples.append(model.generate(**Sentences(2).batch(2), max_new_tokens=3, do_sample=False))
            model.train()

    samples: list[Tensor] = []
    callback = QATCallback()
    make_trainer(tmp_path, tiny_llama(), [callback, Samples()], causal=True).train()
    assert samples[-1].shape == (2, 15)
    assert callback.conversion is not None
    assert callback.conversion.logits_sqnr is not None
    assert callback.conversion.logits_sqnr > 20


def test_only_some_layers_by_pattern(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[QATCallback(targets=["*.layer.1.*"])])
    trainer.train()
    assert {name.split(".")[3] for name in int8_modules(trainer.model)} == {"1"}
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
