"""Batches without padding that are too large for one forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from hf_quant.runtime.unpadded import UnpaddedForward

from ..tiny import tiny_bert

MOST = 64


def _forward(model: Any) -> tuple[UnpaddedForward, list[tuple[int, ...]]]:
    shapes: list[tuple[int, ...]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return model.forward(*args, **kwargs)

    forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    return UnpaddedForward(forward, model.config, most=MOST), shapes


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, 60, (rows, length))


@torch.no_grad()
def test_large_batches_run_in_pieces_whatever_their_length() -> None:
    model = tiny_bert().eval()
    forward, shapes = _forward(model)
    first = _ids(8, 12)
    forward(input_ids=first, output_hidden_states=True)
    for rows, length in ((8, 12), (9, 14), (16, 8)):
        ids = _ids(rows, length)
        shapes.clear()
        got = forward(input_ids=ids, output_hidden_states=True)
        assert all(count * width <= MOST for count, width in shapes)
        assert sum(count for count, _ in shapes) == rows, "each row once, and nothing is learned anew"
        expected = model(input_ids=ids, output_hidden_states=True)
        torch.testing.assert_close(got.logits, expected.logits)
        for one, other in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_mask_of_ones_is_the_same_and_small_batches_stay_whole() -> None:
    model = tiny_bert().eval()
    forward, shapes = _forward(model)
    ids = _ids(8, 12)
    for _ in range(2):
        shapes.clear()
        got = forward(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert shapes == [(4, 12), (4, 12)]
    torch.testing.assert_close(got.logits, model(input_ids=ids).logits)
    shapes.clear()
    forward(input_ids=ids[:5], attention_mask=torch.ones_like(ids[:5]))
    forward(input_ids=ids[:1])
    assert shapes == [(5, 12), (1, 12)]
