"""Questions answered with a span of their context: cut into windows, predicted, judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .answers import exact_match, normalize_answer, token_f1
from .predict import Encoded
from .ratios import Ratios
from .tagging import require_offsets
from .tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Windows share a third of their tokens, as 128 of 384 in Devlin et al., 2019 (BERT), for SQuAD; questions are cut
# at a third, which leaves a third for what is new in each window.
_SHARE = 3
_LEAST_LENGTH = 16
MAX_ANSWER_TOKENS = 30  # as there
_OUTSIDE = -1


@dataclass(frozen=True)
class Window:
    """A question with a part of its context.

    Args:
        question (`int`): which question.
        offsets (`numpy.ndarray`):
            Where each token stands in the context, characters from and to, int64 of shape `(tokens, 2)`; -1 for
            tokens of the question and special ones.
        null (`int`): the token that stands for "no answer here": the classifier token, or the first.
    """

    question: int
    offsets: np.ndarray
    null: int


@dataclass(frozen=True)
class Questions:
    """Questions, their windows and their answers; see [`questions`].

    Args:
        contexts (`list[str]`): one a question.
        answers (`list[list[str]]`): the accepted answers of each question; an empty list where there is none.
        starts (`list[list[int]]`): the character of the context at which each begins.
        encoded (`list[Encoded]`): token ids of each window.
        windows (`list[Window]`): the same windows.
        unanswerable (`bool`): whether there are questions without an answer, so that a model may give none.
    """

    contexts: list[str]
    answers: list[list[str]]
    starts: list[list[int]]
    encoded: list[Encoded]
    windows: list[Window]
    unanswerable: bool

    def __len__(self) -> int:
        return len(self.contexts)

    def positions(self) -> tuple[list[int], list[int]]:
        """The first and the last token of the first answer in each window, as a Trainer takes them.

        Windows that do not hold all of it, and questions without one, point at the `null` token.
        """
        first, last = [], []
        for window in self.windows:
            begin = end = window.null
            if self.answers[window.question]:
                at = self.starts[window.question][0]
                until = at + len(self.answers[window.question][0])
                begins = np.flatnonzero((window.offsets[:, 0] <= at) & (window.offsets[:, 1] > at))
                ends = np.flatnonzero((window.offsets[:, 0] < until) & (window.offsets[:, 1] >= until))
                if len(begins) and len(ends):
                    begin, end = int(begins[0]), int(ends[-1])
            first.append(begin)
            last.append(end)
        return first, last

    def read(self, output: Any, index: int, tokens: slice) -> np.ndarray:
        """Start and end logits of one window of a batch, float32 of shape `(2, tokens)`.

        Raises:
            `ValueError`: if there are none, or they are NaN or infinite.
        """
        sides = [getattr(output, name, None) for name in ("start_logits", "end_logits")]
        if any(side is None for side in sides):
            raise ValueError("the model gives no start and end logits; needed: those of a ForQuestionAnswering.")
        values = np.stack([side[index, tokens].float().cpu().numpy() for side in sides if side is not None])
        if not np.isfinite(values).all():
            raise ValueError("the model gives NaN or infinite logits: it is broken, and metrics would mean nothing.")
        return values

    def predictions(self, of_windows: Sequence[np.ndarray]) -> list[str]:
        """The answer to each question: the best span of all of its windows; empty for no answer.

        A span's score is the sum of the start logit of its first token and the end logit of its last (Devlin et al.,
        2019, section 4.2), and it has 30 tokens at most. No answer has the score of the `null` token, in the window
        where that is the least, and is given if it beats all spans (section 4.3, with a threshold of 0).

        Args:
            of_windows (sequence of `numpy.ndarray`): of `read`, in the order of the windows.
        """
        best = [(-np.inf, "")] * len(self)
        null = [np.inf] * len(self)
        for window, (starts, ends) in zip(self.windows, of_windows, strict=True):
            question = window.question
            null[question] = min(null[question], float(starts[window.null] + ends[window.null]))
            score, first, last = best_span(starts, ends, window.offsets[:, 0] != _OUTSIDE)
            if score > best[question][0]:
                begin, end = window.offsets[first, 0], window.offsets[last, 1]
                best[question] = (score, self.contexts[question][begin:end])
        if not self.unanswerable:
            return [text for _, text in best]
        return ["" if none > score else text for (score, text), none in zip(best, null, strict=True)]

    def scores(self, metrics: Sequence[str], predictions: Sequence[str]) -> dict[str, Ratios]:
        """What each question adds to each metric."""
        kinds = {"exact_match": exact_match, "token_f1": token_f1}
        ones = np.ones(len(self))
        return {
            name: Ratios(np.array([kinds[name](*pair) for pair in zip(predictions, self.answers, strict=True)]), ones)
            for name in metrics
        }

    def changed(self, before: Sequence[str], after: Sequence[str]) -> np.ndarray:
        """Which questions have another answer; case, punctuation and articles aside."""
        pairs = zip(before, after, strict=True)
        return np.array([normalize_answer(one) != normalize_answer(other) for one, other in pairs])

    def right(self, predictions: Sequence[str]) -> np.ndarray:
        """Which questions are answered exactly."""
        return self.scores(["exact_match"], predictions)["exact_match"].numerators > 0


def best_span(starts: np.ndarray, ends: np.ndarray, inside: np.ndarray) -> tuple[float, int, int]:
    """The span with the largest sum of start and end logit, of 1 to 30 tokens, all of the context.

    Args:
        starts (`numpy.ndarray` of shape `(tokens,)`): start logits.
        ends (`numpy.ndarray` of shape `(tokens,)`): end logits.
        inside (`numpy.ndarray` of shape `(tokens,)`): which tokens are the context's, which lie side by side.

    Returns:
        `tuple[float, int, int]`: its score, first and last token; `-inf` where there is no context.
    """
    starts, ends = (np.where(inside, side.astype(np.float64), -np.inf) for side in (starts, ends))
    best = (-np.inf, 0, 0)
    for further in range(min(MAX_ANSWER_TOKENS, len(starts))):
        scores = starts[: len(starts) - further] + ends[further:]
        first = int(scores.argmax())
        if scores[first] > best[0]:
            best = (float(scores[first]), first, first + further)
    return best


def questions(dataset: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Questions:
    """Reads questions, contexts and answers, and cuts long contexts into overlapping windows.

    Args:
        dataset (`datasets.Dataset`): with the task's columns.
        task ([`Task`]): for question answering.
        tokenizer (`PreTrainedTokenizerBase`): of the model, a fast one that pads on the right.
        max_length (`int`, *optional*): tokens a window, question included; neighbours share a third of them.

    Raises:
        `ValueError`: if a text is missing, or an answer does not stand in its context.
    """
    require_offsets(tokenizer)
    if tokenizer.padding_side != "right":
        raise ValueError(
            f"The tokenizer pads on the {tokenizer.padding_side}, which would move the tokens that answers are given "
            'by. Set `padding_side` to "right" in its tokenizer_config.json.'
        )
    if max_length is not None and max_length < _LEAST_LENGTH:
        raise ValueError(
            f"`max_length` is {max_length}; question and context need {_LEAST_LENGTH} tokens or more a window."
        )
    asked, contexts = (_read_texts(dataset, task, column) for column in task.text_columns)
    answers, starts = _read_answers(dataset, task, contexts)
    options: dict[str, Any] = {}
    if max_length is not None:
        asked = [_cut(text, tokenizer, max_length // _SHARE) for text in asked]
        options = {"truncation": "only_second", "max_length": max_length, "stride": max_length // _SHARE}
        options["return_overflowing_tokens"] = True
    found = tokenizer(asked, contexts, return_offsets_mapping=True, **options)
    offsets = found.pop("offset_mapping")
    owners = found.pop("overflow_to_sample_mapping", range(len(offsets)))
    encoded, windows = [], []
    for row, owner in enumerate(owners):
        tokens = {name: values[row] for name, values in found.items()}
        context = np.array([part == 1 for part in found.sequence_ids(row)])
        places = np.where(context[:, None], np.asarray(offsets[row], dtype=np.int64), _OUTSIDE)
        ids = tokens["input_ids"]
        null = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        encoded.append(tokens)
        windows.append(Window(int(owner), places, null))
    return Questions(contexts, answers, starts, encoded, windows, not all(answers))


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """A text's first tokens."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]


def _read_texts(dataset: Dataset, task: Task, column: str) -> list[str]:
    texts = dataset[column][:]
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"Task {task.name!r}: row {row} of the column {column!r} holds {text!r}, which is no text."
            )
    return texts


def _read_answers(dataset: Dataset, task: Task, contexts: Sequence[str]) -> tuple[list[list[str]], list[list[int]]]:
    answers, starts = [], []
    for row, value in enumerate(dataset[task.label_column][:]):
        where = f"Task {task.name!r}: row {row} of the column {task.label_column!r}"
        texts = value.get("text") if isinstance(value, dict) else None
        begins = value.get("answer_start") if isinstance(value, dict) else None
        if not isinstance(texts, list) or not isinstance(begins, list) or len(texts) != len(begins):
            raise ValueError(
                f"{where} holds {value!r:.80}; needed are two lists of one length, "
                '{"text": [...], "answer_start": [...]}, empty where there is no answer.'
            )
        for text, start in zip(texts, begins, strict=True):
            if not text or not isinstance(start, int) or start < 0 or not contexts[row].startswith(text, start):
                there = contexts[row][start : start + len(text or "")] if isinstance(start, int) and start >= 0 else ""
                raise ValueError(
                    f"{where} has the answer {text!r:.60} at character {start}, where the context has {there!r:.60}. "
                    "`answer_start` counts characters, not bytes or words, from 0."
                )
        answers.append(texts)
        starts.append(begins)
    return answers, starts
