"""quantize_static: activation ranges from whatever calibration data a user has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_quant import Calibration, load_quantized, quantize, quantize_static, save_quantized
from hf_quant.quantization.calibration import calibration_batches
from hf_quant.quantization.ranges import OBSERVERS, calibrate
from hf_quant.quantization.sensitivity import sqnr
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.modules import Int8Linear
from tests.tiny import (
    VOCAB,
    Sentences,
    folder_bytes,
    logits,
    make_trainer,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenizer,
)

TEXTS = [f"w{3 + i % 40} w{50 + i % 30} w{7 + i % 11}" + " w5 w9" * (i % 4) for i in range(40)]


def _ids(texts: list[str]) -> list[list[int]]:
    return [tiny_tokenizer()(text)["input_ids"] for text in texts]


DATA: dict[str, Any] = {
    "texts": TEXTS,
    "texts in a Dataset": Dataset.from_dict({"text": TEXTS, "label": [0] * 40}),
    "ids in a Dataset": Dataset.from_dict({"input_ids": _ids(TEXTS), "label": [0] * 40}),
    "examples": [{"input_ids": torch.tensor(row), "labels": torch.tensor(0)} for row in _ids(TEXTS)],
}


@pytest.mark.parametrize("kind", sorted(DATA))
def test_the_same_texts_in_any_form_give_the_same_model(kind: str, tmp_path: Path) -> None:
    options = {"processing_class": tiny_tokenizer(), "progress": False}
    expected = quantize_static(tiny_bert(), TEXTS, **options)
    got = quantize_static(tiny_bert(), DATA[kind], **options)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    save_quantized(got, tmp_path / "int8")
    assert torch.equal(logits(load_quantized(tmp_path / "int8")), logits(got))


def test_pairs_of_texts_go_in_together() -> None:
    pairs = Dataset.from_dict({"sentence1": TEXTS[:4], "sentence2": TEXTS[4:8], "label": [0, 1, 0, 1]})
    (batch,) = calibration_batches(Calibration(pairs, processing_class=tiny_tokenizer()), tiny_bert())
    alone = [len(row) for row in _ids(TEXTS[:8])]
    assert batch["attention_mask"].sum(1).tolist() == [alone[i] + alone[4 + i] for i in range(4)]


def test_batches_of_a_loader_and_of_a_trainer(tmp_path: Path) -> None:
    loader = DataLoader(Sentences(32), batch_size=4)
    by_loader = quantize_static(tiny_bert(), loader, samples=32, observer="minmax", progress=False)
    trainer = make_trainer(tmp_path)
    before = trainer.evaluate()["eval_loss"]
    int8 = quantize_static(trainer.model, trainer, samples=32, observer="minmax", inplace=True, progress=False)
    assert int8 is trainer.model
    after = trainer.evaluate()["eval_loss"]
    assert after == pytest.approx(before, rel=0.05)
    assert after != before
    for name, module in quantized_modules(by_loader).items():
        if isinstance(module, Int8Linear):
            twin = int8.get_submodule(name)
            assert torch.allclose(module.input_scale, twin.input_scale, rtol=1e-5), (
                "the same 32 rows, in another order"
            )


def test_samples_are_counted_and_a_generator_is_used_once() -> None:
    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, 32, 8):
            yield {key: value[start : start + 8] for key, value in Sentences(32).batch(32).items()}

    got = calibration_batches(Calibration(batches(), samples=20), tiny_bert())
    assert [len(batch["input_ids"]) for batch in got] == [8, 8, 4]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in got]), Sentences(32).input_ids[:20])
    assert len(calibration_batches(Calibration(TEXTS, 10, 4, None, tiny_tokenizer()), tiny_bert())) == 3


def test_max_length_cuts_texts() -> None:
    (batch,) = calibration_batches(Calibration(["w3 " * 30], 1, 1, 7, tiny_tokenizer()), tiny_bert())
    assert batch["input_ids"].shape == (1, 7)
    with pytest.raises(ValueError, match=r"`max_length` is 64; allowed for these models: 1 to 32"):
        calibration_batches(Calibration(TEXTS, 1, 1, 64, tiny_tokenizer()), tiny_bert())


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
@pytest.mark.parametrize(
    ("maker", "size"),
    [(tiny_bert, "num_hidden_layers"), (tiny_llama, "num_hidden_layers"), (tiny_gpt2, "n_layer")],
    ids=["bert", "llama", "gpt2"],
)
def test_every_observer_stays_close_to_float(observer: str, maker: Any, size: str) -> None:
    model = maker(**{size: 1})  # some observers take a second for each layer
    int8 = quantize_static(model, Sentences(32, seed=3), observer=observer, progress=False)
    assert 18 < sqnr(logits(model), logits(int8)) < 60
    assert all(m.scheme.name == "int8_static" for m in int8.modules() if isinstance(m, Int8Linear))


def test_ranges_are_those_of_the_inputs_without_padding() -> None:
    model = tiny_bert().eval()
    batch = Sentences(16, seed=4).batch(16)
    poisoned = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], VOCAB - 1)}
    seen: dict[str, Tensor] = {}
    layer = model.bert.encoder.layer[1].intermediate.dense
    layer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0][batch["attention_mask"].bool()]))
    names = ["bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.0.attention.self.query"]
    found = calibrate(model, [batch], names, "minmax")
    assert found[names[0]] == (seen["x"].min(), seen["x"].max())
    query = calibrate(model, [poisoned], names, "minmax")[names[1]]
    assert query == found[names[1]], "what stands in the padding does not matter"
    assert model.training is False


def test_layers_that_never_ran_stay_in_float_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    class Branching(nn.Module):
        """Control flow that hangs on the values."""

        def __init__(self) -> None:
            super().__init__()
            self.often, self.never = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.often(x) if float(x.abs().max()) < 1e6 else self.never(x)

    rows = [{"x": torch.randn(4, 2, 3, 8)} for _ in range(3)]
    int8 = quantize_static(Branching(), rows, progress=False)
    assert type(int8.never) is nn.Linear
    assert isinstance(int8.often, Int8Linear)
    assert "1 modules never ran during calibration and stay in float: never" in caplog.text
    with pytest.raises(ValueError, match="no layer ran during calibration, so none has a range"):
        quantize_static(Branching(), rows, targets=["never"], progress=False)


def test_one_static_layer_among_dynamic_ones() -> None:
    model = tiny_bert()
    int8 = quantize(model, "int8_dynamic", Sentences(16), overrides={"*.query": "int8_static"}, progress=False)
    kinds = {
        name.rpartition(".")[2]: m.scheme.name for name, m in quantized_modules(int8).items() if hasattr(m, "scheme")
    }
    assert kinds["query"] == "int8_static"
    assert kinds["key"] == "int8_dynamic"


def test_an_encoder_decoder_is_calibrated_on_texts_alone() -> None:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    int8 = quantize_static(model, TEXTS, processing_class=tiny_tokenizer(), progress=False)
    linear = [name for name, module in quantized_modules(int8).items() if isinstance(module, Int8Linear)]
    assert any(name.startswith("decoder.block.0.layer.1.EncDecAttention") for name in linear)


class TestBadInput:
    """Value, allowed values and fix; the model stays as it was."""

    @pytest.mark.parametrize(
        ("data", "error", "message"),
        [
            ([], ValueError, r"calibration has no samples: the data are empty\. Give at least one"),
            (iter([]), ValueError, r"calibration has no samples"),
            (None, TypeError, r"calibration data are None; allowed: a list of texts, a data set, a DataLoader"),
            ("one text", TypeError, r"calibration data are 'one text'; .*For one text, write a list of it"),
            (7, TypeError, r"calibration data are a int; allowed: a list of texts"),
            ([1, 2], TypeError, r"calibration data hold int; allowed: texts, or dictionaries"),
            (Dataset.from_dict({"stars": [1, 2]}), ValueError, r"have the columns 'stars'; needed: columns that Bert"),
        ],
    )
    def test_data_of_no_use(self, data: Any, error: type[Exception], message: str) -> None:
        model = tiny_bert()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(error, match=message):
            quantize_static(model, data, inplace=True, processing_class=tiny_tokenizer(), progress=False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not quantized_modules(model)

    @pytest.mark.parametrize("value", [0, -1, True, 2.5])
    @pytest.mark.parametrize("name", ["samples", "batch_size"])
    def test_counts(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=rf"`{name}` is {value}; calibration needs 1 or more"):
            quantize_static(tiny_bert(), TEXTS, **{name: value})

    def test_a_batch_of_padding_alone(self) -> None:
        good, bad = Sentences(4).batch(4), Sentences(4).batch(4)
        bad["attention_mask"] = torch.zeros_like(bad["attention_mask"])
        with pytest.raises(ValueError, match=r"calibration batch 1 holds only padding: its attention mask is 0 every"):
            quantize_static(tiny_bert(), [good, bad], progress=False)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_activations_that_are_not_finite_name_the_layer(self, bad: float) -> None:
        model = tiny_bert()
        with torch.no_grad():
            model.bert.encoder.layer[0].output.LayerNorm.bias[3] = bad
        with pytest.raises(
            ValueError,
            match=r"the input of bert\.encoder\.layer\.1\.attention\.self\.query holds \d+ NaN or infinite values of "
            r"\d+ in calibration batch 0, so it has no range\. Look at that batch, or at the layers before",
        ):
            quantize_static(model, Sentences(8), inplace=True, progress=False)
        assert not quantized_modules(model)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"observer": "histogram"}, r"unknown observer 'histogram'.*Choose one of: minmax, ema, percentile, mse"),
            ({"observer": "entropi"}, r"unknown observer 'entropi'; did you mean 'entropy'\?"),
            (
                {"rounding": "gptk"},
                r"unknown rounding 'gptk'; did you mean 'gptq'\? Choose one of: nearest, mse, gptq",
            ),
            ({"equalize": "smooth"}, r"unknown equalize 'smooth'; did you mean 'smoothquant'\?"),
            ({"max_drop": 0.01}, r"`max_drop` and `evaluate` go together: .* got max_drop=0\.01, evaluate=None"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            quantize_static(tiny_bert(), Sentences(8), **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scheme": "int8_static"}, "a static scheme needs `calibration`"),
            ({"overrides": {"*.query": "int8_static"}}, "a static scheme needs `calibration`"),
            ({"rounding": "gptq"}, "rounding='gptq' needs `calibration`"),
            ({"equalize": "awq", "correct_bias": True}, "equalize='awq', correct_bias needs `calibration`"),
        ],
    )
    def test_what_needs_data_says_so(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            quantize(tiny_bert(), **options)

    def test_a_model_without_numbers(self) -> None:
        with torch.device("meta"):
            model = BertModel(BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=9))
        with pytest.raises(
            ValueError, match=r"lies on the device 'meta'; models are quantized on cpu or cuda: it has no"
        ):
            quantize(model)

    def test_texts_without_a_tokenizer(self) -> None:
        with pytest.raises(ValueError, match="No tokenizer found"):
            quantize_static(tiny_bert(), TEXTS)


def test_the_model_that_was_passed_is_untouched_whatever_is_done_to_it() -> None:
    model = tiny_bert(intermediate_size=64).train()
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    for equalize in ("smoothquant", "awq"):
        int8 = quantize(
            model, "int8_static", Sentences(16), equalize=equalize, rounding="gptq", correct_bias=True, progress=False
        )
        after = model.state_dict(keep_vars=True)
        assert all(after[name] is value and torch.equal(value, copy) for name, (value, copy) in before.items())
        assert model.training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        shared = {p.data_ptr() for p in model.state_dict().values()} & {
            p.data_ptr() for p in int8.state_dict().values()
        }
        assert not shared


@pytest.mark.parametrize(
    "options", [{"rounding": "gptq"}, {"equalize": "awq", "rounding": "mse"}, {"correct_bias": True}]
)
def test_options_are_on_disk_too(options: dict[str, Any], tmp_path: Path) -> None:
    model: PreTrainedModel = tiny_bert(intermediate_size=64)
    int4 = quantize(model, "int4_weight_only", Sentences(16), progress=False, **options)
    plain = quantize(model, "int4_weight_only", progress=False)
    save_quantized(int4, tmp_path / "one")
    loaded = load_quantized(tmp_path / "one")
    assert torch.equal(logits(loaded), logits(int4))
    assert sqnr(logits(model), logits(int4)) > sqnr(logits(model), logits(plain))
    save_quantized(loaded, tmp_path / "two")
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
