"""The scores of :mod:`lit_rl.functional.branching` on a CPU, row by row in one compiled loop.

A row of logits stays in the processor's first cache while it is worked on. The most probable tokens are found without
sorting: the largest values lie in the blocks with the largest maxima, so halving an interval of those maxima soon gives
a bound that few tokens reach.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Places = NDArray[np.int64]

HALVINGS = 30
SPARE = 2  # blocks more than are needed, with which the halving ends
MANY = 8  # candidates for a place, from which on they are sorted
LOWEST = np.float32(-87)  # stands for minus infinity; below, exp leaves the normal numbers of float32
FAST = {"reassoc", "contract", "nsz", "arcp"}  # sums in any order, but infinities and NaN as they are


@njit(fastmath=FAST, inline="always")
def _exp(x: np.float32) -> np.float32:
    """``exp`` of LOWEST to 0 to a float32's rounding, 0 at LOWEST, such that loops of it are vectorised (Cephes)."""
    power = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    rest = x - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(0.5)
    series = series * rest * rest + rest + np.float32(1)
    exponent = np.int32((np.int32(power) + np.int32(127)) << np.int32(23))
    return np.float32(0) if x <= LOWEST else series * exponent.view(np.float32)


@njit
def _bound(heads: Floats, blocks: int, wanted: int) -> np.float32:
    """A value that at least ``wanted`` of the blocks' maxima reach, and few more where they differ."""
    low, high = heads[0], heads[0]
    for block in range(blocks):
        low, high = min(low, heads[block]), max(high, heads[block])
    for _ in range(HALVINGS):
        middle = np.float32(0.5) * (low + high)
        count = 0
        for block in range(blocks):
            count += heads[block] >= middle
        if count < wanted:
            high = middle
        else:
            low = middle
            if count <= wanted + SPARE:
                break
    return low


@njit
def _gather(row: Floats, heads: Floats, places: Places, size: int, wanted: int, values: Floats, columns: Places) -> int:
    """Put every value that may be among the largest, and its column, first; returns how many there are.

    Whatever it meets is written, and kept by counting it: no branch is guessed wrong.
    """
    vocabulary, blocks, count = len(row), len(row) // size, 0
    bound = -np.float32(np.inf)
    if blocks >= 2 * wanted:  # else too few would be left out
        heads[:blocks] = row[:blocks]  # a block is every ``blocks``-th token, so that maxima are taken side by side
        for step in range(1, size):
            for block in range(blocks):
                value = row[step * blocks + block]
                heads[block] = value if value > heads[block] else heads[block]
        bound = _bound(heads, blocks, wanted)
        chosen = 0
        for block in range(blocks):
            places[chosen] = block
            chosen += heads[block] >= bound
        for place in range(chosen):
            column = places[place]
            for _ in range(size):
                value = row[column]
                values[count], columns[count] = value, column
                count += value >= bound
                column += blocks
    for column in range(size * blocks if blocks >= 2 * wanted else 0, vocabulary):
        value = row[column]
        values[count], columns[count] = value, column
        count += value >= bound
    return count


@njit
def _select(values: Floats, columns: Places, best_values: Floats, best: Places) -> None:
    """Find the largest values and their columns, of equal ones the first, in the order they have."""
    wanted, kept = len(best), 0
    if len(values) > MANY * wanted:  # as where most are equal
        order = np.argsort(-values, kind="mergesort")[:wanted]
        best_values[:], best[:] = values[order], columns[order]
        return
    for place in range(len(values)):
        value, above = values[place], 0
        for other in range(len(values)):
            above += (values[other] > value) | ((values[other] == value) & (other < place))
        if above < wanted and kept < wanted:  # NaN is above nothing
            best_values[kept], best[kept] = value, columns[place]
            kept += 1


@njit(fastmath=FAST)
def _sums(row: Floats, largest: np.float32) -> tuple[np.float32, np.float32]:
    """Sums of ``exp(x)`` and of ``x exp(x)`` over a row less its largest value."""
    total, product = np.float32(0), np.float32(0)
    for column in range(len(row)):
        shifted = row[column] - largest
        shifted = LOWEST if shifted < LOWEST else shifted
        power = _exp(shifted)
        total += power
        product += power * shifted
    return total, product


@njit(fastmath=FAST, inline="always")
def _add(vector: Floats, weight: np.float32, row: Floats) -> None:
    for place in range(len(vector)):
        vector[place] += weight * row[place]


@njit(fastmath=FAST, inline="always")
def _square(vector: Floats) -> np.float32:
    total = np.float32(0)
    for place in range(len(vector)):
        total += vector[place] * vector[place]
    return total


@njit(fastmath=FAST, nogil=True, cache=True)
def score_rows(
    logits: Floats, embeddings: Floats, scales: Floats, top_k: int, full: bool, drawn: Places, found: Floats
) -> None:
    """Entropy, and the moments that divergences are made of, of each row.

    Args:
        logits: ``(N, V)``.
        embeddings: ``(V, D)`` or more rows.
        scales: What brings each embedding to length 1, ``(V)``; empty where all have it.
        top_k: How many tokens are compared.
        full: Sum the entropy over the vocabulary instead of the top tokens and the one drawn.
        drawn: Token drawn at each position, ``(N)``; empty where none is given.
        found: Filled in, ``(4, N)``: the entropy in nats, and of the top tokens the sum of ``p``, that of ``p**2``, and
            the squared length of the sum of ``p`` times the unit embedding.
    """
    vocabulary = logits.shape[1]
    size = max(1, int(math.sqrt(vocabulary / top_k)))  # maxima and the tokens of chosen blocks cost about as much
    heads = np.empty(max(1, vocabulary // size), np.float32)
    places = np.empty(len(heads), np.int64)
    values, columns = np.empty(vocabulary, np.float32), np.empty(vocabulary, np.int64)
    best_values, best = np.empty(top_k, np.float32), np.zeros(top_k, np.int64)
    mixture = np.empty(embeddings.shape[1], np.float32)
    for number in range(len(logits)):
        row = logits[number]
        count = _gather(row, heads, places, size, top_k, values, columns)
        _select(values[:count], columns[:count], best_values, best)
        largest = best_values.max()
        total, product = _sums(row, largest)
        log_total = np.float32(math.log(total))
        entropy, first, second = np.float32(0), np.float32(0), np.float32(0)
        outside = len(drawn) > 0
        mixture[:] = 0
        for place in range(top_k):
            column, shifted = best[place], max(best_values[place] - largest, LOWEST)
            p = _exp(shifted) / total
            first += p
            second += p * p
            entropy -= p * (shifted - log_total)
            outside = outside and column != drawn[number]
            _add(mixture, p * scales[column] if len(scales) else p, embeddings[column])
        if full:
            entropy = log_total - product / total
        elif outside:
            shifted = max(row[drawn[number]] - largest, LOWEST)
            entropy -= _exp(shifted) / total * (shifted - log_total)
        found[0, number], found[1, number], found[2, number] = entropy, first, second
        found[3, number] = _square(mixture)
