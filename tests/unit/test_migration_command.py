"""`hf-quant migrate`: what it writes and refuses, that it runs nothing, and that no input ends in a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hf_quant
from hf_quant import cli
from hf_quant.migration import MigrationError, migrate
from hf_quant.recipe.schema import Recipe
from tests.unit.test_migration import COMPRESSOR, NNCF, TORCH, made
from tests.unit.test_migration_sparseml import OBERT

torch.set_num_threads(1)

CommandLine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hf_quant_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-quant", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


def test_the_command_writes_a_recipe_at_which_a_run_stops(hf_quant_cli: CommandLine, tmp_path: Path) -> None:
    source, output = tmp_path / "config.json", tmp_path / "new" / "recipe.yaml"
    source.write_text(NNCF)
    code, out, err = hf_quant_cli("migrate", source, "--output", output, "--model", "./nowhere")
    assert (code, err) == (0, "")
    assert "warning: 7 without an equivalent" in out
    assert "quantization.overflow_fix: disable" in out
    assert Recipe.from_yaml(output).model == "./nowhere"
    code, _, err = hf_quant_cli("run", output)
    assert code == 2
    assert "./nowhere is no folder" in err
    assert "FILL-IN/train.csv" in err

    before = output.read_bytes()
    code, _, err = hf_quant_cli("migrate", source, "--output", output)
    assert code == 2
    assert "exists already" in err
    assert output.read_bytes() == before
    assert hf_quant_cli("migrate", source, "-o", output, "--overwrite", "--task", "mrpc")[0] == 0
    assert Recipe.from_yaml(output).task == "mrpc"
    code, _, err = hf_quant_cli("migrate", source, "-o", source, "--overwrite")
    assert code == 2
    assert "is the file to be read" in err
    assert source.read_text() == NNCF


def test_without_output_the_recipe_can_be_piped(hf_quant_cli: CommandLine, tmp_path: Path) -> None:
    source = tmp_path / "recipe.yaml"
    source.write_text("- !GMPruningModifier {final_sparsity: 0.5, start_epoch: 2, end_epoch: 4}\n")
    code, out, err = hf_quant_cli("migrate", source, "--epochs", "8", "-t", "sst2", "-m", "m")
    assert code == 0
    assert "GMPruningModifier.start_epoch" in err
    path = tmp_path / "piped.yaml"
    path.write_text(out)
    assert Recipe.from_yaml(path).pruning[0].start_step == 0.25
    code, out, err = hf_quant_cli("migrate", source, "--task", "mrcp")
    assert (code, out) == (2, "")
    assert "unknown task 'mrcp'" in err


def test_nothing_of_a_source_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    call = f"open({str(mark)!r}, 'w')"
    texts = [
        f"import torch\n{call}\nmodel.qconfig = get_default_qat_qconfig({call})\n",
        f"modifiers:\n  - !!python/object/apply:builtins.open [{mark}, w]\n",
        f'modifiers:\n  - !GMPruningModifier\n      final_sparsity: "eval({call})"\n',
    ]
    for text in texts:
        try:
            made(tmp_path, text)
        except MigrationError:
            continue
    assert not mark.exists()


def test_remarks_name_options_that_there_are() -> None:
    commands = {path.stem: path.read_text() for path in (Path(hf_quant.__file__).parent / "commands").glob("*.py")}
    named = set()
    for path in (Path(hf_quant.__file__).parent / "migration").glob("*.py"):
        found = re.findall(r"hf-quant (\w+)(?: MODEL)? (--[a-z-]+)", path.read_text())
        named |= set(found)
    assert len(named) > 5
    for command, option in named:
        assert f'"{option}"' in commands[command], f"hf-quant {command} has no {option}"


def test_aliases_that_blow_up_are_refused(tmp_path: Path) -> None:
    rows = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    with pytest.raises(MigrationError, match="more than 100000 values"):
        made(tmp_path, "\n".join(rows) + "\nmodifiers: []\n")
    with pytest.raises(MigrationError, match="nested more than 100 deep"):
        made(tmp_path, "a: &a [*a]\nmodifiers: []\n")


def test_importing_migration_imports_no_torch() -> None:
    code = "import sys, hf_quant.migration; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False False\n", done.stderr


SOURCES = {"a.md": OBERT, "b.json": NNCF, "c.yaml": COMPRESSOR, "d.py": TORCH}
WORDS = ["", "null", "-1", "1e999", "{}", "[]", "[1, 2]", "eval(1/0)", "true", "'", '"', "\t", "\ud7ff", "!X", "&a",
         "*a", "re:(", "0x1", "1_0", "12:30", "2001-01-01", "<<", "\\uD800", "\x07", "2:4", "nan", "9" * 400,
         "[" * 2000]  # fmt: skip


def migrated_or_refused(path: Path) -> None:
    """Either there is a recipe that can be written and shown, or one message that names the file."""
    refusal = ""
    try:
        migration = migrate(path)
    except MigrationError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith(str(path))
    else:
        assert migration.notes
        assert migration.text.encode("utf-8")
        migration.table()


@given(st.sampled_from(sorted(SOURCES)), st.data())
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_files_never_end_in_a_traceback(tmp_path: Path, name: str, data: st.DataObject) -> None:
    text = SOURCES[name]
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 12)))
        text = text[:start] + data.draw(st.sampled_from(WORDS) | st.text(max_size=4)) + text[end:]
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    migrated_or_refused(path)


KEYS = ["params", "algorithm", "weights", "pattern", "op_names", "weight", "dtype", "scheme", "final_sparsity"]
scalars = st.none() | st.booleans() | st.integers(-5, 50) | st.floats(allow_nan=False) | st.sampled_from(["x", "re:a"])
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)


@given(trees, st.sampled_from(sorted(SOURCES)), st.integers(0, 60))
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_of_other_kinds_never_end_in_a_traceback(tmp_path: Path, value: object, name: str, at: int) -> None:
    found = list(re.finditer(r"(?<=: )[^\s{\[,][^,\n{}\[\]]*", SOURCES[name]))
    one = found[at % len(found)] if found else re.search("x86", SOURCES[name])
    assert one is not None
    path = tmp_path / name
    path.write_text(SOURCES[name][: one.start()] + json.dumps(value) + SOURCES[name][one.end() :])
    migrated_or_refused(path)
