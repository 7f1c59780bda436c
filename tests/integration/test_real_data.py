"""Fine-tuning a real model on real GLUE data, through the shipped recipes: `pytest -m real`.

Finished runs are kept in build/real and taken up again, so a second call only measures.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_quant import Recipe, compare, quantize_dynamic
from hf_quant.evaluation.report import Comparison
from hf_quant.recipe.run import run

REPOSITORY = Path(__file__).resolve().parents[2]
GLUE = REPOSITORY.parent / "shared" / "data" / "glue"
MODEL = REPOSITORY / "build" / "quickstart" / "model"

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not GLUE.is_dir(), reason="the GLUE files are not beside this checkout"),
    pytest.mark.skipif(not MODEL.is_dir(), reason="no model: run `python scripts/fetch_quickstart.py` first"),
]

# SST-2 has 67,349 training rows; 400 steps of 32 see 12,800 of them.
SHORTER: dict[str, dict[str, Any]] = {"mrpc": {}, "sst2": {"max_steps": 400, "save_steps": 200}}


@pytest.fixture(autouse=True)
def _all_cores(_one_thread_and_seed: None) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


def delta_points(comparison: Comparison) -> dict[str, float]:
    return {metric.name: 100 * metric.delta for metric in comparison.splits[0].metrics}


@pytest.mark.parametrize("task", sorted(SHORTER))
def test_qat_and_dynamic_keep_the_float_model_s_quality(task: str) -> None:
    recipe = Recipe.from_yaml(REPOSITORY / "recipes" / f"{task}-qat.yaml")
    recipe = dataclasses.replace(
        recipe,
        model=str(MODEL),
        data=dataclasses.replace(recipe.data, data_dir=str(GLUE)),
        training={**recipe.training, **SHORTER[task]},
        output=str(REPOSITORY / "build" / "real" / task),
    )
    result = run(recipe, resume=True)
    assert result.comparison is not None
    assert result.float_model is not None
    static = delta_points(result.comparison)
    dynamic_model = quantize_dynamic(str(result.float_model))
    rows = GLUE / task / "validation.parquet"
    found = compare(str(result.float_model), dynamic_model, task=task, data=str(rows))
    print(found)
    assert found.layer_sqnr, "made from the same weights"
    dynamic = delta_points(found)
    print(task, json.dumps({"int8_static by QAT": static, "int8_dynamic": dynamic}))
    assert found.splits[0].metrics[0].float_value > (0.75 if task == "mrpc" else 0.85), "the float model has learned"
    assert min(static.values()) >= -1.0
    assert min(dynamic.values()) >= -0.5


def test_the_int8_model_reloads_without_hf_quant() -> None:
    folder = REPOSITORY / "build" / "real" / "mrpc" / "int8"
    if not folder.is_dir():
        pytest.skip("no trained model: run the test above first")
    script = """
import sys
sys.modules["hf_quant"] = None
from datasets import load_dataset
from transformers import pipeline
rows = load_dataset("parquet", data_files=sys.argv[2])["train"].select(range(100))
classify = pipeline("text-classification", model=sys.argv[1])
found = classify([{"text": row["sentence1"], "text_pair": row["sentence2"]} for row in rows])
right = [(guess["label"] == "equivalent") == row["label"] for guess, row in zip(found, rows)]
assert sum(right) > 75, sum(right)
"""
    rows = str(GLUE / "mrpc" / "validation.parquet")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script, str(folder), rows], check=True, env=environment)
