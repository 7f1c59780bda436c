"""An int8 model made fast on the machine it runs on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from . import cpu, vnni
from .base import quantized_modules
from .compiler import CompiledForward
from .half import halve
from .modules import Int8Linear
from .ops import SHIFT, Layer, prepare
from .packed import PackedLinear
from .unpadded import UnpaddedForward

Precision = Literal["auto", "float32", "bfloat16"]
_OVERHEAD = 256  # tokens of padding that are left out as soon as another forward is begun
_LARGEST_ADAPTED = 31 * 2**20  # bytes; from 32 MiB on glibc does not adapt


def optimize(
    model: nn.Module | str | os.PathLike[str],
    example_inputs: Any = None,
    compile: bool = True,
    dtype: Precision = "auto",
) -> Any:
    """Make a quantized model fast on this machine, for inference, in place.

    ```python
    model = optimize(load_quantized("bert-int8"))
    model(**tokenizer(texts, padding=True, return_tensors="pt"))
    ```

    The forward is captured as a graph and rewritten by structure: layers with one input become one product (query,
    key and value); an activation function between two static layers, and the rounding that follows it, become the end
    of the first product. Which kernel multiplies is measured once a machine for each shape (`hf-quant inspect FOLDER
    --kernels`). Inductor makes kernels of the rest. Batches with padding run as several batches with little of it, and
    padding is 0 in outputs, see [`UnpaddedForward`].

    On CPUs with AVX-512 VNNI and without AMX, kernels of this package's own do layers as a whole, normalization and
    attention, and leave padding out; a C++ compiler builds them once a machine. On others, attention multiplies in
    bfloat16 where the CPU does so natively.

    Decoders generate fastest with `cache_implementation="static"`.

    The first call with a new combination of arguments captures a graph, which takes seconds, and minutes where
    Inductor has nothing in its cache on disk; after it, one graph serves all batch sizes and lengths, and another
    batches of one. `model(...)`, `generate` and `pipeline` go on working, from several threads too; saving writes
    what it did before. What comes out differs by the rounding of 16-bit integers or bfloat16 in attention and of
    float16 in a head; with `dtype="float32"` by no more than the rounding of sums. Optimize last: an optimized model
    is not moved, cast, copied or trained.

    On CUDA nothing is rewritten, and batches run with their padding. Weights alone (`int8_weight_only`,
    `int4_weight_only`) are read as integers for up to 16 tokens: int8 in float16 and bfloat16 models; int4 in bfloat16
    ones, which hold it in the layout of PyTorch's kernel. For more tokens each product dequantizes first, and is
    slower than bfloat16's own. Integer activations go through `torch._int_mm` and Inductor's epilogues; from about a
    thousand tokens on, these products were no faster than bfloat16's on an H200 (`benchmarks/results/gpu.json`), so
    expect int8 to save memory there rather than time. A further token on a static cache replays a recorded CUDA graph,
    if it is the main thread that asks.

    Args:
        model (`torch.nn.Module` or `str`): a quantized model, or its folder or hub id for [`load_quantized`].
        example_inputs (`Mapping`, tuple, tensor, or a list of them, *optional*):
            Arguments of the forward, with which graphs are made now instead of at the first call.
        compile (`bool`, *optional*, defaults to `True`):
            Whether Inductor compiles what is between the products, which needs a C++ compiler (without one, a warning
            says so). Otherwise the rewritten graph runs operation by operation: slower, and ready in a second once the
            kernels are built.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Of what is not a product of integers. `"auto"`: float32, but attention's products by 16-bit integers or in
            bfloat16 on CPUs that are made for it, and large float layers (a language model's head) by a float16 copy
            of the weight for a few tokens; `"float32"`: all of it; `"bfloat16"`: all of it, and so are the outputs.

    Returns:
        the same model, in eval mode.

    Raises:
        `ValueError`: if the model is not quantized, is optimized already, or `dtype` is unknown.
    """
    if dtype not in get_args(Precision):
        raise ValueError(f"dtype={dtype!r} is unknown: choose one of {', '.join(get_args(Precision))}.")
    if isinstance(model, (str, os.PathLike)):
        from ..checkpoint import load_quantized

        model = cast(nn.Module, load_quantized(model))
    modules = {name: module for name, module in quantized_modules(model).items() if _has_product(module)}
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no quantized Linear layer, so there is nothing to optimize. Quantize it "
            "first: hf_quant.quantize_dynamic(model), or load an int8 folder with hf_quant.load_quantized."
        )
    if isinstance(model.__dict__.get("forward"), (UnpaddedForward, CompiledForward)):
        raise ValueError(f"this {type(model).__name__} is optimized already. Load it again for other settings.")
    device = next(iter(modules.values())).weight_scale.device
    model.eval()
    layers = {}
    if device.type == "cpu":
        _leave_file(model)
        for module in modules.values():  # before a cast: scales stay float32
            layer = _layer(module)
            layers[layer.number] = layer
            cast(Any, module).optimized = layer.operands()
            if isinstance(module, Int8Linear):
                module.hand_over()
        if dtype != "float32":
            halve(model)
    if dtype == "bfloat16":
        model.to(torch.bfloat16)
    if device.type == "cuda":
        for module in modules.values():  # after a cast: which product takes a weight depends on the dtype
            cast(Any, module).prepare_for_cuda()
        # Without a look at the padding: to read lengths, the processor would wait for the GPU.
        model.forward = CompiledForward(model, {}, compile, False, device="cuda")
    else:
        bfloat16 = dtype == "bfloat16" or (dtype == "auto" and cpu.native_bfloat16() is not None)
        _settle_allocator()
        forward = CompiledForward(model, layers, compile, bfloat16, integers=dtype == "auto")
        config = getattr(model, "config", None)
        if vnni.available():
            model.forward = UnpaddedForward(forward, config, _OVERHEAD, skipping=vnni.skipping_padding)
        else:
            model.forward = UnpaddedForward(forward, config)
    for inputs in _examples(example_inputs):
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*inputs)
    return model


def _has_product(module: nn.Module) -> bool:
    # Groups with dynamic activations have no integer product here; they stay as they are.
    return isinstance(module, Int8Linear) or (isinstance(module, PackedLinear) and module.scheme.activations is None)


def _layer(module: Any) -> Layer:
    bias = None if module.bias is None else module.bias.float()
    ranges: tuple[float, int] | tuple[()] = ()
    if module.scheme.activations == "static":
        ranges = (float(module.input_scale), int(module.input_zero_point) + SHIFT)
    return prepare(module.scheme, module.integers, module.weight_scale.float(), bias, *ranges)


def _settle_allocator() -> None:
    """Lets glibc keep the memory between two layers, and between two calls, instead of giving it back to the kernel.

    It gives back what is free at the top of the heap beyond twice the largest block that it ever mapped and freed. A
    batch frees more than that at its end and has all of it zeroed again, page by page, in the next, which takes longer
    than several layers. One block just below glibc's own bound for what it adapts to is enough; it is never touched.
    """
    torch.empty(_LARGEST_ADAPTED, dtype=torch.uint8)


def _leave_file(model: nn.Module) -> None:
    """Copies what is not handed over out of the file that it is mapped from, which would stay in memory for it."""
    for parameter in model.parameters():
        if _is_mapped(parameter):
            parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not (isinstance(module, Int8Linear) and name == "weight") and _is_mapped(buffer):
                module._buffers[name] = buffer.clone()


def _is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's memory is not torch's own: that of a file, mostly."""
    return not tensor.untyped_storage().resizable()


def _examples(inputs: Any) -> list[Any]:
    """Each example as the arguments of one call."""
    if inputs is None:
        return []
    several = inputs if isinstance(inputs, list) else [inputs]
    return [(one,) if isinstance(one, Tensor) else one for one in several]
