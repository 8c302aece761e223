"""What multimodal training and evaluation are made of: rows of each stage, and candidates to choose from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lit_embed.items import Item, Kind

Key: TypeAlias = tuple[str, str]  # of an item: its text, and the key of its image
TrainStage = Literal["warmup", "reconstruction", "contrastive"]
Domain = Literal["ind", "ood"]  # whether a task, or what it is made of, was seen in training
Group = Literal["classification", "vqa", "retrieval", "grounding", "other"]

GROUPS: tuple[Group, ...] = ("classification", "vqa", "retrieval", "grounding", "other")


class ItemPair(NamedTuple):
    """A query, what answers it, and the task that both belong to; ``negative`` is a wrong answer, if one is known."""

    query: Item
    positive: Item
    task: str
    negative: Item | None = None


class TargetPair(NamedTuple):
    """A query, the text that is to be told from its embedding, and the task that both belong to."""

    query: Item
    target: str
    task: str


class WarmupRow(NamedTuple):
    """An image with its caption as the item's text; ``seed`` is for everything drawn in it."""

    item: Item
    seed: int


class ReconstructionRow(NamedTuple):
    """A pair to reconstruct; ``seed`` is for everything drawn in it."""

    query: Item
    target: str
    task: str
    seed: int


class ContrastiveRow(NamedTuple):
    """A pair to contrast with the others of its batch; equal positives have equal keys."""

    query: Item
    positive: Item
    negative: Item | None
    task: str
    seed: int


class EncodeRow(NamedTuple):
    """An item to encode as a query or as a passage, and its number among all of them."""

    number: int
    item: Item
    kind: Kind


@dataclass(frozen=True, eq=False)
class ChoiceTask:
    """Queries, each with a list of candidates of which the first is right.

    Args:
        name: Name of the task.
        group: Group that it belongs to.
        domain: Whether it is like what training had (``ind``) or not (``ood``); None where nobody said.
        queries: The queries.
        targets: Every candidate of any query, once.
        candidates: For each query its candidates' rows among the targets, int32 ``(N,)``, the right one first, none
            twice. Lengths may differ.

    Raises:
        ValueError: Queries and lists differ in number, or a list is empty.
    """

    name: str
    group: Group
    domain: Domain | None
    queries: Sequence[Item]
    targets: Sequence[Item]
    candidates: Sequence[NDArray[np.int32]]

    def __post_init__(self) -> None:
        if len(self.queries) != len(self.candidates) or not self.queries:
            raise ValueError(
                f"task '{self.name}' needs a list of candidates for each query and at least one query, got "
                f"{len(self.candidates)} for {len(self.queries)}"
            )
        for number, rows in enumerate(self.candidates):
            if not len(rows):
                raise ValueError(f"query {number} of task '{self.name}' has no candidate")

    def items(self) -> Iterable[Item]:
        """Queries and targets."""
        yield from self.queries
        yield from self.targets


class TargetTable:
    """Numbers items in the order they come; equal ones get one number."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._rows: dict[Key, int] = {}

    def row(self, item: Item) -> int:
        """The item's number."""
        row = self._rows.setdefault(item.key, len(self.items))
        if row == len(self.items):
            self.items.append(item)
        return row


def choice_task(
    name: str, group: Group, domain: Domain | None, rows: Iterable[tuple[Item, Iterable[Item]]]
) -> ChoiceTask:
    """Make a task of queries with their candidates, the right one first; repeated candidates of a list count once."""
    table = TargetTable()
    queries, candidates = [], []
    for query, targets in rows:
        queries.append(query)
        candidates.append(np.array(list(dict.fromkeys(map(table.row, targets))), dtype=np.int32))
    return ChoiceTask(name, group, domain, queries, table.items, candidates)


def encode_rows(tasks: Sequence[ChoiceTask]) -> list[EncodeRow]:
    """All queries and targets of the tasks, equal ones of a kind once; those of like length stand together."""
    queries = {item.key: item for task in tasks for item in task.queries}
    targets = {item.key: item for task in tasks for item in task.targets}
    every: list[tuple[Item, Kind]] = [*((item, "query") for item in queries.values()),
                                      *((item, "passage") for item in targets.values())]  # fmt: skip
    every.sort(key=lambda one: (one[0].image is not None, len(one[0].text)), reverse=True)
    return [EncodeRow(number, item, kind) for number, (item, kind) in enumerate(every)]
