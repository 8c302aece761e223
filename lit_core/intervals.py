"""Confidence intervals for results over several seeds, with or without a value for every item (query, prompt)."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PerItem = Sequence[Mapping[str, float]] | Array  # one mapping of item id to value for each seed, or (seeds, items)

MAX_DRAWS = 4_000_000  # item draws held in memory at a time (8 bytes each)


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval; ``low`` and ``high`` are NaN where the data cannot give one."""

    mean: float
    low: float
    high: float


def _t_quantile(df: float) -> float:
    """The 97.5 % quantile of Student's t with ``df`` degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(df, 0.975))


def _table(values: PerItem) -> tuple[Array, list[str]]:
    """Values as ``(seeds, items)`` with the items' ids; ids are empty where arrays came without them."""
    if isinstance(values, np.ndarray):
        table, ids = np.atleast_2d(np.asarray(values, dtype=np.float64)), list[str]()
    else:
        if not values:
            raise ValueError("need the values of at least one seed, got none")
        ids = list(values[0])
        for index, other in enumerate(values[1:], start=1):
            _check_same_ids(ids, list(other), f"index 0 and index {index} of the seeds")
        table = np.array([[row[item] for item in ids] for row in values], dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"need values of shape (seeds, items), neither of them 0, got {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("values must be finite, got NaN or infinity")
    return table, ids


def _check_same_ids(first: list[str], second: list[str], where: str) -> None:
    for ids, others in ((first, set(second)), (second, set(first))):
        for item in ids:
            if item not in others:
                raise ValueError(f"item '{item}' has a value only on one side of {where}")


def bootstrap_mean(values: PerItem, n: int = 2000, seed: int = 0) -> Interval:
    """Mean over seeds and items with a two-level bootstrap interval.

    Each replicate draws seeds and items with replacement, the same items for all its seeds, so that the interval speaks
    about new seeds *and* new items. Plain percentile intervals are far too short for a handful of seeds; therefore
    deviations are enlarged by ``sqrt(n / (n - 1))`` on both levels, and the percentiles' distances from the mean by the
    ratio of Student's to the normal quantile, at Satterthwaite's degrees of freedom. With one seed only items are drawn
    and the interval says nothing about other seeds; with one item only seeds are drawn.

    Args:
        values: For each seed a mapping from item id to value, or an array ``(seeds, items)``.
        n: Bootstrap replicates.
        seed: Seed of the draws.

    Returns:
        Mean and 95 % interval; NaN bounds for a single value, bounds equal to the mean if nothing varies.

    Raises:
        ValueError: The seeds' ids differ (the first such id is named), or a value is not finite.
    """
    table, _ = _table(values)
    n_seeds, n_items = table.shape
    mean = float(table.mean())
    if table.size == 1:
        return Interval(mean, math.nan, math.nan)
    item_means, seed_means = table.mean(axis=0), table.mean(axis=1)
    seed_variance = float(seed_means.var(ddof=1)) / n_seeds if n_seeds > 1 else 0.0
    item_variance = float(item_means.var(ddof=1)) / n_items if n_items > 1 else 0.0
    variance = seed_variance + item_variance
    if variance <= (1e-12 * max(1.0, abs(mean))) ** 2:
        return Interval(mean, mean, mean)

    enlarged = mean + math.sqrt(n_items / max(n_items - 1, 1)) * (item_means - mean)
    table = enlarged + math.sqrt(n_seeds / max(n_seeds - 1, 1)) * (table - item_means)
    rng = np.random.default_rng(seed)
    replicates = np.empty(n)
    chunk = max(1, MAX_DRAWS // n_items)
    for start in range(0, n, chunk):
        size = min(chunk, n - start)
        draws = rng.integers(n_items, size=(size, n_items)) + n_items * np.arange(size)[:, None]
        counts = np.bincount(draws.ravel(), minlength=size * n_items).reshape(size, n_items)
        by_seed = counts @ table.T / n_items  # (replicates, seeds)
        chosen = rng.integers(n_seeds, size=(size, n_seeds))
        replicates[start : start + size] = np.take_along_axis(by_seed, chosen, axis=1).mean(axis=1)
    low, high = np.quantile(replicates, [0.025, 0.975])

    denominator = seed_variance**2 / max(n_seeds - 1, 1) + item_variance**2 / max(n_items - 1, 1)
    stretch = _t_quantile(variance**2 / denominator) / 1.959964
    return Interval(mean, mean - stretch * (mean - float(low)), mean + stretch * (float(high) - mean))


def paired_difference(a: PerItem, b: PerItem, n: int = 2000, seed: int = 0) -> Interval:
    """Bootstrap interval of ``mean(a) - mean(b)``, pairing values of the same seed and item.

    Args:
        a: For each seed a mapping from item id to value, or an array ``(seeds, items)``.
        b: The same for the baseline: as many seeds, in the same order, with the same ids.
        n: Bootstrap replicates.
        seed: Seed of the draws.

    Raises:
        ValueError: The ids (the first that differs is named) or the shapes differ, or a value is not finite.
    """
    (left, left_ids), (right, right_ids) = _table(a), _table(b)
    if left_ids and right_ids:
        _check_same_ids(left_ids, right_ids, "the comparison")
        position = {item: column for column, item in enumerate(right_ids)}
        right = right[:, [position[item] for item in left_ids]]
    if left.shape != right.shape:
        raise ValueError(f"need as many seeds and items on both sides, got {left.shape} and {right.shape}")
    return bootstrap_mean(left - right, n, seed)


def seed_interval(values: Sequence[float]) -> Interval:
    """Mean with Student's t interval across seeds, for a metric that has one value for each seed.

    One seed gives NaN bounds: it says nothing about other seeds.
    """
    if len(values) == 0:
        raise ValueError("need the value of at least one seed, got none")
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"values must be finite, got {list(values)}")
    mean = float(array.mean())
    if len(array) == 1:
        return Interval(mean, math.nan, math.nan)
    half = _t_quantile(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return Interval(mean, mean - half, mean + half)


def seed_difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Student's t interval of ``a - b`` across seeds, pairing values of the same seed; NaN bounds for one seed."""
    if len(a) != len(b):
        raise ValueError(f"need as many seeds on both sides, got {len(a)} and {len(b)}")
    return seed_interval([x - y for x, y in zip(a, b, strict=True)])
