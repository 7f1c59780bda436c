"""Bad input: an error with the value, what is allowed and the change to make; and nothing written or changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_quant import QATCallback, load_quantized, quantize_dynamic, save_quantized
from hf_quant.quantization.convert import ParityError
from hf_quant.quantization.qat import qat_modules
from hf_quant.runtime import kernels
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.modules import Int8Linear
from tests.tiny import folder_bytes, logits, make_trainer, tiny_bert, tiny_llama


class Unchanged:
    """Asserts that a model is, object for object and bit for bit, what it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modules = [(name, type(module), id(module)) for name, module in self.model.named_modules()]
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.hooks = len(self.model._forward_pre_hooks)

    def __exit__(self, *error: object) -> None:
        assert [(name, type(module), id(module)) for name, module in self.model.named_modules()] == self.modules
        state = self.model.state_dict()
        assert list(state) == list(self.state)
        assert all(torch.equal(value, self.state[name]) or value.isnan().any() for name, value in state.items())
        assert len(self.model._forward_pre_hooks) == self.hooks


class TestQuantizeDynamic:
    def test_unknown_scheme(self) -> None:
        model = tiny_bert()
        with (
            Unchanged(model),
            pytest.raises(ValueError, match=r"unknown scheme 'int8'.*Choose one of: int8_dynamic, int8_static"),
        ):
            quantize_dynamic(model, "int8", inplace=True)

    def test_static_scheme_needs_data(self) -> None:
        with pytest.raises(
            ValueError,
            match=r"scheme 'int8_static' needs observed activation ranges.* Call quantize_static with data, train "
            r"with QATCallback\('int8_static'\), or choose one of: int8_dynamic, int8_weight_only, int4_weight_only, ",
        ):
            quantize_dynamic(tiny_bert(), "int8_static")

    @pytest.mark.parametrize("inplace", [True, False])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_weights_that_are_not_finite(self, bad: float, inplace: bool) -> None:
        model = tiny_bert()
        model.bert.encoder.layer[1].output.dense.weight.data[0, :2] = bad
        with (
            Unchanged(model),
            pytest.raises(
                ValueError,
                match=r"the weight of bert\.encoder\.layer\.1\.output\.dense holds 2 NaN or infinite values of 1536, "
                r"so it has no int8 range\. Start from a checkpoint whose training did not diverge\.",
            ),
        ):
            quantize_dynamic(model, inplace=inplace, progress=False)

    def test_pattern_that_matches_nothing(self) -> None:
        model = tiny_bert()
        with (
            Unchanged(model),
            pytest.raises(ValueError, match=r"pattern '\*\.quary' in `targets` matches no module; did you mean '\*\."),
        ):
            quantize_dynamic(model, targets=["*.quary"], inplace=True)

    def test_no_quantizable_module(self) -> None:
        with pytest.raises(ValueError, match=r"LayerNorm has no module that can be quantized"):
            quantize_dynamic(nn.LayerNorm(3))

    def test_int8_already(self, tmp_path: Path) -> None:
        int8 = quantize_dynamic(tiny_bert(), progress=False)
        save_quantized(int8, tmp_path / "int8")
        for model in (int8, load_quantized(tmp_path / "int8")):
            with pytest.raises(
                ValueError,
                match=r"is quantized already: 16 of its modules are int8, such as bert\.embeddings\.word_embeddings\. "
                r"Start from the float model",
            ):
                quantize_dynamic(model)
        before = folder_bytes(tmp_path)
        with pytest.raises(ValueError, match=r"is quantized already \(compressed-tensors\)\. Pass the float"):
            quantize_dynamic(tmp_path / "int8")
        assert folder_bytes(tmp_path) == before

    def test_prepared_for_training(self, tmp_path: Path) -> None:
        model = tiny_bert()
        make_trainer(tmp_path, model, [QATCallback()])
        with Unchanged(model), pytest.raises(ValueError, match=r"QATCallback"):
            quantize_dynamic(model, inplace=True)

    def test_quantized_by_another_reader(self, tmp_path: Path) -> None:
        save_quantized(quantize_dynamic(tiny_bert(), progress=False), tmp_path / "int8")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
        with pytest.raises(ValueError, match=r"is quantized already, with compressed-tensors\. Start from the float"):
            quantize_dynamic(plain)

    def test_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises((OSError, ValueError), match="absent"):
            quantize_dynamic(str(tmp_path / "absent"))

    def test_folder_without_a_config(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"has no config\.json, so it is not a model folder\. Check"):
            quantize_dynamic(tmp_path)


class TestCallback:
    def test_unknown_scheme(self) -> None:
        with pytest.raises(ValueError, match=r"unknown scheme 'int8_statc'; did you mean 'int8_static'\?"):
            QATCallback("int8_statc")

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"targets": ["*.qery"]}, ValueError, r"pattern '\*\.qery' in `targets` matches no module; did you mean"),
            ({"ignore": ["clasifier"]}, ValueError, r"'clasifier' in `ignore` .*; did you mean 'classifier'\?"),
            ({"targets": "*.query"}, TypeError, r"`targets` is a list of patterns, but '\*\.query' is a string"),
            ({"ignore": ["*"]}, ValueError, r"nothing is left to quantize in BertForSequenceClassification"),
        ],
    )
    def test_patterns(self, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
        model = tiny_bert()
        with Unchanged(model), pytest.raises(error, match=message):
            make_trainer(tmp_path, model, [QATCallback(**options)])

    def test_part_of_a_tied_group(self, tmp_path: Path) -> None:
        model = tiny_llama()
        with (
            Unchanged(model),
            pytest.raises(ValueError, match=r"lm_head shares its weight with model\.embed_tokens, which would stay"),
        ):
            make_trainer(tmp_path, model, [QATCallback(targets=["lm_head"])], causal=True)

    def test_weights_that_are_not_finite(self, tmp_path: Path) -> None:
        model = tiny_bert()
        model.bert.pooler.dense.weight.data[0, 0] = float("nan")
        with (
            Unchanged(model),
            pytest.raises(ValueError, match=r"the weight of bert\.pooler\.dense holds 1 NaN or infinite values"),
        ):
            make_trainer(tmp_path, model, [QATCallback()])

    def test_training_that_diverges_ends_in_an_error_and_a_float_model(self, tmp_path: Path) -> None:
        trainer = make_trainer(
            tmp_path,
            callbacks=[QATCallback()],
            changes={"learning_rate": 1e30, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"},
        )
        with pytest.raises(ValueError, match=r"the weight of bert\..* holds \d+ NaN or infinite values"):
            trainer.train()
        assert not quantized_modules(trainer.model)
        assert len(qat_modules(trainer.model)) == 16

    def test_model_quantized_by_another_library(self, tmp_path: Path) -> None:
        save_quantized(quantize_dynamic(tiny_bert(), progress=False), tmp_path / "int8")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
        with pytest.raises(ValueError, match="quantized"):
            make_trainer(tmp_path, plain, [QATCallback()])

    @pytest.mark.parametrize("loaded", [False, True])
    def test_training_an_int8_model_without_the_callback(self, loaded: bool, tmp_path: Path) -> None:
        model = quantize_dynamic(tiny_bert(), progress=False)
        if loaded:
            save_quantized(model, tmp_path / "int8")
            model = load_quantized(tmp_path / "int8")
        with pytest.raises(RuntimeError, match=r"int8 modules cannot be trained: .* Train the float checkpoint"):
            make_trainer(tmp_path, model).train()

    def test_failed_proof_keeps_the_float_model_and_names_the_layer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A kernel that is wrong by one per cent in one layer."""
        original = Int8Linear.forward

        def wrong(self: Int8Linear, input: torch.Tensor) -> torch.Tensor:
            output = original(self, input)
            return output * 1.01 if self.out_features == 48 else output

        trainer = make_trainer(
            tmp_path, callbacks=[QATCallback()], changes={"save_strategy": "steps", "save_steps": 8}
        )
        monkeypatch.setattr(Int8Linear, "forward", wrong)
        with pytest.raises(
            ParityError,
            match=r"bert\.encoder\.layer\.0\.intermediate\.dense: int8 and fake-quant differ by 40\.\d dB \(at least "
            r"60 dB are needed\).* The model was left in float\. Put 'bert\.encoder\.layer\.0\.intermediate\.dense' "
            r"into `ignore`",
        ):
            trainer.train()
        assert not quantized_modules(trainer.model)
        assert len(qat_modules(trainer.model)) == 16
        assert not hasattr(trainer.model, "hf_quantizer")
        trainer.save_model(str(tmp_path / "float"))
        plain, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "float", output_loading_info=True)
        assert not info["missing_keys"]
        monkeypatch.undo()
        with kernels.use_kernel("reference"):
            assert logits(plain).isfinite().all()

    def test_failed_proof_of_the_output_names_the_least_exact_layer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from hf_quant.quantization import convert

        monkeypatch.setattr(convert, "MIN_LOGITS_SQNR", 1e9)
        trainer = make_trainer(tmp_path, callbacks=[QATCallback()])
        with pytest.raises(
            ParityError,
            match=r"the outputs of the int8 model differ from fake-quant by .* the least exact layer is ",
        ):
            trainer.train()
        assert not quantized_modules(trainer.model)
        assert len(qat_modules(trainer.model)) == 16


class TestSave:
    def test_float_model(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError,
            match=r"BertForSequenceClassification has no int8 module\. Quantize it first, with quantize_dynamic",
        ):
            save_quantized(tiny_bert(), tmp_path / "int8")
        assert not list(tmp_path.iterdir())

    def test_folder_that_is_not_empty(self, tmp_path: Path) -> None:
        model = quantize_dynamic(tiny_bert(), progress=False)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "notes.txt").write_text("mine")
        before = folder_bytes(tmp_path)
        with pytest.raises(
            FileExistsError,
            match=r"full is not empty\. Choose another output folder, or allow it to be overwritten \(`overwrite",
        ):
            save_quantized(model, tmp_path / "full")
        assert folder_bytes(tmp_path) == before
        save_quantized(model, tmp_path / "full", overwrite=True)
        assert (tmp_path / "full" / "notes.txt").read_text() == "mine"

    def test_path_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(FileExistsError, match=r"file is a file, not a folder\. Choose another output folder\."):
            save_quantized(quantize_dynamic(tiny_bert(), progress=False), tmp_path / "file", overwrite=True)
        assert (tmp_path / "file").read_text() == "mine"

    def test_empty_folder_is_free(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        save_quantized(quantize_dynamic(tiny_bert(), progress=False), tmp_path / "empty")
        assert (tmp_path / "empty" / "config.json").is_file()
