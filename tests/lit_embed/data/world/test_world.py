import dataclasses
import hashlib
import json
import math
import re
from collections import Counter

import pytest

from lit_core.errors import InputError
from lit_core.presets import preset_tokenizer
from lit_embed.data.world import World, WorldConfig, build_world
from lit_embed.data.world.lexicon import ATTRIBUTE_TYPES, KINDS, RELATIONS
from lit_embed.data.world.wording import words

SMALL = WorldConfig(documents=300, train_questions=400, dev_questions=30, test_questions=60, texts=200, multi_hop=0.3)


@pytest.fixture(scope="module")
def small() -> World:
    return build_world(SMALL)


def tokens(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def bm25_ndcg(world: World) -> float:
    """Return nDCG@10 of a plain BM25 (k1 0.9, b 0.4) on the test questions."""
    documents = {doc_id: Counter(tokens(text)) for doc_id, text in world.corpus.items()}
    lengths = {doc_id: counts.total() for doc_id, counts in documents.items()}
    mean = sum(lengths.values()) / len(lengths)
    frequency = Counter(word for counts in documents.values() for word in counts)
    total = 0.0
    for query_id, text in world.queries["test"].items():
        scores: Counter[str] = Counter()
        for word in tokens(text):
            idf = math.log(1 + (len(documents) - frequency[word] + 0.5) / (frequency[word] + 0.5))
            for doc_id, counts in documents.items():
                if n := counts[word]:
                    scores[doc_id] += idf * n * 1.9 / (n + 0.9 * (0.6 + 0.4 * lengths[doc_id] / mean))
        grades = world.qrels["test"][query_id]
        ranked = sorted(scores, key=lambda doc_id: (-scores[doc_id], doc_id))[:10]
        gain = sum(grades.get(doc_id, 0) / math.log2(rank + 2) for rank, doc_id in enumerate(ranked))
        ideal = sorted(grades.values(), reverse=True)[:10]
        total += gain / sum(grade / math.log2(rank + 2) for rank, grade in enumerate(ideal))
    return total / len(world.queries["test"])


def digest(world: World) -> str:
    parts = (world.corpus, world.queries, world.qrels, world.texts)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def test_equal_configurations_give_equal_bytes(small: World) -> None:
    assert digest(small) == "cd2021049f309186"
    assert build_world(dataclasses.replace(SMALL)) is small
    assert digest(build_world.__wrapped__(SMALL)) == digest(small)
    assert digest(build_world(dataclasses.replace(SMALL, seed=1))) != digest(small)


def test_sizes(small: World) -> None:
    assert len(small.corpus) == len(set(small.corpus.values())) == 300
    assert {split: len(queries) for split, queries in small.queries.items()} == {"train": 400, "dev": 30, "test": 60}
    assert len(small.texts) == 200
    assert all(12 <= len(text.split()) <= 55 for text in small.corpus.values())


def test_judgements_are_what_the_facts_say(small: World) -> None:
    hops = 0
    for split, questions in small.questions.items():
        for query_id, (kind, facts, hop) in questions.items():
            expected: dict[str, int] = {}
            for doc_id, document in small.documents.items():
                entity = small.entities[document.entity]
                if (kind is not None and entity.kind != kind) or any(fact not in document.facts for fact in facts):
                    continue
                if hop is None:
                    expected[doc_id] = 2
                elif document.related and entity.relation is not None and entity.relation[0] == hop.relation:
                    for other_id, other in small.documents.items():
                        known = any(attribute == hop.ask for attribute, _ in other.facts)
                        is_target = other.entity == entity.relation[1]
                        if is_target and known and small.entities[other.entity].kind == hop.target:
                            expected[doc_id] = expected[other_id] = 1
            assert small.qrels[split][query_id] == expected
            assert expected
            hops += hop is not None
    assert 0.2 < hops / 490 < 0.4


def test_passages_state_their_facts_and_no_others(small: World) -> None:
    for doc_id, document in small.documents.items():
        entity, text = small.entities[document.entity], small.corpus[doc_id]
        assert set(document.facts) <= set(entity.facts.items())
        assert entity.name in text
        assert any(form in tokens(text) for form in KINDS[entity.kind].document)
        for attribute, value in document.facts:
            assert any(form in tokens(text) for form in ATTRIBUTE_TYPES[attribute].values[value].document)
        if document.related:
            assert entity.relation is not None
            assert small.entities[entity.relation[1]].name in text
    quiet = build_world(dataclasses.replace(SMALL, distractors=0.0))
    for doc_id, document in quiet.documents.items():
        stated = [
            (attribute, value)
            for attribute, kind in enumerate(ATTRIBUTE_TYPES)
            for value, concept in enumerate(kind.values)
            if set(concept.document) & set(tokens(quiet.corpus[doc_id]))
        ]
        assert sorted(stated) == sorted(document.facts)


def test_siblings_differ_in_one_value_and_some_entities_are_told_twice(small: World) -> None:
    siblings = [row for row, entity in enumerate(small.entities) if entity.changed is not None]
    assert len(siblings) > 50
    for row in siblings[:-1:2]:
        first, second = small.entities[row], small.entities[row + 1]
        assert [t for t in first.facts if first.facts[t] != second.facts[t]] == [first.changed]
        assert (first.kind, first.split) == (second.kind, second.split)
    assert Counter(Counter(document.entity for document in small.documents.values()).values()).keys() == {1, 2}


def test_splits_share_no_question_and_no_relevant_document(small: World) -> None:
    texts = [text for queries in small.queries.values() for text in queries.values()]
    assert len(texts) == len(set(texts))
    for split, judged in small.qrels.items():
        for grades in judged.values():
            assert {small.entities[small.documents[doc_id].entity].split for doc_id in grades} == {split}
    assert not set(small.texts) & {*texts, *small.corpus.values()}
    names = {entity.name for entity in small.entities}
    assert len(names) == len(small.entities)
    assert not any(name.lower() in tokens(text) for text in texts for name in names)


def test_vocabularies_are_disjoint_and_closed(small: World) -> None:
    concepts = [*KINDS, *(value for attribute in ATTRIBUTE_TYPES for value in attribute.values)]
    forms = [form for concept in concepts for side in concept for form in side]
    assert len(forms) == len(set(forms)) == 4 * 20 * 11
    phrases = [*RELATIONS, *(attribute.phrases for attribute in ATTRIBUTE_TYPES)]
    assert not {word for side in phrases for form in [*side.document, *side.question] for word in tokens(form)} & set(
        forms
    )
    names = {entity.name.lower() for entity in small.entities}
    known = {word.lower() for word in small.lexicon()}
    queries = [text for queries in small.queries.values() for text in queries.values()]
    assert {word for text in [*small.corpus.values(), *queries] for word in tokens(text)} <= known | names


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-bert"])
def test_words_are_tokens_of_the_presets(name: str) -> None:
    tokenizer = preset_tokenizer(name)
    single = [len(tokenizer.encode(word, add_special_tokens=False)) == 1 for word in words()]
    assert sum(single) / len(single) >= 0.95


def test_without_overlap_questions_use_no_word_of_the_documents_concepts() -> None:
    world = build_world(dataclasses.replace(SMALL, overlap=0.0))
    said = {form for concept in [*KINDS, *(v for t in ATTRIBUTE_TYPES for v in t.values)] for form in concept.document}
    assert not {word for text in world.queries["test"].values() for word in tokens(text)} & said
    assert {word for text in world.corpus.values() for word in tokens(text)} & said


def test_overlap_is_what_lexical_ranking_lives_on() -> None:
    quality = [bm25_ndcg(build_world(dataclasses.replace(SMALL, overlap=overlap))) for overlap in (0.0, 0.5, 1.0)]
    assert quality[0] < 0.15  # function words alone
    assert quality[0] + 0.1 < quality[1] < quality[2] - 0.1


def test_parts_do_not_move_each_other(small: World) -> None:
    other = build_world(dataclasses.replace(SMALL, overlap=0.9, train_questions=50, texts=3))
    assert other.corpus == small.corpus
    assert other.texts == small.texts[:3]


def test_keyword_questions_are_bare_kinds_and_values() -> None:
    forms = {form for concept in KINDS for side in concept for form in side}
    forms |= {form for t in ATTRIBUTE_TYPES for value in t.values for side in value for form in side}
    world = build_world(dataclasses.replace(SMALL, keywords=1.0, multi_hop=0.0))
    for split, questions in world.questions.items():
        for query_id, question in questions.items():
            words_asked = world.queries[split][query_id].split()
            assert len(words_asked) == (question.kind is not None) + len(question.facts)
            assert set(words_asked) <= forms
    bare = [text for text in world.texts if set(text.split()) <= forms]
    assert 0.1 < len(bare) / len(world.texts) < 0.4  # a fifth of the unpaired texts
    mixed = build_world(dataclasses.replace(SMALL, keywords=0.5))
    share = sum(set(text.split()) <= forms for text in mixed.queries["train"].values()) / 400
    assert 0.2 < share < 0.5  # half of those that are not multi-hop


def test_bad_configurations_are_errors() -> None:
    with pytest.raises(InputError, match=r"field 'world.overlap': must be between 0 and 1, got 1.5"):
        WorldConfig(overlap=1.5)
    with pytest.raises(InputError, match=r"field 'world.documents': must be between 100 and 20000, got 3"):
        WorldConfig(documents=3)
    with pytest.raises(InputError, match=r"field 'world.overlap'.*got nan"):
        WorldConfig(overlap=float("nan"))
    vague = WorldConfig(documents=3000, values=2, facts=10)  # every question has over a hundred answers
    with pytest.raises(InputError, match=r"field 'world.train_questions': only 0 different questions found"):
        build_world(vague)
