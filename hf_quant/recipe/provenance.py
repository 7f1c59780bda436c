"""What a model folder has to say so that it alone can be made again: versions, seed, revision, and hashes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.tasks import GLUE_DIR_VARIABLE

if TYPE_CHECKING:
    from .schema import Recipe

PROVENANCE_FILE = "provenance.json"

_PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "compressed-tensors", "numpy"),
)
# What `from_pretrained` reads of a model and its tokenizer; checkpoints hold other files too.
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")
_OURS = (PROVENANCE_FILE, "recipe.yaml", "trainer_state.json", "report.json")


def write_provenance(folder: str | os.PathLike[str], recipe: Recipe) -> Path:
    """Writes `provenance.json` into a model folder; see [`describe_run`].

    Args:
        folder (`str` or `Path`): a folder that exists.
        recipe ([`Recipe`]): what the model was made by; its text belongs beside, as `recipe.yaml`.

    Returns:
        `Path`: of the file.
    """
    path = Path(folder) / PROVENANCE_FILE
    path.write_text(json.dumps(describe_run(recipe), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def describe_run(recipe: Recipe) -> dict[str, Any]:
    """Where a run comes from. Without times, so that two runs of the same say the same.

    Args:
        recipe ([`Recipe`]): the recipe; its paths start from the present folder.

    Returns:
        `dict[str, Any]`: plain values by these keys:

        - `versions` (`dict[str, str]`): of hf_quant, Python and the packages that the result depends on;
        - `machine` (`dict[str, Any]`): platform, processor, device, threads, number of processes, and whether
          `bf16: auto` is on here;
        - `seed` (`int`);
        - `recipe` (`dict[str, Any]`): `sha256` of `recipe.to_yaml()`, which is the `recipe.yaml` beside; and where
          the file lies in a git repository, `git`: `path`, `revision` and whether it was `dirty` (changed since);
        - `model`, `teacher`: `name`, the hub's `revision`, and the sha256 of each file that was read, by name;
        - `data` (`dict[str, Any]`): the sha256 of each file by its path in the recipe; or the hub's data set.
    """
    found: dict[str, Any] = {"versions": _versions(), "machine": _machine(recipe), "seed": recipe.seed}
    found["recipe"] = {"sha256": hashlib.sha256(recipe.to_yaml().encode()).hexdigest()}
    if git := _git(recipe.source.file):
        found["recipe"]["git"] = git
    found["model"] = _model(recipe.model)
    if recipe.distillation is not None and recipe.distillation.teacher is not None:
        found["teacher"] = _model(recipe.distillation.teacher)
    found["data"] = _data(recipe)
    return found


def _versions() -> dict[str, str]:
    from .. import __version__

    versions = {"hf_quant": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a build without metadata
            versions[name] = "unknown"
    return versions


def _machine(recipe: Recipe) -> dict[str, Any]:
    import torch

    from ..evaluation.provenance import describe_machine
    from .training import native_bf16

    use_cpu = bool(recipe.training.get("use_cpu")) or not torch.cuda.is_available()
    machine = describe_machine(torch.device("cpu" if use_cpu else "cuda:0"))
    return {
        "platform": platform.platform(),
        "processor": machine.cpu,
        "device": machine.device,
        "threads": machine.threads,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "bf16": native_bf16(use_cpu)[0],
    }


def _model(name: str) -> dict[str, Any]:
    """A model's files; of one from the hub, those in the local cache."""
    found: dict[str, Any] = {"name": name}
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except ValueError:  # no name that the hub could have
            cached = None
        if not isinstance(cached, str):
            return found
        folder = Path(cached).parent
        found["revision"] = folder.name
    files = {file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    found["sha256"] = {file.name: _sha256(file) for file in sorted(files) if file.name not in _OURS}
    return found


def _data(recipe: Recipe) -> dict[str, Any]:
    if not recipe.task:
        paths = [path for path in (recipe.data.train, recipe.data.validation) if path]
        return {"sha256": {path: _sha256(Path(path)) for path in paths}}
    task = recipe.to_task()
    folder = recipe.data.data_dir or os.environ.get(GLUE_DIR_VARIABLE)
    if not folder:
        return {"hub": task.hub_dataset, "config": task.hub_config}
    names = [f"{task.name}/{split}.parquet" for split in ("train", task.splits[0])]
    return {"sha256": {name: _sha256(Path(folder) / name) for name in names}}


def _sha256(path: Path) -> str | None:
    """Of a file's bytes; `None` where it is gone, which is no reason to lose a trained model."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def _git(file: str) -> dict[str, Any] | None:
    """Revision and state of the repository that holds a file; `None` where there is none, or no git."""
    if not file:
        return None
    path = Path(file).resolve()

    def ask(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(path.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
        return done.stdout.strip()

    try:
        root, revision = ask("rev-parse", "--show-toplevel", "HEAD").splitlines()
        changed = ask("status", "--porcelain", "--untracked-files=no")
        known = ask("ls-files", path.name)
    except (OSError, subprocess.SubprocessError, ValueError):  # no git, no repository, or no revision yet
        return None
    inside = path.relative_to(root) if path.is_relative_to(root) else path.name
    return {"path": str(inside), "revision": revision, "dirty": bool(changed) or not known}
