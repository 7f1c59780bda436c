"""How soon an int8 BERT-base is there, and what memory it takes: each figure from processes of their own.

    python benchmarks/start.py
    python benchmarks/start.py --quick

A BERT-base with random weights is quantized into build/start. Then fresh processes import torch, transformers,
hf_quant and compressed_tensors, and from there on count: seconds of `load_quantized`, and memory (so Linux only) after
loading, after a forward, and after `optimize` and a forward. What importing compressed_tensors took is a figure of its
own: the first load does it otherwise.

Memory is counted beyond what the process held at a mark. `beyond` of a row says where that is: at the end of these
imports, or, where the process imported Dynamo and Inductor too and compiled a trivial function, at the end of that.
`anonymous` is memory of the process alone; `resident` has the pages of files too, of libraries and of weights; `peak`
is the most that was resident since the mark. Results go to benchmarks/results/start.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import write

FOLDER = Path(__file__).resolve().parents[1] / "build" / "start"
SCHEMES = ("int8_dynamic", "int8_static")
IMPORTS = "the imports of torch, transformers, hf_quant and compressed_tensors"
WAYS = {  # what a process does, and what its memory is counted beyond
    "plain": IMPORTS,
    "optimized": IMPORTS,
    "optimized, Dynamo there": f"{IMPORTS}, and of Dynamo and Inductor, and a trivial function compiled by Dynamo",
}
PROCESS = """
import json, sys, time, torch
from transformers import BertForSequenceClassification
from hf_quant import load_quantized, optimize
start = time.perf_counter()
import compressed_tensors.utils.match
found = {"compressed_tensors_s": time.perf_counter() - start}
torch.set_num_threads(2)

def kilobytes(file, name):
    return next(int(line.split()[1]) for line in open("/proc/self/" + file) if line.startswith(name + ":"))

def memory():
    found = {"resident_mb": ("smaps_rollup", "Rss"), "anonymous_mb": ("smaps_rollup", "Anonymous")}
    return {key: kilobytes(*place) / 1024 for key, place in found.items()}

folder, way = sys.argv[1:]
batch = {"input_ids": torch.arange(128).view(1, 128) + 1000, "attention_mask": torch.ones(1, 128, dtype=torch.long)}
torch.ones(64, 64) @ torch.ones(64, 64)  # threads and libraries are there
if "Dynamo" in way:
    import torch._dynamo, torch._inductor.codecache, torch._inductor.compile_fx
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
found["mark"] = memory()
start = time.perf_counter()
model = load_quantized(folder)
found["seconds"] = time.perf_counter() - start
found["loaded"] = memory()
with torch.inference_mode():
    if way != "plain":
        model = optimize(model, compile=False)
    start = time.perf_counter()
    model(**batch)
    found["first_forward_s"] = time.perf_counter() - start
found["used"] = memory()
found["peak_mb"] = kilobytes("status", "VmHWM") / 1024
print(json.dumps(found))
"""


def make(scheme: str) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    from hf_quant import quantize_dynamic, quantize_static

    folder = FOLDER / scheme
    if not folder.is_dir():
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig()).eval()
        if scheme == "int8_dynamic":
            model = quantize_dynamic(model, progress=False)
        else:
            model = quantize_static(model, [{"input_ids": torch.randint(1000, 30000, (8, 64))}], progress=False)
        model.save_pretrained(folder)
    return folder


def measure(folder: Path, way: str, runs: int) -> dict[str, Any]:
    found = []
    for _ in range(runs + 1):
        command = [sys.executable, "-W", "ignore", "-c", PROCESS, str(folder), way]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the process for {folder.name}, {way} failed:\n{done.stderr[-2000:]}")
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    found = found[1:]  # the first one fills the caches on disk
    file = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20
    loaded, used = (
        {key: statistics.median(one[step][key] - one["mark"][key] for one in found) for key in found[0][step]}
        for step in ("loaded", "used")
    )
    seconds = [one["seconds"] for one in found]
    row = {
        "beyond": WAYS[way],
        "runs": runs,
        "file_mb": file,
        "compressed_tensors_s": statistics.median(one["compressed_tensors_s"] for one in found),
        "load_s": statistics.median(seconds),
        "load_s_range": [min(seconds), max(seconds)],
        "first_forward_s": statistics.median(one["first_forward_s"] for one in found),
        "loaded": loaded,
        "used": used,
        "peak_mb": statistics.median(one["peak_mb"] - one["mark"]["resident_mb"] for one in found),
        "anonymous_of_file": used["anonymous_mb"] / file,
        "resident_of_file": used["resident_mb"] / file,
    }
    print(
        f"\n{folder.name}, {way}\n"
        f"  loaded in {row['load_s']:.2f} s [{min(seconds):.2f}, {max(seconds):.2f}], importing compressed_tensors "
        f"before {row['compressed_tensors_s']:.2f} s; file {file:.0f} MB\n"
        f"  beyond {WAYS[way]}:\n"
        f"  anonymous {loaded['anonymous_mb']:+.0f} MB loaded, {used['anonymous_mb']:+.0f} MB used "
        f"({row['anonymous_of_file']:.2f} x the file); resident {loaded['resident_mb']:+.0f} MB loaded, "
        f"{used['resident_mb']:+.0f} MB used ({row['resident_of_file']:.2f} x); peak {row['peak_mb']:+.0f} MB",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one run, nothing is written")
    options = parser.parse_args()
    runs = 1 if options.quick else options.runs
    rows = {f"{scheme}, {way}": measure(make(scheme), way, runs) for scheme in SCHEMES for way in WAYS}
    if not options.quick:
        write("start", rows)


if __name__ == "__main__":
    main()
