"""The command line: what it accepts, what it refuses, exit codes, and what it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

import hf_quant
from hf_quant import cli, load_quantized
from hf_quant.runtime.base import quantized_modules
from tests.reviews import rows, write_files, write_model, write_recipe, write_rows
from tests.tiny import folder_bytes

CommandLine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hf_quant_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs `hf-quant ARGUMENTS` in this process; gives exit code, output and errors."""
    for variable in (cli.TRACEBACK_VARIABLE, "HF_QUANT_GLUE_DIR"):
        # Set first, so that what a command sets is undone too.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-quant", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        code = stopped.value.code
        return int(code or 0), printed.out, printed.err

    return run


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["compare", "--help"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'transformers', 'datasets', 'numpy', 'yaml', 'sklearn')\n"
        "atexit.register(lambda: print('HEAVY', [name for name in heavy if name in sys.modules]))\n"
        f"sys.argv = ['hf-quant', *{arguments!r}]\n"
        "from hf_quant.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout


def test_version_and_commands(hf_quant_cli: CommandLine) -> None:
    assert hf_quant_cli("--version")[:2] == (0, f"{hf_quant.__version__}\n")
    code, out, _ = hf_quant_cli("--help")
    assert code == 0
    assert all(command in out for command in ("run", "quantize", "compare"))
    assert hf_quant_cli("runn")[0] == 2


def test_run_shows_all_recipe_errors_without_a_traceback(hf_quant_cli: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ntask: mrcp\nquantization:\n  schem: int8_static\noutput: o\n")
    code, out, err = hf_quant_cli("run", path)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert lines[0] == "errors:"
    assert lines[1].startswith(f"{path}:2:7: unknown task 'mrcp'")
    assert lines[2] == f"{path}:4:3: unknown key `schem` in `quantization`; did you mean `scheme`?"
    assert "Traceback" not in err
    assert hf_quant_cli("run", tmp_path / "nowhere.yaml")[2].startswith("error: ")


def test_traceback_on_demand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "")
    monkeypatch.setattr(sys, "argv", ["hf-quant", "--traceback", "run", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        cli.main()


def test_run_with_another_output(hf_quant_cli: CommandLine, tmp_path: Path) -> None:
    recipe = write_recipe(write_files(tmp_path), training={"max_steps": 4})
    code, out, err = hf_quant_cli("run", recipe, "--output", tmp_path / "else where")
    assert code == 0, err
    assert f"saved the int8 model to {tmp_path / 'else where' / 'int8'}" in out
    assert not (tmp_path / "out").exists()
    code, _, err = hf_quant_cli("run", recipe, "--output", tmp_path / "else where")
    assert code == 2
    assert "is not empty" in err
    code, _, err = hf_quant_cli("run", recipe, "--overwrite", "--resume")
    assert code == 2
    assert "give one of them" in err


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float classifier with its tokenizer, and MRPC's columns in `glue/mrpc`."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "float", head=True)
    write_rows(folder / "reviews.jsonl", rows(24))
    (folder / "glue" / "mrpc").mkdir(parents=True)
    pairs = {"sentence1": ["a good film", "the plot"] * 8, "sentence2": ["fun", "boring"] * 8, "label": [1, 0] * 8}
    for split in ("train", "validation"):
        Dataset.from_dict(pairs).to_parquet(str(folder / "glue" / "mrpc" / f"{split}.parquet"))
    return folder


def test_quantize_saves_model_and_tokenizer_and_compares(
    hf_quant_cli: CommandLine, float_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "int8"
    arguments = ["quantize", float_model / "float", "--output", output, "--task", "mrpc"]
    code, out, err = hf_quant_cli(*arguments, "--data-dir", float_model / "glue", "--ignore", "*.query")
    assert code == 0, err
    assert f"saved the int8_dynamic model to {output}" in out
    assert "mrpc: float against quantized" in out
    assert f"report: {output / 'report.html'}" in out
    names = quantized_modules(load_quantized(output))
    assert names
    assert not [name for name in names if name.endswith("query")]
    assert AutoTokenizer.from_pretrained(output).decode([5, 6]) == "the a"
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert report["task"] == "mrpc"
    code, _, err = hf_quant_cli("quantize", float_model / "float", "--output", output)
    assert code == 2
    assert "is not empty" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--scheme", "int8_dynamik"], "unknown scheme 'int8_dynamik'; did you mean 'int8_dynamic'?"),
        (["--scheme", "int8_static"], "a static scheme needs `calibration`"),
        (["--targets", "nothing.*"], "nothing.*"),
        (["--task", "mrcp"], "did you mean 'mrpc'?"),
        (["--data-dir", "x"], "name the task with --task"),
        (["--task", "mrpc", "--data-dir", "nowhere"], "There is no nowhere/mrpc/validation.parquet"),
    ],
)
def test_quantize_refuses_before_it_writes(
    hf_quant_cli: CommandLine, float_model: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    code, _, err = hf_quant_cli("quantize", float_model / "float", "--output", tmp_path / "int8", *arguments)
    assert code == 2
    assert expected.lower() in err.lower()
    assert folder_bytes(tmp_path) == {}


def test_quantize_without_a_tokenizer_says_so(hf_quant_cli: CommandLine, float_model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    AutoModelForSequenceClassification.from_pretrained(float_model / "float").save_pretrained(bare)
    code, _, err = hf_quant_cli("quantize", bare, "--output", tmp_path / "int8")
    assert code == 0
    assert f"{bare} has no tokenizer or processor beside it; none is saved" in err
    assert {path.name for path in (tmp_path / "int8").iterdir()} == {"config.json", "model.safetensors"}


def test_quantize_keeps_the_processor_of_a_model_without_words(hf_quant_cli: CommandLine, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    layers = {"conv_dim": (32,), "conv_kernel": (10,), "conv_stride": (5,), "num_conv_pos_embeddings": 16}
    config = Wav2Vec2Config(**sizes, **layers, num_feat_extract_layers=1, num_conv_pos_embedding_groups=2)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(tmp_path / "sound")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "sound")
    code, _, err = hf_quant_cli("quantize", tmp_path / "sound", "--output", tmp_path / "int8")
    assert code == 0, err
    assert (tmp_path / "int8" / "preprocessor_config.json").is_file()


def test_compare_writes_what_was_asked_for(hf_quant_cli: CommandLine, float_model: Path, tmp_path: Path) -> None:
    int8 = tmp_path / "int8"
    assert hf_quant_cli("quantize", float_model / "float", "-o", int8)[0] == 0
    both = [float_model / "float", int8]
    own = ["--data", float_model / "reviews.jsonl", "--text-column", "text", "--max-samples", "16"]
    files = {kind: tmp_path / f"my.{kind}" for kind in ("json", "markdown", "html")}
    options = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    code, out, err = hf_quant_cli("compare", *both, *own, "--metric", "f1", *options)
    assert code == 0, err
    assert "reviews" in out or "data" in out
    report = json.loads(files["json"].read_text(encoding="utf-8"))
    assert [metric["name"] for metric in report["splits"][0]["metrics"]] == ["f1"]
    assert report["splits"][0]["samples"] == 16
    assert files["markdown"].read_text(encoding="utf-8").count("|") > 10
    assert files["html"].read_text(encoding="utf-8").lstrip().startswith("<!")
    before = folder_bytes(tmp_path)
    code, _, err = hf_quant_cli("compare", *both, *own, "--json", files["json"])
    assert code == 2
    assert f"{files['json']} exists already" in err
    assert folder_bytes(tmp_path) == before

    folder = tmp_path / "report"
    code, out, err = hf_quant_cli("compare", *both, "--task", "mrpc", "--data-dir", float_model / "glue", "-o", folder)
    assert code == 0, err
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "report.html"}
    assert f"report: {folder / 'report.html'}" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Nothing to compare on"),
        (["--text-column", "text"], "it needs --data and no --task"),
        (["--data", "x.csv", "--data-dir", "y"], "with --data, leave it out"),
        (["--data", "x.csv"], "There is no data file x.csv"),
        (["--task", "mrcp"], "did you mean 'mrpc'?"),
    ],
)
def test_compare_refuses(hf_quant_cli: CommandLine, float_model: Path, arguments: list[str], expected: str) -> None:
    code, out, err = hf_quant_cli("compare", float_model / "float", float_model / "float", *arguments)
    assert (code, out) == (2, "")
    assert expected.lower() in err.lower()


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hf_quant.cli", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(hf_quant.__file__).parents[1])},
    )
    assert (done.returncode, done.stdout) == (0, f"{hf_quant.__version__}\n")


def test_quantize_with_calibration_overrides_and_the_guard(
    hf_quant_cli: CommandLine, float_model: Path, tmp_path: Path
) -> None:
    code, out, err = hf_quant_cli(
        "quantize", float_model / "float", "-o", tmp_path / "int8", "--scheme", "int8_static", "--task", "mrpc",
        "--data-dir", float_model / "glue", "--samples", "8", "--observer", "minmax", "--rounding", "gptq",
        "--equalize", "smoothquant",
        "--correct-bias", "--override", "*.query=int8_dynamic", "--override", "*.key=float", "--max-drop", "0.5",
        "--metric", "accuracy",
    )  # fmt: skip
    assert code == 0, err
    assert "accuracy: float" in out, "the guard's table"
    assert f"what each layer costs: {tmp_path / 'int8' / 'guard.html'}" in out
    assert "<svg" in (tmp_path / "int8" / "guard.html").read_text()
    assert "accuracy" in (tmp_path / "int8" / "guard.md").read_text()
    config = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert any(r"\.key$" in name for name in config["ignore"])
    assert sorted(config["config_groups"]) == ["embedding", "layers_linear_int8_dynamic_int-quantized", "linear"]
    assert (tmp_path / "int8" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-drop", "0.1"], "--max-drop holds the metric of a task; name the task with --task."),
        (["--metric", "f1"], "--metric and --relative say what --max-drop means; give --max-drop."),
        (["--override", "query"], "--override 'query' is not PATTERN=SCHEME."),
        (["--override", "*.query=int9"], "unknown scheme 'int9'"),
        (["--rounding", "up"], "unknown rounding 'up'"),
        (["--equalize", "awk"], "unknown equalize 'awk'; did you mean 'awq'?"),
        (["--calibration", "nowhere.parquet"], "There is no data file nowhere.parquet"),
    ],
)
def test_options_of_quantize_that_do_not_fit(
    hf_quant_cli: CommandLine, float_model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, _, err = hf_quant_cli("quantize", float_model / "float", "-o", tmp_path / "int8", *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "int8").exists()


def test_quantize_calibrates_on_a_file_of_texts(hf_quant_cli: CommandLine, float_model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a good film\n\nthe plot\n")
    calibration = ["--calibration", tmp_path / "texts.txt"]
    folder = tmp_path / "int8"
    code, _, err = hf_quant_cli("quantize", float_model / "float", "-o", folder, "-s", "int8_static", *calibration)
    assert code == 0, err
    assert (tmp_path / "int8" / "model.safetensors").is_file()
