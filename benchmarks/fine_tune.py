"""The float models of the post-training tables: MiniLM fine-tuned on GLUE tasks, once, into build/glue/<task>/float.

    python scripts/fetch_quickstart.py
    python benchmarks/fine_tune.py [--tasks mrpc stsb cola sst2]

all-MiniLM-L6-v2 is a sentence encoder, not the MiniLM of GLUE leader boards: compare its figures with each other only.
A task whose folder is there is not trained again; an interrupted training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from common import machine
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_quant.evaluation.metrics import compute_metrics, predictions_from_logits
from hf_quant.evaluation.tasks import GLUE_TASKS

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY.parent / "shared" / "data" / "glue"
MODEL = REPOSITORY / "build" / "quickstart" / "model"
MODELS = REPOSITORY / "build" / "glue"

# Epochs, training rows (None: all), tokens. SST-2 has 67,349 rows, too many for two cores.
PLANS = {"mrpc": (4, None, 96), "stsb": (3, None, 64), "cola": (4, None, 32), "sst2": (1, 20_000, 48)}


def fine_tune(task_name: str) -> Path:
    folder = MODELS / task_name / "float"
    if (folder / "config.json").is_file():
        print(f"{task_name}: {folder} is there")
        return folder
    task, (epochs, rows, length) = GLUE_TASKS[task_name], PLANS[task_name]
    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=task.num_labels)
    parts = {}
    for split in ("train", "validation"):
        data = Dataset.from_parquet(str(DATA / task_name / f"{split}.parquet"))
        if split == "train" and rows is not None:
            data = data.shuffle(seed=42).select(range(rows))
        encoded = tokenizer(*(data[c][:] for c in task.text_columns), truncation=True, max_length=length)
        parts[split] = Dataset.from_dict({**encoded, "labels": data[task.label_column][:]})
    checkpoints = MODELS / task_name / "checkpoints"
    arguments = TrainingArguments(
        str(checkpoints), num_train_epochs=epochs, per_device_train_batch_size=32, per_device_eval_batch_size=64,
        learning_rate=5e-5, warmup_steps=0.1, weight_decay=0.01, train_sampling_strategy="group_by_length", bf16=True,
        use_cpu=True, report_to="none", logging_steps=50, eval_strategy="epoch", save_steps=100, save_total_limit=1,
        dataloader_pin_memory=False, seed=42, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        train_dataset=parts["train"],
        eval_dataset=parts["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda p: compute_metrics(task, predictions_from_logits(task, p.predictions), p.label_ids),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    metrics = trainer.evaluate()
    model.float().save_pretrained(MODELS / task_name / "unfinished")
    tokenizer.save_pretrained(MODELS / task_name / "unfinished")
    (MODELS / task_name / "unfinished" / "trained.json").write_text(json.dumps({**metrics, **machine()}, indent=2))
    (MODELS / task_name / "unfinished").rename(folder)
    shutil.rmtree(checkpoints)
    print(task_name, metrics)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=sorted(PLANS), default=list(PLANS))
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in options.tasks:
        fine_tune(name)
