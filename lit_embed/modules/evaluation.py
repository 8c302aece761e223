"""From vectors scattered over batches and ranks to metrics and runs."""

import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.sharding import gather_objects, gather_rows, rank
from lit_embed.functional.metrics import ranked_gains
from lit_embed.modules.batches import TextBatch
from lit_embed.retrieval.index import search
from lit_embed.retrieval.metrics import RetrievalMetrics
from lit_embed.retrieval.ranking import Qrels, Run, tie_ranks, to_run


class Vectors:
    """Collects ids and vectors of one side; samplers repeat texts to fill up ranks, so repeated ids are dropped."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}

    def add(self, batch: TextBatch, vectors: Tensor) -> None:
        """Keep the vectors ``(n, D)`` of a batch."""
        self.rows.update(zip(batch.ids, vectors.detach(), strict=True))

    def local(self) -> tuple[list[str], Tensor]:
        """Ids and vectors ``(n, D)`` of this rank; a text that several ranks hold belongs to the first of them."""
        if not self.rows:
            raise InputError("there is nothing to evaluate: no text was encoded")
        taken = {text_id for part in gather_objects(list(self.rows))[: rank()] for text_id in part}
        vectors = torch.stack(list(self.rows.values()))
        keep = [number for number, text_id in enumerate(self.rows) if text_id not in taken]
        return [text_id for text_id in self.rows if text_id not in taken], vectors[keep]

    def everywhere(self) -> tuple[list[str], Tensor]:
        """Ids and vectors of all ranks."""
        ids, vectors = self.local()
        return [text_id for part in gather_objects(ids) for text_id in part], gather_rows(vectors)


def rank_corpus(queries: Vectors, corpus: Vectors, top_k: int) -> tuple[list[str], list[str], Tensor, Tensor]:
    """Search this rank's queries in the corpus of all ranks: query ids, document ids, scores and columns ``(Q, K)``."""
    query_ids, query_vectors = queries.local()
    doc_ids, doc_vectors = corpus.everywhere()
    ties = tie_ranks(doc_ids).to(doc_vectors.device)
    scores, columns = search(query_vectors, doc_vectors, top_k, tie_rank=ties)
    return query_ids, doc_ids, scores, columns


def dense_run(queries: Vectors, corpus: Vectors, top_k: int) -> Run:
    """The run of all queries of all ranks, best ``top_k`` documents each."""
    query_ids, doc_ids, scores, columns = rank_corpus(queries, corpus, top_k)
    local = to_run(scores, columns, query_ids, doc_ids)
    return {query_id: found for part in gather_objects(local) for query_id, found in part.items()}


def update_metrics(metrics: RetrievalMetrics, queries: Vectors, corpus: Vectors, qrels: Qrels, top_k: int) -> None:
    """Add this rank's queries to in-loop metrics."""
    query_ids, doc_ids, _, columns = rank_corpus(queries, corpus, top_k)
    row = {doc_id: number for number, doc_id in enumerate(doc_ids)}
    widest = max((len(qrels[query_id]) for query_id in query_ids), default=1)
    judged = torch.full((len(query_ids), widest), -1)
    gains = torch.zeros(len(query_ids), widest)
    for number, query_id in enumerate(query_ids):
        for place, (doc_id, gain) in enumerate(qrels[query_id].items()):
            judged[number, place], gains[number, place] = row.get(doc_id, -1), gain
    ranked = ranked_gains(columns.cpu(), judged, gains)
    metrics.update(ranked.to(metrics.device), gains.to(metrics.device))
