"""Where the time of an optimized int8 model goes, by kind of operation.

    python benchmarks/inference.py --shape minilm --threads 2 --quick --peers static-compiled,dynamic-compiled
    python benchmarks/inference_profile.py --shape minilm --threads 2

Reads the models and batches that `inference.py` made. Shares are PyTorch's profiler's, which makes calls dearer than
they are; what is left of a call that is timed without it is what lies between operations: Python, allocation, threads.
Results go to benchmarks/results/profile_<shape>.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import write
from peers.cases import REPOSITORY, read
from torch.profiler import ProfilerActivity, profile

CASES = ("batch1", "batch8", "batch32", "mrpc")
KINDS = {
    "products": ("hf_quant::vnni_product", "hf_quant::product", "onednn::qlinear_pointwise", "aten::_int_mm"),
    "attention": ("hf_quant::vnni_attention", "aten::bmm", "aten::_scaled_dot_product"),
    "norms": ("hf_quant::vnni_norm",),
    "compiled by Inductor": ("## Call CompiledFxGraph",),
}


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
            rows[f"{scheme}, {case}"] = row = measure(model, batch, options.seconds)
            whole = sum(row["profiled_ms"].values())
            shares = ", ".join(
                f"{name} {value:.2f} ms ({value / whole:.0%})" for name, value in row["profiled_ms"].items()
            )
            print(f"{scheme}, {case}: {row['median_ms']:.2f} ms a call; profiled: {shares}", flush=True)
    write(f"profile_{options.shape}", {"rows": rows})


if __name__ == "__main__":
    main()
