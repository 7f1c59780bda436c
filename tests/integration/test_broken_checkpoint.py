"""Folders that are damaged, and disks that fail while one is written: words, and the old folder whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers.modeling_utils
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_quant import QATCallback, load_quantized, quantize_dynamic, save_quantized
from tests.tiny import folder_bytes, logits, make_trainer, tiny_bert, tiny_tokenizer


@pytest.fixture
def model() -> PreTrainedModel:
    return quantize_dynamic(tiny_bert(), progress=False)


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    save_quantized(model, tmp_path / "int8", processing_class=tiny_tokenizer())
    return tmp_path / "int8"


@pytest.fixture
def sharded(model: PreTrainedModel, tmp_path: Path) -> Path:
    save_quantized(model, tmp_path / "sharded", max_shard_size="10KB")
    return tmp_path / "sharded"


class TestLoading:
    @pytest.mark.parametrize("kept", [0, 7, 100, -1])
    def test_truncated_weights(self, kept: int, folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        size = file.stat().st_size
        with pytest.raises(
            ValueError,
            match=rf"model\.safetensors is damaged or cut off \(.*; {size} bytes\)\. Copy or save it again\.",
        ):
            load_quantized(folder)

    def test_truncated_shard(self, sharded: Path) -> None:
        file = sorted(sharded.glob("*.safetensors"))[1]
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ValueError, match=rf"{file.name} is damaged or cut off"):
            load_quantized(sharded)

    def test_garbage_in_the_header(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[8:40] = b"\xff" * 32
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut off"):
            load_quantized(folder)

    def test_header_longer_than_the_file(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(struct.pack("<Q", 2**40) + file.read_bytes()[8:])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut off"):
            load_quantized(folder)

    def test_missing_shard(self, sharded: Path) -> None:
        lost = sorted(sharded.glob("*.safetensors"))[1]
        lost.unlink()
        with pytest.raises(FileNotFoundError, match=rf"lacks {lost.name}, which its index names\. Copy it again\."):
            load_quantized(sharded)

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}'])
    def test_damaged_index(self, content: str, sharded: Path) -> None:
        (sharded / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged .* Copy or save"):
            load_quantized(sharded)

    def test_missing_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors file\. hf_quant reads no other"):
            load_quantized(folder)

    def test_missing_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"has no config\.json, so it is not a model folder\. Check"):
            load_quantized(folder)

    def test_config_that_is_cut_off(self, folder: Path) -> None:
        config = folder / "config.json"
        config.write_text(config.read_text()[:-20])
        with pytest.raises((ValueError, OSError), match=r"config\.json"):
            load_quantized(folder)

    def test_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="nowhere"):
            load_quantized(tmp_path / "nowhere")

    def test_float_checkpoint(self, tmp_path: Path) -> None:
        tiny_bert().save_pretrained(tmp_path / "float")
        with pytest.raises(
            ValueError,
            match=r"float is not an int8 checkpoint that hf_quant can load: its quant_method is None, not "
            r"'compressed-tensors'\. Load it with from_pretrained, or quantize it",
        ):
            load_quantized(tmp_path / "float")

    def test_checkpoint_of_another_method(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"its quant_method is 'gptq', not 'compressed-tensors'"):
            load_quantized(folder)

    @pytest.mark.parametrize("name", ["bert.pooler.dense.weight_scale", "bert.pooler.dense.weight", "classifier.bias"])
    def test_missing_tensor(self, name: str, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"lacks 1 tensors of BertForSequenceClassification, such as {name}"):
            load_quantized(folder)

    def test_tensor_of_another_shape(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["bert.pooler.dense.weight"] = tensors["bert.pooler.dense.weight"][:-1].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match=r"bert\.pooler\.dense\.weight"):
            load_quantized(folder)

    def test_float_weights_under_an_int8_config(self, folder: Path) -> None:
        """Loaded as they are, they would be rounded to a few integers: silent garbage."""
        tensors = load_file(folder / "model.safetensors")
        tensors["bert.pooler.dense.weight"] = torch.randn(32, 32)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match=r"bert\.pooler\.dense\.weight"):
            load_quantized(folder)


def _fill_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the n-th weights file, when half of it is written."""
    original = safetensors.torch.save_file
    written = 0

    def save(tensors: dict[str, torch.Tensor], filename: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal written
        written += 1
        original(tensors, filename, *args, **kwargs)
        if written == count:
            size = os.path.getsize(filename)
            os.truncate(filename, size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(filename))

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", save)


class TestFullDisk:
    @pytest.mark.parametrize("method", ["save_quantized", "save_pretrained"])
    def test_the_old_folder_stays_whole_and_nothing_stays_beside(
        self, method: str, model: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = folder_bytes(folder.parent)
        model.classifier.weight.data.zero_()
        _fill_after(1, monkeypatch)
        save = partial(save_quantized, model, overwrite=True, path=folder)
        with pytest.raises(OSError, match="No space left on device"):
            save() if method == "save_quantized" else model.save_pretrained(folder)
        assert folder_bytes(folder.parent) == before
        assert [path.name for path in folder.parent.iterdir()] == ["int8"]

    def test_at_a_later_shard(self, model: PreTrainedModel, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = folder_bytes(sharded.parent)
        model.classifier.weight.data.zero_()
        _fill_after(2, monkeypatch)
        with pytest.raises(OSError, match="No space left on device"):
            save_quantized(model, sharded, overwrite=True, max_shard_size="10KB")
        assert folder_bytes(sharded.parent) == before
        assert [path.name for path in sharded.parent.iterdir()] == ["sharded"]

    def test_at_the_tokenizer(self, model: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Full:
            def save_pretrained(self, path: str) -> None:
                (Path(path) / "tokenizer.json").write_text("{")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        before = folder_bytes(folder.parent)
        with pytest.raises(OSError, match="No space left on device"):
            save_quantized(model, folder, processing_class=Full(), overwrite=True)
        assert folder_bytes(folder.parent) == before
        assert [path.name for path in folder.parent.iterdir()] == ["int8"]

    def test_a_new_folder_is_not_left_half_made(
        self, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _fill_after(1, monkeypatch)
        with pytest.raises(OSError, match="No space left on device"):
            save_quantized(model, tmp_path / "new")
        assert not list(tmp_path.iterdir())

    def test_through_the_trainer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = make_trainer(tmp_path, callbacks=[QATCallback()])
        trainer.train()
        trainer.save_model(str(tmp_path / "int8"))
        before = folder_bytes(tmp_path / "int8")
        trainer.model.classifier.weight.data.zero_()
        _fill_after(1, monkeypatch)
        with pytest.raises(OSError, match="No space left on device"):
            trainer.save_model(str(tmp_path / "int8"))
        assert folder_bytes(tmp_path / "int8") == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["int8", "run"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 kB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # loaded tensors are maps of its files


class TestRealDisk:
    def test_a_disk_that_really_fills(self, model: PreTrainedModel, small_disk: Path) -> None:
        save_quantized(model, small_disk / "int8")
        before = folder_bytes(small_disk)
        (small_disk / "ballast").write_bytes(b"\0" * 50_000)
        with pytest.raises(Exception, match=r"No space left on device|os error 28"):
            save_quantized(model, small_disk / "int8", overwrite=True)
        (small_disk / "ballast").unlink()
        assert folder_bytes(small_disk) == before
        assert [path.name for path in small_disk.iterdir()] == ["int8"]

    def test_output_folder_that_is_a_disk_of_its_own(self, model: PreTrainedModel, small_disk: Path) -> None:
        """A volume mounted into a container: files cannot be moved there from the folder above."""
        save_quantized(model, small_disk)
        assert torch.equal(logits(load_quantized(small_disk)), logits(model))
        save_quantized(model, small_disk, overwrite=True)
        assert sorted(path.name for path in small_disk.iterdir()) == ["config.json", "model.safetensors"]
        assert [path.name for path in small_disk.parent.iterdir()] == ["disk"]


def test_link_to_a_folder_elsewhere(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    save_quantized(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(folder_bytes(tmp_path / "elsewhere")) == ["config.json", "model.safetensors"]


def test_the_folder_is_readable_as_others_are(model: PreTrainedModel, tmp_path: Path) -> None:
    """The folder written beside is private while it is written."""
    save_quantized(model, tmp_path / "int8")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "int8").stat().st_mode == (tmp_path / "other").stat().st_mode
