import itertools
import math
import random
from collections import Counter

import pytest

from lit_core.errors import InputError
from lit_core.samplers import mix_seed
from lit_embed.data.distinct import DistinctBatchSampler

Batch = list[tuple[int, int, int]]


def most_alike(labels: list[list[int]], batch: Batch) -> dict[int, int]:
    return Counter(labels[dataset][row] for dataset, row, _ in batch)


def test_equal_labels_are_kept_apart() -> None:
    labels = [[0] * 10 + list(range(1, 31)), [0] * 5 + [40] * 10 + list(range(41, 66))]  # 15 of the 80 rows are 0
    sampler = DistinctBatchSampler(labels, 4)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 20
    assert all(len(batch) == 4 for batch in batches)
    assert sorted((d, r) for batch in batches for d, r, _ in batch) == [(d, r) for d in (0, 1) for r in range(40)]
    assert all(max(most_alike(labels, batch).values()) == 1 for batch in batches)
    assert all(seed == mix_seed(0, 0, d, r) for batch in batches for d, r, seed in batch)


@pytest.mark.parametrize("mixed", [True, False])
def test_random_labels_meet_as_seldom_as_they_can(mixed: bool) -> None:
    rng = random.Random(0)
    for trial in range(60):
        world = rng.choice([1, 2, 3])
        size = rng.randint(1, 6)
        labels = [
            [rng.randint(0, rng.choice([2, 9, 99])) for _ in range(rng.randint(3, 70))]
            for _ in range(rng.randint(1, 3))
        ]
        ranks = [list(DistinctBatchSampler(labels, size, trial, rank, world, mixed)) for rank in range(world)]
        assert len({tuple(map(len, batches)) for batches in ranks}) == 1  # as large on every rank
        batches = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
        rows = [(d, r) for batch in batches for d, r, _ in batch]
        assert len(set(rows)) == len(rows)
        for dataset in [None] if mixed else range(len(labels)):
            pool = [batch for batch in batches if dataset in (None, batch[0][0])]
            assert all(len({d for d, _, _ in batch}) == 1 for batch in pool) or mixed
            count = Counter(labels[d][r] for batch in pool for d, r, _ in batch)
            for batch in pool:
                for label, times in most_alike(labels, batch).items():
                    assert times <= math.ceil(count[label] / len(pool))
            have = sum(map(len, labels)) if dataset is None else len(labels[dataset])
            assert {len(batch) for batch in pool} == {min(have // world, size) * world}
            assert len(pool) == max(1, have // (size * world))


def test_epochs_differ_and_leave_out_other_rows() -> None:
    labels = [[row % 7 for row in range(23)]]
    epochs = []
    sampler = DistinctBatchSampler(labels, 5, seed=1)
    for epoch in range(8):
        sampler.set_epoch(epoch)
        epochs.append([[(d, r) for d, r, _ in batch] for batch in sampler])
    assert len({str(batches) for batches in epochs}) == 8
    assert set(itertools.chain(*itertools.chain(*epochs))) == {(0, row) for row in range(23)}
    assert list(DistinctBatchSampler(labels, 5, seed=1)) == list(DistinctBatchSampler(labels, 5, seed=1))
    assert list(DistinctBatchSampler(labels, 5, seed=1)) != list(DistinctBatchSampler(labels, 5, seed=2))


def test_ranks_and_order_say_nothing_of_the_label() -> None:
    """A frequent label is on every rank as often; otherwise ranks would have batches of different lengths."""
    labels = [[0] * 400 + list(range(1, 401))]
    ranks = [list(DistinctBatchSampler(labels, 4, rank=rank, world_size=2)) for rank in (0, 1)]
    frequent = [sum(labels[0][row] == 0 for batch in batches for _, row, _ in batch) for batches in ranks]
    assert sum(frequent) == 400
    assert abs(frequent[0] - 200) < 40


def test_going_on_in_mid_epoch() -> None:
    labels = [list(range(40)), list(range(20))]
    for mixed in (True, False):
        sampler = DistinctBatchSampler(labels, 4, mixed=mixed)
        sampler.set_epoch(3)
        everything = list(sampler)
        sampler.step = 6
        state = sampler.state_dict()
        resumed = DistinctBatchSampler(labels, 4, mixed=mixed)
        resumed.load_state_dict(state)
        assert list(resumed) == everything[6:]
        changed = [list(range(40)), [0, *range(1, 19), 0]]
        with pytest.raises(InputError, match="labels was"):
            DistinctBatchSampler(changed, 4, mixed=mixed).load_state_dict(state)
        with pytest.raises(InputError, match="world_size was 1, is 2"):
            DistinctBatchSampler(labels, 4, rank=0, world_size=2, mixed=mixed).load_state_dict(state)


def test_mistakes() -> None:
    with pytest.raises(InputError, match="field 'batch_size': must be at least 1, got 0"):
        DistinctBatchSampler([[1]], 0)
    with pytest.raises(InputError, match="dataset 1 has 1 rows, too few for 2 devices"):
        DistinctBatchSampler([[1, 2], [1]], 4, 0, 0, 2, mixed=False)
    with pytest.raises(InputError, match="all datasets have 0 rows"):
        DistinctBatchSampler([[]], 4)
    with pytest.raises(ValueError, match="rank must lie"):
        DistinctBatchSampler([[1]], 4, 0, 1, 1)
