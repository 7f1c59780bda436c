"""Two processes, each with its own half of the batches: the same masks in both, and true zeros on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import load_file

CODE = textwrap.dedent(
    """
    import json, os, sys
    from pathlib import Path
    import tests.conftest, torch
    from safetensors.torch import save_file
    from tests.tiny import make_trainer
    from hf_quant import PruningCallback, QATCallback

    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for criterion in ("magnitude", "random", "movement", "fisher"):
        pruning = PruningCallback(0.75, start_step=2, end_step=6, frequency=1, criterion=criterion)
        trainer = make_trainer(
            folder / criterion,
            callbacks=[pruning, QATCallback(start_step=6)],
            changes={"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 7},
        )
        trainer.train()
        assert "DISTRIBUTED" in str(trainer.args.parallel_mode)
        state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        save_file(state, folder / f"{criterion}-{rank}.safetensors")
        (folder / f"{criterion}-{rank}.json").write_text(json.dumps(pruning.history))
    """
)

pytestmark = pytest.mark.slow


def test_masks_are_the_same_in_both_processes(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(CODE)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(tmp_path / "train.py"), str(tmp_path),
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=root, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for criterion in ("magnitude", "random", "movement", "fisher"):
        first, second = ((tmp_path / f"{criterion}-{rank}.safetensors").read_bytes() for rank in (0, 1))
        assert first == second, criterion
        history, other = (json.loads((tmp_path / f"{criterion}-{rank}.json").read_text()) for rank in (0, 1))
        assert history == other
        checkpoint = load_file(tmp_path / criterion / "run" / "checkpoint-7" / "model.safetensors")
        pruned = [
            t for name, t in checkpoint.items() if t.ndim == 2 and ".layer." in name and name.endswith(".weight")
        ]
        share = sum(int((t == 0).sum()) for t in pruned) / sum(t.numel() for t in pruned)
        assert share == pytest.approx(0.75, abs=1e-3)
