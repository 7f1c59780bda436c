"""Which kernel multiplies a layer's weight fastest on this machine: measured once, and remembered.

Times are kept in `kernels.json` in `~/.cache/hf_quant`, or in the folder that the environment variable
`HF_QUANT_CACHE` names; `HF_QUANT_CACHE=off` keeps them in memory only, as does a folder that cannot be written.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cpu, products

logger = logging.getLogger(__name__)

BUCKETS = (1, 8, 32, 128, 1024)  # of tokens; each up to its number, the last everything
SCHEMA = "hf_quant.kernels/2"  # raised when kernels change so much that old times mislead
GAIN = 0.9  # another kernel than the preferred one has to take less than this share of its time

_SECONDS = 0.04  # for one bucket, so with the screening 0.3 for a shape
_ROUNDS, _LEAST_ROUNDS = 25, 3
_SCREEN_TOKENS, _SCREEN = 32, 3.0  # a kernel that takes three times the fastest one's time there is not timed at more
_VALUES = 2**21  # of a weight, at most
_COPIES = 16  # of a weight, at most

Calls = Callable[[int], Mapping[str, Callable[[int], object]]]  # tokens -> by kernel, what runs it on the i-th weight

_times: dict[str, dict[str, float]] = {}


def bucket(tokens: int) -> int:
    """The bucket that a number of tokens falls into."""
    return next((limit for limit in BUCKETS if tokens <= limit), BUCKETS[-1])


def choose(in_features: int, out_features: int, tokens: int) -> str:
    """The kernel for products of uint8 activations and an int8 weight, one of `products.KERNELS`.

    Measured at the first call for a shape and bucket on this machine, in less than a tenth of a second.

    Args:
        in_features (`int`): columns of the weight.
        out_features (`int`): rows of the weight.
        tokens (`int`): rows of the activations.
    """
    kernel = fastest(times(in_features, out_features, tokens), products.exact_kernels()[0])
    if not {"vnni", "onednn"} & set(products.exact_kernels()):
        _tell(kernel)
    return kernel


def times(in_features: int, out_features: int, tokens: int) -> dict[str, float]:
    """Microseconds of each kernel that is exact here, for a float32 result with bias; measured if they are not known.

    A kernel that is several times slower than another at fewer tokens is left out. Of a large weight only some rows
    are measured, and the time is scaled.
    """
    names, limit = products.exact_kernels(), bucket(tokens)
    rows = measured_rows(in_features, out_features)
    found = remembered(
        f"int8 {out_features}x{in_features} {limit}", names, lambda: measure(_products(in_features, rows), limit)
    )
    return {name: value * out_features / rows for name, value in found.items()}


def fastest(measured: Mapping[str, float], preferred: str) -> str:
    """The kernel to take: the preferred one where it was measured, unless another is at least 10 % faster."""
    best = min(measured, key=measured.__getitem__)
    known = measured.get(preferred)
    return preferred if known is not None and measured[best] > GAIN * known else best


def measure(calls: Calls, tokens: int) -> dict[str, float]:
    """Time kernels against each other, in turns.

    The least time of each is taken: what else runs on the machine only adds to it.

    Args:
        calls (`Callable`): makes what is timed for a number of tokens.
        tokens (`int`): how many there are.

    Returns:
        `dict`: microseconds by kernel, of those that are worth it.
    """
    timed = calls(tokens)
    if tokens > _SCREEN_TOKENS:
        found = _turns(calls(_SCREEN_TOKENS), _SECONDS / 4)
        timed = {name: timed[name] for name in found if found[name] <= _SCREEN * min(found.values())}
    return _turns(timed, _SECONDS)


def _turns(kernels: Mapping[str, Callable[[int], object]], seconds: float) -> dict[str, float]:
    for call in kernels.values():
        call(0)  # oneDNN generates its code at the first call
    found = dict.fromkeys(kernels, float("inf"))
    start = time.perf_counter()
    for turn in range(_ROUNDS):
        for name, call in kernels.items():
            before = time.perf_counter()
            call(turn + 1)
            found[name] = min(found[name], (time.perf_counter() - before) * 1e6)
        if turn >= _LEAST_ROUNDS - 1 and time.perf_counter() - start > seconds:
            break
    return found


def measured_rows(in_features: int, out_features: int) -> int:
    """How many rows of a weight are measured: all, or as many as make two million values."""
    return min(out_features, max(1, _VALUES // in_features))


def copies(in_features: int, rows: int) -> int:
    """How many copies of a weight a measurement goes through, so that it is not always in the nearest cache."""
    return max(1, min(_COPIES, 4 * _VALUES // (in_features * rows)))


def _products(in_features: int, rows: int) -> Calls:
    integers = torch.full((rows, in_features), 3, dtype=torch.int8)
    beside = products.Rows(integers, torch.full((rows,), 1e-3), torch.zeros(rows))
    weights = {
        kernel: [products.prepare(kernel, integers.clone(), beside) for _ in range(copies(in_features, rows))]
        for kernel in products.exact_kernels()
    }

    def calls(tokens: int) -> dict[str, Callable[[int], object]]:
        quantized = torch.full((tokens, in_features), 100, dtype=torch.uint8)

        def call(kernel: str, turn: int) -> Tensor:
            weight = weights[kernel][turn % len(weights[kernel])]
            return products.product(kernel, quantized, 0.1, 117, weight, beside, torch.float32)

        return {kernel: functools.partial(call, kernel) for kernel in weights}

    return calls


@functools.cache
def _tell(kernel: str) -> None:
    logger.warning(
        "oneDNN's int8 product is missing or saturates on this CPU (%s), as it does without VNNI; %s is used instead.",
        cpu.name(), kernel,
    )  # fmt: skip


# What was measured, in memory and on disk.


def remembered(what: str, names: Collection[str], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Microseconds by kernel from memory, or from the disk, or measured and kept in both.

    Args:
        what (`str`): kind of product, shape of the weight, tokens.
        names (collection of `str`): the kernels that may be used here; other ones were measured elsewhere.
        measure (`Callable`): called if the times are not known for this machine and number of threads.
    """
    key = f"{machine()} | {what} | {' '.join(names)}"
    if key not in _times:
        _times.update(_read(_file()))
    found = _times.get(key)
    if found is None or not set(found) <= set(names):
        found = _times[key] = {name: round(value, 2) for name, value in measure().items()}
        _write(_file(), key, found)
    return found


def machine() -> str:
    """What times depend on beside the product: processor, its features, threads and torch's version."""
    features = " ".join(name for name, there in cpu.features().items() if there)
    return f"{cpu.name()} | {features} | {torch.get_num_threads()} threads | torch {torch.__version__}"


def _file() -> Path | None:
    folder = os.environ.get("HF_QUANT_CACHE", "")
    if folder.lower() == "off":
        return None
    return Path(folder or "~/.cache/hf_quant").expanduser() / "kernels.json"


def _read(file: Path | None) -> dict[str, dict[str, float]]:
    """What a file holds, as far as it is right; nothing where it is damaged or not there."""
    if file is None:
        return {}
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("times"), dict):
        return {}
    return {key: found for key, found in content["times"].items() if _right(found)}


def _right(found: Any) -> bool:
    return isinstance(found, dict) and bool(found) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 for value in found.values()
    )  # fmt: skip


def _write(file: Path | None, key: str, found: dict[str, float]) -> None:
    """Add to the file; what another process wrote at the very same time may be lost, and is then measured again."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, "times": {**_read(file), key: found}}
        handle, beside = tempfile.mkstemp(dir=file.parent, prefix="kernels-", suffix=".json")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(content, stream, indent=1)
            os.replace(beside, file)
        except BaseException:
            os.unlink(beside)
            raise
    except OSError as error:
        _tell_unwritten(str(file), str(error))


@functools.cache
def _tell_unwritten(file: str, error: str) -> None:
    logger.info("Times of kernels are kept in memory only, because %s cannot be written: %s", file, error)
