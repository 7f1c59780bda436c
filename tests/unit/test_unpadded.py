"""Batches without their padding: outputs are those of the whole batch."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_quant.runtime.unpadded import UnpaddedForward
from tests.tiny import VOCAB, int8_model, tiny_bert, tiny_gpt2, tiny_llama
from tests.zoo import SPECIES

LENGTHS = (3, 12, 5, 3, 9, 4)
TOTAL = 12

MODELS = [
    ("bert", "BertModel"),
    ("bert", "BertForSequenceClassification"),
    ("bert", "BertForPreTraining"),
    ("roberta", "RobertaForTokenClassification"),
    ("roberta", "RobertaForMaskedLM"),
    ("distilbert", "DistilBertForQuestionAnswering"),
    ("distilbert", "DistilBertModel"),
    ("mpnet", "MPNetForSequenceClassification"),
    ("mpnet", "MPNetModel"),
    ("modernbert", "ModernBertForTokenClassification"),
    ("modernbert", "ModernBertForSequenceClassification"),
    ("deberta", "DebertaForQuestionAnswering"),
    ("deberta-v3", "DebertaV2ForTokenClassification"),
    ("electra", "ElectraForPreTraining"),
    ("electra", "ElectraForSequenceClassification"),
    ("albert", "AlbertForMaskedLM"),
    ("nomic-bert", "NomicBertModel"),
    ("t5", "T5EncoderModel"),
    ("t5", "T5ForTokenClassification"),
]


class Recorded:
    """A forward that notes the shapes of its batches."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.shapes.append(tuple(kwargs["attention_mask"].shape))
        return self.forward(*args, **kwargs)


def _model(name: str, head: str) -> Any:
    species = SPECIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, head)(getattr(transformers, species.config)(**species.sizes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the usual 0.02 would make attention, and so padding, nearly irrelevant
            parameter.data.normal_(0, 0.2)
    return model


def _batch(
    lengths: Sequence[int] = LENGTHS, total: int = TOTAL, left: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    positions = torch.arange(total)
    mask = (positions.flip(0) if left else positions) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, VOCAB, mask.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def _unpadded(model: Any, overhead: int = 2) -> tuple[UnpaddedForward, Recorded]:
    recorded = Recorded(model.forward)
    recorded.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    return UnpaddedForward(recorded, model.config, overhead), recorded


def _leaves(output: Any) -> Iterator[Tensor]:
    for value in output.values() if isinstance(output, dict) else output:
        if isinstance(value, Tensor):
            yield value
        elif value is not None:
            yield from _leaves(value)


def _assert_same(got: Any, expected: Any, mask: Tensor, total: int = TOTAL) -> None:
    """The same outputs, but for positions of padding: each dimension of `total` entries is one of positions."""
    assert type(got) is type(expected)
    pairs = list(zip(_leaves(got), _leaves(expected), strict=True))
    assert pairs
    for value, reference in pairs:
        assert value.shape == reference.shape
        assert value.dtype == reference.dtype
        real = torch.ones_like(value, dtype=torch.bool)
        for dim in range(1, value.ndim):
            if value.shape[dim] == total:
                view = [len(mask), *[1] * (value.ndim - 1)]
                view[dim] = total
                real &= mask.bool().view(view)
        torch.testing.assert_close(value[real], reference[real], atol=2e-5, rtol=1e-4)
        padded = value[~real]
        if padded.numel():
            assert padded.unique().tolist() == [torch.finfo(value.dtype).min if value.ndim == 2 else 0]


@torch.no_grad()
def _check(model: Any, batch: dict[str, Tensor], splits: bool = True, **flags: Any) -> None:
    forward, recorded = _unpadded(model)
    expected = model.forward(**batch, **flags)
    first = forward(**batch, **flags)
    for got, reference in zip(_leaves(first), _leaves(expected), strict=True):
        assert torch.equal(got, reference)
    assert splits or recorded.shapes == [batch["attention_mask"].shape]
    # Other rows: what was learned holds for them.
    order = torch.tensor([4, 1, 0, 5, 2, 3])
    batch = {name: value[order] if len(value) == len(order) else value for name, value in batch.items()}
    recorded.shapes.clear()
    got = forward(**batch, **flags)
    whole = batch["attention_mask"].shape
    assert (whole not in recorded.shapes) is splits, recorded.shapes
    if splits:
        assert len(recorded.shapes) > 1
        _assert_same(got, model.forward(**batch, **flags), batch["attention_mask"])
    else:
        assert recorded.shapes == [whole]


@pytest.mark.parametrize(("name", "head"), MODELS, ids=[head for _, head in MODELS])
def test_real_positions_are_those_of_the_whole_batch(name: str, head: str) -> None:
    _check(_model(name, head), _batch())


@pytest.mark.parametrize(
    "flags",
    [{"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}, {"use_cache": True}],
    ids=lambda flags: next(iter(flags)),
)
def test_all_kinds_of_outputs(flags: dict[str, bool]) -> None:
    model = _model("bert", "BertForQuestionAnswering")
    model.set_attn_implementation("eager")  # the others return no attention weights
    _check(model, _batch(), **flags)


@pytest.mark.parametrize("labels", [2, 5, 12])
def test_as_many_classes_as_tokens(labels: int) -> None:
    model = tiny_bert(num_labels=labels, max_position_embeddings=TOTAL, num_hidden_layers=1).eval()
    forward, recorded = _unpadded(model)
    batch = _batch((5, 3, 5, 12))
    with torch.no_grad():
        for _ in range(2):
            recorded.shapes.clear()
            got = forward(**batch).logits
    assert sorted(recorded.shapes) == [(1, 12), (3, 5)]
    torch.testing.assert_close(got, model(**batch).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids", "one_row_of_position_ids", "inputs_embeds"])
def test_every_argument_of_tokens_is_cut(name: str) -> None:
    model = _model("bert", "BertForTokenClassification")
    batch = _batch()
    if name == "inputs_embeds":
        batch = {"inputs_embeds": torch.randn(len(LENGTHS), TOTAL, 32), "attention_mask": batch["attention_mask"]}
    elif name == "one_row_of_position_ids":
        batch["position_ids"] = torch.arange(TOTAL).flip(0)[None]
    else:
        batch[name] = torch.randint(0, 2, (len(LENGTHS), TOTAL))
    _check(model, batch)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    batch = _batch()
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    _check(_model("bert", "BertForTokenClassification"), batch)


def test_arguments_by_position() -> None:
    model = _model("bert", "BertForTokenClassification")
    batch = _batch()
    seen: list[tuple[int, ...]] = []

    def forward(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        seen.append(tuple(input_ids.shape))
        return model(input_ids, attention_mask, token_type_ids)

    unpadded = UnpaddedForward(forward, model.config, 2)
    with torch.no_grad():
        for _ in range(2):
            seen.clear()
            got = unpadded(batch["input_ids"], batch["attention_mask"], None)
        assert len(seen) > 1
        _assert_same(got, model(**batch), batch["attention_mask"])


def test_one_group_shorter_than_the_padding() -> None:
    """Padded to a fixed length, as with `padding="max_length"`."""
    model = _model("bert", "BertForTokenClassification")
    forward, recorded = _unpadded(model, overhead=1000)
    batch = _batch((4, 5, 3))
    with torch.no_grad():
        for _ in range(2):
            recorded.shapes.clear()
            got = forward(**batch)
        assert recorded.shapes == [(3, 5)]
        _assert_same(got, model(**batch), batch["attention_mask"])


def test_row_of_padding_only() -> None:
    model = _model("bert", "BertForTokenClassification")
    forward, recorded = _unpadded(model)
    batch = _batch((0, 12, 5, 0, 7, 4))
    with torch.no_grad():
        for _ in range(2):
            recorded.shapes.clear()
            got = forward(**batch)
        assert (2, 1) in recorded.shapes
        _assert_same(got, model(**batch), batch["attention_mask"])


def test_padding_is_never_the_best_position() -> None:
    model = _model("bert", "BertForQuestionAnswering")
    model.qa_outputs.bias.data.fill_(-100)
    forward, _ = _unpadded(model)
    batch = _batch()
    with torch.no_grad():
        for _ in range(2):
            best = forward(**batch).start_logits.argmax(1)
    assert bool((best < torch.tensor(LENGTHS)).all())


def test_arguments_have_plain_strides() -> None:
    """A compiled forward would be compiled anew for other ones."""
    seen = []

    def forward(input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> tuple[Tensor]:
        seen.extend([input_ids, attention_mask, position_ids])
        return (input_ids.float(),)

    batch = _batch()
    unpadded = UnpaddedForward(forward, None, 2)
    for _ in range(2):
        seen.clear()
        unpadded(batch["input_ids"].T.contiguous().T, batch["attention_mask"], torch.arange(TOTAL)[None])
    assert len(seen) > 3
    for value in seen:
        assert value.stride() == torch.empty(value.shape).stride()


def test_what_has_no_rows_is_not_taken_for_rows() -> None:
    """As many entries as the first batch has rows, in order of length."""
    prototypes = torch.arange(6.0).reshape(3, 2)
    unpadded = UnpaddedForward(lambda input_ids, attention_mask: (prototypes,), None, 1000)
    for lengths in ((3, 4, 5), (3, 4, 5), (5, 4, 3)):
        assert torch.equal(unpadded(**_batch(lengths))[0], prototypes)


def test_callers_tensors_are_not_changed() -> None:
    model = _model("bert", "BertForTokenClassification")
    forward, _ = _unpadded(model)
    batch = _batch()
    before = {name: value.clone() for name, value in batch.items()}
    with torch.inference_mode():
        for _ in range(2):
            forward(**batch)
    assert all(torch.equal(batch[name], before[name]) for name in batch)


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_models(scheme: str, dtype: torch.dtype) -> None:
    model = int8_model(tiny_bert(), scheme).to(dtype)
    forward, recorded = _unpadded(model)
    batch = _batch()
    with torch.no_grad():
        expected = model(**batch).logits
        for _ in range(2):
            recorded.shapes.clear()
            got = forward(**batch).logits
    assert len(recorded.shapes) > 1
    assert got.dtype == dtype
    # A dynamic pooler has one scale for all rows of its batch.
    assert float((got - expected).norm() / expected.norm()) < 0.05


# Decoders.


def test_classifier_that_looks_for_the_last_token() -> None:
    _check(_model("llama", "LlamaForSequenceClassification"), _batch(), use_cache=False)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_rotary_decoders_with_padding_on_both_sides(left: bool) -> None:
    _check(tiny_llama(), _batch(left=left), use_cache=False)
    _check(_model("llama", "LlamaForSequenceClassification"), _batch(left=left), use_cache=False)


def test_left_padding_stays_where_it_moves_positions() -> None:
    batch = _batch(left=True)
    _check(tiny_gpt2().eval(), batch, splits=False, use_cache=False)
    _check(_model("bert", "BertForTokenClassification"), batch, splits=False)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    _check(tiny_gpt2().eval(), {**batch, "position_ids": positions}, use_cache=False)


def test_cache_in_the_outputs_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama().eval()
    forward, recorded = _unpadded(model)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "hf_quant"):
        for _ in range(3):
            assert forward(**_batch()).past_key_values is not None
    assert recorded.shapes == [(6, 12)] * 3
    [message] = [record.getMessage() for record in caplog.records]
    assert message == (
        "batches run with their padding: the outputs hold a DynamicCache, which cannot be put together from those of "
        "groups of rows. If it is a cache that is not needed, call the model with use_cache=False."
    )


def test_generation_is_the_models_own() -> None:
    model = tiny_llama().eval()
    batch = _batch(left=True)
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False)
    model.forward, _ = _unpadded(model)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), expected)


# What runs whole.


def _changed(**changes: Any) -> dict[str, Any]:
    return {**_batch(), **changes}


def _with_hole() -> Tensor:
    mask = _batch()["attention_mask"]
    mask[1, 4] = 0
    return mask


@pytest.mark.parametrize(
    "batch",
    [
        _changed(labels=torch.zeros(6, 12, dtype=torch.long)),
        _changed(attention_mask=None),
        _changed(attention_mask=torch.ones(6, 1, 12, 12)),
        _changed(attention_mask=_batch()["attention_mask"] * 2),
        _changed(attention_mask=_with_hole()),
        _changed(attention_mask=torch.ones(6, 12, dtype=torch.long)),
        _changed(encoder_hidden_states=torch.zeros(6, 12, 32)),
        _changed(past_key_values=object()),
        _changed(logits_to_keep=2),
        {name: value[:1] for name, value in _batch().items()},
    ],
    ids=[
        "labels",
        "no mask",
        "4-D mask",
        "mask of twos",
        "hole",
        "no padding",
        "encoder's states",
        "cache",
        "last logits",
        "one row",
    ],
)
def test_run_whole_without_a_word(batch: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> tuple[Tensor]:
        calls.append(input_ids.shape)
        return (input_ids.float(),)

    unpadded = UnpaddedForward(forward, None, 2)
    for _ in range(2):
        (got,) = unpadded(**batch)
        assert torch.equal(got, batch["input_ids"].float())
    assert calls == [batch["input_ids"].shape] * 2
    assert not caplog.records


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(
            max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        transformers.BigBirdConfig(attention_type="block_sparse"),
    ],
    ids=["dynamic rotary", "block sparse"],
)
def test_models_that_change_with_the_length_run_whole(config: Any) -> None:
    calls = []

    def forward(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        calls.append(input_ids.shape)
        return (input_ids.float(),)

    UnpaddedForward(forward, config, 2)(**_batch())
    assert calls == [(6, 12)]


def test_encoder_decoders_run_whole() -> None:
    model = _model("bart", "BartModel")
    forward, recorded = _unpadded(model)
    with torch.no_grad():
        for _ in range(2):
            forward(**_batch())
    assert recorded.shapes == [(6, 12)] * 2


def _means(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
    return (input_ids.float().mean(1, keepdim=True),)  # takes padding for words


def _experts(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
    return (input_ids.flatten().float(),)


def _windows(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
    return (nn.functional.pad(input_ids.float(), (0, -input_ids.shape[1] % 8)),)


def _long_texts(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
    if input_ids.shape[1] < TOTAL:
        raise RuntimeError("kernel size is larger than the input")
    return (input_ids.float(),)


def _text(input_ids: Tensor, attention_mask: Tensor) -> tuple[str]:
    return ("text",)


def _varying(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
    return (input_ids.float(),) * len(input_ids)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (_means, r"without it, an output of shape \(6, 1\) differs by .* in a row or token"),
        (_experts, r"the first dimension of an output of shape \(72,\) is not the batch"),
        (_windows, r"dimension 1 of an output of shape \(6, 16\) is neither fixed nor the length"),
        (_long_texts, "kernel size is larger than the input"),
        (_text, "the outputs hold a str, which cannot be put together"),
        (_varying, "the structure of the outputs depends on the batch"),
    ],
)
def test_not_understood_runs_whole_and_says_why(function: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Any:
        calls.append(tuple(input_ids.shape))
        return function(input_ids, attention_mask)

    unpadded = UnpaddedForward(forward, None, 2)
    batch = _batch()
    with caplog.at_level(logging.WARNING, "hf_quant"):
        for _ in range(3):
            got = unpadded(**batch)
            calls_of_the_last = calls[:]
            calls.clear()
            for value, expected in zip(got, function(**batch), strict=True):
                assert value == expected if isinstance(value, str) else torch.equal(value, expected)
    assert calls_of_the_last == [(6, 12)]
    [record] = caplog.records
    assert record.getMessage().startswith("batches run with their padding: ")
    assert re.search(why, record.getMessage()), record.getMessage()


def test_outputs_that_change_later_are_learned_anew() -> None:
    model = _model("bert", "BertForTokenClassification")
    forward, recorded = _unpadded(model)
    batch = _batch()
    with torch.no_grad():
        for _ in range(2):
            forward(**batch)
        model.config.output_hidden_states = True
        assert len(forward(**batch).hidden_states) == 3
        recorded.shapes.clear()
        got = forward(**batch)
        assert (6, 12) not in recorded.shapes
        _assert_same(got, model(**batch), batch["attention_mask"])


def test_callers_mistake_is_the_forwards_own_error() -> None:
    model = _model("bert", "BertForTokenClassification")
    forward, _ = _unpadded(model)
    with torch.no_grad():
        for _ in range(2):
            forward(**_batch())
        wrong = _batch()
        wrong["input_ids"] += VOCAB
        with pytest.raises(IndexError, match="index out of range"):
            forward(**wrong)
    with pytest.raises(TypeError, match="unexpected keyword argument 'input_idz'"):
        UnpaddedForward(_means, None)(input_idz=_batch()["input_ids"], attention_mask=_batch()["attention_mask"])


# Where the forward can leave padding out.


def test_groups_of_several_lengths() -> None:
    model = _model("bert", "BertForTokenClassification")
    seen: list[tuple[list[int], int]] = []

    def skipping(lengths: Sequence[int], length: int) -> contextlib.nullcontext[None]:
        seen.append((list(lengths), length))
        return contextlib.nullcontext()

    forward = UnpaddedForward(model.forward, model.config, 1000, skipping=skipping)
    batch = _batch()
    with torch.no_grad():
        expected = model(**batch)
        forward(**batch)
        seen.clear()
        _assert_same(forward(**batch), expected, batch["attention_mask"])
        assert seen == [(sorted(LENGTHS), TOTAL)]
        seen.clear()
        for whole in (
            _batch((TOTAL,) * 6),  # nothing to leave out
            _batch((3, TOTAL, 5)),  # too few rows to learn from
            _batch(range(1, TOTAL + 1)),  # rows and tokens could be mistaken for each other
            _batch(left=True),
        ):
            torch.testing.assert_close(forward(**whole).logits, model(**whole).logits)
    assert seen == []


# Beside other tools.


def test_negative_overhead_is_refused() -> None:
    with pytest.raises(ValueError, match=r"overhead is -3, but a forward costs at least 0 tokens\. Give 0 or more\."):
        UnpaddedForward(tiny_bert().forward, None, -3)


def test_signature_is_the_forwards() -> None:
    model = tiny_bert()
    forward = UnpaddedForward(model.forward, model.config)
    assert inspect.signature(forward) == inspect.signature(model.forward)
    assert forward.__wrapped__ == model.forward
    assert forward.__name__ == "forward"


def test_compiled_forward_inside_and_compiler_outside() -> None:
    model = _model("bert", "BertForTokenClassification")
    graphs: list[tuple[int, ...]] = []

    def backend(module: Any, inputs: list[Any]) -> Any:
        graphs.append(next(value.shape for value in inputs if isinstance(value, Tensor) and value.ndim == 2))
        return module.forward

    torch._dynamo.reset()
    batch = _batch()
    inside = UnpaddedForward(torch.compile(model.forward, backend=backend, dynamic=True), model.config, 2)
    assert not hasattr(inside, "_torchdynamo_orig_callable")  # by which a compiler outside would pass it over
    with torch.no_grad():
        expected = model(**batch)
        for _ in range(2):
            got = inside(**batch)
        compiled = len(graphs)
        assert 0 < compiled <= 3  # any batch; and a batch of one row
        _assert_same(got, expected, batch["attention_mask"])
        got = inside(**_batch(seed=1))
        assert len(graphs) == compiled
        # A compiler outside sees the whole batch in one graph.
        graphs.clear()
        forward, _ = _unpadded(model)
        got = torch.compile(lambda **batch: forward(**batch).logits, backend=backend, fullgraph=True)(**batch)
    torch._dynamo.reset()
    assert len(graphs) == 1
    torch.testing.assert_close(got, expected.logits, atol=2e-5, rtol=1e-4)


def test_traced_for_other_batches() -> None:
    forward = UnpaddedForward(lambda input_ids, attention_mask: (input_ids * attention_mask,), None, 2)
    batch = _batch()
    for _ in range(2):
        forward(**batch)
    traced = torch.jit.trace(lambda ids, mask: forward(ids, mask), tuple(batch.values()), check_trace=False)
    other = _batch((12, 3, 3), seed=2)
    assert torch.equal(traced(*other.values())[0], other["input_ids"])
