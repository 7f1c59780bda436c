"""How an answer to a question is judged: exact match and token F1, as SQuAD defines them."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without the articles a, an and the, single spaces (Rajpurkar et al.,
    2016, section 6.1)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if a normalized answer equals one of the references', else 0; no references mean that there is no answer."""
    given = normalize_answer(answer)
    return float(any(given == normalize_answer(reference) for reference in references or ("",)))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """The best F1 of words over the references, in [0, 1]: `2 common / (words given + words of the reference)`, on
    normalized answers as bags of words (Rajpurkar et al., 2016, section 6.1).

    Where either side is empty it is 1 if both are, else 0 (Rajpurkar et al., 2018, SQuAD 2.0).
    """
    given = normalize_answer(answer).split()
    return max(_bag_f1(given, normalize_answer(reference).split()) for reference in references or ("",))


def _bag_f1(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    common = sum((collections.Counter(given) & collections.Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))
