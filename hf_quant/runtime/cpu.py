"""What this machine's processor can do, as far as the speed of int8 and bfloat16 depends on it."""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
import sys

import torch

logger = logging.getLogger(__name__)

# Ours: torch's name. x86 first, then ARM.
_FEATURES = {
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx2": "avx2",
    "dotprod": "dot",
    "i8mm": "i8mm",
    "bf16": "bf16",
}


def features() -> dict[str, bool]:
    """Which instructions the processor has that multiply int8 or bfloat16, and AVX2; `dotprod`, `i8mm` and `bf16`
    are ARM's."""
    found = torch.cpu.get_capabilities()
    return {ours: bool(found.get(theirs, False)) for ours, theirs in _FEATURES.items()}


def native_bfloat16() -> str | None:
    """Torch's name of what multiplies bfloat16 on this processor; `None` if nothing does."""
    found = torch.cpu.get_capabilities()
    return next((name for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16") if found.get(name)), None)


def name() -> str:
    """The processor's name as it gives it, or its architecture where it gives none."""
    named = torch.cpu.get_capabilities().get("cpu_name")
    return str(named or platform.processor() or platform.machine()).strip()


@functools.cache
def compiler_available() -> bool:
    """Whether Inductor finds a C++ compiler; where it does not, models run rewritten but not compiled."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # Inductor's own error class moved between releases
        logger.warning(
            "no C++ compiler was found (%s): models run without compiled kernels. Install g++ or clang.", error
        )
        return False
    return True


def give_back_memory() -> None:
    """Gives free memory back to the system: glibc keeps what lies below something that is in use."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)
