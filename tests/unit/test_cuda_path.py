"""What the CUDA path holds, chooses and refuses, as far as that shows without a GPU; see integration/test_cuda.py."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hf_quant.runtime import compiler, cuda
from hf_quant.runtime.modules import Int8Linear
from hf_quant.runtime.packed import PackedLinear
from hf_quant.schemes import get_scheme
from tests.tiny import tiny_llama

BOUNDS = (torch.tensor(-3.0), torch.tensor(3.0))


def tiled(integers: Tensor, tiles: int) -> Tensor:
    """PyTorch's tile-packed int4 layout, word by word as its kernel writes it."""
    rows, columns = integers.shape
    packed = torch.zeros(rows // 8, columns // (16 * tiles), 32, tiles // 2, dtype=torch.int64)
    unsigned = (integers.long() + 8).tolist()
    for block, outer, lane, word in torch.cartesian_prod(*map(torch.arange, packed.shape)).tolist():
        row = unsigned[block * 8 + lane // 4]
        first = (outer * tiles + 2 * word) * 16 + lane % 4 * 2
        values = [row[first + step] for step in (0, 1, 8, 9, 16, 17, 24, 25)]
        packed[block, outer, lane, word] = sum(
            values[index] << 4 * place for place, index in enumerate((0, 2, 4, 6, 1, 3, 5, 7))
        )
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def int4(in_features: int = 256, out_features: int = 16, name: str = "int4_weight_only") -> PackedLinear:
    weight = torch.randn(out_features, in_features)
    return PackedLinear.from_float(weight.bfloat16(), torch.randn(out_features).bfloat16(), get_scheme(name))


@pytest.mark.parametrize(("tiles", "columns"), [(2, 96), (4, 192), (8, 256)])
def test_integers_of_tiles(tiles: int, columns: int) -> None:
    integers = torch.randint(-8, 8, (16, columns), dtype=torch.int8)
    assert torch.equal(cuda.from_tiles(tiled(integers, tiles)), integers)


@pytest.mark.parametrize(
    ("in_features", "out_features", "group", "bits", "fits"),
    [
        (256, 16, 32, 4, True),
        (96, 8, 96, 4, True),  # one scale a row, in groups of 32
        (48, 8, 48, 4, False),  # no known group divides it
        (256, 12, 32, 4, False),
        (256, 16, 16, 4, False),
        (256, 16, 32, 8, False),
    ],
)
def test_which_weights_are_tiled(in_features: int, out_features: int, group: int, bits: int, fits: bool) -> None:
    assert cuda.fits_tiles(in_features, out_features, group, bits) is fits


@pytest.fixture
def tiles_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were a GPU whose product takes the tiles."""
    monkeypatch.setattr(cuda, "has_tiles", lambda device: True)
    monkeypatch.setattr(cuda, "to_tiles", lambda integers, scale: (tiled(integers, 8), scale))


@pytest.mark.usefixtures("tiles_here")
def test_int4_is_held_once_and_saved_as_before() -> None:
    layer = int4()
    x = torch.randn(2, cuda.FEW_ROWS, 256).bfloat16()  # more than a few rows: no kernel is asked for
    expected, weight, integers = layer(x), layer.weight, layer.integers
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.prepare_for_cuda()
    assert layer.weight_packed is None
    assert torch.equal(layer.integers, integers)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), expected)
    assert list(layer.state_dict()) == list(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in layer.state_dict().items())
    assert all(present == right for _, present, right in layer.stored_shapes())


@pytest.mark.usefixtures("tiles_here")
def test_int4_that_stays_as_it_is() -> None:
    for layer in (
        int4().float(),
        int4().half(),
        int4(name="int4_dynamic"),
        int4(name="int6_weight_only"),
        int4(256, 12),
    ):
        layer.prepare_for_cuda()
        assert layer.tiles is None
        assert layer.weight_packed is not None


def test_without_a_gpu_nothing_is_tiled() -> None:
    assert not cuda.has_tiles(torch.device("cpu"))


@pytest.mark.parametrize(
    ("scheme", "held"),
    [("int8_dynamic", True), ("int8_static", True), ("int8_dynamic_symmetric", False), ("int8_weight_only", False)],
)
def test_sums_of_rows_are_made_once(scheme: str, held: bool) -> None:
    layer = Int8Linear.from_float(torch.randn(16, 32), torch.randn(16), get_scheme(scheme), BOUNDS)
    x, names = torch.randn(2, 20, 32), list(layer.state_dict())
    expected = None if scheme == "int8_weight_only" else layer._int_mm(x)
    layer.prepare_for_cuda()
    assert (layer.row_sums is not None) is held
    assert list(layer.state_dict()) == names
    if held:
        assert torch.equal(layer._int_mm(x), expected)
        layer.to(torch.bfloat16)
        assert layer.row_sums.dtype == torch.int32
        layer.row_sums.zero_()
        assert not torch.equal(layer._int_mm(x), expected), "they are read, and not made anew"


@pytest.mark.parametrize(("rows", "few"), [(1, True), (cuda.FEW_ROWS, True), (cuda.FEW_ROWS + 1, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_alone_for_a_few_rows(
    rows: int, few: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product itself needs a GPU; when it is asked for does not."""
    layer = Int8Linear.from_float(torch.randn(24, 32), torch.randn(24), get_scheme("int8_weight_only")).to(dtype)
    x = torch.randn(rows, 1, 32, dtype=dtype)
    expected, asked = layer(x), []
    monkeypatch.setattr(cuda, "int8_linear", lambda input, *_: asked.append(input.shape[0]) or expected)
    layer.prepare_for_cuda()
    assert torch.equal(layer(x), expected)
    assert not asked, "without a GPU"
    monkeypatch.setattr(cuda, "has_int8_product", lambda device: True)
    layer.prepare_for_cuda()
    assert torch.equal(layer(x), expected)
    assert asked == ([rows] if few and dtype == torch.bfloat16 else [])


def test_what_is_one_more_token_on_a_cache_that_stays() -> None:
    model = tiny_llama()
    cache = StaticCache(config=model.config, max_cache_len=16)
    one, more = torch.ones(2, 1, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)

    def is_step(ids: Tensor, cache: object) -> bool:
        return compiler._is_step((), {"input_ids": ids, "past_key_values": cache, "attention_mask": torch.ones(2, 1)})

    assert not is_step(one, None)
    assert not is_step(one, DynamicCache())
    assert not is_step(one, cache), "nothing is in it: its tensors are yet to be made"
    with torch.no_grad():
        model(input_ids=more, past_key_values=cache)
    assert is_step(one, cache)
    assert not is_step(more, cache)
    assert {layer.keys._dynamo_static_input_type for layer in cache.layers} == {"unguarded"}
    found = []
    thread = threading.Thread(target=lambda: found.append(is_step(one, cache)))
    thread.start()
    thread.join()
    assert found == [False], "recorded graphs belong to the thread that recorded them"
