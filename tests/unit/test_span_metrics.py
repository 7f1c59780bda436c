"""Metrics of tags and of answers: entities, exact match, token F1, and intervals of sums over sums."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_quant.evaluation.answers import exact_match, normalize_answer, token_f1
from hf_quant.evaluation.entities import check_bio, entities, entity_counts
from hf_quant.evaluation.ratios import Ratios, ratio_bootstrap
from hf_quant.evaluation.statistics import paired_bootstrap
from hf_quant.evaluation.tagging import tag_scores

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-PER I-PER O", {("PER", 1, 3)}),
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("B-PER I-LOC I-LOC", {("PER", 0, 1), ("LOC", 1, 3)}),
        ("I-PER I-PER O I-PER", {("PER", 0, 2), ("PER", 3, 4)}),
        ("O O", set()),
        ("B-LOC", {("LOC", 0, 1)}),
        ("B-A-B I-A-B", {("A-B", 0, 2)}),
    ],
)
def test_entities(tags: str, found: set[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == found


@given(st.lists(st.tuples(st.sampled_from(["PER", "LOC"]), st.integers(1, 3), st.integers(0, 2)), max_size=6))
def test_entities_are_those_that_tags_were_made_of(parts: list[tuple[str, int, int]]) -> None:
    tags: list[str] = []
    wanted = set()
    for kind, length, gap in parts:
        wanted.add((kind, len(tags), len(tags) + length))
        tags += [f"B-{kind}", *[f"I-{kind}"] * (length - 1), *["O"] * gap]
    assert entities(tags) == wanted


def test_entity_counts_want_type_and_both_ends() -> None:
    true = ["B-PER", "I-PER", "O", "B-LOC"]
    assert entity_counts(true, true) == (4, 4)
    assert entity_counts(["B-PER", "O", "O", "B-LOC"], true) == (2, 4)
    assert entity_counts(["B-LOC", "I-LOC", "O", "O"], true) == (0, 3)
    assert entity_counts(["O"] * 4, true) == (0, 2)


def test_names_that_are_no_bio_tags_are_refused() -> None:
    check_bio(TAGS)
    with pytest.raises(ValueError, match=r"a tag is called 'NOUN'. Use 'token_accuracy'"):
        check_bio(["O", "NOUN"])
    with pytest.raises(ValueError, match=r"the tags have no such names"):
        check_bio([])


def test_tag_scores_on_hand_made_sentences() -> None:
    true = [np.array([0, 1, 2]), np.array([3, 0])]
    ours = [np.array([0, 1, 0]), np.array([3, -1])]
    found = tag_scores(["token_accuracy", "entity_f1"], ours, true, TAGS)
    assert found["token_accuracy"].value == pytest.approx(3 / 5)
    # Two entities each; only the second sentence's is whole. The word that was cut off is outside of any.
    assert found["entity_f1"].value == pytest.approx(2 * 1 / (2 + 2))
    assert Ratios(np.zeros(2), np.zeros(2)).value == 0.0


def test_normalized_answers() -> None:
    assert normalize_answer("The  Eiffel-Tower, a \tlandmark.") == "eiffeltower landmark"
    assert normalize_answer("theory of an anthem") == "theory of anthem"


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("the Normans", ["Normans"], 1.0, 1.0),
        ("in the 10th century", ["10th century", "the 10th"], 0.0, 2 * 2 / (3 + 2)),
        ("a cat cat", ["cat"], 0.0, 2 * 1 / (2 + 1)),
        ("dog", ["cat"], 0.0, 0.0),
        ("", [], 1.0, 1.0),
        ("cat", [], 0.0, 0.0),
        ("", ["cat"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),
    ],
)
def test_exact_match_and_token_f1(answer: str, references: list[str], exact: float, f1: float) -> None:
    assert exact_match(answer, references) == exact
    assert token_f1(answer, references) == pytest.approx(f1)


@given(st.lists(st.sampled_from(["cat", "dog", "the", "sat", "mat"]), max_size=6), st.randoms(use_true_random=False))
def test_token_f1_knows_no_order_and_is_exact_for_equal_answers(words: list[str], draw: random.Random) -> None:
    other = list(words)
    draw.shuffle(other)
    assert token_f1(" ".join(words), [" ".join(other)]) == 1.0
    assert exact_match(" ".join(words), [" ".join(words)]) == 1.0


def test_the_bootstrap_of_ratios_is_the_bootstrap_of_accuracy() -> None:
    draw = np.random.default_rng(0)
    true = draw.integers(0, 2, 200)
    before, after = (np.where(draw.random(200) < share, true, 1 - true) for share in (0.9, 0.7))
    ones = np.ones(200)
    sides = [{"accuracy": Ratios((side == true).astype(float), ones)} for side in (before, after)]
    ours = ratio_bootstrap(*sides, resamples=20_000)["accuracy"]
    theirs = paired_bootstrap(["accuracy"], before, after, true, resamples=20_000)["accuracy"]
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert ours.high < 0
    # Numerator and denominator of a sentence are drawn together.
    words = draw.integers(1, 40, 200).astype(float)
    whole = {"token_accuracy": Ratios(words, words)}
    same = ratio_bootstrap(whole, whole, resamples=200)["token_accuracy"]
    assert (same.low, same.high) == (0.0, 0.0)


def test_an_interval_holds_the_change_that_chunks_of_all_metrics_share() -> None:
    draw = np.random.default_rng(1)
    n = 300
    sides = []
    for share in (0.9, 0.85):
        right = (draw.random(n) < share).astype(float)
        sides.append({"exact_match": Ratios(right, np.ones(n)), "token_f1": Ratios(right * 0.5, np.ones(n))})
    found = ratio_bootstrap(*sides, resamples=2000, seed=3)
    assert found == ratio_bootstrap(*sides, resamples=2000, seed=3)
    assert found["token_f1"].low == pytest.approx(found["exact_match"].low / 2)
    assert found["token_f1"].high == pytest.approx(found["exact_match"].high / 2)
    done: list[int] = []
    ratio_bootstrap(*sides, resamples=500, progress=done.append)
    assert sum(done) == 500
    with pytest.raises(ValueError, match="the same examples"):
        ratio_bootstrap(sides[0], {name: Ratios(np.ones(2), np.ones(2)) for name in sides[0]})
