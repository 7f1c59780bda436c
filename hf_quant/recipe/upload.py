"""The finished model to the Hugging Face hub; a failure says where the model lies and how to go on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .schema import Recipe


def upload(recipe: Recipe, folder: Path, console: Console) -> None:
    """Puts the finished model on the hub, where the recipe says so.

    Args:
        recipe ([`Recipe`]): its `hub` names the repository, which is made where there is none; its `output` holds the
            run that `--resume` goes on with.
        folder (`Path`): the model, tokenizer and recipe; every file of it is uploaded.
        console (`rich.console.Console`): where to print.

    Raises:
        `OSError`: if the hub is not reached or refuses; the folder stays as it is.
    """
    if recipe.hub is None:
        return
    from huggingface_hub import HfApi

    repo_id = str(recipe.hub.repo_id)
    try:
        api = HfApi()
        # Its answer has the account that a name without one goes to; uploading needs it.
        repo_id = api.create_repo(repo_id, private=recipe.hub.private, exist_ok=True).repo_id
        message = recipe.hub.commit_message or f"hf_quant: {folder.name} model"
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # errors of the HTTP client are no OSError, and hf_xet has its own
        again = f"hf-quant run {shlex.quote(str(Path(recipe.output) / 'recipe.yaml'))} --resume"
        raise OSError(
            f"the model is saved in {folder}, but was not uploaded to {repo_id}: {_words(error)} "
            f"{_advice(error, repo_id)} Then upload it, without training again: {again}"
        ) from error
    console.out(f"uploaded {folder} to {repo_id}", highlight=False)


def _advice(error: Exception, repo_id: str) -> str:
    """What to change, as far as the hub's answer tells."""
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return "The hub knows no such token, or got none: log in with `hf auth login`, or set HF_TOKEN."
    if status in (403, 404):
        owner = repo_id.split("/")[0] if "/" in repo_id else "your account"
        return f"Give a token that may write to {owner}: `hf auth login`, or HF_TOKEN."
    if status is None:
        return "Make sure that the hub is reached from here: the network, HF_ENDPOINT, HF_HUB_OFFLINE."
    return "The hub may be disturbed, or the account's storage full."


def _words(error: Exception) -> str:
    """The error in one line; the hub's own have several."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if words.endswith(".") else f"{words}."
