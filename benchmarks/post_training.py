"""What post-training quantization costs, variant by variant, on real models.

    python scripts/fetch_quickstart.py && python scripts/fetch_smollm2.py && python benchmarks/real_models.py
    python benchmarks/post_training.py glue                        # MiniLM on four GLUE tasks, each a whole dev set
    python benchmarks/post_training.py perplexity --tokens 32768   # SmolLM2 on the start of WikiText-2's test text

Every figure is written as soon as it is there, and what is there is not measured again; `--redo` measures anew.
Static ranges, GPTQ and the scalings see 128 sentences of the train split, drawn once with a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import torch
from common import RESULTS, write
from real_models import GLUE, SMOLLM2, TASKS, WIKITEXT, float_model

from hf_quant import Calibration, compare, quantize
from hf_quant.evaluation.tasks import get_task, load_task_data

# Arguments of `quantize`; calibration data are added to those that need them.
VARIANTS: dict[str, dict[str, Any]] = {
    "int8_dynamic": {"scheme": "int8_dynamic"},
    "int8_dynamic_symmetric": {"scheme": "int8_dynamic_symmetric"},
    "int8_static, min/max": {"scheme": "int8_static", "observer": "minmax"},
    "int8_static, min/max, smoothquant": {"scheme": "int8_static", "observer": "minmax", "equalize": "smoothquant"},
    "int8_static, min/max, bias": {"scheme": "int8_static", "observer": "minmax", "correct_bias": True},
    "int8_static, min/max, smoothquant, bias": {
        "scheme": "int8_static",
        "observer": "minmax",
        "equalize": "smoothquant",
        "correct_bias": True,
    },
    "int8_static, mse": {"scheme": "int8_static", "observer": "mse"},
    "int8_static, percentile": {"scheme": "int8_static", "observer": "percentile"},
    "int4_weight_only": {"scheme": "int4_weight_only"},
    "int4_weight_only, mse": {"scheme": "int4_weight_only", "rounding": "mse"},
    "int4_weight_only, gptq": {"scheme": "int4_weight_only", "rounding": "gptq"},
    "int4_weight_only, awq": {"scheme": "int4_weight_only", "equalize": "awq"},
    "int4_weight_only, awq, gptq": {"scheme": "int4_weight_only", "equalize": "awq", "rounding": "gptq"},
}
WITHOUT_DATA = ("int8_dynamic", "int8_dynamic_symmetric", "int4_weight_only", "int4_weight_only, mse")
# The same for the language model; `None` is the float model. Equalization sees 8 windows of the validation text.
SMOOTH: dict[str, Any] = {"scheme": "int8_dynamic", "equalize": "smoothquant"}
# The six layers that, quantized alone, moved the next token's distribution most (Kullback-Leibler divergence on 512
# validation tokens), found once by hand; leaving them out is kept here because it did not help.
SENSITIVE = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 2, 11, 28, 29)] + ["model.layers.29.mlp.up_proj"]
SCHEMES: dict[str, dict[str, Any] | None] = {
    "float": None,
    "int8_dynamic": {"scheme": "int8_dynamic"},
    "int8_dynamic, smoothquant": SMOOTH,
    "int8_dynamic, smoothquant, down_proj weight-only": {**SMOOTH, "overrides": {"*.down_proj": "int8_weight_only"}},
    "int8_dynamic, smoothquant, six layers weight-only": {
        **SMOOTH,
        "overrides": dict.fromkeys(SENSITIVE, "int8_weight_only"),
    },
    "int8_dynamic_symmetric": {"scheme": "int8_dynamic_symmetric"},
    "int8_weight_only": {"scheme": "int8_weight_only"},
    "int4_weight_only": {"scheme": "int4_weight_only"},
}
SAMPLES, SEED, LENGTH, WINDOWS = 128, 0, 512, 8


def calibration(task: str) -> Calibration:
    """The same sentences of the train split for every variant; their labels are not used."""
    rows = load_task_data(task, "train", GLUE if GLUE.is_dir() else None).shuffle(seed=SEED).select(range(SAMPLES))
    return Calibration(rows.select_columns(list(get_task(task).text_columns)), SAMPLES)


def measure(task: str, variant: str) -> dict[str, Any]:
    """A variant's metrics on the dev set beside the float model's, with the interval of the difference."""
    folder = str(float_model(task))
    given = None if variant in WITHOUT_DATA else calibration(task)
    start = time.perf_counter()
    quantized = quantize(folder, calibration=given, progress=False, **VARIANTS[variant])
    seconds = time.perf_counter() - start
    rows = str(GLUE / task / "validation.parquet") if GLUE.is_dir() else None
    found = compare(folder, quantized, task=task, data=rows, latency_batch_size=None, progress=False)
    split = found.splits[0]
    return {
        "metrics": {
            metric.name: {
                "float": metric.float_value,
                "quantized": metric.int8_value,
                "delta": metric.delta,
                "interval": [metric.interval.low, metric.interval.high],
            }
            for metric in split.metrics
        },
        "headline": found.headline,
        "samples": split.samples,
        "flips": None if split.agreement is None else split.agreement.flips,
        "mean_absolute_deviation": None if split.deviation is None else split.deviation.mean_absolute,
        "float_megabytes": found.float_model.size.total / 1e6,
        "megabytes": found.int8_model.size.total / 1e6,
        "quantize_seconds": seconds,
    }


def saved(name: str) -> dict[str, Any]:
    """The results of earlier runs."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def glue(tasks: list[str], variants: list[str], redo: bool) -> None:
    name = "post_training_glue"
    results = saved(name).get("variants", {})
    for variant in variants:
        for task in tasks:
            if redo or task not in results.get(variant, {}):
                results.setdefault(variant, {})[task] = measure(task, variant)
                write(name, {"calibration_samples": SAMPLES, "variants": results})
                print(f"{variant}, {task}: {cell(results[variant][task])}", flush=True)
    print(table(results))


def cell(found: dict[str, Any]) -> str:
    """The headline's change in points and its interval; then what is less noisy: how many predictions changed.

    For STS-B that is by how much they changed on average, in its unit of 0 to 5.
    """
    metric = found["metrics"][found["headline"]]
    low, high = (100 * end for end in metric["interval"])
    changed = f"{found['mean_absolute_deviation']:.3f}" if found["flips"] is None else found["flips"]
    return f"{100 * metric['delta']:+.2f} [{low:+.2f}, {high:+.2f}], {changed}"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a variant a row, a task a column; the mean is over tasks where all are there."""
    tasks = [task for task in TASKS if any(task in row for row in results.values())]
    headlines = {task: next(row[task]["headline"] for row in results.values() if task in row) for task in tasks}
    floats = [next(row[task] for row in results.values() if task in row) for task in tasks]
    values = [f"{100 * found['metrics'][found['headline']]['float']:.2f}" for found in floats]
    lines = [
        f"| | {' | '.join(f'{task} ({headlines[task]})' for task in tasks)} | mean | MB |",
        f"| --- |{' --- |' * (len(tasks) + 2)}",
        f"| float32 | {' | '.join(values)} | | {floats[0]['float_megabytes']:.1f} |" if floats else "",
    ]
    for variant in [name for name in VARIANTS if name in results]:
        row = results[variant]
        cells = [cell(row[task]) if task in row else "" for task in tasks]
        deltas = [100 * found["metrics"][found["headline"]]["delta"] for found in row.values()]
        mean = f"{sum(deltas) / len(deltas):+.2f}" if len(deltas) == len(TASKS) else ""
        size = next(iter(row.values()))["megabytes"]
        lines.append(f"| {variant} | {' | '.join(cells)} | {mean} | {size:.1f} |")
    return "\n".join(lines)


def perplexities(schemes: list[str], tokens: int | None, redo: bool) -> None:
    """Perplexity of SmolLM2; the windows' likelihoods of the float model are kept for the intervals."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_quant.evaluation.perplexity import Perplexity, perplexity, perplexity_change
    from hf_quant.evaluation.sizes import model_size
    from hf_quant.evaluation.windows import text_ids

    name = "post_training_perplexity"
    results = saved(name)
    if results.get("tokens") != tokens:
        results = {"tokens": tokens, "length": LENGTH, "schemes": {}}
    results.pop("machine", None)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    texts = Dataset.from_parquet(str(WIKITEXT))["text"][:]
    other = text_ids(tokenizer, Dataset.from_parquet(str(WIKITEXT.with_name("validation.parquet")))["text"][:])
    seen = [{"input_ids": other[None, i * LENGTH : (i + 1) * LENGTH]} for i in range(WINDOWS)]
    for scheme in ["float", *(scheme for scheme in schemes if scheme != "float")]:
        if not redo and scheme in results["schemes"]:
            continue
        start = time.perf_counter()
        arguments = SCHEMES[scheme]
        if arguments is None:
            model = AutoModelForCausalLM.from_pretrained(SMOLLM2)
        else:
            needed = seen if "equalize" in arguments else None
            model = quantize(str(SMOLLM2), calibration=needed, progress=False, **arguments)
        seconds = time.perf_counter() - start
        found = perplexity(model, tokenizer, texts, length=LENGTH, max_tokens=tokens, progress=False)
        row = {
            "perplexity": found.value,
            "predicted_tokens": found.tokens,
            "window_nll": found.window_nll,
            "window_tokens": found.window_tokens,
            "megabytes": model_size(model).total / 1e6,
            "load_seconds": seconds,
        }
        results["schemes"][scheme] = row
        before = Perplexity(*_figures(results["schemes"]["float"]))
        row["change"], interval = perplexity_change(before, Perplexity(*_figures(row)))
        row["interval"] = [end if math.isfinite(end) else None for end in (interval.low, interval.high)]
        if scheme != "float":
            del row["window_nll"], row["window_tokens"]
        write(name, results)
        print(f"{scheme}: {found.value:.4f} ({100 * row['change']:+.3f} %)", flush=True)
    print("| | perplexity | change, % | MB |\n| --- | --- | --- | --- |")
    for scheme, row in results["schemes"].items():
        ends = " to ".join("?" if end is None else f"{100 * end:+.3f}" for end in row["interval"])
        change = "" if scheme == "float" else f"{100 * row['change']:+.3f} [{ends}]"
        print(f"| {scheme} | {row['perplexity']:.3f} | {change} | {row['megabytes']:.1f} |")


def _figures(row: dict[str, Any]) -> tuple[float, int, tuple[float, ...], tuple[int, ...]]:
    return row["perplexity"], row["predicted_tokens"], tuple(row["window_nll"]), tuple(row["window_tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("glue", "perplexity"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--tokens", type=int, help="of the text, the first ones; all by default")
    parser.add_argument("--redo", action="store_true", help="measure again what was measured")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part == "glue":
        glue(options.tasks, options.variants, options.redo)
    else:
        perplexities(options.schemes, options.tokens, options.redo)


if __name__ == "__main__":
    main()
