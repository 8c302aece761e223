import pytest

from lit_core.errors import InputError
from lit_core.samplers import HomogeneousBatchSampler, LengthSortedBatchSampler, mix_seed

Batches = list[list[tuple[int, int, int]]]


def epoch(sampler: HomogeneousBatchSampler, number: int) -> Batches:
    sampler.set_epoch(number)
    return list(sampler)


def test_seeds_have_63_bits_and_depend_on_every_part() -> None:
    seeds = {mix_seed(seed, epoch, row) for seed in range(20) for epoch in range(20) for row in range(20)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert mix_seed(1, 2) != mix_seed(2, 1)
    assert mix_seed(3, -1) == mix_seed(3, -1)


def test_batches_are_homogeneous_and_use_every_row_once() -> None:
    sampler = HomogeneousBatchSampler([8, 13], 4, seed=1)
    batches = epoch(sampler, 0)
    assert len(batches) == len(sampler) == 2 + 3
    assert all(len({dataset for dataset, _, _ in batch}) == 1 and len(batch) == 4 for batch in batches)
    rows = [(dataset, row) for batch in batches for dataset, row, _ in batch]
    assert len(set(rows)) == len(rows) == 20
    assert {row for dataset, row in rows if dataset == 0} == set(range(8))


def test_a_batch_is_a_function_of_seed_epoch_and_step() -> None:
    first, second = HomogeneousBatchSampler([40], 4, seed=1), HomogeneousBatchSampler([40], 4, seed=1)
    epochs = [epoch(first, number) for number in range(3)]
    assert epoch(second, 2) == epochs[2]
    assert epochs[0] != epochs[1]
    assert epoch(HomogeneousBatchSampler([40], 4, seed=2), 0) != epochs[0]
    for step in (0, 3, 10):
        second.load_state_dict({**second.state_dict(), "epoch": 1, "step": step})
        assert list(second) == epochs[1][step:]


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_the_dataset_and_split_the_batch_of_one_device(drop_last: bool) -> None:
    sizes = [17, 30]
    ranks = [HomogeneousBatchSampler(sizes, 2, 5, rank, 3, drop_last) for rank in range(3)]
    assert len({len(rank) for rank in ranks}) == 1
    for parts in zip(*(epoch(rank, 1) for rank in ranks), strict=True):
        assert len({dataset for part in parts for dataset, _, _ in part}) == 1
        assert len({len(part) for part in parts}) == 1
    if drop_last:
        joined = [[key for part in parts for key in part] for parts in zip(*map(list, ranks), strict=True)]
        assert joined == epoch(HomogeneousBatchSampler(sizes, 6, 5), 1)


def test_the_last_batch_is_smaller_unless_dropped() -> None:
    kept = epoch(HomogeneousBatchSampler([7], 4, drop_last=False, shuffle=False), 0)
    assert [[row for _, row, _ in batch] for batch in kept] == [[0, 1, 2, 3], [4, 5, 6]]
    ranks = [HomogeneousBatchSampler([7], 2, 0, rank, 2, drop_last=False, shuffle=False) for rank in range(2)]
    assert [[[row for _, row, _ in b] for b in rank] for rank in ranks] == [
        [[0, 1], [4]],
        [[2, 3], [5]],
    ]  # 6 is left out


def test_turns_end_with_the_smallest_dataset_and_batch_sizes_may_differ() -> None:
    sampler = HomogeneousBatchSampler([6, 40], [2, 8], strategy="round_robin")
    batches = epoch(sampler, 0)
    assert [batch[0][0] for batch in batches] == [0, 1] * 3
    assert [len(batch) for batch in batches] == [2, 8] * 3
    assert len(sampler) == 6


def test_sampler_mistakes() -> None:
    with pytest.raises(InputError, match="dataset 1 has 3 rows, too few for a batch of 2 on each of 2 devices"):
        HomogeneousBatchSampler([9, 3], 2, world_size=2)
    with pytest.raises(InputError, match=r"batch_size.*at least 1, got 0"):
        HomogeneousBatchSampler([9], 0)
    sampler = HomogeneousBatchSampler([9], 2)
    saved = {**HomogeneousBatchSampler([8], 2).state_dict(), "step": 1}
    with pytest.raises(InputError, match=r"sizes was \[8\], is \[9\]"):
        sampler.load_state_dict(saved)
    sampler.load_state_dict({**saved, "step": 4, "epoch": 3})  # a whole epoch: other data may follow
    assert sampler.epoch == 3
    assert list(sampler) == []


def test_texts_are_batched_by_length_under_the_budget() -> None:
    lengths = [3, 10, 3, 5, 99, 4]
    batches = list(LengthSortedBatchSampler(lengths, 10))
    assert batches == [[4], [1], [3, 5], [0, 2]]
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 10 for b in batches)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_rank_encodes_equally_many_batches_and_nothing_is_missed(world_size: int) -> None:
    lengths = [(7 * i) % 13 for i in range(50)]
    ranks = [LengthSortedBatchSampler(lengths, 20, rank, world_size) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    assert {i for rank in ranks for batch in rank for i in batch} == set(range(50))
    with pytest.raises(InputError, match="nothing to encode"):
        LengthSortedBatchSampler([], 20)
