from collections import Counter
from typing import Any

import pytest
import torch

from lit_core.errors import InputError
from lit_core.loader import ResumableLoader
from lit_core.quotas import QuotaBatchSampler, largest_remainder

SIZES = {"math": 50, "chat": 20, "if": 31}
EQUAL = {"math": 1.0, "chat": 1.0, "if": 1.0}
Batches = list[list[tuple[int, int, int]]]


def epoch(sampler: QuotaBatchSampler, number: int) -> Batches:
    sampler.set_epoch(number)
    return list(sampler)


def domains(batch: list[tuple[int, int, int]]) -> list[int]:
    count = Counter(domain for domain, _, _ in batch)
    return [count[domain] for domain in range(3)]


@pytest.mark.parametrize(
    ("shares", "total", "counts"),
    [
        ([1, 1, 1], 64, [22, 21, 21]),
        ([0.7, 0.3], 10, [7, 3]),
        ([0.1, 0.2, 0.7], 10, [1, 2, 7]),  # 0.7 / 1.0 * 10 is a little less than 7
        ([1, 1, 4], 7, [1, 1, 5]),  # 1.17, 1.17, 4.67
        ([5, 3, 1], 4, [2, 1, 1]),  # 2.22, 1.33, 0.44
        ([1, 99], 10, [0, 10]),
    ],
)
def test_largest_remainders_worked_out_by_hand(shares: list[float], total: int, counts: list[int]) -> None:
    assert largest_remainder(shares, total) == counts


def test_every_batch_has_its_quotas_and_a_domain_is_used_up_before_it_repeats() -> None:
    sampler = QuotaBatchSampler(SIZES, {"math": 2, "chat": 1, "if": 1}, 8, seed=3)
    assert len(sampler) == 101 // 8
    batches = [batch for number in range(3) for batch in epoch(sampler, number)]
    assert all(domains(batch) == [4, 2, 2] for batch in batches)
    assert all([domain for domain, _, _ in batch] == sorted(domain for domain, _, _ in batch) for batch in batches)
    chat = [row for batch in batches for domain, row, _ in batch if domain == 1]
    passes = [chat[start : start + 20] for start in range(0, 60, 20)]  # ten batches a pass, on over the epochs' ends
    assert all(sorted(one) == list(range(20)) for one in passes)
    assert passes[0] != passes[1]
    assert all(len({key[:2] for key in batch}) == 8 for batch in batches)


@pytest.mark.parametrize("quotas", ["fixed", "random"])
@pytest.mark.parametrize("synchronous", [False, True])
def test_ranks_share_a_global_batch(quotas: Any, synchronous: bool) -> None:
    shares = {"math": 3.0, "chat": 1.0, "if": 1.5}
    ranks = [QuotaBatchSampler(SIZES, shares, 6, 5, rank, 3, quotas, synchronous) for rank in range(3)]
    assert {len(rank) for rank in ranks} == {5}
    for parts in zip(*(epoch(rank, 2) for rank in ranks), strict=True):
        assert {len(part) for part in parts} == {6}
        assert len({key[:2] for part in parts for key in part}) == 18
        counts = [domains(part) for part in parts]
        if synchronous:
            assert counts[0] == counts[1] == counts[2]
        if quotas == "fixed":
            whole = [sum(column) for column in zip(*counts, strict=True)]
            assert whole == ([9, 3, 6] if synchronous else [10, 3, 5])
            assert all(max(column) - min(column) <= 1 for column in zip(*counts, strict=True))
    if not synchronous:  # the batches of one device that is three times as large
        parts = [sorted(key for part in parts for key in part) for parts in zip(*map(list, ranks), strict=True)]
        assert parts == [sorted(batch) for batch in epoch(QuotaBatchSampler(SIZES, shares, 18, 5, quotas=quotas), 2)]


def test_random_domains_follow_the_shares() -> None:
    sampler = QuotaBatchSampler({"a": 900, "b": 100}, {"a": 1, "b": 3}, 10, quotas="random")
    counts = torch.tensor(
        [[sum(d == 1 for d, _, _ in batch)] for n in range(20) for batch in epoch(sampler, n)]
    ).double()
    assert abs(counts.mean() - 7.5) < 5 * (10 * 0.75 * 0.25 / len(counts)) ** 0.5
    assert abs(counts.var() - 10 * 0.75 * 0.25) < 0.2  # binomial


@pytest.mark.parametrize("quotas", ["fixed", "random"])
def test_a_fit_goes_on_in_mid_epoch(quotas: Any) -> None:
    def loader() -> ResumableLoader:
        rows: Any = {(d, r): f"{d}:{r}" for d in range(3) for r in range(50)}
        dataset: Any = type("Rows", (), {"__getitem__": lambda self, key: rows[key[:2]], "__len__": lambda self: 150})()
        return ResumableLoader(dataset, QuotaBatchSampler(SIZES, EQUAL, 9, 1, quotas=quotas), list)

    whole, cut = loader(), loader()
    first = [*whole, *whole]
    taken = iter(cut)
    for _ in range(4):
        next(taken)
    other = loader()
    other.load_state_dict(cut.state_dict())
    assert [*other, *other] == first[4:]


def test_sampler_mistakes() -> None:
    with pytest.raises(InputError, match="field 'share': domain 'chat' needs a share above 0, got 0"):
        QuotaBatchSampler(SIZES, {**EQUAL, "chat": 0}, 9)
    with pytest.raises(InputError, match=r"domain 'chat' has 0.01 of the rows, which is none of a batch of 8; raise"):
        QuotaBatchSampler(SIZES, {"math": 50, "chat": 1, "if": 49}, 8)
    with pytest.raises(InputError, match="domain 'chat' has 20 rows, too few for its 30 of a batch of 90"):
        QuotaBatchSampler(SIZES, EQUAL, 30, world_size=3)
    with pytest.raises(InputError, match="101 rows together, too few for a batch of 102"):
        QuotaBatchSampler(SIZES, EQUAL, 102, quotas="random")
    with pytest.raises(InputError, match="domain 'chat' has no rows"):
        QuotaBatchSampler({**SIZES, "chat": 0}, EQUAL, 3)
    with pytest.raises(InputError, match=r"got \['math'\] for"):
        QuotaBatchSampler(SIZES, {"math": 1}, 3)
    sampler = QuotaBatchSampler(SIZES, EQUAL, 9)
    with pytest.raises(InputError, match="shares was"):
        sampler.load_state_dict({**QuotaBatchSampler(SIZES, {**EQUAL, "if": 2}, 9).state_dict(), "step": 1})
