"""Models to and from a stand-in of the hub on this machine, by the installed client, in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hub import TOKEN, Hub, Repo
from tests.integration.test_recipe_signals import REPOSITORY
from tests.reviews import write_files, write_recipe


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _all_are_answered(hub: Hub) -> Iterator[None]:
    hub.refuse = None
    yield
    assert hub.unknown == []


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """That of a process which knows no hub but this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",  # its storage is another protocol
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def python(script: str, *arguments: object, env: dict[str, str]) -> str:
    """What a script prints in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


UPLOAD = """
    import sys
    from pathlib import Path
    from rich.console import Console
    from hf_quant.recipe.schema import Recipe
    from hf_quant.recipe.upload import upload
    recipe, folder = Recipe.from_yaml(sys.argv[1]), Path(sys.argv[2])
    try:
        upload(recipe, folder, Console(width=1000))
    except OSError as error:
        print(error)
"""


def upload(hub: Hub, folder: Path, settings: dict[str, Any], **env: str) -> str:
    """What `upload` says of a folder with a small and a large file."""
    (folder / "int8").mkdir()
    (folder / "int8" / "config.json").write_text('{"a": 1}')
    (folder / "int8" / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    recipe = write_recipe(folder, hub=settings, training=None)  # whose check would import torch
    return python(UPLOAD, recipe, folder / "int8", env=environment(hub, folder / "home", **env))


def test_a_folder_becomes_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    said = upload(hub, tmp_path, {"repo_id": "me/private"})
    assert said == f"uploaded {tmp_path / 'int8'} to me/private\n"
    repo = hub.repos["me/private"]
    assert (repo.private, repo.summaries) == (True, ["hf_quant: int8 model"])
    assert repo.files == contents(tmp_path / "int8")
    assert hashlib.sha256(repo.files["model.safetensors"]).hexdigest() in hub.verified
    assert hashlib.sha256(repo.files["config.json"]).hexdigest() not in hub.blobs, "it travels in the commit"


def test_a_name_alone_goes_to_the_account_of_the_token(hub: Hub, tmp_path: Path) -> None:
    settings = {"repo_id": "public", "private": False, "commit_message": "half the size\nand as good"}
    assert upload(hub, tmp_path, settings).endswith(" to me/public\n")
    repo = hub.repos["me/public"]
    assert (repo.private, repo.summaries) == (False, ["half the size\nand as good"])
    assert repo.files == contents(tmp_path / "int8")


@pytest.mark.parametrize(
    ("refuse", "env", "message"),
    [
        (None, {"HF_TOKEN": "hf_old"}, r"401.* The hub knows no such token, or got none: log in with `hf auth login`"),
        (("/repos/create", 403), {}, r"no, says the stand-in.* Give a token that may write to you: `hf auth login`"),
        (("/preupload", 403), {}, r"403 Forbidden.* Give a token that may write to you"),
        (("/commit", 507), {}, r"507.* The hub may be disturbed, or the account's storage full\."),
        (None, {"HF_ENDPOINT": "http://127.0.0.1:9"}, r"refused.* hub is reached from here: the network, HF_ENDPOINT"),
        (None, {"HF_HUB_OFFLINE": "1"}, r"offline.* HF_HUB_OFFLINE\."),
    ],
    ids=["no token", "not the owner", "read only", "full", "no hub", "offline"],
)
def test_a_refusal_says_where_the_model_is_and_how_to_go_on(
    hub: Hub, tmp_path: Path, refuse: tuple[str, int] | None, env: dict[str, str], message: str
) -> None:
    hub.refuse = refuse
    said = upload(hub, tmp_path, {"repo_id": "you/reviews"}, **env)
    assert said.startswith(f"the model is saved in {tmp_path / 'int8'}, but was not uploaded to you/reviews: ")
    assert re.search(message, said)
    assert f"hf-quant run {tmp_path / 'out' / 'recipe.yaml'} --resume" in said
    assert TOKEN not in said
    assert sorted(contents(tmp_path / "int8")) == ["config.json", "model.safetensors"]
    assert not (repo := hub.repos.get("you/reviews")) or not repo.files


@dataclass
class Story:
    """A run from a model of the hub to one on the hub, refused at first."""

    folder: Path
    first: subprocess.CompletedProcess[str]
    between: dict[str, bytes]
    second: subprocess.CompletedProcess[str]
    asked: list[str]


@pytest.fixture(scope="module")
def story(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = write_files(tmp_path_factory.mktemp("story"))
    hub.repos["someone/tiny"] = Repo(False, contents(folder / "model"), ["first"])
    recipe = write_recipe(
        folder, model="someone/tiny", hub={"repo_id": "me/reviews"}, evaluation={"baseline": "train"}
    )
    env = environment(hub, folder / "home")
    how: dict[str, Any] = {"capture_output": True, "text": True, "env": env, "timeout": 120, "check": False}
    command = [sys.executable, "-m", "hf_quant.cli", "run"]
    hub.refuse = ("/commit", 403)
    first = subprocess.run([*command, str(recipe)], **how)
    hub.refuse = None
    assert first.returncode == 2, first.stderr[-3000:]
    between = contents(folder / "out" / "int8")
    before = len(hub.asked)
    again = re.findall(r"hf-quant run (\S+) --resume", first.stderr)  # as the message says, if it does
    second = subprocess.run([*command, *again, "--resume"], **how)
    return Story(folder, first, between, second, hub.asked[before:])


@pytest.mark.slow
def test_a_refused_upload_loses_nothing_and_is_done_again(hub: Hub, story: Story) -> None:
    out = story.folder / "out"
    assert f"the model is saved in {out / 'int8'}, but was not uploaded to me/reviews" in story.first.stderr
    assert "Traceback" not in story.first.stderr
    assert (out / "report.html").is_file()
    assert story.second.returncode == 0, story.second.stderr[-3000:]
    assert f"kept the int8 model in {out / 'int8'}" in story.second.stdout.replace("\n", "")
    assert "training int8" in story.first.stdout
    assert "training int8" not in story.second.stdout
    repo = hub.repos["me/reviews"]
    assert (repo.private, repo.summaries) == (True, ["hf_quant: int8 model"])
    assert repo.files == story.between == contents(out / "int8")
    assert not any(line.startswith("PUT") for line in story.asked), "what the first try uploaded is not sent again"


@pytest.mark.slow
def test_model_and_tokenizer_of_a_recipe_came_from_the_hub(hub: Hub, story: Story) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert any(re.fullmatch(rf"\w+ /someone/tiny/resolve/.*/{name}", line) for line in hub.asked), name
    provenance = json.loads((story.folder / "out" / "int8" / "provenance.json").read_text(encoding="utf-8"))
    assert "someone/tiny" in json.dumps(provenance)


RELOAD = """
    import sys
    import torch
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from hf_quant import load_quantized
    from hf_quant.runtime.base import quantized_modules
    local, name = sys.argv[1:]
    batch = AutoTokenizer.from_pretrained(name)(["the film was good", "a plot"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == AutoTokenizer.from_pretrained(local)(
        ["the film was good", "a plot"], padding=True, return_tensors="pt"
    )["input_ids"].tolist()
    for load in (load_quantized, AutoModelForSequenceClassification.from_pretrained):
        pair = [load(place).eval() for place in (local, name)]
        with torch.no_grad():
            wanted, got = (model(**batch).logits for model in pair)
        assert wanted.std() > 0
        print(type(pair[1]).__name__, len(quantized_modules(pair[1])), torch.equal(wanted, got))
    print(snapshot_download(name))
"""


@pytest.mark.slow
def test_it_loads_from_the_hub_as_from_the_folder(hub: Hub, story: Story, tmp_path: Path) -> None:
    local = story.folder / "out" / "int8"
    said = python(RELOAD, local, "me/reviews", env=environment(hub, tmp_path / "home")).splitlines()
    assert said[0].startswith("BertForSequenceClassification ")
    assert int(said[0].split()[1]) > 0
    assert [line.split()[-1] for line in said[:2]] == ["True", "True"]
    assert contents(Path(said[2])) == contents(local)
    hidden = environment(hub, tmp_path / "other", HF_TOKEN="hf_old")
    with pytest.raises(AssertionError, match=r"make sure to have access to it|not a valid model identifier"):
        python(RELOAD, local, "me/reviews", env=hidden)
