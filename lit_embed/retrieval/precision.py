"""Precision@1 of tasks in which each query chooses among candidates, as MMEB evaluates."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_embed.functional.precision import Ties, precision_at_1
from lit_embed.items import Item
from lit_embed.multimodal import GROUPS, ChoiceTask, Key


@dataclass(frozen=True)
class Precision:
    """Precision@1 of several tasks; a mean over tasks counts each task once, however many queries it has.

    Args:
        tasks: The tasks.
        values: For each task the value of each query, float32 ``(Q,)`` on the CPU.
    """

    tasks: Sequence[ChoiceTask]
    values: Mapping[str, Tensor]

    def by_task(self) -> dict[str, float]:
        """Mean over the queries of each task."""
        return {name: values.double().mean().item() for name, values in self.values.items()}

    def metrics(self) -> dict[str, float]:
        """All means by name.

        Returns:
            ``p@1/<task>`` of each task, ``p@1/group/<group>``, ``p@1/ind`` and ``p@1/ood`` of those there are, and
            ``p@1`` over all tasks.
        """
        means = self.by_task()
        summaries = {
            name: math.fsum(means[task.name] for task in tasks) / len(tasks) for name, tasks in self._summaries()
        }
        return {f"p@1/{name}": mean for name, mean in means.items()} | summaries

    def per_item(self) -> dict[str, dict[str, float]]:
        """Values of the single queries ``<task>/<number>`` behind each metric.

        A mean over tasks is one over queries only where its tasks have equally many; otherwise it is left out.
        """
        items = {
            name: {f"{name}/{number}": value for number, value in enumerate(values.tolist())}
            for name, values in self.values.items()
        }
        found = {f"p@1/{name}": values for name, values in items.items()}
        for name, tasks in self._summaries():
            if len({len(task.queries) for task in tasks}) == 1:
                found[name] = {item: value for task in tasks for item, value in items[task.name].items()}
        return found

    def _summaries(self) -> Iterator[tuple[str, list[ChoiceTask]]]:
        """Names of the means over tasks, and the tasks."""
        for group in GROUPS:
            if tasks := [task for task in self.tasks if task.group == group]:
                yield f"p@1/group/{group}", tasks
        for domain in ("ind", "ood"):
            if tasks := [task for task in self.tasks if task.domain == domain]:
                yield f"p@1/{domain}", tasks
        yield "p@1", list(self.tasks)


class Ranked(NamedTuple):
    """A candidate of a query, its score, and whether it is the right one."""

    item: Item
    score: float
    right: bool


def evaluate_precision(
    vectors: Mapping[Key, Tensor],
    tasks: Sequence[ChoiceTask],
    ties: Ties = "wrong",
    normalize: bool = True,
    targets: Mapping[Key, Tensor] | None = None,
) -> Precision:
    """Score each query against its candidates.

    Scores are computed in float64 and compared in float32. Equal vectors have equal scores, whatever their place in a
    matrix product, so a tie is one.

    Args:
        vectors: Embedding ``(D,)`` of every query and candidate by the item's key (``encode_rows`` lists them).
        tasks: The tasks, of different names.
        ties: See ``precision_at_1``.
        normalize: Compare by cosine; otherwise by dot product. A candidate of length 0, one that could not be encoded,
            then comes behind all others.
        targets: Embeddings of the candidates, where an item has another as a query; None takes ``vectors``.

    Raises:
        ValueError: There are no tasks, two have one name, a vector is missing or not finite, or one of length 0 is to
            be normalised.
    """
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"need one task or several of different names, got {names}")
    values = {}
    for task in tasks:
        found = torch.empty(len(task.queries))
        for numbers, scores, right in _scored(vectors, task, normalize, targets):
            found[numbers] = precision_at_1(scores, right, ties)
        values[task.name] = found
    return Precision(tasks, values)


def top_candidates(
    vectors: Mapping[Key, Tensor],
    task: ChoiceTask,
    top_k: int = 5,
    queries: Sequence[int] | None = None,
    normalize: bool = True,
    targets: Mapping[Key, Tensor] | None = None,
) -> list[list[Ranked]]:
    """Rank each query's candidates, best first; among equal scores the right one comes last.

    Args:
        vectors: See ``evaluate_precision``.
        task: The task.
        top_k: Candidates to keep; all where there are fewer.
        queries: Numbers of the queries to rank for; all of them if ``None``.
        normalize: See ``evaluate_precision``.
        targets: See ``evaluate_precision``.

    Returns:
        For each query asked for, in that order, its best candidates.

    Raises:
        ValueError: See ``evaluate_precision``.
    """
    chosen = list(range(len(task.queries))) if queries is None else list(queries)
    part = ChoiceTask(task.name, task.group, task.domain, [task.queries[i] for i in chosen], task.targets,
                      [task.candidates[i] for i in chosen])  # fmt: skip
    ranked: list[list[Ranked]] = [[] for _ in chosen]
    for numbers, scores, right in _scored(vectors, part, normalize, targets):
        columns = np.sort(part.candidates[int(numbers[0])])
        for number, row, gold in zip(numbers.tolist(), scores.tolist(), right.tolist(), strict=True):
            candidates = [Ranked(task.targets[c], row[i], i == gold) for i, c in enumerate(columns)]
            ranked[number] = sorted(candidates, key=lambda candidate: (-candidate.score, candidate.right))[:top_k]
    return ranked


def _scored(
    vectors: Mapping[Key, Tensor], task: ChoiceTask, normalize: bool, of_targets: Mapping[Key, Tensor] | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Score the queries that have the same set of candidates with one matrix product.

    Yields:
        Numbers of the queries ``(Q,)``, their scores float32 ``(Q, N)`` with a column for each candidate in the order
        of the targets, and the column of the right one ``(Q,)``.
    """
    queries, query_rows = _distinct_rows(vectors, task.queries, normalize)
    targets, target_rows = _distinct_rows(vectors if of_targets is None else of_targets, task.targets, normalize)
    empty_queries, empty_targets = ((found == 0).all(1) for found in (queries, targets))
    lists: dict[bytes, list[int]] = {}
    for number, candidates in enumerate(task.candidates):
        lists.setdefault(np.sort(candidates).tobytes(), []).append(number)
    for numbers in lists.values():
        columns = np.sort(task.candidates[numbers[0]])
        first = np.array([task.candidates[number][0] for number in numbers])
        rows, places = target_rows[torch.from_numpy(columns).long()].unique(return_inverse=True)
        scores = (queries[query_rows[numbers]] @ targets[rows].T).float()
        behind = ~empty_queries[query_rows[numbers], None] & empty_targets[rows]  # else all are equal, and a tie
        scores = scores.masked_fill(behind, -math.inf)
        yield torch.tensor(numbers), scores[:, places], torch.from_numpy(np.searchsorted(columns, first))


def _distinct_rows(vectors: Mapping[Key, Tensor], items: Sequence[Item], normalize: bool) -> tuple[Tensor, Tensor]:
    """The items' different vectors in float64 ``(R, D)``, and each item's row among them."""
    found = []
    for item in items:
        if item.key not in vectors:
            raise ValueError(f"no vector for the item {item.key}")
        found.append(vectors[item.key])
    matrix = torch.stack(found).detach().cpu().double()
    bad = ~matrix.isfinite().all(1) | (normalize & (matrix == 0).all(1))
    if bad.any():
        item = items[int(bad.nonzero()[0])]
        raise ValueError(f"the vector of the item {item.key} is not finite" + (" or has length 0" if normalize else ""))
    rows, places = matrix.unique(dim=0, return_inverse=True)
    return torch.nn.functional.normalize(rows, dim=1, eps=0.0) if normalize else rows, places
