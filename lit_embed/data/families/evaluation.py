"""Evaluation tasks of a domain, of meanings that are never trained on."""

import random
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

from lit_embed.data.families.config import FamiliesConfig
from lit_embed.data.families.domains import Domain, Meaning, Split
from lit_embed.data.families.texts import Pool, Texts, Writer, draw_pool, passage, question, sentence
from lit_embed.data.families.training import MIXED, instruction, labels
from lit_embed.retrieval.tasks import (
    Classification,
    Clustering,
    EvalTask,
    PairClassification,
    Reranking,
    Retrieval,
    Sts,
    TaskType,
)

CANDIDATES = 10  # of a query, in reranking
PASSAGES_PER_QUERY = 3
FITTED, PER_LABEL = 8, 4  # texts of a label to fit on, and how many of them a draw takes
PREDICTED, CLUSTERED = 60, 100  # texts of all labels


class DomainTasks:
    """Writes the tasks of one domain and split; those that rank share their passages.

    Args:
        config: Wording and sizes.
        domain: Where the words come from.
        split: ``val`` or ``test``; validation has half as many texts.
        meanings: What the texts may mean.
        texts: Keeps all texts different.
    """

    def __init__(
        self, config: FamiliesConfig, domain: Domain, split: Split, meanings: Sequence[Meaning], texts: Texts
    ) -> None:
        self.config, self.domain, self.split, self.meanings, self.texts = config, domain, split, meanings, texts
        self.half = split == "val"
        self.queries = self._size(config.test_queries)
        count = self.queries * PASSAGES_PER_QUERY
        rng = random.Random(f"{config.seed}/{domain.name}/{split}/passages")
        self.pool = draw_pool(rng, domain, meanings, count, passage, texts, "test_queries")

    def task(self, kind: TaskType) -> EvalTask:
        """Build a task of a type."""
        name = f"{self.domain.name}-{kind}"
        rng = random.Random(f"{self.config.seed}/{name}/{self.split}")
        side = "out" if self.domain.name in self.config.held_out else "in"
        shared: dict[str, Any] = {"name": name, "domain": side, "instruction": instruction(kind, self.domain)}
        if kind in ("retrieval", "reranking"):
            return self._ranking(rng, kind, shared)
        if kind == "classification":
            fitted = self._labelled(rng, 1, FITTED, "f", sentence(1.0))
            predicted = self._labelled(rng, 1, self._each(PREDICTED), "p", sentence(self.config.overlap))
            return Classification(
                **shared,
                queries=_texts(fitted) | _texts(predicted),
                train=_labels(fitted, labels(self.domain, self.config.values), 1),
                test=_labels(predicted, labels(self.domain, self.config.values), 1),
                per_label=PER_LABEL,
            )
        if kind == "clustering":
            members = self._labelled(rng, 2, self._each(CLUSTERED), "t", sentence(MIXED))
            names = [str(value) for value in range(self.config.values)]
            return Clustering(**shared, queries=_texts(members), labels=_labels(members, names, 2))
        write = sentence if kind == "sts" else question
        wanted = cycle(range(4) if kind == "sts" else (3, 2))
        texts: dict[str, str] = {}
        pairs: list[tuple[str, str, int]] = []
        for number, first in enumerate(self._round(rng, self.queries)):
            second, parts = self._partner(rng, first, next(wanted))
            ids = f"a{number:03d}", f"b{number:03d}"
            texts[ids[0]] = self._new(rng, write(self.config.overlap), first)
            texts[ids[1]] = self._new(rng, write(1.0), second)
            pairs.append((*ids, parts))
        if kind == "sts":
            return Sts(**shared, queries=texts, pairs=[(first, second, float(parts)) for first, second, parts in pairs])
        return PairClassification(
            **shared, queries=texts, pairs=[(first, second, int(parts == 3)) for first, second, parts in pairs]
        )

    def _ranking(self, rng: random.Random, kind: TaskType, shared: dict[str, Any]) -> EvalTask:
        asked = list(self.pool.rows)
        queries: dict[str, str] = {}
        qrels: dict[str, dict[str, int]] = {}
        for number, meaning in enumerate(rng.sample(asked, len(asked))[: self.queries]):
            query_id = f"q{number:03d}"
            queries[query_id] = self._new(rng, question(self.config.overlap), meaning)
            right = self.pool.rows[meaning]
            qrels[query_id] = {_passage_id(row): 1 for row in right}
            if kind == "reranking":
                others = self.pool.others(rng, meaning, CANDIDATES - len(right), (2, 1, 0))
                qrels[query_id] |= {_passage_id(row): 0 for row in others}
        if kind == "retrieval":
            return Retrieval(**shared, queries=queries, passages=_passages(self.pool), qrels=qrels)
        used = {passage_id for judged in qrels.values() for passage_id in judged}
        passages = {passage_id: text for passage_id, text in _passages(self.pool).items() if passage_id in used}
        return Reranking(**shared, queries=queries, passages=passages, candidates=qrels)

    def _labelled(
        self, rng: random.Random, part: int, count: int, prefix: str, write: Writer
    ) -> list[tuple[str, str, Meaning]]:
        """Write ``count`` texts of each value of a part of the meaning: ids, texts, meanings."""
        found: list[tuple[str, str, Meaning]] = []
        for value in range(self.config.values):
            meanings = [meaning for meaning in self.meanings if meaning[part] == value]
            for number, meaning in enumerate(_round(rng, meanings, count)):
                text = self._new(rng, write, meaning)
                found.append((f"{prefix}{value:02d}-{number:02d}", text, meaning))
        return found

    def _partner(self, rng: random.Random, meaning: Meaning, parts: int) -> tuple[Meaning, int]:
        """Draw a meaning that shares ``parts`` parts with another, or the next smaller number that there is."""
        for fewer in range(parts, -1, -1):
            if found := [other for other in self.meanings if other.shared(meaning) == fewer]:
                return rng.choice(found), fewer
        raise AssertionError("a domain has meanings that share nothing")

    def _round(self, rng: random.Random, count: int) -> Iterator[Meaning]:
        return _round(rng, self.meanings, count)

    def _new(self, rng: random.Random, write: Writer, meaning: Meaning) -> str:
        return self.texts.new(lambda: (write(rng, self.domain, meaning), None), "test_queries")[0]

    def _each(self, count: int) -> int:
        """Texts of a label: ``count`` shared out, at least two."""
        return max(2, self._size(count) // self.config.values)

    def _size(self, count: int) -> int:
        return count // 2 if self.half else count


def _round(rng: random.Random, meanings: Sequence[Meaning], count: int) -> Iterator[Meaning]:
    """Go round the meanings in random order."""
    order = rng.sample(meanings, len(meanings))
    return (order[number % len(order)] for number in range(count))


def _passage_id(row: int) -> str:
    return f"p{row:03d}"


def _passages(pool: Pool) -> dict[str, str]:
    return {_passage_id(row): passage.text for row, passage in enumerate(pool.passages)}


def _texts(rows: Sequence[tuple[str, str, Meaning]]) -> dict[str, str]:
    return {text_id: text for text_id, text, _ in rows}


def _labels(rows: Sequence[tuple[str, str, Meaning]], names: Sequence[str], part: int) -> dict[str, str]:
    return {text_id: names[meaning[part]] for text_id, _, meaning in rows}
