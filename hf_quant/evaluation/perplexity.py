"""Perplexity of a causal language model, and the interval of its change."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..progress import progress_bar
from .predict import evaluating, forward_arguments
from .results import Interval
from .statistics import check_bootstrap, percentile_interval, resample_chunks
from .windows import DEFAULT_LENGTH, Window, check_length, text_ids, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_BATCH_SIZE = 4


@dataclass(frozen=True)
class Perplexity:
    """How surprised a language model is by a text, token by token.

    Args:
        value (`float`): `exp` of the mean negative log-likelihood of a token; 1 is the least, and lower is better.
        tokens (`int`): tokens that were predicted.
        window_nll (`tuple[float, ...]`): the sum of their negative log-likelihoods in each window, in nats.
        window_tokens (`tuple[int, ...]`): how many they are in each window.
    """

    value: float
    tokens: int
    window_nll: tuple[float, ...]
    window_tokens: tuple[int, ...]

    @property
    def windows(self) -> int:
        """Windows that the text was cut into."""
        return len(self.window_nll)


def perplexity(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str] | str,
    *,
    length: int = DEFAULT_LENGTH,
    stride: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of a causal language model on a text, window by window.

    `exp(-1/N sum_i log p(x_i | x_<i))`, where the context `x_<i` reaches back to the beginning of the window. The
    first token of the text is context only; with windows that do not overlap, so is the first of each.

    Args:
        model (`PreTrainedModel`): with a causal language-modelling head.
        processing_class (tokenizer): the model's.
        texts (list of `str`, or `str`):
            One text; or rows of a corpus, which are joined by blank lines into one, empty rows included. It is
            tokenized as the tokenizer does it by default: special tokens at its ends only, not in each window.
        length (`int`, *optional*, defaults to 512): tokens a window. Figures compare only at one length.
        stride (`int`, *optional*):
            Tokens from window to window; by default `length`, so that windows do not overlap. A smaller one gives
            each token more context and costs more time; a token counts once, in the first window that holds it.
        batch_size (`int`, *optional*, defaults to 4): windows a batch; the logits of one batch are held.
        max_tokens (`int`, *optional*): tokens of the text to use, the first ones; all by default.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        [`Perplexity`]: with the negative log-likelihood of each window, for paired intervals.

    Raises:
        `ValueError`: if there are no two tokens, `length` is more than the model has positions for, the model is
            no causal language model or not of this tokenizer, or it gives NaN or infinite logits.
        `TypeError`: if `texts` are not text.
    """
    require_causal(model)
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be 1 or more.")
    check_length(model, length)
    ids = text_ids(processing_class, texts, max_tokens)
    cuts = windows(len(ids), length, stride)
    count = -(-len(cuts) // batch_size)
    with evaluating([model], model.device), progress_bar("Perplexity", count, progress) as advance:
        return perplexity_of_ids(model, ids, cuts, batch_size, advance)


def require_causal(model: PreTrainedModel) -> None:
    """Refuse a model that does not predict the next token.

    Raises:
        `ValueError`: naming its class.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False) or name.endswith("ForMaskedLM"):
        raise ValueError(
            f"{name} is not a causal language model: it does not predict each token from those before it alone. "
            "Perplexity needs one that AutoModelForCausalLM loads."
        )


@torch.no_grad()
def perplexity_of_ids(
    model: PreTrainedModel,
    ids: Tensor,
    cuts: Sequence[Window],
    batch_size: int,
    progress: Callable[[], None] | None = None,
) -> Perplexity:
    """Perplexity on tokens that are cut already, of a model in eval mode.

    Args:
        model (`PreTrainedModel`): a causal language model.
        ids (`torch.Tensor`): int64 of shape `(tokens,)`.
        cuts (sequence of [`Window`]): from `windows`.
        batch_size (`int`): windows a batch.
        progress (callable, *optional*): called once for each batch.

    Raises:
        `ValueError`: as `perplexity`.
    """
    _check_vocabulary(model, ids)
    losses: list[float] = []
    for start in range(0, len(cuts), batch_size):
        batch = cuts[start : start + batch_size]
        # All windows have one length but the last, which therefore goes alone: no padding, no mask.
        whole = [cut for cut in batch if cut.end - cut.start == batch[0].end - batch[0].start]
        for part in (whole, batch[len(whole) :]):
            if part:
                losses += _window_losses(model, torch.stack([ids[cut.start : cut.end] for cut in part]), part)
        if progress is not None:
            progress()
    counts = tuple(cut.predicted for cut in cuts)
    return Perplexity(_exp(math.fsum(losses) / sum(counts)), sum(counts), tuple(losses), counts)


def _window_losses(model: PreTrainedModel, ids: Tensor, cuts: Sequence[Window]) -> list[float]:
    """Summed negative log-likelihood of each window's predicted tokens, in nats."""
    arguments: dict[str, Any] = dict(forward_arguments(model, {"input_ids": ids}))
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False  # keys and values that nobody would read
    output = model(**arguments)
    logits = getattr(output, "logits", None)
    if logits is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        shape = "none" if logits is None else f"shape {tuple(logits.shape)}"
        raise ValueError(
            f"{type(model).__name__} gives logits of {shape}; needed: (batch, length, vocabulary), here "
            f"({ids.shape[0]}, {ids.shape[1]}, ...), as from a model that AutoModelForCausalLM loads."
        )
    losses = []
    for row, cut in enumerate(cuts):
        targets = ids[row, -cut.predicted :].to(logits.device)
        # One window at a time: a float32 copy of a batch's logits would double what is held.
        values = logits[row, -cut.predicted - 1 : -1].float()
        loss = float(F.cross_entropy(values, targets, reduction="none").double().sum())
        if not math.isfinite(loss):
            raise ValueError(
                f"{type(model).__name__} gives NaN or infinite logits for the tokens {cut.start} to {cut.end - 1}: it "
                "is broken, and a perplexity of it would mean nothing."
            )
        losses.append(loss)
    return losses


def _check_vocabulary(model: PreTrainedModel, ids: Tensor) -> None:
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    largest = int(ids.max())
    if rows is not None and largest >= rows:
        raise ValueError(
            f"The tokenizer gives the token id {largest}, but {type(model).__name__} knows 0 to {rows - 1} only. Pass "
            "the `processing_class` that the model was trained with."
        )


def perplexity_change(
    before: Perplexity,
    after: Perplexity,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, Interval]:
    """The relative change of a perplexity, and its percentile interval from a paired bootstrap over windows.

    A window is drawn with both models' likelihoods, n of n with replacement (as in `paired_bootstrap`). The interval
    covers the choice of the text, as far as its windows are alike.

    Args:
        before ([`Perplexity`]): of the float model.
        after ([`Perplexity`]): of the quantized one, on the same windows.
        resamples (`int`, *optional*, defaults to 10000): how many.
        confidence (`float`, *optional*, defaults to 0.95): share of the changes inside the interval.
        seed (`int`, *optional*, defaults to 0): the same seed gives the same interval.

    Returns:
        `tuple[float, Interval]`: `after / before - 1` as fractions, so 0.005 is half a percent more; both ends of
        the interval are `nan` for a single window, which says nothing of others.

    Raises:
        `ValueError`: if the two were measured on different windows.
    """
    check_bootstrap(resamples, confidence)
    if before.window_tokens != after.window_tokens:
        raise ValueError(
            f"The perplexities are of different windows ({before.windows} of {before.tokens} tokens, {after.windows} "
            f"of {after.tokens}). Measure both on the same text with the same `length` and `stride`."
        )
    change = _exp(math.log(after.value) - math.log(before.value)) - 1.0
    count = before.windows
    if count < 2:
        return change, Interval(math.nan, math.nan, undefined=resamples)
    rises = np.subtract(after.window_nll, before.window_nll)
    tokens = np.asarray(before.window_tokens, dtype=np.float64)
    rng = np.random.default_rng(seed)
    found = []
    for size in resample_chunks(resamples, count):
        drawn = rng.multinomial(count, np.full(count, 1.0 / count), size=size)
        # Bounded, so that the changes of a model that is broken stay numbers.
        found.append(np.expm1(np.minimum(drawn @ rises / (drawn @ tokens), 700.0)))
    return change, percentile_interval(np.concatenate(found), confidence)


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:  # a model that is broken, and says so with every token
        return math.inf
