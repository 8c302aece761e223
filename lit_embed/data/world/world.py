"""The built-in collection: a seeded procedural world of named things, passages about them and questions for them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from lit_core.errors import InputError
from lit_embed.data.world import wording
from lit_embed.data.world.facts import (
    SPLITS,
    Document,
    Entity,
    FactIndex,
    Hop,
    Question,
    draw_documents,
    draw_entities,
    draw_facts,
)
from lit_embed.data.world.lexicon import ATTRIBUTE_TYPES, KINDS, RELATIONS

MAX_RELEVANT = 10  # documents of one question; a vaguer question is not asked
DROPPED_FACT = 0.3  # share of documents that leave out one fact
MAX_MISSES = 2000  # draws in a row without a new question, after which there are no more


@dataclass(frozen=True)
class WorldConfig:
    """Everything the world depends on; equal configurations give equal bytes.

    Args:
        seed: Seed of all draws.
        documents: Passages; seven tenths are about entities of training, the others make up the corpus of evaluation.
        train_questions: Training questions.
        dev_questions: Validation questions.
        test_questions: Test questions.
        texts: Unpaired sentences for language modelling.
        overlap: Probability that a question says a word or phrase as documents do; 0 leaves a lexical ranker only
            function words to match.
        keywords: Share of the other questions that are bare words, kind and values, as search engines get them.
        multi_hop: Share of questions that ask for an attribute of a related entity.
        near_duplicates: Share of entities that a second passage tells again in other words.
        counterfactuals: Share of entities with a sibling that differs in one attribute (hard negatives).
        distractors: Share of passages that mention another entity's kind and one of its facts.
        facts: Attributes of an entity, of 10.
        values: Values of an attribute and kinds of entity, of 20; fewer make entities more alike.

    Raises:
        InputError: A field is out of range.
    """

    seed: int = 0
    documents: int = 4000
    train_questions: int = 8000
    dev_questions: int = 100
    test_questions: int = 300
    texts: int = 3000
    overlap: float = 0.5
    keywords: float = 0.0
    multi_hop: float = 0.15
    near_duplicates: float = 0.25
    counterfactuals: float = 0.4
    distractors: float = 0.3
    facts: int = 4
    values: int = 10

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "documents": (100, 20000),
            "train_questions": (0, 200000),
            "dev_questions": (0, 20000),
            "test_questions": (0, 20000),
            "texts": (0, 200000),
            "overlap": (0, 1),
            "keywords": (0, 1),
            "multi_hop": (0, 1),
            "near_duplicates": (0, 1),
            "counterfactuals": (0, 1),
            "distractors": (0, 1),
            "facts": (3, len(ATTRIBUTE_TYPES)),
            "values": (2, len(KINDS)),
        }
        for name, (low, high) in ranges.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise InputError(f"must be between {low} and {high}, got {value}", field=f"world.{name}")


@dataclass(frozen=True)
class World:
    """The collection and the facts behind it.

    Args:
        config: What it was built from.
        entities: All things.
        documents: What each passage states, by document id.
        questions: What each question asks, by split and query id.
        corpus: Text of each passage, by document id.
        queries: Text of each question, by split and query id.
        qrels: Grade of each relevant document, by split and query id; see ``FactIndex.relevant``.
        texts: Unpaired sentences; none of them is a question or a passage.
    """

    config: WorldConfig
    entities: list[Entity]
    documents: dict[str, Document]
    questions: dict[str, dict[str, Question]]
    corpus: dict[str, str]
    queries: dict[str, dict[str, str]]
    qrels: dict[str, dict[str, dict[str, int]]]
    texts: list[str]

    def lexicon(self) -> list[str]:
        """Return every word of the collection but the entities' names, sorted."""
        return wording.words()


@lru_cache(maxsize=4)
def build_world(config: WorldConfig | None = None) -> World:
    """Build the world of a configuration; the last few are kept, so treat the result as read-only.

    Raises:
        InputError: The documents do not allow as many different questions as wanted.
    """
    config = config or WorldConfig()
    entities, subjects = draw_entities(
        _stream(config, "entities"),
        config.documents,
        config.values,
        config.values,
        config.facts,
        config.counterfactuals,
        config.near_duplicates,
    )
    documents = draw_documents(_stream(config, "documents"), entities, subjects, DROPPED_FACT)
    ids = [f"d{row:05d}" for row in range(len(documents))]
    rng = _stream(config, "passages")
    corpus = {
        doc_id: _passage(rng, config, entities, document) for doc_id, document in zip(ids, documents, strict=True)
    }
    index = FactIndex(entities, documents)
    taken: set[str] = set()
    queries: dict[str, dict[str, str]] = {}
    questions: dict[str, dict[str, Question]] = {}
    for split, count in zip(SPLITS, (config.train_questions, config.dev_questions, config.test_questions), strict=True):
        drawn = _questions(_stream(config, f"questions/{split}"), config, index, split, count, taken)
        queries[split] = {f"{split}-{row:05d}": text for row, (text, _) in enumerate(drawn)}
        questions[split] = {f"{split}-{row:05d}": question for row, (_, question) in enumerate(drawn)}
    qrels = {
        split: {
            query_id: {ids[row]: grade for row, grade in index.relevant(question).items()}
            for query_id, question in of.items()
        }
        for split, of in questions.items()
    }
    texts = _texts(_stream(config, "texts"), config, taken)
    by_id = dict(zip(ids, documents, strict=True))
    return World(config, entities, by_id, questions, corpus, queries, qrels, texts)


def _stream(config: WorldConfig, name: str) -> random.Random:
    """One stream of draws for each part, so that the size of one part leaves the others as they are."""
    return random.Random(f"{config.seed}/{name}")


def _passage(rng: random.Random, config: WorldConfig, entities: Sequence[Entity], document: Document) -> str:
    entity, link = entities[document.entity], None
    if document.related and entity.relation is not None:
        relation, target = entity.relation
        link = (relation, entities[target].name, entities[target].kind)
    other = None
    if rng.random() < config.distractors:
        avoid = {document.entity, -1 if entity.relation is None else entity.relation[1]}
        mentioned = entities[next(row for row in iter(lambda: rng.randrange(len(entities)), -1) if row not in avoid)]
        other = (mentioned.name, mentioned.kind, rng.choice(list(mentioned.facts.items())))
    return wording.passage(rng, entity.name, entity.kind, document.facts, link, other)


def _questions(
    rng: random.Random, config: WorldConfig, index: FactIndex, split: str, count: int, taken: set[str]
) -> list[tuple[str, Question]]:
    """Draw questions with new texts, all of whose relevant documents are about entities of the split."""
    rows = [row for row, document in enumerate(index.documents) if index.entities[document.entity].split == split]
    hops = [row for row in rows if index.documents[row].related]
    drawn: list[tuple[str, Question]] = []
    misses = 0
    while len(drawn) < count and misses < MAX_MISSES:
        misses += 1
        multi = rng.random() < config.multi_hop and bool(hops)
        question, template = _question(rng, index, rng.choice(hops if multi else rows), multi, config.keywords)
        relevant = index.relevant(question)
        subjects = [index.entities[index.documents[row].entity] for row in relevant]
        if not 0 < len(relevant) <= MAX_RELEVANT or any(entity.split != split for entity in subjects):
            continue
        text = _question_text(rng, config.overlap, question, template)
        if text not in taken:
            taken.add(text)
            drawn.append((text, question))
            misses = 0
    if len(drawn) < count:
        raise InputError(
            f"only {len(drawn)} different questions found in {config.documents} documents; ask for fewer, or raise "
            "world.documents or world.values",
            field=f"world.{split}_questions",
        )
    return drawn


def _question(rng: random.Random, index: FactIndex, row: int, multi: bool, keywords: float) -> tuple[Question, str]:
    """Draw what to ask of a document and the template to ask it with."""
    document = index.documents[row]
    entity = index.entities[document.entity]
    if multi and entity.relation is not None:
        relation, target = entity.relation
        template = rng.choice(wording.HOP_QUESTIONS)
        hop = Hop(relation, index.entities[target].kind, rng.choice(sorted(index.entities[target].facts)))
        return Question(entity.kind, _asked(rng, document, entity, 2), hop), template
    bare = keywords > 0 and rng.random() < keywords
    if rng.random() < 0.15:
        question = Question(None, _asked(rng, document, entity, 3))
        return question, wording.KINDLESS_KEYWORDS if bare else rng.choice(wording.KINDLESS_QUESTIONS)
    count = rng.choice((2, 3, 3))
    question = Question(entity.kind, _asked(rng, document, entity, count))
    return question, wording.KEYWORDS[count] if bare else rng.choice(wording.QUESTIONS[count])


def _asked(rng: random.Random, document: Document, entity: Entity, count: int) -> tuple[tuple[int, int], ...]:
    """Draw the facts to ask for; half of the time with the one that tells the entity from its sibling."""
    facts = rng.sample(document.facts, count)
    telling = [fact for fact in document.facts if fact[0] == entity.changed]
    if telling and telling[0] not in facts and rng.random() < 0.5:
        facts[rng.randrange(count)] = telling[0]
    return tuple(facts)


def _question_text(rng: random.Random, overlap: float, question: Question, template: str) -> str:
    side = wording.sides(rng, overlap)
    slots: dict[str, str] = {}
    if question.hop is not None:
        slots["ask"] = ATTRIBUTE_TYPES[question.hop.ask].ask
        slots["target"] = side(KINDS[question.hop.target])
        slots["relation"] = side(RELATIONS[question.hop.relation])
    return wording.fill(template, question.kind, question.facts, side, **slots)


def _texts(rng: random.Random, config: WorldConfig, avoid: set[str]) -> list[str]:
    texts: list[str] = []
    while len(texts) < config.texts:
        text = wording.unpaired_text(
            rng, lambda: list(draw_facts(rng, 3, config.values).items()), config.values, config.keywords
        )
        if text not in avoid:
            texts.append(text)
    return texts
