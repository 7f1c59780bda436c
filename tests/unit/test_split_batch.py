"""The rows of a padded batch in the groups that cost least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.runtime.grouping import split_batch


def _cost(groups: list[list[int]], lengths: Sequence[int], overhead: int) -> int:
    return sum(overhead + len(rows) * max(lengths[row] for row in rows) for rows in groups)


def _partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    if not rows:
        yield []
        return
    for rest in _partitions(rows[1:]):
        yield [[rows[0]], *rest]
        for index, group in enumerate(rest):
            yield [*rest[:index], [rows[0], *group], *rest[index + 1 :]]


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=8), overhead=st.integers(0, 30))
def test_no_grouping_costs_less(lengths: list[int], overhead: int) -> None:
    least = min(_cost(groups, lengths, overhead) for groups in _partitions(list(range(len(lengths)))))
    assert _cost(split_batch(lengths, overhead), lengths, overhead) == least


@given(lengths=st.lists(st.integers(0, 512), min_size=1, max_size=256), overhead=st.integers(0, 2000))
def test_each_row_once_and_never_dearer_than_one_batch(lengths: list[int], overhead: int) -> None:
    groups = split_batch(lengths, overhead)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    assert _cost(groups, lengths, overhead) <= overhead + len(lengths) * max(lengths)
    longest = [max(lengths[row] for row in rows) for rows in groups]
    assert longest == sorted(set(longest))


def test_groups_follow_the_overhead() -> None:
    assert split_batch([], 4) == []
    assert split_batch([8, 2, 8, 3], 0) == [[1], [3], [0, 2]]
    assert split_batch([8, 2, 8, 3], 4) == [[1, 3], [0, 2]]
    assert split_batch([8, 2, 8, 3], 100) == [[1, 3, 0, 2]]


@given(lengths=st.lists(st.integers(0, 512), min_size=1, max_size=64), most=st.integers(1, 5000))
def test_no_group_of_several_rows_has_more_tokens_than_allowed(lengths: list[int], most: int) -> None:
    groups = split_batch(lengths, 64, most)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= most for rows in groups)
    if most >= len(lengths) * max(lengths):
        assert groups == split_batch(lengths, 64)


def test_large_groups_are_cut_into_equal_ones() -> None:
    assert [len(rows) for rows in split_batch([128] * 32, 64, 2048)] == [16, 16]
    assert [len(rows) for rows in split_batch([128] * 33, 64, 2048)] == [11, 11, 11]
    assert [len(rows) for rows in split_batch([4000] * 3, 64, 2048)] == [1, 1, 1]


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"overhead is -1, but a forward costs at least 0 tokens\. Give 0 or more\."):
        split_batch([1], -1)
    with pytest.raises(ValueError, match=r"a row has -2 tokens\. Lengths are 0 or more\."):
        split_batch([1, -2], 0)
    with pytest.raises(ValueError, match=r"most is 0, but a forward has at least 1 token\. Give 1 or more, or None\."):
        split_batch([1], 0, 0)
