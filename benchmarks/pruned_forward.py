"""Milliseconds of a forward of models that benchmarks/pruning.py trained: what zeros and missing neurons are worth.

    python benchmarks/pruning.py sst2 --rows dense "magnitude, 80 %" "neurons, 50 %"
    python benchmarks/pruned_forward.py [--rounds 15]

Random token ids, 128 a row without padding, in batches of 1, 8 and 32; eager, interleaved.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from common import interleave, show, summarize, write
from forward import LENGTH, forward_of
from pruning import folder_of
from transformers import AutoModelForSequenceClassification

from hf_quant import load_quantized

ROWS = ("dense", "magnitude, 80 %", "neurons, 50 %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    models, sizes = {}, {}
    for row in ROWS:
        folder = folder_of("sst2", row)
        models[f"{row}, float32"] = AutoModelForSequenceClassification.from_pretrained(folder / "float").eval()
        models[f"{row}, int8"] = load_quantized(folder / "int8")
        for kind in ("float", "int8"):
            sizes[f"{row}, {kind}"] = (folder / kind / "model.safetensors").stat().st_size
    ids = torch.randint(1000, 30000, (32, LENGTH), generator=torch.Generator().manual_seed(0))
    results = {}
    for size in (1, 8, 32):
        forwards = {name: forward_of(model, {"input_ids": ids[:size]}) for name, model in models.items()}
        results[f"batch {size}"] = summarize(interleave(forwards, arguments.rounds), "dense, int8")
        show(f"MiniLM, batch {size} x {LENGTH}; ratios to dense int8", results[f"batch {size}"])
    write("pruned_forward", {"length": LENGTH, "bytes": sizes, "forward": results})


if __name__ == "__main__":
    main()
