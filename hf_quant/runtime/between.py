"""Rewriting what lies between the layers of a model's graph: attention and norms."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from . import ops, vnni_ops

# What may stand between a score's product, its softmax and the product with the values.
_BETWEEN = (
    "add",
    "iadd",
    "mul",
    "imul",
    "truediv",
    "sub",
    "float",
    "to",
    "type_as",
    "masked_fill",
    "dropout",
    "contiguous",
)
_VIEWS = ("transpose", "reshape", "view", "contiguous", "flatten", "permute")
_PRODUCTS = (torch.matmul, torch.bmm, operator.matmul)

# What may stand for `scaled_dot_product_attention`, and whether it takes a query, key and value of that kind.
Attention = tuple[Callable[[Tensor, Tensor, Tensor], bool], Callable[..., Tensor]]


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """A node's positional arguments."""
    return node.args


def replace_attention(graph: fx.Graph, attentions: Sequence[Attention], bfloat16: bool) -> int:
    """Other products for attention's: whole, or the two around a softmax that a model writes out; returns how many."""
    count = 0
    masks: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is F.scaled_dot_product_attention:
            count += _whole_attention(graph, node, attentions, masks)
        elif bfloat16 and node.target in (F.softmax, torch.softmax):
            for product in _around(node):
                count += _in_bfloat16(graph, product)
    return count


def _whole_attention(
    graph: fx.Graph, node: fx.Node, attentions: Sequence[Attention], masks: dict[fx.Node, fx.Node]
) -> bool:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, mask, causal = given["query"], given.get("attn_mask"), given.get("is_causal", False)
    values = [given[name].meta.get("example_value") for name in names[:3]]
    if given.get("dropout_p", 0.0) != 0.0 or not isinstance(causal, bool) or any(value is None for value in values):
        return False
    if (
        mask is not None
        and isinstance(mask.meta["example_value"].shape[-1], int)
        and mask.meta["example_value"].shape[-1] == 1
    ):
        return False  # the same for all keys
    attention = next((function for fits, function in attentions if fits(*values)), None)
    if attention is None:
        return False
    scale = given.get("scale")
    if scale is None:
        scale = float(values[0].shape[-1]) ** -0.5
    with graph.inserting_before(node):
        if mask is not None:
            if mask not in masks:
                as_it_is = attention is vnni_ops.attention and mask.meta["example_value"].dtype == torch.bool
                masks[mask] = graph.call_function(ops.bool_mask if as_it_is else ops.additive_mask, (mask,))
            mask = masks[mask]
        new = graph.call_function(attention, (query, given["key"], given["value"], mask, causal, scale))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


def round_attention(graph: fx.Graph) -> int:
    """The rounding of a static layer's input as the end of the attention that it comes from; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not ops.quantize_static:
            continue
        source, scale, zero_point = args_of(node)
        views = []
        while isinstance(source, fx.Node) and len(source.users) == 1 and name_of(source) in _VIEWS:
            views.append(source)
            source = source.args[0]
        if not isinstance(source, fx.Node) or source.target is not vnni_ops.attention or len(source.users) != 1:
            continue
        source.args = (*source.args[:6], scale, zero_point)
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
        for changed in (source, *views):  # their example values are floats
            changed.meta = {}
        count += 1
    return count


def _around(softmax: fx.Node) -> list[fx.Node]:
    """The product of scores before a softmax and the one of values after it, in models that write them out."""
    before, after = softmax.args[0], softmax
    while isinstance(before, fx.Node) and name_of(before) in _BETWEEN:
        before = before.args[0]
    while len(after.users) == 1 and name_of(user := next(iter(after.users))) in _BETWEEN:
        after = user
    found = [before] if isinstance(before, fx.Node) and before.target in _PRODUCTS else []
    return found + [user for user in after.users if user.target in _PRODUCTS and user.args[0] is after]


def name_of(node: fx.Node) -> str:
    """What a node calls, by name."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _in_bfloat16(graph: fx.Graph, product: fx.Node) -> bool:
    value = product.meta.get("example_value")
    if value is None or value.dtype != torch.float32 or value.device.type != "cpu" or value.ndim < 3:
        return False
    with graph.inserting_before(product):
        new = graph.call_function(bfloat16_product, product.args)
    new.meta = dict(product.meta)
    product.replace_all_uses_with(new)
    graph.erase_node(product)
    return True


def bfloat16_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` with factors rounded to bfloat16, as float32."""
    return torch.matmul(left.to(torch.bfloat16), right.to(torch.bfloat16)).float()


def fuse_norms(graph: fx.Graph) -> int:
    """Layer normalization as one kernel with the sum before it and the rounding after it; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not F.layer_norm:
            continue
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        value = given["input"].meta.get("example_value")
        if value is None or value.dtype != torch.float32 or value.device.type != "cpu":
            continue
        if len(given["normalized_shape"]) != 1 or not all(_is_float32(given.get(name)) for name in ("weight", "bias")):
            continue
        first, second = _summands(given["input"])
        rounding = [user for user in node.users if user.target is ops.quantize_static]
        if len({args_of(user)[1:] for user in rounding}) > 1:
            rounding = []
        scale, zero_point = args_of(rounding[0])[1:] if rounding else (None, 0)
        with graph.inserting_before(node):
            beside = (given.get("weight"), given.get("bias"), given.get("eps", 1e-5))
            pair = graph.call_function(vnni_ops.norm, (first, second, *beside, scale, zero_point))
            normed, rounded = (graph.call_function(operator.getitem, (pair, index)) for index in range(2))
        normed.meta = dict(node.meta)
        for user in rounding:
            user.replace_all_uses_with(rounded)
            graph.erase_node(user)
        node.replace_all_uses_with(normed)
        graph.erase_node(node)
        if second is not None:  # else what is added up seems to be used once more
            graph.erase_node(given["input"])
        count += 1
    return count


def _is_float32(parameter: Any) -> bool:
    if parameter is None:
        return True
    value = parameter.meta.get("example_value") if isinstance(parameter, fx.Node) else None
    return value is not None and value.dtype == torch.float32


def _summands(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What is added up, if that is all a sum of two tensors alike is for; else the node itself."""
    if node.op == "call_function" and name_of(node) == "add" and len(node.users) == 1 and not node.kwargs:
        parts = [part.meta.get("example_value") if isinstance(part, fx.Node) else None for part in node.args]
        shape = node.meta["example_value"].shape
        if all(part is not None and part.dtype == torch.float32 and part.shape == shape for part in parts):
            first, second = args_of(node)
            return first, second
    return node, None


def end_products_in_norms(graph: fx.Graph) -> int:
    """A layer and the norm of its output, or of the sum with what went around it, as one; returns how many."""
    count = 0
    plain = (vnni_ops.KINDS[torch.float32], vnni_ops.POSTS["none"])
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not vnni_ops.norm:
            continue
        first, second, *rest = args_of(node)
        for part, other in ((first, second), (second, first)):
            if not isinstance(part, fx.Node) or len(part.users) > 1:
                continue
            arguments = args_of(part)
            if part.target is vnni_ops.product and arguments[4:6] == plain:
                target, kept = vnni_ops.product_norm, arguments[:4]
            elif part.target is vnni_ops.product_by_token and arguments[3:] == (
                vnni_ops.KINDS[torch.float32],
                vnni_ops.POSTS["none"],
            ):
                target, kept = vnni_ops.product_by_token_norm, arguments[:3]
            else:
                continue
            node.target, node.args = target, (*kept, other, *rest)
            graph.erase_node(part)
            count += 1
            break
    return count


def join_feed_forward(graph: fx.Graph) -> int:
    """A layer with its activation function and the layer that reads nothing else, as one; returns how many.

    The second layer has to end in a norm.
    """
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        first = node.args[0]
        if len(first.users) > 1 or first.op != "call_function":
            continue
        before, after = args_of(first), args_of(node)
        if node.target is vnni_ops.product_norm and first.target is vnni_ops.product:
            kind, post, *rounding = before[4:]
            if kind != vnni_ops.KINDS[torch.uint8] or tuple(rounding) != after[2:4]:
                continue
            node.target = vnni_ops.feed_forward
            node.args = (*before[:4], post, *rounding, after[1], *after[4:])
        elif node.target is vnni_ops.product_by_token_norm and first.target is vnni_ops.product_by_token:
            kind, post = before[3:]
            if kind != vnni_ops.KINDS[torch.float32] or before[2] != after[2]:
                continue
            node.target = vnni_ops.feed_forward_by_token
            node.args = (*before[:3], post, after[1], *after[3:])
        else:
            continue
        graph.erase_node(first)
        count += 1
    return count
