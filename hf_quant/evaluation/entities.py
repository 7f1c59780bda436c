"""Entities in sentences tagged word by word (BIO), and how many of them are found."""

from __future__ import annotations

from collections.abc import Sequence

OUTSIDE = "O"

Entity = tuple[str, int, int]


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities that a sentence's BIO tags mark (Ramshaw & Marcus, 1995, "Text Chunking using
    Transformation-Based Learning").

    `B-X` begins an entity of type X, and `I-X` goes on with it. An `I-X` that has no entity of type X before it begins
    one too, as the scorer of CoNLL-2003 reads it.

    Args:
        tags (sequence of `str`): `"O"`, `"B-..."` or `"I-..."`, one a word.

    Returns:
        `set` of `(type, first word, word after the last)`.
    """
    found: set[Entity] = set()
    kind, start = "", 0
    for index, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, name = tag.partition("-")
        if kind and (prefix != "I" or name != kind):
            found.add((kind, start, index))
            kind = ""
        if not kind and prefix in ("B", "I"):
            kind, start = name, index
    return found


def check_bio(names: Sequence[str]) -> None:
    """Refuse tags that mark no entities.

    Raises:
        `ValueError`: naming the first tag that is not BIO.
    """
    for name in names:
        if name != OUTSIDE and not (name[:2] in ("B-", "I-") and len(name) > 2):
            raise ValueError(
                f"'entity_f1' reads BIO tags, 'O', 'B-...' and 'I-...', but a tag is called {name!r}. Use "
                "'token_accuracy', or give the tags these names."
            )
    if not any(name.startswith(("B-", "I-")) for name in names):
        raise ValueError(
            "'entity_f1' reads BIO tags, 'O', 'B-...' and 'I-...', but the tags have no such names. Put names into "
            "the label column or into the model's `config.id2label`, or use 'token_accuracy'."
        )


def entity_counts(predicted: Sequence[str], true: Sequence[str]) -> tuple[int, int]:
    """What a sentence adds to the F1 of entities: twice the entities found, and those predicted plus those there.

    An entity is found if its type and both its ends are right (Tjong Kim Sang & De Meulder, 2003, CoNLL-2003). The F1
    over all sentences is the sum of the first over the sum of the second.
    """
    ours, theirs = entities(predicted), entities(true)
    return 2 * len(ours & theirs), len(ours) + len(theirs)
