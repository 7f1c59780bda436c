"""Milliseconds a forward pass, both models in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..progress import progress_bar
from .results import Latency

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WARMUP_CALLS = 3
MIN_CALLS = 20
MAX_CALLS = 200
BUDGET_SECONDS = 15.0


def measure_latency(
    float_model: PreTrainedModel,
    int8_model: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    progress: Callable[[], None] | None = None,
) -> Latency:
    """Time both models on the same batch: at least 20 calls each, then until 15 seconds or 200 calls.

    Args:
        float_model (`transformers.PreTrainedModel`): in eval mode.
        int8_model (`transformers.PreTrainedModel`): in eval mode, on the same device.
        batch (`dict[str, torch.Tensor]`): from `random_batch`; `input_ids` of shape `(batch_size, length)`.
        progress (callable, *optional*): called once for each pair of calls.
    """
    device = float_model.device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    batch_size, length = batch["input_ids"].shape
    for _ in range(WARMUP_CALLS):
        _milliseconds(float_model, batch, device)
        _milliseconds(int8_model, batch, device)
    float_times: list[float] = []
    int8_times: list[float] = []
    spent = 0.0
    while len(float_times) < MAX_CALLS and (len(float_times) < MIN_CALLS or spent < BUDGET_SECONDS * 1e3):
        # Who goes first changes from pair to pair, so that neither always finds the other's warm or cold caches.
        first_float = len(float_times) % 2 == 0
        for model, times in ((float_model, float_times), (int8_model, int8_times))[:: 1 if first_float else -1]:
            times.append(_milliseconds(model, batch, device))
            spent += times[-1]
        if progress is not None:
            progress()
    return Latency(
        batch_size=batch_size,
        length=length,
        threads=torch.get_num_threads(),
        calls=len(float_times),
        float_p50=float(np.percentile(float_times, 50)),
        float_p95=float(np.percentile(float_times, 95)),
        int8_p50=float(np.percentile(int8_times, 50)),
        int8_p95=float(np.percentile(int8_times, 95)),
        speedup=float(np.median(np.divide(float_times, int8_times))),
    )


def random_batch(
    vocabulary: int,
    batch_size: int,
    length: int,
    *,
    special_ids: Collection[int] = (),
    example: Sequence[int] = (),
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Random tokens without padding, between the special tokens that a real text begins and ends with.

    Args:
        vocabulary (`int`): number of token ids.
        batch_size (`int`): sequences.
        length (`int`): tokens a sequence.
        special_ids (collection of `int`, *optional*): ids that do not appear inside, such as padding.
        example (sequence of `int`, *optional*):
            The ids of a real text. Where its first or last is special, so is that of every sequence: BART, for
            one, looks for the last `</s>`.
        seed (`int`, *optional*, defaults to 0): of the tokens.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask`, int64, of shape `(batch_size, length)`.
    """
    usable = np.setdiff1d(np.arange(vocabulary), list(special_ids))
    ids = np.random.default_rng(seed).choice(usable if usable.size else vocabulary, size=(batch_size, length))
    for place in (0, -1):
        if len(example) and example[place] in special_ids:
            ids[:, place] = example[place]
    input_ids = torch.from_numpy(ids.astype(np.int64))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _milliseconds(model: PreTrainedModel, batch: dict[str, Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    # Not `inference_mode`: what a model caches there could not be trained on afterwards.
    with torch.no_grad():
        model(**batch)
    _wait(device)
    return (time.perf_counter() - start) * 1e3


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_pair(
    pair: dict[str, PreTrainedModel],
    batch_size: int,
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    example: Sequence[int],
    seed: int,
    progress: bool,
) -> Latency:
    """Time both models on random tokens, in turn."""
    model = pair["float"]
    padding = getattr(model.config, "pad_token_id", None)
    batch = random_batch(
        model.get_input_embeddings().weight.shape[0],
        batch_size,
        length,
        special_ids={*tokenizer.all_special_ids, *([] if padding is None else [padding])},
        example=example,
        seed=seed,
    )
    with progress_bar("Timing", MAX_CALLS, progress) as advance:
        return measure_latency(model, pair["int8"], batch, advance)
