import pytest

from lit_core.errors import InputError
from lit_embed.data.negatives import MINED_PER_QUERY, add_bm25_negatives
from lit_embed.data.records import Example, Passage

CORPUS = {f"d{i}": f"wing number {i}" for i in range(30)} | {"x": "wing flow", "y": "slab heat", "empty": ""}


def test_negatives_share_words_and_are_never_positives() -> None:
    wing = Example("1", "flow past a wing", (Passage("x", CORPUS["x"]), Passage("d3", CORPUS["d3"])))
    ready = Example("2", "anything", (Passage("x", CORPUS["x"]),), (Passage("y", CORPUS["y"]),))
    mined, kept = add_bm25_negatives([wing, ready], CORPUS, 2)
    assert kept == ready
    assert len(mined.negatives) == MINED_PER_QUERY
    assert all(n.text.startswith("wing number") and n.doc_id != "d3" for n in mined.negatives)


def test_a_query_without_known_words_gets_random_passages() -> None:
    strange = Example("1", "zzz", (Passage("x", CORPUS["x"]),))
    (mined,) = add_bm25_negatives([strange], CORPUS, 20, seed=4)
    assert len({n.doc_id for n in mined.negatives}) == 20
    assert not {"x", "empty"} & {n.doc_id for n in mined.negatives}
    assert add_bm25_negatives([strange], CORPUS, 20, seed=4) == [mined]


def test_everything_positive() -> None:
    with pytest.raises(InputError, match="query '1' has every passage as a positive"):
        add_bm25_negatives([Example("1", "a", (Passage("a", "a"),))], {"a": "a"}, 1)
