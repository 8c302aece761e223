"""The records that readers give, datasets draw from and collators receive."""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, TypedDict


class Passage(NamedTuple):
    """A passage and the id by which false negatives are recognised."""

    doc_id: str
    text: str


class Example(NamedTuple):
    """A query with its known positives and hard negatives.

    ``positive_scores`` and ``negative_scores`` are a teacher's scores in the order of the passages, or ``None``.
    """

    query_id: str
    query: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...] = ()
    positive_scores: tuple[float, ...] | None = None
    negative_scores: tuple[float, ...] | None = None


@dataclass
class Collection:
    """What a retriever is evaluated on: ids to texts, and graded judgements ``{query_id: {doc_id: grade}}``."""

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


class PairItem(TypedDict):
    """One training item, drawn from an ``Example`` as a pure function of ``seed``.

    ``passages`` holds the positive first, then the negatives. ``positive_ids`` names all known positives of the query,
    so that another query's passage among them is not taken for a negative. ``own_group_only`` says that the query is
    contrasted with its own passages alone. ``scores`` are a teacher's, one a passage, or ``None``.
    """

    query: str
    query_id: str
    passages: list[str]
    passage_ids: list[str]
    positive_ids: list[str]
    own_group_only: bool
    dataset: str
    seed: int
    scores: list[float] | None


class TextItem(TypedDict):
    """A text to encode, or to train a language model on."""

    id: str
    text: str


def content_id(text: str) -> str:
    """Return an id that depends on the text alone, so that equal texts share it."""
    return "h" + blake2b(text.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()


def merge_examples(examples: Iterable[Example]) -> list[Example]:
    """Merge examples with the same query text, so that a batch of distinct rows has distinct queries.

    Positives and negatives are united by id in order of appearance; a passage that is a positive anywhere is removed
    from the negatives. The first query id stays. Scores stay only where all merged examples have them.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.query, []).append(example)
    return [_merge(group) for group in groups.values()]


def _merge(group: list[Example]) -> Example:
    positives, positive_scores = _unite([(e.positives, e.positive_scores) for e in group], excluded=set())
    excluded = {passage.doc_id for passage in positives}
    negatives, negative_scores = _unite([(e.negatives, e.negative_scores) for e in group], excluded)
    return Example(group[0].query_id, group[0].query, positives, negatives, positive_scores, negative_scores)


def _unite(
    parts: list[tuple[tuple[Passage, ...], tuple[float, ...] | None]], excluded: set[str]
) -> tuple[tuple[Passage, ...], tuple[float, ...] | None]:
    """Unite passages by id; the first occurrence gives text and score."""
    kept: dict[str, tuple[Passage, float]] = {}
    scored = all(scores is not None or not passages for passages, scores in parts)
    for passages, scores in parts:
        for passage, score in zip(passages, scores or [0.0] * len(passages), strict=True):
            if passage.doc_id not in excluded:
                kept.setdefault(passage.doc_id, (passage, score))
    has_scores = scored and any(scores is not None for _, scores in parts)
    return tuple(p for p, _ in kept.values()), tuple(s for _, s in kept.values()) if has_scores else None
