"""Fusing runs by a weighted sum of normalised scores."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from lit_core.errors import InputError
from lit_embed.retrieval.ranking import Run, rank_documents


def _min_max(scores: Mapping[str, float]) -> dict[str, float]:
    low, high = min(scores.values()), max(scores.values())
    return {doc_id: (score - low) / max(high - low, 1e-9) for doc_id, score in scores.items()}


def _reciprocal_rank(scores: Mapping[str, float]) -> dict[str, float]:
    return {doc_id: 1.0 / (60 + rank) for rank, doc_id in enumerate(rank_documents(scores), start=1)}


NORMALISATIONS: dict[str, Callable[[Mapping[str, float]], dict[str, float]]] = {
    "min-max": _min_max,
    "reciprocal-rank": _reciprocal_rank,
    "none": dict,
}


def fuse(
    runs: Sequence[Mapping[str, Mapping[str, float]]],
    weights: Sequence[float] | None = None,
    normalisation: Literal["min-max", "reciprocal-rank", "none"] = "min-max",
) -> Run:
    """Add up the runs' scores per query, weighted, after normalising each run's scores within the query.

    A document that a run lacks gets nothing from it. Under ``min-max`` a run's last document also gets 0, as do all of
    its documents where their scores are equal (ranx does the same). ``reciprocal-rank`` is ``1 / (60 + rank)``.

    Args:
        runs: At least one run; a query counts if any run has it.
        weights: One per run; equal ones that sum to 1 by default.
        normalisation: How scores of different rankers are made comparable.

    Raises:
        InputError: No run, a number of weights other than that of runs, or an unknown normalisation.
    """
    if not runs:
        raise InputError("give at least one run to fuse", field="runs")
    if weights is None:
        weights = [1.0 / len(runs)] * len(runs)
    if len(weights) != len(runs):
        raise InputError(f"need one weight per run ({len(runs)}), got {len(weights)}", field="weights")
    if normalisation not in NORMALISATIONS:
        raise InputError(f"must be one of {', '.join(NORMALISATIONS)}, got {normalisation!r}", field="normalisation")
    fused: Run = {}
    for run, weight in zip(runs, weights, strict=True):
        for query_id, scores in run.items():
            total = fused.setdefault(query_id, {})
            for doc_id, score in (NORMALISATIONS[normalisation](scores) if scores else {}).items():
                total[doc_id] = total.get(doc_id, 0.0) + weight * score
    return fused
