"""Arithmetic, patterns of names, shares and schemes of migration, against what they must agree with."""

from __future__ import annotations

import fnmatch
import math
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.migration.arithmetic import calculate
from hf_quant.migration.patterns import from_regex, literal, subtree
from hf_quant.migration.values import LAST, scheme_name, share
from hf_quant.schemes import get_scheme

VARIABLES = {"num_epochs": 30, "qat_epochs": 2.5, "lr": 1e-4}

numbers = st.one_of(
    st.integers(0, 50).map(str), st.floats(0, 50).map(lambda x: f"{x:.3f}"), st.sampled_from([*VARIABLES])
)
expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), inner),
        st.builds("-{}".format, inner),
        st.builds("{}({}, {})".format, st.sampled_from(["min", "max"]), inner, inner),
    ),
    max_leaves=8,
)


@given(expressions)
@settings(max_examples=500, deadline=None)
def test_arithmetic_is_pythons(expression: str) -> None:
    try:
        wanted = eval(expression, {"__builtins__": {"min": min, "max": max}}, dict(VARIABLES))
    except (ZeroDivisionError, OverflowError):
        wanted = None
    refusal = ""
    try:
        found = calculate(expression, VARIABLES)
    except ValueError as error:
        refusal = str(error)
    if refusal:  # nothing else in these expressions can be wrong
        assert re.search("divides by 0|is beyond|no real number", refusal), refusal
    else:
        assert type(found) is type(wanted)
        assert found == wanted


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("__import__('os').system('x')", "is not allowed in an expression"),
        ("num_epochs.real", "is not allowed"),
        ("[1][0]", "is not allowed"),
        ("(lambda: 1)()", "is not allowed"),
        ("'a' * 3", "is not allowed"),
        ("True + 1", "is not allowed"),
        ("1 if 1 else 2", "is not allowed"),
        ("open('x')", "is not allowed"),
        ("max(*num_epochs)", "give plain numbers"),
        ("round(1, 2, 3)", "takes other numbers"),
        ("nothing + 1", "unknown variable 'nothing'; numbers of this file: lr, num_epochs, qat_epochs"),
        ("1 / (2 - 2)", "divides by 0"),
        ("9 ** 9 ** 9", "is beyond"),
        ("0 ** -1", "divides by 0"),
        ("(0 - 8) ** 0.5", "no real number"),
        ("1e300 * 1e300", "is beyond"),
        ("1 +", "is no arithmetic expression"),
        ("(" * 300 + "1" + ")" * 300, "is no arithmetic expression"),
        ("1" + "+1" * 600, "1201 characters"),
        ("\x00", "is no arithmetic expression"),
    ],
)
def test_what_is_no_arithmetic(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        calculate(expression, VARIABLES)


@pytest.mark.parametrize(
    ("regex", "how", "suffix", "wanted"),
    [
        (".*attention.*", "match", "", ["*attention*"]),
        ("attention", "search", "", ["*attention*"]),
        ("^bert", "search", "", ["bert*"]),
        (r"encoder\.layer\.[0-2]\.output", "fullmatch", "", ["encoder.layer.[0-2].output"]),
        (r".*\.(query|key)$", "match", "", ["*.query", "*.key"]),
        (r"layer\.\d{2}x?", "fullmatch", "", ["layer.[0-9][0-9]", "layer.[0-9][0-9]x"]),
        (".+dense", "fullmatch", "", ["?*dense"]),
        (r"a\[0\]", "fullmatch", "", ["a[[]0]"]),
        (".*query.weight", "match", ".weight", ["*query"]),
        (r".*\.weight", "match", ".weight", ["*"]),
        (".*weight", "match", ".weight", ["*"]),
        (".*query", "match", ".weight", ["*query*"]),
        (r"classifier\.weight$", "match", ".weight", ["classifier"]),
    ],
)
def test_regular_expressions_as_patterns(regex: str, how: str, suffix: str, wanted: list[str]) -> None:
    assert from_regex(regex, how, suffix) == (wanted, "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("regex", "reason"),
    [
        (r"layer\.\d+\.out", r"no repetition (`+`)"),
        ("(ab)*", "no repetition (`*`)"),
        (r"\bquery", r"no `\b`"),
        ("(?!bert).*", "no `(?!`"),
        ("(?i)bert", "no `(?i`"),
        ("^a|b", "no anchor of only one alternative"),
        ("a$b", "no `$` there"),
        (r"[\d_]", "no such a class"),
        ("(", "no regular expression"),
        (r".*\.bias$", "matches no module's weight"),
        ("(a|b)" * 6, "more than 32 alternatives"),
    ],
)
def test_expressions_without_a_translation(regex: str, reason: str) -> None:
    patterns, found = from_regex(regex, "match", ".weight" if "bias" in regex else "")
    assert patterns == []
    assert reason in found


pieces = st.sampled_from(
    [
        ".*",
        ".",
        r"\.",
        "a",
        "b",
        "layer",
        "query",
        "q?",
        "[ab]",
        "[0-9]",
        r"\d",
        "(a|b)",
        "(query|key)",
        ".+",
        ".?",
        "x",
    ]
)
names = st.lists(
    st.sampled_from(["a", "b", "ab", "layer", "query", "key", "0", "11", "q", "x"]), min_size=1, max_size=5
)


@given(
    st.lists(pieces, max_size=6),
    st.sampled_from(["match", "search", "fullmatch"]),
    st.booleans(),
    st.booleans(),
    names,
)
@settings(max_examples=600, deadline=None)
def test_patterns_match_what_the_expression_does(
    parts: list[str], how: str, anchored: bool, weights: bool, name: list[str]
) -> None:
    regex, module, suffix = "".join(parts), ".".join(name), ".weight" if weights else ""
    regex += "$" if anchored else ""
    patterns, reason = from_regex(regex, how, suffix)  # type: ignore[arg-type]
    wanted = bool(getattr(re, how)(regex, module + suffix))
    if reason:
        assert "alternatives" in reason or not wanted
    else:
        assert any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns) is wanted, (patterns, module)


@given(st.text(max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_text_is_translated_or_refused(text: str) -> None:
    patterns, reason = from_regex(text, "search")
    assert bool(patterns) is not bool(reason)
    assert fnmatch.fnmatchcase(text, literal(text))


def test_subtrees() -> None:
    assert subtree("bert.encoder") == "bert.encoder*"
    assert subtree("layers.1") == "layers.1.*"
    assert not fnmatch.fnmatchcase("layers.10.mlp", subtree("layers.1"))


@given(st.integers(0, 400), st.integers(1, 400), st.integers(1, 200))
@settings(max_examples=500, deadline=None)
def test_a_share_is_the_step_of_its_epoch(epoch: int, epochs: int, per_epoch: int) -> None:
    part = share(epoch, epochs)
    assert 0 <= part <= LAST
    if epoch < epochs and epochs * per_epoch <= 10_000:
        exact = Fraction(epoch, epochs) * epochs * per_epoch
        assert math.ceil(Fraction(str(part)) * epochs * per_epoch) == exact


@pytest.mark.parametrize(
    ("asked", "name", "remark"),
    [
        ((8, "static", None), "int8_static", ""),
        ((8, None, None), "int8_weight_only", ""),
        ((4, None, 128), "int4_weight_only_g128", ""),
        ((4, None, 32), "int4_weight_only", ""),
        ((4, None, None), "int4_weight_only_channel", ""),
        ((4, "static", None), "int4_dynamic_channel", "static ranges"),
        ((4, "dynamic", 256), "int4_dynamic_g128", "groups of 256"),
        ((8, "dynamic_symmetric", None), "int8_dynamic_symmetric", ""),
        ((1, None, None), "", "weights of 1 bits"),
    ],
)
def test_scheme_names_are_schemes(asked: tuple[int, str | None, int | None], name: str, remark: str) -> None:
    found, why = scheme_name(*asked)
    assert found == name
    assert remark in why
    assert bool(why) is bool(remark)
    if name:
        get_scheme(name)
