"""Where the time of an optimized int8 model goes, by kind of operation.

    python benchmarks/inference.py --shape minilm --threads 2 --quick --peers static-compiled,dynamic-compiled
    python benchmarks/inference_profile.py --shape minilm --threads 2

Reads the models and batches that `inference.py` made. Shares are PyTorch's profiler's, which makes calls dearer than
they are; what is left of a call that is timed without it is what lies between operations: Python, allocation, threads.
The instructions' own time is the least in which this machine could multiply the integers of all layers, if nothing
waited for memory or did anything else: by how fast `vpdpbusd` is on registers, measured here (AVX-512 VNNI only).
Results go to benchmarks/results/profile_<shape>.json.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from typing import Any

import torch
from common import write
from peers.cases import REPOSITORY, read
from torch.profiler import ProfilerActivity, profile

from hf_quant.runtime.cpu import features

CASES = ("batch1", "batch8", "batch32", "mrpc")
KINDS = {
    "products": (
        "hf_quant::vnni_product",
        "hf_quant::vnni_feed_forward",
        "hf_quant::product",
        "onednn::qlinear_pointwise",
        "aten::_int_mm",
    ),
    "attention": ("hf_quant::vnni_attention", "aten::bmm", "aten::_scaled_dot_product"),
    "norms": ("hf_quant::vnni_norm",),
    "compiled by Inductor": ("## Call CompiledFxGraph",),
}
# 24 sums, so that none waits for itself. A function of its own: else gcc keeps them in memory. The asm hides from it
# that all sums are alike, and factors do not change.
INSTRUCTIONS = r"""
#include <immintrin.h>
#include <cstdint>
#define UNROLL _Pragma("GCC unroll 24")
static __attribute__((noinline)) int multiply_alone(int64_t rounds) {
    __m512i sums[24], left = _mm512_set1_epi8(1), right = left;
    UNROLL for (int i = 0; i < 24; i++) asm volatile("vpxord %0, %0, %0" : "=v"(sums[i]));
    for (int64_t round = 0; round < rounds; round++) {
        asm volatile("" : "+v"(left), "+v"(right));
        UNROLL for (int i = 0; i < 24; i++) sums[i] = _mm512_dpbusd_epi32(sums[i], left, right);
    }
    UNROLL for (int i = 1; i < 24; i++) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
    return _mm512_reduce_add_epi32(sums[0]);
}
extern "C" int multiply(int64_t threads, int64_t rounds) {
    int found = 0;
#pragma omp parallel num_threads((int)threads) reduction(+ : found)
    found += multiply_alone(rounds);
    return found;
}
"""
ROUNDS = 2_000_000


def instructions_per_second(threads: int) -> float | None:
    """How many 512-bit `vpdpbusd`, of 64 products each, all threads do together; `None` where there is none."""
    from torch._inductor.codecache import CppCodeCache

    if not features()["avx512_vnni"]:
        return None
    multiply = CppCodeCache.load(INSTRUCTIONS).multiply
    multiply.argtypes = [ctypes.c_int64, ctypes.c_int64]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(threads, ROUNDS)
        times.append(time.perf_counter() - start)
    return 24 * ROUNDS * threads / min(times)


def instructions(model: Any, tokens: int) -> float:
    """How many of them the products of an encoder's int8 layers take, for a number of tokens without padding."""
    from hf_quant.runtime.base import quantized_modules
    from hf_quant.runtime.modules import Int8Linear

    found = quantized_modules(model).items()
    layers = [module for name, module in found if isinstance(module, Int8Linear) and ".encoder." in name]
    return sum(tokens * layer.in_features * layer.out_features / 64 for layer in layers)


def kind(name: str) -> str:
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), "other operations")


@torch.inference_mode()
def measure(model: Any, batch: dict[str, torch.Tensor], seconds: float) -> dict[str, Any]:
    for _ in range(3):
        model(**batch)
    times, began = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        model(**batch)
        times.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(5):
            model(**batch)
    spent = dict.fromkeys((*KINDS, "other operations"), 0.0)
    for row in found.key_averages():
        spent[kind(row.key)] += row.self_cpu_time_total / 5e3
    return {"median_ms": statistics.median(times) * 1e3, "calls": len(times), "profiled_ms": spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="minilm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from hf_quant import load_quantized, optimize

    folder = REPOSITORY / "build" / "inference" / options.shape
    rows: dict[str, Any] = {}
    for scheme in ("int8_static", "int8_dynamic"):
        model = optimize(load_quantized(folder / scheme))
        for case in CASES:
            batch = {
                name: torch.from_numpy(array) for name, array in read(folder / "cases" / f"{case}.npz")[0].items()
            }
            rate = instructions_per_second(options.threads)  # beside each case: the clock's frequency varies
            rows[f"{scheme}, {case}"] = row = measure(model, batch, options.seconds)
            if rate is not None:
                row["instructions_ms"] = instructions(model, int(batch["attention_mask"].sum())) / rate * 1e3
            whole = sum(row["profiled_ms"].values())
            shares = ", ".join(
                f"{name} {value:.2f} ms ({value / whole:.0%})" for name, value in row["profiled_ms"].items()
            )
            own = row.get("instructions_ms")
            least = "" if own is None else f", {row['median_ms'] / own:.2f} x its instructions' own {own:.2f} ms"
            print(f"{scheme}, {case}: {row['median_ms']:.2f} ms a call{least}; profiled: {shares}", flush=True)
    write(f"profile_{options.shape}", {"rows": rows})


if __name__ == "__main__":
    main()
