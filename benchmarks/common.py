"""What every benchmark shares: interleaved timing, medians with spread, machine and versions, results on disk."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

# Those of another machine than the one that the README speaks of go to a folder of their own:
# RESULTS=benchmarks/results/zen5 python benchmarks/inference.py
RESULTS = Path(os.environ.get("RESULTS") or Path(__file__).parent / "results")


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    flags: list[str] = []
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(
            (part.strip() for part in line.split(":", 1)) for line in info.read_text().splitlines() if ":" in line
        )
        cpu = fields.get("model name", cpu)
        if "cpu family" in fields:  # virtual machines' names may not tell one generation from another
            cpu += f", family {fields['cpu family']} model {fields['model']}"
        wanted = ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
        flags = [flag for flag in wanted if flag in fields.get("flags", "").split()]
    return {
        "cpu": cpu,
        "cpu_flags": flags,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def interleave(variants: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each call. Variants take turns, and the order turns round, so that noise meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(warmup + rounds):
        names = list(variants)
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            variants[name]()
            if index >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def summarize(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Median, quartiles (ms) and the median of the ratios to `base` within each round."""
    rows = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        ratios = [value / reference for value, reference in zip(values, times[base], strict=True)]
        rows[name] = {
            "median_ms": middle * 1e3,
            "q1_ms": low * 1e3,
            "q3_ms": high * 1e3,
            "ratio": statistics.median(ratios),
            "rounds": len(values),
        }
    return rows


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}")
    width = max(len(name) for name in rows)
    for name, row in rows.items():
        spread = f"[{row['q1_ms']:.1f}, {row['q3_ms']:.1f}]"
        print(f"  {name:{width}}  {row['median_ms']:9.1f} ms  {spread:>20}  x{row['ratio']:.3f}")


def write(name: str, results: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n", encoding="utf-8")
    print(f"\nWritten to {path}")
