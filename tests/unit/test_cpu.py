"""What is known of the processor."""

from __future__ import annotations

import pytest
import torch

from hf_quant.runtime import cpu

NAMES = ["amx_int8", "amx_bf16", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx2", "dotprod", "i8mm", "bf16"]


def _report(monkeypatch: pytest.MonkeyPatch, **found: object) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


def test_this_machine() -> None:
    found = cpu.features()
    assert list(found) == NAMES
    assert all(isinstance(value, bool) for value in found.values())
    assert cpu.name()
    if torch.cpu.get_capabilities()["architecture"] == "x86_64":
        assert not any(found[name] for name in ("dotprod", "i8mm", "bf16"))


def test_an_arm_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    _report(monkeypatch, architecture="aarch64", neon=True, dot=True, bf16=True, i8mm=False)
    assert [name for name, there in cpu.features().items() if there] == ["dotprod", "bf16"]


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    _report(monkeypatch, cpu_name="Some CPU @ 2.00GHz   ")
    assert cpu.name() == "Some CPU @ 2.00GHz"
    _report(monkeypatch)
    monkeypatch.setattr(cpu.platform, "processor", lambda: "")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert cpu.name() == "aarch64"
