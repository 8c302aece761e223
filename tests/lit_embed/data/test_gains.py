import numpy as np
import pytest

from lit_core.errors import InputError
from lit_embed.data.gains import clusters, gain_matrix, pair_gain

ALONE = {"A": 0.50, "B": 0.40, "C": 0.60}
JOINT = {("A", "B"): (0.45, 0.38), ("A", "C"): (0.58, 0.66), ("B", "C"): (0.41, 0.61)}


def test_gains_of_the_card() -> None:
    gains = gain_matrix(ALONE, JOINT)
    assert gains[0, 1] == pytest.approx(0.075)
    assert gains[0, 2] == pytest.approx(-0.130)
    assert gains[1, 2] == pytest.approx(-0.0208, abs=1e-4)
    assert np.array_equal(gains, gains.T, equal_nan=True)
    assert np.isnan(gains.diagonal()).all()


def test_the_pair_that_gains_most_is_merged_first() -> None:
    gains = gain_matrix(ALONE, JOINT)
    assert clusters(list(ALONE), gains, 2) == [["A", "B"], ["C"]]
    assert clusters(list(ALONE), gains, 1) == [["A", "B", "C"]]
    assert clusters(list(ALONE), gains, 3) == [["A"], ["B"], ["C"]]


def test_average_linkage_against_a_loop() -> None:
    """Join the two clusters with the smallest mean distance of their members until as many are left as wanted."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        size, wanted = int(rng.integers(4, 9)), int(rng.integers(1, 5))
        gains = rng.normal(size=(size, size))
        gains = (gains + gains.T) / 2
        names = [f"s{number}" for number in range(size)]
        groups = [[number] for number in range(size)]
        while len(groups) > wanted:
            pairs = [(i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))]
            i, j = max(pairs, key=lambda pair: np.mean([gains[a, b] for a in groups[pair[0]] for b in groups[pair[1]]]))
            groups = [*(g for k, g in enumerate(groups) if k not in (i, j)), sorted(groups[i] + groups[j])]
        expected = sorted([names[number] for number in group] for group in groups)
        assert sorted(clusters(names, gains, wanted)) == expected


def test_mistakes_are_told() -> None:
    with pytest.raises(InputError, match="'A' and 'C' was not trained"):
        gain_matrix(ALONE, {("A", "B"): (0.45, 0.38)})
    with pytest.raises(InputError, match="positive"):
        pair_gain((0.0, 1.0), (1.0, 1.0))
    with pytest.raises(InputError, match="between 1 and the 3 sets"):
        clusters(list(ALONE), gain_matrix(ALONE, JOINT), 4)
