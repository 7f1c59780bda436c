"""Two processes, each with its own half of the batches: one range for both, and one int8 model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_quant import load_quantized
from hf_quant.runtime.base import quantized_modules
from tests.tiny import logits

CODE = textwrap.dedent(
    """
    import json, os, sys
    from pathlib import Path
    import tests.conftest, torch
    from safetensors.torch import save_file
    from tests.tiny import Sentences, logits, make_trainer
    from transformers import TrainerCallback
    from hf_quant import QATCallback

    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

    class Watch(TrainerCallback):
        def __init__(self):
            self.ranges = []

        def on_step_end(self, args, state, control, model, **kwargs):
            observer = model.bert.pooler.dense.activation_fake_quant.observer
            self.ranges.append([float(observer.min_val), float(observer.max_val), float(observer.num_batches)])

    watch = Watch()
    changes = {"ddp_backend": "gloo", "eval_strategy": "steps", "eval_steps": 4, "ddp_find_unused_parameters": False}
    qat = QATCallback(start_step=1, freeze_step=6)
    # The watch comes last, so it sees what the callback left.
    trainer = make_trainer(folder, callbacks=[qat, watch], changes=changes)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "int8"))
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    save_file(state, folder / f"state-{rank}.safetensors")
    save_file({"logits": logits(trainer.model)}, folder / f"logits-{rank}.safetensors")
    result = {"ranges": watch.ranges, "loss": metrics["eval_loss"], "layers": len(qat.conversion.quantized)}
    result["distributed"] = str(trainer.args.parallel_mode)
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    """
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "train.py").write_text(CODE)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(folder / "train.py"), str(folder),
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=root, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"result-{rank}.json").read_text()) for rank in (0, 1)], done.stdout


pytestmark = pytest.mark.slow


def test_ranges_are_the_same_in_both_processes(run: tuple[Path, list[dict[str, Any]], str]) -> None:
    first, second = run[1]
    assert "DISTRIBUTED" in first["distributed"]
    assert first["ranges"] == second["ranges"]
    moving = first["ranges"][1:6]
    assert len({tuple(entry) for entry in moving}) == 5
    assert first["ranges"][5] == first["ranges"][6] == first["ranges"][7]
    assert first["ranges"][0] == [0.0, 0.0, 0.0]


def test_both_end_in_the_same_int8_model(run: tuple[Path, list[dict[str, Any]], str]) -> None:
    folder, (first, second), _ = run
    assert first["layers"] == second["layers"] == 16
    assert (folder / "state-0.safetensors").read_bytes() == (folder / "state-1.safetensors").read_bytes()
    assert (folder / "logits-0.safetensors").read_bytes() == (folder / "logits-1.safetensors").read_bytes()
    assert first["loss"] == second["loss"]


def test_it_is_saved_and_reported_once(run: tuple[Path, list[dict[str, Any]], str]) -> None:
    folder, _, out = run
    assert out.count("Converted to int8_static") == 1
    model = load_quantized(folder / "int8")
    assert len(quantized_modules(model)) == 16
    assert torch.isfinite(logits(model)).all()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
