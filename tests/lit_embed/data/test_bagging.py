import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_core.errors import InputError
from lit_embed.data.bagging import (
    Bag,
    check_manifest,
    core_rows,
    expected_overlap,
    incremental_cost,
    late_rows,
    manifest,
    random_bits,
    rows_hash,
    sample_size,
    size_weights,
    training_cost,
    union_coverage,
    write_manifest,
)


def test_worked_numbers_of_the_card() -> None:
    assert size_weights([20, 40, 60, 80, 100]) == pytest.approx([n / 15 for n in range(1, 6)], abs=1e-15)
    for ratios, cost in (
        ((20, 40, 60, 80, 100), 3.0), ((40, 60, 80, 100), 2.8), ((60, 60, 60), 1.8), ((80, 100), 1.8), ((50, 50), 1.0),
    ):  # fmt: skip
        assert training_cost(ratios) == pytest.approx(cost, abs=1e-12)
    assert union_coverage([60, 60, 60]) == pytest.approx(0.936, abs=1e-12)
    assert expected_overlap(60, 60) == pytest.approx(0.4286, abs=5e-5)
    assert incremental_cost(2.0e6, 0.2e6) == pytest.approx(0.455, abs=5e-4)
    assert incremental_cost(2.0e6, 0.2e6) == pytest.approx(1.0 / 2.2, abs=1e-12)


@pytest.mark.parametrize(
    ("size", "ratio", "count"),
    [(5, 50, 3), (5, 10, 1), (5, 29, 1), (5, 30, 2), (100, 0.29, 1), (50, 29, 15), (350, 0.29, 1), (1, 1, 1),
     (7, 100, 7), (1000, 0.05, 1), (1000, 0.25, 3), (200, 57.25, 115), (10_000_000, 20, 2_000_000)],
)  # fmt: skip
def test_rows_are_rounded_half_up_and_at_least_one(size: int, ratio: float, count: int) -> None:
    assert sample_size(size, ratio) == count
    if size < 10_000:
        assert len(Bag(ratio).rows("a", size)) == count


def test_halves_are_rounded_as_written_not_as_stored() -> None:
    for size in range(1, 400):
        for tenths in (5, 145, 285, 290, 575, 1000):  # percent * 10
            assert sample_size(size, tenths / 10) == max(1, (tenths * size * 2 + 1000) // 2000)


def test_a_bag_is_a_subset_without_repetition_of_each_dataset() -> None:
    rows = Bag(60, member=3).rows("a", 101)
    assert len(rows) == 61
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert 0 <= rows.min() <= rows.max() < 101
    assert Bag(100, member=7).rows("a", 50).tolist() == list(range(50))


def test_draws_depend_on_seed_name_and_member_alone() -> None:
    base = Bag(40, 1, 5).rows("a", 200).tolist()
    assert Bag(40, 1, 5).rows("a", 200).tolist() == base
    others = [Bag(40, 2, 5).rows("a", 200), Bag(40, 1, 6).rows("a", 200), Bag(40, 1, 5).rows("b", 200)]
    assert all(other.tolist() != base for other in others)
    assert random_bits(3, 0, "a", "bag", 0).tolist() == random_bits(1000, 0, "a", "bag", 0)[:3].tolist()


def test_draws_are_those_of_a_plain_generator() -> None:
    """Philox 4x64-10 over the hash of the names: members must not change with a release of numpy."""
    from hashlib import blake2b

    mask = (1 << 64) - 1
    key = int.from_bytes(blake2b(b"5\0a\0bag\x001", digest_size=16).digest(), "little")

    def block(counter: int) -> list[int]:
        x, k = [counter, 0, 0, 0], [key & mask, key >> 64]
        for _ in range(10):
            left, right = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(right >> 64) ^ x[1] ^ k[0], right & mask, (left >> 64) ^ x[3] ^ k[1], left & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        return x

    bits = [value for counter in range(1, 6) for value in block(counter)]
    assert random_bits(20, 5, "a", "bag", 1).tolist() == bits
    assert Bag(40, 1, 5).rows("a", 20).tolist() == sorted(sorted(range(20), key=bits.__getitem__)[:8])


def test_nested_bags_are_prefixes() -> None:
    drawn = [set(Bag(ratio, member, nested=True).rows("a", 97).tolist())
             for member, ratio in enumerate((20, 40, 60, 80, 100))]  # fmt: skip
    assert all(small < large for small, large in itertools.pairwise(drawn))
    free = [set(Bag(ratio, member).rows("a", 97).tolist()) for member, ratio in enumerate((20, 40))]
    assert not free[0] <= free[1]


def test_a_half_and_the_rest() -> None:
    half, rest = Bag(50).rows("a", 101), Bag(50, complement=True).rows("a", 101)
    assert (len(half), len(rest)) == (51, 50)
    assert sorted([*half.tolist(), *rest.tolist()]) == list(range(101))


def test_coverage_and_overlap_of_independent_members_by_monte_carlo() -> None:
    size, trials = 400, 100
    covered, overlap = [], []
    for seed in range(trials):
        drawn = [set(Bag(60, member, seed).rows("a", size).tolist()) for member in range(3)]
        covered.append(len(set.union(*drawn)) / size)
        overlap.append(len(drawn[0] & drawn[1]) / len(drawn[0] | drawn[1]))
    assert np.mean(covered) == pytest.approx(union_coverage([60, 60, 60]), abs=4 * np.std(covered) / math.sqrt(trials))
    assert np.mean(overlap) == pytest.approx(expected_overlap(60, 60), abs=4 * np.std(overlap) / math.sqrt(trials))
    assert 4 * np.std(overlap) / math.sqrt(trials) < 0.01  # so that the test can fail


def test_every_row_is_drawn_equally_often() -> None:
    trials = 1500
    counts = sum(np.bincount(Bag(30, 0, seed).rows("a", 10), minlength=10) for seed in range(trials))
    assert np.abs(np.asarray(counts) / trials - 0.3).max() < 4.5 * math.sqrt(0.3 * 0.7 / trials)


def test_true_bagging_repeats_rows() -> None:
    size, trials = 1000, 100
    distinct = []
    for seed in range(trials):
        rows = Bag(100, seed=seed, replace=True).rows("a", size)
        assert len(rows) == size
        distinct.append(len(set(rows.tolist())) / size)
    expected = 1 - (1 - 1 / size) ** size
    assert np.mean(distinct) == pytest.approx(expected, abs=4 * np.std(distinct) / math.sqrt(trials))
    drawn, out_of_bag = (Bag(80, replace=True, complement=rest).rows("a", 100) for rest in (False, True))
    assert set(drawn.tolist()) | set(out_of_bag.tolist()) == set(range(100))
    assert not set(drawn.tolist()) & set(out_of_bag.tolist())


def test_the_core_stays_and_grows_by_a_share_of_each_update() -> None:
    old, first, second = range(100), range(100, 150), range(150, 165)
    core = core_rows("a", [old])
    assert len(core) == 40
    after_one, after_two = core_rows("a", [old, first]), core_rows("a", [old, first, second])
    assert set(core) < set(after_one) < set(after_two)
    assert (len(after_one), len(after_two)) == (60, 66)
    assert set(after_one) - set(core) <= set(first)
    assert set(after_two) - set(after_one) <= set(second)
    assert len(core_rows("a", [[], first])) == 20  # a dataset that came with the first update
    assert core_rows("a", [[], []]).tolist() == []
    assert core_rows("a", [old], seed=1).tolist() != core.tolist()


def test_late_rows_are_a_share_and_never_all() -> None:
    late = late_rows("a", 50, 0.2)
    assert len(late) == 10
    assert late.tolist() == late_rows("a", 50, 0.2).tolist() != late_rows("b", 50, 0.2).tolist()
    assert len(late_rows("a", 2, 0.9)) == 1
    with pytest.raises(InputError, match=r"field 'new': must lie between 0 and 1, got 1\.0"):
        late_rows("a", 50, 1.0)


def test_a_manifest_is_kept_and_checked(tmp_path: Path) -> None:
    def described(with_ids: bool = False, content: str = "x", **fields: Any) -> dict[str, Any]:
        settings = {"ratio": 40.0, "member": 0, "seed": 0, **fields}
        rows = {"a": Bag(**settings).rows("a", 50)}
        return manifest(settings, rows, {"a": 50}, {"a": content}, with_ids)

    path = tmp_path / "bag.json"
    write_manifest(path, described())
    before = path.read_text()
    write_manifest(path, described())
    assert path.read_text() == before
    record = json.loads(before)["datasets"]["a"]
    assert record == {"rows": 50, "drawn": 20, "ids": rows_hash(Bag(40).rows("a", 50)), "content": "x"}
    for changed, words in (
        (described(member=1), "bag/member was 0, is 1"),
        (described(content="y"), "datasets/a/content was x, is y"),
    ):
        with pytest.raises(InputError, match=words) as error:
            write_manifest(path, changed)
        assert str(path) in str(error.value)
    whole = described(with_ids=True)
    assert whole["ids"]["a"] == Bag(40).rows("a", 50).tolist()
    check_manifest(whole, described())
    assert rows_hash(np.array([1, 2])) != rows_hash(np.array([2, 1]))


@pytest.mark.parametrize("ratio", [0, -1, 100.5, math.nan, math.inf])
def test_ratios_are_percentages(ratio: float) -> None:
    for call in (lambda: Bag(ratio), lambda: size_weights([ratio]), lambda: training_cost([50, ratio])):
        with pytest.raises(InputError, match="field 'ratio': must be a percentage above 0, at most 100"):
            call()


def test_bag_mistakes() -> None:
    with pytest.raises(InputError, match="the dataset 'a' has no rows to draw from"):
        Bag(50).rows("a", 0)
    with pytest.raises(InputError, match="field 'member': must be at least 0, got -1"):
        Bag(member=-1)
    with pytest.raises(InputError, match="field 'nested'"):
        Bag(50, nested=True, replace=True)
    with pytest.raises(InputError, match="a bag of 100 % of the 9 rows of 'a' leaves none for its complement"):
        Bag(complement=True).rows("a", 9)
    with pytest.raises(InputError, match="not both 0"):
        incremental_cost(0, 0)
