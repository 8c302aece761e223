"""Retrieval metrics inside a validation loop."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_core.errors import InputError
from lit_embed.functional import metrics as functional

SHAPE = re.compile(r"(ndcg|mrr|recall|precision|hit_rate|map)(?:@([1-9]\d*))?")
FRACTION = 2**30  # sums are kept as integers, so that the result does not depend on how queries fall to processes


def metric_values(name: str, gains: Tensor, all_gains: Tensor) -> Tensor:
    """Compute one metric by its ranx name, ``(Q,)`` float32; arguments as in ``lit_embed.functional.metrics``.

    Raises:
        InputError: The name is unknown, or ``precision`` comes without a cut-off.
    """
    match = SHAPE.fullmatch(name)
    if match is None or (match[1] == "precision" and match[2] is None):
        raise InputError(f"unknown metric {name!r}; write ndcg, mrr, recall, map, hit_rate or precision, as in ndcg@10")
    cutoff = int(match[2]) if match[2] else None
    match match[1]:
        case "ndcg":
            return functional.ndcg(gains, all_gains, cutoff)
        case "mrr":
            return functional.reciprocal_rank(gains, cutoff)
        case "recall":
            return functional.recall(gains, all_gains, cutoff)
        case "map":
            return functional.average_precision(gains, all_gains, cutoff)
        case "hit_rate":
            return functional.hit_rate(gains, cutoff)
        case _:
            return functional.precision(gains, cutoff or 1)


class RetrievalMetrics(Metric):
    """Mean retrieval metrics over all queries seen, on all processes; equal to ``retrieval.evaluate`` to 1e-6.

    Every query counts once, so each process should see its own queries and none twice.

    Args:
        metrics: Names as ranx writes them: ``ndcg``, ``mrr``, ``recall``, ``map``, ``hit_rate`` or ``precision``, with
            ``@`` and a cut-off.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: Tensor
    queries: Tensor

    def __init__(self, metrics: Sequence[str] = ("ndcg@10", "mrr@10", "recall@100")) -> None:
        super().__init__()
        self.metrics = tuple(metrics)
        for name in self.metrics:
            metric_values(name, torch.zeros(1, 1), torch.zeros(1, 1))
        self.add_state("sums", torch.zeros(len(self.metrics), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("queries", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, gains: Tensor, all_gains: Tensor) -> None:
        """Add queries.

        Args:
            gains: Relevance of each query's ranked documents, best first, ``(Q, K)``, 0 where unjudged; ``K`` reaches
                the deepest cut-off or the end of the corpus (``functional.metrics.ranked_gains`` looks them up).
            all_gains: Relevance of every judged document of the query, ``(Q, R)``, in any order, padded with 0.

        Raises:
            ValueError: The two do not have one row per query each.
        """
        if gains.ndim != 2 or all_gains.ndim != 2 or len(gains) != len(all_gains):
            raise ValueError(f"need (Q, K) and (Q, R), got {tuple(gains.shape)} and {tuple(all_gains.shape)}")
        values = torch.stack([metric_values(name, gains, all_gains) for name in self.metrics])  # (M, Q)
        self.sums += (values * FRACTION).round().long().sum(1)
        self.queries += len(gains)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each metric, float32 ``()``; 0 before the first query."""
        means = self.sums / FRACTION / self.queries.clamp(min=1)
        return dict(zip(self.metrics, means.unbind(), strict=True))
