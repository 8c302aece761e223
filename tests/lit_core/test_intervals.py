import math
import time

import numpy as np
import pytest

from lit_core.intervals import bootstrap_mean, paired_difference, seed_difference, seed_interval


def test_t_interval_of_one_two_three() -> None:  # s = 1, t(2, .975) = 4.302653, half width t / sqrt(3) = 2.484138
    mean, low, high = seed_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, -0.484138, 4.484138), abs=1e-6)


def test_seed_difference_pairs_the_seeds() -> None:  # differences are .1 in every seed although the seeds vary by 1
    assert seed_difference([1.1, 2.1, 3.1], [1.0, 2.0, 3.0]) == pytest.approx((0.1, 0.1, 0.1))


def test_one_seed_has_no_seed_interval() -> None:
    mean, low, high = seed_interval([0.5])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize("seed_spread", [0.0, 0.01, 0.05])
def test_coverage_is_near_95_percent(seed_spread: float) -> None:
    # true mean 0.5; items vary by .3 / sqrt(100) = .03 in the mean, seeds by seed_spread / sqrt(3)
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        seeds, items = rng.normal(0, seed_spread, (3, 1)), rng.normal(0, 0.3, (1, 100))
        table = 0.5 + seeds + items + rng.normal(0, 0.05, (3, 100))
        _, low, high = bootstrap_mean(table, n=400, seed=trial)
        hits += low <= 0.5 <= high
    assert 0.91 <= hits / 300 <= 0.99


def test_one_seed_bootstraps_the_items() -> None:  # 100 values of deviation 1: about 1.984 / sqrt(100) each way
    values = np.tile([-1.0, 1.0], 50)[None]
    mean, low, high = bootstrap_mean(values, n=4000)
    assert mean == 0.0
    assert high == pytest.approx(0.2, abs=0.02)
    assert low == pytest.approx(-0.2, abs=0.02)


def test_pairing_narrows_the_interval_of_correlated_arms() -> None:
    rng = np.random.default_rng(0)
    b = rng.random((3, 300))
    a = b + rng.normal(0.02, 0.02, (3, 300))
    paired, unpaired = paired_difference(a, b), bootstrap_mean(a)
    assert paired.mean == pytest.approx(a.mean() - b.mean())
    assert paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)
    assert paired.low > 0


def test_pairs_by_id_whatever_the_order() -> None:
    a = [{"q1": 1.0, "q2": 0.0}]
    b = [{"q2": 0.0, "q1": 1.0}]
    assert paired_difference(a, b) == (0.0, 0.0, 0.0)


def test_constants_have_width_zero_and_a_single_value_none() -> None:
    assert bootstrap_mean(np.full((3, 50), 0.7)) == pytest.approx((0.7, 0.7, 0.7))
    assert math.isnan(bootstrap_mean(np.array([[0.7]])).low)


def test_same_seed_same_interval_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(0).random((3, 40))
    assert bootstrap_mean(table, seed=3) == bootstrap_mean(table, seed=3)
    assert bootstrap_mean(table, seed=3) != bootstrap_mean(table, seed=4)
    whole = bootstrap_mean(table)
    monkeypatch.setattr("lit_core.intervals.MAX_DRAWS", 40 * 7)
    assert bootstrap_mean(table) == pytest.approx(whole, abs=0.02)


def test_two_thousand_replicates_are_quick() -> None:
    table = np.random.default_rng(0).random((3, 300))
    bootstrap_mean(table, n=10)  # imports
    start = time.process_time()
    bootstrap_mean(table, n=2000)
    assert time.process_time() - start < 0.2


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([{"q1": 1.0, "q7": 1.0}], [{"q1": 1.0}], "'q7'"),
        ([{"q1": 1.0}], [{"q1": 1.0, "q8": 1.0}], "'q8'"),
        ([{"q1": 1.0}, {"q9": 1.0}], [{"q1": 1.0}], "'q1'"),
        (np.ones((2, 3)), np.ones((3, 3)), r"\(2, 3\) and \(3, 3\)"),
        (np.array([[1.0, math.nan]]), np.ones((1, 2)), "finite"),
    ],
)
def test_what_cannot_be_paired_is_refused(a: object, b: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b)  # type: ignore[arg-type]
