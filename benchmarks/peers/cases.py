"""The batches that every peer gets: arrays on disk, made once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENIZER = REPOSITORY / "build" / "quickstart" / "model"
GLUE = Path(os.environ.get("HF_QUANT_GLUE_DIR") or REPOSITORY.parent / "shared" / "data" / "glue")
COLUMNS = {"mrpc": ["sentence1", "sentence2"], "sst2": ["sentence"]}
LENGTH = 128
BATCH = 32

Batch = dict[str, np.ndarray]  # int64 input_ids, attention_mask, token_type_ids of (sentences, length)


def make_cases(folder: Path, batches: int) -> None:
    """Write each case, and the calibration data, as `<case>.npz` into a folder.

    Args:
        folder (`Path`): where to.
        batches (`int`): batches of the cases of real texts; those of full length are one batch.
    """
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for size in (1, 8, 32):
        save(folder / f"batch{size}.npz", [_random(draw, size)])
    calibration = []
    for task in COLUMNS:
        path = GLUE / task / "validation.parquet"
        if not path.is_file() or not TOKENIZER.is_dir():
            missing = path if TOKENIZER.is_dir() else TOKENIZER
            print(f"no real lengths of {task}: there is no {missing} (see $HF_QUANT_GLUE_DIR)", flush=True)
            continue
        save(folder / f"{task}.npz", _texts(path, task, BATCH, batches))
        calibration += _texts(path.with_name("train.parquet"), task, 8, 8)
    save(folder / "calibration.npz", calibration or [_random(draw, 8) for _ in range(16)])


def save(path: Path, batches: list[Batch]) -> None:
    np.savez(
        path, **{f"{number}.{name}": array for number, each in enumerate(batches) for name, array in each.items()}
    )


def read(path: Path) -> list[Batch]:
    """The batches of a case, in order."""
    with np.load(path, allow_pickle=False) as stored:
        batches: list[Batch] = [{} for _ in {key.split(".")[0] for key in stored.files}]
        for key in stored.files:
            number, name = key.split(".")
            batches[int(number)][name] = stored[key]
    return batches


def _random(draw: np.random.Generator, size: int) -> Batch:
    ids = draw.integers(1000, 30000, (size, LENGTH))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _texts(path: Path, task: str, size: int, batches: int) -> list[Batch]:
    """The first texts of a file in its order, each batch padded to its longest."""
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rows = pq.read_table(path).slice(0, size * batches).to_pydict()
    columns: list[Any] = [rows[name] for name in COLUMNS[task]]
    return [
        dict(
            tokenizer(
                *(column[start : start + size] for column in columns),
                padding=True,
                truncation=True,
                max_length=LENGTH,
                return_tensors="np",
                return_token_type_ids=True,
            )
        )
        for start in range(0, len(columns[0]), size)
    ]
