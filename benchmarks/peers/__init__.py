"""What `benchmarks/inference.py` compares, each in a process of its own."""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    """How one peer is shown, made and run.

    `load` is `module:function:argument`; the function takes the folder of files, the number of threads and the
    argument, and returns a function from a batch (int64 arrays by name) to logits. `needs` is the step of
    `peers.files` that makes its files.
    """

    label: str
    load: str
    needs: str = "float"
    kind: str = "peer"


PEERS = {
    "products": Peer("int8 products alone", "products:load:padded", kind="products"),
    "products-unpadded": Peer("int8 products alone, no padding", "products:load:unpadded", kind="products"),
    "float32": Peer("PyTorch float32", "pytorch:plain:float32"),
    "float32-compiled": Peer("PyTorch float32, compiled", "pytorch:compiled:float32"),
    "bf16": Peer("PyTorch bf16", "pytorch:plain:bfloat16"),
    "bf16-compiled": Peer("PyTorch bf16, compiled", "pytorch:compiled:bfloat16"),
    "torch.ao": Peer("torch.ao int8 dynamic", "pytorch:torch_ao:", "torch_ao"),
    "torchao": Peer("torchao int8 dynamic, compiled", "pytorch:torchao:"),
    "ort": Peer("ONNX Runtime float32", "onnx_runtime:load:ort", "ort"),
    "ort-dynamic": Peer("ONNX Runtime int8 dynamic", "onnx_runtime:load:ort_dynamic", "ort_dynamic"),
    "ort-static": Peer("ONNX Runtime int8 static (QDQ)", "onnx_runtime:load:ort_static", "ort_static"),
    "openvino": Peer("OpenVINO float32", "open_vino:load:openvino f32", "openvino"),
    "openvino-bf16": Peer("OpenVINO bf16", "open_vino:load:openvino bf16", "openvino"),
    "openvino-int8": Peer("OpenVINO int8 (NNCF)", "open_vino:load:openvino_int8 f32", "openvino_int8"),
    "openvino-int8-bf16": Peer("OpenVINO int8 (NNCF) + bf16", "open_vino:load:openvino_int8 bf16", "openvino_int8"),
    "static": Peer("hf_quant static", "ours:load:int8_static", "int8_static", "ours"),
    "static-optimize": Peer("hf_quant static, optimize", "ours:optimized:int8_static", "int8_static", "ours"),
    "static-compiled": Peer("hf_quant static, compiled", "ours:compiled:int8_static", "int8_static", "ours"),
    "dynamic": Peer("hf_quant dynamic", "ours:load:int8_dynamic", "int8_dynamic", "ours"),
    "dynamic-optimize": Peer("hf_quant dynamic, optimize", "ours:optimized:int8_dynamic", "int8_dynamic", "ours"),
    "dynamic-compiled": Peer("hf_quant dynamic, compiled", "ours:compiled:int8_dynamic", "int8_dynamic", "ours"),
}
