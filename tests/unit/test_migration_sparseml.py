"""SparseML recipes as recipes of hf_quant: what becomes what, and that nothing is dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_quant.callbacks.distillation import DistillationCallback
from hf_quant.callbacks.pruning import PruningCallback
from hf_quant.callbacks.qat import QATCallback
from hf_quant.migration import Migration, MigrationError, migrate
from hf_quant.recipe.schema import Recipe
from hf_quant.recipe.sections import Distillation, Pruning, Quantization
from hf_quant.targets import select_modules, select_prunable
from tests.tiny import tiny_bert

torch.set_num_threads(1)

OBERT = r"""---
# General
num_epochs: 30
init_lr: 1e-4
version: 1.1.0
unused: 7
hardness: &hardness 1.0

training_modifiers:
  - !EpochRangeModifier
      end_epoch: eval(num_epochs)
      start_epoch: 0.0
  - !LearningRateFunctionModifier
      start_epoch: 0
      end_epoch: eval(num_epochs)
      lr_func: linear
      init_lr: eval(init_lr)
      final_lr: eval(init_lr / 10)

pruning_modifiers:
  - !OBSPruningModifier
      params:
        - re:bert.encoder.layer.*.attention.self.query.weight
        - bert.pooler.dense.weight
      init_sparsity: 0.7
      final_sparsity: 0.9
      start_epoch: 2
      end_epoch: eval(num_epochs - 4)
      update_frequency: 2.0
      inter_func: cubic
      global_sparsity: True
      mask_type: block4
      num_grads: 1024
      fisher_block_size: 50

quantization_modifiers:
  - !QuantizationModifier
      start_epoch: eval(num_epochs - 3)
      disable_quantization_observer_epoch: eval(num_epochs - 1)
      freeze_bn_stats_epoch: 29
      quantize_embeddings: 1
      quantize_linear_activations: 0
      exclude_module_types: ['LayerNorm', 'Tanh']
      submodules:
        - bert.embeddings
        - bert.encoder
        - classifier

distillation_modifiers:
  - !DistillationModifier
     hardness: *hardness
     temperature: 5.5
     distill_output_keys: [logits]

constant_modifiers:
  - !ConstantPruningModifier
      start_epoch: 0.0
      params: __ALL_PRUNABLE__
---
# A model card: with colons, and `eval(1)`
"""


def made(tmp_path: Path, text: str, name: str = "recipe.yaml", **options: object) -> Migration:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return migrate(path, **options)  # type: ignore[arg-type]


def short(modifier: str) -> str:
    """A recipe of ten epochs with one modifier."""
    return f"modifiers:\n  - !EpochRangeModifier\n      end_epoch: 10\n{modifier}"


def test_front_matter_with_pruning_quantization_and_distillation(tmp_path: Path) -> None:
    migration = made(tmp_path, OBERT, "recipe.md")
    recipe = migration.recipe
    assert migration.kind == "SparseML"
    assert recipe.training == {
        "num_train_epochs": 30,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"lr_end": 1e-5, "power": 1.0},
    }
    assert recipe.pruning == [
        Pruning(
            final_sparsity=0.9,
            initial_sparsity=0.7,
            start_step=0.066666,
            end_step=0.866666,
            frequency=0.066666,
            schedule="cubic",
            criterion="block_fisher_64",
            structure="1x4",
            scope="global",
            targets=["bert?encoder?layer*?attention?self?query", "bert.pooler.dense"],
        )
    ]
    targets = ["bert.embeddings*", "bert.encoder*", "classifier*"]
    assert recipe.quantization == Quantization(
        scheme="int8_static", start_step=0.9, freeze_step=0.966666, targets=targets, embeddings=True
    )
    assert recipe.distillation == Distillation(teacher="./FILL-IN/teacher", hardness=1.0, temperature=5.5)
    assert {note.source.split(":")[0] for note in migration.missing} == {
        "version",
        "unused",
        "OBSPruningModifier.num_grads",
        "QuantizationModifier.freeze_bn_stats_epoch",
        "DistillationModifier.distill_output_keys",
    }
    assert "  final_sparsity: 0.9  # line 26: OBSPruningModifier.final_sparsity: 0.9\n" in migration.text
    assert "#   line 33: OBSPruningModifier.num_grads: 1024: gradients are gathered" in migration.text


def test_every_line_with_a_value_is_in_the_notes(tmp_path: Path) -> None:
    lines = OBERT[: OBERT.rindex("---")].splitlines()
    noted = {note.line for note in made(tmp_path, OBERT, "recipe.md").notes}
    heads = ("modifiers:", "EpochRangeModifier", "FunctionModifier", "OBSPruningModifier", "DistillationModifier")
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text[0] in "#-" or text.endswith(heads):
            continue  # items of lists are said with their key
        assert number in noted, f"line {number} is not in the notes: {line}"


def test_the_patterns_choose_the_modules_that_the_names_do(tmp_path: Path) -> None:
    recipe = made(tmp_path, OBERT, "recipe.md").recipe
    model = tiny_bert()
    pruned = set(select_prunable(model, recipe.pruning[0].targets))
    layers = range(model.config.num_hidden_layers)
    assert pruned == {
        "bert.pooler.dense",
        *(f"bert.encoder.layer.{number}.attention.self.query" for number in layers),
    }
    assert recipe.quantization is not None
    quantized = select_modules(model, recipe.quantization.targets).quantized
    assert "classifier" in quantized
    assert "bert.pooler.dense" not in quantized
    assert "bert.embeddings.word_embeddings" in quantized


def test_migrated_recipes_give_callbacks(tmp_path: Path) -> None:
    recipe = made(tmp_path, OBERT, "recipe.md", model="m", task="mrpc").recipe
    assert [type(one) for one in recipe.callbacks()] == [PruningCallback, DistillationCallback, QATCallback]
    assert (recipe.model, recipe.task) == ("m", "mrpc")
    assert recipe.data.train is None


def test_the_written_text_is_the_recipe(tmp_path: Path) -> None:
    migration = made(tmp_path, OBERT, "recipe.md")
    path = tmp_path / "made.yaml"
    path.write_text(migration.text, encoding="utf-8")
    assert Recipe.from_yaml(path) == migration.recipe


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("!GMPruningModifier\n      final_sparsity: 0.5\n      start_epoch: 1\n      end_epoch: 5",
         Pruning(final_sparsity=0.5, start_step=0.1, end_step=0.5, criterion="magnitude", scope="layer")),
        ("!GMPruningModifier\n      final_sparsity: 0.5\n      start_epoch: -1\n      end_epoch: 10\n"
         "      update_frequency: -1\n      score_type: movement\n      inter_func: linear",
         Pruning(final_sparsity=0.5, start_step=0.0, end_step=0.9999, frequency=1, schedule="linear",
                 criterion="movement", scope="layer")),
        ("!MagnitudePruningModifier\n      mask_type: '2:4'\n      final_sparsity: 0.5\n      start_epoch: 0\n"
         "      end_epoch: 0",
         Pruning(start_step=0.0, schedule="one_shot", structure="2:4", criterion="magnitude")),
        ("!MovementPruningModifier\n      params: ['re:.*query.*']\n      final_sparsity: 0.5\n      start_epoch: 1\n"
         "      end_epoch: 5\n      mask_type: [4, 1]",
         Pruning(final_sparsity=0.5, start_step=0.1, end_step=0.5, criterion="movement", structure="4x1",
                 scope="layer", targets=["*query*"])),
        ("!MFACPruningModifier\n      final_sparsity: {0.8: ['a.weight'], 0.6: ['re:b.*']}\n      start_epoch: 1\n"
         "      end_epoch: 5\n      mfac_options: {num_grads: 64}",
         Pruning(final_sparsity={"a": 0.8, "b*": 0.6}, start_step=0.1, end_step=0.5, criterion="block_fisher",
                 scope="layer")),
        ("!ACDCPruningModifier\n      compression_sparsity: 0.9\n      start_epoch: 1\n      end_epoch: 5\n"
         "      global_sparsity: true",
         Pruning(final_sparsity=0.9, start_step=0.1, end_step=0.5, criterion="magnitude", scope="global")),
        ("!StructuredPruningModifier\n      final_sparsity: 0.5\n      start_epoch: 1\n      end_epoch: 5\n"
         "      mask_type: filter",
         Pruning(final_sparsity=0.5, start_step=0.1, end_step=0.5, criterion="l2", structure="row", scope="layer")),
        ("!ConstantPruningModifier\n      params: __ALL_PRUNABLE__\n      start_epoch: 0",
         Pruning(schedule="constant")),
    ],
)  # fmt: skip
def test_pruning_modifiers(tmp_path: Path, lines: str, wanted: Pruning) -> None:
    migration = made(tmp_path, short(f"  - {lines}\n"))
    assert migration.recipe.pruning == [wanted]
    assert len(migration.recipe.callbacks()) == 1


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("      start_epoch: 8", Quantization(start_step=0.8)),
        ("      start_epoch: 9.5", Quantization(start_step=0.95, freeze_step=0.975)),
        ("      scheme: {weights: {num_bits: 4, symmetric: true}}\n      start_epoch: 0.0",
         Quantization("int4_weight_only_channel", start_step=0.0)),
        ("      scheme: {input_activations: {num_bits: 8, symmetric: false}, weights: {num_bits: 8}}\n"
         "      ignore: ['LayerNorm', 'bert.encoder.layer.1', 'classifier', 're:.*pooler']",
         Quantization(ignore=["bert.encoder.layer.1.*", "classifier*", "*pooler*"])),
        ("      weight_bits: 8\n      activation_bits: 0\n      quantize_embeddings: false",
         Quantization("int8_weight_only", embeddings=False)),
    ],
)  # fmt: skip
def test_quantization_modifiers(tmp_path: Path, lines: str, wanted: Quantization) -> None:
    recipe = made(tmp_path, short(f"  - !QuantizationModifier\n{lines}\n")).recipe
    assert recipe.quantization == wanted
    assert len(recipe.callbacks()) == 1


def test_modifiers_of_llm_compressor(tmp_path: Path) -> None:
    text = (
        "quant_stage:\n  quant_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.8}\n"
        "    QuantizationModifier:\n      ignore: [lm_head]\n      config_groups:\n        group_0:\n"
        "          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 128}\n"
        "          targets: [Linear]\n"
    )
    migration = made(tmp_path, text)
    assert migration.recipe.quantization == Quantization("int4_weight_only_g128")
    assert [note.line for note in migration.missing] == [3, 3]
    assert "--equalize smoothquant" in migration.missing[0].remark


def test_stages_variables_and_warm_up(tmp_path: Path) -> None:
    text = """\
lr: 3e-5
dense_stage:
  run: 4
  training_modifiers:
    - !EpochRangeModifier {start_epoch: 0, end_epoch: eval(run)}
    - !LearningRateFunctionModifier {start_epoch: 0, end_epoch: 1, lr_func: linear, init_lr: 0, final_lr: eval(lr)}
    - !LearningRateFunctionModifier {start_epoch: 1, end_epoch: 8, lr_func: cosine, init_lr: eval(lr), final_lr: 0}
sparse_stage:
  run: 8
  pruning_modifiers:
    - !EpochRangeModifier {start_epoch: 4, end_epoch: eval(run)}
    - !GMPruningModifier {start_epoch: 4, end_epoch: eval(run - 2), final_sparsity: 0.5, inter_func: cubic}
    - !SetLearningRateModifier {start_epoch: 6, learning_rate: 1.0e-6}
"""
    migration = made(tmp_path, text)
    assert migration.recipe.training == {
        "num_train_epochs": 8,
        "warmup_steps": 0.125,
        "learning_rate": 3e-5,
        "lr_scheduler_type": "cosine",
    }
    assert migration.recipe.pruning[0].start_step == 0.5
    assert migration.recipe.pruning[0].end_step == 0.75
    assert {note.line for note in migration.missing} == {11, 13}
    assert any("a Trainer has one schedule" in note.remark for note in migration.missing if note.line == 13)


def test_epochs_that_are_not_in_the_file(tmp_path: Path) -> None:
    text = "- !GMPruningModifier {final_sparsity: 0.5, start_epoch: 2, end_epoch: 4}\n"
    migration = made(tmp_path, text)
    assert migration.recipe.pruning[0].start_step == Pruning.start_step
    assert [note.remark for note in migration.missing] == [
        "the number of epochs is not in the file; give it with --epochs"
    ] * 2
    assert made(tmp_path, text, epochs=8).recipe.pruning[0].start_step == 0.25
    with pytest.raises(ValueError, match="--epochs is 0, but must be above 0"):
        made(tmp_path, text, epochs=0)


def test_a_pattern_without_translation_stops_a_run(tmp_path: Path) -> None:
    lines = (
        "  - !GMPruningModifier\n      params: ['re:.*layer\\.\\d+\\.output']\n      final_sparsity: 0.5\n"
        "      start_epoch: 1\n      end_epoch: 5\n"
    )
    migration = made(tmp_path, short(lines))
    assert [note.source for note in migration.missing] == [r"re:.*layer\.\d+\.output"]
    assert "no repetition (`+`)" in migration.missing[0].remark
    (callback,) = migration.recipe.callbacks()
    with pytest.raises(ValueError, match=r"pattern 'FILL-IN \.\*layer.*matches no module"):
        callback.check(tiny_bert())  # type: ignore[attr-defined]


def test_what_has_no_equivalent_says_why(tmp_path: Path) -> None:
    lines = (
        "  - !TrainableParamsModifier {params: ['a'], trainable: false}\n"
        "  - !LayerPruningModifier {layers: ['re:.*layer.1'], start_epoch: 0}\n"
        "  - !LayerThinningModifier {structure_type: filter}\n"
        "  - !StrangeModifier {x: 1}\n"
        "  - !GMPruningModifier {final_sparsity: 0.5, start_epoch: 1, end_epoch: 5, leave_enabled: false}\n"
        "  - !MagnitudePruningModifier {final_sparsity: 0.6, start_epoch: 1, end_epoch: 5}\n"
    )
    migration = made(tmp_path, short(lines))
    remarks = {note.source.partition(":")[0]: note.remark for note in migration.missing}
    assert "requires_grad" in remarks["TrainableParamsModifier"]
    assert "structure: layer" in remarks["LayerPruningModifier"]
    assert "shrink: true" in remarks["LayerThinningModifier"]
    assert remarks["StrangeModifier"] == "hf_quant has nothing that does this"
    assert remarks["StrangeModifier.x"] == "belongs to StrangeModifier"
    assert "never return" in remarks["GMPruningModifier.leave_enabled"]
    assert "prunes weights that another one prunes" in remarks["MagnitudePruningModifier"]
    assert len(migration.recipe.pruning) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modifiers:\n  - !GMPruningModifier\n      final_sparsity: lots\n", "3: `final_sparsity` must be a number"),
        ("modifiers:\n  - !GMPruningModifier\n      final_sparsity: 1.5\n      start_epoch: 0\n",
         "3: the recipe cannot have this: `final_sparsity` is 1.5"),
        ("a: eval(b + 1)\nb: eval(a)\nmodifiers:\n  - !GMPruningModifier\n      final_sparsity: eval(a)\n",
         r"the variable `a` depends on itself \(a -> b -> a\)"),
        ("modifiers:\n  - !GMPruningModifier\n      final_sparsity: eval(__import__('os').name)\n",
         "3: eval.*is not allowed in an expression"),
        ("modifiers:\n  - !EpochRangeModifier\n      end_epoch: eval(many)\n", "3: eval.*unknown variable 'many'"),
        ("modifiers:\n  - !EpochRangeModifier [1, 2]\n", "2: `EpochRangeModifier` must hold keys and values"),
        ("modifiers:\n  - just text\n", "2: a modifier such as `!EpochRangeModifier` must stand here"),
        ("modifiers:\n  - !EpochRangeModifier\n      end_epoch: 3\n      end_epoch: 4\n",
         r"4: key `end_epoch` is repeated \(first on line 3\)"),
        ("modifiers:\n  - !EpochRangeModifier {end_epoch: 3}\n", "nothing in it prunes, distils or quantizes"),
        ("modifiers:\n  - !!python/object/apply:os.system ['x']\n", "2: a modifier such as|no modifier's name"),
        ("---\nmodifiers: [\n---\n# card\n", "2: not valid YAML"),
    ],
)  # fmt: skip
def test_broken_recipes_are_told_by_their_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MigrationError, match=message) as caught:
        made(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "recipe.yaml") + ":")
