"""Tokenizers: which one belongs to a model, and how long its texts may be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)

# Tokenizers that know no limit say 1e30.
_NO_LIMIT = 1_000_000


def find_tokenizer(
    processing_class: Any, candidates: Sequence[str | os.PathLike[str] | None]
) -> PreTrainedTokenizerBase:
    """The tokenizer to use: the given one, or the first that loads from the candidates.

    Args:
        processing_class (tokenizer or `str`, *optional*): a tokenizer, or where it lies.
        candidates (sequence of `str`): folders and hub ids to try in order; `None` and `""` are skipped.

    Raises:
        `ValueError`: if none is found, naming the places.
    """
    if processing_class is not None and not isinstance(processing_class, (str, os.PathLike)):
        return processing_class
    places = [processing_class] if processing_class is not None else candidates
    tried: list[str] = []
    for place in dict.fromkeys(str(p) for p in places if p):
        folder = Path(place)
        # From a folder without tokenizer files transformers makes an empty vocabulary, and every word unknown.
        if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
            tried.append(f"{place} (no tokenizer files)")
            continue
        try:
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, KeyError) as error:
            tried.append(f"{place} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
    raise ValueError(
        f"No tokenizer found. Tried: {'; '.join(tried) or 'nothing: the models know no folder'}. Pass "
        "`processing_class=AutoTokenizer.from_pretrained(...)`, the one that the models were trained with."
    )


def length_limit(
    tokenizer: PreTrainedTokenizerBase, models: Sequence[PreTrainedModel], max_length: int | None
) -> int | None:
    """Tokens at which texts are cut: `max_length`, or what tokenizer and models can take; `None`: no limit.

    Raises:
        `ValueError`: if `max_length` is below 1 or more than the models have positions for.
    """
    positions = [getattr(model.config, "max_position_embeddings", None) for model in models]
    most = min((p for p in positions if isinstance(p, int) and p > 0), default=_NO_LIMIT)
    if max_length is not None:
        if not 1 <= max_length <= most:
            raise ValueError(f"`max_length` is {max_length}; allowed for these models: 1 to {most}.")
        return max_length
    most = min(most, getattr(tokenizer, "model_max_length", None) or _NO_LIMIT)
    return most if most < _NO_LIMIT else None
