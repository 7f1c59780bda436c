"""`import hf_quant` costs nothing until something of it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hf_quant

HEAVY = ("torch", "transformers", "accelerate", "datasets", "compressed_tensors", "scipy", "sklearn", "matplotlib")


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["hf_quant", "hf_quant.schemes", "hf_quant.errors", "hf_quant.progress"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    out = _run(f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert out.strip() == "[]"


def test_every_public_name_is_there_and_documented() -> None:
    for name in hf_quant.__all__:
        assert getattr(hf_quant, name).__doc__, name
        assert name in dir(hf_quant)


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'QATCallbak'; it has: .*QATCallback"):
        hf_quant.QATCallbak  # noqa: B018


def test_public_names_are_the_documented_ones() -> None:
    assert set(hf_quant.__all__) == set(hf_quant._HOME_OF)


def test_package_says_that_it_is_typed() -> None:
    from importlib.resources import files

    assert (files(hf_quant) / "py.typed").is_file()
