"""Save and load int8 models: whole or not at all, and byte for byte the same again."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .errors import did_you_mean
from .hf_quantizer import METHOD, HfQuantConfig, HfQuantQuantizer
from .layout import QUANT_METHOD, quantization_config
from .runtime.base import quantized_modules, refuse_float_weights

_WEIGHTS = "model*.safetensors*"
_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder")


def attach_quantizer(model: nn.Module) -> None:
    """Make a model with int8 modules save itself in the layout, through `save_pretrained` and the Trainer."""
    model.register_load_state_dict_pre_hook(refuse_float_weights)  # before any part of it is loaded
    if not isinstance(model, PreTrainedModel):
        return  # a plain module in a Trainer: its state dict holds the int8 buffers as they are
    config = HfQuantConfig(quantization_config(model))
    model.hf_quantizer = HfQuantQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.config._is_quantized = True
    model.is_quantized = True
    model.quantization_method = METHOD
    _save_whole(model)


def save_quantized(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    processing_class: Any = None,
    overwrite: bool = False,
    **kwargs: Any,
) -> None:
    """Write an int8 model, its config, generation config and tokenizer into a folder.

    Everything is written into a folder beside first and moved when it is whole: a full disk or a crash while
    writing leaves what was there before.

    Args:
        model (`PreTrainedModel`): a model with int8 modules.
        path (`str`): the folder to make.
        processing_class (*optional*): a tokenizer or processor to save along.
        overwrite (`bool`, *optional*, defaults to `False`): whether a folder that is not empty may be changed.
        kwargs: passed on to `save_pretrained`, such as `max_shard_size="2GB"`.

    Raises:
        `ValueError`: if the model has no int8 module.
        `FileExistsError`: if the folder is not empty and `overwrite` is not set.
    """
    if not quantized_modules(model):
        raise ValueError(
            f"{type(model).__name__} has no int8 module. Quantize it first, with quantize_dynamic or QATCallback."
        )
    require_free_folder(path, overwrite)
    with whole_folder(path) as beside:
        type(model).save_pretrained(model, beside, **{**_names_as_in_memory(model), **kwargs})
        if processing_class is not None:
            processing_class.save_pretrained(beside)


def load_quantized(
    path: str | os.PathLike[str], auto_class: type[Any] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load an int8 checkpoint straight into int8 modules; float weights are never made.

    Args:
        path (`str`): a folder or hub id, written by hf_quant or by another writer of the same layout.
        auto_class (*optional*): the class to load with, such as `AutoModelForSequenceClassification`; by default
            the one that `config.json` names in `architectures`.
        kwargs: passed on to `from_pretrained`, such as `device_map`, `revision` or `token`.

    Returns:
        `PreTrainedModel`: in eval mode; saving it again gives the same bytes.

    Raises:
        `FileNotFoundError`: if a local folder has no `config.json` or no safetensors weights.
        `ValueError`: if the checkpoint is not quantized, in a way that hf_quant cannot run, or damaged.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        require_sound_folder(path)
    hub: dict[str, Any] = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    config = load_config(path, auto_class, trust_remote_code=kwargs.get("trust_remote_code"), **hub)
    layout = getattr(config, "quantization_config", None)
    if not isinstance(layout, dict) or layout.get("quant_method") != QUANT_METHOD:
        found = layout.get("quant_method") if isinstance(layout, dict) else None
        raise ValueError(
            f"{path} is not an int8 checkpoint that hf_quant can load: its quant_method is {found!r}, not "
            f"{QUANT_METHOD!r}. Load it with from_pretrained, or quantize it with hf_quant.quantize_dynamic."
        )
    config.quantization_config = {"quant_method": METHOD, "layout": layout}
    cls = auto_class or architecture(config, path)
    model, info = cls.from_pretrained(
        path, config=config, output_loading_info=True, **{"ignore_mismatched_sizes": True, **kwargs}
    )
    # transformers 5.20 loads a buffer of another shape without a word.
    silent = [
        (f"{name}.{buffer}", found, expected)
        for name, module in quantized_modules(model).items()
        for buffer, found, expected in module.stored_shapes()
        if found != expected
    ]
    for name, found, expected in [*info["mismatched_keys"], *silent]:
        raise ValueError(
            f"{name} in {path} has shape {tuple(found)}, but {type(model).__name__} has {tuple(expected)}. The "
            "weights and config.json are of different models: save it again."
        )
    missing = sorted(set(info["missing_keys"]) - set(model.hf_quantizer.tied))
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}; they would be "
            "random. The folder is incomplete, or was saved from another architecture: save it again."
        )
    _require_int8_weights(_snapshot(path, hub))
    model.register_load_state_dict_pre_hook(refuse_float_weights)
    _save_whole(model)
    return model


def load_config(path: str, auto_class: type[Any] | None, **options: Any) -> Any:
    """The config of a checkpoint; that of a model class of the user's own is found through the class."""
    own = getattr(auto_class, "config_class", None)
    if own is not None:
        return own.from_pretrained(path, **{key: value for key, value in options.items() if value is not None})
    return AutoConfig.from_pretrained(path, **options)


def is_quantized_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder's `config.json` says that it holds a compressed-tensors checkpoint."""
    config = Path(path) / "config.json"
    if not config.is_file():
        return False
    with config.open(encoding="utf-8") as file:
        layout = json.load(file).get("quantization_config") or {}
    return bool(layout.get("quant_method") == QUANT_METHOD)


def architecture(config: Any, path: str) -> type[Any]:
    """The transformers class that a config names in `architectures`."""
    import transformers

    names = list(getattr(config, "architectures", None) or [])
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise ValueError(
            f"{path}/config.json names {names or 'no architecture'}, which transformers {transformers.__version__} "
            f"does not have{did_you_mean(names[0], dir(transformers)) if names else '.'} "
            "Pass `auto_class`, such as AutoModelForSequenceClassification."
        )
    return cls


def require_free_folder(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse an output path that is a file, or a folder that is not empty unless `overwrite`."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder. Choose another output folder.")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty. Choose another output folder, or allow it to be overwritten "
            "(`overwrite=True`, `--overwrite`)."
        )


def require_sound_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a local model folder whose files are missing or cut off, by reading the headers only.

    Raises:
        `FileNotFoundError`: if there is no `config.json`, no weights, or a shard is missing.
        `ValueError`: if a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a model folder. Check the path.")
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({error}). Copy or save the model again.") from error
        lost = sorted(named - {file.name for file in files})
        if lost:
            raise FileNotFoundError(f"{folder} lacks {', '.join(lost)}, which its index names. Copy it again.")
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors file. hf_quant reads no other weights.")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged or cut off ({error}; {file.stat().st_size} bytes). Copy or save it again."
            ) from error


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[str]:
    """A folder beside `path` to write into; its files are moved to `path` when the block ends without an error.

    Files of the same name are replaced one by one, each in an instant, `config.json` last; weights of an earlier
    save that the new one does not have are removed, other files stay.
    """
    folder = Path(path).resolve()
    there = folder.is_dir()
    if not there:
        folder.parent.mkdir(parents=True, exist_ok=True)
    # Inside a folder that exists: it may be a disk of its own, onto which nothing can be moved in an instant.
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder if there else folder.parent))
    try:
        yield str(beside)
        if not there:
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(beside, 0o777 & ~umask)  # mkdtemp keeps others out
            os.rename(beside, folder)
            return
        written = sorted(beside.iterdir(), key=lambda file: (file.name == "config.json", file.name))
        for file in written:
            if file.is_dir():
                shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
            else:
                os.replace(file, folder / file.name)
        new = {file.name for file in written}
        if any(file.match(_WEIGHTS) for file in written):
            for stale in folder.glob(_WEIGHTS):
                if stale.name not in new:
                    stale.unlink()
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _snapshot(path: str, hub: dict[str, Any]) -> Path:
    """Where a model's files lie: a local folder itself, or a hub id's place in the cache."""
    from transformers.utils import cached_file

    return Path(path) if os.path.isdir(path) else Path(cached_file(path, "config.json", **hub)).parent


def _require_int8_weights(folder: Path) -> None:
    """Refuse float weights under an int8 config, which loading would cast to int8 without a word.

    That is what plain transformers writes when it saves such a model after a forward.
    """
    from safetensors import safe_open

    weights: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - no mapping, it only has this method
                weights[key] = opened.get_slice(key).get_dtype()
    for key, dtype in weights.items():
        if f"{key}_scale" in weights and dtype != "I8":
            raise ValueError(
                f"{key} in {folder} is {dtype}, although config.json says int8: the model was saved by plain "
                "transformers after a forward, which turns the weights to float. Save it with hf_quant, or before "
                "its first forward."
            )


def _names_as_in_memory(model: PreTrainedModel) -> dict[str, Any]:
    """For mixtures of experts: transformers would split fused experts into one matrix an expert, as they once were.

    The layout's reader takes those for Linear layers that it has to decompress.
    """
    fused = any(
        "Expert" in type(module).__name__ and any(p.ndim == 3 for p in module.parameters(recurse=False))
        for module in model.modules()
    )
    return {"save_original_format": False} if fused else {}


def _save_whole(model: PreTrainedModel) -> None:
    """Let the model's own `save_pretrained` write beside and move, as [`save_quantized`] does."""
    model.save_pretrained = types.MethodType(_save_pretrained, model)


def _save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    upstream = type(self).save_pretrained
    kwargs = {**_names_as_in_memory(self), **kwargs}
    if not kwargs.get("is_main_process", True) or kwargs.get("push_to_hub") or os.path.isfile(save_directory):
        upstream(self, save_directory, **kwargs)
        return
    with whole_folder(save_directory) as beside:
        upstream(self, beside, **kwargs)
