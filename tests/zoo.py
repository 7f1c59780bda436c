"""A zoo of tiny random models: many architectures, and for each every `AutoModel*` head that transformers has.

Nothing here imports hf_quant: a process that must not see it reloads the zoo's checkpoints plain.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 96
LENGTH = 8

# Widths are multiples of 32, so that int4 groups of 32 fit; the smallest that the architectures allow.
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_ENCODER: dict[str, Any] = {**_TOKENS, **_BODY, "max_position_embeddings": 32, "type_vocab_size": 2}
_DECODER: dict[str, Any] = {
    **_TOKENS, **_BODY, "max_position_embeddings": 32, "num_key_value_heads": 1, "head_dim": 16, "use_cache": True,
}  # fmt: skip
_BART: dict[str, Any] = {
    **_TOKENS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32,
    "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
_T5: dict[str, Any] = {
    **_TOKENS, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
_VISION: dict[str, Any] = {**_BODY, "image_size": 16, "patch_size": 4}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "router_jitter_noise": 0.0}
_RELATIVE: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_WAVES: dict[str, Any] = {
    **_BODY, "vocab_size": 32, "pad_token_id": 0, "conv_dim": (32, 32), "conv_kernel": (5, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 32, "tdnn_dim": (32, 32), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1),
    "xvector_output_dim": 32, "num_codevectors_per_group": 8, "codevector_dim": 32, "proj_codevector_dim": 32,
}  # fmt: skip


def _ids(seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def _text() -> dict[str, Tensor]:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, LENGTH - 2 :] = 0
    return {"input_ids": _ids() * mask, "attention_mask": mask}


def _text_to_text() -> dict[str, Tensor]:
    text = _text()
    text["input_ids"][0, -1] = text["input_ids"][1, LENGTH - 3] = 2  # some classifiers read the end of the sentence
    return {**text, "decoder_input_ids": _ids(1)}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _pixels(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": _noise(2, 3, size, size)}


def _text_and_pixels() -> dict[str, Tensor]:
    return {**_text(), **_pixels(), "decoder_input_ids": _ids(1)}


def _page() -> dict[str, Tensor]:
    return {**_text(), "bbox": torch.tensor([1, 2, 20, 30]).expand(2, LENGTH, 4)}


def _wave() -> dict[str, Tensor]:
    return {"input_values": _noise(2, 320)}


@dataclass(frozen=True)
class Species:
    """An architecture.

    Args:
        config (`str`): name of the config's class in transformers.
        sizes (`dict`): the config's arguments.
        inputs (callable): keyword arguments for the forward of any of its heads, which takes what it knows.
        head (`str`): class of the head that is tested by default; the others are in the slow tests.
    """

    config: str
    sizes: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    head: str


SPECIES: dict[str, Species] = {
    # Encoders.
    "bert": Species("BertConfig", _ENCODER, _text, "BertForSequenceClassification"),
    "roberta": Species("RobertaConfig", _ENCODER, _text, "RobertaForTokenClassification"),
    "xlm-roberta": Species("XLMRobertaConfig", _ENCODER, _text, "XLMRobertaForMaskedLM"),
    "distilbert": Species(
        "DistilBertConfig", {**_TOKENS, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64,
        "max_position_embeddings": 32}, _text, "DistilBertForQuestionAnswering",
    ),
    "albert": Species("AlbertConfig", {**_ENCODER, "embedding_size": 32}, _text, "AlbertForSequenceClassification"),
    "electra": Species("ElectraConfig", {**_ENCODER, "embedding_size": 32}, _text, "ElectraForPreTraining"),
    "deberta": Species("DebertaConfig", {**_ENCODER, **_RELATIVE}, _text, "DebertaForSequenceClassification"),
    "deberta-v2": Species("DebertaV2Config", {**_ENCODER, **_RELATIVE}, _text, "DebertaV2ForSequenceClassification"),
    "deberta-v3": Species(
        "DebertaV2Config", {**_ENCODER, **_RELATIVE, "position_buckets": 8, "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False}, _text, "DebertaV2ForTokenClassification",
    ),
    "mpnet": Species("MPNetConfig", _ENCODER, _text, "MPNetForSequenceClassification"),
    "modernbert": Species(
        "ModernBertConfig", {**_ENCODER, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}, _text,
        "ModernBertForSequenceClassification",
    ),
    "nomic-bert": Species("NomicBertConfig", _ENCODER, _text, "NomicBertForSequenceClassification"),
    "gte": Species("GteConfig", _ENCODER, _text, "GteForSequenceClassification"),
    "xlnet": Species(
        "XLNetConfig", {**_TOKENS, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}, _text,
        "XLNetForSequenceClassification",
    ),
    # Decoders.
    "gpt2": Species(
        "GPT2Config", {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}, _text, "GPT2LMHeadModel"
    ),
    "gpt-neo": Species(
        "GPTNeoConfig", {**_TOKENS, "hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
        "num_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32}, _text, "GPTNeoForCausalLM",
    ),
    "gpt-neox": Species("GPTNeoXConfig", _DECODER, _text, "GPTNeoXForCausalLM"),
    "opt": Species(
        "OPTConfig", {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
        "max_position_embeddings": 32, "word_embed_proj_dim": 32}, _text, "OPTForCausalLM",
    ),
    "bloom": Species(
        "BloomConfig", {**_TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 2}, _text, "BloomForCausalLM"
    ),
    "falcon": Species(
        "FalconConfig", {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "ffn_hidden_size": 64}, _text, "FalconForCausalLM",
    ),
    "llama": Species("LlamaConfig", _DECODER, _text, "LlamaForCausalLM"),
    "llama-tied": Species("LlamaConfig", {**_DECODER, "tie_word_embeddings": True}, _text, "LlamaForCausalLM"),
    "mistral": Species("MistralConfig", _DECODER, _text, "MistralForCausalLM"),
    "qwen2": Species("Qwen2Config", _DECODER, _text, "Qwen2ForCausalLM"),
    "qwen3": Species("Qwen3Config", _DECODER, _text, "Qwen3ForCausalLM"),
    "gemma": Species("GemmaConfig", _DECODER, _text, "GemmaForCausalLM"),
    "gemma2": Species("Gemma2Config", {**_DECODER, "query_pre_attn_scalar": 16}, _text, "Gemma2ForCausalLM"),
    "gemma3": Species("Gemma3TextConfig", {**_DECODER, "query_pre_attn_scalar": 16}, _text, "Gemma3ForCausalLM"),
    "phi": Species("PhiConfig", _DECODER, _text, "PhiForCausalLM"),
    "phi3": Species("Phi3Config", _DECODER, _text, "Phi3ForCausalLM"),
    "mamba": Species(
        "MambaConfig", {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 32},
        _text, "MambaForCausalLM",
    ),
    # Mixtures of experts.
    "mixtral": Species("MixtralConfig", {**_DECODER, **_EXPERTS, "num_local_experts": 4}, _text, "MixtralForCausalLM"),
    "qwen2-moe": Species(
        "Qwen2MoeConfig", {**_DECODER, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32}, _text,
        "Qwen2MoeForCausalLM",
    ),
    "qwen3-moe": Species("Qwen3MoeConfig", {**_DECODER, **_EXPERTS, "num_experts": 4}, _text, "Qwen3MoeForCausalLM"),
    "gpt-oss": Species("GptOssConfig", {**_DECODER, **_EXPERTS, "num_local_experts": 4}, _text, "GptOssForCausalLM"),
    "switch": Species(
        "SwitchTransformersConfig", {**_T5, "num_experts": 2, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1}, _text_to_text, "SwitchTransformersForConditionalGeneration",
    ),
    # Encoder-decoders.
    "t5": Species("T5Config", _T5, _text_to_text, "T5ForConditionalGeneration"),
    "t5-gated": Species(
        "T5Config", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, _text_to_text,
        "T5ForConditionalGeneration",
    ),
    "bart": Species("BartConfig", _BART, _text_to_text, "BartForConditionalGeneration"),
    "mbart": Species("MBartConfig", _BART, _text_to_text, "MBartForConditionalGeneration"),
    "pegasus": Species("PegasusConfig", _BART, _text_to_text, "PegasusForConditionalGeneration"),
    "marian": Species("MarianConfig", _BART, _text_to_text, "MarianMTModel"),
    # Vision.
    "vit": Species("ViTConfig", {**_VISION, "encoder_stride": 4}, _pixels, "ViTForImageClassification"),
    "dinov2": Species("Dinov2Config", _VISION, _pixels, "Dinov2ForImageClassification"),
    "dinov2-giant": Species("Dinov2Config", {**_VISION, "use_swiglu_ffn": True}, _pixels, "Dinov2Model"),
    "swin": Species(
        "SwinConfig", {"image_size": 16, "patch_size": 2, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2],
        "window_size": 4, "encoder_stride": 4}, _pixels, "SwinForImageClassification",
    ),
    "beit": Species(
        "BeitConfig", {**_VISION, "num_hidden_layers": 4, "vocab_size": 32, "use_relative_position_bias": True,
        "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2]}, _pixels, "BeitForImageClassification",
    ),
    "convnext": Species(
        "ConvNextConfig", {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2, "patch_size": 2}, _pixels,
        "ConvNextForImageClassification",
    ),
    "detr": Species(
        "DetrConfig", {**_BART, "encoder_attention_heads": 8, "num_queries": 5, "backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1],
        "out_features": ["stage1", "stage2", "stage3", "stage4"]}}, lambda: _pixels(64), "DetrForObjectDetection",
    ),
    "vit-mae": Species(
        "ViTMAEConfig", {**_VISION, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2, "decoder_intermediate_size": 64},
        lambda: {**_pixels(), "noise": _noise(2, 16)}, "ViTMAEForPreTraining",
    ),
    # Audio.
    "whisper": Species(
        "WhisperConfig", {**_BART, "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32,
        "classifier_proj_size": 32, "begin_suppress_tokens": None, "suppress_tokens": None},
        lambda: {"input_features": _noise(2, 16, 32), "decoder_input_ids": _ids(1), "input_ids": _ids()},
        "WhisperForConditionalGeneration",
    ),
    "wav2vec2": Species("Wav2Vec2Config", _WAVES, _wave, "Wav2Vec2ForCTC"),
    "hubert": Species("HubertConfig", _WAVES, _wave, "HubertForCTC"),
    "ast": Species(
        "ASTConfig", {**_BODY, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16,
        "num_mel_bins": 16}, lambda: {"input_values": _noise(2, 16, 16)}, "ASTForAudioClassification",
    ),
    # Several senses.
    "clip": Species(
        "CLIPConfig", {"text_config": _ENCODER, "vision_config": _VISION, "projection_dim": 32}, _text_and_pixels,
        "CLIPModel",
    ),
    "siglip": Species(
        "SiglipConfig", {"text_config": _ENCODER, "vision_config": _VISION}, _text_and_pixels, "SiglipModel"
    ),
    "blip": Species(
        "BlipConfig", {"text_config": {**_ENCODER, "encoder_hidden_size": 32, "sep_token_id": 2}, "projection_dim": 32,
        "vision_config": _VISION, "image_text_hidden_size": 32}, _text_and_pixels, "BlipForConditionalGeneration",
    ),
    "layoutlm": Species("LayoutLMConfig", _ENCODER, _page, "LayoutLMForTokenClassification"),
}  # fmt: skip


class WandererConfig(PreTrainedConfig):
    model_type = "wanderer"
    hidden_size = 32


class Wanderer(PreTrainedModel):
    """Someone's own model: how often which layer runs depends on the values that flow through it."""

    config_class = WandererConfig
    base_model_prefix = "wanderer"

    def __init__(self, config: WandererConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCAB, config.hidden_size)
        self.layers = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.shortcut = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(input_ids)
        for layer in self.layers[: 1 + int(input_ids[0, 0]) % len(self.layers)]:
            hidden = hidden + layer(hidden).tanh()
        if hidden.mean() > -1:
            hidden = self.shortcut(hidden)
        while hidden.abs().max() > 1:
            hidden = self.layers[0](hidden).tanh() / 2
        return {"logits": hidden}


SPECIES = {name: kind for name, kind in SPECIES.items() if hasattr(transformers, kind.config)}  # older transformers
SPECIES["wanderer"] = Species("WandererConfig", {}, _text, "Wanderer")


def find_class(name: str) -> Any:
    """A class of transformers, or of this file."""
    return globals().get(name) or getattr(transformers, name)


def build(species: str, head: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode, the same one for the same seed."""
    kind = SPECIES[species]
    model: PreTrainedModel = find_class(head or kind.head)(find_class(kind.config)(**kind.sizes))
    return enliven(model, seed).eval()


def enliven(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Draw all weights and biases anew, large enough for activations to matter; most start with tiny or zero ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue  # fixed sinusoids, which a reload computes anew
            if parameter.ndim > 1:
                parameter.normal_(0, max(parameter.shape[1:]) ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
    return model


@functools.cache
def _autos() -> dict[str, Any]:
    """The `AutoModel*` classes, each with the class names that it knows by model type; finding them takes a second."""
    found = {}
    for auto in sorted(name for name in dir(transformers) if name.startswith("AutoModel")):
        mapping = getattr(getattr(transformers, auto), "_model_mapping", None)
        # AutoModelForDecision makes a model of another architecture around the species.
        if mapping and auto != "AutoModelForDecision":
            found[auto] = mapping._model_mapping  # names, without importing models
    return found


def heads(species: str) -> Iterator[tuple[str, str]]:
    """Names of the `AutoModel*` classes that know the species, each with the class that it makes."""
    model_type = find_class(SPECIES[species].config).model_type
    for auto, mapping in _autos().items():
        made = mapping.get(model_type, ())
        for name in [made] if isinstance(made, str) else made:
            yield auto, name


def batch_for(species: str, model: nn.Module) -> dict[str, Tensor]:
    """What the model's forward takes of the species' inputs."""
    known = inspect.signature(model.forward).parameters
    batch = {name: value for name, value in SPECIES[species].inputs().items() if name in known}
    if type(model).__name__.endswith("MaskedImageModeling"):
        patches = model.base_model.embeddings.patch_embeddings.num_patches
        batch["bool_masked_pos"] = torch.arange(2 * patches).reshape(2, patches) % 3 == 0
    if type(model).__name__.endswith("MultipleChoice"):
        return {name: torch.stack([value, value.flip(0)], 1) for name, value in batch.items()}
    return batch


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every float tensor in what the model returns, by its place in there."""
    found: dict[str, Tensor] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            found[name] = value.contiguous().clone()
        elif isinstance(value, dict):
            for key, item in value.items():
                collect(f"{name}.{key}".lstrip("."), item)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                collect(f"{name}.{index}", item)

    with torch.random.fork_rng():
        torch.manual_seed(0)  # some draw random numbers in eval mode too
        collect("", model(**batch))
    return found


def generate(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Five greedy tokens."""
    if type(model).__name__ == "BlipForQuestionAnswering":
        batch = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    return model.generate(**batch, max_new_tokens=5, do_sample=False)  # type: ignore[no-any-return]
