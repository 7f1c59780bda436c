"""How soon an int8 BERT-base is there, and what memory it takes: each figure from processes of their own.

    python benchmarks/start.py

A BERT-base with random weights is quantized into build/start. Then fresh processes import torch, transformers and
hf_quant, and from there on count: seconds of `load_quantized`, and memory by /proc/self/smaps_rollup (so Linux only)
after loading, after a forward, and after `optimize` and a forward. Results go to benchmarks/results/start.json.
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
PROCESS = """
import json, sys, time, torch
from transformers import BertForSequenceClassification
from hf_quant import load_quantized, optimize
torch.set_num_threads(2)

def memory():
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    kb = {name: int(value.split()[0]) for name, value in fields.items()}
    return {"resident_mb": kb["Rss"] / 1024, "anonymous_mb": kb["Anonymous"] / 1024}

folder, way = sys.argv[1:]
batch = {"input_ids": torch.arange(128).view(1, 128) + 1000, "attention_mask": torch.ones(1, 128, dtype=torch.long)}
torch.ones(64, 64) @ torch.ones(64, 64)  # threads and libraries are there
found, start = {"imported": memory()}, time.perf_counter()
model = load_quantized(folder)
found["seconds"] = time.perf_counter() - start
found["loaded"] = memory()
with torch.inference_mode():
    if way == "optimized":
        model = optimize(model, compile=False)
    start = time.perf_counter()
    model(**batch)
    found["first_forward_s"] = time.perf_counter() - start
found["used"] = memory()
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
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    found = found[1:]  # the first one fills the caches on disk
    file = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20
    middle = {
        step: {
            key: statistics.median(one[step][key] - one["imported"][key] for one in found) for key in found[0][step]
        }
        for step in ("loaded", "used")
    }
    seconds = [one["seconds"] for one in found]
    row = {
        "file_mb": file,
        "load_s": statistics.median(seconds),
        "load_s_range": [min(seconds), max(seconds)],
        "first_forward_s": statistics.median(one["first_forward_s"] for one in found),
        **middle,
        "anonymous_of_file": middle["used"]["anonymous_mb"] / file,
        "resident_of_file": middle["used"]["resident_mb"] / file,
    }
    loaded, used = middle["loaded"], middle["used"]
    print(
        f"{folder.name} {way}: loaded in {row['load_s']:.2f} s [{min(seconds):.2f}, {max(seconds):.2f}]; file "
        f"{file:.0f} MB; resident {loaded['resident_mb']:+.0f} MB loaded, {used['resident_mb']:+.0f} MB used "
        f"({row['resident_of_file']:.2f} x); anonymous {used['anonymous_mb']:+.0f} MB "
        f"({row['anonymous_of_file']:.2f} x)",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    rows = {
        f"{scheme}, {way}": measure(make(scheme), way, options.runs)
        for scheme in SCHEMES
        for way in ("plain", "optimized")
    }
    write("start", rows)


if __name__ == "__main__":
    main()
