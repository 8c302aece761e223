"""Advantages of trees and branching scores against plain loops: ``python -m benchmarks.tree_advantages``.

- Scores: semantic entropy of positions, all at once, against a loop over positions that compares the candidates'
  embeddings of each and reads the number;
- advantages: ROSE for half-branched groups of 8, against a loop over tokens that reads like the definition (without the
  length penalty), and against a loop over responses that keeps the values of nodes in dictionaries and fills a segment
  at a time (with it).
"""

import random
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.harness import alternate, announce, arguments, print_table

SCORE_CASES = (  # vocabulary, width, positions; the second is that of the experiment's policy
    (512, 128, 4096),
    (1024, 64, 4096),
    (4096, 128, 1024),
    (32_768, 512, 128),
)
GROUP = 8
SCORE_TARGET, SECONDS_TARGET = 20, 1.0  # times faster at the vocabularies of small policies; for 512 x 8 x 4,096 tokens
SMALL = 1024  # tokens, at most
TOLERANCE = 1e-5


def loop_scores(logits: Any, embeddings: Any, top_k: int) -> Any:
    """Semantic entropy position by position."""
    import torch
    import torch.nn.functional as F

    found = []
    for row in logits:
        p = row.softmax(-1)
        entropy = -(p * p.clamp(min=1e-30).log()).sum().item()
        best = p.topk(top_k)
        unit = F.normalize(embeddings[best.indices], dim=-1)
        weighted = best.values[:, None] * best.values * (unit @ unit.T)
        found.append(entropy * -(weighted.sum() - weighted.diagonal().sum()).item())
    return torch.tensor(found)


def loop_rose(columns: list[list[int]], rewards: list[float], mask: Any, alpha: float) -> Any:
    """ROSE response by response."""
    import torch

    parents, branches, lengths, groups = columns
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)

    def owner(row: int, length: int) -> int:
        if length == 0:
            return members[groups[row]][0]
        while parents[row] >= 0 and length <= branches[row]:
            row = parents[row]
        return row

    found = torch.zeros(mask.shape)
    for rows in members.values():
        nodes = {(owner(row, branches[row]), branches[row]) for row in rows if branches[row]}
        below = {node: [row for row in rows if owner(row, node[1]) == node[0]] for node in nodes}
        values = {node: sum(rewards[row] for row in inside) / len(inside) for node, inside in below.items()}
        root = sum(rewards[row] for row in rows) / len(rows)
        correct = [row for row in rows if rewards[row] > 0.5]
        shortest = min(correct, key=lambda row: lengths[row], default=-1)
        for row in rows:
            path = sorted((length, values[own, length]) for own, length in nodes if row in below[own, length])
            path = [each for each in path if each[0] < lengths[row]]
            common, eta = 0, 1.0
            if row in correct and row != shortest:
                common = max([k for k, _ in path if owner(row, k) == owner(shortest, k)], default=0)
                eta = (lengths[shortest] - common) / max(1, lengths[row] - common)
            start, before = 0, root
            for end, value in [*path, (lengths[row], rewards[row])]:
                advantage = value - before
                if row in correct and row != shortest and start >= common:
                    advantage -= abs(advantage) * (1 - eta**alpha)
                found[row, start:end] = advantage
                start, before = end, value
    return found * mask


def token_loop_rose(columns: list[list[int]], rewards: list[float], mask: Any) -> Any:
    """ROSE without a penalty token by token, as its definition reads."""
    import torch

    parents, branches, lengths, groups = columns
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)

    def node(row: int, length: int) -> tuple[int, int]:
        while parents[row] >= 0 and length <= branches[row]:
            row = parents[row]
        return row, length

    def value(row: int, length: int) -> float:
        if length == lengths[row]:
            return rewards[row]
        rows = members[groups[row]]
        own = node(row, length)
        below = rows if length == 0 else [j for j in rows if length <= lengths[j] and node(j, length) == own]
        return sum(rewards[j] for j in below) / len(below)

    found = torch.zeros(mask.shape)
    for row, length in enumerate(lengths):
        made = {node(j, branches[j]) for j in members[groups[row]] if branches[j]}
        cuts = [0, *(k for k in range(1, length) if node(row, k) in made), length]
        for t in range(length):
            start = max(k for k in cuts if k <= t)
            end = min(k for k in cuts if k > t)
            found[row, t] = value(row, end) - value(row, start)
    return found


def grown(prompts: int, width: int) -> list[list[int]]:
    """Parents, branches, lengths and groups of random trees."""
    generator = random.Random(0)
    columns: list[list[int]] = [[], [], [], []]
    for row in range(prompts * GROUP):
        first, parent, branch, least = row - row % GROUP, -1, 0, width // 8
        if row > first and generator.random() < 0.5:
            parent = generator.randrange(first, row)
            branch = generator.randrange(columns[2][parent])
        for column, value in zip(
            columns, (parent, branch, generator.randint(max(least, branch + 1), width), row // GROUP), strict=True
        ):
            column.append(value)
    return columns


def row_of(what: str, size: str, ours: Callable[[], Any], loop: Callable[[], Any], repetitions: int) -> dict[str, Any]:
    """Time both and compare what they give."""
    difference = float((ours() - loop()).abs().max())
    times = alternate({"ours": ours, "loop": loop}, repetitions, warm=False)
    return {
        "what": what,
        "size": size,
        "ours cpu s": times["ours"].cpu_median,
        "loop cpu s": times["loop"].cpu_median,
        "times faster": times["loop"].cpu_median / times["ours"].cpu_median,
        "noise": times["ours"].noise,
        "reached": True,
        "differ": difference,
        "equal": difference < TOLERANCE,
    }


def scores(quick: bool) -> list[dict[str, Any]]:
    """Rows of the table for the scores."""
    import torch

    from lit_rl.functional.branching import semantic_entropy

    rows = []
    for vocabulary, width, count in SCORE_CASES:
        generator = torch.Generator().manual_seed(0)
        count //= 4 if quick else 1
        logits = 3 * torch.randn(count, vocabulary, generator=generator)
        embeddings = torch.randn(vocabulary, width, generator=generator)
        unit = torch.nn.functional.normalize(embeddings, dim=1)  # once a rollout
        row = row_of(
            f"scores, vocabulary {vocabulary:,}",
            f"{count:,} positions",
            lambda logits=logits, unit=unit: semantic_entropy(logits, unit, normalised=True),  # type: ignore[misc]
            lambda logits=logits, embeddings=embeddings: loop_scores(logits, embeddings, 20),  # type: ignore[misc]
            3 if quick else 7,
        )
        row["reached"] = vocabulary > SMALL or row["times faster"] >= SCORE_TARGET
        rows.append(row)
    return rows


def advantages(prompts: int, width: int, repetitions: int, by_token: bool) -> dict[str, Any]:
    """The row of the table for one size and one of the loops."""
    import torch

    from lit_rl.functional.forest import Forest
    from lit_rl.functional.tree_advantages import rose

    columns = grown(prompts, width)
    rewards = (torch.rand(prompts * GROUP, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    tensors = [torch.tensor(column) for column in columns]
    mask = torch.arange(width) < tensors[2][:, None]
    row = row_of(
        "ROSE, loop over tokens" if by_token else "ROSE, loop over segments",
        f"{prompts} x {GROUP} x {width:,}",
        lambda: rose(Forest(*tensors), rewards, mask, 0.0 if by_token else 1.0),
        lambda: (
            token_loop_rose(columns, rewards.tolist(), mask)
            if by_token
            else loop_rose(columns, rewards.tolist(), mask, 1.0)
        ),
        repetitions,
    )
    row["reached"] = row["ours cpu s"] < SECONDS_TARGET
    return row


def main() -> int:
    """Compare; 1 where results differ."""
    settings = arguments(__doc__)
    announce(
        "Tree advantages and branching scores",
        ("torch",),
        settings.threads,
        "groups of 8 of which half branched; top 20 of the vocabulary; medians of alternating repetitions",
    )
    repetitions = 3 if settings.quick else 5
    sizes = ((16, 256, True), (64, 1024, False)) if settings.quick else ((64, 1024, True), (512, 4096, False))
    rows = scores(settings.quick)
    rows += [advantages(prompts, width, repetitions, by_token) for prompts, width, by_token in sizes]
    print_table(rows)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
