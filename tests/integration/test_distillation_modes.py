"""Distillation in all modes of training: resumed, cached, compiled, in bfloat16, with adapters, in two processes."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_quant import DistillationCallback, QATCallback
from tests.distilled import losses, saved, train
from tests.tiny import Sentences, make_trainer, tiny_bert, tiny_llama, weights_bytes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("cached", [False, True])
def test_a_resumed_run_ends_in_the_same_bytes(tmp_path: Path, cached: bool) -> None:
    def run(folder: str, resume: Any = None) -> Trainer:
        cache = tmp_path / folder / "cache" if cached else None
        callbacks = [DistillationCallback(cache=cache, end_step=7), QATCallback(start_step=2)]
        changes = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "max_steps": 10}
        return train(tmp_path / folder, *callbacks, changes=changes, resume=resume)

    whole = run("whole")
    for step in (3, 6, 9):
        resumed = run("whole" if cached else "again", resume=str(tmp_path / f"whole/run/checkpoint-{step}"))
        assert saved(resumed, tmp_path / f"out-{step}") == saved(whole, tmp_path / "out"), step
        ours, theirs = ([e.get("distillation_loss") for e in losses(t)] for t in (resumed, whole))
        assert ours == theirs


def test_a_model_init_resumes_when_attached(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 4}
    found = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-4")):
        trainer = make_trainer(tmp_path, model_init=lambda: tiny_bert(), changes=changes)
        DistillationCallback().attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        found.append(saved(trainer, tmp_path / "out"))
    assert found[0] == found[1]
    trainer = make_trainer(tmp_path, model_init=lambda: tiny_bert(), callbacks=[DistillationCallback()])
    with pytest.raises(ValueError, match=r"resumes at step 4 with other weights of the teacher .*call .attach"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_another_teacher_is_refused_when_resuming(tmp_path: Path) -> None:
    train(tmp_path, DistillationCallback(tiny_bert(1)), changes={"save_strategy": "steps", "save_steps": 4})
    with pytest.raises(ValueError, match=r"resumes at step 4 with other weights .*Pass the same teacher"):
        train(tmp_path, DistillationCallback(tiny_bert(2)), resume=str(tmp_path / "run" / "checkpoint-4"))


def test_a_cache_is_used_across_epochs_and_runs_and_changes_nothing(tmp_path: Path) -> None:
    teacher = tiny_bert(1)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    changes = {"max_steps": 16}  # two epochs of eight batches
    plain = saved(train(tmp_path, DistillationCallback(teacher), changes={"max_steps": 8}), tmp_path / "plain")
    calls.clear()
    callback = DistillationCallback(teacher, cache=tmp_path / "cache")
    one = saved(train(tmp_path, callback, changes={"max_steps": 8}), tmp_path / "one")
    assert one == plain
    assert len(calls) == 8
    train(tmp_path, DistillationCallback(teacher, cache=tmp_path / "cache"), changes=changes)
    assert len(calls) == 8
    with pytest.raises(ValueError, match=r"outputs of another teacher: its weights is \w+, now"):
        train(tmp_path, DistillationCallback(tiny_bert(2), cache=tmp_path / "cache"))


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["bf16", "compile", "checkpointing", "reentrant"],
)
def test_modes_of_training_compute_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    found = []
    for mode in ({}, changes):
        callback = DistillationCallback(tiny_bert(1, **still), hidden_states=True)
        trainer = train(
            tmp_path, callback, model=tiny_bert(**still), changes={**mode, "max_steps": 4, "logging_steps": 1}
        )
        found.append([[e["distillation_loss"], e["task_loss"], e["grad_norm"]] for e in losses(trainer)])
    torch.testing.assert_close(*map(torch.tensor, found), rtol=0.03 if "bf16" in changes else 1e-3, atol=1e-3)


def test_a_model_that_returns_tuples(tmp_path: Path) -> None:
    found = []
    for named in (True, False):
        model = tiny_bert()
        model.config.return_dict = named
        callback = DistillationCallback(tiny_bert(1), hidden_states=True)
        found.append([e["loss"] for e in losses(train(tmp_path, callback, model=model))])
    assert found[0] == found[1]


def test_adapters_learn_from_a_teacher(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options))
    callback = DistillationCallback(tiny_llama(), hardness=1.0, hidden_states=True)
    changes = {"max_steps": 24, "learning_rate": 1e-2}
    entries = losses(train(tmp_path, callback, model=model, causal=True, changes=changes))
    assert entries[-1]["distillation_loss"] < 0.7 * entries[0]["distillation_loss"]


def test_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    changes = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
    }
    trainer = train(tmp_path, DistillationCallback(), changes=changes)
    best = trainer.state.best_model_checkpoint
    assert saved(trainer, tmp_path / "out") == weights_bytes(best)


def test_neither_a_copy_nor_an_interrupted_run_goes_on_teaching(tmp_path: Path) -> None:
    copies: list[Any] = []

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            copies.append(copy.deepcopy(model))
            raise KeyboardInterrupt

    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    trainer = make_trainer(tmp_path, model, [DistillationCallback(tiny_bert(1)), Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    batch = {**Sentences(4).batch(4), "labels": torch.zeros(4, dtype=torch.long)}
    plain = copies[0].train()(**batch).loss
    assert not torch.equal(model.train()(**batch).loss, plain)  # the run may still be resumed
    del trainer
    gc.collect()
    assert torch.equal(model.train()(**batch).loss, plain)


DDP = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    import tests.conftest, torch
    from safetensors.torch import save_file
    from tests.tiny import make_trainer, tiny_bert, tiny_llama
    from hf_quant import DistillationCallback, QATCallback

    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for maker in (tiny_bert, tiny_llama):
        name = maker.__name__
        callback = DistillationCallback(maker(1), cache=folder / f"cache-{name}")
        trainer = make_trainer(
            folder / name,
            maker(),
            [callback, QATCallback(start_step=4)],
            causal=maker is tiny_llama,
            changes={"ddp_backend": "gloo", "logging_steps": 1, "max_steps": 10},
        )
        trainer.train()
        assert "DISTRIBUTED" in str(trainer.args.parallel_mode)
        for entry in trainer.state.log_history:
            if "distillation_loss" in entry:
                wanted = (entry["distillation_loss"] + entry["task_loss"]) / 2
                assert abs(entry["loss"] - wanted) < 1e-3 * max(1, wanted), entry
        assert "distillation_loss" in trainer.state.log_history[0]
        state = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        save_file(state, folder / f"{name}-{rank}.safetensors")
    """
)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(DDP)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(tmp_path / "train.py"), str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("tiny_bert", "tiny_llama"):
        first, second = ((tmp_path / f"{name}-{rank}.safetensors").read_bytes() for rank in (0, 1))
        assert first == second
        assert list((tmp_path / f"cache-{name}").glob("*.safetensors"))
