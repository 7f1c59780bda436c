"""Teachers: how they are loaded, which are refused, and the cache of their outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_quant import quantize_dynamic
from hf_quant.distillation import cache as teacher_cache
from hf_quant.distillation.cache import TeacherCache, cached_outputs, row_keys
from hf_quant.distillation.teacher import Teacher, check_teacher, load_teacher, self_teacher
from tests.tiny import Sentences, tiny_bert, tiny_llama, tiny_tokenizer

IDENTITY = {"class": "A", "weights": "1"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Teachers


def test_another_vocabulary_or_label_map_is_refused() -> None:
    student = tiny_bert()
    check_teacher(student, Teacher(tiny_bert(1), "twin"))
    with pytest.raises(ValueError, match=r"a vocabulary of 96 tokens, the teacher big one of 100"):
        check_teacher(student, Teacher(tiny_bert(vocab_size=100), "big"))
    with pytest.raises(ValueError, match=r"labels are \{0: 'LABEL_0', 1: 'LABEL_1'\}, .* three are .*2: 'LABEL_2'"):
        check_teacher(student, Teacher(tiny_bert(num_labels=3), "three"))
    named, turned = ({"id2label": dict(enumerate(names))} for names in (("no", "yes"), ("yes", "no")))
    with pytest.raises(ValueError, match=r"labels are \{0: 'no', 1: 'yes'\}.*\{0: 'yes', 1: 'no'\}.*order"):
        check_teacher(tiny_bert(**named), Teacher(tiny_bert(**turned), "turned"))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_bert(1).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, tiny_bert(), False)
    check_teacher(tiny_bert(), teacher, tiny_tokenizer())  # the folder says nothing about tokens
    tiny_tokenizer().save_pretrained(tmp_path)
    check_teacher(tiny_bert(), teacher, tiny_tokenizer())
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    swapped = text.replace('"w8": 8', '"w8": 9').replace('"w9": 9', '"w9": 8')
    assert swapped != text
    (tmp_path / "tokenizer.json").write_text(swapped, encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizers differ: 'w8' is id 8 in the student's .*, 9 in the teacher's"):
        check_teacher(tiny_bert(), teacher, tiny_tokenizer())


def test_a_loaded_teacher_has_the_students_dtype_and_takes_no_random_numbers(tmp_path: Path) -> None:
    tiny_bert(1).save_pretrained(tmp_path)
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    teacher = load_teacher(str(tmp_path), tiny_bert_without_draw().to(torch.bfloat16), True)
    assert torch.equal(torch.rand(1), wanted)
    assert teacher.model.dtype == torch.bfloat16
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.model.config._attn_implementation == "eager"


def tiny_bert_without_draw() -> Any:
    with torch.random.fork_rng():
        return tiny_bert()


def test_a_teacher_gets_what_it_takes_and_no_labels() -> None:
    teacher = Teacher(tiny_bert(), "BERT")
    batch = {**Sentences(4).batch(4), "labels": torch.zeros(4), "pixel_values": 1, "output_attentions": True}
    assert sorted(teacher.inputs(batch)) == ["attention_mask", "input_ids"]
    assert Teacher(tiny_llama(), "Llama").inputs({**batch, "past_key_values": 1})["use_cache"] is False


def test_quantized_folders_and_shared_weights_are_refused(tmp_path: Path) -> None:
    quantize_dynamic(tiny_bert(), progress=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantized already .*load_quantized loads this one"):
        load_teacher(tmp_path, tiny_bert(), False)
    model = tiny_bert()
    with pytest.raises(ValueError, match="shares its weights with the student"):
        load_teacher(model, model, False)


def test_a_copy_is_named_by_its_weights_alone() -> None:
    model = tiny_bert()
    before = self_teacher(model).weights()
    model.register_buffer("pruning_score", torch.ones(1))
    assert self_teacher(model).weights() == before
    model.classifier.bias.data += 1
    assert self_teacher(model).weights() != before


# The cache


def rows(count: int = 3) -> dict[bytes, dict[str, Tensor]]:
    return {bytes([i] * 16): {"logits": random(i + 1, 2, seed=i)} for i in range(count)}


def test_rows_come_back_from_disk_to_the_bit(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, IDENTITY)
    for key, row in rows().items():
        cache.put(key, row)
    cache.flush()
    again = TeacherCache(tmp_path, IDENTITY)
    assert len(again) == 3
    for key, row in rows().items():
        assert torch.equal(again.get(key)["logits"], row["logits"])  # type: ignore[index]
    assert again.get(b"9" * 16) is None


def test_memory_is_bounded_and_others_see_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "_CHUNK_BYTES", 20)
    one, two = (TeacherCache(tmp_path, IDENTITY) for _ in range(2))
    for key, row in rows(6).items():
        one.put(key, row)
        assert one._bytes < 20
    two.put(b"z" * 16, {"logits": torch.ones(1, 2)})
    two.flush()
    one.flush()
    assert len(one) == len(two) == 7
    assert not list(tmp_path.glob("*.partial"))


def test_damage_is_found(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, IDENTITY)
    for key, row in rows().items():
        cache.put(key, row)
    cache.flush()
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged: .* Delete it"):
        TeacherCache(tmp_path, IDENTITY)
    at = whole.index(rows()[bytes([2] * 16)]["logits"].numpy().tobytes())
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    flipped = TeacherCache(tmp_path, IDENTITY)
    assert flipped.get(bytes([1] * 16)) is not None
    with pytest.raises(ValueError, match="a row's checksum is wrong"):
        flipped.get(bytes([2] * 16))
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        TeacherCache(tmp_path, IDENTITY)


def test_foreign_folders_and_other_teachers_are_refused(tmp_path: Path) -> None:
    TeacherCache(tmp_path / "a", IDENTITY)
    with pytest.raises(ValueError, match=r"another teacher: its weights is 1, now 2\. Choose another folder"):
        TeacherCache(tmp_path / "a", {**IDENTITY, "weights": "2"})
    (tmp_path / "a" / "teacher.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"teacher.json is damaged: .* Delete the folder"):
        TeacherCache(tmp_path / "a", IDENTITY)
    (tmp_path / "a" / "teacher.json").write_text(json.dumps([]), encoding="utf-8")
    with pytest.raises(ValueError, match="outputs of another teacher"):
        TeacherCache(tmp_path / "a", IDENTITY)
    tiny_bert().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no teacher.json, but holds config.json"):
        TeacherCache(tmp_path / "model", IDENTITY)


def test_a_cut_off_write_leaves_the_cache_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TeacherCache(tmp_path, IDENTITY)
    cache.put(b"a" * 16, {"logits": torch.ones(1, 2)})

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(teacher_cache, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        cache.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.json"]
    (tmp_path / "x.safetensors.1.partial").write_bytes(b"half")  # of a process that was killed
    assert len(TeacherCache(tmp_path, IDENTITY)) == 0


def test_a_row_is_known_by_its_content() -> None:
    batch = Sentences(4).batch(4)
    keys = row_keys(batch, 4)
    assert len(set(keys)) == 4
    wider = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items()}
    assert row_keys(wider, 4) == keys
    wider["input_ids"][0, -1] = 9  # behind the mask
    assert row_keys(wider, 4) == keys
    wider["input_ids"][0, 0] += 1
    assert row_keys(wider, 4)[0] != keys[0]
    assert row_keys(wider, 4)[1:] == keys[1:]
    moved = {name: torch.nn.functional.pad(value, (3, 0)) for name, value in batch.items()}
    assert not set(row_keys(moved, 4)) & set(keys)  # positions differ
    assert row_keys({**batch, "token_type_ids": batch["attention_mask"]}, 4) != keys
    with pytest.raises(ValueError, match=r"`cache` keeps .* row by row, but the input image_grid is of \(2, 3\)"):
        row_keys({**batch, "image_grid": torch.ones(2, 3)}, 4)


@pytest.mark.parametrize("maker", [tiny_bert, tiny_llama])
def test_cached_outputs_are_the_teachers(tmp_path: Path, maker: Any) -> None:
    teacher = Teacher(maker(), "it")
    calls = []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    inputs = teacher.inputs(Sentences(6).batch(6))
    logits = teacher(inputs)["logits"]
    shapes = {"logits": logits.shape}
    calls.clear()
    for _ in range(2):
        cache = TeacherCache(tmp_path, teacher.identity())
        found = cached_outputs(teacher, cache, inputs, shapes)["logits"]
        counted = inputs["attention_mask"].bool() if logits.ndim == 3 else slice(None)
        assert torch.equal(found[counted], logits[counted])
        cache.flush()
    assert len(calls) == 1
    with pytest.raises(ValueError, match=r"the teacher's logits are of .* without padding, the student's of"):
        cached_outputs(teacher, cache, inputs, {"logits": (*logits.shape[:-1], 7)})
