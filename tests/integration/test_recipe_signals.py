"""Runs that are stopped by a signal or killed at any moment go on to the same bytes as one left alone."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import Trainer

from hf_quant import Recipe
from hf_quant.recipe.checkpoints import is_whole, last_whole_checkpoint
from hf_quant.recipe.run import run
from hf_quant.recipe.stopping import StopOnSignal, Stopped
from tests.reviews import read_recipe, write_files
from tests.tiny import folder_bytes

REPOSITORY = Path(__file__).resolve().parents[2]
TRAINING = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
PRUNING = {"final_sparsity": 0.5, "start_step": 1, "end_step": 4, "criterion": "movement"}


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell starts what it runs in the background with SIGINT ignored, and ignored it would stay."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def record() -> Console:
    """A console that keeps what it prints."""
    return Console(record=True, width=400, file=open(os.devnull, "w"))


def models(out: Path) -> dict[str, bytes]:
    """All files of the finished models; those of the float twin too where there is one."""
    found = {f"{name}/{file}": data for name in ("int8", "float") for file, data in folder_bytes(out / name).items()}
    assert "int8/model.safetensors" in found
    assert not list(out.rglob(".*")), "nothing half written is left"
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder with the files of a recipe, and the models of its run that nobody disturbed."""
    folder = write_files(tmp_path_factory.mktemp("alone"))
    run(recipe_in(folder, "out"), console=record())
    return folder, models(folder / "out")


def recipe_in(folder: Path, output: str, **changes: Any) -> Recipe:
    return read_recipe(folder, training=TRAINING, pruning=PRUNING, output=str(folder / output), **changes)


def at_step(monkeypatch: pytest.MonkeyPatch, wanted: int, act: Callable[[], None]) -> None:
    """Does something in the midst of an optimizer step, counted from 1 over all trainings."""
    real, done = Trainer.training_step, [0]

    def step(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        done[0] += 1
        if done[0] == wanted:
            act()
        return real(self, *args, **kwargs)  # type: ignore[no-any-return]

    monkeypatch.setattr(Trainer, "training_step", step)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "step", "code"), [(signal.SIGINT, 2, 130), (signal.SIGTERM, 5, 143)])
def test_a_signal_ends_the_step_and_saves_and_the_run_goes_on_to_the_same_bytes(
    alone: tuple[Path, dict[str, bytes]],
    number: signal.Signals,
    step: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, wanted = alone
    recipe, console = recipe_in(folder, f"stopped-{step}"), record()
    out = Path(recipe.output)
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: send(number))
        with pytest.raises(Stopped) as stopped:
            run(recipe, console=console)
    assert stopped.value.code == code
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert f"{number.name}: saving a checkpoint after this step" in capfd.readouterr().err
    again = f"go on with: hf-quant run {out / 'recipe.yaml'} --resume"
    assert f"stopped by {number.name} after step {step}, with a checkpoint; {again}" in console.export_text()
    assert not (out / "int8").exists()
    assert is_whole(out / "checkpoints" / "int8" / f"checkpoint-{step}")
    # The recipe in the folder is all that it takes.
    run(Recipe.from_yaml(out / "recipe.yaml"), resume=True, console=console)
    printed = console.export_text(clear=False)
    assert f"resuming from {out / 'checkpoints' / 'int8' / f'checkpoint-{step}'}" in printed
    assert f"int8 step {step}/8" not in printed
    assert weights(models(out)) == weights(wanted)
    shutil.rmtree(out)


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files that do not name the output folder: `recipe.yaml` does, and `provenance.json` has its hash."""
    return {name: data for name, data in files.items() if not name.endswith(("recipe.yaml", "provenance.json"))}


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(write_files(tmp_path))
    at_step(monkeypatch, 3, lambda: send(signal.SIGINT, signal.SIGTERM))
    with pytest.raises(Stopped) as stopped:
        run(recipe, console=record())
    assert stopped.value.code == 143
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


def test_a_signal_before_training_stops_at_once_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, console = read_recipe(write_files(tmp_path)), record()
    monkeypatch.setattr("hf_quant.recipe.run.prepare", lambda recipe: send(signal.SIGINT))
    with pytest.raises(Stopped) as stopped:
        run(recipe, console=console)
    assert stopped.value.code == 130
    assert "stopped by SIGINT; nothing was written" in console.export_text()
    assert not (tmp_path / "out").exists()


def test_a_signal_in_the_conversion_stops_at_once(
    alone: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = alone
    recipe = recipe_in(folder, "converting")
    with monkeypatch.context() as patch:
        patch.setattr("hf_quant.callbacks.qat.convert_qat", lambda *args, **kwargs: send(signal.SIGTERM))
        with pytest.raises(Stopped):
            run(recipe, console=record())
    run(recipe, resume=True, console=record())
    assert weights(models(Path(recipe.output))) == weights(wanted)


def test_save_only_model_is_put_aside_for_the_checkpoint_of_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(write_files(tmp_path), training={"save_only_model": True})
    at_step(monkeypatch, 2, lambda: send(signal.SIGTERM))
    with pytest.raises(Stopped):
        run(recipe, console=record())
    assert is_whole(tmp_path / "out" / "checkpoints" / "int8" / "checkpoint-2")


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopOnSignal():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


class Killed(BaseException):
    """What ends a process in the midst of something, as far as files show it."""


def spoil_calls(patch: pytest.MonkeyPatch, where: str, wanted: int, half: bool) -> None:
    """Lets a function die at its n-th call; half of its file is there if `half`."""
    owner: Any
    module, _, name = where.rpartition(".")
    owner = {"torch": torch, "shutil": shutil}.get(module) or _import(module)
    real, calls = getattr(owner, name), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] < wanted:
            return real(*args, **kwargs)
        if half:
            path = next(Path(str(one)) for one in args if isinstance(one, (str, Path)))
            if name == "rmtree":
                next(path.glob("*.safetensors")).unlink()
            else:
                path.write_bytes(b"PK\x03\x04 half of it")
        raise Killed

    patch.setattr(owner, name, call)


def _import(path: str) -> Any:
    import importlib

    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("where", "wanted", "half"),
    [
        pytest.param("torch.save", 1, True, marks=pytest.mark.slow),  # training_args.bin of the first checkpoint
        ("torch.save", 6, True),  # the optimizer of the second one
        pytest.param("transformers.trainer_callback.TrainerState.save_to_json", 2, True, marks=pytest.mark.slow),
        ("transformers.trainer_utils.shutil.rmtree", 2, True),  # the first one going
        ("hf_quant.recipe.run.save_quantized", 1, False),
        pytest.param("hf_quant.recipe.run.write_provenance", 1, False, marks=pytest.mark.slow),
        pytest.param("hf_quant.recipe.run.os.replace", 1, False, marks=pytest.mark.slow),  # the very first file
    ],
)
def test_a_run_that_dies_while_it_writes_goes_on_to_the_same_bytes(
    alone: tuple[Path, dict[str, bytes]], where: str, wanted: int, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, undisturbed = alone
    recipe = recipe_in(folder, f"dies-{where.rpartition('.')[2]}-{wanted}")
    out = Path(recipe.output)
    with monkeypatch.context() as patch:
        spoil_calls(patch, where, wanted, half)
        with pytest.raises(Killed):
            run(recipe, console=record())
    console = record()
    run(recipe, resume=True, console=console)
    assert weights(models(out)) == weights(undisturbed)
    for checkpoint in (out / "checkpoints" / "int8").iterdir():
        assert is_whole(checkpoint)
    shutil.rmtree(out)


def test_checkpoints_that_are_not_whole_are_left_aside(alone: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    whole = alone[0] / "out" / "checkpoints" / "int8" / "checkpoint-8"
    for step in (3, 6, 9, 12):
        shutil.copytree(whole, tmp_path / f"checkpoint-{step}")
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(state.read_text().replace('"global_step": 8', f'"global_step": {step}'))
    (tmp_path / "checkpoint-x").mkdir()
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-12", [])
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text("{")
    (tmp_path / "checkpoint-9" / "optimizer.pt").write_bytes(b"PK\x03\x04")
    assert last_whole_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-6"
    for name in ("scheduler.pt", "rng_state.pth", "optimizer.pt", "model.safetensors", "trainer_state.json"):
        broken = shutil.copytree(tmp_path / "checkpoint-6", tmp_path / "copies" / "checkpoint-6")
        assert is_whole(broken)
        (broken / name).unlink()
        assert not is_whole(broken), name
        shutil.rmtree(tmp_path / "copies")
    assert not is_whole(tmp_path / "checkpoint-6", processes=2), "the second process has no random state there"
    assert last_whole_checkpoint(tmp_path / "nowhere") == (None, [])


def test_overwrite_does_not_take_the_models_of_an_earlier_run_for_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(write_files(tmp_path), training={"max_steps": 2})
    run(recipe, console=record())
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: send(signal.SIGINT, signal.SIGINT))
        with pytest.raises(Stopped):
            run(recipe, overwrite=True, console=record())
    console = record()
    run(recipe, resume=True, console=console)
    assert "kept the int8 model" not in console.export_text()
