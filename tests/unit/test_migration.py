"""Neural Compressor, NNCF and torch.ao as recipes of hf_quant, and what broken files are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_quant.migration import Migration, MigrationError, migrate
from hf_quant.migration.reading import Node, read_tree
from hf_quant.recipe.sections import Distillation, Pruning, Quantization

torch.set_num_threads(1)

NNCF = """\
{
    // what the example scripts read
    "model": "bert-base-uncased", "input_info": [{"sample_size": [1, 128]}],
    "epochs": 20, "batch_size": 32,
    "optimizer": {"type": "Adam", "base_lr": 2e-5},
    "compression": [
        {
            "algorithm": "magnitude_sparsity",
            "sparsity_init": 0.1,
            "params": {
                "schedule": "polynomial", "power": 3, "sparsity_target": 0.6,
                "sparsity_target_epoch": 10, "sparsity_freeze_epoch": 15,
                "weight_importance": "abs"
            },
            "ignored_scopes": [
                "{re}.*classifier.*", "Bert/BertModel[bert]/BertPooler[pooler]/NNCFLinear[dense]/linear_0"]
        },
        {
            "algorithm": "quantization",
            "initializer": {"range": {"num_init_samples": 32}},
            "weights": {"mode": "symmetric", "bits": 8, "per_channel": true},
            "activations": {"mode": "symmetric"},
            "preset": "mixed",	"overflow_fix": "disable",
            "ignored_scopes": ["{re}.*Embeddings.*", "{re}.*__add___[0-1]", "{re}.*pooler.*"]
        },
        {"algorithm": "knowledge_distillation", "type": "softmax", "scale": 3, "temperature": 4.0},
        {"algorithm": "binarization", "mode": "xnor"}
    ]
}
"""

COMPRESSOR = """\
model:
  name: bert
  framework: pytorch_fx
quantization:
  approach: quant_aware_training
  op_type_dict:
    Embedding:
      weight: {dtype: [fp32]}
      activation: {dtype: [fp32]}
    Linear:
      weight: {dtype: [int8], scheme: [sym], granularity: [per_channel], algorithm: [minmax]}
  op_name_dict:
    "bert.encoder.layer.0.output.dense":
      weight: {dtype: [fp32]}
    ".*pooler.*":
      weight: {dtype: [fp32]}
  train:
    end_epoch: 4
    optimizer: {SGD: {learning_rate: 0.0001, momentum: 0.9}}
pruning:
  target_sparsity: 0.8
  pruning_type: snip_momentum
  pruning_scope: global
  start_step: 100
  end_step: 900
  pruning_frequency: 50
  excluded_op_names: [".*embeddings.*", "classifier"]
  pruning_configs:
    - op_names: [".*attention.*"]
      pattern: "4x1"
    - op_names: ["intermediate"]
      pattern: "1:4"
      pruning_type: magnitude
distillation:
  temperature: 3.0
  loss_types: [CE, KL]
  loss_weights: [0.25, 0.75]
tuning:
  accuracy_criterion: {relative: 0.01}
"""

TORCH = """\
import torch
import torch.nn as nn
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat, convert
from torch.nn.utils import prune
from transformers import AutoModelForSequenceClassification

raise SystemExit("a snippet is never run")
AMOUNT = 0.4
model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
torch.backends.quantized.engine = "x86"
for name, module in model.named_modules():
    if isinstance(module, nn.Linear):
        prune.ln_structured(module, name="weight", amount=AMOUNT, n=2, dim=0)
model.qconfig = get_default_qat_qconfig("x86")
model.classifier.qconfig = None
model.bert.encoder.layer[0].qconfig = None
prepared = prepare_qat(model.train())
int8 = convert(prepared.eval())
torch.ao.quantization.something_else(model)
"""


def made(tmp_path: Path, text: str, name: str = "source", **options: object) -> Migration:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return migrate(path, **options)  # type: ignore[arg-type]


def test_nncf(tmp_path: Path) -> None:
    migration = made(tmp_path, NNCF)
    recipe = migration.recipe
    assert (migration.kind, recipe.model) == ("NNCF", "bert-base-uncased")
    assert recipe.training == {
        "num_train_epochs": 20,
        "per_device_train_batch_size": 32,
        "learning_rate": 2e-5,
    }
    assert recipe.pruning == [
        Pruning(
            final_sparsity=0.6,
            initial_sparsity=0.1,
            start_step=0.0,
            end_step=0.5,
            schedule="cubic",
            criterion="magnitude",
            ignore=["*classifier*", "bert.pooler.dense"],
        )
    ]
    assert recipe.quantization == Quantization(ignore=["FILL-IN {re}.*Embeddings.*", "*pooler*"])
    assert recipe.distillation == Distillation(teacher="./FILL-IN/teacher", hardness=0.75, temperature=4.0)
    assert [note.line for note in migration.missing] == [3, 5, 20, 23, 24, 27, 27]
    assert "  end_step: 0.5  # line 12: magnitude_sparsity.params.sparsity_target_epoch: 10" in migration.text


@pytest.mark.parametrize(
    ("algorithm", "wanted"),
    [
        ('"magnitude_sparsity", "params": {"schedule": "multistep", "multistep_steps": [5, 10],'
         ' "multistep_sparsity_levels": [0.2, 0.4, 0.6]}',
         Pruning(schedule=[[0.0, 0.2], [0.25, 0.4], [0.5, 0.6]], criterion="magnitude")),
        ('"rb_sparsity", "params": {"schedule": "exponential", "sparsity_target": 0.5, "sparsity_target_epoch": 20}',
         Pruning(final_sparsity=0.5, start_step=0.0, end_step=0.9999, schedule="cubic", criterion="movement")),
        ('"movement_sparsity", "params": {"warmup_start_epoch": 1, "warmup_end_epoch": 4, "power": 3},'
         ' "ignored_scopes": ["{re}.*pooler.*"]',
         Pruning(final_sparsity=0.5, start_step=0.05, end_step=0.2, schedule="cubic", criterion="soft_movement",
                 ignore=["*pooler*"])),
        ('"filter_pruning", "pruning_init": 0.1, "params": {"schedule": "baseline", "pruning_target": 0.3,'
         ' "num_init_steps": 2, "filter_importance": "L1", "all_weights": true}',
         Pruning(final_sparsity=0.3, initial_sparsity=0.1, start_step=0.1, schedule="one_shot", criterion="l1",
                 structure="row", scope="global")),
        ('"const_sparsity"', Pruning(schedule="constant")),
    ],
)  # fmt: skip
def test_nncf_pruning(tmp_path: Path, algorithm: str, wanted: Pruning) -> None:
    recipe = made(tmp_path, f'{{"epochs": 20, "compression": {{"algorithm": {algorithm}}}}}').recipe
    assert recipe.pruning == [wanted]
    assert len(recipe.callbacks()) == 1


def test_nncf_without_epochs(tmp_path: Path) -> None:
    text = '[{"algorithm": "magnitude_sparsity", "params": {"sparsity_target": 0.5, "sparsity_target_epoch": 4}}]'
    migration = made(tmp_path, text)
    assert migration.recipe.pruning[0].end_step == Pruning.end_step
    assert [note.remark for note in migration.missing] == [
        "the number of epochs is not in the file; give it with --epochs"
    ]


def test_neural_compressor(tmp_path: Path) -> None:
    migration = made(tmp_path, COMPRESSOR)
    recipe = migration.recipe
    assert migration.kind == "Neural Compressor"
    assert recipe.training == {"num_train_epochs": 4, "learning_rate": 1e-4}
    shared = {"start_step": 100, "end_step": 900, "frequency": 50, "ignore": ["*embeddings*", "*classifier*"]}
    assert recipe.pruning == [
        Pruning(final_sparsity=0.8, criterion="first_order", structure="4x1", targets=["*attention*"], **shared),
        Pruning(criterion="magnitude", structure="3:4", targets=["*intermediate*"], **shared),
    ]
    ignore = ["bert?encoder?layer?0?output?dense", "*pooler*"]
    assert recipe.quantization == Quantization("int8_static", embeddings=False, ignore=ignore)
    assert recipe.distillation == Distillation(teacher="./FILL-IN/teacher", hardness=0.75, temperature=3.0)
    assert [note.line for note in migration.missing] == [2, 19, 38]


@pytest.mark.parametrize(
    ("text", "wanted", "remark"),
    [
        ("quantization: {approach: post_training_dynamic_quant}", Quantization("int8_dynamic"), "hf-quant quantize"),
        ("PostTrainingQuantConfig: {approach: static}", Quantization("int8_static"), "hf-quant quantize"),
        ('{"approach": "weight_only", "op_type_dict": {".*": {"weight": {"bits": 4, "group_size": 128,'
         ' "scheme": "sym", "algorithm": "RTN"}}}}', Quantization("int4_weight_only_g128"), "hf-quant quantize"),
        ("QuantizationAwareTrainingConfig:\n  op_name_dict:\n    classifier: {weight: {dtype: fp32}}",
         Quantization("int8_static", ignore=["classifier"]), ""),
    ],
)  # fmt: skip
def test_neural_compressor_quantization(tmp_path: Path, text: str, wanted: Quantization, remark: str) -> None:
    migration = made(tmp_path, text)
    assert migration.recipe.quantization == wanted
    (scheme,) = [note for note in migration.notes if note.became.startswith("quantization.scheme")]
    assert remark in scheme.remark
    assert bool(scheme.remark) is bool(remark)


def test_torch_ao(tmp_path: Path) -> None:
    migration = made(tmp_path, TORCH, "snippet.py")
    recipe = migration.recipe
    assert (migration.kind, recipe.model) == ("torch.ao", "bert-base-uncased")
    assert recipe.pruning == [
        Pruning(
            final_sparsity=0.4, start_step=0.0, schedule="one_shot", criterion="l2", structure="row", scope="layer"
        )
    ]
    assert recipe.quantization == Quantization("int8_static", ignore=["classifier*", "bert.encoder.layer.0.*"])
    assert [note.source for note in migration.missing] == ["torch.ao.quantization.something_else(model)"]
    assert {8 + n for n in (1, 2, 5, 6, 7, 8, 9, 10)} <= {note.line for note in migration.notes}
    assert len(recipe.callbacks()) == 2


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("q = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)",
         Quantization("int8_dynamic", embeddings=False)),
        ("from torchao.quantization import quantize_, Int4WeightOnlyConfig\n"
         "quantize_(model, Int4WeightOnlyConfig(group_size=64))",
         Quantization("int4_weight_only_g64", embeddings=False)),
        ("import torchao\ntorchao.quantization.quantize_(model, torchao.quantization.Int8WeightOnlyConfig())",
         Quantization("int8_weight_only", embeddings=False)),
        ("quantize_(model, Int8DynamicActivationInt8WeightConfig())",
         Quantization("int8_dynamic_symmetric", embeddings=False)),
        ("base = Int8DynamicActivationInt4WeightConfig(group_size=32)\n"
         "quantize_(model, QATConfig(Int8DynamicActivationInt4WeightConfig(group_size=32), step='prepare'))",
         Quantization("int4_dynamic", embeddings=False)),
        ("quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int6, granularity=PerGroup(32)))",
         Quantization("int6_weight_only", embeddings=False)),
        ("model.qconfig = QConfig(activation=FakeQuantize.with_args(observer=MovingAverageMinMaxObserver,"
         " quant_min=0, quant_max=255), weight=FakeQuantize.with_args(quant_min=-128, quant_max=127))",
         Quantization("int8_static")),
        ("mapping = (QConfigMapping().set_global(get_default_qat_qconfig('onednn'))\n"
         "           .set_module_name('classifier', None).set_object_type(nn.Embedding, None))",
         Quantization("int8_static", ignore=["classifier*"], embeddings=False)),
        ("model.bert.encoder.qconfig = torch.quantization.default_qat_qconfig",
         Quantization("int8_static", targets=["bert.encoder*"])),
    ],
)  # fmt: skip
def test_torch_ao_schemes(tmp_path: Path, text: str, wanted: Quantization) -> None:
    recipe = made(tmp_path, text).recipe
    assert recipe.quantization == wanted
    assert len(recipe.callbacks()) == 1


def test_torch_prune(tmp_path: Path) -> None:
    text = (
        "import torch.nn.utils.prune as prune\n"
        "prune.random_unstructured(model.bert.pooler.dense, 'weight', 0.25)\n"
        "prune.l1_unstructured(model.encoder.layer[0].fc, name='weight', amount=0.5)\n"
        "prune.l1_unstructured(model.fc, name='bias', amount=3)\n"
        "prune.l1_unstructured(model.fc, name='weight', amount=3)\n"
        "pairs = ((model.a, 'weight'), (model.b, 'weight'))\n"
        "prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=0.2)\n"
    )
    migration = made(tmp_path, text)
    once = {"start_step": 0.0, "schedule": "one_shot"}
    assert migration.recipe.pruning == [
        Pruning(0.25, criterion="random", scope="layer", targets=["bert.pooler.dense"], **once),
        Pruning(0.5, criterion="magnitude", scope="layer", targets=["encoder.layer.0.fc"], **once),
        Pruning(0.2, criterion="magnitude", scope="global", targets=["a", "b"], **once),
    ]
    assert [note.remark for note in migration.missing] == [
        "only weights are pruned, no biases",
        "a number of weights; nearest: final_sparsity, a share",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.py", "def f(:\n", ":1: not valid Python"),
        ("x.py", "a = 1\n", ":1: no qconfig, quantize_, quantize_dynamic or prune call is in it"),
        ("x.json", '{"compression": [{"algorithm": "quantization",}', "not valid YAML"),
        ("x.json", '{"compression": [{"params": {}}]}', ":1: an algorithm of `compression` must name itself"),
        ("x.json", '{"compression": {"algorithm": "magnitude_sparsity", "params": {\n"sparsity_target": 2}}}',
         ":2: the recipe cannot have this: `final_sparsity` is 2"),
        ("x.yaml", "a: 1\nb: 2\n", ":1: cannot tell what this file is (a, b)"),
        ("x.yaml", "just words\n", ":1: cannot tell what this file is (plain text)"),
        ("x.yaml", "model: m\noutput: o\ntask: mrpc\nquantization: {}\n", "is a recipe of hf_quant already"),
        ("x.yaml", " \n", ":1: the file is empty"),
        ("x.yaml", "quantization: {approach: [1]}\n", ":1: `approach` must be text"),
        ("x.yaml", "distillation:\n  loss_weights: [1, 2, 3]\n", ":2: `loss_weights` must be two numbers"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(MigrationError) as caught:
        made(tmp_path, text, name)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: 1\nb: \xff\xfe")
    with pytest.raises(MigrationError, match=":2: not a text file in UTF-8"):
        migrate(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        migrate(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", [NNCF, COMPRESSOR], ids=["nncf", "neural_compressor"])
def test_every_value_is_in_the_notes(tmp_path: Path, text: str) -> None:
    notes = made(tmp_path, text).notes
    noted, gone = {note.line for note in notes}, {note.line for note in notes if note.kind == "none"}

    def check(node: Node) -> None:
        if isinstance(node.value, dict):
            for key, value in node.value.items():
                if isinstance(value.value, (dict, list)) and value.value:
                    if value.line not in gone:
                        check(value)
                else:
                    assert value.line in noted, f"{key} on line {value.line} is in no note"
        for item in node.value if isinstance(node.value, list) else []:
            check(item)

    check(read_tree(text, "source"))
