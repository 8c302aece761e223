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


def branch_statistics(trees: Sequence[Sequence[Response]]) -> dict[str, tuple[float, float]]:
    """Logged quantities, each as a sum and the number that it is divided by, over all ranks.

    Share of responses that are branches, of tokens that were reused, of branches at places of their own; the mean
    position of branches, and, where entropies were kept, the mean of :func:`entropy_percentiles`.
    """
    responses = list(chain.from_iterable(trees))
    places = [branch_places(tree) for tree in trees]
    branches = float(sum(map(len, places)))
    reused, tokens = sum(r.position for r in responses), sum(len(r.tokens) for r in responses)
    found = {
        "tree/branched": (branches, float(len(responses))),
        "tree/reused_tokens": (float(reused), float(tokens)),
        "tree/distinct_places": (float(sum(len(set(tree)) for tree in places)), branches),
        "tree/branch_position": (float(sum(position for tree in places for _, position in tree)), branches),
    }
    if "entropy" in responses[0].scalars:  # the same on all ranks
        found["tree/entropy_percentile"] = (sum(chain.from_iterable(map(entropy_percentiles, trees))), branches)
    return found
