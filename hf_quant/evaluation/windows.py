"""A text as tokens in windows: what a language model is measured, or calibrated, on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..texts import length_limit
from .files import load_data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_LENGTH = 512
# What the rows of a corpus are joined with: a blank line, as in the figures that papers give for WikiText-2.
JOINT = "\n\n"


@dataclass(frozen=True)
class Window:
    """A stretch of a text that a model sees at once.

    Args:
        start (`int`): its first token.
        end (`int`): the token after its last.
        predicted (`int`): tokens at its end that count here; those before are context.
    """

    start: int
    end: int
    predicted: int


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | str, max_tokens: int | None = None) -> Tensor:
    """The tokens of a text, or of rows joined by blank lines; int64 of shape `(tokens,)`.

    Raises:
        `ValueError`: if there are fewer than two.
        `TypeError`: if it is not text.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"`max_tokens` is {max_tokens}; allowed: 2 or more, as the first token is never predicted.")
    rows = [texts] if isinstance(texts, str) else list(texts)
    for i, row in enumerate(rows):
        if not isinstance(row, str):
            raise TypeError(f"`texts`: row {i} holds {row!r:.60}, which is not text. Give a text or a list of texts.")
    # `verbose=False`: that the whole is longer than the model's limit is the very reason for windows.
    ids = torch.tensor(tokenizer(JOINT.join(rows), verbose=False)["input_ids"][:max_tokens], dtype=torch.int64)
    if len(ids) < 2:
        raise ValueError(
            f"`texts` hold {len(ids)} token{'s' if len(ids) != 1 else ''}; perplexity needs two or more, as the "
            "first is never predicted."
        )
    return ids


def windows(tokens: int, length: int, stride: int | None = None) -> list[Window]:
    """Cut a text into windows, in which every token but those without context counts exactly once.

    Args:
        tokens (`int`): of the text, two or more.
        length (`int`): tokens a window; the last one may be shorter.
        stride (`int`, *optional*): tokens from window to window; `length` by default.

    Raises:
        `ValueError`: for a stride that is not between 1 and `length`.
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"`stride` is {stride}; allowed: 1 to `length` ({length}), or tokens would be skipped.")
    found: list[Window] = []
    done = 0
    for start in range(0, tokens, stride):
        end = min(start + length, tokens)
        predicted = end - max(done, start + 1)
        if predicted > 0:
            found.append(Window(start, end, predicted))
        done = end
        if end == tokens:
            break
    return found


def check_length(model: PreTrainedModel, length: int) -> None:
    """Refuse a window that a model cannot take.

    Raises:
        `ValueError`: naming the lengths that are allowed.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    most = positions if isinstance(positions, int) and positions > 0 else None
    if length < 2 or (most is not None and length > most):
        allowed = "2 or more" if most is None else f"2 to {most}"
        raise ValueError(f"`length` is {length}; allowed for {type(model).__name__}: {allowed} tokens a window.")


def default_length(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Tokens a window where nobody says how many: 512, or what the model can take if less."""
    return min(DEFAULT_LENGTH, length_limit(tokenizer, [model], None) or DEFAULT_LENGTH)


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """The texts of a file: a `.txt` file is one; tables have one a row, in a column `text` or their only text column.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it is of an unknown kind, empty, or its columns leave room for doubt.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"There is no text file {path}.")
        return [path.read_text(encoding="utf-8")]
    data = load_data(path)
    columns = [name for name in data.column_names if getattr(data.features[name], "dtype", "").endswith("string")]
    if "text" not in columns and len(columns) != 1:
        raise ValueError(
            f"{path} has the text columns {columns or 'none'}; needed: one named 'text', or a single one. A .txt file "
            "is taken as it is."
        )
    return list(data["text" if "text" in columns else columns[0]][:])
