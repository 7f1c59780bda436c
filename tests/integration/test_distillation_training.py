"""Distillation in a real Trainer: what it adds to the loss, with QAT and pruning, resumed, cached, and refused."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForQuestionAnswering,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
)

from hf_quant import DistillationCallback, PruningCallback, QATCallback
from hf_quant.distillation.hook import divides_by_count, shifts_labels
from hf_quant.distillation.losses import soft_target_loss
from hf_quant.distillation.teacher import self_teacher
from tests import zoo
from tests.distilled import Rows, losses, saved, train
from tests.tiny import logits, make_trainer, tiny_bert, tiny_gpt2, tiny_llama

ROOT = Path(__file__).parents[2]


def distance(student: Any, teacher: Any) -> float:
    return float(soft_target_loss(logits(student, 32), logits(teacher, 32), 1.0).mean())


def test_it_brings_the_student_nearer_to_its_teacher(tmp_path: Path) -> None:
    """A task with labels of its own, so that the teacher, trained for another, can be told from the labels."""
    teacher = tiny_bert(1)
    changes = {"max_steps": 80, "learning_rate": 3e-3}
    plain = train(tmp_path / "plain", model=tiny_bert(), changes=changes).model
    taught = train(tmp_path / "taught", DistillationCallback(teacher, hardness=0.9), changes=changes).model
    start = distance(tiny_bert(), teacher)
    assert distance(taught, teacher) < 0.5 * min(start, distance(plain, teacher))


@pytest.mark.parametrize(("what", "eager"), [("hidden_states", False), ("attention", True)])
def test_hidden_states_and_attention_come_nearer_too(tmp_path: Path, what: str, eager: bool) -> None:
    kind = {"attn_implementation": "eager", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher = tiny_bert(1, num_hidden_layers=4, **kind)
    changes = {"max_steps": 24, "learning_rate": 3e-3, "logging_steps": 8}
    parts = []
    for given in (False, True, {1: 3}):
        callback = DistillationCallback(teacher, hardness=1.0, **{what: given})
        trainer = train(tmp_path / str(given), callback, model=tiny_bert(**kind), changes=changes)
        parts.append([entry["distillation_loss"] for entry in losses(trainer)])
    assert parts[1][0] > parts[0][0]
    assert parts[1][-1] < 0.8 * parts[1][0]
    assert parts[2][0] != parts[1][0]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("maker", [tiny_bert, tiny_llama, tiny_gpt2])
def test_the_logged_loss_is_the_sum_of_both(tmp_path: Path, maker: Any, accumulation: int) -> None:
    changes = {"gradient_accumulation_steps": accumulation, "logging_steps": 1}
    callback = DistillationCallback(maker(1), hardness=0.3)
    trainer = train(tmp_path, callback, model=maker(), causal=maker is not tiny_bert, changes=changes)
    assert len(losses(trainer)) == 8
    for entry in losses(trainer):
        wanted = 0.7 * entry["task_loss"] + 0.3 * entry["distillation_loss"]
        assert entry["loss"] == pytest.approx(wanted, rel=1e-4)


def test_accumulated_batches_teach_as_one(tmp_path: Path) -> None:
    """Rows of unequal length: without the Trainer's count the parts would weigh wrongly."""
    weights = []
    for size, accumulation in ((8, 1), (2, 4)):
        changes = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 2,
            "optim": "sgd",
            "learning_rate": 0.1,
        }
        callback = DistillationCallback(tiny_llama(1))
        model = train(tmp_path / str(size), callback, model=tiny_llama(), causal=True, changes=changes).model
        weights.append(model.state_dict())
    start = tiny_llama().state_dict()
    for name in start:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(weights[0]["lm_head.weight"], start["lm_head.weight"], atol=1e-3)


@pytest.mark.parametrize(
    ("species", "head"),
    [
        ("bert", "BertLMHeadModel"),
        ("bert", "BertForMaskedLM"),
        ("modernbert", "ModernBertForMaskedLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("llama", "LlamaForCausalLM"),
        ("llama", "LlamaForTokenClassification"),
        ("xlnet", "XLNetLMHeadModel"),
        ("bart", "BartForCausalLM"),
        ("t5", "T5ForConditionalGeneration"),
    ],
)
def test_labels_count_as_in_the_models_own_loss(species: str, head: str) -> None:
    """Whether they are shifted, and whether the Trainer's count divides the loss: read off what the model returns."""
    model = zoo.build(species, head)
    batch = zoo.batch_for(species, model)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    shape = batch.get("decoder_input_ids", batch["input_ids"]).shape
    labels = torch.randint(0, model(**batch).logits.shape[-1], shape, generator=torch.Generator().manual_seed(1))
    outputs = model(**batch, labels=labels)
    of = [
        float(
            nn.functional.cross_entropy(
                outputs.logits[:, : -1 if by else None].flatten(0, 1), labels[:, by:].flatten()
            )
        )
        for by in (0, 1)
    ]
    assert float(outputs.loss) == pytest.approx(of[shifts_labels(model)], rel=1e-4)
    assert of[0] != pytest.approx(of[1], rel=1e-4)
    takes = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    if takes:
        scaled = model(**batch, labels=labels, num_items_in_batch=7).loss
        assert divides_by_count(model) == (not torch.equal(scaled, outputs.loss))


def test_it_leaves_evaluation_the_model_and_the_teacher_alone(tmp_path: Path) -> None:
    """At a learning rate of 0 nothing may change: neither loss nor bytes nor what is trained."""
    changes = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 4}
    plain = train(tmp_path / "plain", changes=changes)
    teacher = tiny_bert(1)
    before = copy.deepcopy(teacher.state_dict())
    callback = DistillationCallback(teacher, hidden_states=True)
    taught = train(tmp_path / "taught", callback, changes=changes)
    metrics = [
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (plain, taught)
    ]
    assert len(metrics[0]) == 2
    assert metrics[0] == metrics[1]
    assert saved(plain, tmp_path / "a") == saved(taught, tmp_path / "b")
    optimized = [sum(len(group["params"]) for group in trainer.optimizer.param_groups) for trainer in (plain, taught)]
    assert optimized[0] == optimized[1]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training
    assert not taught.model._forward_pre_hooks


def test_it_teaches_between_its_steps_only(tmp_path: Path) -> None:
    callback = DistillationCallback(tiny_bert(1), start_step=2, end_step=0.5)
    trainer = train(tmp_path, callback, changes={"logging_steps": 1})
    assert [("distillation_loss" in entry) for entry in losses(trainer)] == [False] * 2 + [True] * 2 + [False] * 4


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_any_order_with_qat_and_pruning_gives_the_same_bytes(tmp_path: Path, scheme: str) -> None:
    made: list[Any] = [
        lambda: DistillationCallback(hidden_states=True),
        lambda: QATCallback(scheme, start_step=4),
        lambda: PruningCallback(0.5, start_step=1, end_step=4, criterion="movement"),
    ]
    found = []
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        folder = tmp_path / str(order[0])
        trainer = train(folder, *[made[index]() for index in order])
        assert losses(trainer)[-1]["distillation_loss"] > 0
        found.append(saved(trainer, folder / "out"))
    assert found[0] == found[1] == found[2]


def test_the_teacher_of_itself_is_the_float_model_before_qat(tmp_path: Path) -> None:
    """Its fake-quant stays off: without dropout the first loss is the error of quantization alone."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for callbacks in ([DistillationCallback(), QATCallback()], [QATCallback(), DistillationCallback()]):
        trainer = make_trainer(tmp_path, tiny_bert(**still), callbacks, changes={"logging_steps": 1})
        (own,) = (c for c in callbacks if isinstance(c, DistillationCallback))
        trainer.train()
        assert own._teacher is not None
        assert torch.equal(logits(own._teacher.model), logits(tiny_bert(**still)))  # type: ignore[arg-type]
        assert 0 < losses(trainer)[0]["distillation_loss"] < 0.01


def test_another_architecture_gets_what_it_takes(tmp_path: Path) -> None:
    """A DistilBERT student drops `token_type_ids`, a DistilBERT teacher is not given them."""
    config = DistilBertConfig(vocab_size=96, dim=32, n_layers=1, n_heads=2, hidden_dim=48, max_position_embeddings=32)
    distil = DistilBertForSequenceClassification(config)
    data = Rows(token_type_ids=torch.ones(32, 12, dtype=torch.long))
    distil.save_pretrained(tmp_path / "teacher")
    for teacher, student in ((str(tmp_path / "teacher"), tiny_bert()), (tiny_bert(), distil)):
        callback = DistillationCallback(teacher, hidden_states=True)
        assert losses(train(tmp_path, callback, model=student, train_dataset=data))[-1]["distillation_loss"] > 0


def test_token_classification_counts_labelled_tokens_only(tmp_path: Path) -> None:
    """The teacher errs on padding and unlabelled tokens alone: nothing is to be learned from it."""

    class Wrong(BertForTokenClassification):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            unlabelled = torch.ones_like(out.logits)
            unlabelled[:, 1:3] = 0
            out.logits = out.logits + 5 * unlabelled * torch.tensor([1.0, -1.0, 0.0])
            return out

    config = tiny_bert(num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).config
    student = BertForTokenClassification(config)
    teacher = Wrong(config)
    teacher.load_state_dict(student.state_dict())
    labels = torch.full((32, 12), -100)
    labels[:, 1:3] = 1
    # Wrong.forward takes what BERT's does, but its signature does not say so.
    Wrong.forward.__signature__ = inspect.signature(BertForTokenClassification.forward)  # type: ignore[attr-defined]
    changes = {"max_steps": 1, "logging_steps": 1}
    given = {"model": student, "train_dataset": Rows(labels=labels), "compute_metrics": None, "changes": changes}
    trainer = train(tmp_path, DistillationCallback(teacher), **given)
    assert losses(trainer)[0]["distillation_loss"] == pytest.approx(0, abs=1e-6)
    assert losses(trainer)[0]["task_loss"] > 0.1


def test_question_answering(tmp_path: Path) -> None:
    config = tiny_bert().config
    student, teacher = (BertForQuestionAnswering(config) for _ in range(2))
    spans = {"start_positions": torch.ones(32, dtype=torch.long), "end_positions": torch.full((32,), 3)}
    data = Rows(labels=None, **spans)
    given = {"model": student, "train_dataset": data, "eval_dataset": data, "compute_metrics": None}
    for cache in (None, tmp_path / "cache"):
        callback = DistillationCallback(teacher, cache=cache)
        changes = {"max_steps": 16, "logging_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 3e-3}
        entries = losses(train(tmp_path, callback, changes=changes, **given))
        for entry in entries:
            wanted = (entry["task_loss"] + entry["distillation_loss"]) / 2
            assert entry["loss"] == pytest.approx(wanted, rel=1e-4)


class OwnLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"cls": OwnLoss}, "does not train on that: no gradient came through it"),
        ({"compute_loss_func": cross_entropy}, "was given no labels, so it computed none"),
    ],
)
def test_a_loss_of_the_trainers_own_is_refused_before_the_first_step(
    tmp_path: Path, kwargs: dict[str, Any], text: str
) -> None:
    trainer = make_trainer(tmp_path, callbacks=[DistillationCallback()], **kwargs)
    with pytest.raises(RuntimeError, match=text):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), tiny_bert().parameters(), strict=True))


def test_what_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` is 0\.1.*Set it to 0"):
        make_trainer(tmp_path, callbacks=[DistillationCallback()], changes={"label_smoothing_factor": 0.1})
    with pytest.raises(ValueError, match="one of 100"):
        make_trainer(tmp_path, callbacks=[DistillationCallback(tiny_bert(vocab_size=100))])
    with pytest.raises(ValueError, match="student's attention 'sdpa' does not give"):
        make_trainer(tmp_path, callbacks=[DistillationCallback(attention=True)])
    trainer = make_trainer(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"to 2 GPUs in one process .*torchrun"):
        DistillationCallback().attach(trainer)


def test_what_is_refused_when_training_begins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two DistillationCallbacks"):
        train(tmp_path, DistillationCallback(), DistillationCallback())
    with pytest.raises(ValueError, match=r"hidden states are 32 wide .* teacher's 64"):
        train(tmp_path, DistillationCallback(tiny_bert(hidden_size=64), hidden_states=True))
    trainer = train(tmp_path, DistillationCallback(), QATCallback())
    with pytest.raises(RuntimeError, match="is int8 already; its weights cannot be trained"):
        make_trainer(tmp_path, trainer.model, [DistillationCallback()])


def test_a_copy_of_the_model_is_frozen() -> None:
    model = tiny_bert()
    teacher = self_teacher(model)
    model.classifier.weight.data.zero_()
    assert bool(teacher.model.classifier.weight.any())  # type: ignore[union-attr,operator]
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
