"""The real float models that the benchmarks of post-training quantization need: made once, then kept in build/.

    python benchmarks/real_models.py                # all four tasks; stop and start it as you like
    python benchmarks/real_models.py mrpc cola

MiniLM (`scripts/fetch_quickstart.py`) is fine-tuned on GLUE tasks into build/glue/<task>/float; their data come from
$HF_QUANT_GLUE_DIR, from ../shared/data/glue, or from the hub. SmolLM2 comes from `scripts/fetch_smollm2.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
MINILM = REPOSITORY / "build" / "quickstart" / "model"
SMOLLM2 = REPOSITORY / "build" / "smollm2"
DATA = REPOSITORY.parent / "shared" / "data"
GLUE = Path(os.environ.get("HF_QUANT_GLUE_DIR") or DATA / "glue")
WIKITEXT = DATA / "wikitext2" / "test.parquet"
MODELS = REPOSITORY / "build" / "glue"

# SST-2 has 67,349 training rows; 400 steps of 32 see 12,800 of them.
TASKS: dict[str, dict[str, Any]] = {
    "mrpc": {"max_length": 128, "num_train_epochs": 3},
    "stsb": {"max_length": 128, "num_train_epochs": 3},
    "cola": {"max_length": 64, "num_train_epochs": 3},
    "sst2": {"max_length": 64, "max_steps": 400},
}
TRAINING: dict[str, Any] = {
    "learning_rate": 1e-4,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 50,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 1,
    "report_to": "none",
}


def make_trainer(
    task: str, output: Path, model: Path = MINILM, callbacks: Sequence[Any] = (), **overrides: Any
) -> tuple[Any, Any]:
    """A Trainer on the task, and its tokenizer; labels, columns and lengths are found as a recipe finds them.

    `overrides` are fields of TrainingArguments, `max_length`, and `rows`: how many to draw from the training data.
    """
    from transformers import DataCollatorWithPadding, Trainer, set_seed

    from hf_quant import Recipe
    from hf_quant.evaluation.metrics import trainer_metrics
    from hf_quant.recipe.prepare import prepare
    from hf_quant.recipe.sections import Data, Quantization
    from hf_quant.recipe.training import training_arguments

    settings = {**TRAINING, **TASKS[task], **overrides}
    if "num_train_epochs" in overrides:
        settings.pop("max_steps", None)
    rows = settings.pop("rows", None)
    data = Data(data_dir=str(GLUE) if GLUE.is_dir() else None, max_length=settings.pop("max_length"))
    recipe = Recipe(str(model), str(output), Quantization(), task, data, settings)
    prepared = prepare(recipe)
    args, precision = training_arguments(settings, str(output), recipe.seed, recipe.source)
    train = prepared.encoded["train"]
    train = train if rows is None else train.shuffle(seed=recipe.seed).select(range(rows))
    print(f"{task}: {len(train):,} examples, {precision}", flush=True)
    trainer = Trainer(
        model=prepared.model,
        args=args,
        train_dataset=train,
        eval_dataset=prepared.encoded["validation"],
        processing_class=prepared.tokenizer,
        data_collator=DataCollatorWithPadding(prepared.tokenizer),
        compute_metrics=trainer_metrics(prepared.task),
        callbacks=list(callbacks),
    )
    set_seed(recipe.seed)
    return trainer, prepared.tokenizer


def float_model(task: str) -> Path:
    """The folder of MiniLM fine-tuned on a task; trained first where it is not there, from the last checkpoint."""
    from transformers.trainer_utils import get_last_checkpoint

    from hf_quant.checkpoint import whole_folder

    folder = MODELS / task / "float"
    if (folder / "config.json").is_file():
        return folder
    if not MINILM.is_dir():
        raise SystemExit(f"There is no {MINILM}: run `python scripts/fetch_quickstart.py` first.")
    checkpoints = MODELS / task / "checkpoints"
    trainer, tokenizer = make_trainer(task, checkpoints)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    seconds = time.perf_counter() - start
    metrics = {name: value for name, value in trainer.evaluate().items() if isinstance(value, float)}
    (MODELS / task / "metrics.json").write_text(json.dumps({**metrics, "train_seconds": seconds}, indent=1) + "\n")
    with whole_folder(folder) as beside:
        trainer.model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    shutil.rmtree(checkpoints)
    print(task, json.dumps(metrics), f"{seconds:.0f} s", flush=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; all by default")
    parser.add_argument("--threads", type=int, default=1, help="more help only where the cores are idle")
    options = parser.parse_args()
    unknown = set(options.tasks) - set(TASKS)
    if unknown:
        parser.error(f"unknown task {', '.join(sorted(unknown))}; choose from {', '.join(TASKS)}")
    torch.set_num_threads(options.threads)
    for task in options.tasks or TASKS:
        print(f"{task}: {float_model(task)}", flush=True)


if __name__ == "__main__":
    main()
