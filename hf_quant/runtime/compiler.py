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

from .attention import attention, plain_attention
from .ops import Layer
from .rewrite import Rewritten, merged_layer, rewrite

logger = logging.getLogger(__name__)

# Above it, whole scores no longer fit into a CPU's caches, and tile by tile is faster.
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
        bfloat16 (`bool`): whether attention multiplies in bfloat16.
    """

    def __init__(self, model: nn.Module, layers: dict[int, Layer], compile: bool, bfloat16: bool) -> None:
        forward = model.forward
        functools.update_wrapper(self, forward, updated=())
        self.graphs: list[Rewritten] = []
        self._model = weakref.ref(model)
        self._layers = layers
        self._merged: dict[tuple[int, ...], Layer] = {}
        self._compile = compile and compiler_available()
        self._lock = threading.Lock()
        self._forward, self._bfloat16 = forward, bfloat16
        self._whole, self._parts = self._compiled(whole=True), self._compiled(whole=False)
        self._in_parts = False

    def _compiled(self, whole: bool) -> list[Callable[..., Any]]:
        """Forwards for short and for long inputs; nothing is compiled before they are called."""
        # Weights and settings of a model that is used and not trained do not change, so graphs need not ask. But where
        # a graph breaks, the rest of a layer's forward is compiled by itself, once for all layers of its class: there
        # only the guards tell one layer from another.
        options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe} if whole else {}
        return [
            torch.compile(  # type: ignore[call-overload]  # its overloads lack the last arguments
                self._forward,
                backend=functools.partial(self._backend, products),
                fullgraph=whole,
                recompile_limit=_GRAPHS,
                isolate_recompiles=True,
                options=options,
            )
            for products in (self._bfloat16, False)
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's forward.

        Raises:
            `RuntimeError`: in training mode.
        """
        model = self._model()
        if model is not None and model.training:
            raise RuntimeError("an optimized model is for inference: call model.eval(), or train a float checkpoint.")
        long = _length(args, kwargs) > LONGEST_PRODUCTS
        # Graphs depend on these modes: all callers are to share them.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, _any_shape, (args, kwargs))
            if self._in_parts:
                return self._parts[long](*args, **kwargs)
            try:
                return self._whole[long](*args, **kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # before anything ran
                reason = str(error).split("\n")[0]
            output = self._parts[long](*args, **kwargs)  # raises what is the caller's mistake
            logger.warning("the forward is captured in parts, which is slower: %s", reason)
            self._in_parts = True
            return output

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimized model can be neither copied nor pickled: its weights are in the layout of this machine. "
            "Save it with save_pretrained, or copy it before hf_quant.optimize."
        )

    def _backend(self, bfloat16: bool, module: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        function = (attention if self._compile else plain_attention) if bfloat16 else None
        with self._lock:
            found = rewrite(module, self._merge, function)
            self.graphs.append(found)
        if not self._compile:
            return module.forward
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        # The number of threads is that of the call, not of the compilation.
        with config.patch({"cpp.dynamic_threads": True}):
            return cast(Callable[..., Any], compile_fx(module, inputs))

    def _merge(self, layers: list[Layer]) -> Layer:
        key = tuple(layer.number for layer in layers)
        if key not in self._merged:
            self._merged[key] = merged_layer(layers)
        return self._merged[key]


def _any_shape(tensor: Tensor) -> Tensor:
    """An alias, or a copy, whose first two dimensions a graph may not take for fixed."""
    alias = tensor.clone() if tensor.is_inference() else tensor.detach()  # graphs tell the two apart
    for dim in range(min(2, alias.ndim)):
        if alias.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(alias, dim)
    return alias


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return max(
        (value.shape[1] for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1),
        default=0,
    )


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
