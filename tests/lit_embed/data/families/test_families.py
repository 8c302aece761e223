"""The built-in families: an oracle reads every text and checks what is said to be right or wrong of it."""

import hashlib
import math
import re
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_embed.data.families import DOMAINS, Families, FamiliesConfig, TrainTask, build_families
from lit_embed.data.records import content_id
from lit_embed.data.world.lexicon import ATTRIBUTE_TYPES, KINDS
from lit_embed.retrieval.bm25 import BM25
from lit_embed.retrieval.evaluate import evaluate
from lit_embed.retrieval.tasks import (
    Classification,
    Clustering,
    EvalTask,
    PairClassification,
    Reranking,
    Retrieval,
    Sts,
)

SMALL = FamiliesConfig(rows=400, base_rows=80)


@pytest.fixture(scope="module")
def small() -> Families:
    return build_families(SMALL)


@pytest.fixture(scope="module")
def whole() -> Families:
    return build_families(FamiliesConfig())


def train_texts(task: TrainTask) -> set[str]:
    passages = (p for example in task.examples for p in (*example.positives, *example.negatives))
    return {example.query for example in task.examples} | {passage.text for passage in passages}


def eval_texts(tasks: list[EvalTask]) -> set[str]:
    return {text for task in tasks for text in (*task.queries.values(), *task.passages.values())}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


@cache
def concepts(domain: str) -> dict[str, tuple[int, int]]:
    """Word -> (part of the meaning, value), for the kinds and the two attributes of a domain."""
    tables = [KINDS, *(ATTRIBUTE_TYPES[row].values for row in DOMAINS[domain].attributes)]
    return {
        form: (part, value)
        for part, table in enumerate(tables)
        for value, concept in enumerate(table)
        if part or value in DOMAINS[domain].kinds
        for side in concept
        for form in side
    }


@cache
def meaning(domain: str, text: str) -> tuple[int, int, int]:
    """Read kind and values off the words of a text; each is stated exactly once."""
    found = [concepts(domain)[word] for word in words(text) if word in concepts(domain)]
    assert sorted(part for part, _ in found) == [0, 1, 2], text
    kind, first, second = (value for _, value in sorted(found))
    return kind, first, second


def label(domain: str, text: str) -> int:
    """Read the value off the text of a label."""
    found = {concepts(domain)[word] for word in words(text) if word in concepts(domain)}
    ((part, value),) = found
    assert part == 1
    return value


def answers(task: TrainTask, query: str, passage: str) -> bool:
    domain = task.name.split("-")[0]
    asked = meaning(domain, query)
    if task.type == "classification":
        return label(domain, passage) == asked[1]
    if task.type == "clustering":
        return meaning(domain, passage)[2] == asked[2]
    return meaning(domain, passage) == asked


def digest(families: Families) -> str:
    parts = (families.train, families.base, families.validation, families.test)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def test_equal_configurations_give_equal_bytes(small: Families) -> None:
    assert digest(small) == "c796923e4ca34910"
    assert build_families(replace(SMALL)) is small
    assert digest(build_families.__wrapped__(SMALL)) == digest(small)
    assert digest(build_families.__wrapped__(replace(SMALL, seed=1))) != digest(small)


def test_noise_and_sizes_of_training_leave_evaluation_as_it_is(small: Families) -> None:
    other = build_families.__wrapped__(replace(SMALL, rows=200, base_rows=40, wrong=0.3, near_duplicates=0.5))
    assert (other.test, other.validation) == (small.test, small.validation)


def test_sets_have_clearly_different_sizes_and_all_types(small: Families) -> None:
    assert [(task.name, len(task.examples)) for task in small.train] == [
        ("travel-retrieval", 400),
        ("household-retrieval", 250),
        ("workshop-reranking", 180),
        ("travel-classification", 150),
        ("household-sts", 120),
        ("workshop-clustering", 100),
        ("travel-pair_classification", 80),
        ("workshop-retrieval", 60),
    ]
    assert [(task.name, len(task.examples)) for task in small.base] == [(f"{name}-base", 80) for name in DOMAINS]
    assert {task.type for task in small.train if task.own_group_only} == {"classification", "clustering"}
    assert {task.type for task in small.train if task.symmetric} == {"clustering", "sts", "pair_classification"}
    assert all(task.instruction for task in (*small.train, *small.base, *small.validation, *small.test))


def test_other_domains_can_be_held_out() -> None:
    families = build_families.__wrapped__(replace(SMALL, held_out=("travel",)))
    used = {task.name.split("-")[0] for task in families.train}
    assert used == {"household", "workshop", "festival", "court"}
    assert {task.name.split("-")[0] for task in families.test if task.domain == "out"} == {"travel"}
    assert len({task.name for task in families.train}) == len({task.name for task in families.test}) - 6 == 8


def test_every_training_row_is_right_and_its_negatives_are_wrong(small: Families) -> None:
    for task in (*small.train, *small.base):
        queries = [example.query for example in task.examples]
        assert len(set(queries)) == len(queries)
        for example in task.examples:
            assert example.positives
            assert 1 <= len(example.negatives) <= SMALL.negatives
            assert all(answers(task, example.query, passage.text) for passage in example.positives)
            assert not any(answers(task, example.query, passage.text) for passage in example.negatives)
            assert all(p.doc_id == content_id(p.text) for p in (*example.positives, *example.negatives))
            assert example.query not in {p.text for p in (*example.positives, *example.negatives)}


def test_near_misses_share_two_parts(whole: Families) -> None:
    task = next(task for task in whole.train if task.type == "reranking")
    shared = Counter(
        sum(a == b for a, b in zip(meaning("workshop", e.query), meaning("workshop", p.text), strict=True))
        for e in task.examples
        for p in e.negatives
    )
    assert shared[2] > 0.5 * shared.total()


def test_judgements_of_evaluation_are_those_of_the_words(small: Families) -> None:
    for task in (*small.test, *small.validation):
        domain = task.name.split("-")[0]
        known = {i: meaning(domain, text) for i, text in (*task.queries.items(), *task.passages.items())}
        if isinstance(task, Retrieval):
            for query in task.queries:
                assert set(task.qrels[query]) == {p for p in task.passages if known[p] == known[query]}
        elif isinstance(task, Reranking):
            for query, judged in task.candidates.items():
                assert {p: int(known[p] == known[query]) for p in judged} == judged
                assert {p for p in task.passages if known[p] == known[query]} <= set(judged)
                assert len(judged) == 10
        elif isinstance(task, Classification):
            assert {i: label(domain, name) for i, name in {**task.train, **task.test}.items()} == {
                i: values[1] for i, values in known.items()
            }
        elif isinstance(task, Clustering):
            assert {i: int(name) for i, name in task.labels.items()} == {i: m[2] for i, m in known.items()}
        else:
            assert isinstance(task, Sts | PairClassification)
            parts = [sum(a == b for a, b in zip(known[x], known[y], strict=True)) for x, y, _ in task.pairs]
            expected = parts if isinstance(task, Sts) else [int(number == 3) for number in parts]
            assert [gold for *_, gold in task.pairs] == expected
            assert len(set(expected)) == (4 if isinstance(task, Sts) else 2)


def test_no_text_and_no_meaning_of_evaluation_is_trained_on(whole: Families) -> None:
    trained = {text for task in (*whole.train, *whole.base) for text in train_texts(task)}
    parts = [trained, eval_texts(whole.validation), eval_texts(whole.test)]
    for first in range(3):
        for second in range(first):
            assert not parts[first] & parts[second]
    seen = {
        (domain, meaning(domain, text))
        for task in (*whole.train, *whole.base)
        if task.type != "classification"
        for domain in [task.name.split("-")[0]]
        for text in train_texts(task)
    }
    for task in (*whole.validation, *whole.test):
        domain = task.name.split("-")[0]
        assert not {(domain, meaning(domain, text)) for text in eval_texts([task])} & seen


def test_held_out_domains_are_met_by_the_base_alone(whole: Families) -> None:
    out = {task.name.split("-")[0] for task in whole.test if task.domain == "out"}
    assert out == set(whole.config.held_out)
    assert not out & {task.name.split("-")[0] for task in whole.train}
    vocabulary = {word for task in whole.train for text in train_texts(task) for word in words(text)}
    assert not vocabulary & {word for domain in out for word in concepts(domain)}
    assert {task.name.split("-")[0] for task in whole.base} == set(DOMAINS)


def test_evaluation_is_small(whole: Families) -> None:
    assert len(eval_texts(whole.test)) < 3000
    assert all(len(task.queries) <= 160 and len(task.passages) <= 400 for task in whole.test)
    assert max(len(text.split()) for text in eval_texts(whole.test)) < 25
    assert len({task.name for task in whole.test}) == len(whole.test) == len(whole.validation)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_wrong_is_the_share_of_wrong_rows(small: Families, share: float) -> None:
    noisy = build_families.__wrapped__(replace(SMALL, wrong=share))
    assert noisy.base == small.base
    for clean, task in zip(small.train, noisy.train, strict=True):
        changed = 0
        for before, after in zip(clean.examples, task.examples, strict=True):
            if before == after:
                continue
            changed += 1
            assert before.query == after.query
            (positive,) = after.positives
            assert not answers(task, after.query, positive.text)
            assert after.negatives
            assert positive not in after.negatives
        assert changed == round(share * len(task.examples))


def test_wrong_leaves_a_negative_where_a_set_has_few_labels() -> None:
    for negatives in (1, 7):
        tight = build_families.__wrapped__(replace(SMALL, rows=200, values=5, wrong=1.0, negatives=negatives))
        assert all(example.negatives for task in tight.train for example in task.examples)


def test_wrong_is_wrong_where_a_cluster_has_more_texts_than_an_example() -> None:
    """Ten texts of each of five labels are right, of which an example has eight."""
    noisy = build_families.__wrapped__(replace(SMALL, rows=800, values=5, wrong=1.0))
    task = next(task for task in noisy.train if task.type == "clustering")
    assert not any(answers(task, example.query, passage.text) for example in task.examples
                   for passage in (*example.positives, *example.negatives))  # fmt: skip


def test_near_duplicates_ask_for_few_things() -> None:
    again = build_families.__wrapped__(replace(SMALL, near_duplicates=0.9)).train[0]
    fresh = build_families(SMALL).train[0]
    asked = [{meaning("travel", e.query) for e in task.examples} for task in (fresh, again)]
    assert len(asked[0]) > 90  # of a hundred passages
    assert len(asked[1]) < 60  # about forty new ones
    assert len({e.query for e in again.examples}) == len(again.examples)


def bag_of_words(task: EvalTask) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Counts of words, scaled by their rarity in the task."""
    sides = (task.queries, task.passages)
    bags = [{text_id: Counter(words(text)) for text_id, text in side.items()} for side in sides]
    frequency = Counter(word for side in bags for bag in side.values() for word in bag)
    place = {word: column for column, word in enumerate(sorted(frequency))}
    total = sum(map(len, bags))

    def vector(bag: Counter[str]) -> Tensor:
        values = torch.zeros(len(place))
        for word, count in bag.items():
            values[place[word]] = count * math.log(total / frequency[word])
        return values

    first, second = ({text_id: vector(bag) for text_id, bag in side.items()} for side in bags)
    return first, second


def noise(task: EvalTask) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    first, second = (
        {text_id: torch.randn(64, generator=generator) for text_id in side} for side in (task.queries, task.passages)
    )
    return first, second


def test_words_alone_are_above_chance_and_leave_much_to_learn(whole: Families) -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    for task in whole.test:
        chance, lexical = (task.score(*vectors(task))[task.main] for vectors in (noise, bag_of_words))
        assert chance < lexical < 0.85, (task.name, chance, lexical)
        found.setdefault(task.type, []).append((chance, lexical))
    for values in found.values():
        chance, lexical = (sum(column) / len(values) for column in zip(*values, strict=True))
        assert lexical > chance + 0.02, found


def test_bm25_finds_some_passages(whole: Families) -> None:
    tasks = [task for task in whole.test if isinstance(task, Retrieval)]
    assert len(tasks) == 5
    for task in tasks:
        run = BM25(dict(task.passages)).search(task.queries, 10)
        assert 0.1 < evaluate(run, task.qrels, ["ndcg@10"])["ndcg@10"] < 0.7


BAD = {
    "rows": 79,
    "base_rows": 0,
    "wrong": 1.01,
    "near_duplicates": -0.1,
    "negatives": 0,
    "overlap": 2.0,
    "values": 21,
    "test_queries": 101,
}


@pytest.mark.parametrize("field", BAD)
def test_a_field_out_of_range_is_named(field: str) -> None:
    with pytest.raises(InputError, match=rf"families.{field}.*must be between .* got"):
        replace(FamiliesConfig(), **{field: BAD[field]})


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (("moon",), "no domain 'moon'; choose from travel"),
        ((), "one or two"),
        (("court",) * 2, "one or two"),
        (("court", "travel", "festival"), "one or two"),
    ],
)
def test_held_out_domains_are_checked(domains: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FamiliesConfig(held_out=domains)


def test_words_that_run_out_are_told() -> None:
    with pytest.raises(InputError, match=r"families.rows.*more different texts than there are words for"):
        build_families.__wrapped__(FamiliesConfig(rows=20000, base_rows=10, values=5, overlap=0.0))
