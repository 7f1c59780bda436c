"""The command as processes of their own: killed at random moments, signalled, and two of them at once."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from hf_quant.recipe.checkpoints import is_whole
from tests.integration.test_recipe_signals import PRUNING, REPOSITORY, TRAINING, models, weights
from tests.reviews import write_files, write_recipe

pytestmark = pytest.mark.slow


def command(path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "hf_quant.cli", "run", str(path), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], float]:
    """The same for two trainings, as a process of its own, and its seconds."""
    folder = write_files(tmp_path_factory.mktemp("twins"))
    training = {**TRAINING, "max_steps": 60, "save_steps": 2}
    recipe = write_recipe(folder, training=training, pruning=PRUNING, evaluation={"baseline": "train"})
    begun = time.monotonic()
    done = subprocess.run(command(recipe), capture_output=True, env=environment(), timeout=250, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return folder, models(folder / "out"), time.monotonic() - begun


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(
    twins: tuple[Path, dict[str, bytes], float], seed: int
) -> None:
    folder, wanted, seconds = twins
    out, draw = folder / f"killed-{seed}", random.Random(seed)
    arguments = ["--output", str(out), "--resume"]
    for _ in range(3):
        process = subprocess.Popen(
            command(folder / "recipe.yaml", *arguments), env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        # Half of the moments in the midst of the checkpoints, of which there is one every other step.
        wait_for = out / "checkpoints" if draw.random() < 0.5 else None
        limit = time.monotonic() + seconds
        while wait_for and not wait_for.is_dir() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 4 if wait_for else seconds))
        process.kill()
        process.wait()
    done = subprocess.run(
        command(folder / "recipe.yaml", *arguments), capture_output=True, env=environment(), timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert weights(models(out)) == weights(wanted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_with_the_code_of_the_signal(
    twins: tuple[Path, dict[str, bytes], float], number: signal.Signals, code: int
) -> None:
    folder, wanted, _ = twins
    out = folder / f"signalled-{code}"
    process = subprocess.Popen(
        command(folder / "recipe.yaml", "--output", str(out)), env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("int8 step 5/"):
            process.send_signal(number)
            break
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors[-3000:]
    assert "Traceback" not in errors
    assert re.search(rf"stopped by {number.name} after step \d+, with a checkpoint; go on with: hf-quant run", printed)
    again = subprocess.run(
        command(out / "recipe.yaml", "--resume"), capture_output=True, env=environment(), timeout=250, check=False
    )
    assert again.returncode == 0, again.stderr.decode()[-3000:]
    assert weights(models(out)) == weights(wanted)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
                 "--rdzv-endpoint", "localhost:0"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_and_the_first_one_writes_and_prints(tmp_path: Path, launcher: str) -> None:
    training = {**TRAINING, "ddp_backend": "gloo"}
    recipe = write_recipe(write_files(tmp_path), training=training, pruning=None, evaluation={"baseline": "train"})
    launched = [sys.executable, "-m", *LAUNCHERS[launcher], *command(recipe)[1:]]
    done = subprocess.run(
        launched, capture_output=True, text=True, env=environment(), timeout=280, check=False, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for line in ("training int8 on 32 examples", "saved the int8 model", "report:", "Converted to int8_static"):
        assert done.stdout.count(line) == 1, line
    assert len(re.findall(r"^int8 step 8/8  loss", done.stdout, re.MULTILINE)) == 1
    checkpoint = tmp_path / "out" / "checkpoints" / "int8" / "checkpoint-8"
    assert is_whole(checkpoint, processes=2)
    assert not is_whole(checkpoint), "it was trained by two"
    assert models(tmp_path / "out")


def test_two_processes_quantize_after_training(tmp_path: Path) -> None:
    # Ranges are united over processes, so both have to be there.
    after = {"method": "post_training", "start_step": None, "freeze_step": None}
    training = {**TRAINING, "ddp_backend": "gloo"}
    recipe = write_recipe(write_files(tmp_path), training=training, pruning=None, quantization=after)
    launched = [sys.executable, "-m", *LAUNCHERS["torchrun"], *command(recipe)[1:]]
    done = subprocess.run(
        launched, capture_output=True, text=True, env=environment(), timeout=280, check=False, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for line in ("training float on 32 examples", "quantized to int8_static after", "saved the int8 model"):
        assert done.stdout.count(line) == 1, line
    assert len(re.findall(r"^int8  eval_loss", done.stdout, re.MULTILINE)) == 1
    assert {name.partition("/")[0] for name in weights(models(tmp_path / "out"))} == {"float", "int8"}


STOPPER = textwrap.dedent(
    """
    import os, signal, sys
    from transformers import Trainer

    real, done = Trainer.training_step, [0]

    def step(self, *args, **kwargs):
        done[0] += 1
        if done[0] == 4 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    if "--resume" not in sys.argv:
        Trainer.training_step = step
    from hf_quant.cli import main
    main()
    """
)


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    training = {**TRAINING, "ddp_backend": "gloo"}
    recipe = write_recipe(write_files(tmp_path), training=training)
    (tmp_path / "stopper.py").write_text(STOPPER)
    launched = [sys.executable, "-m", *LAUNCHERS["torchrun"], str(tmp_path / "stopper.py"), "run", str(recipe)]

    def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launched, *arguments], capture_output=True, text=True, env=environment(), timeout=280, check=False
        )

    first = launch()
    assert first.returncode != 0
    assert "stopped by SIGTERM after step 4, with a checkpoint" in first.stdout
    assert is_whole(tmp_path / "out" / "checkpoints" / "int8" / "checkpoint-4", processes=2)
    second = launch("--resume")
    assert second.returncode == 0, second.stderr[-3000:]
    resumed = weights(models(tmp_path / "out"))
    undisturbed = launch("--resume", "--output", str(tmp_path / "other"))
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    assert weights(models(tmp_path / "other"))["int8/model.safetensors"] == resumed["int8/model.safetensors"]
