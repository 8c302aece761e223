"""Texts of a domain: passages with names, questions, plain sentences; and pools of them to draw from."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

from lit_core.errors import InputError
from lit_embed.data.families.domains import Domain, Meaning
from lit_embed.data.records import Passage, content_id
from lit_embed.data.world import wording

T = TypeVar("T")
MAX_MISSES = 500  # draws in a row of texts that exist already, after which there are no more
QUESTIONS = wording.QUESTIONS[2]
SENTENCES = (
    *wording.MIXED[:2],
    "It was a {kind} {0} and {1}.",
    "A {kind}, {0}, {1}.",
    "Someone saw the {kind} {0} and {1}.",
)


class Phrasing(NamedTuple):
    """How a text is built, its words apart: a template and the order of the facts."""

    template: str
    swapped: bool


Writer = Callable[[random.Random, Domain, Meaning], str]


def draw_phrasing(rng: random.Random, templates: Sequence[str]) -> Phrasing:
    """Draw a template and an order."""
    return Phrasing(rng.choice(templates), rng.random() < 0.5)


def say(rng: random.Random, domain: Domain, meaning: Meaning, phrasing: Phrasing, overlap: float) -> str:
    """Put a meaning into words; ``overlap`` is the probability of a word that passages use."""
    facts = domain.facts(meaning)[:: -1 if phrasing.swapped else 1]
    return wording.fill(phrasing.template, meaning.kind, facts, wording.sides(rng, overlap))


def passage(rng: random.Random, domain: Domain, meaning: Meaning) -> str:
    """Write a passage on a thing with a name."""
    return wording.passage(rng, wording.entity_name(rng), meaning.kind, domain.facts(meaning), None, None)


def sentence(overlap: float) -> Writer:
    """Write sentences on a thing without a name."""
    return lambda rng, domain, meaning: say(rng, domain, meaning, draw_phrasing(rng, SENTENCES), overlap)


def question(overlap: float) -> Writer:
    """Write questions for a thing."""
    return lambda rng, domain, meaning: say(rng, domain, meaning, draw_phrasing(rng, QUESTIONS), overlap)


class Texts:
    """Keeps all texts of all parts different."""

    def __init__(self) -> None:
        self.taken = set[str]()

    def new(self, draw: Callable[[], tuple[str, T]], field: str) -> tuple[str, T]:
        """Return the first draw with a new text.

        Args:
            draw: Draws a text and something about it.
            field: The field of the configuration to lower where words run out.

        Raises:
            InputError: There seem to be no more.
        """
        for _ in range(MAX_MISSES):
            text, about = draw()
            if text not in self.taken:
                self.taken.add(text)
                return text, about
        raise InputError(
            "asks for more different texts than there are words for; lower it, or raise values",
            field=f"families.{field}",
        )


@dataclass(frozen=True)
class Pool:
    """Passages of a domain and what they mean.

    Args:
        meanings: Meaning of each passage.
        passages: The passages; equal ids mean equal texts.
    """

    meanings: list[Meaning]
    passages: list[Passage]

    @cached_property
    def rows(self) -> dict[Meaning, list[int]]:
        """Rows of each meaning that occurs."""
        found: dict[Meaning, list[int]] = defaultdict(list)
        for row, meaning in enumerate(self.meanings):
            found[meaning].append(row)
        return dict(found)

    def others(self, rng: random.Random, meaning: Meaning, count: int, shared: Sequence[int]) -> list[int]:
        """Draw rows of other meanings: those sharing ``shared[0]`` parts first, then ``shared[1]``, and so on."""
        if meaning not in self._alike:
            groups = self._alike[meaning] = [[], [], [], []]
            for other, rows in self.rows.items():
                groups[other.shared(meaning)] += rows
        drawn: list[int] = []
        for parts in shared:
            rows = self._alike[meaning][parts]
            drawn += rng.sample(rows, min(count - len(drawn), len(rows)))
        return drawn

    @cached_property
    def _alike(self) -> dict[Meaning, list[list[int]]]:
        return {}


def draw_pool(
    rng: random.Random,
    domain: Domain,
    meanings: Sequence[Meaning],
    count: int,
    write: Writer,
    texts: Texts,
    field: str,
) -> Pool:
    """Write texts round the meanings in random order, so that each has as many as another, give or take one."""
    order = rng.sample(meanings, len(meanings))
    pool = Pool([], [])
    for row in range(count):
        meaning = order[row % len(order)]
        text, _ = texts.new(partial(_written, write, rng, domain, meaning), field)
        pool.meanings.append(meaning)
        pool.passages.append(Passage(content_id(text), text))
    return pool


def _written(write: Writer, rng: random.Random, domain: Domain, meaning: Meaning) -> tuple[str, None]:
    return write(rng, domain, meaning), None
