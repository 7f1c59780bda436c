"""The files that peers load, each made once: `python -m peers.files FOLDER STEP --threads 2`, in benchmarks/.

A step writes the folder of its name, whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cases import read


def int8_static(folder: Path, into: Path, threads: int) -> None:
    import torch

    from hf_quant import quantize_static

    batches = [
        {name: torch.from_numpy(array) for name, array in each.items()}
        for each in read(folder / "cases" / "calibration.npz")
    ]
    quantize_static(_float_model(folder), batches, progress=False).save_pretrained(into)


def int8_dynamic(folder: Path, into: Path, threads: int) -> None:
    from hf_quant import quantize_dynamic

    quantize_dynamic(_float_model(folder), progress=False).save_pretrained(into)


def torch_ao(folder: Path, into: Path, threads: int) -> None:
    from .pytorch import fastest_engine

    (into / "engine.json").write_text(json.dumps(fastest_engine(folder, threads), indent=1))


def onnx(folder: Path, into: Path, threads: int) -> None:
    """`plain.onnx`, and `fused.onnx` by the optimizer for transformers, which wants the tracing exporter's graph."""
    import torch
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    model = _float_model(folder)
    model.set_attn_implementation("eager")
    example = _example(folder)
    torch.onnx.export(
        model,
        (),
        into / "plain.onnx",
        kwargs=example,
        dynamo=False,
        dynamic_axes={name: {0: "batch", 1: "length"} for name in example},
        input_names=list(example),
        output_names=["logits"],
        opset_version=17,
    )
    config = model.config
    optimized = optimize_model(
        str(into / "plain.onnx"),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        optimization_options=FusionOptions("bert"),
        opt_level=0,
    )
    optimized.save_model_to_file(str(into / "fused.onnx"))
    for name in ("plain", "fused"):
        _verify_onnx(folder, into / f"{name}.onnx", threads)


def ort(folder: Path, into: Path, threads: int) -> None:
    candidates = {name: folder / "onnx" / f"{name}.onnx" for name in ("plain", "fused")}
    _keep_fastest(folder, into, threads, candidates)


def ort_dynamic(folder: Path, into: Path, threads: int) -> None:
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    candidates = {}
    for name in ("plain", "fused"):
        candidates[name] = into / f"{name}.onnx"
        quantize_dynamic(
            folder / "onnx" / f"{name}.onnx",
            candidates[name],
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Types are not inferred through fused operators, so the quantizer is told what they give.
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT},
        )
    _keep_fastest(folder, into, threads, candidates)


def ort_static(folder: Path, into: Path, threads: int) -> None:
    """QDQ on the plain graph; ONNX Runtime does not quantize what the fused graph's Attention multiplies."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(read(folder / "cases" / "calibration.npz"))

        def get_next(self) -> Any:
            return next(self.batches, None)

    quantize_static(
        folder / "onnx" / "plain.onnx",
        into / "model.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        op_types_to_quantize=["MatMul"],
        extra_options={"MatMulConstBOnly": True},
    )


def openvino(folder: Path, into: Path, threads: int) -> None:
    """Converted from PyTorch: as fast as from ONNX or faster, because its attention becomes one operation."""
    import openvino as ov

    converted = ov.convert_model(_float_model(folder), example_input=_example(folder))
    ov.save_model(converted, into / "model.xml", compress_to_fp16=False)


def openvino_int8(folder: Path, into: Path, threads: int) -> None:
    import nncf
    import openvino as ov

    batches = read(folder / "cases" / "calibration.npz")
    quantized = nncf.quantize(
        ov.Core().read_model(folder / "openvino" / "model.xml"),
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
    )
    ov.save_model(quantized, into / "model.xml")


# In this order: later ones read what earlier ones wrote.
STEPS: dict[str, Callable[[Path, Path, int], None]] = {
    "int8_static": int8_static,
    "int8_dynamic": int8_dynamic,
    "torch_ao": torch_ao,
    "onnx": onnx,
    "ort": ort,
    "ort_dynamic": ort_dynamic,
    "ort_static": ort_static,
    "openvino": openvino,
    "openvino_int8": openvino_int8,
}
READS = {"ort": "onnx", "ort_dynamic": "onnx", "ort_static": "onnx", "openvino_int8": "openvino"}


def _float_model(folder: Path) -> Any:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification.from_pretrained(folder / "float").eval()


def _example(folder: Path) -> dict[str, Any]:
    """Two short sentences, the second padded: traces then hold a mask and neither size."""
    import torch

    example = {
        name: torch.from_numpy(array[:2, :16]) for name, array in read(folder / "cases" / "batch8.npz")[0].items()
    }
    example["attention_mask"][1, 12:] = 0
    return example


def _verify_onnx(folder: Path, path: Path, threads: int) -> None:
    """The exported graph gives the model's logits for another shape, with padding."""
    import numpy as np

    from .onnx_runtime import session
    from .pytorch import predict_with

    batch = {name: array[:3, :40].copy() for name, array in read(folder / "cases" / "batch8.npz")[0].items()}
    batch["attention_mask"][1, 20:] = 0
    expected = predict_with(_float_model(folder))(batch)
    got = session(path, threads)(batch)
    if not np.allclose(got, expected, rtol=1e-3, atol=1e-4):
        raise ValueError(f"{path.name} gives {got.tolist()}, the model {expected.tolist()}")


def _keep_fastest(folder: Path, into: Path, threads: int, candidates: dict[str, Path]) -> None:
    """Keep the graph that is the fastest for 8 sentences as `model.onnx`, with the seconds of all beside it."""
    from .onnx_runtime import session
    from .pytorch import fastest

    batch = read(folder / "cases" / "batch8.npz")[0]
    seconds = {}
    for name, path in candidates.items():
        predict = session(path, threads)
        seconds[name] = fastest(lambda: predict(batch))  # noqa: B023 - called in this turn of the loop
    kept = min(seconds, key=lambda name: seconds[name])
    shutil.copy(candidates[kept], into / "model.onnx")
    (into / "kept.json").write_text(json.dumps({"graph": kept, "seconds": seconds}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    part = arguments.folder / f"{arguments.step}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    STEPS[arguments.step](arguments.folder, part, arguments.threads)
    part.rename(arguments.folder / arguments.step)


if __name__ == "__main__":
    main()
