"""The five domains: kinds of thing and two attributes each, and which meanings belong to which split."""

import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lit_embed.data.world.lexicon import ATTRIBUTE_TYPES
from lit_embed.data.world.wording import Fact

Split = Literal["train", "val", "test"]


class Meaning(NamedTuple):
    """What a text states: a kind and a value of the first and of the second attribute of a domain."""

    kind: int
    first: int
    second: int

    def shared(self, other: "Meaning") -> int:
        """Count the parts in which two meanings agree."""
        return sum(mine == theirs for mine, theirs in zip(self, other, strict=True))


@dataclass(frozen=True)
class Domain:
    """A part of the lexicon.

    Args:
        name: What its tasks are named after.
        kinds: Rows of ``lexicon.KINDS``.
        attributes: Two rows of ``lexicon.ATTRIBUTE_TYPES``.
    """

    name: str
    kinds: tuple[int, ...]
    attributes: tuple[int, int]

    def facts(self, meaning: Meaning) -> list[Fact]:
        """Both facts of a meaning, as ``wording`` takes them."""
        return list(zip(self.attributes, meaning[1:], strict=True))

    def asks(self) -> tuple[str, str]:
        """The attributes in a word each."""
        first, second = (ATTRIBUTE_TYPES[row].ask for row in self.attributes)
        return first, second

    def meanings(self, seed: int, values: int) -> dict[Split, list[Meaning]]:
        """Divide all meanings among the splits: a tenth for validation, a fifth for test.

        Pairs of values are divided, alike for all kinds, so that no two values of a test text are seen together in
        training. A split holds each value equally often, so that each label of a task comes up in each split: values
        are shuffled, and the sum of their places, modulo their number, decides.

        Args:
            seed: Seed of the shuffles.
            values: Values of an attribute in use.
        """
        test, val = max(1, round(values / 5)), max(1, round(values / 10))
        rng = random.Random(f"{seed}/{self.name}/meanings")
        places = [rng.sample(range(values), values) for _ in range(2)]
        found: dict[Split, list[Meaning]] = {"train": [], "val": [], "test": []}
        for kind in self.kinds:
            for first in range(values):
                for second in range(values):
                    cell = (places[0][first] + places[1][second]) % values
                    split: Split = "test" if cell < test else "val" if cell < test + val else "train"
                    found[split].append(Meaning(kind, first, second))
        return found


DOMAINS = {
    domain.name: domain
    for domain in (
        Domain("travel", (0, 7, 13, 14), (4, 7)),  # ship bridge map cart; place damage
        Domain("household", (1, 3, 9, 16), (0, 9)),  # cup lamp chair box; colour quality
        Domain("workshop", (2, 5, 6, 8), (1, 2)),  # tower statue clock book; material maker
        Domain("festival", (10, 11, 15, 19), (8, 6)),  # drum bell mask tent; occasion purpose
        Domain("court", (4, 12, 17, 18), (3, 5)),  # sword coat ring mirror; owner emblem
    )
}
