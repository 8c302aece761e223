"""Reported retrieval metrics: ranx behind one set of rules."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lit_core.errors import InputError
from lit_core.progress import track
from lit_embed.retrieval.ranking import rank_documents

METRICS = ("ndcg@10", "mrr@10", "recall@100", "map")
NAMES = ["ndcg", "ndcg_burges", "dcg", "dcg_burges", "mrr", "map", "recall", "precision", "r-precision", "f1", "bpref"]
NAMES += ["hit_rate", "hits"]
SHAPE = re.compile(rf"({'|'.join(NAMES)})(@[1-9]\d*)?(-l[1-9]\d*)?")  # -l: lowest relevance that counts


def _check(run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Any], metrics: Sequence[str]) -> None:
    if not qrels:
        raise InputError("the qrels are empty; there is nothing to evaluate against")
    for metric in metrics:
        if SHAPE.fullmatch(metric) is None:
            raise InputError(f"unknown metric {metric!r}; write one of {', '.join(NAMES)}, as in ndcg@10")
    for query_id in qrels:
        for doc_id, score in run.get(query_id, {}).items():
            if score != score:
                raise InputError(f"the score of document {doc_id!r} for query {query_id!r} is NaN")


def evaluate_per_query(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    metrics: Sequence[str] = METRICS,
    ignore_identical_ids: bool = False,
) -> dict[str, dict[str, float]]:
    """Compute metrics for each query of the qrels; the rules are those of ``evaluate``.

    The first call in a new environment compiles each metric, about five seconds apiece; later ones find them on disk.

    Returns:
        Metric name -> query id -> value, with the queries in the order of the qrels.
    """
    _check(run, qrels, metrics)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba's type-safety and caching notes while ranx compiles its metrics
        import ranx
        from numba.typed import List as TypedList

        # ranx is handed ranked integer ids: its own sort leaves ties to chance and its hashes may collide
        judged, ranked = [], []
        for query_id, relevance in qrels.items():
            number = {doc_id: index for index, doc_id in enumerate(relevance)}
            gains = np.array([[number[doc_id], gain] for doc_id, gain in relevance.items()], np.float64).reshape(-1, 2)
            judged.append(gains[np.argsort(-gains[:, 1], kind="stable")])  # ranx takes the ideal order from here
            scores = run.get(query_id, {})
            if ignore_identical_ids and query_id in scores:
                scores = {doc_id: score for doc_id, score in scores.items() if doc_id != query_id}
            ids = [number.setdefault(doc_id, len(number)) for doc_id in rank_documents(scores)]
            ranked.append(np.array([(doc, -rank) for rank, doc in enumerate(ids)], np.float64).reshape(-1, 2))
        judged_list, ranked_list = TypedList(judged), TypedList(ranked)
        values = {}
        for metric in track(metrics, "metrics (compiled on first use)", len(metrics)):
            pair = [metric, metric]  # ranx 0.3.21 cannot answer per query for a single metric with a cut-off
            found = ranx.evaluate(judged_list, ranked_list, pair, return_mean=False)[metric]
            values[metric] = dict(zip(qrels, found.tolist(), strict=True))
    return values


def evaluate(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    metrics: Sequence[str] = METRICS,
    ignore_identical_ids: bool = False,
) -> dict[str, float]:
    """Average metrics over the queries of the qrels.

    The rules, which differ between the usual tools:

    - Documents are ordered by score in float32, then by document id, descending (as trec_eval does).
    - A query that the run lacks, or ranks nothing for, counts 0 (pytrec_eval leaves it out of the mean).
    - A query without a relevant document counts 0 and stays in the mean.
    - Queries of the run that the qrels lack are dropped; unjudged documents are not relevant.
    - A document is relevant from relevance 1 on; nDCG uses linear gains, negative ones count as 0.

    Args:
        run: Query id -> document id -> score.
        qrels: Query id -> document id -> relevance.
        metrics: ranx names, such as ``ndcg@10``, ``mrr@10``, ``recall@100``, ``map``, ``hit_rate@1``.
        ignore_identical_ids: Drop a document whose id is the query's own, as BEIR's evaluator does (for collections
            whose queries are documents). Then search for one document more than the deepest cut-off.

    Returns:
        Metric name -> mean value, from 0 to 1 for all but ``hits`` and the DCGs.

    Raises:
        InputError: The qrels are empty, a metric is unknown, or a score is NaN; the error names query and document.
    """
    values = evaluate_per_query(run, qrels, metrics, ignore_identical_ids)
    return {metric: float(np.mean(list(values[metric].values()))) for metric in metrics}
