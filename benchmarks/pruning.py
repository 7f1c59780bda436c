"""What pruning costs, with and without QAT: MiniLM on MRPC and SST-2, one run a row, with intervals.

    python scripts/fetch_quickstart.py && python benchmarks/real_models.py mrpc sst2
    python benchmarks/pruning.py            # hours on one core; stop and start it as you like
    python benchmarks/pruning.py --table

Every run fine-tunes the pretrained model with the same data, steps and seed; "dense" does so without pruning. Sparsity
rises from 15 % to 60 % of the steps; from 75 % on, the int8 twin of each row trains with fake-quant: it goes on from
the float row's own checkpoint, which is the same, bit for bit, as one `train()` with both callbacks. Intervals are
paired bootstraps against the dense float row on the same examples; they do not cover the seed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, write
from real_models import GLUE, MODELS, float_model, make_trainer

from hf_quant import PruningCallback, QATCallback
from hf_quant.evaluation.measures import Bootstrap, Examples, examples
from hf_quant.evaluation.sizes import model_size
from hf_quant.texts import find_tokenizer

# SST-2: 10,000 of its 67,349 rows.
TASKS: dict[str, dict[str, Any]] = {"mrpc": {"num_train_epochs": 3}, "sst2": {"num_train_epochs": 2, "rows": 10_000}}
PHASE = {"start_step": 0.15, "end_step": 0.6, "frequency": 0.015}
ROWS: dict[str, dict[str, Any] | None] = {"dense": None}
for criterion in ("magnitude", "movement", "fisher"):
    for percent in (50, 80, 90):
        ROWS[f"{criterion}, {percent} %"] = {"final_sparsity": percent / 100, "criterion": criterion}
ROWS["2:4"] = {"structure": "2:4"}
ROWS["neurons, 50 %"] = {"final_sparsity": 0.5, "structure": "neuron", "criterion": "fisher", "uniform": True}
ROWS["neurons, 50 %"] |= {"shrink": True}
QAT_START = 0.75
BUILD = MODELS.parent / "pruning"


def folder_of(task: str, row: str) -> Path:
    return BUILD / task / re.sub(r"[ ,%]+", "-", row).strip("-").replace(":", "of")


def trained(task: str, row: str, given: Examples) -> dict[str, Any]:
    """A row and its int8 twin, by kind: logits on the dev set, size, sparsity, seconds; trained first."""
    folder = folder_of(task, row)
    done = folder / "found.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    found = {}
    for kind in ("float", "int8"):
        found[kind] = _train(task, ROWS[row], kind, folder, given)
    shutil.rmtree(folder / "run")
    done.write_text(json.dumps(found), encoding="utf-8")
    return found


def _train(task: str, arguments: dict[str, Any] | None, kind: str, folder: Path, given: Examples) -> dict[str, Any]:
    pruning = [] if arguments is None else [PruningCallback(**PHASE, **arguments)]
    run = folder / "run"
    if kind == "float":
        shutil.rmtree(run, ignore_errors=True)
    trainer, _ = make_trainer(
        task,
        run,
        callbacks=pruning,
        bf16=True,
        use_cpu=True,
        disable_tqdm=True,
        save_steps=QAT_START,
        save_total_limit=None,
        **TASKS[task],
    )
    resumed = None
    if kind == "int8":
        QATCallback("int8_static", start_step=QAT_START).attach(trainer)
        resumed = str(min(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resumed)
    seconds = time.perf_counter() - start
    model = trainer.model.eval()
    trainer.save_model(str(folder / kind))
    return {
        "seconds": seconds,
        "megabytes": model_size(model).total / 1e6,
        "sparsity": pruning[0].history[-1][2] if pruning else 0.0,
        "logits": given.measure(f"{folder.name}, {kind}", model).tolist(),
    }


def dev_set(task: str) -> Examples:
    from transformers import AutoModelForSequenceClassification

    folder = str(float_model(task))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    data = str(GLUE / task / "validation.parquet") if GLUE.is_dir() else None
    wanted = {"metrics": None, "max_length": None, "max_samples": None, "batch_size": 64}
    bootstrap = Bootstrap(10_000, 0)
    return examples(model, find_tokenizer(None, [folder]), task, data, bootstrap=bootstrap, progress=False, **wanted)


def judged(found: dict[str, Any], dense: dict[str, Any], given: Examples) -> dict[str, Any]:
    """One row's metrics, and their change against the dense float row, with intervals."""
    changes, agreement, _ = given.judge(np.array(dense["float"]["logits"]), np.array(found["logits"]))
    return {
        **{key: found[key] for key in ("seconds", "megabytes", "sparsity")},
        "flips": None if agreement is None else agreement.flips,
        "metrics": {
            change.metric: {
                "value": change.value,
                "delta": change.change,
                "interval": [change.interval.low, change.interval.high],
            }
            for change in changes
        },
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a line; per task the headline's value, and its change in points with the interval."""
    tasks = [task for task in TASKS if task in results]
    lines = ["| | " + " | ".join(f"{task}, float | {task}, int8" for task in tasks) + " |"]
    lines.append("| --- |" + " --- | --- |" * len(tasks))
    for row in ROWS:
        cells = []
        for task in tasks:
            for kind in ("float", "int8"):
                found = results[task]["rows"].get(row, {}).get(kind)
                metric = found and found["metrics"][results[task]["headline"]]
                low, high = (100 * end for end in metric["interval"]) if metric else (0, 0)
                value = f"{100 * metric['value']:.2f}" if metric else ""
                own = row == "dense" and kind == "float"
                cells.append(
                    value if own or not metric else f"{value}, {100 * metric['delta']:+.2f} [{low:+.2f}, {high:+.2f}]"
                )
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; all by default")
    parser.add_argument("--threads", type=int, default=1, help="more help only where the cores are idle")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="names of rows; all by default")
    parser.add_argument("--table", action="store_true", help="print what is there, and train nothing")
    options = parser.parse_args()
    path = RESULTS / "pruning.json"
    if not options.table:
        torch.set_num_threads(options.threads)
        for task in options.tasks or TASKS:
            given = dev_set(task)
            dense = trained(task, "dense", given)
            for row in options.rows:
                found = trained(task, row, given)
                # Read again: another process may have trained another task meanwhile.
                results = json.loads(path.read_text(encoding="utf-8"))["tasks"] if path.is_file() else {}
                mine = results.setdefault(task, {"headline": given.headline, "samples": given.samples, "rows": {}})
                mine["rows"][row] = {kind: judged(found[kind], dense, given) for kind in found}
                write("pruning", {"phase": PHASE, "qat_start": QAT_START, "tasks": results})
                print(f"{task}, {row}: {json.dumps(mine['rows'][row])}", flush=True)
    print(table(json.loads(path.read_text(encoding="utf-8"))["tasks"]))


if __name__ == "__main__":
    main()
