"""Schedules against their closed forms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_quant.pruning.schedules import SCHEDULES, Timeline, check_pairs, check_schedule, share_of_way

SHARES = st.floats(0, 1)
GRADUAL = [name for name in SCHEDULES if name != "constant"]


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("linear", lambda x: x),
        ("cubic", lambda x: 1 - (1 - x) ** 3),
        ("cosine", lambda x: 0.5 - 0.5 * math.cos(math.pi * x)),
        ("polynomial_2", lambda x: 1 - (1 - x) ** 2),
        ("polynomial_0.5", lambda x: 1 - math.sqrt(1 - x)),
        ("one_shot", lambda x: 1),
    ],
)
@given(x=SHARES)
def test_closed_form(schedule, formula, x):
    assert share_of_way(schedule, x) == pytest.approx(formula(x), abs=1e-12)


@pytest.mark.parametrize("schedule", GRADUAL)
@given(x=SHARES, y=SHARES)
def test_never_falls_and_ends_at_one(schedule, x, y):
    low, high = sorted((x, y))
    assert 0 <= share_of_way(schedule, low) <= share_of_way(schedule, high) <= 1
    assert share_of_way(schedule, 1.0) == 1


def test_zhu_gupta_equation_1():
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3, for t in {t_0, t_0 + dt, ..., t_0 + n dt}."""
    start, frequency, updates, initial, final = 20, 5, 8, 0.1, 0.9
    line = Timeline("cubic", start, start + updates * frequency, frequency)
    for n in range(updates + 1):
        t = start + n * frequency
        expected = final + (initial - final) * (1 - (t - start) / (updates * frequency)) ** 3
        assert line.is_update(t)
        assert line.goal(t, initial, final) == pytest.approx(expected)
        # Between updates the goal is that of the last one.
        assert line.goal(t + 3, initial, final) == line.goal(t, initial, final)


@given(
    schedule=st.sampled_from(GRADUAL),
    start=st.integers(0, 30),
    length=st.integers(1, 40),
    frequency=st.integers(1, 50),
    initial=st.floats(0, 0.4),
    final=st.floats(0.5, 0.99),
)
def test_timeline(schedule, start, length, frequency, initial, final):
    line = Timeline(schedule, start, start + length, frequency)
    steps = range(start + length + 20)
    goals = [line.goal(step, initial, final) for step in steps]
    assert all(goal == 0 for goal in goals[:start])
    assert goals == sorted(goals)
    assert all(goal == final for goal in goals[start + length :])
    updates = [step for step in steps if line.is_update(step)]
    assert updates[0] == start
    assert updates[-1] == start + length
    assert all(line.last_update(step) == max(u for u in updates if u <= step) for step in steps if step >= start)
    # The goal changes at updates only.
    changed = [step for step in steps if step and goals[step] != goals[step - 1]]
    assert set(changed) <= set(updates)


def test_a_list_of_steps_holds_until_the_next():
    line = Timeline(((3, 0.2), (6, 0.5), (9, 0.8)), 3, 9, 1)
    assert [line.goal(step, 0, 0.8) for step in (0, 2, 3, 5, 6, 8, 9, 50)] == [0, 0, 0.2, 0.2, 0.5, 0.5, 0.8, 0.8]
    assert [step for step in range(20) if line.is_update(step)] == [3, 6, 9]


def test_gradients_count_from_one_update_before_the_first():
    line = Timeline("linear", 10, 20, 4)
    assert [step for step in range(30) if line.gathers(step)] == list(range(7, 21))


@pytest.mark.parametrize(
    ("name", "text"),
    [("cubik", "did you mean .*cubic"), ("polynomial_x", "unknown schedule"), ("polynomial_-1", "unknown schedule")],
)
def test_unknown_names(name, text):
    with pytest.raises(ValueError, match=text):
        check_schedule(name)


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ([], "list of .step, sparsity. pairs"),
        ([(1, 0.2, 3)], "list of .step, sparsity. pairs"),
        ([(5, 0.2), (5, 0.4)], "must be greater"),
        ([(5, 0.5), (7, 0.4)], "falls from 0.5 to 0.4"),
        ([(5, 1.0)], r"must lie in \[0, 1\)"),
    ],
)
def test_bad_lists(pairs, text):
    with pytest.raises(ValueError, match=text):
        check_pairs(pairs)


def test_counts_and_shares_do_not_mix():
    with pytest.raises(TypeError, match="mix counts and shares"):
        check_pairs([(5, 0.1), (0.5, 0.4)])
