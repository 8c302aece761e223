"""Where trees branch."""

from collections.abc import Sequence
from itertools import chain

import torch

from lit_core.generation import Response


def branch_places(tree: Sequence[Response]) -> list[tuple[int, int]]:
    """Response and position that each branch of a tree left from, the prompt left out."""
    return [(r.parent, r.position) for r in tree if r.parent is not None]


def entropy_percentiles(tree: Sequence[Response]) -> list[float]:
    """Share of the tree's positions that have less entropy than the one at which a branch begins, for each branch.

    Positions that a response has from its parent count once. Empty where entropies were not kept.
    """
    if not tree or "entropy" not in tree[0].scalars:
        return []
    own = torch.cat([response.scalars["entropy"][response.position :] for response in tree])
    return [
        float((own < tree[parent].scalars["entropy"][position]).float().mean())
        for parent, position in branch_places(tree)
    ]


def branch_statistics(trees: Sequence[Sequence[Response]]) -> dict[str, float]:
    """Logged quantities: share of responses that are branches, of tokens that were reused, and places of branches."""
    responses = list(chain.from_iterable(trees))
    places = [branch_places(tree) for tree in trees]
    branches = max(1, sum(map(len, places)))
    found = {
        "tree/branched": sum(map(len, places)) / len(responses),
        "tree/reused_tokens": sum(r.position for r in responses) / max(1, sum(len(r.tokens) for r in responses)),
        "tree/distinct_places": sum(len(set(tree)) for tree in places) / branches,
        "tree/branch_position": sum(position for tree in places for _, position in tree) / branches,
    }
    if "entropy" in responses[0].scalars:  # the same on all ranks
        percentiles = list(chain.from_iterable(map(entropy_percentiles, trees)))
        found["tree/entropy_percentile"] = sum(percentiles) / branches
    return found
