"""A model's forward, captured by Dynamo, rewritten, and compiled by Inductor or run as it is."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from . import attention, cpu, cuda, vnni, vnni_ops
from .between import Attention
from .ops import Layer
from .rewrite import Rewritten, merged_layer, rewrite

logger = logging.getLogger(__name__)

# Above it, whole scores no longer fit into a CPU's caches, and PyTorch's kernel, which goes tile by tile, is faster.
LONGEST_PRODUCTS = 512
# One graph for each combination of arguments; a model that needs more is better off without graphs.
_GRAPHS = 32


class CompiledForward:
    """A model's forward on rewritten graphs, for inference.

    One graph serves all batch sizes and lengths, another batches of one. Nothing global is changed: Dynamo's and
    Inductor's settings hold while a graph is made. Calls may come from several threads.

    Args:
        model (`torch.nn.Module`): in eval mode.
        layers (`dict[int, Layer]`): of the model, by number; kept alive.
        compile (`bool`): whether Inductor makes kernels of what lies between the products.
        bfloat16 (`bool`): whether attention may multiply in bfloat16, on a CPU.
        integers (`bool`, *optional*, defaults to `False`): whether attention may multiply 16-bit integers, which is
            preferred on CPUs that are made for it.
        device (`str`, *optional*, defaults to `"cpu"`): the type of device; on `"cuda"` graphs stay as they are, and
            one more token on a static cache is one recorded CUDA graph.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[int, Layer],
        compile: bool,
        bfloat16: bool,
        integers: bool = False,
        device: str = "cpu",
    ) -> None:
        forward = model.forward
        functools.update_wrapper(self, forward, updated=())
        self.graphs: list[Rewritten] = []
        self._model = weakref.ref(model)
        self._layers = layers
        self._merged: dict[tuple[int, ...], Layer] = {}
        self._compile = compile and cpu.compiler_available()
        self._lock = threading.Lock()
        self._forward, self._device = forward, device
        self._bfloat16 = bfloat16
        self._integers = integers and vnni.available()
        maker = self._on_cuda if device == "cuda" else self._backend
        self._backends = [functools.partial(maker, kind) for kind in (False, True)]
        self._whole, self._parts = self._compiled(whole=True), self._compiled(whole=False)
        self._in_parts = False

    def _compiled(self, whole: bool) -> list[Callable[..., Any]]:
        """Forwards of each kind: for short and for long inputs; on CUDA for any inputs and for one more token.

        Nothing is compiled before they are called.
        """
        # Weights and settings of a model that is used and not trained do not change, nor does the code that it calls,
        # so graphs need not ask. But where a graph breaks, the rest of a layer's forward is compiled by itself, once
        # for all layers of its class: there only the guards tell one layer from another.
        options = {"guard_filter_fn": _of_the_call} if whole else {}
        return [
            torch.compile(  # type: ignore[call-overload]  # its overloads lack the last arguments
                self._forward,
                backend=backend,
                fullgraph=whole,
                recompile_limit=_GRAPHS,
                isolate_recompiles=True,
                options=options,
            )
            for backend in self._backends
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's forward.

        Raises:
            `RuntimeError`: in training mode.
        """
        if self._device == "cuda" and torch.compiler.is_compiling():  # what is prepared suits any compiler there
            return self._forward(*args, **kwargs)
        model = self._model()
        if model is not None and model.training:
            raise RuntimeError("an optimized model is for inference: call model.eval(), or train a float checkpoint.")
        # Graphs depend on these modes: all callers are to share them.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._device, enabled=False):
            if self._device == "cuda" and _is_step(args, kwargs):
                return self._step(args, kwargs)
            long = self._bfloat16 and not self._integers and _length(args, kwargs) > LONGEST_PRODUCTS
            given = {name: _prepared(value) for name, value in kwargs.items()}
            return self._run(long, tuple(_prepared(value) for value in args), given)

    def _run(self, kind: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._in_parts:
            return self._parts[kind](*args, **kwargs)
        try:
            return self._whole[kind](*args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # before anything ran
            reason = str(error).split("\n")[0]
        output = self._parts[kind](*args, **kwargs)  # raises what is the caller's mistake
        logger.warning("the forward is captured in parts, which is slower: %s", reason)
        self._in_parts = True
        return output

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One more token, as a recorded CUDA graph: launching its kernels one by one takes longer than they run."""
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, _alias, (args, kwargs))
        torch.compiler.cudagraph_mark_step_begin()
        # Copies, because the next step writes its outputs over these.
        return torch.utils._pytree.tree_map_only(Tensor, torch.clone, self._run(True, args, kwargs))

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimized model can be neither copied nor pickled: its weights are in the layout of this machine. "
            "Save it with save_pretrained, or copy it before hf_quant.optimize."
        )

    def _backend(self, long: bool, module: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        bfloat16 = self._bfloat16 and not long
        attentions: list[Attention] = []
        if self._integers:
            attentions.append((vnni.attends, vnni_ops.attention))
        if bfloat16:
            attentions.append((attention.fits, attention.attention if self._compile else attention.plain_attention))
        with self._lock:
            found = rewrite(module, self._merge, attentions, bfloat16)
            self.graphs.append(found)
        cpu.give_back_memory()  # of weights in forms that are not used any more
        if not self._compile:
            return module.forward
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        # The number of threads is that of the call, not of the compilation; a graph need not check its own buffers.
        with config.patch({"cpp.dynamic_threads": True, "size_asserts": False}):
            return cast(Callable[..., Any], compile_fx(module, inputs))

    def _on_cuda(self, recorded: bool, module: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        with self._lock:
            self.graphs.append(Rewritten())
        if not self._compile:
            return module.forward
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        with config.patch({"triton.cudagraphs": recorded}):
            return cast(Callable[..., Any], compile_fx(module, inputs))

    def _merge(self, layers: list[Layer]) -> Layer:
        key = tuple(layer.number for layer in layers)
        if key not in self._merged:
            self._merged[key] = merged_layer(layers)
        return self._merged[key]


def _alias(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor.detach()  # graphs tell the two apart


def _of_the_call(guards: Any) -> list[bool]:
    """Which of Dynamo's guards ask about a call rather than about the model or modules of Python."""
    outside = torch.compiler.skip_guard_on_globals_unsafe(guards)
    return [a and b for a, b in zip(outside, torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards), strict=True)]


def _prepared(value: Any) -> Any:
    """An argument with its tensors of any shape; without a walk through a tree where there is none."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return _any_shape(value)
    return torch.utils._pytree.tree_map_only(Tensor, _any_shape, value)


def _any_shape(tensor: Tensor) -> Tensor:
    """An alias, or a copy, whose first two dimensions a graph may not take for fixed."""
    alias = _alias(tensor)
    for dim in range(min(2, alias.ndim)):
        if alias.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(alias, dim)
    return alias


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return max(
        (value.shape[1] for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1),
        default=0,
    )


def _is_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is one more token on a static cache, by the thread that may replay what is recorded."""
    if threading.current_thread() is not threading.main_thread() or _length(args, kwargs) > 1:
        return False
    return cuda.hold_still(kwargs.get("past_key_values"))
