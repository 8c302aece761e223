import math
import random

import pytest
import pytrec_eval

from lit_core.errors import InputError
from lit_embed.retrieval.evaluate import evaluate, evaluate_per_query
from lit_embed.retrieval.ranking import Qrels, Run

QRELS = {"q1": {"d1": 3, "d2": 1, "d3": 0, "d4": 2}, "q2": {"d7": 1}, "q3": {"d9": 2, "d8": 1}}
RANKED = {"q1": ["d2", "d3", "d1", "d5", "d4"], "q2": ["d5", "d6", "d7"], "q3": ["d1", "d2"]}
RUN = {query_id: {doc_id: 9.0 - rank for rank, doc_id in enumerate(ids)} for query_id, ids in RANKED.items()}
TREC_NAMES = {"ndcg@10": "ndcg_cut_10", "mrr": "recip_rank", "map": "map", "recall@100": "recall_100"}


def trec_eval(run: Run, qrels: Qrels) -> dict[str, dict[str, float]]:
    """Values by our metric names; only of queries that the run has."""
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recip_rank", "map", "recall.100"}).evaluate(run)
    return {name: {query_id: values[trec] for query_id, values in found.items()} for name, trec in TREC_NAMES.items()}


def random_collection(seed: int, tied: bool) -> tuple[Run, Qrels]:
    draw = random.Random(seed)
    doc_ids = [f"d{number}" for number in range(400)]
    qrels: Qrels = {}
    run: Run = {}
    for number in range(60):
        judged = draw.sample(doc_ids, draw.randint(1, 30))
        qrels[f"q{number}"] = {doc_id: draw.choice([-1, 0, 1, 1, 2, 3]) for doc_id in judged}
        ranked = draw.sample(doc_ids, draw.randint(1, 200))
        run[f"q{number}"] = {doc_id: float(draw.randint(0, 12)) if tied else draw.random() for doc_id in ranked}
    return run, qrels


def test_graded_example() -> None:
    values = evaluate(RUN, QRELS, ["ndcg@10", "recall@3", "precision@3", "map", "mrr", "ndcg_burges@10"])
    expected = {
        "ndcg@10": 0.395828,
        "recall@3": 0.555556,
        "precision@3": 0.333333,
        "map": 0.362963,
        "mrr": 0.444444,
        "ndcg_burges@10": 0.367550,
    }
    assert values == pytest.approx(expected, abs=1e-6)
    first = {
        metric: values["q1"] for metric, values in evaluate_per_query(RUN, QRELS, ["ndcg@3", "ndcg@10", "map"]).items()
    }
    assert first == pytest.approx({"ndcg@3": 0.525005, "ndcg@10": 0.687485, "map": 0.755556}, abs=1e-6)


@pytest.mark.parametrize("order", ["abcd", "dcba", "bdac"])
def test_ties_go_by_document_id_descending_whatever_the_insertion_order(order: str) -> None:
    run = {"q": dict.fromkeys(order, 1.0)}
    assert evaluate(run, {"q": {"a": 1, "c": 1}}, ["ndcg@10", "mrr@10"]) == pytest.approx(
        {"ndcg@10": 0.650921, "mrr@10": 0.5}, abs=1e-6
    )


def test_queries_missing_from_the_run_or_empty_count_zero() -> None:
    qrels = {"found": {"a": 1}, "other": {"b": 1}}
    for run in ({"found": {"a": 1.0}}, {"found": {"a": 1.0}, "other": {}}):
        assert evaluate(run, qrels) == {"ndcg@10": 0.5, "mrr@10": 0.5, "recall@100": 0.5, "map": 0.5}
    assert evaluate({}, qrels, ["ndcg@10"]) == {"ndcg@10": 0.0}


def test_queries_without_relevant_documents_count_zero_and_stay() -> None:
    run = {"found": {"a": 1.0}, "none": {"a": 1.0}, "unjudged": {"a": 1.0}}
    per_query = evaluate_per_query(run, {"found": {"a": 1}, "none": {"a": 0}, "unjudged": {}}, ["ndcg@10", "map"])
    assert per_query == {metric: {"found": 1.0, "none": 0.0, "unjudged": 0.0} for metric in ("ndcg@10", "map")}


def test_queries_that_the_qrels_lack_are_dropped() -> None:
    assert evaluate({"q": {"a": 1.0}, "extra": {"b": math.nan}}, {"q": {"a": 1}}, ["map"]) == {"map": 1.0}


def test_scores_equal_in_float32_tie() -> None:
    assert evaluate({"q": {"a": 1.0 + 1e-9, "b": 1.0}}, {"q": {"a": 1}}, ["mrr"]) == {"mrr": 0.5}
    assert trec_eval({"q": {"a": 1.0 + 1e-9, "b": 1.0}}, {"q": {"a": 1}})["mrr"]["q"] == 0.5


def test_negative_relevance_is_not_relevant() -> None:
    run = {"q": {"a": 3.0, "b": 2.0}}
    assert evaluate(run, {"q": {"a": -1, "b": 2}}, ["ndcg@10", "mrr@10"]) == pytest.approx(
        evaluate(run, {"q": {"a": 0, "b": 2}}, ["ndcg@10", "mrr@10"])
    )


@pytest.mark.parametrize("tied", [False, True])
def test_every_query_equals_trec_eval_on_random_graded_runs(tied: bool) -> None:
    run, qrels = random_collection(3, tied)
    ours = evaluate_per_query(run, qrels, list(TREC_NAMES))
    for metric, values in trec_eval(run, qrels).items():
        assert ours[metric] == pytest.approx(values, abs=1e-8)


def test_mean_is_that_of_trec_eval_spread_over_all_judged_queries() -> None:
    run, qrels = random_collection(4, tied=True)
    kept = {query_id: scores for query_id, scores in run.items() if query_id[-1] in "0123"}
    theirs = {metric: sum(values.values()) / len(qrels) for metric, values in trec_eval(kept, qrels).items()}
    assert evaluate(kept, qrels, list(TREC_NAMES)) == pytest.approx(theirs, abs=1e-8)


def test_identical_ids_are_dropped_only_on_request() -> None:
    run, qrels = {"q": {"q": 2.0, "a": 1.0}}, {"q": {"a": 1}}
    assert evaluate(run, qrels, ["mrr@10"]) == {"mrr@10": 0.5}
    assert evaluate(run, qrels, ["mrr@10"], ignore_identical_ids=True) == {"mrr@10": 1.0}
    assert run == {"q": {"q": 2.0, "a": 1.0}}


def test_bad_input_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match="document 'b' for query 'q' is NaN"):
        evaluate({"q": {"a": 1.0, "b": math.nan}}, {"q": {"a": 1}})
    with pytest.raises(InputError, match="qrels are empty"):
        evaluate(RUN, {})
    for name in ("ngcd@10", "ndcg@0", "ndcg@", "mrr10"):
        with pytest.raises(InputError, match=f"unknown metric '{name}'"):
            evaluate(RUN, QRELS, [name])
