import pytest

from lit_core.errors import InputError
from lit_embed.data.dataset import MixedDataset, PairDataset, TextDataset, draw_pair
from lit_embed.data.records import Example, Passage

POSITIVES = tuple(Passage(f"p{i}", f"positive {i}") for i in range(3))
NEGATIVES = tuple(Passage(f"n{i}", f"negative {i}") for i in range(4))
EXAMPLE = Example("q", "query", POSITIVES, NEGATIVES)


def test_an_item_is_a_function_of_its_seed() -> None:
    items = [draw_pair(EXAMPLE, 2, seed, "set") for seed in (1, 2, 1)]
    assert items[0] == items[2] != items[1]
    assert items[0]["positive_ids"] == ["p0", "p1", "p2"]
    assert items[0]["passage_ids"][0].startswith("p")
    assert [t.split() for t in items[0]["passages"][1:]] == [["negative", i[1:]] for i in items[0]["passage_ids"][1:]]
    drawn = {draw_pair(EXAMPLE, 0, seed, "set")["passage_ids"][0] for seed in range(30)}
    assert drawn == {"p0", "p1", "p2"}


def test_negatives_repeat_only_where_there_are_too_few() -> None:
    for seed in range(20):
        assert len(set(draw_pair(EXAMPLE, 4, seed, "set")["passage_ids"][1:])) == 4
        assert len(draw_pair(EXAMPLE, 6, seed, "set")["passage_ids"]) == 7


def test_datasets_are_addressed_by_the_sampler_keys() -> None:
    other = Example("r", "other query", POSITIVES[:1])
    mixed = MixedDataset([PairDataset([EXAMPLE], "a", 1), PairDataset([other], "b", own_group_only=True)])
    assert mixed.sizes == [1, 1]
    item = mixed[1, 0, 5]
    assert (item["dataset"], item["query"], item["own_group_only"], item["seed"]) == ("b", "other query", True, 5)
    assert mixed[0, 0, 5] == draw_pair(EXAMPLE, 1, 5, "a")


def test_mistakes() -> None:
    with pytest.raises(InputError, match="query 'r' of 'a' has no negatives but 2 are asked for"):
        PairDataset([EXAMPLE, Example("r", "other", POSITIVES)], "a", negatives=2)
    with pytest.raises(InputError, match="repeats the text"):
        PairDataset([EXAMPLE, EXAMPLE], "a")
    with pytest.raises(InputError, match="has no examples"):
        PairDataset([], "a")
    with pytest.raises(InputError, match="got -1"):
        PairDataset([EXAMPLE], "a", negatives=-1)
    with pytest.raises(ValueError, match="no negatives"):
        draw_pair(EXAMPLE._replace(negatives=()), 1, 0, "a")


def test_texts() -> None:
    texts = TextDataset([("a", "x"), ("b", "y")])
    assert texts[1] == texts[0, 1, 99] == {"id": "b", "text": "y"}
    assert len(texts) == 2
