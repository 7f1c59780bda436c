"""Which checkpoints of a training that was killed can be gone on from: those that were written to their end."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

from ..checkpoint import require_sound_folder

_NAME = re.compile(r"checkpoint-(\d+)")


def last_whole_checkpoint(folder: str | Path, processes: int = 1) -> tuple[Path | None, list[Path]]:
    """The latest checkpoint that holds all that a resumed training needs, and those that do not.

    Args:
        folder (`str` or `Path`): where a Trainer saves its `checkpoint-<step>` folders; it need not be there.
        processes (`int`, *optional*, defaults to 1): that train; each one's random state is needed.

    Returns:
        `tuple[Path | None, list[Path]]`: the checkpoint, and the folders to leave aside, in the order of their steps.
    """
    folder = Path(folder)
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    whole: Path | None = None
    broken = []
    for step in sorted(found):
        if is_whole(found[step], processes):
            whole = found[step]
        else:
            broken.append(found[step])
    return whole, broken


def is_whole(checkpoint: Path, processes: int = 1) -> bool:
    """Whether a checkpoint was written to its end, and not deleted since in part.

    The Trainer writes `trainer_state.json` last; but a checkpoint that it was about to delete may have that file and
    nothing else, so all are looked for.

    Args:
        checkpoint (`Path`): a `checkpoint-<step>` folder.
        processes (`int`, *optional*, defaults to 1): that train.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        require_sound_folder(checkpoint)
    except (OSError, ValueError):
        return False
    # Sharded optimizers (FSDP, DeepSpeed) lie in folders of their own.
    optimizer = list(checkpoint.glob("optimizer*")) or list(checkpoint.glob("global_step*"))
    ranks = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    archives = [checkpoint / "scheduler.pt", *(path for path in optimizer if path.is_file())]
    archives += [checkpoint / name for name in ranks]
    return (
        state.get("global_step") == int(checkpoint.name.rpartition("-")[2])
        and bool(optimizer)
        # Not loaded: that they end as a zip file ends says that they were written to their end.
        and all(zipfile.is_zipfile(path) for path in archives)
    )


def remove_leftovers(output: Path, models: tuple[str, ...]) -> None:
    """Removes what a killed run left beside the model folders that it was writing.

    Args:
        output (`Path`): of the recipe.
        models (`tuple[str, ...]`): names of the model folders, in which and beside which files are prepared.
    """
    for name in models:
        for place in (output, output / name):
            for stale in place.glob(f".{name}.*"):
                shutil.rmtree(stale, ignore_errors=True)
