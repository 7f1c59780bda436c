"""compare() on tiny real models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hf_quant import compare, quantize_dynamic, save_quantized
from hf_quant.evaluation.compare import sample_rows
from hf_quant.evaluation.metrics import compute_metrics
from hf_quant.evaluation.predict import encode_texts, predict
from hf_quant.evaluation.report import Comparison
from hf_quant.evaluation.tasks import Task, get_task, load_task_data

from ..evaluation import by_hand, labelled, make_tokenizer, sentences
from ..tiny import VOCAB, tiny_bert

GLUE = Path(__file__).parents[3] / "shared" / "data" / "glue"
needs_glue = pytest.mark.skipif(not GLUE.is_dir(), reason="the GLUE files are not beside this checkout")

# What a test that is about something else need not wait for.
QUICK: dict[str, Any] = {"latency_batch_size": None, "resamples": 200, "progress": False}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def pair() -> tuple[BertForSequenceClassification, BertForSequenceClassification]:
    model = tiny_bert().eval()
    return model, quantize_dynamic(model, progress=False)


@pytest.fixture(scope="module")
def folders(
    pair: tuple[BertForSequenceClassification, BertForSequenceClassification],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    pair[0].save_pretrained(root / "float")
    tokenizer.save_pretrained(root / "float")
    save_quantized(pair[1], root / "int8")
    return root / "float", root / "int8"


def test_classifier_from_memory(pair: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    data = labelled()
    task = Task("mine", ("text",), metrics=("accuracy", "f1", "matthews_correlation"))
    found = compare(*pair, task, data, processing_class=tokenizer, batch_size=7, **QUICK)
    logits = predict(dict(zip("ab", pair, strict=True)), encode_texts(data, task, tokenizer, 32), tokenizer, 7)
    predictions = [values.argmax(1) for values in logits.values()]
    assert (predictions[0] == by_hand(pair[0], tokenizer, data["text"][:]).argmax(1)).all()
    references = np.array(data["label"][:])
    expected = [compute_metrics(task, values, references) for values in predictions]
    (split,) = found.splits
    assert {m.name: m.float_value for m in split.metrics} == expected[0]
    assert {m.name: m.int8_value for m in split.metrics} == expected[1]
    assert all(m.interval.low <= m.interval.high for m in split.metrics)
    assert split.agreement is not None
    assert split.agreement.flips == (predictions[0] != predictions[1]).sum()
    assert (split.samples, split.rows, split.deviation) == (48, 48, None)
    assert (found.float_model.int8_layers, found.int8_model.int8_layers) == (0, 16)
    assert len(found.layer_sqnr) == 16
    assert all(10 < value < 80 for value in found.layer_sqnr.values())
    assert found.latency is None
    assert found.versions["torch"] == torch.__version__
    assert found.machine.device == "cpu"
    assert found.machine.threads == torch.get_num_threads()


def test_regression_from_memory(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_bert(num_labels=1).eval()
    int8 = quantize_dynamic(model, progress=False)
    data = labelled()
    exact = by_hand(model, tokenizer, data["text"][:])[:, 0]
    noise = np.random.default_rng(0).normal(size=len(exact)) * exact.std()
    data = data.remove_columns("label").add_column("label", (exact + noise).tolist())
    found = compare(model, int8, data=data, processing_class=tokenizer, **QUICK)
    assert found.problem_type == "regression"
    (split,) = found.splits
    assert [m.name for m in split.metrics] == ["pearsonr", "spearmanr"]
    assert split.metrics[0].float_value == pytest.approx(np.corrcoef(exact, exact + noise)[0, 1], abs=1e-5)
    change = np.abs(by_hand(int8, tokenizer, data["text"][:])[:, 0] - exact)
    assert split.deviation is not None
    assert split.deviation.mean_absolute == pytest.approx(change.mean(), rel=0.05)
    assert split.agreement is None
    assert "in the unit of the labels" in str(found)


def test_folders_give_what_the_models_in_memory_give(
    pair: Any, folders: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = labelled()
    data.to_parquet(tmp_path / "rows.parquet")
    in_memory = compare(*pair, data=data, processing_class=tokenizer, **QUICK)
    found = compare(*folders, data=tmp_path / "rows.parquet", device="cpu", **{**QUICK, "progress": True})
    assert found.splits[0].metrics == in_memory.splits[0].metrics
    assert (found.task, found.splits[0].split) == ("rows", "rows")
    assert found.layer_sqnr == pytest.approx(in_memory.layer_sqnr)
    assert found.float_model.name == str(folders[0])
    assert found.int8_model.size.on_disk == (folders[1] / "model.safetensors").stat().st_size
    assert found.float_model.size.on_disk is not None
    assert in_memory.float_model.size.on_disk is None
    assert found.int8_model.size.total == in_memory.int8_model.size.total
    found.save(tmp_path / "report")
    assert Comparison.from_json(tmp_path / "report" / "report.json") == found


def test_models_are_put_back_as_they_were(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_bert(hidden_dropout_prob=0.5)
    int8 = quantize_dynamic(model, progress=False)
    model.train()
    first = compare(model, int8, data=labelled(), processing_class=tokenizer, **QUICK)
    assert model.training
    assert not int8.training
    # Dropout was off: a second comparison, and its bootstrap, give the same.
    assert compare(model, int8, data=labelled(), processing_class=tokenizer, **QUICK) == first


def test_a_model_that_numbers_its_classes_otherwise(tokenizer: PreTrainedTokenizerFast) -> None:
    data = labelled().cast_column("label", ClassLabel(names=["no", "yes"]))
    plain = tiny_bert().eval()
    turned = tiny_bert(id2label={0: "YES", 1: "NO"}).eval()
    results = [
        compare(m, quantize_dynamic(m, progress=False), data=data, processing_class=tokenizer, **QUICK).splits[0]
        for m in (plain, turned)
    ]
    accuracies = [result.metrics[0].float_value for result in results]
    assert accuracies[0] == pytest.approx(1 - accuracies[1])
    assert accuracies[0] != accuracies[1]


def test_max_samples_draws_with_the_seed(pair: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    data = labelled()
    drawn = [
        compare(*pair, data=data, processing_class=tokenizer, max_samples=20, **{**QUICK, "seed": seed})
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0].splits != drawn[2].splits
    assert (drawn[0].splits[0].samples, drawn[0].splits[0].rows) == (20, 48)
    rows = sample_rows(48, 20, seed=0)
    assert len(set(rows.tolist())) == 20
    assert rows.tolist() == sorted(rows)
    first = data.select(range(20))
    assert (
        compare(*pair, data=first, processing_class=tokenizer, **QUICK).splits[0].metrics != drawn[0].splits[0].metrics
    )
    assert compare(*pair, data=data, processing_class=tokenizer, max_samples=999, **QUICK).splits[0].samples == 48


def test_metrics_can_be_chosen(pair: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    for task in (None, Task("mine", ("text",))):
        found = compare(*pair, task, labelled(), metrics=["matthews_correlation"], processing_class=tokenizer, **QUICK)
        assert [m.name for m in found.splits[0].metrics] == ["matthews_correlation"]
        assert found.headline == "matthews_correlation"
    one = compare(*pair, data=labelled(), metrics="f1", processing_class=tokenizer, **QUICK)
    assert one.headline == "f1"
    with pytest.raises(ValueError, match=r"unknown metric 'acuracy'.*did you mean 'accuracy'"):
        compare(*pair, "mrpc", labelled(), metrics=["acuracy"])


def test_mnli_judges_both_splits(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mnli").mkdir()
    for i, split in enumerate(get_task("mnli").splits):
        columns = sentences(30 + i, ("premise", "hypothesis"), seed=i)
        labels = np.random.default_rng(i).integers(0, 3, 30 + i).tolist()
        Dataset.from_dict({**columns, "label": labels}).to_parquet(tmp_path / "mnli" / f"{split}.parquet")
    monkeypatch.setenv("HF_QUANT_GLUE_DIR", str(tmp_path))
    model = tiny_bert(num_labels=3).eval()
    found = compare(model, quantize_dynamic(model, progress=False), "mnli", processing_class=tokenizer, **QUICK)
    assert [(s.split, s.samples) for s in found.splits] == [("validation_matched", 30), ("validation_mismatched", 31)]
    assert "Quality on validation_mismatched, 31 examples" in str(found)
    assert "accuracy on validation_matched" in str(found)


@needs_glue
@pytest.mark.parametrize("name", ["mrpc", "stsb", "cola", "wnli"])
def test_real_glue_data(name: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_QUANT_GLUE_DIR", str(GLUE))
    model = tiny_bert(num_labels=get_task(name).num_labels).eval()
    int8 = quantize_dynamic(model, progress=False)
    found = compare(model, int8, name, processing_class=tokenizer, max_samples=60, **QUICK)
    assert [m.name for m in found.splits[0].metrics] == list(get_task(name).metrics)
    assert found.splits[0].rows == len(load_task_data(name))
    assert found.max_length == 32  # what the tiny model has positions for; longer texts were cut
    assert str(found)


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_other_architectures(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
        model: Any = GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0, bos_token_id=2, eos_token_id=3))
    else:
        # BART pools the last </s>: timed sequences must end as texts do.
        sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
        sizes |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        model = BartForSequenceClassification(
            BartConfig(
                **sizes,
                vocab_size=VOCAB,
                max_position_embeddings=32,
                num_labels=2,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
                decoder_start_token_id=3,
                forced_eos_token_id=3,
            )
        )
    int8 = quantize_dynamic(model.eval(), progress=False)
    quick = {**QUICK, "latency_batch_size": 2, "latency_length": 8}
    found = compare(model, int8, data=labelled(), processing_class=tokenizer, **quick)
    assert found.latency is not None
    assert (found.latency.batch_size, found.latency.length) == (2, 8)
    assert found.layer_sqnr
    assert found.float_model.size.linear > found.int8_model.size.linear


def test_a_tokenizer_without_padding(pair: Any) -> None:
    plain = make_tokenizer(pad_token="")
    with pytest.raises(ValueError, match=r"no padding token.*tokenizer\.pad_token = .*batch_size=1"):
        compare(*pair, data=labelled(), processing_class=plain, **QUICK)
    assert compare(*pair, data=labelled(8), processing_class=plain, batch_size=1, **QUICK).splits[0].samples == 8


def test_models_trained_apart_have_no_error_by_layer(pair: Any, tokenizer: Any) -> None:
    model, int8 = pair
    apart = copy.deepcopy(model)
    with torch.no_grad():
        apart.classifier.weight += 0.01
    found = compare(apart, int8, data=labelled(), processing_class=tokenizer, **QUICK)
    assert found.layer_sqnr == {}
    assert "trained apart" in str(found)
    assert compare(model, int8, data=labelled(), processing_class=tokenizer, **QUICK).layer_sqnr


# Refusals


def refused(message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        compare(*arguments, **{**QUICK, **options})


def test_arguments_that_make_no_comparison(pair: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    data, given = labelled(), {"processing_class": tokenizer}
    refused("Nothing to compare on. Give `task=`, one of cola, mnli.*or `data=`", *pair)
    refused("are the same object, so nothing would differ", pair[0], pair[0], "mrpc")
    refused("`float_model` holds int8 layers and `int8_model` none: the two are swapped", pair[1], pair[0], data=data)
    refused("`batch_size` is 0; it must be 1 or more", *pair, data=data, batch_size=0)
    refused("`max_samples` is -1", *pair, data=data, max_samples=-1)
    refused("`resamples` is 3; .* needs 100 or more", *pair, data=data, resamples=3)
    refused("`max_length` is 64; allowed for these models: 1 to 32", *pair, data=data, max_length=64, **given)
    refused("`latency_length` is 64; these models take 1 to 32", *pair, data=data, latency_length=64, **given)
    refused("unknown task 'mprc'; did you mean 'mrpc'", *pair, "mprc")
    refused("several splits", *pair, data=DatasetDict(a=data))
    refused(r"No tokenizer found\. Tried: nothing.*Pass `processing_class=", *pair, data=data)


def test_data_that_does_not_fit(pair: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    data, given = labelled(), {"processing_class": tokenizer}
    refused(r"Task 'sst2': the data has no column 'sentence'\. It has 'text', 'label'", *pair, "sst2", data)
    refused("needs a column 'label'", *pair, data=data.remove_columns("label"))
    unlabelled = data.remove_columns("label").add_column("label", [-1] * 48)
    refused(r"row 0 \(-1\) is -1: these rows are unlabelled; 48 of 48", *pair, data=unlabelled, **given)
    empty = Dataset.from_dict({"text": ["a", None], "label": [0, 1]})
    refused("row 1 of the text column 'text' holds None, which is not text", *pair, data=empty, **given)
    task = Task("mine", ("text",), num_labels=3)
    refused(r"Task 'mine' .* has 3 label\(s\), the model 2", *pair, task, data, **given)


def test_models_that_do_not_fit(pair: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    data, given = labelled(), {"processing_class": tokenizer}
    three = tiny_bert(num_labels=3).eval()
    refused("float model has 3 labels and the int8 model 2", three, pair[1], data=data, **given)
    bare = BertModel(pair[0].config).eval()
    refused(r"The float model \(BertModel\) gives logits of none", bare, pair[1], data=data, **given)
    broken = tiny_bert().eval()
    torch.nn.init.constant_(broken.classifier.bias, float("nan"))
    refused("The float model gives NaN or infinite logits for 48 of 48 examples", broken, pair[1], data=data, **given)


def test_folders_that_do_not_fit(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data = labelled()
    refused("could not be loaded as a model. There is no folder of that name here", "no/where", folders[1], data=data)
    # A checkpoint without its head: transformers would make one up.
    headless = tmp_path / "headless"
    headless.mkdir()
    state = {k: v for k, v in load_file(folders[0] / "model.safetensors").items() if "classifier" not in k}
    save_file(state, headless / "model.safetensors", metadata={"format": "pt"})
    (headless / "config.json").write_bytes((folders[0] / "config.json").read_bytes())
    refused(
        r"lacks weights of BertForSequenceClassification: classifier\.bias, classifier\.weight\. They would be random",
        headless,
        folders[1],
        data=data,
    )
    # No tokenizer files: transformers would make an empty vocabulary.
    refused(r"No tokenizer found\. Tried: .*int8 \(no tokenizer files\)", tiny_bert().eval(), folders[1], data=data)
