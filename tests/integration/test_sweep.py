"""compare_schemes() and compare_perplexity() on tiny real models, and the command line around them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from hf_quant import Calibration, cli, compare, quantize, quantize_dynamic, save_quantized
from hf_quant.evaluation import sweep as module
from hf_quant.evaluation.perplexity import perplexity
from hf_quant.evaluation.sweep import compare_perplexity, compare_schemes
from hf_quant.evaluation.tasks import Task

from ..evaluation import labelled, make_tokenizer, sentences
from ..tiny import VOCAB, tiny_bert, tiny_llama, tiny_tokenizer

QUICK: dict[str, Any] = {"latency_batch_size": None, "resamples": 200, "progress": False}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> BertForSequenceClassification:
    return tiny_bert().eval()


def corpus(rows: int = 12, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in draw.integers(3, VOCAB, 40)) for _ in range(rows)]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_each_row_is_what_compare_finds_and_the_float_model_runs_once(model: Any, tokenizer: Any) -> None:
    data = labelled()
    before, calls = weights(model), []
    model.register_forward_hook(lambda *_: calls.append(1))
    names = ["int8_dynamic", "int4_weight_only"]
    found = compare_schemes(model, names, data=data, processing_class=tokenizer, batch_size=16, **QUICK)
    # Quantized copies have the hook too: three batches of each of the three models.
    assert len(calls) == 9
    assert [row.label for row in found.rows] == names
    for row in found.rows:
        quantized = quantize_dynamic(model, row.scheme, progress=False)
        one = compare(model, quantized, data=data, processing_class=tokenizer, batch_size=16, **QUICK)
        (metric,) = one.splits[0].metrics
        (change,) = row.changes
        assert (change.float_value, change.value, change.change) == (
            metric.float_value,
            metric.int8_value,
            metric.delta,
        )
        assert (change.interval, row.agreement) == (metric.interval, one.splits[0].agreement)
        assert (row.size, row.layers) == (one.int8_model.size, one.int8_model.int8_layers)
        assert row.seconds is not None
        assert row.seconds > 0
    assert (found.task, found.samples, found.calibration, found.failed) == ("data", 48, "", {})
    after = weights(model)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_latency_is_measured_for_each_scheme(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_quant.evaluation.latency.MIN_CALLS", 3)
    monkeypatch.setattr("hf_quant.evaluation.latency.BUDGET_SECONDS", 0.0)
    found = compare_schemes(
        tiny_bert(),
        ["int8_dynamic", "int8_weight_only"],
        data=labelled(8),
        processing_class=tokenizer,
        latency_batch_size=2,
        latency_length=7,
        resamples=100,
        progress=False,
    )
    latencies = [row.latency for row in found.rows]
    assert [(x.batch_size, x.length, x.calls) for x in latencies if x] == [(2, 7, 3)] * 2


@pytest.fixture
def glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MRPC's columns in `validation.parquet` and `train.parquet`."""
    monkeypatch.setenv("HF_QUANT_GLUE_DIR", str(tmp_path / "glue"))
    folder = tmp_path / "glue" / "mrpc"
    folder.mkdir(parents=True)
    for split, count in (("validation", 24), ("train", 60)):
        columns = sentences(count, ("sentence1", "sentence2"), seed=count)
        rows = {**columns, "label": [0, 1] * (count // 2), "idx": list(range(count))}
        Dataset.from_dict(rows).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def test_static_is_calibrated_on_the_train_split_of_the_task(glue: Path, model: Any, tokenizer: Any) -> None:
    seen: list[Any] = []
    real = module.quantize

    def spy(model: Any, scheme: Any, calibration: Any, **options: Any) -> Any:
        seen.append(calibration)
        return real(model, scheme, calibration, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "quantize", spy)
        found = compare_schemes(
            model, ["int8_static"], task="mrpc", samples=10, processing_class=tokenizer, max_samples=8, **QUICK
        )
    assert found.calibration == "10 of 60 examples of the train split of mrpc, drawn with seed 0"
    assert (found.samples, found.rows_in_split, found.headline) == (8, 24, "f1")
    assert [change.metric for change in found.rows[0].changes] == ["accuracy", "f1"]
    (calibration,) = seen
    train = Dataset.from_parquet(str(glue / "train.parquet"))
    assert calibration.data.column_names == ["sentence1", "sentence2"]
    assert len(calibration.data) == 10
    assert set(calibration.data["sentence1"]) < set(train["sentence1"])
    assert list(calibration.data["sentence1"]) != list(train["sentence1"])[:10]  # drawn, not the first ones


def test_static_without_data_is_refused_before_anything_runs(glue: Path, model: Any, tokenizer: Any) -> None:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    common = {"processing_class": tokenizer, **QUICK}
    (glue / "train.parquet").unlink()
    with pytest.raises(ValueError, match=r"no train split of 'mrpc' was found \(There is no .*train.parquet"):
        compare_schemes(model, ["int8_static"], task="mrpc", **common)
    with pytest.raises(ValueError, match=r"static schemes need calibration data, and the data came without a task"):
        compare_schemes(model, ["int8_dynamic", "int8_static"], data=labelled(), **common)
    variant = {"equalized": {"scheme": "int8_dynamic", "equalize": "smoothquant"}}
    with pytest.raises(ValueError, match=r"need calibration data"):
        compare_schemes(model, variant, data=labelled(), **common)
    with pytest.raises(ValueError, match=r"a text has no train split. Pass `calibration=`"):
        compare_schemes(tiny_llama(), ["int8_static"], texts=corpus(), processing_class=tiny_tokenizer(), **QUICK)
    assert calls == []


def test_variants_of_a_scheme_and_given_calibration(model: Any, tokenizer: Any) -> None:
    data = labelled()
    variants = {
        "naive": {"scheme": "int8_static", "observer": "minmax"},
        "without queries": {"scheme": "int8_static", "ignore": ["*.query"]},
    }
    texts = data["text"][:12]
    common = {"data": data, "processing_class": tokenizer, **QUICK}
    found = compare_schemes(model, variants, calibration=texts, samples=12, **common)
    assert [row.label for row in found.rows] == list(variants)
    assert [row.options for row in found.rows] == ["observer='minmax'", "ignore=['*.query']"]
    assert found.rows[0].layers - found.rows[1].layers == 2
    assert "the first 12 samples" in found.calibration
    same = compare_schemes(
        model, variants, calibration=Calibration(texts, 12, processing_class=tokenizer, max_length=32), **common
    )
    assert [row.changes for row in same.rows] == [row.changes for row in found.rows]
    # A data set of more columns than the task has gives its texts alone.
    table = Dataset.from_dict({"text": texts, "title": ["w1"] * 12})
    again = compare_schemes(model, variants, calibration=table, samples=12, **{**common, "task": Task("x", ("text",))})
    assert [row.changes for row in again.rows] == [row.changes for row in found.rows]


def test_a_scheme_that_fails_does_not_take_the_others_with_it(model: Any, tokenizer: Any) -> None:
    variants = {
        "broken": {"scheme": "int8_dynamic", "targets": ["nowhere.*"]},
        "sound": {"scheme": "int8_dynamic"},
    }
    common = {"data": labelled(), "processing_class": tokenizer, **QUICK}
    found = compare_schemes(model, variants, **common)
    assert [row.label for row in found.rows] == ["sound"]
    assert "nowhere.*" in found.failed["broken"]
    assert "broken: " in str(found)
    del variants["sound"]
    with pytest.raises(ValueError, match=r"No scheme worked. broken: .*nowhere"):
        compare_schemes(model, variants, **common)


@pytest.mark.parametrize(
    ("schemes", "options", "message"),
    [
        ([], {}, "`schemes` is empty"),
        (["int8_dynamik"], {}, "unknown scheme 'int8_dynamik'; did you mean 'int8_dynamic'"),
        ({"a": {"rounding": "mse"}}, {}, "'a' has no 'scheme' among its options: rounding"),
        ("int8_dynamic", {"data": None}, "Give one thing to measure on"),
        ("int8_dynamic", {"texts": ["w5"]}, "Give one thing to measure on"),
        ("int8_dynamic", {"max_samples": 0}, "`max_samples` is 0"),
        ("int8_dynamic", {"batch_size": 0}, "`batch_size` is 0"),
        ("int8_dynamic", {"resamples": 5}, "`resamples` is 5"),
        ("int8_dynamic", {"latency_length": 99}, "`latency_length` is 99; these models take 1 to 32"),
    ],
)
def test_refusals(schemes: Any, options: dict[str, Any], message: str, model: Any, tokenizer: Any) -> None:
    options = {"data": labelled(8), "processing_class": tokenizer, **QUICK, **options}
    with pytest.raises(ValueError, match=message):
        compare_schemes(model, schemes, **options)


def test_a_quantized_model_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="`float_model` holds int8 layers"):
        compare_schemes(quantize_dynamic(model, progress=False), "int8_dynamic", data=labelled(), **QUICK)


def test_a_language_model_under_schemes() -> None:
    model, tokenizer, texts = tiny_llama().eval(), tiny_tokenizer(), corpus()
    common = {"texts": texts, "processing_class": tokenizer, "max_length": 16, **QUICK}
    found = compare_schemes(model, ["int8_dynamic", "int8_static"], calibration=corpus(4, seed=1), samples=5, **common)
    expected = perplexity(model, tokenizer, texts, length=16, progress=False)
    quantized = quantize_dynamic(model, progress=False)
    after = perplexity(quantized, tokenizer, texts, length=16, progress=False)
    (change,) = found.rows[0].changes
    assert (change.metric, change.float_value, change.value) == ("perplexity", expected.value, after.value)
    assert change.change == pytest.approx(after.value / expected.value - 1)
    assert change.interval.low < change.interval.high
    assert (found.samples, found.tokens, found.max_length) == (expected.windows, expected.tokens, 16)
    assert found.calibration == "5 of 10 windows of the text given for it, drawn with seed 0"
    drawn = compare_schemes(model, "int8_dynamic", **common, max_samples=7)
    assert (drawn.samples, drawn.rows_in_split, drawn.tokens) == (7, 30, 7 * 15)


def test_two_language_models_as_folders(tmp_path: Path) -> None:
    model, tokenizer, texts = tiny_llama().eval(), tiny_tokenizer(), corpus()
    model.save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    quantized = quantize(model, "int4_weight_only", progress=False)
    save_quantized(quantized, tmp_path / "int4")
    found = compare_perplexity(tmp_path / "float", tmp_path / "int4", None, texts, length=16, **QUICK)
    values = [perplexity(m, tokenizer, texts, length=16, progress=False).value for m in (model, quantized)]
    (row,) = found.rows
    assert [row.changes[0].float_value, row.changes[0].value] == pytest.approx(values)
    assert (row.label, row.scheme, row.seconds) == ("quantized", "", None)
    assert found.float_model.name == str(tmp_path / "float")
    with pytest.raises(ValueError, match="the two are swapped"):
        compare_perplexity(quantized, model, tokenizer, texts, **QUICK)
    with pytest.raises(ValueError, match="are the same object"):
        compare_perplexity(model, model, tokenizer, texts, **QUICK)


CommandLine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hf_quant_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs `hf-quant ARGUMENTS` in this process; gives exit code, output and errors."""
    monkeypatch.setattr("hf_quant.evaluation.latency.MIN_CALLS", 2)
    monkeypatch.setattr("hf_quant.evaluation.latency.BUDGET_SECONDS", 0.0)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-quant", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


def test_command_line_over_schemes_of_a_task(
    hf_quant_cli: CommandLine, glue: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    report = tmp_path / "report"
    schemes = ["--schemes", "int8_dynamic, int8_static,", "--samples", 7]
    code, out, err = hf_quant_cli("compare", tmp_path / "float", *schemes, "--task", "mrpc", "-o", report)
    assert code == 0, err
    assert "mrpc: float against 2 schemes" in out
    assert "Calibrated on 7 of 60 examples of the train split" in out
    values = json.loads((report / "report.json").read_text(encoding="utf-8"))
    assert [row["label"] for row in values["rows"]] == ["int8_dynamic", "int8_static"]
    lines = tmp_path / "lines.txt"
    lines.write_text("w1 w2\n\nw3 w4 w5\n", encoding="utf-8")
    code, out, err = hf_quant_cli(
        "compare", tmp_path / "float", "-s", "int8_static", "-t", "mrpc", "--calibration", lines
    )
    assert code == 0, err
    assert "mrpc: float against int8_static" in out


def test_command_line_for_language_models(hf_quant_cli: CommandLine, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    Dataset.from_dict({"text": corpus()}).to_parquet(str(tmp_path / "test.parquet"))
    (tmp_path / "train.txt").write_text("\n".join(corpus(seed=1)), encoding="utf-8")
    files = ["--texts", tmp_path / "test.parquet", "--calibration", tmp_path / "train.txt"]
    options = ["--max-length", 16, "--max-samples", 6, "--batch-size", 2, "--html", tmp_path / "x.html"]
    code, out, err = hf_quant_cli("compare", tmp_path / "float", "-s", "int8_static", *files, *options)
    assert code == 0, err
    assert "perplexity: float against int8_static" in out
    assert "predicted in 6 windows of up to 16 tokens" in " ".join(out.split())
    assert (tmp_path / "x.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    save_quantized(quantize_dynamic(model, progress=False), tmp_path / "int8")
    code, out, err = hf_quant_cli("compare", tmp_path / "float", tmp_path / "int8", *files[:2])
    assert code == 0, err
    assert "perplexity: float against quantized" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a", "--task", "mrpc"], "Give the INT8 model to measure, or --schemes"),
        (["a", "b", "--schemes", "int8_dynamic"], "not both"),
        (["a", "b", "--calibration", "c.txt"], "it needs --schemes"),
        (["a", "-s", "int8_dynamic", "--texts", "c.txt", "--task", "mrpc"], "leave out --task"),
        (["a", "-s", " ,", "--texts", "{tmp}/c.txt"], "`schemes` is empty"),
        (["a", "-s", "int8_dynamic", "--texts", "nowhere.txt"], "There is no text file nowhere.txt"),
    ],
)
def test_command_line_refusals(hf_quant_cli: CommandLine, tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "c.txt").write_text("w1 w2")
    code, out, err = hf_quant_cli("compare", *(part.replace("{tmp}", str(tmp_path)) for part in arguments))
    assert (code, out) == (2, "")
    assert expected in err
