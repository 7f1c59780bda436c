"""PruningCallback in real Trainers: masks hold, goals are met, on disk and in every mode of training."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_quant import PruningCallback, QATCallback
from hf_quant.pruning.structures import get_structure
from hf_quant.runtime.base import quantized_modules
from tests.tiny import make_trainer, tiny_bert, tiny_gpt2, tiny_llama, weights_bytes

CRITERIA = ("magnitude", "l2", "random", "movement", "soft_movement", "first_order", "fisher", "block_fisher_8")


def _is_target(name: str, tensor: torch.Tensor) -> bool:
    return ".layer." in name and name.endswith("weight") and tensor.ndim == 2


def zeros(folder: Path, layers: int = 2) -> float:
    """Share of zeros of the layers' Linear weights in a folder's safetensors."""
    tensors = load_file(folder / "model.safetensors")
    weights = [tensor for name, tensor in tensors.items() if _is_target(name, tensor)]
    assert len(weights) == 6 * layers
    return sum(int((t == 0).sum()) for t in weights) / sum(t.numel() for t in weights)


def pruned(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The layers' Linear weights by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if _is_target(name, parameter)}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("schedule", ["cubic", "linear", "one_shot", [(2, 0.3), (4, 0.8)]])
def test_the_goal_is_met_on_disk_at_every_checkpoint(tmp_path, criterion, schedule):
    final = 0.8 if isinstance(schedule, str) else None
    callback = PruningCallback(final, start_step=2, end_step=6, frequency=1, schedule=schedule, criterion=criterion)
    changes = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer = make_trainer(tmp_path, callbacks=[callback], changes=changes)
    trainer.train()
    on_disk = {int(f.name.split("-")[1]): zeros(f) for f in (tmp_path / "run").glob("checkpoint-*")}
    assert on_disk[1] < 0.01
    history = {step: goal for step, goal, _ in callback.history}
    for step, goal in history.items():
        assert on_disk[step] == pytest.approx(goal, abs=1e-3), step
    assert max(history) == (2 if schedule == "one_shot" else 4 if final is None else 6)
    assert on_disk[8] == pytest.approx(0.8, abs=1e-3)
    assert not [name for name in trainer.model.state_dict() if "pruning" in name]


@pytest.mark.parametrize("structure", ["2:4", "1:4", "4:8", "4x1", "1x4", "row", "column"])
def test_structures_in_training(tmp_path, structure):
    wanted = get_structure(structure)
    callback = PruningCallback(wanted.sparsity or 0.5, structure=structure, start_step=1, end_step=5, frequency=2)
    trainer = make_trainer(tmp_path, callbacks=[callback])
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert zeros(tmp_path / "out") == pytest.approx(wanted.sparsity or 0.5, abs=0.01)
    for weight in pruned(trainer.model).values():
        if wanted.kind == "n_m":
            assert bool(((weight == 0).view(-1, wanted.of).sum(1) == wanted.of - wanted.keep).all())


def test_momentum_and_weight_decay_cannot_revive_a_weight(tmp_path):
    """Masks of the first update hold bit for bit until the end, with an optimizer in full swing."""
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({name: weight == 0 for name, weight in pruned(model).items()})

    callback = PruningCallback(0.5, schedule="one_shot", start_step=3)
    changes = {"learning_rate": 0.1, "weight_decay": 0.3, "max_steps": 10, "adam_beta1": 0.99}
    make_trainer(tmp_path, callbacks=[callback, Watch()], changes=changes).train()
    for later in seen[3:]:
        assert all(bool((later[name] == seen[2][name]).all()) for name in later)
    assert not any(bool(zero.any()) for zero in seen[1].values())


class _Die(Exception):
    pass


class _Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise _Die


def _to_resume(folder: Path, criterion: str, *more: TrainerCallback, **changes: Any):
    callback = PruningCallback(0.75, start_step=3, end_step=7, frequency=2, criterion=criterion)
    return make_trainer(folder, tiny_bert(), [callback, *more], changes={"max_steps": 10, **changes}), callback


@pytest.fixture(scope="module", params=["magnitude", "random", "movement", "first_order", "block_fisher_8"])
def undisturbed(request, tmp_path_factory):
    """A criterion, the bytes that a run with it ends in, and its history."""
    folder = tmp_path_factory.mktemp("whole")
    whole, callback = _to_resume(folder, request.param)
    whole.train()
    whole.save_model(str(folder / "out"))
    return request.param, weights_bytes(folder / "out"), callback.history


@pytest.mark.parametrize("stop", [2, 4, 5, 8])
def test_a_resumed_run_ends_in_the_same_bytes(tmp_path, undisturbed, stop):
    criterion, expected, history = undisturbed
    saving = {"save_strategy": "steps", "save_steps": stop}
    killed, _ = _to_resume(tmp_path, criterion, _Kill(stop + 1), **saving)
    with pytest.raises(_Die):
        killed.train()
    again, callback = _to_resume(tmp_path, criterion)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
    again.save_model(str(tmp_path / "out"))
    assert weights_bytes(tmp_path / "out") == expected
    assert [tuple(point) for point in callback.history] == history


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"max_grad_norm": 0.0},
        {"optim": "sgd"},
        {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 4},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_modes_of_training(tmp_path, changes):
    callback = PruningCallback(0.6, start_step=1, end_step=3, frequency=1, criterion="movement")
    layers = 1 if "torch_compile" in changes else 2  # it takes seconds for each
    trainer = make_trainer(tmp_path, tiny_bert(num_hidden_layers=layers), [callback], changes=changes)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert zeros(tmp_path / "out", layers) == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
def test_language_models_keep_embedding_and_head(tmp_path, model):
    callback = PruningCallback(0.5, start_step=1, end_step=4)
    trainer = make_trainer(tmp_path, model(), [callback], causal=True)
    trainer.train()
    head = trainer.model.get_output_embeddings().weight
    assert head is trainer.model.get_input_embeddings().weight
    assert not bool((head == 0).all(1).any())
    assert sum(callback.sparsities.values()) / len(callback.sparsities) == pytest.approx(0.5, abs=0.2)


def test_own_goals_by_pattern(tmp_path):
    callback = PruningCallback({"*.query": 0.75, "*.output.dense": 0.25}, start_step=1, end_step=4)
    trainer = make_trainer(tmp_path, callbacks=[callback])
    trainer.train()
    share = {name: float((weight == 0).float().mean()) for name, weight in pruned(trainer.model).items()}
    queries = [x for name, x in share.items() if ".query." in name]
    assert sum(queries) / len(queries) == pytest.approx(0.75, abs=1e-3)
    assert all(x == 0 for name, x in share.items() if ".query." not in name and ".output." not in name)
    assert set(callback.sparsities) == {name.removesuffix(".weight") for name, x in share.items() if x > 0}


def test_sparse_transfer_keeps_exactly_the_zeros(tmp_path):
    first = make_trainer(tmp_path / "a", callbacks=[PruningCallback(0.7, start_step=1, end_step=4)])
    first.train()
    first.save_model(str(tmp_path / "sparse"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
    before = {name: weight == 0 for name, weight in pruned(model).items()}
    callback = PruningCallback(schedule="constant")
    trainer = make_trainer(tmp_path / "b", model, [callback], changes={"learning_rate": 0.01})
    trainer.train()
    for name, weight in pruned(trainer.model).items():
        assert torch.equal(weight == 0, before[name])
    with pytest.raises(ValueError, match="there are none in"):
        make_trainer(tmp_path / "c", callbacks=[PruningCallback(schedule="constant")]).train()


def test_the_best_checkpoint_is_a_sparse_one(tmp_path, capsys):
    """The dense model is by far the best; it must not come back."""

    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_score"] = 1.0 / state.global_step

    changes = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    }
    callback = PruningCallback(0.5, start_step=1, end_step=5, frequency=1)
    trainer = make_trainer(tmp_path, callbacks=[callback, Worse()], changes=changes)
    trainer.train()
    assert trainer.state.best_global_step == 5
    assert "is less sparse and no longer counts as the best" in capsys.readouterr().out
    trainer.save_model(str(tmp_path / "out"))
    assert zeros(tmp_path / "out") == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
@pytest.mark.parametrize("structure", ["unstructured", "2:4", "row"])
@pytest.mark.parametrize("pruning_first", [True, False])
def test_prune_then_qat_then_int8(tmp_path, scheme, structure, pruning_first):
    pruning = PruningCallback(0.5, structure=structure, start_step=1, end_step=4)
    callbacks = [pruning, QATCallback(scheme, start_step=4)]
    trainer = make_trainer(tmp_path, callbacks=callbacks if pruning_first else callbacks[::-1])
    trainer.train()
    int8 = {name: m for name, m in quantized_modules(trainer.model).items() if ".layer." in name}
    assert len(int8) == 12
    zero = sum(int((m.int8_weight == 0).sum()) for m in int8.values())
    total = sum(m.int8_weight.numel() for m in int8.values())
    # Rounding adds zeros, never takes one.
    assert zero / total >= 0.5 - 1e-3
    if structure == "2:4":
        assert all(bool(((m.int8_weight == 0).view(-1, 4).sum(1) >= 2).all()) for m in int8.values())
    trainer.save_model(str(tmp_path / "out"))
    assert zeros(tmp_path / "out") == zero / total


def test_logs_show_goal_and_sparsity(tmp_path):
    callback = PruningCallback(0.5, start_step=2, end_step=6, frequency=1, log_modules=True)
    trainer = make_trainer(tmp_path, callbacks=[callback], changes={"logging_steps": 1})
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["sparsity_goal"] for entry in logs[:2]] == [0, 0]
    assert logs[-1]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert len([key for key in logs[-1] if key.startswith("sparsity/bert.encoder")]) == 12
    for entry in logs:
        assert entry["sparsity"] == pytest.approx(entry["sparsity_goal"], abs=1e-3)


def test_the_record_is_json_beside_the_checkpoint(tmp_path):
    callback = PruningCallback(0.5, start_step=2, end_step=6, frequency=2)
    changes = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, callbacks=[callback], changes=changes).train()
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    (record,) = state["stateful_callbacks"]["hf_quant.pruning"].values()
    assert [step for step, *_ in record["history"]] == [2, 4]
    assert (record["start_step"], record["end_step"]) == (2, 6)


@pytest.mark.parametrize(("criterion", "returns"), [("movement", True), ("magnitude", False), ("fisher", False)])
def test_only_movement_lets_weights_return(tmp_path, criterion, returns):
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({name: weight == 0 for name, weight in pruned(model).items()})

    callback = PruningCallback(0.5, start_step=1, end_step=7, frequency=1, criterion=criterion)
    trainer = make_trainer(tmp_path, callbacks=[callback, Watch()], changes={"learning_rate": 0.02})
    trainer.train()
    back = [int((before[name] & ~after[name]).sum()) for before, after in itertools.pairwise(seen) for name in before]
    assert (sum(back) > 0) is returns
    assert all(torch.equal(seen[6][name], seen[7][name]) for name in seen[6])


def test_what_stands_alone_stays_dense(tmp_path):
    """A pooler's weights are small: among all of the model's lowest, nearly all of them would be pruned."""
    trainer = make_trainer(tmp_path, callbacks=[PruningCallback(0.9, start_step=1, end_step=4)])
    trainer.train()
    assert not bool((trainer.model.bert.pooler.dense.weight == 0).any())
    assert not bool((trainer.model.classifier.weight == 0).any())
    named = PruningCallback(0.5, start_step=1, end_step=4, targets=["*.pooler.dense"])
    trainer = make_trainer(tmp_path, callbacks=[named])
    trainer.train()
    assert float((trainer.model.bert.pooler.dense.weight == 0).float().mean()) == 0.5


def test_two_callbacks_share_a_model(tmp_path):
    one = PruningCallback(0.5, targets=["*.attention.*"], start_step=1, end_step=4)
    two = PruningCallback(0.75, structure="4x1", ignore=["*.attention.*"], start_step=2, end_step=5)
    trainer = make_trainer(tmp_path, callbacks=[one, two])
    trainer.train()
    for name, weight in pruned(trainer.model).items():
        assert bool((weight == 0).any()), name
    log = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert log["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert log["4x1_sparsity"] == pytest.approx(0.75, abs=1e-2)


def test_attach_and_model_init(tmp_path):
    trainer = make_trainer(tmp_path, model_init=lambda: tiny_bert())
    callback = PruningCallback(0.5, start_step=1, end_step=4, criterion="fisher").attach(trainer)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert zeros(tmp_path / "out") == pytest.approx(0.5, abs=1e-3)
    assert callback.sparsities


def test_a_mid_training_checkpoint_loads_plainly(tmp_path):
    callback = PruningCallback(0.5, start_step=1, end_step=7, frequency=1, criterion="movement")
    changes = {"save_strategy": "steps", "save_steps": 5}
    make_trainer(tmp_path, callbacks=[callback], changes=changes).train()
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "checkpoint-5", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert all(name.rpartition(".")[2].startswith("pruning_") for name in info["unexpected_keys"])
    assert sum(int((w == 0).sum()) for w in pruned(model).values()) > 0


def test_reporters_see_sparsity_after_attach(tmp_path):
    """A reporter such as TensorBoard's reads the logs in on_log, before callbacks that were passed to the Trainer."""

    class Reporter(TrainerCallback):
        seen: list[dict[str, float]] = []  # noqa: RUF012

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    trainer = make_trainer(tmp_path, callbacks=[Reporter()])
    PruningCallback(0.5, start_step=1, end_step=4, log_modules=True).attach(trainer)
    trainer.train()
    assert Reporter.seen[0]["sparsity"] > 0
    assert "sparsity/bert.encoder.layer.0.attention.self.query" in Reporter.seen[0]


def test_the_plot_shows_each_update(tmp_path):
    callback = PruningCallback(0.5, start_step=2, end_step=6, frequency=1)
    make_trainer(tmp_path, callbacks=[callback]).train()
    callback.save_plot(tmp_path / "pruning.html")
    page = (tmp_path / "pruning.html").read_text(encoding="utf-8")
    assert page.count("<circle") == len(callback.history) == 5


def test_rows_of_a_tied_embedding(tmp_path):
    callback = PruningCallback(0.5, structure="row", targets=["*.embed_tokens"], start_step=1, end_step=4)
    trainer = make_trainer(tmp_path, tiny_llama(), [callback], causal=True)
    trainer.train()
    weight = trainer.model.get_output_embeddings().weight
    assert int((weight == 0).all(1).sum()) == len(weight) // 2
