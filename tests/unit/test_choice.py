"""Which kernel is chosen for which times, and where times are kept. What is measured is never asserted."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_quant.runtime import choice, cpu, kernels, products, vnni

TIMES = {"onednn": 10.0, "int_mm": 20.0, "float32": 30.0}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file of its own for each test, and nothing in memory."""
    monkeypatch.setenv("HF_QUANT_CACHE", str(tmp_path / "cache"))
    _forget(monkeypatch)
    choice._tell.cache_clear()
    choice._tell_unwritten.cache_clear()
    return tmp_path / "cache" / "kernels.json"


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process would start."""
    monkeypatch.setattr(choice, "_times", {})


def _never() -> dict[str, float]:
    pytest.fail("measured again")


def _remembered(what: str, measure: Callable[[], dict[str, float]], *names: str) -> dict[str, float]:
    return choice.remembered(what, names or tuple(TIMES), measure)


def _inject(monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> list[int]:
    asked: list[int] = []

    def measure(calls: choice.Calls, tokens: int) -> dict[str, float]:
        asked.append(tokens)
        return times

    monkeypatch.setattr(choice, "measure", measure)
    monkeypatch.setattr(products, "exact_kernels", lambda *_: tuple(times))
    return asked


def test_buckets() -> None:
    found = [choice.bucket(tokens) for tokens in (1, 2, 8, 9, 32, 33, 128, 129, 1024, 1025, 10**6)]
    assert found == [1, 8, 8, 32, 32, 128, 128, 1024, 1024, 1024, 1024]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"onednn": 10.0, "int_mm": 9.5, "float32": 30.0}, "onednn"),  # faster by less than a tenth
        ({"onednn": 10.0, "int_mm": 8.9, "float32": 30.0}, "int_mm"),
        ({"onednn": 10.0, "int_mm": 8.9, "float32": 8.8}, "float32"),
        ({"onednn": 10.0, "int_mm": 11.0, "float32": 9.1}, "onednn"),
        ({"int_mm": 10.0, "float32": 9.9}, "int_mm"),  # the first one is preferred
        ({"onednn": 10.0}, "onednn"),
    ],
)
def test_the_fastest(monkeypatch: pytest.MonkeyPatch, times: dict[str, float], expected: str) -> None:
    asked = _inject(monkeypatch, times)
    assert choice.choose(48, 32, 100) == expected
    assert choice.choose(48, 32, 128) == expected
    assert asked == [128], "one measurement a bucket, of its largest number of tokens"
    assert choice.choose(48, 32, 129) == choice.choose(32, 48, 100) == expected
    assert asked == [128, 1024, 128]


def test_this_machine(cache: Path) -> None:
    threads = torch.get_num_threads()
    for tokens in (1, 100):
        found = choice.times(48, 32, tokens)
        assert set(found) <= set(products.exact_kernels())
        assert all(value > 0 for value in found.values())
        assert choice.choose(48, 32, tokens) in found
    assert torch.get_num_threads() == threads
    stored = json.loads(cache.read_text(encoding="utf-8"))
    assert stored["schema"] == "hf_quant.kernels/2"
    assert len(stored["times"]) == 2
    assert all(key.startswith(choice.machine()) for key in stored["times"])


def test_slow_kernels_are_not_tried_at_many_tokens() -> None:
    ran: dict[str, set[int]] = {"fast": set(), "slow": set()}

    def calls(tokens: int) -> dict[str, Callable[[int], object]]:
        def fast(turn: int) -> None:
            ran["fast"].add(tokens)

        def slow(turn: int) -> None:
            ran["slow"].add(tokens)
            sum(range(200_000))

        return {"fast": fast, "slow": slow}

    assert set(choice.measure(calls, 32)) == {"fast", "slow"}
    assert set(choice.measure(calls, 1024)) == {"fast"}
    assert ran == {"fast": {32, 1024}, "slow": {32}}


def test_large_weights_are_measured_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.measured_rows(4096, 16384) == 512
    assert choice.measured_rows(4096, 100) == 100
    assert choice.measured_rows(2**22, 10) == 1
    assert choice.copies(32, 32) == 16
    assert choice.copies(4096, 512) == 4
    _inject(monkeypatch, TIMES)
    monkeypatch.setattr(choice, "_VALUES", 2**10)
    assert choice.times(32, 64, 1) == {name: 2 * value for name, value in TIMES.items()}


def test_one_process_measures_for_the_next(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert _remembered("a", lambda: TIMES) == TIMES
    _forget(monkeypatch)
    assert _remembered("a", _never) == TIMES
    assert _remembered("b", lambda: {"onednn": 1.0}) == {"onednn": 1.0}
    assert [path.name for path in cache.parent.iterdir()] == ["kernels.json"], "nothing is left beside it"


def test_two_processes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has read the file before the other one wrote."""
    first: dict[str, dict[str, float]] = {}
    second: dict[str, dict[str, float]] = {}
    monkeypatch.setattr(choice, "_times", first)
    _remembered("a", lambda: TIMES)
    monkeypatch.setattr(choice, "_times", second)
    second["something read earlier"] = TIMES
    _remembered("b", lambda: TIMES)
    _forget(monkeypatch)
    assert _remembered("a", _never) == _remembered("b", _never) == TIMES


def test_times_hold_for_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    _remembered("a", lambda: TIMES)
    other = dict.fromkeys(TIMES, 1.0)
    for target, name, value in (
        (torch, "get_num_threads", lambda: 99),
        (cpu, "name", lambda: "another CPU"),
        (cpu, "features", lambda: {"amx_int8": True}),
        (torch, "__version__", "9.9"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, value)
            assert _remembered("a", lambda: other) == other, name
    assert _remembered("a", _never) == TIMES
    assert _remembered("a", lambda: {"float32": 1.0}, "float32") == {"float32": 1.0}, "where other kernels are exact"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "\x00\xff",
        '{"schema": "hf_quant.kernels/0", "times": {}}',
        '{"schema": "hf_quant.kernels/2"}',
        '{"schema": "hf_quant.kernels/2", "times": []}',
    ],
)
def test_a_damaged_file_is_written_anew(monkeypatch: pytest.MonkeyPatch, cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content.encode("latin-1"))
    assert _remembered("a", lambda: TIMES) == TIMES
    _forget(monkeypatch)
    assert _remembered("a", _never) == TIMES


@pytest.mark.parametrize("entry", [None, [], {}, {"onednn": "fast"}, {"onednn": -1.0}, {"onednn": True}, {"mkl": 1.0}])
def test_a_damaged_entry_is_measured_anew(monkeypatch: pytest.MonkeyPatch, cache: Path, entry: object) -> None:
    _remembered("a", lambda: TIMES)
    _remembered("b", lambda: TIMES)
    stored = json.loads(cache.read_text(encoding="utf-8"))
    stored["times"] = {key: entry if " | a | " in key else found for key, found in stored["times"].items()}
    cache.write_text(json.dumps(stored), encoding="utf-8")
    _forget(monkeypatch)
    assert _remembered("b", _never) == TIMES
    assert _remembered("a", lambda: {"onednn": 2.0}) == {"onednn": 2.0}
    _forget(monkeypatch)
    assert _remembered("a", _never) == {"onednn": 2.0}


def test_without_a_file(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("HF_QUANT_CACHE", "off")
    _remembered("a", lambda: TIMES)
    assert _remembered("a", _never) == TIMES
    assert not cache.parent.exists()
    monkeypatch.delenv("HF_QUANT_CACHE")
    monkeypatch.setenv("HOME", str(cache.parent))
    assert choice._file() == cache.parent / ".cache" / "hf_quant" / "kernels.json"


def test_a_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("HF_QUANT_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, "hf_quant.runtime.choice"):
        _remembered("a", lambda: TIMES)
        _remembered("b", lambda: TIMES)
    assert _remembered("a", _never) == TIMES
    assert len(caplog.records) == 1
    assert "are kept in memory only, because" in caplog.text


def test_a_write_that_fails_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    _remembered("a", lambda: TIMES)

    def full(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        _remembered("b", lambda: TIMES)
    assert [path.name for path in cache.parent.iterdir()] == ["kernels.json"]
    _forget(monkeypatch)
    assert _remembered("a", _never) == TIMES


def test_a_cpu_that_saturates_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(kernels, "onednn_is_exact", lambda: False)
    monkeypatch.setattr(vnni, "available", lambda: False)
    with caplog.at_level(logging.WARNING, "hf_quant.runtime.choice"):
        chosen = {choice.choose(48, 32, 8), choice.choose(48, 32, 8)}
    assert chosen <= {"int_mm", "float32"}
    assert len(caplog.records) == 1
    assert f"saturates on this CPU ({cpu.name()})" in caplog.text
    assert f"{chosen.pop()} is used instead" in caplog.text
