"""The int8 checkpoint in plain transformers, in a process where `import hf_quant` fails; and in pipelines."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import pipeline

from hf_quant import QATCallback, load_quantized, quantize_dynamic, save_quantized
from hf_quant.runtime.kernels import onednn_is_exact, use_kernel
from hf_quant.schemes import SCHEMES
from tests.tiny import Sentences, int8_model, logits, make_trainer, tiny_bert, tiny_gpt2, tiny_llama, tiny_tokenizer

LAYOUTS: dict[str, Any] = {
    "bert": tiny_bert,
    "llama-tied": tiny_llama,
    "llama-untied": lambda: tiny_llama(tie_word_embeddings=False),
    "bert-bf16": lambda: tiny_bert().bfloat16(),
}

PLAIN = textwrap.dedent(
    """
    import json, os, sys
    sys.modules["hf_quant"] = None  # so that importing it fails
    try:
        import hf_quant
    except ImportError:
        pass
    else:
        raise SystemExit("hf_quant could be imported")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    root = Path(sys.argv[1])
    batch = load_file(root / "batch.safetensors")
    found = {"refused": {}}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        classifier = folder.name.startswith("bert")
        auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        try:
            model, info = auto.from_pretrained(folder, output_loading_info=True)
        except Exception as error:
            found["refused"][folder.name] = str(error)
            continue
        found[folder.name] = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys")}
        with torch.no_grad():
            save_file({"logits": model.eval()(**batch).logits.contiguous()}, root / f"{folder.name}.safetensors")
    (root / "found.json").write_text(json.dumps(found))
    """
)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every layout that we write, read by one process that knows plain transformers only."""
    root = tmp_path_factory.mktemp("plain")
    torch.set_num_threads(1)
    for name, maker in LAYOUTS.items():
        for scheme in SCHEMES:
            save_quantized(int8_model(maker(), scheme), root / f"{name}-{scheme}")
    sharded = int8_model(tiny_bert(), "int8_static")
    save_quantized(sharded, root / "bert-sharded", max_shard_size="10KB")
    some = quantize_dynamic(tiny_bert(), targets=["*.query", "*word_embeddings", "classifier"], progress=False)
    save_quantized(some, root / "bert-some")
    save_quantized(quantize_dynamic(tiny_bert(), embeddings=False, progress=False), root / "bert-no-embeddings")
    both = quantize_dynamic(tiny_llama(), targets=["lm_head", "*embed_tokens", "*_proj"], progress=False)
    save_quantized(both, root / "llama-tied-int8")
    save_quantized(quantize_dynamic(tiny_gpt2(), progress=False), root / "gpt2")
    _train(root)
    save_file(Sentences(8, seed=7).batch(8), root / "batch.safetensors")
    command = [sys.executable, "-c", PLAIN, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return root, json.loads((root / "found.json").read_text())


def _train(root: Path) -> None:
    """What a Trainer saves, from a QAT run."""
    trainer = make_trainer(root.parent / "trained", callbacks=[QATCallback()])
    trainer.train()
    trainer.save_model(str(root / "bert-trained"))


FOLDERS = [f"{name}-{scheme}" for name in LAYOUTS for scheme in sorted(SCHEMES)]
FOLDERS += ["bert-sharded", "bert-some", "bert-no-embeddings", "llama-tied-int8", "bert-trained"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_are_the_references_bit_for_bit_and_the_fast_kernels_nearly(
    folder: str, reloaded: tuple[Path, dict[str, Any]]
) -> None:
    root, found = reloaded
    assert folder not in found["refused"], found["refused"][folder]
    assert not found[folder]["missing_keys"]
    assert not found[folder]["unexpected_keys"]
    plain = load_file(root / f"{folder}.safetensors")["logits"]
    model = load_quantized(root / folder)
    with use_kernel("reference"):
        reference = logits(model)
    if "bf16" in folder:
        _near(reference, plain, 0.1)
    else:
        assert torch.equal(reference, plain)
    _near(logits(model), plain, 0.1 if "bf16" in folder else 0.03)


def _near(got: Tensor, expected: Tensor, share: float) -> None:
    """A float32 sum in another order may turn a quantum over, which is a step for what follows."""
    assert got.dtype == expected.dtype
    assert (got.float() - expected.float()).norm() <= share * expected.float().norm()


@pytest.mark.skipif(not onednn_is_exact(), reason="this CPU or torch build has no exact oneDNN int8 product")
def test_fast_kernels_are_in_use_by_default(reloaded: tuple[Path, dict[str, Any]]) -> None:
    model = load_quantized(reloaded[0] / "bert-int8_static")
    logits(model)
    assert model.bert.pooler.dense._packed is not None


def test_fake_quant_is_int8_bit_for_bit(tmp_path: Path) -> None:
    """The last evaluation in training, in fake-quant, against the converted model on the reference kernel."""
    for maker, causal in ((tiny_bert, False), (tiny_llama, True), (tiny_gpt2, True)):
        for scheme in SCHEMES:
            callback = QATCallback(scheme, convert=False)
            trainer = make_trainer(tmp_path, maker(), [callback], causal=causal, changes={"max_steps": 4})
            trainer.train()
            with use_kernel("reference"):
                expected = logits(trainer.model)
                callback.convert = True
                callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
                assert torch.equal(logits(trainer.model), expected), (maker.__name__, scheme)


def test_conv1d_is_refused_by_plain_transformers_rather_than_garbled(reloaded: tuple[Path, dict[str, Any]]) -> None:
    assert "use hf_quant.load_quantized" in reloaded[1]["refused"]["gpt2"]


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_text_classification_pipeline(scheme: str, tmp_path: Path) -> None:
    model = int8_model(tiny_bert(), scheme)
    tokenizer = tiny_tokenizer()
    sentences = ["w3 w4 w5", "w90 w91 w92 w93 w94"]
    got = pipeline("text-classification", model=model, tokenizer=tokenizer)(sentences)
    with torch.no_grad():
        expected = model(**tokenizer(sentences[1], return_tensors="pt")).logits.softmax(-1)[0]
    assert got[1]["score"] == pytest.approx(float(expected.max()), rel=1e-5)
    assert got[1]["label"] == f"LABEL_{int(expected.argmax())}"
    save_quantized(model, tmp_path / "int8", processing_class=tokenizer)
    again = pipeline("text-classification", model=load_quantized(tmp_path / "int8"), tokenizer=tokenizer)(sentences)
    assert again == got


@pytest.mark.parametrize("maker", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_text_generation(scheme: str, maker: Any, tmp_path: Path) -> None:
    model = int8_model(maker(), scheme)
    save_quantized(model, tmp_path / "int8")
    batch = Sentences(2).batch(2)
    options = {"max_new_tokens": 5, "do_sample": False}
    got = model.generate(**batch, **options)
    assert got.shape == (2, 17)
    assert torch.equal(load_quantized(tmp_path / "int8").generate(**batch, **options), got)


def test_pipeline_of_a_model_just_trained(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[QATCallback()], processing_class=tiny_tokenizer())
    trainer.train()
    classify = pipeline("text-classification", model=trainer.model, tokenizer=tiny_tokenizer())
    assert 0.5 <= classify("w3 w4")[0]["score"] <= 1
