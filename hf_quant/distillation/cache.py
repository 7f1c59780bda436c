"""A teacher's outputs on disk: by the content of each row, so that epochs, runs and processes share them.

A folder holds `teacher.json`, which says whose outputs these are, and chunks: safetensors files with the rows' digests
(`rows`, uint8), where each row ends (`ends`, int64), a checksum of each (`checks`, int64) and the outputs of all rows
one after another, float32. Outputs of padding are not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..quantization.masks import batch_masks
from .losses import QUESTION_OUTPUTS
from .teacher import Teacher

_SAYS = "teacher.json"
_FORMAT = "hf_quant teacher outputs 1"
_INDEX = ("rows", "ends", "checks")
_PARTIAL = ".partial"
_CHUNK_BYTES = 32 * 2**20
_OPEN_FILES = 32

Row = dict[str, Tensor]


class TeacherCache:
    """The rows of one folder.

    In memory are 32 MB of rows at most that are not on disk yet, and a few hundred bytes for each row that is. Chunks
    are written whole and never changed; what other processes wrote is seen after each own chunk.

    Args:
        folder (`str` or `Path`): made if it is not there.
        identity (`dict[str, str]`): whose outputs these are; see [`Teacher.identity`].

    Raises:
        `ValueError`: if the folder holds something else, another teacher's outputs, or a damaged file.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        self._rows: dict[bytes, tuple[str, int, int, int]] = {}  # file, first and last position, checksum
        self._known: set[str] = set()
        self._pending: dict[bytes, Row] = {}
        self._bytes = 0
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._opened)
        self._claim({"format": _FORMAT, **identity})
        self._scan()

    def __len__(self) -> int:
        return len(self._rows) + len(self._pending)

    def get(self, key: bytes) -> Row | None:
        """A row's outputs by name, float32, (positions, ...); `None` if they are not known.

        Raises:
            `ValueError`: if the row is damaged.
        """
        if key in self._pending:
            return self._pending[key]
        if key not in self._rows:
            return None
        file, start, end, check = self._rows[key]
        row = {name: tensor[start:end] for name, tensor in self._open(file).items()}
        if _checksum(row) != check:
            raise ValueError(self._damaged(file, "a row's checksum is wrong"))
        return row

    def put(self, key: bytes, row: Row) -> None:
        """Keep a row; it is written with the next chunk."""
        if key not in self._pending:
            self._pending[key] = {name: value.detach().float().cpu().contiguous() for name, value in row.items()}
            self._bytes += sum(value.nbytes for value in self._pending[key].values())
        if self._bytes >= _CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet, and see what other processes have written."""
        if self._pending:
            keys = list(self._pending)
            rows = list(self._pending.values())
            tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            lengths = torch.tensor([len(next(iter(row.values()))) for row in rows])
            tensors["ends"] = lengths.cumsum(0)
            tensors["rows"] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)
            tensors["checks"] = torch.tensor([_checksum(row) for row in rows])
            # The name follows from the content: two processes that know the same rows write the same file.
            name = hashlib.sha256(b"".join(keys)).hexdigest()[:32] + ".safetensors"
            self._write(name, lambda path: save_file(tensors, path))
            self._pending, self._bytes = {}, 0
        self._scan()

    def _claim(self, says: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / _SAYS
        if not file.is_file():
            foreign = [path.name for path in self.folder.iterdir() if path.suffix != _PARTIAL]
            if foreign and not file.is_file():  # another process may just have made it
                raise ValueError(
                    f"the cache folder {self.folder} has no {_SAYS}, but holds {min(foreign)}: it is no cache of a "
                    "teacher's outputs. Choose an empty folder."
                )
            self._write(_SAYS, lambda path: path.write_text(json.dumps(says, indent=1) + "\n", encoding="utf-8"))
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(self._damaged(_SAYS, str(error), "the folder")) from error
        if there != says:
            there = there if isinstance(there, dict) else {}
            changed = [key for key in says if there.get(key) != says[key]]
            raise ValueError(
                f"the cache folder {self.folder} holds the outputs of another teacher: its "
                + "; ".join(f"{key} is {there.get(key)}, now {says[key]}" for key in changed)
                + ". Choose another folder, or delete this one."
            )

    def _write(self, name: str, write: Any) -> None:
        """Whole or not at all."""
        partial = self.folder / f"{name}.{os.getpid()}{_PARTIAL}"
        try:
            write(partial)
            os.replace(partial, self.folder / name)
        finally:
            partial.unlink(missing_ok=True)

    def _scan(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._known:
                continue
            try:
                with safe_open(path, "pt") as file:
                    digests, ends, checks = (file.get_tensor(name) for name in _INDEX)
                    if not len(digests) == len(ends) == len(checks):
                        raise SafetensorError("its index is not whole")
            except (SafetensorError, OSError) as error:
                raise ValueError(self._damaged(path.name, str(error).splitlines()[0])) from error
            start = 0
            for digest, end, check in zip(digests.numpy(), ends.tolist(), checks.tolist(), strict=True):
                self._rows.setdefault(digest.tobytes(), (path.name, start, end, check))
                start = end
            self._known.add(path.name)

    def _opened(self, name: str) -> dict[str, Any]:
        try:
            file = safe_open(self.folder / name, "pt")
            names = [name for name in file.keys() if name not in _INDEX]  # noqa: SIM118 - no dict
            return {name: file.get_slice(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(self._damaged(name, str(error).splitlines()[0])) from error

    def _damaged(self, name: str, why: str, what: str = "it") -> str:
        return f"{self.folder / name} is damaged: {why}. Delete {what}; the teacher is then asked again."


def cached_outputs(
    teacher: Teacher, cache: TeacherCache, inputs: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """The teacher's outputs for a batch, from the cache as far as it has them; else it is asked, and they are kept.

    Args:
        teacher ([`Teacher`]): asked for the whole batch if a row is missing.
        cache ([`TeacherCache`]): its outputs.
        inputs: what the teacher would get.
        shapes: the student's outputs by name, which the teacher's must have; (batch, ...).

    Returns:
        `dict[str, torch.Tensor]`: float32, of these shapes; 0 at padding.

    Raises:
        `ValueError`: if the inputs are not one row an example, or what is cached has another shape.
    """
    count = next(iter(shapes.values()))[0]
    keys = row_keys(inputs, count)
    masks = [mask.cpu() for mask in batch_masks(inputs)]
    known = [cache.get(key) for key in keys]
    if any(row is None for row in known):
        outputs = {name: value.float().cpu() for name, value in teacher(inputs).items() if name in shapes}
        for index, row in enumerate(known):
            if row is None:
                cache.put(keys[index], {name: _row(name, value, index, masks) for name, value in outputs.items()})
                known[index] = cache.get(keys[index])
    rows = [row for row in known if row is not None]
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        mask = _positions(name, shape, masks)
        values = torch.cat([row[name] for row in rows]) if name in rows[0] else torch.empty(0)
        wanted = tuple(shape) if mask is None else (int(mask.sum()), *shape[2:])
        if values.shape != wanted:
            raise ValueError(
                f"the teacher's {name} are of {tuple(values.shape)} without padding, the student's of {wanted}: they "
                "say different things. Use a teacher with the same head, labels and vocabulary."
            )
        found[name] = (
            values
            if mask is None
            else torch.zeros(tuple(shape)).masked_scatter_(mask.view(*mask.shape, *[1] * (len(shape) - 2)), values)
        )
    return {name: value.to(device) for name, value in found.items()}


def row_keys(inputs: Mapping[str, Any], count: int) -> list[bytes]:
    """A digest of each row's inputs without its padding; padding to the right does not change it.

    Args:
        inputs: what the teacher would get.
        count (`int`): rows of the batch.

    Raises:
        `ValueError`: if an input has another number of rows.
    """
    masks = [mask.cpu() for mask in batch_masks(inputs)]
    arrays: dict[str, Tensor] = {}
    others = hashlib.blake2b(digest_size=16)
    for name, value in sorted(inputs.items()):
        if not isinstance(value, Tensor):
            others.update(f"{name}={value!r};".encode())
            continue
        if value.ndim == 0 or value.shape[0] != count:
            raise ValueError(
                f"`cache` keeps the teacher's outputs row by row, but the input {name} is of {tuple(value.shape)} for "
                f"{count} rows. Leave `cache` out."
            )
        arrays[name] = value.detach().cpu()
    keys = []
    for index in range(count):
        digest = others.copy()
        for name, value in arrays.items():
            row = value[index]
            if name.endswith("attention_mask") and value.ndim == 2:
                row = row.nonzero()  # where its tokens are: on the left, padding moves them
            elif len(masks) == 1 and value.shape[:2] == masks[0].shape:
                row = row[masks[0][index]]
            digest.update(f"{name} {row.dtype} {tuple(row.shape)};".encode())
            digest.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        keys.append(digest.digest())
    return keys


def _positions(name: str, shape: Sequence[int], masks: Sequence[Tensor]) -> Tensor | None:
    """The unpadded positions of an output that says something of each; `None` if it speaks of whole rows."""
    if len(shape) < 3 and name not in QUESTION_OUTPUTS:
        return None
    fitting = [mask for mask in masks if tuple(mask.shape) == tuple(shape[:2])]
    return fitting[0] if len(fitting) == 1 else None


def _row(name: str, output: Tensor, index: int, masks: Sequence[Tensor]) -> Tensor:
    """One row, (positions, ...); a single position of what speaks of the whole row."""
    mask = _positions(name, output.shape, masks)
    return output[index][None] if mask is None else output[index][mask[index]]


def _checksum(row: Row) -> int:
    check = 0
    for name in sorted(row):
        check = zlib.crc32(row[name].contiguous().numpy().tobytes(), check)
    return check
