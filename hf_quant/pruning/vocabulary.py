"""Embedding rows as a structure: the vocabulary a corpus never uses leaves the model and its tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..quantization.float_models import require_device, require_merged_adapters, require_unquantized
from .embedding_rows import apply_changes, find_changes, special_ids
from .tokens import Vocabulary, plain_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000
_PROVEN_TEXTS = 256
_PROVEN_SEQUENCES = 4
_ID_COLUMNS = ("input_ids", "decoder_input_ids", "labels")


@dataclass(frozen=True)
class VocabularyChange:
    """What [`shrink_vocabulary`] did.

    Args:
        old_size (`int`): rows of the embedding before.
        new_size (`int`): rows of the embedding after; also `config.vocab_size`.
        kept (`torch.Tensor`): int64 (new_size,), the old id of each new one.
        parameters_removed (`int`): numbers that the model lost, tied weights counted once.
        sqnr (`float`, *optional*): decibels between the model's outputs before and after on texts of the corpus,
            over the kept tokens where they are logits; `inf` if equal to the bit, `None` if the model does not run
            on text alone, or no text of the corpus keeps all its tokens.
    """

    old_size: int
    new_size: int
    kept: Tensor
    parameters_removed: int
    sqnr: float | None

    def renumber(self, ids: Tensor) -> Tensor:
        """New ids for data that was encoded before.

        Args:
            ids (`torch.Tensor`): old ids, integer, any shape; negative ones (the -100 of labels) stay as they are.

        Returns:
            `torch.Tensor`: int64, the same shape.

        Raises:
            `ValueError`: naming ids that were removed, or that never were in the vocabulary.
        """
        table = torch.full((self.old_size,), -1)
        table[self.kept] = torch.arange(self.new_size)
        found = table[ids.long().cpu().clamp(0, self.old_size - 1)]
        lost = (ids.cpu() >= 0) & ((found < 0) | (ids.cpu() >= self.old_size))
        if lost.any():
            raise ValueError(
                f"ids {sorted(set(ids.cpu()[lost].tolist()))[:5]} are not in the smaller vocabulary. Encode the texts "
                "with the smaller tokenizer, or pass this data to shrink_vocabulary too."
            )
        return torch.where(ids.cpu() < 0, ids.long().cpu(), found).to(ids.device)


def shrink_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Any],
    *,
    min_count: int = 1,
    keep: Iterable[str | int] = (),
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, VocabularyChange]:
    """Remove the tokens that a corpus never uses from a float model and its fast tokenizer.

    Texts of the corpus are encoded to the same tokens, under new ids, and the model's outputs are the same; logits
    are those of the kept tokens. Both are checked on texts of the corpus. Model and tokenizer are saved and loaded
    with plain transformers as any others.

    Other texts can still be encoded: special and added tokens, all single characters and bytes, and what BPE merges
    into a kept token stay, in the order of their ids. A word whose piece was removed is cut into shorter pieces,
    which the model knows, but reads less well; in a WordLevel vocabulary, which has no pieces, it is unknown.

    The model gets new Parameters: call this before the Trainer and its optimizer are made, or after training.

    Args:
        model (`PreTrainedModel`): a float model, changed in place: embeddings (tied ones stay tied), output layer and
            its bias, and whatever else is as long as the vocabulary; `vocab_size` and the ids of special tokens in
            `config` and `generation_config` (fields that end in `token_id`, `token_ids`, `token_index` or `to_id`,
            and lists of suppressed tokens).
        tokenizer (`PreTrainedTokenizerBase`): its fast tokenizer (WordPiece, WordLevel, BPE or Unigram); left as is.
        texts (iterable): the corpus, training and evaluation data: strings, pairs or other sequences of strings, or
            rows. Of a row (a `dict`, or a row of a `datasets.Dataset`), `input_ids`, `decoder_input_ids` and `labels`
            are counted if it has `input_ids`, otherwise all columns of strings: name the columns with
            `dataset.select_columns(["sentence1", "sentence2"])`. Read once.
        min_count (`int`, *optional*, defaults to 1): tokens that occur less often are removed as well; texts that
            hold them are then cut into shorter pieces.
        keep (iterable of `str` or `int`, *optional*): further words or ids to keep. A word is kept with all its
            pieces, at the start of a text and after a space.

    Returns:
        `tuple`: the model, the smaller tokenizer (a new one) and a [`VocabularyChange`].

    Raises:
        `TypeError`: if `texts` is a string, or holds anything else than the above.
        `ValueError`: if the model is quantized, prepared for QAT, holds adapters or lies on another device than CPU or
            CUDA; the tokenizer is no fast one; the corpus is empty; an id is outside of the model's vocabulary;
            the config does not hold the vocabulary's size; or the outputs would change. Nothing is changed then.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` is a {type(model).__name__}; a vocabulary is removed from a PreTrainedModel.")
    require_unquantized(model)
    require_merged_adapters(model)
    require_device(model)
    if isinstance(min_count, bool) or not isinstance(min_count, int) or min_count < 1:
        raise ValueError(f"`min_count` is {min_count!r}; allowed: whole numbers from 1, which keeps all that occurs.")
    vocabulary = Vocabulary(tokenizer)
    rows = _rows(model)
    counts, examples, sequences = _count(vocabulary, texts, rows)

    kept = {index for index, count in counts.items() if count >= min_count}
    kept |= vocabulary.always() | special_ids(model, rows) | _named_ids(vocabulary, keep, rows)
    kept = vocabulary.ancestors(kept)
    if max(kept) >= rows:
        token = next((token for token, index in vocabulary.ids.items() if index == max(kept)), None)
        raise ValueError(
            f"the token {token!r} has the id {max(kept)}, but the model's embedding has {rows} rows: they do not "
            "belong together. Call model.resize_token_embeddings(len(tokenizer)) first, or pass the right tokenizer."
        )
    order = sorted(kept) if len(kept) == rows else vocabulary.in_order(kept)
    new = {old: index for index, old in enumerate(order)}
    smaller = vocabulary.rebuild(new)
    _require_equal_encodings(vocabulary, smaller, new, examples)

    size = model.num_parameters()
    changes = find_changes(model, rows, new)
    sqnr = apply_changes(model, changes, new, [ids for ids in sequences if all(index in new for index in ids)])
    change = VocabularyChange(rows, len(order), torch.tensor(order), size - model.num_parameters(), sqnr)
    return model, smaller, change


def _rows(model: PreTrainedModel) -> int:
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"{type(model).__name__} has no embedding of tokens (get_input_embeddings), so no vocabulary to remove."
        ) from error


def _count(vocabulary: Vocabulary, texts: Iterable[Any], rows: int) -> tuple[Counter[int], list[str], list[list[int]]]:
    """How often each id occurs, the first texts, and a few sequences of ids with special tokens."""
    if isinstance(texts, (str, Mapping)):
        raise TypeError(f"`texts` is a {type(texts).__name__}; pass a list of texts or rows, such as [text].")
    counts: Counter[int] = Counter()
    examples: list[str] = []
    sequences: list[list[int]] = []

    def strings() -> Iterator[str]:
        for number, item in enumerate(texts):
            if not (isinstance(item, Mapping) and "input_ids" in item):
                yield from _strings(item, number)
                continue
            for column in _ID_COLUMNS:
                ids = _integers(item.get(column))
                if max(ids, default=0) >= rows:
                    raise ValueError(
                        f"row {number} of `texts` holds the id {max(ids)} in {column!r}, but the model's embedding "
                        f"has {rows} rows. Pass data that this model's tokenizer encoded."
                    )
                counts.update(index for index in ids if index >= 0)
            if len(sequences) < _PROVEN_SEQUENCES:
                sequences.append(_integers(item["input_ids"]))

    stream = strings()
    while chunk := list(islice(stream, _CHUNK)):
        examples += chunk[: _PROVEN_TEXTS - len(examples)]
        for ids in vocabulary.encode(chunk):
            counts.update(ids)
    if not counts:
        raise ValueError("`texts` holds no token. Pass the corpus whose vocabulary is to be kept; it is read once.")
    sequences += [vocabulary.texts.encode(text).ids for text in examples[: _PROVEN_SEQUENCES - len(sequences)]]
    return counts, examples, [ids for ids in sequences if ids]


def _integers(column: Any) -> list[int]:
    """The whole numbers of a sequence, nested or not; a label that is one number is a class, and no id."""
    values = column.tolist() if hasattr(column, "tolist") else column
    if not isinstance(values, (list, tuple)):
        return []
    return [number for value in values for number in ([value] if isinstance(value, int) else _integers(value))]


def _strings(item: Any, number: int) -> list[str]:
    values = list(item.values()) if isinstance(item, Mapping) else [item]
    found: list[str] = []
    for value in values:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(part, str) for part in value):
            found += value
    if not found:
        what = f"a row with the columns {sorted(map(str, item))}" if isinstance(item, Mapping) else repr(item)[:80]
        raise TypeError(
            f"item {number} of `texts` is {what}; allowed: a string, a sequence of strings, or a row with `input_ids` "
            "or a column of strings."
        )
    return found


def _named_ids(vocabulary: Vocabulary, keep: Iterable[str | int], rows: int) -> set[int]:
    if isinstance(keep, str):
        raise TypeError(f"`keep` is a list of words or ids, but {keep!r} is a string. Write [{keep!r}].")
    ids: set[int] = set()
    for word in keep:
        if isinstance(word, str):
            ids.update([vocabulary.ids[word]] if word in vocabulary.ids else [])
            ids.update(index for pieces in vocabulary.encode([word, " " + word]) for index in pieces)
        elif 0 <= word < rows:
            ids.add(int(word))
        else:
            raise ValueError(f"`keep` names the id {word}; the model's ids are 0 to {rows - 1}.")
    return ids


def _require_equal_encodings(
    vocabulary: Vocabulary, smaller: PreTrainedTokenizerBase, new: Mapping[int, int], texts: list[str]
) -> None:
    if {token: new[index] for token, index in vocabulary.ids.items() if index in new} != smaller.get_vocab():
        raise ValueError(
            f"{type(smaller).__name__} does not reload with the tokens that were kept: it adds or renumbers some "
            "itself. Use it as a PreTrainedTokenizerFast."
        )
    backend = plain_backend(smaller)
    for text in texts:
        old = vocabulary.texts.encode(text).ids
        if all(index in new for index in old) and [new[index] for index in old] != backend.encode(text).ids:
            raise ValueError(
                f"the smaller {type(smaller).__name__} encodes {text[:60]!r} to other tokens than before. Does the "
                "tokenizer itself come back the same from save_pretrained and from_pretrained?"
            )
