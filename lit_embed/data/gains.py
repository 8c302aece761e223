"""Which training sets help one another, and clusters of them (BOOM, card section 2.5)."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lit_core.errors import InputError

Floats = NDArray[np.float64]


def pair_gain(alone: Sequence[float], joint: Sequence[float]) -> float:
    """Mean relative loss that two sets save when they are trained on together.

    Args:
        alone: Held-out loss of each set, trained on by itself.
        joint: The same after training on both, with as many steps for each.

    Raises:
        InputError: A loss is not positive and finite.
    """
    for loss in (*alone, *joint):
        if not 0 < loss < np.inf:
            raise InputError(f"losses must be positive and finite to be compared, got {loss}")
    return sum((a - j) / a for a, j in zip(alone, joint, strict=True)) / len(alone)


def gain_matrix(alone: Mapping[str, float], joint: Mapping[tuple[str, str], tuple[float, float]]) -> Floats:
    """Gains of all pairs ``(N, N)`` in the order of ``alone``; NaN on the diagonal.

    Args:
        alone: Held-out loss of each set, trained on by itself.
        joint: For each pair, named in that order, both losses after training on the two.

    Raises:
        InputError: A pair is missing, or a loss is not positive and finite.
    """
    names = list(alone)
    gains = np.full((len(names), len(names)), np.nan)
    for row, first in enumerate(names):
        for column in range(row + 1, len(names)):
            second = names[column]
            if (first, second) not in joint:
                raise InputError(f"the pair '{first}' and '{second}' was not trained")
            gain = pair_gain((alone[first], alone[second]), joint[first, second])
            gains[row, column] = gains[column, row] = gain
    return gains


def clusters(names: Sequence[str], gains: Floats, count: int) -> list[list[str]]:
    """Cut a tree of average linkage over ``largest gain - gain`` into clusters, each in the order of ``names``.

    Args:
        names: Of the sets.
        gains: ``(N, N)``, symmetric; the diagonal is not read.
        count: Clusters wanted, from 1 to N.

    Raises:
        InputError: So many clusters are not possible.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if not 1 <= count <= len(names):
        raise InputError(f"must be between 1 and the {len(names)} sets, got {count}", field="clusters")
    if len(names) == 1:
        return [list(names)]
    above = ~np.eye(len(names), dtype=bool)
    distances = np.where(above, np.max(gains[above]) - gains, 0.0)
    labels = fcluster(linkage(squareform(distances), "average"), count, "maxclust")
    found: dict[int, list[str]] = {}
    for name, label in zip(names, labels.tolist(), strict=True):
        found.setdefault(label, []).append(name)
    return list(found.values())
