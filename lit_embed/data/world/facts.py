"""What is true in the built-in world, what each document says of it, and which documents answer a question."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lit_embed.data.world.lexicon import ATTRIBUTE_TYPES, RELATIONS
from lit_embed.data.world.wording import Fact, entity_name

SPLITS = ("train", "dev", "test")
_FAMILIES = (*("train",) * 7, "dev", "test", "test")  # the splits of every ten families
RELATED_SHARE = 0.6  # of the entities that have a relation to another one


@dataclass
class Entity:
    """A thing with a name.

    Args:
        name: Unique pseudo-word.
        kind: Row of ``lexicon.KINDS``.
        facts: Value by attribute type, both rows of ``lexicon.ATTRIBUTE_TYPES``.
        split: Whose questions may ask for it.
        relation: Row of ``lexicon.RELATIONS`` and number of the related entity, of the same split.
        changed: The attribute type in which it differs from its counterfactual sibling.
    """

    name: str
    kind: int
    facts: dict[int, int]
    split: str
    relation: tuple[int, int] | None = None
    changed: int | None = None


class Document(NamedTuple):
    """What a passage states: its subject, some of the subject's facts, and perhaps its relation."""

    entity: int
    facts: tuple[Fact, ...]
    related: bool


class Question(NamedTuple):
    """What a question asks for.

    A passage satisfies a single-hop question if its subject has the kind (``None``: any) and it states all facts. A
    multi-hop question (``hop``) asks for attribute ``ask`` of the entity of kind ``target`` to which such a subject has
    the relation; two passages answer it together, one stating that relation and one stating the attribute.
    """

    kind: int | None
    facts: tuple[Fact, ...]
    hop: "Hop | None" = None


class Hop(NamedTuple):
    """The second half of a multi-hop question: a relation, the related entity's kind, the attribute type asked for."""

    relation: int
    target: int
    ask: int


class FactIndex:
    """Finds the documents that answer a question.

    Args:
        entities: All entities.
        documents: All documents; they are known by their position.
    """

    def __init__(self, entities: Sequence[Entity], documents: Sequence[Document]) -> None:
        self.entities, self.documents = entities, documents
        self.of_entity: dict[int, list[int]] = defaultdict(list)
        self._of_kind: dict[int, set[int]] = defaultdict(set)
        self._of_fact: dict[Fact, set[int]] = defaultdict(set)
        for row, document in enumerate(documents):
            self.of_entity[document.entity].append(row)
            self._of_kind[entities[document.entity].kind].add(row)
            for fact in document.facts:
                self._of_fact[fact].add(row)

    def relevant(self, question: Question) -> dict[int, int]:
        """Return the grade of each document that answers the question.

        Returns:
            2 for a document that does so alone (single-hop), 1 for each one of a pair that does so together.
        """
        kinds = [] if question.kind is None else [self._of_kind[question.kind]]
        rows = sorted(set.intersection(*kinds, *(self._of_fact[fact] for fact in question.facts)))
        if question.hop is None:
            return dict.fromkeys(rows, 2)
        grades: dict[int, int] = {}
        for row in rows:
            answers = self._answers(self.documents[row], question.hop)
            grades |= dict.fromkeys([row, *answers] if answers else [], 1)
        return grades

    def _answers(self, document: Document, hop: Hop) -> list[int]:
        relation = self.entities[document.entity].relation if document.related else None
        if relation is None or relation[0] != hop.relation or self.entities[relation[1]].kind != hop.target:
            return []
        return [row for row in self.of_entity[relation[1]] if hop.ask in dict(self.documents[row].facts)]


def draw_facts(rng: random.Random, count: int, values: int) -> dict[int, int]:
    """Draw ``count`` attribute types and a value of each."""
    return {kind: rng.randrange(values) for kind in sorted(rng.sample(range(len(ATTRIBUTE_TYPES)), count))}


def draw_entities(
    rng: random.Random, documents: int, kinds: int, values: int, facts: int, siblings: float, repeats: float
) -> tuple[list[Entity], list[int]]:
    """Draw families of entities until they fill the wanted number of documents.

    Args:
        rng: Draws everything.
        documents: Number of documents wanted.
        kinds: Number of kinds.
        values: Number of values of an attribute type.
        facts: Number of facts of an entity.
        siblings: Share of entities with a counterfactual sibling, which differs in one value.
        repeats: Share of entities with a second document.

    Returns:
        The entities, and the entity of each document.
    """
    entities: list[Entity] = []
    subjects: list[int] = []
    names: set[str] = set()
    family = 0
    while len(subjects) < documents:
        members = [Entity("", rng.randrange(kinds), draw_facts(rng, facts, values), _FAMILIES[family % len(_FAMILIES)])]
        if rng.random() < siblings:
            first = members[0]
            first.changed = rng.choice(sorted(first.facts))
            value = (first.facts[first.changed] + rng.randrange(1, values)) % values
            other = first.facts | {first.changed: value}
            members.append(Entity("", first.kind, other, first.split, changed=first.changed))
        for member in members:
            while member.name in names or not member.name:
                member.name = entity_name(rng)
            names.add(member.name)
            subjects += [len(entities)] * (2 if rng.random() < repeats else 1)
            entities.append(member)
        family += 1
    subjects = subjects[:documents]
    del entities[subjects[-1] + 1 :]
    _relate(rng, entities)
    return entities, subjects


def _relate(rng: random.Random, entities: list[Entity]) -> None:
    for split in SPLITS:
        rows = [row for row, entity in enumerate(entities) if entity.split == split]
        for row in rows:
            if len(rows) > 1 and rng.random() < RELATED_SHARE:
                target = rng.choice([other for other in rows if other != row])
                entities[row].relation = (rng.randrange(len(RELATIONS)), target)


def draw_documents(
    rng: random.Random, entities: Sequence[Entity], subjects: Iterable[int], drop: float
) -> list[Document]:
    """Decide what each document states: with probability ``drop`` one fact less than is known, in random order."""
    documents = []
    for subject in subjects:
        facts = list(entities[subject].facts.items())
        if rng.random() < drop and len(facts) > 3:
            facts.remove(rng.choice(facts))
        related = entities[subject].relation is not None and rng.random() < 0.9
        documents.append(Document(subject, tuple(facts), related))
    rng.shuffle(documents)
    return documents
