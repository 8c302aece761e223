"""Training sets: what each type of task asks, and how its rows are drawn."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lit_embed.data.families.config import FamiliesConfig, TrainTask
from lit_embed.data.families.domains import Domain, Meaning
from lit_embed.data.families.texts import (
    QUESTIONS,
    SENTENCES,
    Phrasing,
    Pool,
    Texts,
    draw_phrasing,
    draw_pool,
    passage,
    question,
    say,
    sentence,
)
from lit_embed.data.records import Example, Passage, content_id
from lit_embed.data.world.lexicon import ATTRIBUTE_TYPES
from lit_embed.retrieval.tasks import TaskType

MIXED = 0.5  # share of passages' words where texts have no sides
QUERIES_PER_PASSAGE = 4
MAX_POSITIVES = 8  # of one example; a cluster has many more


def instruction(kind: TaskType, domain: Domain) -> str:
    """The task in words."""
    first, second = domain.asks()
    return {
        "retrieval": "Find the passage",
        "reranking": "Find the best passage",
        "classification": f"Tell the {first}",
        "clustering": f"Group by {second}",
        "sts": "Find the same meaning",
        "pair_classification": "Find the same question",
    }[kind]


@dataclass(frozen=True)
class Family:
    """What the rows of a set are drawn from.

    Args:
        pool: Passages to answer with.
        templates: How queries are built.
        overlap: Share of passages' words in queries.
        part: The part of its meaning by which a text is told right (1 or 2), or all of it (None).
        shared: Parts of the meaning that negatives share with the query, the most wanted number first.
    """

    pool: Pool
    templates: Sequence[str]
    overlap: float
    part: int | None = None
    shared: tuple[int, ...] = (1, 0)

    def right(self, meaning: Meaning) -> list[int]:
        """Rows of the pool that answer."""
        if self.part is None:
            return self.pool.rows.get(meaning, [])
        return [row for row, other in enumerate(self.pool.meanings) if other[self.part] == meaning[self.part]]

    def wrong(self, rng: random.Random, meaning: Meaning, count: int) -> list[int]:
        """Draw rows of the pool that do not answer."""
        if self.part is None:
            return self.pool.others(rng, meaning, count, self.shared)
        rows = [row for row, other in enumerate(self.pool.meanings) if other[self.part] != meaning[self.part]]
        return rng.sample(rows, min(count, len(rows)))


def train_task(
    config: FamiliesConfig, kind: TaskType, domain: Domain, meanings: Sequence[Meaning], rows: int, texts: Texts
) -> TrainTask:
    """Build a training set.

    Args:
        config: Noise and wording.
        kind: Type of the task.
        domain: Where its words come from.
        meanings: What its texts may mean.
        rows: Examples.
        texts: Keeps all texts different.
    """
    name = f"{domain.name}-{kind}"
    rng = random.Random(f"{config.seed}/{name}/train")
    family = _family(config, kind, domain, meanings, rows, rng, texts)
    examples, about = _examples(
        config, name, domain, meanings, family, rows, rng, texts, "rows", config.near_duplicates
    )
    spoilt = random.Random(f"{config.seed}/{name}/wrong")
    for row in spoilt.sample(range(rows), round(config.wrong * rows)):
        examples[row] = _spoil(examples[row], family, about[row], spoilt)
    return TrainTask(
        name,
        kind,
        examples,
        own_group_only=family.part is not None,
        symmetric=kind in ("clustering", "sts", "pair_classification"),
        instruction=instruction(kind, domain),
    )


def base_task(config: FamiliesConfig, domain: Domain, meanings: Sequence[Meaning], texts: Texts) -> TrainTask:
    """Build the set of a domain on which a base is pre-trained: questions and passages."""
    name = f"{domain.name}-base"
    rng = random.Random(f"{config.seed}/{name}")
    count = max(20, config.base_rows // QUERIES_PER_PASSAGE)
    family = Family(draw_pool(rng, domain, meanings, count, passage, texts, "base_rows"), QUESTIONS, config.overlap)
    examples, _ = _examples(config, name, domain, meanings, family, config.base_rows, rng, texts, "base_rows", 0.0)
    return TrainTask(name, "retrieval", examples, instruction=instruction("retrieval", domain))


def _family(
    config: FamiliesConfig,
    kind: TaskType,
    domain: Domain,
    meanings: Sequence[Meaning],
    rows: int,
    rng: random.Random,
    texts: Texts,
) -> Family:
    if kind == "classification":
        named = [f"{domain.asks()[0]}: {label}" for label in labels(domain, config.values)]
        pool = Pool([Meaning(-1, value, -1) for value in range(config.values)], list(map(_passage, named)))
        return Family(pool, SENTENCES, MIXED, part=1)
    write = {"clustering": sentence(MIXED), "sts": sentence(1.0), "pair_classification": question(1.0)}
    count = max(20, rows // QUERIES_PER_PASSAGE)
    pool = draw_pool(rng, domain, meanings, count, write.get(kind, passage), texts, "rows")
    if kind == "clustering":
        return Family(pool, SENTENCES, MIXED, part=2)
    near = (2, 1, 0) if kind in ("reranking", "pair_classification") else (1, 0)
    return Family(pool, SENTENCES if kind == "sts" else QUESTIONS, config.overlap, shared=near)


def labels(domain: Domain, values: int) -> list[str]:
    """Labels of a domain's classification: the values of its first attribute, in question forms."""
    attribute = ATTRIBUTE_TYPES[domain.attributes[0]]
    return [" or ".join(value.question) for value in attribute.values[:values]]


def _passage(text: str) -> Passage:
    return Passage(content_id(text), text)


def _examples(
    config: FamiliesConfig,
    name: str,
    domain: Domain,
    meanings: Sequence[Meaning],
    family: Family,
    rows: int,
    rng: random.Random,
    texts: Texts,
    field: str,
    near_duplicates: float,
) -> tuple[list[Example], list[Meaning]]:
    """Examples, and what their queries mean."""
    asked = [meaning for meaning in meanings if family.right(meaning)]
    earlier: list[tuple[Meaning, Phrasing]] = []

    def draw() -> tuple[str, tuple[Meaning, Phrasing]]:
        again = earlier and rng.random() < near_duplicates
        meaning, phrasing = rng.choice(
            earlier if again else [(rng.choice(asked), draw_phrasing(rng, family.templates))]
        )
        return say(rng, domain, meaning, phrasing, family.overlap), (meaning, phrasing)

    examples: list[Example] = []
    passages = family.pool.passages
    for row in range(rows):
        query, about = texts.new(draw, field)
        earlier.append(about)
        right = family.right(about[0])
        positives = tuple(passages[r] for r in rng.sample(right, min(MAX_POSITIVES, len(right))))
        negatives = tuple(passages[r] for r in family.wrong(rng, about[0], config.negatives))
        examples.append(Example(f"{name}-{row:05d}", query, positives, negatives))
    return examples, [meaning for meaning, _ in earlier]


def _spoil(example: Example, family: Family, meaning: Meaning, rng: random.Random) -> Example:
    """Put a passage that does not answer in place of the positives: no negative of the example where possible."""
    right, against = set(family.right(meaning)), set(example.negatives)  # an example has not all that is right
    wrong = [passage for row, passage in enumerate(family.pool.passages) if row not in right]
    chosen = rng.choice([passage for passage in wrong if passage not in against] or wrong)
    negatives = tuple(passage for passage in example.negatives if passage != chosen)
    return example._replace(positives=(chosen,), negatives=negatives)
