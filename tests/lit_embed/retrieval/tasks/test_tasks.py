"""Scores worked by hand, equality with plain loops, laws that hold for all tasks, and errors."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_embed.data.records import Collection
from lit_embed.retrieval.tasks import (
    Classification,
    Clustering,
    EvalTask,
    PairClassification,
    Reranking,
    Retrieval,
    Sts,
    mean_scores,
)

A, B, C, D = (torch.tensor(v) for v in ((1.0, 0.0), (0.6, 0.8), (0.0, 1.0), (0.8, 0.6)))


def texts(*ids: str) -> dict[str, str]:
    return {text_id: f"text {text_id}" for text_id in ids}


def common(*ids: str) -> dict[str, Any]:
    return {"name": "t", "domain": "in", "queries": texts(*ids)}


RETRIEVAL = Retrieval(
    **common("q1", "q2"), passages=texts("a", "b", "c"), qrels={"q1": {"c": 1}, "q2": {"a": 1, "c": 2, "b": 0}}
)
RERANKING = Reranking(
    **common("q1", "q2"),
    passages=texts("a", "b", "c"),
    candidates={"q1": {"a": 0, "b": 1, "c": 1}, "q2": {"a": 1, "b": 0}},
)
QUERIES, PASSAGES = {"q1": A, "q2": C}, {"a": A, "b": B, "c": C}


def test_retrieval_by_hand() -> None:
    # q1 ranks a b c: its c gains 1 / log2 4; q2 ranks c b a: (2 + 1 / log2 4) / (2 + 1 / log2 3)
    scores = RETRIEVAL.score(QUERIES, PASSAGES)
    expected = {
        "ndcg@10": (0.5 + 0.950234) / 2,
        "mrr@10": (1 / 3 + 1) / 2,
        "recall@100": 1.0,
        "map": (1 / 3 + 5 / 6) / 2,
    }
    assert scores == pytest.approx(expected, abs=1e-6)


def test_reranking_by_hand() -> None:
    # q1 ranks a b c: (1/2 + 2/3) / 2; q2 ranks b a: 1/2
    scores = RERANKING.score(QUERIES, PASSAGES)
    assert scores == pytest.approx({"map": (7 / 12 + 1 / 2) / 2, "mrr": 0.5}, abs=1e-7)


def test_sts_by_hand() -> None:
    pairs = [("a", "a2", 5.0), ("a", "b", 4.0), ("a", "d", 1.0), ("a", "c", 2.0)]  # cosines 1, .6, .8, 0
    task = Sts(**common("a", "a2", "b", "c", "d"), pairs=pairs)
    scores = task.score({"a": A, "a2": 3 * A, "b": B, "c": C, "d": 7 * D}, {})
    assert scores == pytest.approx({"spearman": 0.4, "pearson": 1 / 5.6**0.5}, abs=1e-6)  # 1 - 6 * 6 / (4 * 15)


def test_sts_of_a_collapsed_encoder_is_0() -> None:
    task = Sts(**common("a", "b", "c"), pairs=[("a", "b", 1.0), ("b", "c", 2.0)])
    ones = dict.fromkeys("abc", torch.full((7,), 0.3))
    assert task.score(ones, {}) == {"spearman": 0.0, "pearson": 0.0}


def test_pair_classification_by_hand() -> None:
    pairs = [("a", "a2", 1), ("a", "d", 0), ("a", "b", 1), ("a", "c", 0)]  # cosines 1, .8, .6, 0
    task = PairClassification(**common("a", "a2", "b", "c", "d"), pairs=pairs)
    scores = task.score({"a": A, "a2": 2 * A, "b": B, "c": C, "d": D}, {})
    assert scores == pytest.approx({"ap": (1 + 2 / 3) / 2, "roc_auc": 0.75})


def test_classification_by_hand() -> None:
    train = {"f1": "low", "f2": "low", "f3": "high", "f4": "high"}
    test = {"p1": "low", "p2": "low", "p3": "low", "p4": "high"}
    places = {"f1": -1.0, "f2": -1.0, "f3": 1.0, "f4": 1.0, "p1": -2.0, "p2": 2.0, "p3": -0.5, "p4": 3.0}
    task = Classification(**common(*places), train=train, test=test)
    scores = task.score({text_id: torch.tensor([place]) for text_id, place in places.items()}, {})
    # p2 alone is wrong: low has precision 1, recall 2/3; high precision 1/2, recall 1
    assert scores == pytest.approx({"accuracy": 0.75, "f1": (4 / 5 + 2 / 3) / 2})


class Whole(Clustering):
    def drawn(self, number: int) -> list[int]:
        return list(range(len(self.labels)))


def test_clustering_by_hand() -> None:
    # clusters of four: three a and one b; four b. Homogeneity .574995, completeness .548795
    ids = [f"t{number}" for number in range(8)]
    labels = dict(zip(ids, "aaabbbbb", strict=True))
    vectors = {text_id: torch.tensor([0.0 if row < 4 else 9.0, row / 100]) for row, text_id in enumerate(ids)}
    scores = Whole(**common(*ids), labels=labels).score(vectors, {})
    assert scores == pytest.approx({"v_measure": 0.561590, "v_measure_std": 0.0}, abs=1e-6)
    assert Clustering(**common(*ids), labels=dict(zip(ids, "aaaabbbb", strict=True))).score(vectors, {})[
        "v_measure"
    ] == pytest.approx(1.0)


def random_vectors(ids: list[str], seed: int, width: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {text_id: torch.randn(width, generator=generator) for text_id in sorted(ids)}


def random_tasks() -> list[EvalTask]:
    draw = random.Random(5)
    ids = [f"t{number:02d}" for number in range(60)]
    words = {**common(*ids)}
    labels = {text_id: "xyz"[number % 3] for number, text_id in enumerate(ids)}
    pairs = [tuple(draw.sample(ids, 2)) for _ in range(40)]
    passages = texts(*(f"p{number}" for number in range(30)))
    judged = {query: {p: draw.choice([0, 1]) for p in draw.sample(sorted(passages), 8)} for query in ids}
    judged = {query: grades | {"p0": 1, "p1": 0} for query, grades in judged.items()}
    return [
        Retrieval(**words, passages=passages, qrels=judged),
        Reranking(**words, passages=passages, candidates=judged),
        Classification(**words, train=dict(list(labels.items())[:36]), test=dict(list(labels.items())[36:])),
        Clustering(**words, labels=labels),
        Sts(**words, pairs=[(first, second, float(draw.randint(0, 5))) for first, second in pairs]),
        PairClassification(**words, pairs=[(first, second, draw.randint(0, 1)) for first, second in pairs]),
    ]


TASKS = random_tasks()
by_type = pytest.mark.parametrize("task", TASKS, ids=[task.type for task in TASKS])


def scored(task: EvalTask, scale: float = 1.0) -> dict[str, float]:
    queries, passages = random_vectors(list(task.queries), 1), random_vectors(list(task.passages), 2)
    return task.score({k: scale * v for k, v in queries.items()}, {k: scale * v for k, v in passages.items()})


@by_type
def test_scores_name_the_main_one_and_repeat(task: EvalTask) -> None:
    scores = scored(task)
    assert task.main in scores
    assert scored(task) == scores


@by_type
def test_the_order_of_ids_does_not_matter(task: EvalTask) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turned(value[key]) for key in reversed(value)}
        return value[::-1] if isinstance(value, list) else value

    other = replace(task, **{name: turned(value) for name, value in vars(task).items()})
    queries, passages = random_vectors(list(task.queries), 1), random_vectors(list(task.passages), 2)
    assert other.score(turned(queries), turned(passages)) == pytest.approx(task.score(queries, passages), abs=1e-12)


@pytest.mark.parametrize("task", [t for t in TASKS if "cl" not in t.type or "pair" in t.type], ids=lambda t: t.type)
def test_what_compares_by_cosine_is_blind_to_length(task: EvalTask) -> None:
    assert scored(task, 4.0) == scored(task)


def test_reranking_equals_a_plain_loop() -> None:
    task, precisions = TASKS[1], []
    queries, passages = random_vectors(list(task.queries), 1), random_vectors(list(task.passages), 2)
    for query, judged in vars(task)["candidates"].items():
        cosine = {p: torch.cosine_similarity(queries[query].double(), passages[p].double(), 0).item() for p in judged}
        ranked = sorted(judged, key=cosine.__getitem__, reverse=True)
        hits = [rank for rank, p in enumerate(ranked, 1) if judged[p]]
        precisions.append(sum(number / rank for number, rank in enumerate(hits, 1)) / len(hits))
    assert task.score(queries, passages)["map"] == pytest.approx(sum(precisions) / len(precisions))


def test_retrieval_equals_a_plain_loop() -> None:
    task, values = TASKS[0], []
    queries, passages = random_vectors(list(task.queries), 1), random_vectors(list(task.passages), 2)
    for query, judged in vars(task)["qrels"].items():
        cosine = {
            p: torch.cosine_similarity(queries[query].double(), v.double(), 0).item() for p, v in passages.items()
        }
        ranked = sorted(passages, key=cosine.__getitem__, reverse=True)[:10]
        gain = sum(judged.get(p, 0) / np.log2(rank + 1) for rank, p in enumerate(ranked, 1))
        values.append(gain / sum(1 / np.log2(rank + 1) for rank in range(1, min(10, sum(judged.values())) + 1)))
    assert task.score(queries, passages)["ndcg@10"] == pytest.approx(np.mean(values))


@pytest.mark.filterwarnings("ignore")  # a regression may stop before it converges
def test_classification_equals_sklearn_on_each_draw() -> None:
    from sklearn.linear_model import LogisticRegression

    task = TASKS[2]
    assert isinstance(task, Classification)
    vectors, accuracies = random_vectors(list(task.queries), 1), []
    for draw in range(10):
        ids = task.drawn(draw)
        assert [sum(task.train[i] == label for i in ids) for label in "xyz"] == [8, 8, 8]
        model = LogisticRegression(max_iter=100).fit(np.stack([vectors[i] for i in ids]), [task.train[i] for i in ids])
        right = [model.predict(vectors[i][None].numpy())[0] == label for i, label in task.test.items()]
        accuracies.append(sum(right) / len(right))
    assert task.score(vectors, {})["accuracy"] == pytest.approx(np.mean(accuracies))
    assert task.drawn(0) != task.drawn(1)


def test_ties_go_by_id_descending() -> None:
    task = Reranking(**common("q"), passages=texts(*"abc"), candidates={"q": {"b": 0, "a": 1, "c": 0}})
    assert task.score({"q": A}, dict.fromkeys("abc", B))["map"] == pytest.approx(1 / 3)
    task = Retrieval(**common("q"), passages=texts(*"bca"), qrels={"q": {"a": 1}})
    assert task.score({"q": A}, dict.fromkeys("abc", B))["mrr@10"] == pytest.approx(1 / 3)


def test_a_collection_becomes_a_task() -> None:
    collection = Collection("c", texts("a", "b", "c"), texts("q1", "q2", "unjudged"), dict(RETRIEVAL.qrels))  # type: ignore[arg-type]
    task = Retrieval.from_collection(collection, "out")
    assert (task.name, task.domain, set(task.queries)) == ("c", "out", {"q1", "q2"})
    assert task.score(QUERIES, PASSAGES) == RETRIEVAL.score(QUERIES, PASSAGES)


def test_means_over_tasks_types_and_domains() -> None:
    first, second = replace(RETRIEVAL, name="r1"), replace(RETRIEVAL, name="r2", domain="out")
    third = replace(RERANKING, name="r3")
    scores = {"r1": {"ndcg@10": 0.2, "map": 9.0}, "r2": {"ndcg@10": 0.4}, "r3": {"map": 0.9}}
    means = mean_scores(scores, [first, second, third])
    assert means == pytest.approx({"mean_task": 0.5, "mean_type": 0.6, "in_domain": 0.55, "out_of_domain": 0.4})
    assert set(mean_scores(scores, [first])) == {"mean_task", "mean_type", "in_domain"}
    for wrong, tasks in (("no evaluation tasks", []), ("two tasks", [first, first]), ("no score 'map'", [RERANKING])):
        with pytest.raises(InputError, match=wrong):
            mean_scores(scores, tasks)


LABELS = {"a": "x", "b": "x", "c": "y", "d": "y"}
BAD: dict[str, tuple[type[EvalTask], dict[str, Any]]] = {
    "domain.*'in' or 'out'": (Sts, {"domain": "near", "pairs": [("a", "b", 1.0), ("a", "c", 2.0)]}),
    "has no texts": (Clustering, {"queries": {}, "labels": {}}),
    "text 'a' is empty": (Clustering, {"queries": texts(*"bcd") | {"a": " "}, "labels": LABELS}),
    "all its texts among the queries": (Clustering, {"passages": texts("p"), "labels": LABELS}),
    "has 0 passages; give": (Retrieval, {"qrels": {}}),
    "label 'y' has one text; give it a second": (Clustering, {"labels": {"a": "x", "b": "x", "c": "y"}}),
    "label 'z' has one": (Classification, {"train": LABELS | {"e": "z"}, "test": {"f": "z"}}),
    "has 1 labels; give at least two": (Clustering, {"labels": {"a": "x", "b": "x"}}),
    "label 'z' of text 'e' is not among": (Classification, {"train": LABELS, "test": {"e": "z"}}),
    "text 'a' is also in train": (Classification, {"train": LABELS, "test": {"a": "x"}}),
    "nothing to predict": (Classification, {"train": LABELS, "test": {}}),
    "field 'per_label'.*must be at least 1": (Classification, {"train": LABELS, "test": {"e": "x"}, "per_label": 0}),
    "must be at least 2": (Clustering, {"labels": LABELS, "size": 1}),
    "gold scores are equal, so nothing correlates": (Sts, {"pairs": [("a", "b", 1.0), ("a", "c", 1.0)]}),
    "gold score is not finite": (Sts, {"pairs": [("a", "b", 1.0), ("a", "c", float("nan"))]}),
    "labelled 1 and pairs labelled 0": (PairClassification, {"pairs": [("a", "b", 1), ("a", "c", 1)]}),
    "text 'zz' is judged, but there is no": (PairClassification, {"pairs": [("a", "zz", 1), ("a", "c", 0)]}),
    "query 'b' has no relevant passage; judge": (
        Reranking,
        {"queries": texts("a", "b"), "passages": texts("p"), "candidates": {"a": {"p": 1}, "b": {"p": 0}}},
    ),
    "query 'a' has no relevant passage": (Retrieval, {"passages": texts("p"), "qrels": {}}),
    "text 'r' is judged": (Retrieval, {"queries": texts("a"), "passages": texts("p"), "qrels": {"a": {"r": 1}}}),
    "judged neither 0 nor 1": (
        Reranking,
        {"queries": texts("a"), "passages": texts("p"), "candidates": {"a": {"p": 2}}},
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_is_one_line_that_names_the_task(message: str) -> None:
    kind, arguments = BAD[message]
    with pytest.raises(InputError, match=message) as caught:
        kind(**common(*"abcdef") | arguments)
    assert "task 't'" in str(caught.value)
    assert "\n" not in str(caught.value)


@by_type
def test_bad_vectors_are_named(task: EvalTask) -> None:
    queries, passages = random_vectors(list(task.queries), 1), random_vectors(list(task.passages), 2)
    for broken, message in (
        ({}, "text 't00' has no vector; encode"),
        ({"t00": torch.full((6,), torch.nan)}, "vector of text 't00' is not finite"),
        ({"t00": torch.tensor([0.0, 0, 0, 0, 0, torch.inf])}, "vector of text 't00' is not finite"),
        ({"t00": torch.zeros(2)}, "give one length to all"),
    ):
        vectors = {text_id: vector for text_id, vector in queries.items() if text_id != "t00"} | broken
        with pytest.raises(InputError, match=message):
            task.score(vectors, passages)


@pytest.mark.parametrize("task", TASKS[:2], ids=lambda task: task.type)
def test_sides_of_two_encoders_do_not_fit(task: EvalTask) -> None:
    with pytest.raises(InputError, match="have 6 and 5 values; encode both with one encoder"):
        task.score(random_vectors(list(task.queries), 1), random_vectors(list(task.passages), 2, width=5))
