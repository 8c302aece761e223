import random

import pytest
import torch

from lit_rl.modules.experience import Totals, deal_groups, rows_of
from lit_rl.modules.layout import Sequences


def sequences(groups: list[int]) -> Sequences:
    return Sequences([[1]] * len(groups), [[2]] * len(groups), groups)


@pytest.mark.parametrize("mini_batches", [1, 2, 3, 5, 9])
def test_groups_are_dealt_out_whole_and_once(mini_batches: int) -> None:
    groups = [3, 0, 1, 3, 2, 0, 1, 4, 4, 2]
    dealt = deal_groups(sequences(groups), mini_batches, 7, 1)
    assert len(dealt) == min(mini_batches, 5)
    assert sorted(row for rows in dealt for row in rows) == list(range(10))
    for rows in dealt:
        assert all(
            groups.count(group) == sum(groups[row] == group for row in rows) for group in {groups[r] for r in rows}
        )
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 2  # a group more at most


def test_the_order_depends_on_the_seed_alone() -> None:
    many = sequences(list(range(30)))
    assert deal_groups(many, 3, 1, 2) == deal_groups(many, 3, 1, 2)
    assert deal_groups(many, 3, 1, 2) != deal_groups(many, 3, 1, 3)
    random.seed(0)
    torch.manual_seed(5)
    assert deal_groups(many, 3, 1, 2) == deal_groups(many, 3, 1, 2)


def test_totals_are_means_over_everything_that_was_added() -> None:
    totals = Totals(torch.device("cpu"))
    totals.add("a", torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), torch.tensor([[True, True], [True, False]]))
    totals.add("a", torch.tensor([[10.0]]), torch.tensor([[True]]))
    totals.add("b", torch.tensor([1.0, 3.0]))
    totals.add("none", torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    for values in ([1.0, 4.0], [2.0], []):
        totals.add_largest("c", torch.tensor(values))
    found = {name: float(value) for name, value in totals.means(lambda tensor: tensor).items()}
    assert found == {"a": 4.0, "b": 2.0, "c": 4.0, "none": 0.0}
    doubled = totals.means(lambda tensor: tensor + torch.tensor([4.0, 1.0]))  # as if another rank had (4, 1) of each
    assert float(doubled["b"]) == pytest.approx(8 / 3)
    assert Totals(torch.device("cpu")).means(lambda tensor: tensor) == {}


def test_rows_of_a_tensor_or_none() -> None:
    assert rows_of(None, [1]) is None
    assert rows_of(torch.arange(6).view(3, 2), [2, 0]).tolist() == [[4, 5], [0, 1]]  # type: ignore[union-attr]
    assert rows_of(torch.arange(6).view(3, 2), []).shape == (0, 2)  # type: ignore[union-attr]
