import itertools
import random
from typing import Any

import pytest

from lit_core.errors import InputError
from lit_core.samplers import HomogeneousBatchSampler, ResumableBatchSampler
from lit_core.schedules import MixedBatchSampler, StagedBatchSampler, schedule_sampler, schedule_stages

Batches = list[list[tuple[int, int, int]]]
SIZES = {"a": 10, "b": 7, "c": 5}
TYPES = {"a": "retrieval", "b": "sts", "c": "retrieval"}


def epoch(sampler: ResumableBatchSampler, number: int = 0) -> Batches:
    sampler.set_epoch(number)
    return list(sampler)


def datasets(batches: Batches) -> list[int]:
    assert all(len({dataset for dataset, _, _ in batch}) == 1 for batch in batches)
    return [batch[0][0] for batch in batches]


def loop(stages: list[list[int]], sizes: list[int], whole: list[int]) -> list[int]:
    """Number of batches of each dataset in each stage, as a plain loop cuts and drops."""
    counts = []
    for stage in stages:
        for dataset in stage:
            rows = list(range(sizes[dataset]))
            cut = [rows[start : start + whole[dataset]] for start in range(0, len(rows), whole[dataset])]
            counts.append(sum(len(batch) == whole[dataset] for batch in cut))
    return counts


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batch_level_shuffling_of_the_card(world_size: int) -> None:
    """Sizes 10, 7, 5 and a global batch of 4: 2 + 1 + 1 batches, 16 rows used, 6 dropped."""
    sampler = schedule_sampler("bls", SIZES, 4 // world_size, world_size=world_size)
    found = datasets(epoch(sampler))
    assert [found.count(dataset) for dataset in range(3)] == [2, 1, 1]
    ranks = [schedule_sampler("bls", SIZES, 4 // world_size, None, None, 0, r, world_size) for r in range(world_size)]
    used = {key[:2] for rank in ranks for batch in epoch(rank) for key in batch}
    assert len(used) == 16
    assert sum(SIZES.values()) - len(used) == 6


def test_batch_level_shuffling_is_one_stage_and_mixes() -> None:
    sizes = {"a": 400, "b": 200, "c": 200}
    sampler = schedule_sampler("bls", sizes, 4, seed=3)
    assert epoch(sampler, 5) == epoch(HomogeneousBatchSampler(list(sizes.values()), 4, 3), 5)
    found = datasets(epoch(sampler, 0))
    assert datasets(epoch(sampler, 1)) != found
    changes = sum(left != right for left, right in itertools.pairwise(found))
    assert changes > 80  # of 199; a random order has 1 - 1/4 - 1/16 - 1/16 of them, about 124


def test_dataset_after_dataset_and_type_after_type() -> None:
    whole = schedule_sampler("dataset", SIZES, 2, TYPES)
    assert datasets(epoch(whole)) == [0] * 5 + [1] * 3 + [2] * 2  # by decreasing size
    given = schedule_sampler("dataset", SIZES, 2, order=["c", "a", "b"])
    assert datasets(epoch(given)) == [2] * 2 + [0] * 5 + [1] * 3
    by_type = [datasets(epoch(schedule_sampler("task", SIZES, 1, TYPES, seed=s))) for s in range(3)]
    for found in by_type:
        assert sorted(found[:15]) == [0] * 10 + [2] * 5  # retrieval has more rows
        assert found[15:] == [1] * 7
        assert found[:15] != sorted(found[:15])
    assert by_type[0] != by_type[1]
    late = schedule_sampler("task", SIZES, 1, TYPES, order=["sts", "retrieval"])
    assert datasets(epoch(late))[:7] == [1] * 7
    assert schedule_stages("task", SIZES, TYPES) == [[0, 2], [1]]


def test_stages_hold_the_batches_that_a_plain_loop_cuts() -> None:
    generator = random.Random(0)
    for _ in range(6):
        sizes = [generator.randint(12, 60) for _ in range(5)]
        sizes_by_name = {str(number): size for number, size in enumerate(sizes)}
        types = {name: generator.choice("xyz") for name in sizes_by_name}
        batch_sizes, world_size = [generator.randint(1, 4) for _ in sizes], generator.randint(1, 3)
        for schedule in ("bls", "dataset", "task"):
            stages = schedule_stages(schedule, sizes_by_name, types)  # type: ignore[arg-type]
            ranks = [StagedBatchSampler(sizes, batch_sizes, stages, 1, rank, world_size) for rank in range(world_size)]
            parts = [epoch(rank, 2) for rank in ranks]
            whole = [size * world_size for size in batch_sizes]
            counts, found = loop(stages, sizes, whole), datasets(parts[0])
            assert [found.count(dataset) for stage in stages for dataset in stage] == counts
            place = 0
            for stage in stages:
                count = sum(found.count(dataset) for dataset in stage)
                assert set(found[place : place + count]) == set(stage)
                place += count
            one = StagedBatchSampler(sizes, whole, stages, 1)
            assert [[key for part in step for key in part] for step in zip(*parts, strict=True)] == epoch(one, 2)
            rows = [key[:2] for part in parts for batch in part for key in batch]
            assert len(rows) == len(set(rows))


def test_rows_are_mixed_in_proportion() -> None:
    ranks = [schedule_sampler("mixed", {"a": 300, "b": 100}, 10, None, None, 1, rank, 2) for rank in range(2)]
    parts = [epoch(rank) for rank in ranks]
    joined = [[key for part in step for key in part] for step in zip(*parts, strict=True)]
    assert joined == epoch(MixedBatchSampler([300, 100], 20, 1))
    rows = [key[:2] for batch in joined for key in batch]
    assert len(rows) == len(set(rows)) == 400
    shares = [sum(dataset == 0 for dataset, _, _ in batch) for batch in joined]
    assert all(8 <= share <= 20 for share in shares)  # 15 are expected; each batch has both
    assert len(set(shares)) > 1


@pytest.mark.parametrize(("batch_sizes", "steps", "mixed"), [
    ((4, 2, 2), 30 + 20 + 10, 3),  # of 180 rows: 3 make 60 steps
    ((4, 4, 2), 30 + 10 + 10, 4),  # 3.6 on the average: 4 make 45 steps, 3 would make 60
    ((5, 5, 5), 24 + 8 + 4, 5),  # of one size: that one
])  # fmt: skip
@pytest.mark.parametrize("world_size", [1, 2])
def test_mixed_rows_take_about_as_many_steps(
    batch_sizes: tuple[int, ...], steps: int, mixed: int, world_size: int
) -> None:
    sizes = {"a": 120 * world_size, "b": 40 * world_size, "c": 20 * world_size}
    apart = schedule_sampler("bls", sizes, batch_sizes, world_size=world_size)
    assert len(apart) == steps
    sampler = schedule_sampler("mixed", sizes, batch_sizes, world_size=world_size)
    assert {len(batch) for batch in epoch(sampler)} == {mixed}
    assert abs(len(sampler) - steps) <= steps // 10


@pytest.mark.parametrize("schedule", ["bls", "dataset", "task", "mixed"])
def test_a_batch_is_a_function_of_seed_epoch_and_step(schedule: Any) -> None:
    def build(seed: int = 1) -> ResumableBatchSampler:
        return schedule_sampler(schedule, SIZES, 2, TYPES, seed=seed)

    first, second = build(), build()
    epochs = [epoch(first, number) for number in range(3)]
    assert epochs[0] != epochs[1]
    assert epoch(build(2)) != epochs[0]
    for step in range(len(first) + 1):
        second.load_state_dict({**first.state_dict(), "epoch": 1, "step": step})
        assert list(second) == epochs[1][step:]
    seeds = [seed for batch in epochs[0] + epochs[1] for _, _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_a_state_of_another_order_is_refused_in_mid_epoch() -> None:
    saved = {**schedule_sampler("dataset", SIZES, 2).state_dict(), "step": 1}
    other = schedule_sampler("dataset", SIZES, 2, order=["b", "a", "c"])
    with pytest.raises(InputError, match=r"stages was \[\[0\], \[1\], \[2\]\], is \[\[1\], \[0\], \[2\]\]"):
        other.load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "random"}, "field 'schedule': must be one of bls, dataset, task, mixed, got 'random'"),
        ({"schedule": "bls", "order": ["a"]}, "field 'order': the schedule 'bls' has no order"),
        ({"schedule": "dataset", "order": ["a", "b"]}, "must name each dataset once: a, b, c; got a, b"),
        ({"schedule": "task", "order": ["sts"], "types": TYPES}, "must name each task type once: retrieval, sts"),
        ({"schedule": "task"}, "field 'types': the schedule 'task' needs the task type"),
        ({"schedule": "mixed", "order": ["a"]}, "field 'order': the schedule 'mixed' has no order"),
        ({"schedule": "mixed", "batch_size": 23}, "the datasets have 22 rows together"),
        ({"schedule": "mixed", "batch_size": 0}, "field 'batch_size': must be at least 1, got 0"),
        ({"schedule": "bls", "batch_size": 6}, "dataset 2 has 5 rows, too few for a batch of 6"),
    ],
)
def test_schedule_mistakes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        schedule_sampler(**{"sizes": SIZES, "batch_size": 2, **options})
    assert words in str(error.value)
