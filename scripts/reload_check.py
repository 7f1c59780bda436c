"""Shows that an int8 folder needs no hf_quant: reloads it with plain transformers, and compares the logits.

This process refuses `import hf_quant`. A second one loads the same folder into int8 modules through hf_quant, which
is how it runs fast, and hands its logits over in a file.
"""

from __future__ import annotations

import argparse
import importlib.abc
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BATCH_SIZE = 32
# Decompressed float products round otherwise than integer ones; now and then a value crosses a rounding step.
MOST_CHANGED = 0.005


class NoHfQuant(importlib.abc.MetaPathFinder):
    """Makes `import hf_quant` fail, installed or not."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        if fullname.split(".")[0] == "hf_quant":
            raise ModuleNotFoundError(f"{fullname} is blocked in this process", name=fullname)


def predict(model: Any, folder: Path, texts: list[str], max_length: int) -> Any:
    """Logits of shape (texts, labels), float32, in batches that are the same for every model."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    logits = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH_SIZE):
            batch = texts[start : start + BATCH_SIZE]
            encoded = tokenizer(batch, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            logits.append(model(**encoded).logits.float().numpy())
    return np.concatenate(logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="int8 folder")
    parser.add_argument("data", type=Path, help="Parquet file with the columns `text` and `label`")
    parser.add_argument("--max-length", type=int, default=128, help="tokens at which texts are cut")
    parser.add_argument("--hf-quant-logits", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    length = arguments.max_length
    if arguments.hf_quant_logits is None:
        sys.meta_path.insert(0, NoHfQuant())

    import numpy as np
    import pyarrow.parquet
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = pyarrow.parquet.read_table(arguments.data).to_pylist()
    rows.sort(key=lambda row: len(row["text"]))  # texts of one length together: less padding, less work
    texts, labels = [row["text"] for row in rows], np.array([row["label"] for row in rows])

    if arguments.hf_quant_logits is not None:
        from hf_quant import load_quantized

        np.save(arguments.hf_quant_logits, predict(load_quantized(arguments.model), arguments.model, texts, length))
        return

    model = transformers.AutoModelForSequenceClassification.from_pretrained(arguments.model)
    plain = predict(model, arguments.model, texts, length)
    if any(name.split(".")[0] == "hf_quant" for name in sys.modules):
        raise SystemExit("hf_quant was imported after all")
    with tempfile.TemporaryDirectory() as scratch:
        logits = Path(scratch) / "logits.npy"
        command = [sys.executable, __file__, str(arguments.model), str(arguments.data)]
        command += ["--max-length", str(length), "--hf-quant-logits", str(logits)]
        subprocess.run(command, check=True)
        int8 = np.load(logits, allow_pickle=False)

    accuracy = [float((values.argmax(-1) == labels).mean()) for values in (plain, int8)]
    changed = float((plain.argmax(-1) != int8.argmax(-1)).mean())
    print(f"  plain transformers {transformers.__version__}, no hf_quant: accuracy {accuracy[0]:.4f}")
    print(f"  hf_quant.load_quantized, int8 modules:    accuracy {accuracy[1]:.4f}")
    print(f"  largest difference of a logit {np.abs(plain - int8).max():.2g}; changed predictions {changed:.2%}")
    if changed > MOST_CHANGED:
        raise SystemExit(f"more than {MOST_CHANGED:.1%} of the predictions changed: the reload is not the same model")


if __name__ == "__main__":
    main()
