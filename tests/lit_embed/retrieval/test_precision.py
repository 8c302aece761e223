import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lit_core.results import write_results
from lit_embed.functional.precision import Ties
from lit_embed.items import Item
from lit_embed.multimodal import ChoiceTask, Key, choice_task, encode_rows
from lit_embed.retrieval.precision import evaluate_precision, top_candidates

TIES: tuple[Ties, ...] = ("wrong", "random", "compat")


class Picture:
    def __init__(self, key: str) -> None:
        self.key = key

    def load(self) -> None:
        raise AssertionError("nobody has to look at it")


def task(
    rows: Sequence[tuple[str, Sequence[str]]], name: str = "a", group: str = "vqa", domain: str = "ind"
) -> ChoiceTask:
    items = [(Item(query), [Item(text) for text in candidates]) for query, candidates in rows]
    return choice_task(name, group, domain, items)  # type: ignore[arg-type]


def vectors_of(values: dict[str, Sequence[float]]) -> dict[Key, Tensor]:
    return {(text, ""): torch.tensor(value) for text, value in values.items()}


def test_the_worked_example() -> None:
    vectors = vectors_of({"q1": (3.0, 4.0), "q2": (0.0, 1.0), "q3": (1.0, 0.0),
                          "t1": (1.0, 0.0), "t2": (0.0, 2.0), "t3": (4.0, 3.0)})  # fmt: skip
    same_set = task([("q1", ["t1", "t2", "t3"]), ("q2", ["t2", "t1", "t3"]), ("q3", ["t3", "t1", "t2"])])
    for ties in TIES:
        found = evaluate_precision(vectors, [same_set], ties)
        assert found.values["a"].tolist() == [0.0, 1.0, 0.0]
        assert found.metrics()["p@1"] == pytest.approx(1 / 3)
    best = top_candidates(vectors, same_set, 2)
    assert [[candidate.item.text for candidate in row] for row in best] == [["t3", "t2"], ["t2", "t3"], ["t1", "t3"]]
    assert best[0][0].score == pytest.approx(0.96)
    assert [[candidate.right for candidate in row] for row in best] == [[False, False], [True, False], [False, True]]
    unscaled = evaluate_precision(vectors, [same_set], normalize=False)  # t3 is long: 24, 10 and 5, 3 and 1, 4 for t1
    assert unscaled.values["a"].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("dim", [1, 3, 64, 333])
@pytest.mark.parametrize("candidates", [3, 9, 64, 131])
def test_a_collapsed_model_earns_nothing(dim: int, candidates: int) -> None:
    """Whatever a matrix product rounds in its last columns: equal vectors have equal scores."""
    names = [f"t{i}" for i in range(candidates)]
    same = torch.randn(dim, generator=torch.Generator().manual_seed(dim))
    vectors = {(name, ""): same.clone() for name in [*names, "q1", "q2"]}
    collapsed = task([("q1", names), ("q2", names[1:])])
    assert evaluate_precision(vectors, [collapsed]).metrics()["p@1"] == 0
    expected = (1 / candidates + 1 / (candidates - 1)) / 2
    assert evaluate_precision(vectors, [collapsed], "random").metrics()["p@1"] == pytest.approx(expected)
    assert evaluate_precision(vectors, [collapsed], "compat").metrics()["p@1"] == 1
    assert all(not row[0].right for row in top_candidates(vectors, task([("q1", names)]), 1))


def by_loop(vectors: dict[Key, Tensor], of: ChoiceTask, ties: Ties) -> list[float]:
    found = []
    for query, rows in zip(of.queries, of.candidates, strict=True):
        a = vectors[query.key].double()
        scores = []
        for row in rows:
            b = vectors[of.targets[row].key].double()
            scores.append(round(float(a @ b / a.norm() / b.norm()), 9))
        best = [place for place, score in enumerate(scores) if score == max(scores)]
        wins = {"wrong": best == [0], "random": (0 in best) / len(best), "compat": 0 in best}
        found.append(float(wins[ties]))
    return found


@pytest.mark.parametrize("ties", TIES)
def test_random_lists_against_a_loop(ties: Ties) -> None:
    rng = random.Random(1)
    names = [f"t{i}" for i in range(12)]
    tied = 0
    for _ in range(20):
        vectors = {(name, ""): torch.tensor([float(rng.randint(-1, 1)) for _ in range(3)] + [0.5])
                   for name in [*names, *(f"q{i}" for i in range(10))]}  # fmt: skip
        shared = rng.sample(names, 5)
        lists = [
            rng.sample(shared, 5) if rng.random() < 0.5 else rng.sample(names, rng.randint(1, 12)) for _ in range(10)
        ]
        mixed = task([(f"q{i}", candidates) for i, candidates in enumerate(lists)])
        expected = by_loop(vectors, mixed, ties)
        torch.testing.assert_close(evaluate_precision(vectors, [mixed], ties).values["a"], torch.tensor(expected))
        tied += by_loop(vectors, mixed, "wrong") != by_loop(vectors, mixed, "compat")
    assert tied > 5


def test_means_over_tasks() -> None:
    vectors = vectors_of({"q": (1.0, 0.0), "r": (0.0, 1.0), "right": (1.0, 0.1), "wrong": (0.1, 1.0)})
    hit, miss = ("q", ["right", "wrong"]), ("r", ["right", "wrong"])
    tasks = [
        task([hit, miss], "a", "vqa", "ind"), task([hit, hit, hit, miss], "b", "vqa", "ood"),
        task([miss], "c", "retrieval", "ood"),
    ]  # fmt: skip
    found = evaluate_precision(vectors, tasks)
    assert found.metrics() == {
        "p@1/a": 0.5, "p@1/b": 0.75, "p@1/c": 0.0, "p@1/group/vqa": 0.625, "p@1/group/retrieval": 0.0,
        "p@1/ind": 0.5, "p@1/ood": 0.375, "p@1": pytest.approx(1.25 / 3),
    }  # fmt: skip
    items = found.per_item()
    assert set(items) == {"p@1/a", "p@1/b", "p@1/c", "p@1/group/retrieval", "p@1/ind"}  # others have unequal tasks
    assert items["p@1/b"] == {"b/0": 1.0, "b/1": 1.0, "b/2": 1.0, "b/3": 0.0}


def test_results_take_metrics_and_items(tmp_path: object) -> None:
    vectors = vectors_of({"q": (1.0, 0.0), "r": (0.0, 1.0), "right": (1.0, 0.1), "wrong": (0.1, 1.0)})
    tasks = [task([(query, ["right", "wrong"]) for query in "qrq"], name, domain=name) for name in ("ind", "ood")]
    found = evaluate_precision(vectors, tasks, "random")
    assert set(found.per_item()) == set(found.metrics())
    write_results(str(tmp_path), found.metrics(), found.per_item())  # refuses a metric that is not its items' mean


def test_items_are_told_apart_by_text_and_picture() -> None:
    cat, dog = Picture("cat"), Picture("dog")
    right = Item("Represent.", cat)  # type: ignore[arg-type]
    wrong = Item("Represent.", dog)  # type: ignore[arg-type]
    query = Item("Find it.", cat)  # type: ignore[arg-type]
    pictures = choice_task("a", "grounding", None, [(query, [right, wrong, right])])
    assert pictures.candidates[0].tolist() == [0, 1]  # an equal candidate is the same candidate
    assert {(row.item, row.kind) for row in encode_rows([pictures, pictures])} == {
        (query, "query"), (right, "passage"), (wrong, "passage"),
    }  # fmt: skip
    vectors = {
        query.key: torch.tensor([1.0, 0.0]),
        right.key: torch.tensor([1.0, 0.0]),
        wrong.key: torch.tensor([0.0, 1.0]),
    }
    assert evaluate_precision(vectors, [pictures]).metrics() == {"p@1/a": 1.0, "p@1/group/grounding": 1.0, "p@1": 1.0}


def test_an_item_may_have_another_vector_as_a_candidate() -> None:
    choice = task([("a", ["a", "b"])])
    assert [(row.item.text, row.kind) for row in encode_rows([choice])] == [
        ("a", "query"), ("a", "passage"), ("b", "passage"),
    ]  # fmt: skip
    queries, targets = vectors_of({"a": (1.0, 0.0)}), vectors_of({"a": (0.0, 1.0), "b": (0.8, 0.6)})
    assert evaluate_precision(queries, [choice], targets=targets).metrics()["p@1"] == 0
    (ranked,) = top_candidates(queries, choice, targets=targets)
    assert [(one.item.text, pytest.approx(one.score)) for one in ranked] == [("b", 0.8), ("a", 0.0)]


def test_what_was_left_out_is_chosen_by_none_and_chooses_none() -> None:
    """Cosines may be negative, so that a score of 0 would beat them."""
    vectors = vectors_of({"q": (1.0, 0.0), "x": (-0.6, 0.8), "y": (-0.8, 0.6), "gone": (0.0, 0.0)})
    for query, candidates, value in (
        ("q", ["gone", "x", "y"], 0),
        ("q", ["x", "gone", "y"], 1),
        ("gone", ["x", "y"], 0),
    ):
        found = evaluate_precision(vectors, [task([(query, candidates)])], normalize=False)
        assert found.metrics()["p@1"] == value, (query, candidates)


def test_ranking_some_queries_only() -> None:
    vectors = vectors_of({"q": (1.0, 0.0), "r": (0.0, 1.0), "x": (1.0, 0.1), "y": (0.1, 1.0), "z": (0.0, 1.0)})
    ranked = top_candidates(vectors, task([("q", ["x", "y"]), ("r", ["x", "z", "y"])]), 5, queries=[1, 0])
    assert [[candidate.item.text for candidate in row] for row in ranked] == [["z", "y", "x"], ["x", "y"]]


def test_mistakes() -> None:
    good = {"q": (1.0, 0.0), "x": (1.0, 0.0), "y": (0.0, 1.0)}
    choice = task([("q", ["x", "y"])])
    for change, words in (({"y": (0.0, 0.0)}, "length 0"), ({"x": (float("nan"), 1.0)}, r"\('x', ''\) is not finite")):
        with pytest.raises(ValueError, match=words):
            evaluate_precision(vectors_of({**good, **change}), [choice])
    with pytest.raises(ValueError, match=r"no vector for the item \('y', ''\)"):
        evaluate_precision(vectors_of({"q": (1.0, 0.0), "x": (1.0, 0.0)}), [choice])
    with pytest.raises(ValueError, match="different names"):
        evaluate_precision(vectors_of(good), [choice, choice])
    with pytest.raises(ValueError, match="different names"):
        evaluate_precision(vectors_of(good), [])
    with pytest.raises(ValueError, match="query 1 of task 'a' has no candidate"):
        task([("q", ["x"]), ("q", [])])
    with pytest.raises(ValueError, match="at least one query"):
        task([])
