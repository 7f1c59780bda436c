"""Sentences of tagged words and questions with contexts: as tokens, labels and windows, and back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertTokenizerFast

from hf_quant.evaluation.questions import best_span, questions
from hf_quant.evaluation.tagging import tag_names, tagged_sentences
from hf_quant.evaluation.tasks import Task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "won", "anna", "ran", "in", "rome", "un", "##known", "."]
NAMES = ["O", "B-PER", "B-LOC"]
TAGGING = Task("tags", ("words",), "tags", problem_type="token_classification")
ASKING = Task("asked", ("question", "context"), "answers", problem_type="question_answering")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return BertTokenizerFast(vocab=str(path), model_max_length=32)


def config(names: list[str] = NAMES) -> BertConfig:
    return BertConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def tagged(words: list[list[str]], tags: list[Any]) -> Dataset:
    return Dataset.from_dict({"words": words, "tags": tags})


def test_only_the_first_piece_of_a_word_has_a_label(tokenizer: Any) -> None:
    rows = tagged([["Anna", "unknown", "Rome", "."], ["ran"]], [["B-PER", "O", "B-LOC", "O"], ["O"]])
    found = tagged_sentences(rows, TAGGING, config(), tokenizer, None)
    assert tokenizer.convert_ids_to_tokens(found.encoded[0]["input_ids"]) == [
        *("[CLS]", "anna", "un", "##known", "rome", ".", "[SEP]")
    ]
    assert found.labels() == [[-100, 1, 0, -100, 2, 0, -100], [-100, 0, -100]]
    assert found.predictions([np.array([9, 1, 0, 7, 2, 0, 9]), np.array([9, 0, 9])])[0].tolist() == [1, 0, 2, 0]


def test_words_that_are_cut_off_or_have_no_token_are_never_right(tokenizer: Any) -> None:
    rows = tagged([["Anna", "\u200b", "ran", "in"]], [["B-PER", "O", "O", "O"]])
    found = tagged_sentences(rows, TAGGING, config(), tokenizer, 4)
    assert found.labels() == [[-100, 1, 0, -100]]
    said = found.predictions([np.array([0, 1, 0, 0])])
    assert said[0].tolist() == [1, -1, 0, -1]
    assert found.scores(["token_accuracy"], said)["token_accuracy"].value == 0.5
    assert not found.right(said)[0]


def test_tags_are_numbered_as_the_model_numbers_them(tokenizer: Any) -> None:
    features = Features({"words": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=NAMES))})
    rows = Dataset.from_dict({"words": [["Anna", "ran"]], "tags": [[1, 0]]}, features=features)
    assert tag_names(rows, TAGGING) == NAMES
    other = ["B-LOC", "B-PER", "O"]
    assert tagged_sentences(rows, TAGGING, config(other), tokenizer, None).references[0].tolist() == [1, 2]
    assert tag_names(tagged([["ran"]], [["O"]]), TAGGING) == ["O"]
    plain = tagged([["ran", "in"]], [[0, 2]])
    assert tag_names(plain, TAGGING) == []
    assert tagged_sentences(plain, TAGGING, config(), tokenizer, None).references[0].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        (["ran"], ["O", "O"], "row 0 has 1 words but 2 tags"),
        ([], [], "row 0 of the column 'words' holds"),
        (["ran"], ["B-PRE"], r"the tag 'B-PRE'.*B-PER"),
        (["ran"], [7], "the tag 7, which is no tag id of 0 to 2"),
        (["ran"], [-1], "the tag -1, which is no tag id of 0 to 2"),
    ],
)
def test_tags_that_do_not_fit_are_refused(words: list[str], tags: list[Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        tagged_sentences(tagged([words], [tags]), TAGGING, config(), tokenizer, None)


def test_a_model_for_other_tags_is_refused(tokenizer: Any) -> None:
    task = Task("tags", ("words",), "tags", problem_type="token_classification", num_labels=5)
    with pytest.raises(ValueError, match=r"has 5 tags, the model 3"):
        tagged_sentences(tagged([["ran"]], [["O"]]), task, config(), tokenizer, None)
    broken = SimpleNamespace(logits=torch.full((1, 3, 3), torch.nan))
    examples = tagged_sentences(tagged([["ran"]], [["O"]]), TAGGING, config(), tokenizer, None)
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        examples.read(broken, 0, slice(0, 3))
    with pytest.raises(ValueError, match=r"logits of shape \(1, 3, 4\); needed: \(batch, length, tags\)"):
        examples.read(SimpleNamespace(logits=torch.zeros(1, 3, 4)), 0, slice(0, 3))


def asked(context: str, answers: list[str], starts: list[int], question: str = "who won") -> Dataset:
    value = {"text": answers, "answer_start": starts}
    features = Features(
        {
            "question": Value("string"),
            "context": Value("string"),
            "answers": {"text": Sequence(Value("string")), "answer_start": Sequence(Value("int64"))},
        }
    )
    values = {"question": [question], "context": [context], "answers": [value]}
    return Dataset.from_dict(values, features=features)


LONG = " ".join(["ran in Rome ."] * 6) + " Anna ran"


def test_long_contexts_become_windows_that_overlap(tokenizer: Any) -> None:
    start = LONG.index("Anna")
    found = questions(asked(LONG, ["Anna"], [start]), ASKING, tokenizer, 16)
    assert all(len(row["input_ids"]) <= 16 for row in found.encoded)
    covered: list[set[int]] = [set(window.offsets[window.offsets[:, 0] >= 0, 0].tolist()) for window in found.windows]
    assert len(covered) > 2
    assert {len(one & other) for one, other in zip(covered, covered[1:], strict=False)} == {16 // 3}  # noqa: RUF007
    assert set.union(*covered) == {at for at in range(len(LONG)) if at == 0 or LONG[at - 1] == " "}
    first, last = found.positions()
    held = [start in window for window in covered]
    assert any(held)
    assert not all(held)
    for window, row, begin, end, here in zip(found.windows, found.encoded, first, last, held, strict=True):
        assert (begin == end == window.null == 0) is not here
        if here:
            assert tokenizer.convert_ids_to_tokens(row["input_ids"])[begin : end + 1] == ["anna"]


def test_the_best_span_of_all_windows_is_the_answer(tokenizer: Any) -> None:
    start = LONG.index("Anna")
    found = questions(asked(LONG, ["Anna ran"], [start]), ASKING, tokenizer, 16)
    first, last = found.positions()
    said = []
    for row, begin, end in zip(found.encoded, first, last, strict=True):
        logits = np.zeros((2, len(row["input_ids"])))
        logits[0, begin] = logits[1, end] = 5.0
        said.append(logits)
    # Most windows are sure that the answer is not in them; they do not outvote the one that holds it.
    assert found.predictions(said) == ["Anna ran"]
    assert found.right(["anna ran."]).tolist() == [True]
    assert not found.changed(["Anna ran"], ["the anna ran"]).any()


def test_no_answer_is_given_only_where_questions_may_have_none(tokenizer: Any) -> None:
    for answers, starts in (([], []), (["Rome"], [7])):
        found = questions(asked("ran in Rome", answers, starts), ASKING, tokenizer, 16)
        logits = np.zeros((2, len(found.encoded[0]["input_ids"])))
        logits[:, 0] = 9.0
        logits[0, 6] = logits[1, 6] = 1.0
        assert found.predictions([logits]) == ([""] if not answers else ["Rome"])
    none = questions(asked("ran in Rome", [], []), ASKING, tokenizer, 16)
    assert none.positions() == ([0], [0])
    assert none.scores(["exact_match", "token_f1"], [""])["token_f1"].value == 1.0


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(0, 10))
def test_best_span_is_that_of_all_spans(seed: int, length: int, before: int) -> None:
    draw = np.random.default_rng(seed)
    starts, ends = draw.normal(size=(2, length + before))
    inside = np.arange(length + before) >= before
    score, first, last = best_span(starts, ends, inside)
    spans = {
        (i, j): starts[i] + ends[j]
        for i in range(before, before + length)
        for j in range(i, min(i + 30, before + length))
    }
    assert score == pytest.approx(max(spans.values()))
    assert spans[first, last] == pytest.approx(score)


def test_a_long_question_is_cut_and_leaves_room_for_the_context(tokenizer: Any) -> None:
    found = questions(asked("ran in Rome", ["Rome"], [7], "who won " * 30), ASKING, tokenizer, 16)
    tokens = tokenizer.convert_ids_to_tokens(found.encoded[0]["input_ids"])
    assert tokens == ["[CLS]", "who", "won", "who", "won", "who", "[SEP]", "ran", "in", "rome", "[SEP]"]


@pytest.mark.parametrize(
    ("answers", "starts", "message"),
    [
        (["Rome"], [6], r"the answer 'Rome' at character 6, where the context has ' Rom'.*characters, not bytes"),
        (["Rome", "in"], [7], "two lists of one length"),
        ([""], [0], "the answer ''"),
        (["Rome"], [-4], "at character -4"),
    ],
)
def test_answers_that_do_not_stand_in_the_context(
    answers: list[str], starts: list[int], message: str, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        questions(asked("ran in Rome", answers, starts), ASKING, tokenizer, 16)


def test_what_questions_need_of_length_and_tokenizer(tokenizer: Any) -> None:
    rows = asked("ran in Rome", ["Rome"], [7])
    with pytest.raises(ValueError, match="`max_length` is 12; question and context need 16"):
        questions(rows, ASKING, tokenizer, 12)
    with pytest.raises(ValueError, match="which is no text"):
        questions(asked(" ", [], []), ASKING, tokenizer, 16)
    tokenizer.padding_side = "left"
    try:
        with pytest.raises(ValueError, match="pads on the left"):
            questions(rows, ASKING, tokenizer, 16)
    finally:
        tokenizer.padding_side = "right"


def test_tasks_say_what_their_columns_are() -> None:
    assert TAGGING.metrics == ("token_accuracy",)
    assert (ASKING.metrics, ASKING.num_labels) == (("exact_match", "token_f1"), 2)
    assert Task("t", ("text",), problem_type="causal_lm").columns == ("text",)
    with pytest.raises(ValueError, match="must name two columns, the question and its context; got 1"):
        Task("t", ("question",), problem_type="question_answering")
    with pytest.raises(ValueError, match="two outputs a token"):
        Task("t", ("q", "c"), problem_type="question_answering", num_labels=3)
    with pytest.raises(ValueError, match="causal_lm has no labels"):
        Task("t", ("text",), problem_type="causal_lm", num_labels=3)
    with pytest.raises(ValueError, match="unknown metric 'accuracy' for token_classification"):
        Task("t", ("words",), problem_type="token_classification", metrics=("accuracy",))
