"""Models, tokenizers and batches: how predictions come about, the same way for both models."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from ..checkpoint import load_quantized
from ..layout import QUANT_METHOD
from ..quantization.float_models import load_float
from .tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Encoded = dict[str, list[int]]


def load_model(path: str | os.PathLike[str]) -> PreTrainedModel:
    """A model from a folder or the hub: quantized ones as int8 modules, others as the class that they were saved as.

    Raises:
        `ValueError`: if there is no such model, or the checkpoint lacks weights of it (a new head would answer
            at random).
    """
    path = os.fspath(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        hint = "" if os.path.exists(path) else " There is no folder of that name here."
        raise ValueError(f"{path!r} could not be loaded as a model.{hint} {error}") from error
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == QUANT_METHOD:
        return load_quantized(path)
    auto_class = None if config.architectures else AutoModelForSequenceClassification
    model, loading = load_float(path, auto_class, output_loading_info=True)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(
            f"{path!r} lacks weights of {type(model).__name__}: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. They would be random. Give a model that was fine-tuned for the "
            "task."
        )
    return model


def encode_texts(
    dataset: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[Encoded]:
    """Token ids of every row, neither padded nor batched, cut to `max_length`.

    Raises:
        `ValueError`: if a text is missing or is not text.
    """
    columns = [dataset[name][:] for name in task.text_columns]
    for name, column in zip(task.text_columns, columns, strict=True):
        for row, text in enumerate(column):
            if not isinstance(text, str):
                raise ValueError(
                    f"Task {task.name!r}: row {row} of the text column {name!r} holds {text!r}, which is not text."
                )
    encoded = tokenizer(*columns, truncation=max_length is not None, max_length=max_length, padding=False)
    names = list(encoded)
    return [dict(zip(names, row, strict=True)) for row in zip(*(encoded[name] for name in names), strict=True)]


def batches(
    encoded: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """Padded batches of similar lengths, longest first, each with the rows that it holds.

    Raises:
        `ValueError`: if the tokenizer cannot pad.
    """
    if batch_size > 1 and tokenizer.pad_token is None:
        raise ValueError(
            "The tokenizer has no padding token, so texts cannot be batched. Set `tokenizer.pad_token = "
            "tokenizer.eos_token` and `model.config.pad_token_id`, or use `batch_size=1`."
        )
    lengths = np.array([len(row["input_ids"]) for row in encoded])
    # Longest first: what does not fit into memory fails at once.
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        padded = tokenizer.pad([encoded[row] for row in rows], padding=batch_size > 1, return_tensors="pt")
        yield rows, dict(padded)


def forward_arguments(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a batch that the model's `forward` takes, on its device."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {"input_ids", "attention_mask"} if takes_any else set()
    return {k: v.to(model.device) for k, v in batch.items() if k in parameters or k in known}


@torch.no_grad()
def predict(
    models: dict[str, PreTrainedModel],
    encoded: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    progress: Callable[[], None] | None = None,
) -> dict[str, np.ndarray]:
    """Logits of every model on the very same batches.

    Args:
        models (`dict[str, PreTrainedModel]`): in eval mode, by what messages call them.
        encoded (sequence of `dict`): from `encode_texts`.
        tokenizer (tokenizer): pads the batches.
        batch_size (`int`): rows a batch.
        progress (callable, *optional*): called once for each batch.

    Returns:
        `dict[str, numpy.ndarray]` of shape `(n, num_labels)`, float32, in the order of the rows.

    Raises:
        `ValueError`: if a model gives no logits of that shape, or NaN or infinite ones.
    """
    logits = {name: np.empty((len(encoded), model.config.num_labels), np.float32) for name, model in models.items()}
    for rows, batch in batches(encoded, tokenizer, batch_size):
        for name, model in models.items():
            output = model(**forward_arguments(model, batch))
            values = getattr(output, "logits", None)
            if values is None or values.shape != (len(rows), model.config.num_labels):
                shape = "none" if values is None else f"shape {tuple(values.shape)}"
                raise ValueError(
                    f"The {name} model ({type(model).__name__}) gives logits of {shape}; needed: one row an example "
                    f"and `num_labels` ({model.config.num_labels}) columns, as from a ForSequenceClassification."
                )
            logits[name][rows] = values.float().cpu().numpy()
        if progress is not None:
            progress()
    for name, values in logits.items():
        bad = int(np.count_nonzero(~np.isfinite(values).all(axis=1)))
        if bad:
            raise ValueError(
                f"The {name} model gives NaN or infinite logits for {bad} of {len(values)} examples: it is broken, "
                "and metrics of it would mean nothing."
            )
    return logits


@contextlib.contextmanager
def evaluating(models: Sequence[PreTrainedModel], device: torch.device) -> Iterator[None]:
    """Models in eval mode on one device, put back afterwards as they were."""
    before = [(model, model.training, model.device) for model in models]
    try:
        for model in models:
            model.eval()
            _move(model, device)
        yield
    finally:
        for model, training, home in before:
            model.train(training)
            _move(model, home)


def _move(model: PreTrainedModel, device: torch.device) -> None:
    # `to` is refused by some quantized models even where it would do nothing.
    if model.device != device:
        model.to(device)
