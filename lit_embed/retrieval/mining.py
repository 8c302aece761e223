"""Hard negatives from a run."""

import random
from collections.abc import Collection, Mapping
from typing import Literal

from lit_core.errors import InputError
from lit_embed.retrieval.ranking import rank_documents


def _positive_score(
    query_id: str, positives: Collection[str], scores: Mapping[str, float], extra: Mapping[str, float]
) -> float:
    """Return the lowest score among a query's positives."""
    missing = sorted(doc_id for doc_id in positives if doc_id not in scores and doc_id not in extra)
    if missing or not positives:
        what = f"positive {missing[0]!r} of query {query_id!r} has no score" if missing else f"{query_id!r} has none"
        raise InputError(f"a margin needs the scores of all positives, but {what}; pass it in positive_scores")
    return min(extra[doc_id] if doc_id in extra else scores[doc_id] for doc_id in positives)


def mine_hard_negatives(
    run: Mapping[str, Mapping[str, float]],
    positives: Mapping[str, Collection[str]],
    count: int,
    rank_range: tuple[int, int] = (0, 100),
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    seed: int = 0,
    sampling: Literal["top", "random"] = "top",
    positive_scores: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, list[str]]:
    """Choose negatives for each query among the documents a ranker found close to it.

    Positives are taken out of the ranking first (ties by document id, descending); what is left is numbered from 0.
    A candidate has its number in ``rank_range`` and passes every filter given. Margins guard against false negatives:
    they compare with the lowest score among the query's positives, so a candidate has to stay below all of them.

    Args:
        run: Query id -> document id -> score.
        positives: All known positives of each query; queries without an entry are not mined.
        count: Negatives wanted per query; fewer are returned where fewer candidates exist, none for a query that the
            run lacks.
        rank_range: First number, and the number after the last.
        max_score: Highest score allowed.
        min_score: Lowest score allowed.
        absolute_margin: A candidate's score is at most the positive's minus this.
        relative_margin: A candidate's score is at most the positive's minus this share of its absolute value; 0.05 is
            "at most 95 % as similar".
        seed: Seed of the random draw; each query has its own generator, so other queries do not change its draw.
        sampling: ``top`` takes the best-ranked candidates, ``random`` draws them uniformly without replacement.
        positive_scores: Query id -> positive -> score, preferred to the run; needed with a margin where the run lacks
            a positive.

    Returns:
        Query id -> document ids, in the order of the ranking; queries in the order of ``positives``.

    Raises:
        InputError: A parameter is out of range, or a margin is asked for and a positive has no score.
    """
    start, end = rank_range
    if count < 1:
        raise InputError(f"must be at least 1, got {count}", field="count")
    if not 0 <= start < end:
        raise InputError(f"must be two numbers with 0 <= first < second, got {rank_range}", field="rank_range")
    if sampling not in ("top", "random"):
        raise InputError(f"must be 'top' or 'random', got {sampling!r}", field="sampling")
    mined: dict[str, list[str]] = {}
    for query_id, known in positives.items():
        scores, known = run.get(query_id, {}), frozenset(known)
        ceiling = float("inf") if max_score is None else max_score
        if scores and (absolute_margin is not None or relative_margin is not None):
            positive = _positive_score(query_id, known, scores, (positive_scores or {}).get(query_id, {}))
            if absolute_margin is not None:
                ceiling = min(ceiling, positive - absolute_margin)
            if relative_margin is not None:
                ceiling = min(ceiling, positive - relative_margin * abs(positive))
        floor = float("-inf") if min_score is None else min_score
        ranked = [doc_id for doc_id in rank_documents(scores) if doc_id not in known]
        candidates = [doc_id for doc_id in ranked[start:end] if floor <= scores[doc_id] <= ceiling]
        if sampling == "random" and len(candidates) > count:
            chosen = random.Random(f"{seed}/{query_id}").sample(range(len(candidates)), count)
            candidates = [candidates[index] for index in sorted(chosen)]
        mined[query_id] = candidates[:count]
    return mined
