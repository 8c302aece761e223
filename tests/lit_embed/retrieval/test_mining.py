import random
from typing import Any

import pytest

from lit_core.errors import InputError
from lit_embed.retrieval.mining import mine_hard_negatives

RUN = {"q": {"p": 0.8, "a": 0.9, "b": 0.78, "c": 0.7, "d": 0.5, "e": 0.5}}


def mine(**options: Any) -> list[str]:
    return mine_hard_negatives(RUN, {"q": {"p"}}, **{"count": 10, **options})["q"]


def test_filters_by_hand() -> None:
    assert mine() == ["a", "b", "c", "e", "d"]
    assert mine(count=2) == ["a", "b"]
    assert mine(rank_range=(1, 4)) == ["b", "c", "e"]
    assert mine(max_score=0.78, min_score=0.6) == ["b", "c"]
    assert mine(absolute_margin=0.05) == ["c", "e", "d"]
    assert mine(relative_margin=0.025) == ["b", "c", "e", "d"]
    assert mine(relative_margin=0.05, max_score=0.6) == ["e", "d"]
    assert mine(absolute_margin=0.0, positive_scores={"q": {"p": 0.75}}) == ["c", "e", "d"]


def test_margin_of_a_negative_positive_score_points_downwards() -> None:
    run = {"q": {"p": -10.0, "a": -10.5, "b": -11.0, "c": -9.0}}
    assert mine_hard_negatives(run, {"q": {"p"}}, 5, relative_margin=0.1) == {"q": ["b"]}


def test_margin_needs_the_score_of_every_positive() -> None:
    with pytest.raises(InputError, match="positive 'x' of query 'q' has no score"):
        mine_hard_negatives(RUN, {"q": {"p", "x"}}, 1, absolute_margin=0.1)
    assert mine_hard_negatives(RUN, {"q": {"p", "x"}}, 1, absolute_margin=0.1, positive_scores={"q": {"x": 0.6}}) == {
        "q": ["e"]
    }


def test_queries_missing_from_the_run_get_none_and_unlabelled_ones_are_not_mined() -> None:
    assert mine_hard_negatives(RUN | {"unlabelled": {"a": 1.0}}, {"z": {"p"}, "q": {"p"}}, 1) == {"z": [], "q": ["a"]}


def test_random_draw_is_seeded_per_query() -> None:
    run = {f"q{number}": {f"d{doc}": float(doc) for doc in range(50)} for number in range(6)}
    positives = {query_id: {"d3"} for query_id in run}
    first = mine_hard_negatives(run, positives, 5, sampling="random")
    assert first == mine_hard_negatives(run, positives, 5, sampling="random")
    assert first != mine_hard_negatives(run, positives, 5, sampling="random", seed=1)
    assert len({tuple(doc_ids) for doc_ids in first.values()}) == 6
    alone = mine_hard_negatives({"q4": run["q4"]}, {"q4": {"d3"}}, 5, sampling="random")
    assert alone["q4"] == first["q4"]


@pytest.mark.parametrize("seed", range(20))
def test_equals_a_literal_loop(seed: int) -> None:
    draw = random.Random(seed)
    doc_ids = [f"d{number}" for number in range(40)]
    run = {f"q{query}": {doc: draw.randint(-20, 40) / 8 for doc in draw.sample(doc_ids, 30)} for query in range(10)}
    positives = {query_id: set(draw.sample(sorted(scores), 2)) for query_id, scores in run.items()}
    start, count = draw.randint(0, 5), draw.randint(1, 8)
    end = start + draw.randint(1, 20)
    limit, absolute, relative = (draw.choice([None, draw.random()]) for _ in range(3))
    options: dict[str, Any] = {"max_score": limit, "absolute_margin": absolute, "relative_margin": relative}
    mined = mine_hard_negatives(run, positives, count, (start, end), **options)
    drawn = mine_hard_negatives(run, positives, count, (start, end), **options, sampling="random", seed=seed)
    for query_id, scores in run.items():
        lowest = min(scores[doc_id] for doc_id in positives[query_id])
        expected, place = [], -1
        for doc_id in sorted(scores, key=lambda name: (scores[name], name), reverse=True):
            if doc_id in positives[query_id]:
                continue
            place += 1
            if not start <= place < end or (limit is not None and scores[doc_id] > limit):
                continue
            if absolute is not None and scores[doc_id] > lowest - absolute:
                continue
            if relative is not None and scores[doc_id] > lowest - relative * abs(lowest):
                continue
            expected.append(doc_id)
        assert mined[query_id] == expected[:count]
        assert len(drawn[query_id]) == min(count, len(expected))
        assert drawn[query_id] == [doc_id for doc_id in expected if doc_id in drawn[query_id]]


def test_bad_arguments() -> None:
    for field, options in {
        "count": {"count": 0},
        "rank_range": {"rank_range": (5, 5)},
        "sampling": {"sampling": "hard"},
    }.items():
        with pytest.raises(InputError, match=f"field '{field}'"):
            mine(**options)
