"""What PruningCallback refuses, in words, before anything is trained or written."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from hf_quant import PruningCallback, QATCallback, quantize_dynamic
from tests.tiny import make_trainer, tiny_bert, tiny_llama


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "`final_sparsity` is missing"),
        ({"final_sparsity": 1.0}, "must lie between 0 and 1"),
        ({"final_sparsity": 80}, "is 80, but must lie between 0 and 1"),
        ({"final_sparsity": {"*.query": 0.0}}, r"for '\*.query' is 0.0"),
        ({"final_sparsity": {}}, "names no module"),
        ({"final_sparsity": 0.5, "initial_sparsity": 0.6}, r"`initial_sparsity` \(0.6\) must lie between 0 and"),
        (
            {"final_sparsity": 0.5, "start_step": 0.6, "end_step": 0.3},
            r"`end_step` \(0.3\) must come after `start_step`",
        ),
        ({"final_sparsity": 0.5, "start_step": 5, "end_step": 5}, "no pruning phase is left"),
        ({"final_sparsity": 0.5, "end_step": 1.5}, "`end_step`=1.5 is a float"),
        ({"final_sparsity": 0.5, "frequency": 0}, "`frequency` is 0"),
        ({"final_sparsity": 0.5, "schedule": "cubick"}, "did you mean .*cubic"),
        ({"final_sparsity": 0.5, "criterion": "magnitud"}, "did you mean .*magnitude"),
        ({"final_sparsity": 0.5, "structure": "neurons"}, "did you mean .*neuron"),
        ({"final_sparsity": 0.5, "scope": "local"}, "unknown scope 'local'"),
        ({"final_sparsity": 0.6, "structure": "2:4"}, "2:4 prunes 50.0%, but `final_sparsity` is 0.6"),
        ({"final_sparsity": 0.5, "shrink": True}, "`shrink=True` needs whole parts"),
        ({"final_sparsity": 0.5, "uniform": True}, "`uniform=True` needs whole parts"),
        ({"final_sparsity": 0.5, "structure": "layer"}, "structure 'layer' needs `shrink=True`"),
        ({"final_sparsity": 0.5, "structure": "neuron", "criterion": "block_fisher"}, "use 'fisher'"),
        ({"final_sparsity": 0.5, "schedule": "constant"}, "has no meaning with a schedule 'constant'"),
        ({"final_sparsity": 0.5, "schedule": [(1, 0.5)]}, "has no meaning with a schedule of steps"),
        ({"schedule": [(1, 0.5), (3, 0.2)]}, "falls from 0.5 to 0.2"),
        ({"schedule": "constant", "structure": "neuron"}, "leave out structure 'neuron'"),
    ],
)
def test_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        PruningCallback(**arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"targets": ["*.qery"]}, r"pattern '\*.qery' in `targets` matches no module; did you mean .*query"),
        ({"ignore": ["*"]}, "nothing is left to prune"),
        ({"final_sparsity": {"*.kye": 0.5}}, r"'\*.kye' in `.*` matches no module"),
        ({"final_sparsity": None, "structure": "4:7"}, "32 inputs, which 4:7 does not divide"),
        ({"structure": "5x1"}, "which blocks of 5x1 do not divide"),
        (
            {"final_sparsity": 0.99, "structure": "row", "targets": ["classifier"]},
            "would prune every weight of classifier",
        ),
    ],
)
def test_models(tmp_path, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_trainer(tmp_path, callbacks=[PruningCallback(**{"final_sparsity": 0.5, **arguments})])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"start_step": 1, "end_step": 9}, r"`end_step` \(9, step 9\) is not before the end of training \(8 steps\)"),
        ({"start_step": 8, "schedule": "one_shot"}, r"`start_step` \(8, step 8\) is not before the end"),
        ({"start_step": 5, "end_step": 0.5}, r"`end_step` \(0.5\) must come after `start_step` \(5\)"),
        (
            {"start_step": 0, "schedule": "one_shot", "criterion": "movement"},
            "needs gradients, and before step 0 there are none",
        ),
    ],
)
def test_steps(tmp_path, arguments: dict[str, Any], text: str) -> None:
    trainer = make_trainer(tmp_path, callbacks=[PruningCallback(0.5, **arguments)])
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=text):
        trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.named_parameters())


def test_a_goal_below_the_present_sparsity(tmp_path) -> None:
    model = tiny_bert()
    with torch.no_grad():
        for module in model.bert.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(torch.rand_like(module.weight) > 0.7)
    with pytest.raises(ValueError, match=r"70\.\d% of 14,336 weights .* is 0 already, more than the goal of 50.0%"):
        make_trainer(tmp_path, model, [PruningCallback(0.5)]).train()


def test_two_callbacks_on_the_same_weight(tmp_path) -> None:
    callbacks = [PruningCallback(0.5, targets=["*.query"]), PruningCallback(0.6, targets=["*.attention.*"])]
    with pytest.raises(ValueError, match=r"two PruningCallbacks prune bert.*query\.weight"):
        make_trainer(tmp_path, callbacks=callbacks).train()


def test_a_new_trainer_on_the_same_model_is_fine(tmp_path) -> None:
    """A notebook cell that is run twice."""
    model = tiny_bert()
    make_trainer(tmp_path, model, [PruningCallback(0.5, criterion="fisher")])
    make_trainer(tmp_path, model, [PruningCallback(0.5, criterion="fisher")]).train()


def test_int8_models_cannot_be_pruned(tmp_path) -> None:
    model = quantize_dynamic(tiny_bert(), progress=False)
    callback = PruningCallback(0.5)
    with pytest.raises(RuntimeError, match="is int8 already; its weights cannot be pruned"):
        callback.on_init_end(None, None, None, model=model)  # type: ignore[arg-type]


def test_gradients_of_frozen_weights(tmp_path) -> None:
    model = tiny_bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"needs gradients, but 6 of the weights are frozen"):
        make_trainer(tmp_path, model, [PruningCallback(0.5, criterion="movement")]).train()
    make_trainer(tmp_path, model, [PruningCallback(0.5)]).train()  # magnitude does not


def test_a_checkpoint_of_another_run(tmp_path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, changes=changes).train()
    again = make_trainer(tmp_path, callbacks=[PruningCallback(0.8, start_step=1, end_step=3)], changes=changes)
    with pytest.raises(ValueError, match=r"resumes at step 4, where 80.0% .* in the checkpoint it is 0.0%"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_lost_scores_are_not_made_up(tmp_path) -> None:
    """With a model_init, a callback that is only passed is prepared too late to load its buffers."""

    def trainer(attached: bool):
        callback = PruningCallback(0.5, start_step=2, end_step=7, frequency=4, criterion="movement")
        changes = {"save_strategy": "steps", "save_steps": 3}
        made = make_trainer(
            tmp_path, None, [] if attached else [callback], changes=changes, model_init=lambda: tiny_bert()
        )
        return callback.attach(made) and made if attached else made

    trainer(True).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(ValueError, match="scores that criterion 'movement' had gathered were not loaded"):
        trainer(False).train(resume_from_checkpoint=checkpoint)
    trainer(True).train(resume_from_checkpoint=checkpoint)


def test_training_that_ends_early_says_so(tmp_path, caplog) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    with caplog.at_level(logging.WARNING, logger="hf_quant.callbacks.pruning"):
        make_trainer(tmp_path, callbacks=[PruningCallback(0.5, start_step=1, end_step=7), Stop()]).train()
    assert "training ended at step 4, before `end_step` (step 7), at a sparsity of" in caplog.text


@pytest.mark.parametrize("uniform", [False, True])
def test_shapes_that_no_config_can_say(tmp_path, uniform) -> None:
    callback = PruningCallback(0.5, structure="head", shrink=True, uniform=uniform)
    text = (
        "the config of BertForSequenceClassification cannot say that heads are removed"
        if uniform
        else "With `uniform=True` each keeps 1 of 2"
    )
    with pytest.raises(ValueError, match=text):
        make_trainer(tmp_path, callbacks=[callback])


def test_a_structure_that_the_model_lacks(tmp_path) -> None:
    """Two query heads that share the only key and value head make one unit, which cannot go."""
    with pytest.raises(ValueError, match="LlamaForCausalLM has no attention heads"):
        make_trainer(tmp_path, tiny_llama(), [PruningCallback(0.5, structure="head")], causal=True)


def test_all_heads_of_a_layer(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"would prune every weight of .*output\.dense, which has 2 heads"):
        make_trainer(tmp_path, callbacks=[PruningCallback(0.8, structure="head")])


def test_a_width_that_the_groups_of_a_scheme_do_not_divide(tmp_path) -> None:
    pruning = PruningCallback(0.25, structure="neuron", uniform=True, shrink=True)
    callbacks = [pruning, QATCallback("int4_weight_only")]
    trainer = make_trainer(tmp_path, tiny_bert(intermediate_size=64), callbacks)
    with pytest.raises(
        ValueError, match=r"48 inputs, which the scheme 'int4_weight_only' cannot divide into groups of 32"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_qat_and_pruning_messages_do_not_depend_on_order(tmp_path) -> None:
    for callbacks in ([PruningCallback(0.5), QATCallback()], [QATCallback(), PruningCallback(0.5)]):
        trainer = make_trainer(tmp_path, tiny_bert(), callbacks)
        trainer.train()
        with pytest.raises(RuntimeError, match="int8 already"):
            trainer.train()
