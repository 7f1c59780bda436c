"""All calibration batches as one, and the forward that stops on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_quant.quantization.one_pass import Finished, merge_batches, one_pass
from tests.tiny import Sentences, tiny_llama


def test_sequences_are_padded_at_the_right_where_a_mask_says_so() -> None:
    long = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 1]])}
    short = {"input_ids": torch.tensor([[8], [9]]), "attention_mask": torch.tensor([[True], [True]])}
    features = (
        {"inputs_embeds": torch.ones(1, 3, 2), "labels": torch.tensor([[1, 2]])},
        {
            "inputs_embeds": torch.ones(2, 1, 2),
            "labels": torch.tensor([[1], [2]]),
        },
    )
    merged = merge_batches([{**long, **features[0]}, {**short, **features[1]}])
    assert merged["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 0, 0]]
    assert merged["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert merged["inputs_embeds"][..., 1].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert merged["labels"].tolist() == [[1, 2], [1, -100], [2, -100]]


def test_tensors_of_one_shape_and_equal_values_need_no_mask() -> None:
    batches: list[dict[str, Any]] = [
        {"pixel_values": torch.rand(count, 3, 4, 4), "return_dict": True, "scale": torch.tensor(2.0)}
        for count in (2, 1)
    ]
    merged = merge_batches(batches)
    assert torch.equal(merged["pixel_values"], torch.cat([batch["pixel_values"] for batch in batches]))
    assert merged["return_dict"] is True
    assert float(merged["scale"]) == 2.0


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no calibration batches"),
        ([{"a": torch.ones(1, 1)}, {"b": torch.ones(1, 1)}], "batch 1 holds b, but batch 0 holds a"),
        ([{"a": True}, {"a": True}, {"a": False}], "`a` is True in one calibration batch and False in another"),
        ([{"ids": torch.ones(1, 3)}, {"ids": torch.ones(1, 2)}], r"shapes \(2,\), \(3,\).*attention_mask"),
        (
            [{"ids": torch.ones(1, 3), "attention_mask": torch.ones(1, 2)}, {"ids": torch.ones(1, 2)}],
            "batch 1 holds ids, but batch 0 holds attention_mask, ids",
        ),
        (
            [{"pixel_values": torch.ones(1, 3, size, size)} for size in (4, 8)],
            r"`pixel_values` has rows of the shapes \(3, 4, 4\), \(3, 8, 8\)",
        ),
    ],
)
def test_batches_that_do_not_fit_together(batches: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_batches(batches)


class Guarded(nn.Module):
    """Takes its input by name, and survives any exception of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.caught = False

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.layer(input=x)
        except Exception:
            self.caught = True
        return self.head(x)


def test_callables_see_inputs_and_outputs_and_may_change_the_latter() -> None:
    model, seen = Guarded(), list[tuple[str, Tensor]]()

    def after(name: str, module: nn.Module, output: Tensor) -> Tensor | None:
        seen.append((name + " out", output))
        return output * 0 if name == "layer" else None

    x = torch.ones(2, 4)
    one_pass(model, {"x": x}, ["layer", "head"], lambda name, _, values: seen.append((name, values)), after)
    assert [name for name, _ in seen] == ["layer", "layer out", "head", "head out"]
    assert torch.equal(seen[0][1], x)
    assert torch.equal(seen[2][1], torch.zeros(2, 4))
    assert not seen[1][1].requires_grad


def test_no_model_catches_the_end() -> None:
    model, ran = Guarded(), list[str]()
    model.head.register_forward_hook(lambda *_: ran.append("head"))

    def end(*_: object) -> None:
        raise Finished

    one_pass(model, {"x": torch.ones(2, 4)}, ["layer"], end)
    assert not model.caught
    assert ran == []


def test_the_model_and_random_numbers_are_as_before() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    seen: list[Tensor] = []
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    for _ in range(2):
        one_pass(
            model, Sentences(4).batch(4), ["model.norm"], lambda name, module, values: seen.append(values.clone())
        )
    assert torch.equal(seen[0], seen[1]), "eval mode: no dropout"
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert model.config.use_cache
    with pytest.raises(IndexError):
        one_pass(model, {"input_ids": torch.full((1, 2), 10**6)}, ["model.norm"])
    assert model.training
    assert model.config.use_cache


def test_every_pass_draws_the_same_random_numbers() -> None:
    model, seen = Guarded(), list[Tensor]()
    model.layer.forward = torch.rand_like  # type: ignore[assignment]
    for _ in range(2):
        one_pass(model, {"x": torch.ones(2, 4)}, ["head"], lambda name, module, values: seen.append(values))
        torch.rand(1)  # somebody else's
    assert torch.equal(seen[0], seen[1])


def test_a_module_with_two_names_counts_under_the_first() -> None:
    model, seen = Guarded(), list[str]()
    model.head = model.layer
    one_pass(model, {"x": torch.ones(2, 4)}, ["layer", "head"], lambda name, module, values: seen.append(name))
    assert seen == ["layer", "layer"]


def test_no_cache_of_keys_and_values_is_made() -> None:
    model, kept = tiny_llama(), list[Any]()
    model.model.register_forward_hook(lambda module, args, output: kept.append(output.past_key_values))
    model(**Sentences(4).batch(4))
    one_pass(model, Sentences(4).batch(4), [])
    assert kept[0] is not None
    assert kept[1] is None
