"""The losses of distillation in closed form, what they count, and what the callback refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_quant import DistillationCallback
from hf_quant.distillation import losses
from hf_quant.distillation.losses import (
    attention_loss,
    counted_positions,
    hidden_state_loss,
    layer_pairs,
    masked_mean,
    prediction_loss,
    soft_label_loss,
    soft_target_loss,
)
from tests.tiny import tiny_bert

NUMBERS = st.floats(-20, 20, width=32)
TEMPERATURES = st.floats(0.5, 8, width=32)
PAIRS = st.integers(2, 6).flatmap(
    lambda n: st.tuples(st.lists(NUMBERS, min_size=n, max_size=n), st.lists(NUMBERS, min_size=n, max_size=n))
)
IDENTITY = {"class": "A", "weights": "1"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The losses


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_soft_targets_in_closed_form(temperature: float) -> None:
    """Probabilities 3/4 and 1/4 of the teacher, 1/2 of the student."""
    teacher = torch.tensor([temperature * math.log(3), 0.0])
    found = soft_target_loss(torch.zeros(2), teacher, temperature)
    wanted = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(found) == pytest.approx(temperature**2 * wanted, rel=1e-5)


@given(PAIRS, TEMPERATURES)
def test_the_gradient_is_the_difference_of_the_probabilities(pair: Any, temperature: float) -> None:
    """Hinton et al. (2015), eq. 2, times T²."""
    student, teacher = (torch.tensor(logits, dtype=torch.float64) for logits in pair)
    student.requires_grad_()
    soft_target_loss(student, teacher, temperature).backward()
    wanted = temperature * (torch.softmax(student / temperature, -1) - torch.softmax(teacher / temperature, -1))
    torch.testing.assert_close(student.grad, wanted.detach(), rtol=1e-6, atol=1e-9)


@given(PAIRS, TEMPERATURES, NUMBERS)
def test_a_divergence_is_positive_zero_for_equals_and_blind_to_shifts(
    pair: Any, temperature: float, shift: float
) -> None:
    student, teacher = (torch.tensor(logits, dtype=torch.float64) for logits in pair)
    found = soft_target_loss(student, teacher, temperature)
    assert found >= -1e-9
    torch.testing.assert_close(soft_target_loss(student + shift, teacher, temperature), found, rtol=1e-6, atol=1e-9)
    assert float(soft_target_loss(teacher + shift, teacher, temperature)) == pytest.approx(0, abs=1e-9)


@given(PAIRS, TEMPERATURES)
def test_labels_that_do_not_exclude_each_other_are_two_classes_each(pair: Any, temperature: float) -> None:
    student, teacher = (torch.tensor(logits, dtype=torch.float64) for logits in pair)
    two = [torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (student, teacher)]
    torch.testing.assert_close(
        soft_label_loss(student, teacher, temperature), soft_target_loss(*two, temperature), rtol=1e-6, atol=1e-9
    )


def test_large_vocabularies_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = random(3, 5, 11).double().requires_grad_(), random(3, 5, 11, seed=1).double()
    assert torch.autograd.gradcheck(lambda s: soft_target_loss(s, teacher, 2.0), student)
    whole = soft_target_loss(student, teacher, 2.0)
    monkeypatch.setattr(losses, "_CHUNK", 40)
    assert torch.equal(soft_target_loss(student, teacher, 2.0), whole)
    assert torch.autograd.gradcheck(lambda s: soft_target_loss(s, teacher, 2.0), student)
    wanted = nn.functional.kl_div(
        torch.log_softmax(student / 2, -1), torch.softmax(teacher / 2, -1), reduction="none"
    ).sum(-1)
    torch.testing.assert_close(whole, 4 * wanted)


def test_masked_mean() -> None:
    values = torch.tensor([1.0, 2.0, float("inf")])
    mask = torch.tensor([True, True, False])
    assert masked_mean(values, mask) == 1.5
    assert masked_mean(values, mask, 6) == 0.5
    assert masked_mean(values, torch.zeros(3, dtype=torch.bool)) == 0
    assert masked_mean(values[:2], None, torch.tensor(3)) == 1


# What counts

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
LABELS = torch.tensor([[-100, 5, 6, -100], [3, 4, -100, -100]])


@pytest.mark.parametrize(
    ("batch", "shape", "shifted", "wanted"),
    [
        ({"labels": torch.tensor([1, -100])}, (2, 3), False, [True, False]),
        ({"labels": torch.tensor([0.5, 1.0])}, (2, 1), False, None),
        ({"labels": LABELS, "attention_mask": MASK}, (2, 4, 9), False, [[0, 1, 1, 0], [1, 1, 0, 0]]),
        ({"labels": LABELS, "attention_mask": MASK}, (2, 4, 9), True, [[1, 1, 0, 0], [1, 0, 0, 0]]),
        ({"labels": LABELS, "shift_labels": LABELS}, (2, 4, 9), True, [[0, 1, 1, 0], [1, 1, 0, 0]]),
        ({"attention_mask": MASK}, (2, 4, 9), False, MASK.tolist()),
        ({"attention_mask": MASK}, (2, 4, 9), True, [[1, 1, 1, 0], [1, 0, 0, 0]]),
        ({}, (2, 4, 9), False, None),
    ],
)
def test_counted_positions(batch: Any, shape: Any, shifted: bool, wanted: Any) -> None:
    found = counted_positions(shape, batch, shifted)
    assert (found is None) == (wanted is None)
    if found is not None:
        assert found.tolist() == torch.tensor(wanted).bool().tolist()


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_parts_of_a_batch_add_up_to_the_whole(cut: int, seed: int, shifted: bool) -> None:
    """Gradient accumulation: each part is divided by the items of all, and its share goes with it."""
    student, teacher = random(6, 5, 7, seed=seed), random(6, 5, 7, seed=seed + 1)
    labels = torch.where(random(6, 5, seed=seed + 2) > 0, 1, -100)
    labels[0, 2] = labels[5, 2] = 1
    counted = (labels[:, 1:] if shifted else labels).ne(-100).sum()
    whole, _ = prediction_loss({"logits": student}, {"logits": teacher}, {"labels": labels}, 2.0, shifted=shifted)
    parts = [
        prediction_loss(
            {"logits": student[rows]},
            {"logits": teacher[rows]},
            {"labels": labels[rows]},
            2.0,
            shifted=shifted,
            count=counted,
        )
        for rows in (slice(0, cut), slice(cut, 6))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    assert float(parts[0][1] + parts[1][1]) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["tokens", "question"])
def test_padding_is_not_seen(kind: str) -> None:
    batch = {"attention_mask": MASK}
    names = ("logits",) if kind == "tokens" else ("start_logits", "end_logits")
    shape = (2, 4, 3) if kind == "tokens" else (2, 4)
    student, teacher = ({n: random(*shape, seed=s + i) for i, n in enumerate(names)} for s in (0, 5))
    found, _ = prediction_loss(student, teacher, batch, 2.0)
    for outputs in (student, teacher):
        for value in outputs.values():
            value[MASK == 0] = 50.0
    assert torch.equal(prediction_loss(student, teacher, batch, 2.0)[0], found)
    student[names[0]][1] *= 2
    assert not torch.equal(prediction_loss(student, teacher, batch, 2.0)[0], found)


def test_an_answer_is_a_distribution_over_the_unpadded_positions() -> None:
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    student = {"start_logits": torch.zeros(1, 3), "end_logits": torch.zeros(1, 3)}
    teacher = {"start_logits": torch.tensor([[math.log(3), 0.0, 9.0]]), "end_logits": torch.zeros(1, 3)}
    wanted = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2  # the ends are alike
    assert float(prediction_loss(student, teacher, batch, 1.0)[0]) == pytest.approx(wanted, rel=1e-5)


def test_regression_is_the_squared_error_and_several_labels_are_bernoulli() -> None:
    student, teacher = random(4, 1), random(4, 1, seed=1)
    found, _ = prediction_loss({"logits": student}, {"logits": teacher}, {}, 3.0, count=8)
    assert torch.allclose(found, (student - teacher).square().mean())  # as the model's own loss: whatever the count
    student, teacher = random(4, 3), random(4, 3, seed=1)
    found, _ = prediction_loss(
        {"logits": student}, {"logits": teacher}, {}, 3.0, problem="multi_label_classification", count=24
    )
    assert torch.allclose(found, soft_label_loss(student, teacher, 3.0).mean())
    found, _ = prediction_loss({"logits": student}, {"logits": teacher}, {}, 3.0, problem="regression")
    assert torch.allclose(found, (student - teacher).square().mean())


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = random(4, 3).bfloat16(), random(4, 3, seed=1).bfloat16()
    found, _ = prediction_loss({"logits": student}, {"logits": teacher}, {}, 2.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, soft_target_loss(student.float(), teacher.float(), 2.0).mean())


def test_outputs_that_say_different_things_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student's logits are of \(4, 3\), the teacher's of \(4, 2\)"):
        prediction_loss({"logits": random(4, 3)}, {"logits": random(4, 2)}, {}, 2.0)
    with pytest.raises(ValueError, match=r"start_logits are of \(4, 3\), the teacher's none"):
        prediction_loss({"start_logits": random(4, 3), "end_logits": random(4, 3)}, {}, {}, 2.0)
    with pytest.raises(ValueError, match=r"output has loss, masks, but no `logits`.*with a head"):
        prediction_loss({"loss": random(1), "masks": random(4, 3)}, {}, {}, 2.0)
    with pytest.raises(ValueError, match=r"logits of shape \(2, 3, 4, 4\) cannot be distilled"):
        prediction_loss({"logits": random(2, 3, 4, 4)}, {"logits": random(2, 3, 4, 4)}, {}, 2.0)


# Layers


@pytest.mark.parametrize(
    ("student", "teacher", "wanted"),
    [(3, 12, [4, 8, 12]), (6, 12, [2, 4, 6, 8, 10, 12]), (2, 2, [1, 2]), (4, 2, [1, 1, 2, 2]), (4, 6, [2, 3, 4, 6])],
)
def test_layers_are_spread_evenly(student: int, teacher: int, wanted: list[int]) -> None:
    assert layer_pairs(True, student, teacher, 1, "hidden_states") == list(enumerate(wanted, 1))
    less = [(i, theirs - 1) for i, theirs in enumerate(wanted)]
    assert layer_pairs(True, student, teacher, 0, "attention") == less


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_last_learns_from_the_last_and_order_is_kept(student: int, teacher: int) -> None:
    pairs = layer_pairs(True, student, teacher, 1, "hidden_states")
    assert pairs[-1] == (student, teacher)
    theirs = [layer for _, layer in pairs]
    assert theirs == sorted(theirs)
    assert theirs[0] >= 1


def test_layers_that_are_not_there_are_refused() -> None:
    assert layer_pairs({0: 0, 2: 4}, 2, 4, 1, "hidden_states") == [(0, 0), (2, 4)]
    with pytest.raises(ValueError, match=r"`hidden_states` maps layer 3 .* to layer 4 .* student's go from 0 to 2"):
        layer_pairs({3: 4}, 2, 4, 1, "hidden_states")
    with pytest.raises(ValueError, match=r"`attention` maps layer 1 .* to layer 4 .* teacher's go from 0 to 3\."):
        layer_pairs({1: 4}, 2, 4, 0, "attention")


def test_hidden_states_are_compared_without_padding() -> None:
    batch = {"attention_mask": MASK}
    student, teacher = [random(2, 4, 8)], [random(2, 4, 8, seed=1)]
    found = hidden_state_loss(student, teacher, [(0, 0)], batch)
    assert torch.allclose(found, (student[0] - teacher[0])[MASK.bool()].square().mean())
    with pytest.raises(ValueError, match=r"hidden states are 8 wide .* the teacher's 16 .* no projection is added"):
        hidden_state_loss(student, [random(2, 4, 16)], [(0, 0)], batch)


def test_attention_is_compared_without_padded_queries() -> None:
    student, teacher = (torch.softmax(random(2, 3, 4, 4, seed=seed), -1) for seed in (0, 1))
    found = attention_loss([student], [teacher], [(0, 0)], {"attention_mask": MASK})
    by_query = (student - teacher).square().sum(-1).mean(1)
    assert torch.allclose(found, by_query[MASK.bool()].mean())
    with pytest.raises(ValueError, match=r"attention is of \(2, 3, 4, 4\) .* teacher's of \(2, 6, 4, 4\)"):
        attention_loss([student], [random(2, 6, 4, 4)], [(0, 0)], {})


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"teacher": 3}, TypeError, "`teacher` is a folder, a hub id or a model, got 3"),
        ({"hardness": 0}, ValueError, r"`hardness` .* in \(0, 1\], not 0"),
        ({"hardness": "0.5"}, TypeError, "`hardness` must be a number, got '0.5'"),
        ({"temperature": 0.0}, ValueError, "`temperature` .* above 0, not 0.0"),
        ({"temperature": float("nan")}, ValueError, "`temperature` .* above 0, not nan"),
        ({"hidden_states": [1]}, TypeError, r"`hidden_states` must be True, False or a map .* got \[1\]"),
        ({"attention": {"1": 2}}, TypeError, "`attention` maps numbers .* but has '1'"),
        ({"cache": "x", "hidden_states": True}, ValueError, "`cache` keeps predictions only"),
        ({"start_step": 1.5}, ValueError, "`start_step`=1.5 is a float"),
        ({"start_step": 0.5, "end_step": 0.5}, ValueError, r"`end_step` \(0.5\) must come after `start_step`"),
    ],
)
def test_values_that_are_not_allowed(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        DistillationCallback(**arguments)


def test_steps_are_checked_against_their_number() -> None:
    assert DistillationCallback(start_step=0.25, end_step=6).check_steps(8) == (2, 6)
    assert DistillationCallback().check_steps(8) == (0, 8)
    with pytest.raises(ValueError, match=r"`start_step` \(9, step 9\) is not before the end of training \(8 steps\)"):
        DistillationCallback(start_step=9).check_steps(8)
    with pytest.raises(ValueError, match=r"`end_step` \(0.1\) must come after `start_step` \(4\)"):
        DistillationCallback(start_step=4, end_step=0.1).check_steps(8)


def test_check_changes_nothing(tmp_path: Path) -> None:
    model = tiny_bert().train()
    DistillationCallback().check(model)
    DistillationCallback(tiny_bert(1)).check(model)
    assert model.training
    assert not model._forward_hooks
    with pytest.raises(ValueError, match="model's attention 'sdpa' does not give"):
        DistillationCallback(attention=True).check(model)
    with pytest.raises(ValueError, match="one of 100"):
        DistillationCallback(tiny_bert(vocab_size=100)).check(model)
