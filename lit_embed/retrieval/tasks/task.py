"""What all evaluation tasks share: texts to encode, vectors to score, means over tasks."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_core.errors import InputError

TaskType = Literal["retrieval", "reranking", "classification", "clustering", "sts", "pair_classification"]
TextVectors = Mapping[str, Tensor]  # text id -> (D,)
DOMAINS = {"in": "in_domain", "out": "out_of_domain"}  # domain of a task -> name of the mean over its tasks


@dataclass(frozen=True, kw_only=True)
class EvalTask(ABC):
    """Texts and a score of their vectors, as MTEB has them.

    Nothing depends on the order of ids: texts are taken by ascending id wherever an order matters.

    Args:
        name: Unique among the tasks of an evaluation.
        domain: ``in`` or ``out`` of the domains trained on; what a report groups by.
        queries: Text of each query id. Types that know no sides have all their texts here, so that each gets the
            query's prompt.
        passages: Text of each passage id.
        instruction: The task in words, for the query's prompt; empty for none.

    Raises:
        InputError: Texts, ids or judgements do not make a task; the error names the task and what to do.
    """

    type: ClassVar[TaskType]
    main: ClassVar[str]  # name of the main score
    sides: ClassVar[bool] = False  # whether passages differ from queries

    name: str
    domain: str
    queries: Mapping[str, str]
    passages: Mapping[str, str] = field(default_factory=dict)
    instruction: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("an evaluation task needs a name")
        if self.domain not in DOMAINS:
            raise self.error(f"must be 'in' or 'out', got {self.domain!r}", "domain")
        if not self.queries:
            raise self.error("has no texts; give at least one", "queries")
        if self.sides != bool(self.passages):
            hint = "give at least one" if self.sides else f"a {self.type} task has all its texts among the queries"
            raise self.error(f"has {len(self.passages)} passages; {hint}", "passages")
        for side in ("queries", "passages"):
            for text_id, text in getattr(self, side).items():
                if not text.strip():
                    raise self.error(f"text '{text_id}' is empty; leave it out", side)
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Raise the first mistake in the judgements."""

    @abstractmethod
    def score(self, queries: TextVectors, passages: TextVectors) -> dict[str, float]:
        """Score vectors of the texts.

        Args:
            queries: Vector ``(D,)`` of each query id; other ids are ignored.
            passages: Vector of each passage id.

        Returns:
            All scores by name, the main one included; larger is better.

        Raises:
            InputError: A vector is missing or not finite.
        """

    def error(self, message: str, field: str | None = None) -> InputError:
        """An error that names the task."""
        return InputError(f"{self.type} task '{self.name}': {message}", field=field)

    def known(self, ids: Iterable[str], texts: Mapping[str, str], field: str) -> None:
        """Raise for an id without a text."""
        for text_id in ids:
            if text_id not in texts:
                raise self.error(f"text '{text_id}' is judged, but there is no such text; add it or drop it", field)

    def stack(self, vectors: TextVectors, ids: Sequence[str]) -> Tensor:
        """Vectors of the ids as float32 ``(N, D)`` on the CPU.

        Raises:
            InputError: One is missing, not finite, or of another length than the first.
        """
        for text_id in ids:
            if text_id not in vectors:
                raise self.error(f"text '{text_id}' has no vector; encode all queries and passages of the task")
            if (shape := vectors[text_id].shape) != vectors[ids[0]].shape or len(shape) != 1:
                raise self.error(f"the vector of text '{text_id}' has shape {tuple(shape)}; give one length to all")
        stacked = torch.stack([vectors[text_id].detach().cpu().float() for text_id in ids])
        finite = stacked.isfinite().all(1)
        if not finite.all():
            wrong = ids[int((~finite).nonzero()[0])]
            raise self.error(f"the vector of text '{wrong}' is not finite; look for a diverged run or an overflow")
        return stacked

    def unit(self, vectors: TextVectors, ids: Sequence[str]) -> Tensor:
        """Like ``stack``, scaled to length 1; a zero vector stays zero."""
        return torch.nn.functional.normalize(self.stack(vectors, ids).double(), dim=1).float()


def mean_scores(scores: Mapping[str, Mapping[str, float]], tasks: Sequence[EvalTask]) -> dict[str, float]:
    """Average main scores over tasks.

    Args:
        scores: Scores of each task name, as ``EvalTask.score`` gives them; other names are ignored.
        tasks: What to average over; each counts once.

    Returns:
        ``mean_task`` over tasks, ``mean_type`` over the means of the task types, and ``in_domain`` and
        ``out_of_domain`` over the tasks of each domain that has any.

    Raises:
        InputError: There are no tasks, two have one name, or one has no main score.
    """
    if not tasks:
        raise InputError("there are no evaluation tasks to average over")
    groups: dict[str, dict[str, list[float]]] = {"type": {}, "domain": {}}
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise task.error("there are two tasks of this name; rename one")
        seen.add(task.name)
        value = scores.get(task.name, {}).get(task.main)
        if value is None:
            raise task.error(f"has no score '{task.main}'; score it before averaging")
        groups["type"].setdefault(task.type, []).append(value)
        groups["domain"].setdefault(DOMAINS[task.domain], []).append(value)
    types, domains = groups["type"], groups["domain"]
    return {
        "mean_task": _mean([value for values in types.values() for value in values]),
        "mean_type": _mean([_mean(values) for values in types.values()]),
        **{name: _mean(domains[name]) for name in DOMAINS.values() if name in domains},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
