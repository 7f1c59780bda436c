"""Every species of the zoo: quantized, run, saved, reloaded here and in plain transformers, and nothing forgotten."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_quant import load_quantized, quantize_dynamic, quantize_static, save_quantized
from hf_quant.quantization.sensitivity import sqnr
from hf_quant.runtime.kernels import use_kernel
from hf_quant.targets import Selection, select_modules
from tests.zoo import SPECIES, batch_for, build, find_class, generate, heads, outputs

pytestmark = pytest.mark.timeout(900)  # the first test waits for the whole zoo

SCHEMES = ("int8_dynamic", "int8_static", "int4_weight_only")
SLOW_SCHEMES = ("int8_weight_only", "int4_dynamic")
MIN_SQNR = {"int8": 15.0, "int4": 3.0}  # dB; the models are random: what they compute is noise that nothing damps

# What plain transformers 5.23 with compressed-tensors 0.20 cannot read, whoever wrote it, with the error it gives.
NOT_PLAIN = {
    "gpt2": "use hf_quant.load_quantized",  # no other reader has an int8 Conv1D: it must refuse, not garble
    # Its larger sisters' SwiGLU may be stored fused; where a model has none, the reader stumbles over the rule for it.
    "dinov2": "you can only have one to many",
}
# Before it loads packed weights, it lets the model initialize itself, and these write to weights that are not there.
NOT_PLAIN_PACKED = dict.fromkeys(
    ("falcon", "modernbert", "mamba", "switch", "t5", "t5-gated", "dinov2-giant", "wav2vec2", "siglip"),
    "object has no attribute 'weight'",
)
# There generate() fails once the weights are unpacked, if the model as a whole has a buffer of its own: what the
# encoder returned reaches the decoder as a plain dict.
NO_PLAIN_TOKENS = ("bart", "mbart", "pegasus", "marian")

MAIN = [(species, kind.head) for species, kind in SPECIES.items()]
MAIN += [("bert", head) for _, head in heads("bert") if ("bert", head) not in MAIN]
OTHERS = sorted({(species, head) for species in SPECIES for _, head in heads(species)} - set(MAIN))
CASES = [(scheme, case, ()) for scheme in SCHEMES for case in MAIN]
CASES += [(scheme, case, pytest.mark.slow) for scheme in SLOW_SCHEMES for case in MAIN]
CASES += [(SCHEMES[0], case, pytest.mark.slow) for case in OTHERS]
CASES = [pytest.param(scheme, *case, id="-".join([scheme, *case]), marks=marks) for scheme, case, marks in CASES]

PLAIN = textwrap.dedent(
    """
    import json, os, sys
    sys.modules["hf_quant"] = None  # so that importing it fails
    os.environ["HF_HUB_OFFLINE"] = "1"
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from safetensors.torch import save_file
    from tests.zoo import batch_for, find_class, generate, outputs

    root = Path(sys.argv[1])
    found = {}
    for name, (folder, species, auto) in json.loads((root / "cases.json").read_text()).items():
        try:
            model, info = find_class(auto).from_pretrained(root / folder, output_loading_info=True)
            batch = batch_for(species, model.eval())
            tensors = {"output": outputs(model, batch)}
            if model.can_generate() and species not in sys.argv[2:]:
                tensors["tokens"] = {"tokens": generate(model, batch)}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        found[name] = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys")}
        found[name]["class"] = type(model).__name__
        for kind, values in tensors.items():
            save_file(values, root / folder / f"plain-{kind}")
    (root / "found.json").write_text(json.dumps(found))
    """
)


@dataclass
class Served:
    """What became of one model."""

    folder: Path
    before: dict[str, Tensor]
    error: Exception | None = None
    after: dict[str, Tensor] = field(default_factory=dict)
    reference: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    plain: dict[str, Any] = field(default_factory=dict)


def _serve(
    folder: Path, scheme: str, model: PreTrainedModel, batch: dict[str, Tensor], before: dict[str, Tensor]
) -> Served:
    served = Served(folder, before)
    batch = {name: value.clone() for name, value in batch.items()}  # BLIP's generate writes into it
    try:
        if scheme.endswith("static"):
            int8 = quantize_static(model, [batch], scheme, progress=False)
        else:
            int8 = quantize_dynamic(model, scheme, progress=False)
        served.after = outputs(int8, batch)
        save_quantized(int8, folder)
        with use_kernel("reference"):
            served.reference = outputs(int8, batch)
            if int8.can_generate():
                served.tokens = generate(int8, batch)
    except Exception as error:  # of one model: the others are served all the same
        served.error = error
    return served


@pytest.fixture(scope="module")
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Served]:
    """Every model that the selected tests ask for, and one process that reloads all of them plain."""
    root = tmp_path_factory.mktemp("zoo")
    torch.set_num_threads(1)
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    calls = [item.callspec.params for item in items]
    cases = {(call["scheme"], call["species"], call["head"]): None for call in calls if "scheme" in call}
    autos = {(species, head): auto for species in SPECIES for auto, head in heads(species)}
    found: dict[Any, Served] = {}
    for species, head in dict.fromkeys(case[1:] for case in cases):
        model = build(species, head)
        batch = batch_for(species, model)
        before = outputs(model, batch)
        for case in (case for case in cases if case[1:] == (species, head)):
            found[case] = _serve(root / str(len(found)), case[0], model, batch, before)  # leaves the model as it is
    wanted = {
        "/".join(case): (served.folder.name, case[1], autos.get(case[1:], case[2]))
        for case, served in found.items()
        if served.error is None
    }
    (root / "cases.json").write_text(json.dumps(wanted))
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(root), *NO_PLAIN_TOKENS],
        capture_output=True, text=True, timeout=800, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, plain in json.loads((root / "found.json").read_text()).items():
        found[tuple(name.split("/"))].plain = plain
    return found


def _served(zoo: dict[Any, Served], *case: str) -> Served:
    served = zoo[case]
    if served.error is not None:
        raise served.error
    return served


def _first(values: dict[str, Tensor]) -> Tensor:
    """The first output that is no single number, such as a loss."""
    return next(value for value in values.values() if value.ndim)


def _same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert torch.equal(got[name], value), (name, sqnr(value, got[name]))


@pytest.mark.parametrize(("scheme", "species", "head"), CASES)
def test_outputs_stay_close(zoo: dict[Any, Served], scheme: str, species: str, head: str) -> None:
    served = _served(zoo, scheme, species, head)
    assert MIN_SQNR[scheme[:4]] < sqnr(_first(served.before), _first(served.after)) < math.inf


@pytest.mark.parametrize(("scheme", "species", "head"), CASES)
def test_loaded_again_it_is_the_same(zoo: dict[Any, Served], scheme: str, species: str, head: str) -> None:
    served = _served(zoo, scheme, species, head)
    cls = find_class(head)
    own = cls.__module__ == "tests.zoo"
    loaded = load_quantized(served.folder, auto_class=cls if own else None)
    assert type(loaded) is cls
    _same(outputs(loaded, batch_for(species, loaded)), served.after)


@pytest.mark.parametrize(("scheme", "species", "head"), CASES)
def test_plain_transformers_reads_it(zoo: dict[Any, Served], scheme: str, species: str, head: str) -> None:
    served = _served(zoo, scheme, species, head)
    refusals = {**(NOT_PLAIN_PACKED if scheme.startswith("int4") else {}), **NOT_PLAIN}
    if species in refusals:
        assert refusals[species] in served.plain["error"]
        return
    assert served.plain == {"missing_keys": [], "unexpected_keys": [], "class": head}
    _same(load_file(served.folder / "plain-output"), dict(sorted(served.reference.items())))
    if served.tokens is not None and species not in NO_PLAIN_TOKENS:
        assert torch.equal(load_file(served.folder / "plain-tokens")["tokens"], served.tokens)


@pytest.mark.parametrize(
    ("species", "head"), [*MAIN, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_no_weight_is_forgotten(species: str, head: str) -> None:
    model = build(species, head)
    forgotten = _forgotten(model, select_modules(model))
    assert not forgotten


def _forgotten(model: nn.Module, selection: Selection) -> dict[str, str]:
    """Parameters of at least two axes that are neither quantized nor named as left: class of their module by name."""
    known = {*selection.quantized, *selection.left}
    found = {}
    for owner, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or sum(size > 1 for size in parameter.shape) < 2:
                continue
            name = f"{owner}.{key}"
            parts = name.split(".")
            if not any(".".join(parts[:count]) in known for count in range(1, len(parts) + 1)):
                found[name] = f"{type(module).__name__} {tuple(parameter.shape)}"
    return found


def test_odd_modules_are_left_with_a_reason() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(32, 32),
            "attention": nn.MultiheadAttention(32, 2),
            "bilinear": nn.Bilinear(4, 4, 4),
            "lstm": nn.LSTM(4, 4),
            "conv": nn.Conv2d(8, 3, 1),
            "bag": nn.EmbeddingBag(4, 4),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "normed by a hook": nn.utils.spectral_norm(nn.Linear(4, 4)),
        }
    )
    selection = select_modules(model)
    assert set(selection.quantized) == {"linear"}
    assert not _forgotten(model, selection)


def test_adapters_merged_by_peft_are_served_and_unmerged_ones_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(**options))
    with pytest.raises(ValueError, match=r"Merge it first: model = model\.merge_and_unload\(\)"):
        quantize_dynamic(model, progress=False)
    merged = model.merge_and_unload().eval()
    batch = batch_for("llama", merged)
    int8 = quantize_dynamic(merged, progress=False)
    assert MIN_SQNR["int8"] < sqnr(_first(outputs(merged, batch)), _first(outputs(int8, batch))) < math.inf
    save_quantized(int8, tmp_path / "int8")
    _same(outputs(load_quantized(tmp_path / "int8"), batch), outputs(int8, batch))
