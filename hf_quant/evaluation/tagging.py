"""Sentences as lists of words with a tag for each: read, tokenized, predicted, judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import did_you_mean
from .entities import OUTSIDE, check_bio, entity_counts
from .labels import label_names
from .predict import Encoded
from .ratios import Ratios
from .tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

IGNORED = -100  # the label of positions that torch's cross-entropy leaves out
_CUT = -1  # a word that has no token


@dataclass(frozen=True)
class TaggedSentences:
    """Tokenized sentences and their tags; see [`tagged_sentences`].

    Args:
        names (`list[str]`): of the tags, in the numbering of the model; empty where they have none.
        encoded (`list[Encoded]`): token ids of each sentence.
        first_pieces (`list[numpy.ndarray]`):
            For each sentence the position of the first token of each word, int64 of shape `(words,)`; -1 for words
            that were cut off or have no token.
        references (`list[numpy.ndarray]`): tag ids of each sentence, int64 of shape `(words,)`.
    """

    names: list[str]
    encoded: list[Encoded]
    first_pieces: list[np.ndarray]
    references: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.references)

    def labels(self) -> list[list[int]]:
        """A label for each token, as a Trainer takes them: the tag at the first piece of a word, else -100."""
        made = []
        for row, places, tags in zip(self.encoded, self.first_pieces, self.references, strict=True):
            labels = np.full(len(row["input_ids"]), IGNORED)
            labels[places[places >= 0]] = tags[places >= 0]
            made.append(labels.tolist())
        return made

    def read(self, output: Any, index: int, tokens: slice) -> np.ndarray:
        """The most likely tag of each token of one sentence of a batch; int64 of shape `(tokens,)`.

        Raises:
            `ValueError`: if there are no such logits, or they are NaN or infinite.
        """
        logits = getattr(output, "logits", None)
        if logits is None or logits.ndim != 3 or (self.names and logits.shape[2] != len(self.names)):
            shape = "none" if logits is None else f"shape {tuple(logits.shape)}"
            raise ValueError(
                f"the model gives logits of {shape}; needed: (batch, length, tags), as from a ForTokenClassification."
            )
        values = logits[index, tokens].float().cpu().numpy()
        if not np.isfinite(values).all():
            raise ValueError("the model gives NaN or infinite logits: it is broken, and metrics would mean nothing.")
        best: np.ndarray = values.argmax(axis=1)
        return best

    def predictions(self, of_tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Tag ids of the words, from those of the tokens; -1 for words without one, which is never right."""
        found = []
        for places, tags in zip(self.first_pieces, of_tokens, strict=True):
            found.append(np.where(places >= 0, tags[places], _CUT))
        return found

    def scores(self, metrics: Sequence[str], predictions: Sequence[np.ndarray]) -> dict[str, Ratios]:
        """What each sentence adds to each metric."""
        return tag_scores(metrics, predictions, self.references, self.names)

    def changed(self, before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> np.ndarray:
        """Which sentences have other tags."""
        return np.array([not np.array_equal(one, other) for one, other in zip(before, after, strict=True)])

    def right(self, predictions: Sequence[np.ndarray]) -> np.ndarray:
        """Which sentences have no wrong tag."""
        return ~self.changed(predictions, self.references)


def tag_scores(
    metrics: Sequence[str], predictions: Sequence[np.ndarray], references: Sequence[np.ndarray], names: Sequence[str]
) -> dict[str, Ratios]:
    """What each sentence adds to the metrics of tags.

    Args:
        metrics (sequence of `str`): of `"token_accuracy"` (right words of all) and `"entity_f1"`.
        predictions (sequence of `numpy.ndarray`): tag ids of each sentence, of shape `(words,)`; -1 is no tag.
        references (sequence of `numpy.ndarray`): the true ones.
        names (sequence of `str`): of the tags, for entities.
    """
    found = {}
    for metric in metrics:
        if metric == "token_accuracy":
            counts = [((ours == true).sum(), len(true)) for ours, true in zip(predictions, references, strict=True)]
        else:
            called = [*names, OUTSIDE]  # the last one is for -1
            counts = [
                entity_counts([called[tag] for tag in ours], [called[tag] for tag in true])
                for ours, true in zip(predictions, references, strict=True)
            ]
        over, under = np.asarray(counts, dtype=np.float64).reshape(-1, 2).T
        found[metric] = Ratios(over, under)
    return found


def tagged_sentences(
    dataset: Dataset,
    task: Task,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> TaggedSentences:
    """Reads and tokenizes sentences that are lists of words.

    The words are joined by spaces, so that the model sees what it sees of running text, and a word's tag is that of
    the first token in it.

    Args:
        dataset (`datasets.Dataset`): with the task's columns.
        task ([`Task`]): for token classification.
        config (`transformers.PretrainedConfig`): of the model; its label names number the tags.
        tokenizer (`PreTrainedTokenizerBase`): of the model, a fast one.
        max_length (`int`, *optional*): tokens at which sentences are cut.

    Raises:
        `ValueError`: if words or tags are missing, of different numbers, or unknown to the model.
    """
    require_offsets(tokenizer)
    sentences = _read_words(dataset, task)
    references, names = _read_tags(dataset, task, config, sentences)
    if "entity_f1" in task.metrics:
        check_bio(names)
    encoded, first_pieces = [], []
    texts = [" ".join(words) for words in sentences]
    found = tokenizer(texts, truncation=max_length is not None, max_length=max_length, return_offsets_mapping=True)
    offsets = found.pop("offset_mapping")
    for row, words in enumerate(sentences):
        encoded.append({name: values[row] for name, values in found.items()})
        first_pieces.append(_first_pieces(words, offsets[row]))
    return TaggedSentences(names, encoded, first_pieces, references)


def require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot say where its tokens stand in the text.

    Raises:
        `ValueError`: naming its class.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in the text, which words and answers are "
            "found by. Use a tokenizer with a tokenizer.json (a fast one)."
        )


def tag_names(dataset: Dataset, task: Task) -> list[str]:
    """The names of the tags in the data: of a `ClassLabel` feature, else the sorted words of the column; or none."""
    feature = dataset.features[task.label_column]
    names = getattr(getattr(feature, "feature", None), "names", None)
    if names:
        return list(names)
    return sorted({tag for tags in dataset[task.label_column] for tag in tags or () if isinstance(tag, str)})


def _first_pieces(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The position of the first token of each word of a sentence that was joined by spaces."""
    owner = np.full(sum(len(word) + 1 for word in words), _CUT)
    end = 0
    for index, word in enumerate(words):
        owner[end : end + len(word)] = index
        end += len(word) + 1
    first = np.full(len(words), _CUT)
    for position, (start, stop) in enumerate(offsets):
        # By its last character: byte-level tokens begin with the space before the word.
        word_index = owner[stop - 1] if stop > start else _CUT
        if word_index != _CUT and first[word_index] == _CUT:
            first[word_index] = position
    return first


def _read_words(dataset: Dataset, task: Task) -> list[list[str]]:
    column = dataset[task.text_columns[0]][:]
    for row, words in enumerate(column):
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise ValueError(
                f"Task {task.name!r}: row {row} of the column {task.text_columns[0]!r} holds {words!r:.80}; token "
                "classification needs a list of words, one or more."
            )
    return column


def _read_tags(
    dataset: Dataset, task: Task, config: PretrainedConfig, sentences: Sequence[Sequence[str]]
) -> tuple[list[np.ndarray], list[str]]:
    """Tag ids in the numbering of the model, and their names where either side has some."""
    names, ours = label_names(config), tag_names(dataset, task)
    if task.num_labels is not None and config.num_labels != task.num_labels:
        raise ValueError(
            f"Task {task.name!r} has {task.num_labels} tags, the model {config.num_labels}. Give a model that was "
            f"fine-tuned for it, or `num_labels={config.num_labels}`."
        )
    if ours and names and (unknown := sorted(set(ours) - set(names))):
        raise ValueError(
            f"Task {task.name!r}: the column {task.label_column!r} holds the tag {unknown[0]!r}"
            f"{did_you_mean(unknown[0], names) or '.'} The model's tags: {', '.join(names)}."
        )
    numbers = {name: index for index, name in enumerate(names or ours)}
    by_id = [numbers[name] for name in ours] if names and ours else None  # the model's number of the data's ids
    found = []
    for row, (tags, words) in enumerate(zip(dataset[task.label_column][:], sentences, strict=True)):
        if not isinstance(tags, list) or len(tags) != len(words):
            held = f"{len(tags)} tags" if isinstance(tags, list) else repr(tags)
            raise ValueError(
                f"Task {task.name!r}: row {row} has {len(words)} words but {held} in the column "
                f"{task.label_column!r}; it needs a list with one tag a word."
            )
        ids = [numbers[tag] if isinstance(tag, str) else tag for tag in tags]
        if by_id and not isinstance(tags[0], str) and all(isinstance(i, int) and 0 <= i < len(by_id) for i in ids):
            ids = [by_id[i] for i in ids]
        for tag in ids:
            if not isinstance(tag, int) or not 0 <= tag < config.num_labels:
                raise ValueError(
                    f"Task {task.name!r}: row {row} of the column {task.label_column!r} holds the tag {tag!r}, "
                    f"which is no tag id of 0 to {config.num_labels - 1}."
                )
        found.append(np.asarray(ids, dtype=np.int64))
    return found, names or ours
