"""QATCallback in Trainers that do more: losses of their own, generation, models that read their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from hf_quant import QATCallback, load_quantized
from hf_quant.schemes import SCHEMES
from tests.tiny import INT8_SCHEMES, VOCAB, Sentences, logits, make_trainer, tiny_llama

schemes = pytest.mark.parametrize("scheme", sorted(SCHEMES))


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


class Translations(Sentences):
    """Targets are the sources."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "labels": self.input_ids[index]}


@pytest.mark.parametrize("scheme", INT8_SCHEMES)
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


@schemes
def test_weight_that_is_read_without_a_call(scheme: str, tmp_path: Path) -> None:
    """DeBERTa reads its table of relative positions as a tensor."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 32}
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, **relative, intermediate_size=24))
    changes = {"eval_strategy": "steps", "eval_steps": 8}
    trainer = make_trainer(tmp_path, model, [QATCallback(scheme)], changes=changes)
    trainer.train()
    during = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(during, rel=0.02)
    trainer.save_model(str(tmp_path / "int8"))
    assert torch.equal(logits(load_quantized(tmp_path / "int8")), logits(trainer.model))
