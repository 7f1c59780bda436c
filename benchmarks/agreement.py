"""How many predictions `hf_quant.optimize` changes, on all of MRPC's and SST-2's dev sets.

    python scripts/fetch_quickstart.py && python benchmarks/real_models.py mrpc sst2
    python benchmarks/agreement.py

MiniLM fine-tuned on each task, quantized, against itself after `optimize`, in batches of 32 padded sentences; how far
the int8 model is from the float one stands beside it, and how far the int8 model, not optimized, is from itself where
nothing changes but the rounding of float32: in another order of sums, or by at most one unit in the last place of the
first layer's input. Results go to benchmarks/results/agreement.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from common import write
from post_training import calibration
from real_models import GLUE, float_model
from torch import Tensor

from hf_quant import optimize, quantize_dynamic, quantize_static
from hf_quant.evaluation.tasks import get_task, load_task_data
from hf_quant.quantization.sensitivity import sqnr

TASKS = ("mrpc", "sst2")
SCHEMES = ("int8_dynamic", "int8_static")
BATCH = 32
OTHER_BATCHES = (8, 1)
SEEDS = range(3)
VARIANTS: dict[str, dict[str, Any]] = {"auto": {}, "float32": {"dtype": "float32"}}


def batches(task: str, size: int = BATCH) -> list[dict[str, Tensor]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(float_model(task))
    rows = load_task_data(task, "validation", GLUE if GLUE.is_dir() else None)
    columns = [list(rows[name]) for name in get_task(task).text_columns]
    return [
        dict(
            tokenizer(
                *(column[start : start + size] for column in columns),
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
            )
        )
        for start in range(0, len(rows), size)
    ]


@torch.inference_mode()
def logits(model: Any, given: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([model(**batch).logits for batch in given])


def unchanged(model: Any, task: str, given: list[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same model's logits under changes that are nothing in mathematics: names, and (rows, 2)."""
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)

        def nudge(module: Any, inputs: Any, output: Tensor, generator: torch.Generator = generator) -> Tensor:
            share = torch.rand(output.shape, generator=generator, dtype=torch.float64) * 2 - 1
            return (output.double() * (1 + share * 2**-23)).float()

        hook = model.base_model.embeddings.LayerNorm.register_forward_hook(nudge)
        yield f"unchanged model, last bit of embeddings, seed {seed}", logits(model, given)
        hook.remove()
    for size in OTHER_BATCHES:
        yield f"unchanged model, batches of {size}", logits(model, batches(task, size))
    model.set_attn_implementation("eager")
    yield "unchanged model, eager attention", logits(model, given)
    model.set_attn_implementation("sdpa")


def optimized(model: Any, given: list[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The optimized model's logits: names of variants, and (rows, 2)."""
    for name, options in VARIANTS.items():
        yield name, logits(optimize(copy.deepcopy(model), **options), given)
        torch._dynamo.reset()


def measure(task: str, scheme: str) -> dict[str, Any]:
    from transformers import AutoModelForSequenceClassification

    given = batches(task)
    floats = AutoModelForSequenceClassification.from_pretrained(float_model(task)).eval()
    expected = logits(floats, given)
    if scheme == "int8_static":
        model = quantize_static(str(float_model(task)), calibration(task), progress=False)
    else:
        model = quantize_dynamic(str(float_model(task)), progress=False)
    model = getattr(model, "model", model).eval()
    before = logits(model, given)
    rows: dict[str, Any] = {
        "predictions": len(before),
        "changed_by_int8": int((before.argmax(-1) != expected.argmax(-1)).sum()),
        "db_of_int8": sqnr(expected, before),
    }
    # A prediction that hangs on less than int8's own error is a coin that any rounding may turn.
    for name, after in itertools.chain(unchanged(model, task, given), optimized(model, given)):
        turned = before.argmax(-1) != after.argmax(-1)
        margin = (before[:, 0] - before[:, 1]).abs()[turned]
        rows[name] = {
            "changed": int(turned.sum()),
            "largest_margin": float(margin.max()) if len(margin) else 0.0,
            "changed_from_float": int((after.argmax(-1) != expected.argmax(-1)).sum()),
            "db_to_int8": sqnr(before, after),
            "db_to_float": sqnr(expected, after),
        }
        shown = "  ".join(f"{key} {value:.4g}" for key, value in rows[name].items())
        print(f"{task} {scheme} {name}: {shown}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    rows = {task: {scheme: measure(task, scheme) for scheme in SCHEMES} for task in TASKS}
    totals: dict[str, Any] = {}
    for scheme in SCHEMES:
        count = sum(rows[task][scheme]["predictions"] for task in TASKS)
        for name in (name for name, row in rows[TASKS[0]][scheme].items() if isinstance(row, dict)):
            changed = sum(rows[task][scheme][name]["changed"] for task in TASKS)
            totals[f"{scheme}, {name}"] = {"changed": changed, "same": 1 - changed / count}
            print(f"{scheme}, {name}: {changed} of {count} changed, {100 - 100 * changed / count:.2f} % the same")
    write("agreement", {"tasks": rows, "all": totals})


if __name__ == "__main__":
    main()
