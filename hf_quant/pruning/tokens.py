"""The tokenizer's side of a smaller vocabulary: which tokens must stay, and the tokenizer that knows only those."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KINDS = ("WordPiece", "WordLevel", "BPE", "Unigram")
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class Vocabulary:
    """A fast tokenizer's vocabulary, as its JSON tells it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer; it is read only.

    Raises:
        `ValueError`: if the tokenizer is not a fast one, cannot be written as JSON, is of an unknown kind, or draws
            random pieces.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
            raise ValueError(
                f"{type(tokenizer).__name__} is no fast tokenizer, and only a fast one's vocabulary can be made "
                f"smaller ({', '.join(_KINDS)}). Load one: AutoTokenizer.from_pretrained(...), where the model has a "
                "tokenizer.json."
            )
        self.tokenizer = tokenizer
        try:
            self.state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        except Exception as error:  # the Rust library raises nothing narrower
            raise ValueError(
                f"{type(tokenizer).__name__} cannot be written as JSON ({error}), so it cannot be rebuilt. Replace "
                "its custom parts, such as a pre-tokenizer in Python, by ones from the tokenizers library."
            ) from error
        self.model: dict[str, Any] = self.state["model"]
        self.kind: str = self.model.get("type", "")
        if self.kind not in _KINDS:
            raise ValueError(
                f"the tokenizer's model is {self.kind!r}; those that can be rebuilt: {', '.join(_KINDS)}."
            )
        if self.model.get("dropout"):
            raise ValueError(
                f"the tokenizer draws random pieces (dropout={self.model['dropout']}), so no set of tokens is all "
                "that a text needs. Set tokenizer.backend_tokenizer.model.dropout = None first."
            )
        vocab = self.model["vocab"]
        self.own: dict[str, int] = (
            {piece: index for index, (piece, _) in enumerate(vocab)} if self.kind == "Unigram" else dict(vocab)
        )
        self.added: dict[str, int] = {token["content"]: token["id"] for token in self.state["added_tokens"]}
        self.ids: dict[str, int] = {**self.own, **self.added}
        self.texts = plain_backend(tokenizer)

    def always(self) -> set[int]:
        """Ids that stay with any corpus: special, added and unknown tokens, single characters and bytes."""
        prefix = self.model.get("continuing_subword_prefix") or ""
        suffix = self.model.get("end_of_word_suffix") or ""
        ids = set(self.added.values())
        for token, index in self.own.items():
            if len(token.removeprefix(prefix).removesuffix(suffix)) <= 1 or _BYTE.fullmatch(token):
                ids.add(index)
        ids.update(self.own[str(token)] for token in self.tokenizer.all_special_tokens if str(token) in self.own)
        if self.model.get("unk_token") in self.own:
            ids.add(self.own[self.model["unk_token"]])
        if self.kind == "Unigram":
            ids.update([] if self.model["unk_id"] is None else [self.model["unk_id"]])
            # An unknown character costs the lowest score of all, and ten more: without this piece it would cost less.
            ids.add(min(range(len(self.model["vocab"])), key=lambda index: self.model["vocab"][index][1]))

        def note(index: int) -> int:
            ids.add(index)
            return index

        _processor(self.state["post_processor"], note)
        if self.state["padding"] and self.state["padding"]["pad_token"] in self.ids:
            ids.add(self.state["padding"]["pad_id"])
        return ids

    def encode(self, texts: list[str]) -> Iterable[list[int]]:
        """The ids of each text without special tokens, and of the pieces that an unknown word begins with."""
        unknown = self.own.get(self.model["unk_token"], -1) if self.kind == "WordPiece" else -1
        for text, encoding in zip(texts, self.texts.encode_batch(texts, add_special_tokens=False), strict=True):
            yield encoding.ids
            for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if index == unknown:
                    yield self._beginnings(text[start:end])

    def _beginnings(self, text: str) -> list[int]:
        # A word is unknown where no piece continues it. If its longest beginning went, a shorter one might be
        # continued, and the word would be known: other tokens than before.
        text = text if self.texts.normalizer is None else self.texts.normalizer.normalize_str(text)
        splitter = self.texts.pre_tokenizer
        words = [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]
        ids = []
        for word in words:
            rest, prefix = word[: self.model["max_input_chars_per_word"]], ""
            while rest:
                length = next((n for n in range(len(rest), 0, -1) if prefix + rest[:n] in self.own), 0)
                if not length:
                    break
                ids.append(self.own[prefix + rest[:length]])
                rest, prefix = rest[length:], self.model["continuing_subword_prefix"]
        return ids

    def ancestors(self, kept: set[int]) -> set[int]:
        """`kept` with all tokens that BPE merges into one of them, over any number of merges."""
        if self.kind != "BPE":
            return kept
        parts: dict[str, list[str]] = {}
        for left, right, merged in self._merges():
            parts.setdefault(merged, []).extend((left, right))
        found = set(kept)
        open_ = [token for token, index in self.own.items() if index in found]
        while open_:
            for part in parts.get(open_.pop(), ()):
                if self.own[part] not in found:
                    found.add(self.own[part])
                    open_.append(part)
        return found

    def in_order(self, kept: set[int]) -> list[int]:
        """`kept` in the order of the new ids: as before, but added tokens after the others, rows of no token last."""
        own, added = set(self.own.values()), set(self.added.values())
        return sorted(kept, key=lambda index: (0 if index in own else 1 if index in added else 2, index))

    def rebuild(self, new: Mapping[int, int]) -> PreTrainedTokenizerBase:
        """The tokenizer of the kept tokens, as a plain reload makes it.

        Args:
            new (`dict[int, int]`): new id by old id, for the kept ones.
        """
        model = dict(self.model)
        if self.kind == "Unigram":
            model["vocab"] = [piece for index, piece in enumerate(model["vocab"]) if index in new]
            model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
        else:
            model["vocab"] = {token: new[index] for token, index in self.own.items() if index in new}
        if self.kind == "BPE":
            merges = self._merges()
            model["merges"] = [
                [left, right]
                for left, right, merged in merges
                if all(token in model["vocab"] for token in (left, right, merged))
            ]
        state = {**self.state, "model": model}
        added = sorted(self.state["added_tokens"], key=lambda token: new[token["id"]])
        state["added_tokens"] = [{**token, "id": new[token["id"]]} for token in added]
        state["post_processor"] = _processor(self.state["post_processor"], lambda index: new[index])
        if self.state["padding"]:
            pad = self.state["padding"]["pad_id"]
            state["padding"] = {**self.state["padding"], "pad_id": new.get(pad, pad)}
        # Classes of transformers build their own pipeline around what the file says, and some remember ids beside
        # it; a real reload is what a user will have.
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            Path(folder, "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
            smaller = type(self.tokenizer).from_pretrained(folder)
        smaller.name_or_path = self.tokenizer.name_or_path
        smaller.init_kwargs["name_or_path"] = self.tokenizer.name_or_path
        return smaller

    def _merges(self) -> list[tuple[str, str, str]]:
        skip = len(self.model.get("continuing_subword_prefix") or "")
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in self.model["merges"])
        return [(left, right, left + right[skip:]) for left, right in pairs]


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of what a fast tokenizer runs on, which neither cuts nor pads."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _processor(node: Any, new: Callable[[int], int]) -> Any:
    """A post-processor's JSON with each id in it replaced by `new(id)`."""
    kind = (node or {}).get("type")
    if kind == "Sequence":
        return {**node, "processors": [_processor(child, new) for child in node["processors"]]}
    if kind == "TemplateProcessing":
        tokens = {
            name: {**token, "ids": [new(index) for index in token["ids"]]}
            for name, token in node["special_tokens"].items()
        }
        return {**node, "special_tokens": tokens}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {**node, **{end: [node[end][0], new(node[end][1])] for end in ("sep", "cls")}}
    if kind in (None, "ByteLevel"):
        return node
    raise ValueError(
        f"the tokenizer's post-processor is {kind!r}; those whose ids can be renumbered: TemplateProcessing, "
        "BertProcessing, RobertaProcessing, ByteLevel, Sequence."
    )
