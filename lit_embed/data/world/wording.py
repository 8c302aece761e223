"""How the built-in world puts facts into words: passages, questions and unpaired sentences."""

import random
import re
from collections.abc import Callable, Sequence

from lit_embed.data.world.lexicon import ATTRIBUTE_TYPES, KINDS, RELATIONS, Concept

Fact = tuple[int, int]  # (attribute type, value), both counted from 0
Side = Callable[[Concept], str]  # chooses the form of a concept


def _words(table: str) -> tuple[str, ...]:
    return tuple(table.split())


# Names are three syllables of 30 each, so that a syllable is shared by many entities and says little of any one.
FIRST = _words("Ba Be Bo Bri Da Do Du Fa Fe Ga Go Gri Ka Ke Ko La Lo Mi Mo Na Ne Ri Ro Sa Su Ta To Tri Va Ze")
MIDDLE = _words("ba be bi da de du fi ga ge gu ka ki ko la li lu ma mi mu na no pa ra ri ru sa ta ti va zi")
LAST = _words(
    "bas ber dan den dor fax gan gor kar kel kin lan lek los mar "
    "mon nak nel nox ran ras rex sin sor tan tek thos var vok zar"
)
OPENINGS = ("{name} is a {kind} {0}.", "The {kind} {name} was {0} and {1}.", "{name}, a {kind} {0}, was {1}.")
STATEMENTS = ("It was {0}.", "It was {0} and {1}.", "By all accounts it was {0}.", "Once {0}, it was later {1}.")
LINKS = ("It {relation} the {kind} {name}.", "Today it {relation} {name}, a {kind}.")
DISTRACTORS = ("Not so {name}, a {kind} {0}.", "Elsewhere {name}, a {kind}, was {0}.", "Compare {name}, a {kind} {0}.")
QUESTIONS = {  # by number of facts; the first ones of each group name the kind
    2: ("which {kind} {0} was {1}", "find the {kind} {0} and {1}", "find the {kind} {v0} {v1}", "the {v0} {kind} {1}"),
    3: ("which {kind} {0} was {v1} {v2}", "{v0} {v1} {kind} {2}", "the {kind} {v0} {v1} {v2}", "{kind} {0} {1} {v2}"),
}
KINDLESS_QUESTIONS = ("what was {0} and {1} {v2}", "anything {0} {1} {2}", "what is {v0} {v1} {2}")
KEYWORDS = {2: "{kind} {v0} {v1}", 3: "{kind} {v0} {v1} {v2}"}  # by number of facts
KINDLESS_KEYWORDS = "{v0} {v1} {v2}"
HOP_QUESTIONS = (
    "what {ask} has the {target} {relation} the {v0} {v1} {kind}",
    "{ask} of the {target} {relation} a {kind} {0} {v1}",
    "find the {ask} of the {target} {relation} the {v0} {kind} {1}",
)
SYNONYMS = ("A {kind} {0} is a {kind} {0}.", "To be {0} is to be {0}.", "A {kind} is also called a {kind}.")
RESTATEMENTS = (
    "A {kind} {0} and {1} is a {kind} {0} and {1}.",
    "Once {0}, it was later {1}: it was {0} and {1}.",
    "{name} {relation} {other}, so {name} is {relation} {other}.",
)
MIXED = ("The {kind} was {0} and {1}.", "A {kind} {0} was {1}.", "It was {0}, {1} and {2}.")


def entity_name(rng: random.Random) -> str:
    """Make a capitalised pseudo-word of three syllables."""
    return rng.choice(FIRST) + rng.choice(MIDDLE) + rng.choice(LAST)


def words() -> list[str]:
    """Return every word that passages, questions and texts are made of, names excepted, sorted."""
    concepts = [*KINDS, *RELATIONS, *(c for t in ATTRIBUTE_TYPES for c in (t.phrases, *t.values))]
    texts = [form for concept in concepts for side in concept for form in side]
    texts += [t.ask for t in ATTRIBUTE_TYPES]
    for group in (OPENINGS, STATEMENTS, LINKS, DISTRACTORS, *QUESTIONS.values(), KINDLESS_QUESTIONS, HOP_QUESTIONS):
        texts += group
    texts += [*SYNONYMS, *RESTATEMENTS, *MIXED, "an An"]
    return sorted({word for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"{\w+}", " ", text))})


def sides(rng: random.Random, document_share: float) -> Side:
    """Return a chooser that takes a document form with probability ``document_share``, else a question form."""
    return lambda concept: rng.choice(concept.document if rng.random() < document_share else concept.question)


def state(fact: Fact, side: Side) -> str:
    """Put a fact into a phrase, the type's words and the value's chosen apart."""
    attribute = ATTRIBUTE_TYPES[fact[0]]
    return side(attribute.phrases).format(side(attribute.values[fact[1]]))


def fill(template: str, kind: int | None, facts: Sequence[Fact], side: Side, **slots: str) -> str:
    """Fill a template: ``{0}`` is the first fact as a phrase, ``{v0}`` its value alone, ``{kind}`` the kind."""
    if kind is not None:
        slots["kind"] = side(KINDS[kind])
    values = {f"v{i}": side(ATTRIBUTE_TYPES[t].values[v]) for i, (t, v) in enumerate(facts) if f"{{v{i}}}" in template}
    phrases = [state(fact, side) if f"{{{i}}}" in template else "" for i, fact in enumerate(facts)]
    return article(template.format(*phrases, **values, **slots))


def article(text: str) -> str:
    """Write ``an`` for ``a`` before a vowel."""
    return re.sub(r"\b([Aa])(?= [aeiou])", r"\1n", text)


def needs(template: str) -> int:
    """Count the facts that a template states."""
    return len(re.findall(r"{v?\d}", template))


def passage(
    rng: random.Random,
    name: str,
    kind: int,
    facts: Sequence[Fact],
    link: tuple[int, str, int] | None,
    distractor: tuple[str, int, Fact] | None,
) -> str:
    """Write a passage that states every given fact once, in random order and in document forms.

    Args:
        rng: Chooses order, templates and forms.
        name: Name of the entity.
        kind: Its kind.
        facts: What to state of it, at least two.
        link: Relation, name and kind of the related entity.
        distractor: Name, kind and one fact of another entity to mention.
    """
    side = sides(rng, 1.0)
    left = rng.sample(list(facts), len(facts))
    opening = rng.choice(OPENINGS)
    sentences = [fill(opening, kind, [left.pop() for _ in range(needs(opening))], side, name=name)]
    others: list[str] = []
    while left:
        template = rng.choice([template for template in STATEMENTS if needs(template) <= len(left)])
        others.append(fill(template, None, [left.pop() for _ in range(needs(template))], side))
    if link is not None:
        relation, other, other_kind = link
        others.append(fill(rng.choice(LINKS), other_kind, (), side, relation=side(RELATIONS[relation]), name=other))
    if distractor is not None:
        other, other_kind, fact = distractor
        others.append(fill(rng.choice(DISTRACTORS), other_kind, [fact], side, name=other))
    rng.shuffle(others)
    return " ".join(sentences + others)


def unpaired_text(rng: random.Random, draw_fact: Callable[[], list[Fact]], kinds: int, keywords: float = 0.0) -> str:
    """Write one sentence about nothing in particular that shows how the two vocabularies go together.

    Args:
        rng: Chooses templates and forms.
        draw_fact: Draws three random facts of different types.
        kinds: Number of kinds to draw from.
        keywords: Share of the question-like texts that are bare words.
    """
    facts, kind = draw_fact(), rng.randrange(kinds)
    family = rng.choice((SYNONYMS, RESTATEMENTS, MIXED, MIXED, QUESTIONS[2]))
    template = rng.choice(family)
    if family is QUESTIONS[2] and keywords > 0 and rng.random() < keywords:
        template = KEYWORDS[rng.choice((2, 3))]
    if family is MIXED or family is QUESTIONS[2]:
        return fill(template, kind, facts, sides(rng, 0.5))
    relation, names = rng.choice(RELATIONS), {"name": entity_name(rng), "other": entity_name(rng)}
    orders = [sides(rng, 1.0), sides(rng, 0.0)]  # the relation's forms differ in grammar, so its order is fixed
    if "{relation}" not in template:
        rng.shuffle(orders)
    slots = [names | {"relation": side(relation)} for side in orders]
    joint = re.search(r" is (?=a|to|{)| is also called |: |, so ", template)
    if joint is None:
        raise ValueError(f"the template has no second half: {template}")
    halves = (template[: joint.start()], template[joint.start() :])
    return article(
        "".join(fill(h, kind, facts, side, **slot) for h, side, slot in zip(halves, orders, slots, strict=True))
    )
