"""Calibration data: from whatever a user has to batches that a model takes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..texts import find_tokenizer, length_limit
from .masks import holds_only_padding

Batch = dict[str, Any]

_LONGEST = 512  # tokens, where nobody says how many


@dataclass(frozen=True)
class Calibration:
    """Data from which activation ranges, or the weights that matter, are found. Labels are not needed.

    Args:
        data: one of
            a list of texts;
            a `datasets.Dataset`, or any other data set of examples: with columns that the model's `forward` takes
            (`input_ids`, `pixel_values` ...), or with one or two columns of text;
            a `DataLoader`, or any other iterable of batches (dictionaries of tensors);
            a `transformers.Trainer`, for the batches that it trains on.
        samples (`int`, *optional*, defaults to 128): examples that are used, the first ones.
        batch_size (`int`, *optional*, defaults to 8): examples a batch; a loader's own where the data are batches.
        max_length (`int`, *optional*): tokens at which texts are cut; by default what the model can take, 512 at most.
        processing_class (tokenizer or `str`, *optional*): for texts; defaults to the one beside the model.
    """

    data: Any
    samples: int = 128
    batch_size: int = 8
    max_length: int | None = None
    processing_class: Any = None

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; calibration needs 1 or more.")


def calibration_batches(calibration: Calibration, model: nn.Module) -> list[Batch]:
    """The batches of keyword arguments of `forward`, on the model's device.

    Args:
        calibration ([`Calibration`]): the data.
        model (`torch.nn.Module`): the model that will run on them.

    Raises:
        `ValueError`: if there is no sample, a batch holds only padding, or the data have no column that fits.
        `TypeError`: if the data are of no kind that is known.
    """
    data = calibration.data
    if hasattr(data, "get_train_dataloader"):
        data = data.get_train_dataloader()
    if isinstance(data, (str, bytes)) or data is None:
        raise TypeError(
            f"calibration data are {data!r:.60}; allowed: a list of texts, a data set, a DataLoader or a Trainer. "
            "For one text, write a list of it."
        )
    device = next((p.device for p in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    batches: list[Batch] = []
    left = calibration.samples
    for batch in _batches(data, calibration, model):
        if left <= 0:
            break
        kept = {
            key: value[:left] if isinstance(value, Tensor) and value.ndim else value for key, value in batch.items()
        }
        if holds_only_padding(kept):
            raise ValueError(
                f"calibration batch {len(batches)} holds only padding: its attention mask is 0 everywhere. Give data "
                "with tokens in every batch."
            )
        batches.append({key: value.to(device) if isinstance(value, Tensor) else value for key, value in kept.items()})
        left -= _rows(kept)
    if not batches:
        raise ValueError(
            "calibration has no samples: the data are empty. Give at least one; about 128 are usual (`samples`)."
        )
    return batches


def _batches(data: Any, calibration: Calibration, model: nn.Module) -> Iterator[Batch]:
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise TypeError(
            f"calibration data are a {type(data).__name__}; allowed: a list of texts, a data set, a DataLoader or a "
            "Trainer."
        )
    rows = iter(data)
    first = next(rows, None)
    if first is None:
        return
    rows = itertools.chain([first], rows)
    if isinstance(first, str):
        yield from _of_texts(list(itertools.islice(rows, calibration.samples)), calibration, model)
    elif not isinstance(first, Mapping):
        raise TypeError(
            f"calibration data hold {type(first).__name__}; allowed: texts, or dictionaries of what the model's "
            "`forward` takes."
        )
    elif _is_batch(first, model):
        for batch in rows:
            yield _arguments(batch, model)
    else:
        yield from _of_examples(list(itertools.islice(rows, calibration.samples)), calibration, model)


# Dimensions of one example.
_DIMENSIONS = {"input_ids": 1, "decoder_input_ids": 1, "attention_mask": 1, "pixel_values": 3, "input_features": 2}


def _is_batch(first: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether a mapping holds a batch of examples, not one: its tensors have a dimension more."""
    # Audio: a wave, or a spectrogram.
    wave = 2 if hasattr(getattr(model, "config", None), "num_mel_bins") else 1
    for name, dimensions in {**_DIMENSIONS, "input_values": wave}.items():
        if name in first and isinstance(first[name], Tensor):
            return bool(first[name].ndim > dimensions)
    # Inputs that only the model knows: batches of sequences or more.
    return any(isinstance(value, Tensor) and value.ndim >= 3 for value in first.values())


def _of_texts(
    texts: Sequence[Any], calibration: Calibration, model: nn.Module, pairs: bool = False
) -> Iterator[Batch]:
    origin = getattr(getattr(model, "config", None), "_name_or_path", "")
    tokenizer = find_tokenizer(calibration.processing_class, [origin])
    limit = length_limit(tokenizer, [model], calibration.max_length)
    limit = calibration.max_length or min(limit or _LONGEST, _LONGEST)
    # Without a padding token, texts of different lengths cannot be in one batch.
    size = calibration.batch_size if tokenizer.pad_token is not None else 1
    for start in range(0, len(texts), size):
        rows = list(texts[start : start + size])
        columns = [list(column) for column in zip(*rows, strict=True)] if pairs else [rows]
        encoded = tokenizer(*columns, truncation=True, max_length=limit, padding=size > 1, return_tensors="pt")
        batch = _arguments(encoded, model)
        if batch["input_ids"].shape[1] > 0:
            yield _with_decoder_inputs(batch, model)


def _of_examples(examples: list[Any], calibration: Calibration, model: nn.Module) -> Iterator[Batch]:
    examples = [{key: value for key, value in example.items() if value is not None} for example in examples]
    usable = list(_arguments(examples[0], model, keep_labels=False))
    if not usable:
        text = [key for key, value in examples[0].items() if isinstance(value, str)]
        if not 1 <= len(text) <= 2:
            raise ValueError(
                f"calibration data have the columns {', '.join(map(repr, examples[0]))}; needed: columns that "
                f"{type(model).__name__}.forward takes, or one or two columns of text. Select or tokenize them first."
            )
        rows = [tuple(example[key] for key in text) if len(text) > 1 else example[text[0]] for example in examples]
        yield from _of_texts(rows, calibration, model, pairs=len(text) > 1)
        return
    for start in range(0, len(examples), calibration.batch_size):
        some = examples[start : start + calibration.batch_size]
        yield _with_decoder_inputs(_stack([{key: torch.as_tensor(row[key]) for key in usable} for row in some]), model)


def _stack(rows: list[dict[str, Tensor]]) -> Batch:
    """Examples as one batch; sequences of different lengths are padded with zeros and masked."""
    batch: Batch = {}
    if "input_ids" in rows[0] and "attention_mask" not in rows[0]:
        rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    for key in rows[0]:
        values = [row[key] for row in rows]
        if values[0].ndim == 1:
            batch[key] = nn.utils.rnn.pad_sequence(values, batch_first=True)
        else:
            batch[key] = torch.stack(values)
    return batch


def _arguments(batch: Mapping[str, Any], model: nn.Module, keep_labels: bool = True) -> Batch:
    """What `forward` takes of a batch, but for numbers and strings that only the data set knows."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {"input_ids", "attention_mask", "pixel_values", "token_type_ids"} if takes_any else set()
    return {
        key: value
        for key, value in batch.items()
        if (key in parameters or key in known)
        and (keep_labels or not key.startswith("label"))
        and not isinstance(value, str)
    }


def _with_decoder_inputs(batch: Batch, model: nn.Module) -> Batch:
    """For a text-to-text model without target texts: the text itself, which the model shifts by one."""
    config = getattr(model, "config", None)
    given = any(key.startswith(("decoder_", "label")) for key in batch)
    if not getattr(config, "is_encoder_decoder", False) or given or "input_ids" not in batch:
        return batch
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return batch
    return {**batch, "decoder_input_ids": batch["input_ids"]}


def _rows(batch: Batch) -> int:
    return next((value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim), 1)
