"""Rewriting the graph of a quantized model, found by structure: fewer, larger integer products."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from . import ops, vnni, vnni_ops
from .between import (
    Attention,
    args_of,
    end_products_in_norms,
    fuse_norms,
    join_feed_forward,
    name_of,
    replace_attention,
    round_attention,
)
from .ops import Layer, prepare

_IN_PLACE = ("iadd", "iand", "ifloordiv", "imod", "imul", "ior", "ipow", "isub", "itruediv", "ixor", "setitem")
_POSTS: dict[Any, Callable[[fx.Node], str | None]] = {
    F.relu: lambda node: "relu",
    torch.relu: lambda node: "relu",
    F.gelu: lambda node: {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none"))),
}


@dataclass
class Rewritten:
    """What was found in one graph.

    Args:
        layers (`int`): quantized layers.
        merged (`int`): products that stand for several layers with one input.
        fused (`int`): activation functions that a product took in, with the next layer's rounding if that is static.
        attentions (`int`): attentions, or products of one, by other products than PyTorch's.
        rounded (`int`): attentions that end in the next layer's rounding.
        norms (`int`): layer normalizations by the package's own kernel, with the sum before and the rounding after.
        ended (`int`): of these, the ones that a layer ends in.
        joined (`int`): of these layers, the ones that are one with the layer before them.
    """

    layers: int = 0
    merged: int = 0
    fused: int = 0
    attentions: int = 0
    rounded: int = 0
    norms: int = 0
    ended: int = 0
    joined: int = 0


def rewrite(
    module: fx.GraphModule,
    merge: Callable[[list[Layer]], Layer],
    attentions: Sequence[Attention] = (),
    bfloat16: bool = False,
) -> Rewritten:
    """Rewrites a graph that Dynamo captured, in place; what it computes stays the same up to rounding.

    Args:
        module (`torch.fx.GraphModule`): at the level of torch functions, with example values, for inference.
        merge (callable): makes one layer of several, and is asked once for the same ones.
        attentions (sequence, *optional*): what may stand for `scaled_dot_product_attention`; the first that fits does.
        bfloat16 (`bool`, *optional*, defaults to `False`): whether products around a softmax that a model writes out
            become products of bfloat16.

    Returns:
        [`Rewritten`]: what was done.
    """
    graph, found = module.graph, Rewritten()
    _drop_dropout(graph)
    found.layers = sum(1 for _ in _linears(graph))
    _merge(graph, merge, found)
    for node in list(_linears(graph)):
        _expand(graph, node)
    _fuse(graph, found)
    found.attentions = replace_attention(graph, attentions, bfloat16)
    found.rounded = round_attention(graph)
    if vnni.available():
        found.norms = fuse_norms(graph)
        _call_directly(graph)
        found.ended = end_products_in_norms(graph)
        found.joined = join_feed_forward(graph)
    # No other node: a method that changes its tensor, such as a static cache's, has no users either.
    graph.eliminate_dead_code(lambda node: node.target is not operator.getitem)
    graph.lint()
    module.recompile()
    return found


def _linears(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "call_function" and node.target is ops.linear)


def _layer(node: fx.Node) -> Layer:
    return ops.layer(args_of(node)[1])


def _drop_dropout(graph: fx.Graph) -> None:
    """Takes dropout that does nothing out of the way of what looks at neighbours."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is F.dropout:
            training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
            if training is False:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)


def _merge(graph: fx.Graph, merge: Callable[[list[Layer]], Layer], found: Rewritten) -> None:
    """One product for layers with one input that quantize it alike."""
    groups: dict[tuple[Any, ...], list[fx.Node]] = defaultdict(list)
    changes = 0
    for node in graph.nodes:
        changes += _changes_in_place(node)
        if node.op != "call_function" or node.target is not ops.linear:
            continue
        here = _layer(node)
        # Weights alone are alike in how many bits there are, and scales to a row.
        alike = (here.scheme.activations, here.scheme.symmetric, here.scale, here.zero_point, here.weight_form())
        groups[(node.args[0], alike, changes)].append(node)
    for nodes in groups.values():
        if len({node.args[1] for node in nodes}) < max(2, len(nodes)):  # alone, or one layer called twice
            continue
        whole = merge([_layer(node) for node in nodes])
        with graph.inserting_before(nodes[0]):
            constants = [_joined(graph, nodes, place) for place in (2, 3)]
            output = graph.call_function(ops.linear, (nodes[0].args[0], whole.number, *constants))
            start = 0
            for node in nodes:
                width = _layer(node).out_features
                part = graph.call_function(torch.narrow, (output, -1, start, width))
                part.meta = dict(node.meta)
                node.replace_all_uses_with(part)
                start += width
        for node in nodes:
            graph.erase_node(node)
        found.merged += 1


def _changes_in_place(node: fx.Node) -> bool:
    """Whether a value, maybe the input of layers before and after it, is written over."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return in_place or node.kwargs.get("inplace") is True or "out" in node.kwargs


def _joined(graph: fx.Graph, nodes: list[fx.Node], place: int) -> fx.Node | None:
    """One operand of several layers, side by side; where only some have a bias, the others' is 0."""
    parts = [node.args[place] for node in nodes]
    if all(part is None for part in parts):
        return None
    zeros = [(_layer(node).out_features,) for node in nodes]
    parts = [
        graph.call_function(torch.zeros, zero) if part is None else part
        for part, zero in zip(parts, zeros, strict=True)
    ]
    return graph.call_function(torch.cat, (parts,))


def _expand(graph: fx.Graph, node: fx.Node) -> None:
    """Quantizing, product and rescaling as nodes of their own, for Inductor to fuse with what is around them."""
    input, number, bias, row_sums = args_of(node)
    here = ops.layer(number)
    value = input.meta.get("example_value")
    if here.scheme.activations is None or (value is not None and _is_empty(value)):
        return
    dtype = torch.float32 if value is None else value.dtype
    with graph.inserting_before(node):
        whole = here.whole() if here.scheme.activations == "dynamic" else None
        if whole is not None:
            wide = graph.call_method("float", (input,)) if dtype != torch.float32 else input
            kind = vnni_ops.KINDS[dtype if dtype == torch.bfloat16 else torch.float32]
            new = graph.call_function(vnni_ops.product_by_token, (wide, whole.number, here.scheme.symmetric, kind, 0))
            if dtype not in (torch.float32, torch.bfloat16):
                new = graph.call_function(torch.Tensor.to, (new, dtype))
        elif here.scheme.activations == "static":
            quantized = graph.call_function(ops.quantize_static, (input, here.scale, here.zero_point))
            wide = dtype if dtype == torch.bfloat16 else torch.float32
            new = _product(graph, quantized, number, here.scale, here.zero_point, wide)
            if dtype != wide:
                new = graph.call_function(torch.Tensor.to, (new, dtype))
        else:
            parts = graph.call_function(ops.quantize_by_token, (input, here.scheme.symmetric))
            quantized, scale, zeros = (graph.call_function(operator.getitem, (parts, index)) for index in range(3))
            product = _product(graph, quantized, number, 1.0, ops.SHIFT, torch.float32)
            beside = (None if here.scheme.symmetric else zeros, row_sums, bias, dtype)
            new = graph.call_function(ops.rescale_by_token, (product, scale, *beside))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _is_empty(value: Tensor) -> bool:
    # A dimension that may vary is never empty: Dynamo makes graphs of their own for sizes of 0 and 1.
    return any(isinstance(size, int) and size == 0 for size in value.shape)


def _product(
    graph: fx.Graph, quantized: fx.Node, number: int, scale: float, zero_point: int, dtype: Any, *post: Any
) -> fx.Node:
    post = post or ("none", 1.0, 0)
    return graph.call_function(ops.product, (quantized, number, scale, zero_point, dtype, *post))


def _fuse(graph: fx.Graph, found: Rewritten) -> None:
    """An activation function as the end of a layer; between two static ones with the second one's rounding."""
    for node in list(graph.nodes):
        if _post(node) is not None and args_of(node)[0].target is vnni_ops.product_by_token:
            found.fused += _end_by_token(graph, node)
            continue
        if node.op != "call_function" or node.target is not ops.quantize_static:
            continue
        _, scale, zero_point = node.args
        between = node.args[0]
        post = _post(between)
        if post is None:
            continue
        product = between.args[0]
        if product.target is not ops.product or len(product.users) > 1:
            continue
        # All that read the activation must be this rounding, else the float values are needed too.
        alike = [
            user for user in between.users if user.target is ops.quantize_static and user.args[1:] == node.args[1:]
        ]
        if len(alike) != len(between.users):
            continue
        quantized, number, in_scale, in_zero_point = product.args[:4]
        with graph.inserting_before(product):
            new = _product(graph, quantized, number, in_scale, in_zero_point, torch.uint8, post, scale, zero_point)
        for user in alike:
            user.replace_all_uses_with(new)
        for done in (*alike, between, product):
            graph.erase_node(done)
        found.fused += 1


def _post(node: fx.Node) -> str | None:
    """The name of a node's activation function, as one that a product knows."""
    return _POSTS.get(node.target, lambda _: None)(node) if node.op == "call_function" else None


def _end_by_token(graph: fx.Graph, node: fx.Node) -> bool:
    layer, post = args_of(node)[0], _post(node)
    if len(layer.users) > 1 or layer.args[-1] != vnni_ops.POSTS["none"] or post is None:
        return False
    layer.args = (*layer.args[:-1], vnni_ops.POSTS[post])
    node.replace_all_uses_with(layer)
    graph.erase_node(node)
    return True


def _call_directly(graph: fx.Graph) -> None:
    """Products by the kernel that is the fastest for any input, without asking each time which that is."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not ops.product:
            continue
        quantized, number, scale, zero_point, dtype, post, out_scale, out_zero_point = node.args
        whole = ops.layer(number).whole()
        if whole is None:
            continue
        end = (vnni_ops.KINDS[dtype], vnni_ops.POSTS[post], out_scale, out_zero_point)
        with graph.inserting_before(node):
            new = graph.call_function(vnni_ops.product, (quantized, whole.number, scale, zero_point, *end))
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def merged_layer(layers: list[Layer]) -> Layer:
    """One layer whose output is that of several with one input, side by side.

    Args:
        layers (list of [`Layer`]): with the same scheme, scale and zero point.
    """
    first = layers[0]
    bias = None
    if any(layer.bias is not None for layer in layers):
        bias = torch.cat([_bias(layer) for layer in layers])
    whole = prepare(
        first.scheme,
        torch.cat([layer.integers for layer in layers]),
        torch.cat([layer.weight_scale.view(layer.out_features, -1) for layer in layers]),
        bias,
        first.scale,
        first.zero_point,
    )
    start = 0
    for layer in layers:
        layer.give_to(whole, start)
        start += layer.out_features
    return whole


def _bias(layer: Layer) -> Tensor:
    return torch.zeros(layer.out_features) if layer.bias is None else layer.bias
