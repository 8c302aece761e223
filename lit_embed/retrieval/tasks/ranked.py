"""Tasks that rank passages for queries."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from lit_embed.retrieval.evaluate import METRICS, evaluate
from lit_embed.retrieval.index import search
from lit_embed.retrieval.ranking import Run, tie_ranks, to_run
from lit_embed.retrieval.tasks.task import EvalTask, TaskType, TextVectors

DEPTH = 100  # documents ranked for each query


class Judged(Protocol):
    """A collection with judgements, such as ``lit_embed.data.records.Collection``."""

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True)
class Retrieval(EvalTask):
    """Rank all passages by cosine; the rules of ``lit_embed.retrieval.evaluate`` hold.

    Args:
        qrels: Query id -> passage id -> grade; each query has a passage of grade 1 or more.
    """

    type: ClassVar[TaskType] = "retrieval"
    main: ClassVar[str] = "ndcg@10"
    sides: ClassVar[bool] = True

    qrels: Mapping[str, Mapping[str, int]]

    @classmethod
    def from_collection(cls, collection: Judged, domain: str, instruction: str = "") -> Self:
        """Make the task of a collection; queries that nobody judged are left out."""
        queries = {query_id: text for query_id, text in collection.queries.items() if query_id in collection.qrels}
        kept: dict[str, Any] = {"queries": queries, "passages": collection.corpus, "qrels": collection.qrels}
        return cls(name=collection.name, domain=domain, instruction=instruction, **kept)

    def check(self) -> None:
        _check_judgements(self, self.qrels, "qrels")

    def score(self, queries: TextVectors, passages: TextVectors) -> dict[str, float]:
        query_ids, passage_ids = sorted(self.queries), sorted(self.passages)
        found = search(*_sides(self, queries, passages), DEPTH, tie_rank=tie_ranks(passage_ids))
        return evaluate(to_run(*found, query_ids, passage_ids), self.qrels, METRICS)


@dataclass(frozen=True, kw_only=True)
class Reranking(EvalTask):
    """Rank each query's own candidates by cosine: mean average precision and reciprocal rank.

    Args:
        candidates: Query id -> passage id -> whether it is relevant (1 or 0); each query has a relevant one.
    """

    type: ClassVar[TaskType] = "reranking"
    main: ClassVar[str] = "map"
    sides: ClassVar[bool] = True

    candidates: Mapping[str, Mapping[str, int]]

    def check(self) -> None:
        _check_judgements(self, self.candidates, "candidates")
        for query_id, relevance in self.candidates.items():
            if not set(relevance.values()) <= {0, 1}:
                raise self.error(f"a candidate of query '{query_id}' is judged neither 0 nor 1", "candidates")

    def score(self, queries: TextVectors, passages: TextVectors) -> dict[str, float]:
        asked, answers = _sides(self, queries, passages)
        query_row = {query_id: row for row, query_id in enumerate(sorted(self.queries))}
        passage_row = {passage_id: row for row, passage_id in enumerate(sorted(self.passages))}
        run: Run = {}
        for query_id, relevance in self.candidates.items():
            cosines = answers[[passage_row[passage_id] for passage_id in relevance]] @ asked[query_row[query_id]]
            run[query_id] = dict(zip(relevance, cosines.tolist(), strict=True))
        return evaluate(run, self.candidates, ("map", "mrr"))


def _sides(task: EvalTask, queries: TextVectors, passages: TextVectors) -> tuple[Tensor, Tensor]:
    """Vectors of length 1 of all queries and all passages, by ascending id."""
    sides = task.unit(queries, sorted(task.queries)), task.unit(passages, sorted(task.passages))
    if sides[0].shape[1] != sides[1].shape[1]:
        widths = f"{sides[0].shape[1]} and {sides[1].shape[1]}"
        raise task.error(f"vectors of queries and passages have {widths} values; encode both with one encoder")
    return sides


def _check_judgements(task: EvalTask, judged: Mapping[str, Mapping[str, int]], field: str) -> None:
    task.known(judged, task.queries, field)
    for query_id in task.queries:
        grades = judged.get(query_id, {})
        task.known(grades, task.passages, field)
        if max(grades.values(), default=0) < 1:
            raise task.error(f"query '{query_id}' has no relevant passage; judge one relevant or drop the query", field)
