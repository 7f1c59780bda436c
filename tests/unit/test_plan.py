"""What a plan says of a recipe, in the terminal, as JSON and as a page, and what making one leaves alone."""

from __future__ import annotations

import json
import random
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import Trainer

from hf_quant import cli
from hf_quant.planning.measure import measure, phase_segments
from hf_quant.planning.page import LEFT, RIGHT, timeline_plot
from hf_quant.planning.plan import Plan, make_plan
from hf_quant.planning.targets import build_model
from hf_quant.planning.text import CELLS, timeline_rows

from ..reviews import read_recipe, write_files, write_recipe
from ..tiny import folder_bytes

SVG = "{http://www.w3.org/2000/svg}"
CommandLine = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("plan"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs `hf-quant plan ARGUMENTS` in this process; gives exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-quant", "plan", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


PRUNE = {"final_sparsity": 0.5, "start_step": 1, "end_step": 4, "frequency": 1, "schedule": "linear"}
AFTER = {"method": "post_training", "start_step": None, "freeze_step": None}
FULL: dict[str, Any] = {
    "pruning": PRUNE,
    "distillation": {"start_step": 2, "end_step": 6},
    "training": {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "epoch", "warmup_steps": 2},
}


@pytest.fixture(scope="module")
def full(folder: Path) -> Plan:
    return make_plan(read_recipe(folder, **FULL))


def printed(plan: Plan) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - nothing to read
    console.print(plan)
    return console.export_text()


def test_weights_are_not_loaded_and_nothing_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded, or a Trainer was made")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", refuse)
    monkeypatch.setattr("safetensors.safe_open", refuse)
    monkeypatch.setattr(Trainer, "__init__", refuse)
    (folder / "model" / "model.safetensors").rename(folder / "hidden")
    try:
        for changes in (FULL, {"pruning": {**PRUNE, "structure": "neuron", "shrink": True, "uniform": True}}):
            recipe = read_recipe(folder, **changes)
            before, states = folder_bytes(folder), (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
            plan = make_plan(recipe)
            printed(plan)
            assert folder_bytes(folder) == before
            assert torch.equal(states[0], torch.get_rng_state())
            assert np.array_equal(states[1], np.random.get_state()[1])
            assert states[2] == random.getstate()
    finally:
        (folder / "hidden").rename(folder / "model" / "model.safetensors")


def test_only_units_need_a_model_that_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def spy(*args: Any) -> Any:
        made.append(build_model(*args))
        return made[-1]

    monkeypatch.setattr("hf_quant.planning.plan.build_model", spy)
    make_plan(read_recipe(folder, **FULL))
    assert {parameter.device.type for parameter in made[0].parameters()} == {"meta"}
    make_plan(read_recipe(folder, pruning={**PRUNE, "structure": "head", "scope": "layer"}))
    assert {parameter.device.type for parameter in made[1].parameters()} == {"cpu"}


def test_patterns_and_what_they_match(folder: Path) -> None:
    recipe = read_recipe(
        folder,
        pruning={**PRUNE, "final_sparsity": {"*.query": 0.9, "*.key": 0.5}},
        quantization={"targets": ["*.query", "bert.embeddings.*"], "ignore": ["*.token_type_embeddings"]},
    )
    plan = make_plan(recipe)
    assert plan.findings == ()
    found = {(match.section, match.option, match.pattern): match.modules for match in plan.matches}
    query = tuple(f"bert.encoder.layer.{layer}.attention.self.query" for layer in (0, 1))
    assert found["pruning", "final_sparsity", "*.query"] == query
    assert found["quantization", "targets", "*.query"] == query
    assert len(found["quantization", "targets", "bert.embeddings.*"]) == 3
    chosen = {one.section: one for one in plan.chosen}
    assert chosen["pruning"].kinds == {"linear": 4}
    assert chosen["quantization"].kinds == {"embedding": 2, "linear": 2}
    assert chosen["quantization"].left == {"ignored": 1, "not a target": 12}
    (phase,) = plan.phases.prunings.values()
    assert phase.goals[-1] == (4, pytest.approx(0.7))


def test_all_patterns_that_match_nothing_are_named_with_the_nearest(folder: Path) -> None:
    recipe = read_recipe(
        folder,
        pruning=[{**PRUNE, "targets": ["*.qery"]}, {**PRUNE, "final_sparsity": {"*.kye": 0.5}}],
        quantization={"targets": ["*.vlaue"], "ignore": ["bert.embedings.*"]},
    )
    plan = make_plan(recipe)
    messages = [str(finding) for finding in plan.findings if finding.level == "error"]
    assert len(messages) == len([match for match in plan.matches if not match.modules]) == 4
    for words in (
        r"`pruning\[0\]`: pattern '\*\.qery' in `targets` matches no module; did you mean '\*\.query'\?",
        r"`pruning\[1\]`: pattern '\*\.kye' in `final_sparsity` matches no module; did you mean '\*\.key'\?",
        r"`quantization`: pattern '\*\.vlaue' in `targets` matches no module; did you mean '\*\.value'\?",
        r"`quantization`: pattern 'bert\.embedings\.\*' in `ignore` matches no module",
    ):
        where = rf"^error: {re.escape(str(folder))}/recipe\.yaml:\d+:\d+: {words}"
        assert len([message for message in messages if re.search(where, message)]) == 1, words
    assert (plan.size, plan.memory) == (None, None)
    assert plan.steps.total == 8, "the timeline is there all the same"
    assert "nothing" in printed(plan)


def test_units_and_their_patterns(folder: Path) -> None:
    pruning = {**PRUNE, "structure": "head", "scope": "layer", "targets": ["*.layer.1.attention.output.dense"]}
    plan = make_plan(read_recipe(folder, pruning=pruning))
    assert plan.matches[0].modules == ("bert.encoder.layer.1.attention.output.dense",)
    assert plan.chosen[0].kinds == {"heads": 2}
    (finding,) = make_plan(read_recipe(folder, pruning={**pruning, "targets": ["*.query.densse"]})).findings
    assert "pattern '*.query.densse' in `targets` matches no module" in str(finding)


def test_the_timeline_in_characters(full: Plan) -> None:
    rows = {name: (line, words) for name, line, words in timeline_rows(full)}
    assert all(len(line) == CELLS for line, _ in rows.values())
    each = CELLS // 8  # cells of a step
    assert rows["epoch"][0].split() == ["0", "1"]
    assert rows["epoch"][0].index("1") == 4 * each
    assert rows["distillation"][0] == "·" * 2 * each + "█" * 4 * each + "·" * 2 * each
    # 0.9 of 8 steps are 7.2: the eighth step is the first with frozen ranges, and there is none.
    assert rows["QAT"][0] == "·" * 4 * each + "▒" * 4 * each
    assert rows["pruning"][0] == " " * 2 * each + "▁" * each + "▃" * each + "▄" * 4 * each
    assert [place // each + 1 for place, cell in enumerate(rows["evaluations"][0]) if cell == "|"] == [4, 8]
    assert rows["checkpoints"][1] == "2: 4, 8"
    assert rows["learning rate"][1] == "linear, 0.01 at most after 2 steps of warm-up"
    assert rows["pruning"][1] == "50.0% unstructured by magnitude, steps 1 to 4, 4 updates"
    text = printed(full)
    assert "8 steps: 32 examples, 8 a batch, 4 steps an epoch, 2 epochs" in text
    assert "activations come on top, not predicted" in text
    for line, words in rows.values():
        assert line.rstrip() in text
        assert words in text


def test_the_picture(full: Plan) -> None:
    svg = ElementTree.fromstring(timeline_plot(full))
    step = (RIGHT - LEFT) / 8
    bands = {
        str(rect.get("class")): (float(str(rect.get("x"))), float(str(rect.get("width"))))
        for rect in svg.iter(f"{SVG}rect")
    }
    assert bands["off"] == pytest.approx((LEFT, RIGHT - LEFT), abs=0.1)
    assert bands["teacher"] == pytest.approx((LEFT + 2 * step, 4 * step), abs=0.1)
    assert bands["observing"] == pytest.approx((LEFT + 4 * step, 4 * step), abs=0.1)
    rate, sparsity = (
        [tuple(map(float, pair.split(","))) for pair in str(line.get("points")).split()]
        for line in svg.iter(f"{SVG}polyline")
    )
    assert min(rate, key=lambda point: point[1])[0] == pytest.approx(LEFT + 2 * step, abs=0.1), "the peak, at step 2"
    zero, half = sparsity[0][1], sparsity[-1][1]
    assert zero - half == pytest.approx(27, abs=0.1)
    assert sparsity[-1][0] == RIGHT
    _, _, width, height = map(float, str(svg.get("viewBox")).split())
    for element in svg.iter():
        for name, most in (("x", width), ("x1", width), ("x2", width), ("y", height), ("y1", height), ("y2", height)):
            assert 0 <= float(element.get(name) or 0) <= most


def test_page_and_json(full: Plan, tmp_path: Path) -> None:
    full.to_html(tmp_path / "plan.html")
    page = ElementTree.parse(tmp_path / "plan.html")
    words = " ".join(page.getroot().itertext())
    assert "Memory of the training" in words
    assert "50.0% unstructured by magnitude" in words
    full.to_json(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert data["steps"]["total"] == 8
    assert data["steps"]["evaluations"] == [4, 8]
    assert data["quantization"] == {"scheme": "int8_static", "start": 4, "freeze": 8}
    assert data["distillation"] == {"start": 2, "end": 6, "teacher": None}
    assert [goal for _, goal in data["pruning"][0]["goals"]] == pytest.approx([0, 1 / 6, 1 / 3, 0.5])
    assert [rate for _, rate in data["learning_rates"]] == pytest.approx(
        [0, 0.005, *(0.01 * (8 - step) / 6 for step in range(2, 8))]
    )
    assert data["size"]["result_bytes"] < data["size"]["float_bytes"]
    assert data["memory"]["teacher"] == pytest.approx(data["memory"]["parameters"], rel=0.01)
    assert data["timing"] is None


def test_a_teacher_of_its_own_counts_too(folder: Path) -> None:
    teacher = {"distillation": {"teacher": str(folder / "model")}}
    memory = make_plan(read_recipe(folder, **teacher)).memory
    assert memory is not None
    assert memory.teacher is not None
    assert 0.9 < memory.teacher / memory.parameters < 1
    unknown = make_plan(read_recipe(folder, distillation={"teacher": "no/such/teacher"}))
    assert unknown.memory is not None
    assert unknown.memory.teacher is None
    assert "of what is known" in printed(unknown)


@pytest.mark.parametrize(
    "changes",
    [
        FULL,
        {"quantization": {"start_step": 0}, "evaluation": {"baseline": "train"}},
        {"pruning": {**PRUNE, "criterion": "movement"}, "training": {"gradient_accumulation_steps": 2}},
        {"quantization": AFTER, "evaluation": {"baseline": "train"}},
        {"quantization": AFTER, "pruning": PRUNE, "evaluation": {"baseline": "train"}},
    ],
)
def test_measured_time_and_what_measuring_leaves_alone(folder: Path, changes: dict[str, Any]) -> None:
    plan = make_plan(read_recipe(folder, **changes))
    before = folder_bytes(folder)
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    timing = measure(plan)
    assert folder_bytes(folder) == before
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()
    assert [(phase.name, phase.start, phase.end) for phase in timing.phases] == phase_segments(plan)
    assert all(phase.step_seconds > 0 for phase in timing.phases)
    assert sum(phase.end - phase.start for phase in timing.phases) == 8
    twin = len(plan.recipe.trainings()) == 2
    assert (timing.float_seconds > 0) is twin, "it teaches too"
    assert (timing.evaluation_seconds > 0) is bool(plan.steps.evaluations)
    parts = sum(phase.seconds for phase in timing.phases) + timing.evaluations * timing.evaluation_seconds
    assert timing.total == pytest.approx(parts + timing.float_seconds)


def test_quantization_after_training(folder: Path, tmp_path: Path) -> None:
    qat = make_plan(read_recipe(folder, evaluation={"baseline": "train"}))
    assert "; 2 trainings: int8, then float" in printed(qat)
    plan = make_plan(read_recipe(folder, quantization=AFTER, evaluation={"baseline": "train"}))
    assert plan.findings == ()
    assert plan.phases.quantization is None
    assert plan.size == qat.size
    assert phase_segments(plan) == [("float", 0, 8)]
    rows = {name: (line, words) for name, line, words in timeline_rows(plan)}
    assert "QAT" not in rows
    words = "int8_static after training, float until then; ranges found on 32 training examples"
    assert rows["quantization"] == ("·" * CELLS, words), "there are no more than 32"
    assert words in " ".join(printed(plan).split())
    assert "; 1 training: float" in printed(plan)
    plan.to_html(tmp_path / "plan.html")
    page = " ".join(ElementTree.parse(tmp_path / "plan.html").getroot().itertext())
    assert page.count(words) == 2, "in the picture and below it"
    data = plan.to_dict()
    assert (data["trainings"], data["quantization"]) == (["float"], None)
    assert data["after_training"] == {"scheme": "int8_static", "calibration_samples": 32}

    pruned = make_plan(read_recipe(folder, quantization={**AFTER, "scheme": "int8_dynamic"}, pruning=PRUNE))
    assert phase_segments(pruned) == [("pruning", 0, 4), ("float", 4, 8)]
    assert pruned.to_dict()["trainings"] == ["model"]
    assert pruned.to_dict()["after_training"] == {"scheme": "int8_dynamic", "calibration_samples": None}
    assert "int8_dynamic after training, float until then\n" in re.sub(r" +\n", "\n", printed(pruned))


def test_the_phases_that_are_measured(full: Plan) -> None:
    assert phase_segments(full) == [
        ("pruning", 0, 2),
        ("pruning + distillation", 2, 4),
        ("QAT + distillation", 4, 6),
        ("QAT", 6, 8),
    ]


def test_the_command(folder: Path, command: CommandLine, tmp_path: Path) -> None:
    path = write_recipe(folder, **FULL)
    page, data = tmp_path / "plan.html", tmp_path / "plan.json"
    code, out, _ = command(path, "--html", page, "--json", data)
    assert (code, page.exists(), data.exists()) == (0, True, True)
    assert "8 steps: 32 examples" in out
    code, _, err = command(path, "--html", page)
    assert code == 2
    assert "exists already" in err
    code, out, _ = command(path, "--set", "training.max_steps=16", "--measure")
    assert code == 0
    assert "16 steps: 32 examples" in out
    assert "together, about" in out
    code, out, _ = command(path, "--set", "training.logging_steps=99")
    assert code == 0, "warnings"
    assert "warning: " in out
    code, out, _ = command(path, "--set", "pruning.targets=[no.such]", "--measure")
    assert code == 2, "errors"
    assert "error: --set pruning.targets: `pruning`: pattern 'no.such' in `targets` matches no module" in out
    code, out, err = command(path, "--set", "data.train=nowhere.csv")
    assert (code, out) == (2, "")
    assert "There is no data file nowhere.csv" in err
