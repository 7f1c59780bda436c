"""`hf-quant inspect`: what it prints and writes, and what cannot be inspected."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_quant import cli, quantize, save_quantized
from hf_quant.inspection import inspect_folder
from hf_quant.runtime import cpu
from tests.tiny import int8_model, tiny_bert
from tests.unit.test_inspection import ATTENTION, pruned_bert


def test_what_is_printed(tmp_path: Path) -> None:
    pruned_bert().save_pretrained(tmp_path)
    text = str(inspect_folder(tmp_path))
    rows = [re.split(r" {2,}", line) for line in text.splitlines() if line.startswith(("bert.", "classifier"))]
    assert len(rows) == 11, "layers that differ by their number share a row"
    of = {row[0]: row[1:] for row in rows}
    query, value = (of[ATTENTION.format("*", name)] for name in ("query", "value"))
    assert query == ["2", "float32 linear", "32 x 32", "62.5 (50.0 to 75.0)", "1:4/2:4", "0.01"]
    assert value[0] == "2"
    assert value[4] == "3 zero rows, 2 zero columns"
    assert of["classifier"] == ["1", "float32 linear", "2 x 32", "0", "0.00"], "nothing found, nothing said"
    flat = " ".join(text.split())
    found = inspect_folder(tmp_path)
    assert f"{found.weights:,} weights, {found.zeros:,} of them zero" in flat
    assert f"Zipped it would take about {found.zip_bytes / 1e6:.2f} MB (zlib level 6)" in flat
    assert "no smaller and no faster" in flat
    assert "No maintained sparse layout can be reloaded by plain transformers" in flat
    with torch.no_grad():
        model = tiny_bert()
        model.bert.embeddings.word_embeddings.weight.fill_(1.0)
    model.save_pretrained(tmp_path)
    assert "no faster" not in str(inspect_folder(tmp_path)), "without zeros there is nothing to say of them"


def test_the_command(tmp_path: Path) -> None:
    pruned_bert().save_pretrained(tmp_path / "model")
    found = inspect_folder(tmp_path / "model")
    run, report = CliRunner(), tmp_path / "found.json"
    done = run.invoke(cli.app, ["inspect", str(tmp_path / "model"), "--json", str(report)])
    assert done.exit_code == 0, done.output
    assert "bert.encoder.layer.*.attention.self.query" in done.output
    values = json.loads(report.read_text(encoding="utf-8"))
    assert values["schema"] == "hf_quant.inspection/1"
    assert values["totals"]["zeros"] == found.zeros
    assert values == {"schema": "hf_quant.inspection/1", **found.to_dict()}
    assert values["modules"][0]["name"] == "bert.embeddings.position_embeddings"

    done = run.invoke(cli.app, ["inspect", str(tmp_path / "model"), "--modules"])
    assert "bert.encoder.layer.0.attention.self.query" in done.output
    assert "bert.encoder.layer.1.attention.self.query" in done.output
    again = ["inspect", str(tmp_path / "model"), "--json", str(report)]
    assert "exists already" in str(run.invoke(cli.app, again).exception)
    assert run.invoke(cli.app, [*again, "--overwrite"]).exit_code == 0


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_QUANT_CACHE", str(tmp_path / "cache"))
    for scheme in ("int8_dynamic", "int4_weight_only"):
        save_quantized(quantize(tiny_bert(), scheme, progress=False), tmp_path / scheme)
    report = tmp_path / "found.json"
    arguments = ["inspect", str(tmp_path / "int8_dynamic"), "--kernels", "--json", str(report)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    rows = [re.split(r" {2,}", line.strip()) for line in done.output.splitlines() if "uint8 x int8" in line]
    found = {row[1]: row for row in rows}
    assert set(found) == {"32 x 32", "48 x 32", "32 x 48"}
    assert found["32 x 32"][2] == "9", "two layers of query, key, value and output, and the pooler"
    assert cpu.name() in done.output
    assert "least of several" in done.output

    stored = json.loads(report.read_text(encoding="utf-8"))["kernels"]
    assert [one["layers"] for one in stored] == [9, 2, 2]
    assert all(set(one["chosen"]) == {"1", "8", "32", "128", "1024"} for one in stored)
    one = stored[0]
    chosen, times = one["chosen"]["8"], one["microseconds"]["8"]
    words = f"{chosen} {times[chosen]:,.0f}"
    assert words in found["32 x 32"], "the table says what the file says"

    inspection = inspect_folder(tmp_path / "int4_weight_only", kernels=True)
    assert {one.product for one in inspection.kernels or ()} == {"bfloat16 x int4 by 32"}
    assert "float32 activations of weight-only layers are multiplied" in " ".join(str(inspection).split())


def test_kernels_of_a_float_model(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path)
    found = inspect_folder(tmp_path, kernels=True)
    assert found.kernels == ()
    assert "No Linear layer is quantized, so there is no kernel to choose." in str(found)
    assert inspect_folder(tmp_path).kernels is None
    assert "no kernel to choose" not in str(inspect_folder(tmp_path))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'transformers', 'datasets', 'numpy')\n"
        "atexit.register(lambda: print('HEAVY', [name for name in heavy if name in sys.modules]))\n"
        "sys.argv = ['hf-quant', 'inspect', '--help']\n"
        "from hf_quant.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "HEAVY []" in done.stdout, done.stderr


class TestRefusals:
    def test_a_hub_id(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"org/name is no local folder.* hf download org/name --local-dir"):
            inspect_folder("org/name")

    def test_no_config_and_no_weights(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"has no config\.json, so it is not a model folder"):
            inspect_folder(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors file"):
            inspect_folder(tmp_path)

    def test_damaged_files(self, tmp_path: Path) -> None:
        tiny_bert().save_pretrained(tmp_path)
        config, file = tmp_path / "config.json", tmp_path / "model.safetensors"
        whole = config.read_text()
        for broken in (whole[:-20], "[]"):
            config.write_text(broken)
            with pytest.raises(ValueError, match=r"config\.json is damaged .* Copy or save"):
                inspect_folder(tmp_path)
        config.write_text(whole)
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut off"):
            inspect_folder(tmp_path)

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        tiny_bert().save_pretrained(tmp_path, max_shard_size="20KB")
        next(tmp_path.glob("*.safetensors")).unlink()
        with pytest.raises(FileNotFoundError, match="which its index names"):
            inspect_folder(tmp_path)

    @pytest.mark.parametrize("method", ["bitsandbytes", None])
    def test_another_layout(self, tmp_path: Path, method: str | None) -> None:
        save_quantized(int8_model(tiny_bert(), "int8_dynamic"), tmp_path / "q")
        config = tmp_path / "q" / "config.json"
        values = json.loads(config.read_text())
        values["quantization_config"] = {"quant_method": method} if method else None
        config.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=rf"quant_method {method!r}\. Only float weights and"):
            inspect_folder(tmp_path / "q")

    def test_a_scheme_that_hf_quant_does_not_know(self, tmp_path: Path) -> None:
        save_quantized(int8_model(tiny_bert(), "int8_dynamic"), tmp_path / "q")
        config = tmp_path / "q" / "config.json"
        values = json.loads(config.read_text())
        values["quantization_config"]["config_groups"]["linear"]["weights"]["symmetric"] = False
        config.write_text(json.dumps(values))
        with pytest.raises(ValueError, match="which hf_quant does not run"):
            inspect_folder(tmp_path / "q")

    def test_a_packed_weight_without_its_shape(self, tmp_path: Path) -> None:
        save_quantized(quantize(tiny_bert(), "int4_weight_only", progress=False), tmp_path / "q")
        file, lost = tmp_path / "q" / "model.safetensors", f"{ATTENTION.format(0, 'key')}.weight_shape"
        save_file({key: value for key, value in load_file(file).items() if key != lost}, file)
        with pytest.raises(ValueError, match=rf"lacks {lost}, so it is incomplete"):
            inspect_folder(tmp_path / "q")
